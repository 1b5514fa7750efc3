"""Read and check kept steps in batches, as flat NumPy arrays. A Python loop over rows takes ten times longer."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .dataset import MAKE_STEPS, STEP_COLUMNS, check_columns
from .training_rows import SUM_TOLERANCE, check_row


_TYPES = {
    "prompt_ids": pa.list_(pa.int64()),
    "completion_ids": pa.list_(pa.int64()),
    "kl_divergence": pa.list_(pa.float64()),
    "step_positions": pa.list_(pa.int64()),
    "label_ids": pa.list_(pa.list_(pa.int64())),
    "label_probs": pa.list_(pa.list_(pa.float64())),
}
_ROWS = 200  # rows in memory at a time
_MAX_ID = 2**31
_COPIES = -1


class StepColumns(NamedTuple):
    """
    R rows with S kept steps. The prompt of row r is `prompt_ids[prompts[r] : prompts[r + 1]]`, and so on. Its kept
    steps are those from `steps[r]` to `steps[r + 1]`, and the label of step s is from `labels[s]` to `labels[s + 1]`.

    Attributes:
        prompt_ids, prompts (`np.ndarray`, the second of shape `(R + 1,)`): The prompts.
        completion_ids, divergences, completions (`np.ndarray`, the third of shape `(R + 1,)`): The completions, and
            the divergence of each of their tokens in nats, NaN where it is not known.
        positions, steps (`np.ndarray` of shape `(S,)` and `(R + 1,)`): The position t of each kept step.
        label_ids, label_probs, labels (`np.ndarray`, the third of shape `(S + 1,)`): v_C of each kept step.
    """

    prompt_ids: np.ndarray
    prompts: np.ndarray
    completion_ids: np.ndarray
    divergences: np.ndarray
    completions: np.ndarray
    positions: np.ndarray
    steps: np.ndarray
    label_ids: np.ndarray
    label_probs: np.ndarray
    labels: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Row of each kept step, of shape `(S,)`."""
        return np.repeat(np.arange(len(self.steps) - 1), np.diff(self.steps))

    @property
    def places(self) -> np.ndarray:
        """Index of each kept step in `completion_ids` and `divergences`, of shape `(S,)`."""
        return self.completions[self.rows] + self.positions

    @property
    def favourites(self) -> np.ndarray:
        """
        Index of the most probable token of each v_C, the first if several are equal, in `label_ids` and `label_probs`,
        of shape `(S,)`.
        """
        if not len(self.positions):
            return np.zeros(0, dtype=int)
        highest = np.maximum.reduceat(self.label_probs, self.labels[:-1])
        sizes = np.diff(self.labels)
        found = np.flatnonzero(self.label_probs == np.repeat(highest, sizes))
        _, firsts = np.unique(np.repeat(np.arange(len(sizes)), sizes)[found], return_index=True)
        return found[firsts]

    def keys(self) -> list[tuple[int, int]]:
        """
        For each row, a hash of the prompt, and a hash of prompt, completion and divergences: two amateurs make two
        trajectories of one answer.
        """
        keys = []
        for row in range(len(self.prompts) - 1):
            tokens = slice(*self.completions[row : row + 2])
            prompt = self.prompt_ids[slice(*self.prompts[row : row + 2])].tobytes()
            answer = (self.completion_ids[tokens].tobytes(), self.divergences[tokens].tobytes())
            keys.append((hash(prompt), hash((prompt, *answer))))
        return keys


class Trajectories:
    """
    Counts the trajectories of a Dataset whose rows hold one or several kept steps each. Rows of one trajectory with
    different steps are parts of it. A step that comes again is one of another copy of it.

    Example:

    ```python
    >>> trajectories = Trajectories()
    >>> [trajectories.begins("a", steps) for steps in ([1], [4], [1, 4], [])]
    [True, False, True, True]

    ```
    """

    def __init__(self) -> None:
        # How often each step has come, and the most of these, by a key that is no position
        self._counts: defaultdict[Hashable, Counter[int]] = defaultdict(Counter)

    def begins(self, key: Hashable, positions: Sequence[int]) -> bool:
        """Whether the next row, with these kept steps of the trajectory `key`, is the first of a copy of it."""
        counts = self._counts[key]
        counts.update(positions)
        most = max((counts[t] for t in positions), default=0)
        copies, counts[_COPIES] = counts[_COPIES], max(counts[_COPIES], most)
        return most > copies or not positions


