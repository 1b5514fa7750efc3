"""The trajectories of a Dataset that a report shows."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..models.token_text import TokenTexts
from ..sampling.pair_check import PairCheck
from .row_index import RowIndex
from .row_texts import completion_text
from .statistics import StepStatistics


MAX_TOKENS = 512  # maximum number of shown tokens of a completion


class ShownStep(NamedTuple):
    """
    A kept step.

    Attributes:
        position (`int`): t.
        token_ids (`list[int]`): Support of v_C, most probable first, and the token that was taken, if it is outside.
        label_probs (`list[float]`): v_C there.
        expert_probs, amateur_probs (`list[float]`, *optional*): pi_E and pi_A there.
        trained_probs (`list[float]`, *optional*): Probabilities of the trained model there.
    """

    position: int
    token_ids: list[int]
    label_probs: list[float]
    expert_probs: list[float] | None = None
    amateur_probs: list[float] | None = None
    trained_probs: list[float] | None = None


@dataclass
class ShownTrajectory:
    """A row of the Dataset, cut to `MAX_TOKENS` tokens of its completion."""

    row: int
    prompt: Any  # the column, if there is one: text or messages
    prompt_ids: list[int]
    completion_ids: list[int]
    kl_divergence: list[float | None]
    num_tokens: int
    completion: str | None  # the column as text, if there is one
    steps: list[ShownStep] = field(default_factory=list)


@dataclass
class ReportedDataset:
    """
    The content of a report about one Dataset.

    Attributes:
        name (`str`): Its name in the report.
        samplings (`list[dict]`): Every distinct metadata of its rows, as of [`made_with`].
        statistics ([`StepStatistics`]): Statistics of every row.
        texts ([`TokenTexts`]): Texts of its tokens.
        trajectories (`list[ShownTrajectory]`): The shown trajectories.
        notes (`list[str]`): Sentences on what cannot be shown, and why.
        index ([`RowIndex`]): Index of every row.
        check ([`PairCheck`], *optional*): Judgement of the pair. `None` if a divergence is not known.
    """

    name: str
    samplings: list[dict[str, Any]]
    statistics: StepStatistics
    texts: TokenTexts
    trajectories: list[ShownTrajectory]
    notes: list[str]
    index: RowIndex
    check: PairCheck | None = None


def choose_rows(statistics: list[StepStatistics], count: int, seed: int) -> tuple[list[list[int]], bool]:
    """
    Choose the rows to show of each Dataset at random from those with a kept step, in the Dataset's order.

    Args:
        statistics (`list[StepStatistics]`): Statistics of each Dataset.
        count (`int`): Maximum number of rows per Dataset.
        seed (`int`): Random seed.

    Returns:
        The rows of each Dataset, and whether they have the same prompts, in the same order. They do if the Datasets
        share enough prompts.
    """
    candidates = []
    for each in statistics:
        _, firsts = np.unique(each.trajectory_keys, return_index=True)
        kept = firsts[each.kept_per_row[firsts] > 0]
        candidates.append(np.sort(kept if len(kept) else firsts))
    draw = np.random.default_rng(seed)
    if len(statistics) > 1:
        # One row per prompt, even if it has no kept step in the other Datasets
        places = [
            dict(zip(each.prompt_keys[::-1].tolist(), range(each.num_rows)[::-1], strict=True)) for each in statistics
        ]
        first = [row for row in candidates[0].tolist() if row == places[0][statistics[0].prompt_keys[row].item()]]
        keys = [statistics[0].prompt_keys[row].item() for row in first]
        shared = [key for key in keys if all(key in place for place in places)]
        if len(shared) >= min(count, len(first)):
            chosen = np.sort(draw.choice(len(shared), min(count, len(shared)), replace=False))
            return [[place[shared[i]] for i in chosen] for place in places], True
    return [np.sort(draw.choice(rows, min(count, len(rows)), replace=False)).tolist() for rows in candidates], False


def load_trajectories(dataset: Dataset, rows: list[int]) -> list[ShownTrajectory]:
    """The rows as a report shows them, without the models' probabilities."""
    shown = []
    for index, row in zip(rows, dataset.with_format(None).select(rows), strict=True):
        trajectory = ShownTrajectory(
            index,
            row.get("prompt"),
            row["prompt_ids"],
            row["completion_ids"][:MAX_TOKENS],
            row["kl_divergence"][:MAX_TOKENS],
            len(row["completion_ids"]),
            completion_text(row, None),
        )
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            if t < MAX_TOKENS:
                taken = row["completion_ids"][t]
                outside = [] if taken in ids else [taken]
                trajectory.steps.append(ShownStep(t, ids + outside, probs + [0.0] * len(outside)))
        shown.append(trajectory)
    return shown
