"""Several rounds of a run: what each has brought, when there is no use in another, and which is kept.

The trajectories of a later round are those of the adapter of the round before, and its labels, by default, those of
the expert as it was at first. They amplify nothing that a round has taught, and show states that the trained model
comes into (DAgger, arXiv 1011.0686).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset

from ..evaluation.sets import HELD_OUT
from ..evaluation.statistics import compare
from .folder import RoundFolder, write_json
from .run_config import RunConfig


# Below this share of the kept steps at which v_C prefers another token there is nothing left to correct
_MIN_CORRECTIONS = 0.01
# By so much more of the answers may be cut off than in the round before
_MAX_CUT = 0.02
_WARNED = {
    "entropy": "the model has become surer than its labels",
    "drift": "the model has gone further from the expert than its labels ask for",
}


class Round(NamedTuple):
    """
    What a round has brought, as round.json holds it.

    Attributes:
        number (`int`): From 1.
        num_prompts, num_steps, num_kept (`int`): What was sampled.
        corrections (`float`): Share of the kept steps at which v_C prefers another token than the one that was taken.
        warned (`list[str]`): Of `"entropy"` and `"drift"`, what was warned of.
        results (`dict[str, Any]`, *optional*): What results.json holds, if anything was answered.
        share_cut (`float`): Of the answers.
        against_last (`dict[str, float]`, *optional*): On the held-out questions against the round before, or the
            expert, as of [`PairedDifference`].
    """

    number: int
    num_prompts: int
    num_steps: int
    num_kept: int
    corrections: float
    warned: list[str]
    results: dict[str, Any] | None
    share_cut: float
    against_last: dict[str, float] | None


def split_prompts(prompts: Dataset, args: RunConfig) -> list[Dataset]:
    """The questions of each round, none of which has two."""
    edges = [0, *(args.num_prompts + i * args.num_prompts_later for i in range(args.num_rounds))]
    ends = [min(edge, len(prompts)) for edge in edges]
    return [prompts.select(range(*pair)) for pair in zip(ends, ends[1:], strict=False)]


def describe_round(
    number: int,
    steps: Dataset,
    num_steps: int,
    num_kept: int,
    warned: set[str],
    results: dict[str, Any] | None,
    folder: RoundFolder,
    before: RoundFolder | None,
) -> Round:
    """
    Write down what a round has brought, which marks it as complete.

    Args:
        number, num_steps, num_kept: As of [`Round`].
        steps ([`~datasets.Dataset`]): What it sampled.
        warned (`set[str]`): What was warned of.
        results (`dict[str, Any]`, *optional*): Of its answers.
        folder ([`RoundFolder`]): Its folder.
        before ([`RoundFolder`], *optional*): Of the round before.
    """
    others = sum(
        row["completion_ids"][t] != label_ids[0]
        for row in steps.select_columns(["completion_ids", "step_positions", "label_ids"])
        for t, label_ids in zip(row["step_positions"], row["label_ids"], strict=True)
    )
    against_last, share_cut = None, 0.0
    if results is not None:
        scores = results["benchmarks"].values()
        share_cut = sum(each["model"]["num_cut"] for each in scores) / sum(each["num_problems"] for each in scores)
        if HELD_OUT in results["benchmarks"]:
            last = folder.evaluation / "baseline" if before is None else before.evaluation / "model"
            verdicts = [read_verdicts(path) for path in (folder.evaluation / "model", last)]
            against_last = compare(*verdicts)._asdict()
    outcome = Round(
        number, len(steps), num_steps, num_kept, others / num_kept, sorted(warned), results, share_cut, against_last
    )
    write_json(folder.outcome, outcome._asdict())
    return outcome


def read_round(folder: RoundFolder) -> Round:
    """What [`describe_round`] has written."""
    return Round(**json.loads(folder.outcome.read_text(encoding="utf-8")))


def read_verdicts(path: Path) -> list[bool]:
    """Which of the held-out questions were answered right."""
    file = str(path / f"{HELD_OUT}.parquet")
    return load_dataset("parquet", data_files=file, split="train")["correct"][:]


def why_stop(rounds: list[Round], share_cut_before: float) -> str | None:
    """
    Why there is no use in another round, or `None`.

    Args:
        rounds (`list[Round]`): Those that are complete, one or more.
        share_cut_before (`float`): Of the expert's answers, how many were cut off.
    """
    last = rounds[-1]
    if last.warned:
        return _WARNED[last.warned[0]]
    if last.against_last is not None and last.against_last["difference"] < 0:
        return "fewer of the held-out questions were answered right than before it"
    if last.share_cut > share_cut_before + _MAX_CUT:
        return f"{last.share_cut:.1%} of the answers were cut off, and {share_cut_before:.1%} of the expert's"
    if last.corrections < _MIN_CORRECTIONS:
        return f"v_C prefers another token at {last.corrections:.1%} of the kept steps, so that little is left to learn"
    return None


def choose_round(rounds: list[Round]) -> Round:
    """The round with most answers right, of equal ones the first; without answers the last."""
    if rounds[-1].results is None:
        return rounds[-1]
    return max(rounds, key=lambda each: (_accuracy(each), -each.number))


def _accuracy(outcome: Round) -> float:
    assert outcome.results is not None
    benchmarks = outcome.results["benchmarks"]
    if HELD_OUT in benchmarks:
        return benchmarks[HELD_OUT]["model"]["accuracy"]
    return sum(scores["model"]["accuracy"] for scores in benchmarks.values()) / len(benchmarks)