def check_sampled(dataset: Dataset, name: str = "dataset") -> None:
    """
    Refuse a Dataset that [`read_columns`] cannot read, by its columns alone.

    Raises:
        `ValueError`: If it has no row, or lacks a column. The message names it.
    """
    check_columns(dataset.column_names, name, (*STEP_COLUMNS, "kl_divergence"))
    if len(dataset) == 0:
        raise ValueError(f"The {name} has no row. {MAKE_STEPS}")


def read_columns(dataset: Dataset, name: str = "dataset") -> Iterator[StepColumns]:
    """
    Read and check the rows of a Dataset of kept steps, 200 at a time.

    Args:
        dataset ([`~datasets.Dataset`]): Dataset with the columns of `STEP_COLUMNS` and `kl_divergence`.
        name (`str`): What to call it in messages.

    Raises:
        `ValueError`: If a column does not hold lists of numbers, or a row is invalid. The message names it.

    Example:

    ```python
    >>> dataset = dataset.add_column("prompt_ids", [[5]]).add_column("completion_ids", [[2, 1, 3, 4, 3]])
    >>> [columns.positions.tolist() for columns in read_columns(dataset)]
    [[1, 2, 4]]

    ```
    """
    start = 0
    for batch in dataset.select_columns(list(_TYPES)).with_format("arrow").iter(batch_size=_ROWS):
        table = _cast(batch, name)
        columns = flatten(table)
        if columns is None or not _adds_up(columns):
            # A row is invalid, or a sum is close to its limit. Check one by one, for a message that names the row
            for number, row in enumerate(table.to_pylist(), start):
                try:
                    _check(row)
                except ValueError as error:
                    raise ValueError(f"Row {number} of the {name} cannot be used: {error}.") from None
        assert columns is not None
        yield columns
        start += len(table)


def flatten(table: pa.Table) -> StepColumns | None:
    """The columns as flat arrays, or `None` if their lengths do not match or a value is missing."""
    lists = [table[column].cast(kind).combine_chunks() for column, kind in _TYPES.items()]
    prompt_ids, completion_ids, nats, positions, ids_of_row, probs_of_row = (each.flatten() for each in lists)
    label_ids, label_probs = ids_of_row.flatten(), probs_of_row.flatten()
    without_gap = (*lists, prompt_ids, completion_ids, positions, ids_of_row, probs_of_row, label_ids, label_probs)
    if any(part.null_count for part in without_gap):
        return None
    prompts, completions, nats_of_row, steps, *labels_of_row = map(_offsets, lists)
    labels = _offsets(ids_of_row)
    pairs = [(completions, nats_of_row), *((steps, each) for each in labels_of_row), (labels, _offsets(probs_of_row))]
    divergences = nats.to_numpy(zero_copy_only=False)  # missing values become NaN
    if not all(map(np.array_equal, *zip(*pairs, strict=True))) or np.isnan(divergences).sum() > nats.null_count:
        return None
    ids, completion, places, label, probs = (
        each.to_numpy() for each in (prompt_ids, completion_ids, positions, label_ids, label_probs)
    )
    return StepColumns(ids, prompts, completion, divergences, completions, places, steps, label, probs, labels)


def _offsets(lists: pa.ListArray) -> np.ndarray:
    return np.concatenate([[0], lists.value_lengths().to_numpy()]).cumsum()


def _cast(batch: pa.Table, name: str) -> pa.Table:
    for column in batch.column_names:
        kind = _TYPES[column]
        try:
            batch = batch.set_column(batch.schema.get_field_index(column), column, batch[column].cast(kind))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ValueError(
                f"The column {column!r} of the {name} must hold lists of numbers, got "
                f"{batch.schema.field(column).type}. {MAKE_STEPS}"
            ) from None
    return batch


