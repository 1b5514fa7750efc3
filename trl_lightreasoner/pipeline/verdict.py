"""From a difference of accuracies to one sentence. Numbers in, text out."""

from typing import Any, NamedTuple

from ..evaluation.sets import HELD_OUT, title_of


# McNemar's p, beside the interval, which of few questions says too much
_MAX_P = 0.05


class Verdict(NamedTuple):
    """
    What to do with an adapter.

    Attributes:
        verdict (`str`): `"better"`, `"not told"`, `"worse"`, or `"not answered"`.
        sentence (`str`): The same with its numbers.
    """

    verdict: str
    sentence: str


def judge(difference: dict[str, float] | None, asked: str = "") -> Verdict:
    """
    What a difference says.

    Args:
        difference (`dict[str, float]`, *optional*): As of [`PairedDifference`], `p_value` where there is one. `None`
            if nothing was answered.
        asked (`str`): What was answered, such as "500 held-out questions".

    Example:

    ```python
    >>> judge({"difference": 0.051, "low": 0.026, "high": 0.076, "p_value": 1e-4}, "500 held-out questions").sentence
    '+5.1 points (2.6 to 7.6) on 500 held-out questions: keep it.'

    ```
    """
    if difference is None:
        return Verdict(
            "not answered",
            "Nothing was answered, so that nobody knows what it is worth: give a column of answers "
            "(`--answer_column`), or `--benchmarks`.",
        )
    points, low, high = (_points(difference[name]) for name in ("difference", "low", "high"))
    numbers = f"{points:+.1f} points ({low:.1f} to {high:.1f}) on {asked}"
    is_sure = difference.get("p_value", 0.0) <= _MAX_P
    if is_sure and difference["low"] > 0:
        return Verdict("better", f"{numbers}: keep it.")
    if is_sure and difference["high"] < 0:
        return Verdict("worse", f"{numbers}: worse: do not use this adapter.")
    return Verdict("not told", f"{numbers}: not told from 0; ask more questions before you use it.")


def deciding(benchmarks: dict[str, Any], average: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """
    The scores that decide, and what was asked for them: of the questions that were held back, or else of the benchmark
    or of the mean over several.

    Args:
        benchmarks (`dict[str, Any]`): Of results.json.
        average (`dict[str, Any]`, *optional*): Of results.json.
    """
    if HELD_OUT in benchmarks:
        scores = benchmarks[HELD_OUT]
        count = scores["num_problems"]
        return scores, f"{count:,} held-out question{'s' if count > 1 else ''}"
    if average is not None:
        return average, f"{len(benchmarks)} benchmarks, each counted the same"
    ((name, scores),) = benchmarks.items()
    return scores, f"{scores['num_problems']:,} problems of {title_of(name)}"


def _points(share: float) -> float:
    return round(100 * share, 1) + 0.0  # not -0.0
