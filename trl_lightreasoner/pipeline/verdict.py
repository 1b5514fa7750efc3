"""From a difference of accuracies to a verdict in one sentence."""

from typing import Any, NamedTuple

from ..evaluation.sets import HELD_OUT, title_of


# McNemar's p as well, since the interval is too optimistic for few questions
_MAX_P = 0.05


class Verdict(NamedTuple):
    """
    What to do with an adapter.

    Attributes:
        verdict (`str`): `"better"`, `"not significant"`, `"worse"`, or `"not answered"`.
        sentence (`str`): The same with its numbers.
    """

    verdict: str
    sentence: str


def judge(difference: dict[str, float] | None, asked: str = "") -> Verdict:
    """
    The verdict on a difference.

    Args:
        difference (`dict[str, float]`, *optional*): In the form of [`PairedDifference`], with a `p_value` if there is
            one. `None` if nothing was answered.
        asked (`str`): The questions that were answered, such as "500 held-out questions".

    Example:

    ```python
    >>> judge({"difference": 0.051, "low": 0.026, "high": 0.076, "p_value": 1e-4}, "500 held-out questions").sentence
    '+5.1 points (2.6 to 7.6) on 500 held-out questions: keep it for questions like these.'

    ```
    """
    if difference is None:
        return Verdict(
            "not answered",
            "The adapter was not evaluated. Hold out questions with answers (`--answer_column`, `--num_held_out`), or "
            "give `--benchmarks`.",
        )
    numbers = f"{write_difference(difference)} on {asked}"
    is_sure = difference.get("p_value", 0.0) <= _MAX_P
    if is_sure and difference["low"] > 0:
        return Verdict("better", f"{numbers}: keep it for questions like these.")
    if is_sure and difference["high"] < 0:
        return Verdict("worse", f"{numbers}: worse. Do not use this adapter.")
    return Verdict(
        "not significant", f"{numbers}: not significantly different from 0. Ask more questions before you use it."
    )


def judge_search(
    num_settings: int,
    setting: str,
    is_default: bool,
    best: dict[str, float],
    default: dict[str, float],
    between: dict[str, float],
    count: int,
) -> Verdict:
    """
    The verdict of a search, on its held-out questions.

    Args:
        num_settings (`int`): Number of settings that were tried.
        setting (`str`): The best setting, in words.
        is_default (`bool`): Whether the best setting is the default one.
        best, default (`dict[str, float]`): The two settings compared with the expert, in the form of
            [`PairedDifference`].
        between (`dict[str, float]`): The best setting compared with the default.
        count (`int`): Number of held-out questions.

    Example:

    ```python
    >>> best = {"difference": 0.63, "low": 0.58, "high": 0.68}
    >>> judge_search(20, "beta 0.8", True, best, best, {}, 500).sentence
    'Best of 20 settings: the default one (beta 0.8): +63.0 points (58.0 to 68.0) on 500 held-out questions.'

    ```
    """
    verdict = judge(best).verdict
    name = f"the default one ({setting})" if is_default else setting
    settings = f"{num_settings} setting{'s' if num_settings > 1 else ''}"
    questions = f"{count:,} held-out question{'s' if count > 1 else ''}"
    sentence = f"Best of {settings}: {name}: {write_difference(best)} on {questions}"
    if not is_default:
        sentence += f"; the default setting {write_difference(default)}"
    sentence += "."
    if verdict != "better":
        is_worse = verdict == "worse"
        reason = "worse than the expert: do not use it" if is_worse else "not significantly different from the expert"
        sentence += f" It is {reason}."
    elif not is_default:
        against = {
            "better": "better than",
            "worse": "worse than",
            "not significant": "not significantly different from",
        }[judge(between).verdict]
        sentence += f" It is {against} the default setting: {write_difference(between)}."
    return Verdict(verdict, sentence)


def write_difference(difference: dict[str, float]) -> str:
    """A difference of accuracies with its interval."""
    points, low, high = (_points(difference[name]) for name in ("difference", "low", "high"))
    return f"{points:+.1f} points ({low:.1f} to {high:.1f})"


def deciding(benchmarks: dict[str, Any], average: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """
    The scores that decide, and a description of their questions: the held-out questions, or without them the benchmark
    or the mean over several.

    Args:
        benchmarks (`dict[str, Any]`): Of results.json.
        average (`dict[str, Any]`, *optional*): Of results.json.
    """
    if HELD_OUT in benchmarks:
        scores = benchmarks[HELD_OUT]
        count = scores["num_problems"]
        return scores, f"{count:,} held-out question{'s' if count > 1 else ''}"
    if average is not None:
        return average, f"{len(benchmarks)} benchmarks, equally weighted"
    ((name, scores),) = benchmarks.items()
    return scores, f"{scores['num_problems']:,} problems of {title_of(name)}"


def _points(share: float) -> float:
    return round(100 * share, 1) + 0.0  # not -0.0