def _adds_up(columns: StepColumns) -> bool:
    """Whether every row passes [`_check`], with a slightly lower tolerance for the sum of the probabilities."""
    positions, probs, sizes = columns.positions, columns.label_probs, np.diff(columns.labels)
    rows, lengths = columns.rows, np.diff(columns.completions)
    ids = (columns.prompt_ids, columns.completion_ids, columns.label_ids)
    if not all(((0 <= each) & (each < _MAX_ID)).all() for each in ids):
        return False
    nats = columns.divergences
    if not (np.isnan(nats) | ((0 <= nats) & (nats < math.inf))).all():
        return False
    if not len(positions):
        return True
    is_first = positions == 0
    return bool(
        ((0 <= positions) & (positions < lengths[rows])).all()
        and ((np.diff(positions) > 0) | (np.diff(rows) > 0)).all()
        and not (is_first & (np.diff(columns.prompts)[rows] == 0)).any()
        and (sizes > 0).all()
        and (np.isfinite(probs) & (probs >= 0)).all()
        and (np.abs(np.add.reduceat(probs, columns.labels[:-1]) - 1) < 0.99 * SUM_TOLERANCE).all()
        and len(np.unique(np.repeat(np.arange(len(sizes)), sizes) * _MAX_ID + columns.label_ids)) == len(probs)
    )


def _check(row: dict[str, list]) -> None:
    check_row(row, vocabulary=range(_MAX_ID), width=_MAX_ID)
    divergences = row["kl_divergence"]
    if divergences is None:
        raise ValueError("kl_divergence is missing")
    if len(divergences) != len(row["completion_ids"]):
        raise ValueError(
            f"there are {len(divergences)} divergences for {len(row['completion_ids'])} completion tokens"
        )
    if not all(value is None or 0 <= value < math.inf for value in divergences):
        raise ValueError("kl_divergence holds a value that is negative or not finite")


def longest_completion(dataset: Dataset, name: str = "dataset") -> int:
    """
    Number of tokens of the longest completion in a Dataset of kept steps.

    Raises:
        `ValueError`: If there is no step, or `kl_divergence` does not hold lists of numbers.
    """
    batches = dataset.select_columns(["kl_divergence"]).with_format("arrow").iter(batch_size=1000)
    columns = (_cast(batch, name)["kl_divergence"] for batch in batches)
    longest = max(pc.max(pc.list_value_length(column)).as_py() or 0 for column in columns)
    if longest == 0:
        raise ValueError(f"The {name} has no step: every `kl_divergence` is empty. Sample again.")
    return longest


def count_trajectories(dataset: Dataset) -> tuple[int, int]:
    """Number of trajectories of a Dataset, and of the steps in them, kept or not, as [`Trajectories`] counts them."""
    names = [name for name in ("prompt_ids", "completion_ids", "kl_divergence") if name in dataset.column_names]
    trajectories = Trajectories()
    num_trajectories = num_steps = 0
    for row in dataset.with_format(None).select_columns([*names, "step_positions"]):
        if trajectories.begins(hash(tuple(tuple(row[name] or ()) for name in names)), row["step_positions"]):
            num_trajectories += 1
            num_steps += len(row["completion_ids"])
    return num_trajectories, num_steps


def count_changes(taken: np.ndarray, preferred: np.ndarray) -> dict[tuple[int, int], int]:
    """
    How often each pair of different tokens occurs, in the order of first occurrence.

    Example:

    ```python
    >>> count_changes(np.array([7, 5, 4, 7]), np.array([8, 5, 3, 8]))
    {(7, 8): 2, (4, 3): 1}

    ```
    """
    differs = taken != preferred
    pairs, firsts, counts = np.unique(
        taken[differs] * _MAX_ID + preferred[differs], return_index=True, return_counts=True
    )
    order = np.argsort(firsts)
    found = zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    return {divmod(pair, _MAX_ID): count for pair, count in found}
