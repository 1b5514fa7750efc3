"""What the trainer does to a Dataset of steps before training: check every row, drop what is too long, count it."""

import math
from collections.abc import Container
from typing import Any

from datasets import Dataset, IterableDataset, LargeList, List, Value
from transformers import logging

from ..vocabulary import Vocabulary
from .dataset import STEP_COLUMNS, count_steps


logger = logging.get_logger(__name__)

# Labels are stored in fp32, and rounded further by some file formats
_SUM_TOLERANCE = 1e-3


def check_row(row: dict[str, Any], vocabulary: Container[int], width: int) -> None:
    """
    Refuse a row that does not add up.

    Args:
        row (`dict`): A row with the columns `STEP_COLUMNS`.
        vocabulary ([`Vocabulary`] or other `Container[int]`): Ids of the model's tokens.
        width (`int`): Number of the model's embeddings.

    Raises:
        `ValueError`: With the reason.

    Example:

    ```python
    >>> row = {
    ...     "prompt_ids": [1],
    ...     "completion_ids": [2, 3],
    ...     "step_positions": [5],
    ...     "label_ids": [[2]],
    ...     "label_probs": [[1.0]],
    ... }
    >>> check_row(row, vocabulary={1, 2, 3}, width=4)
    Traceback (most recent call last):
    ValueError: step position 5 is outside the completion of 2 tokens

    ```
    """
    for column in STEP_COLUMNS:
        values = row.get(column)
        if values is None:
            raise ValueError(f"{column} is missing")
        if None in values or any(None in part for part in values if isinstance(part, list)):
            raise ValueError(f"{column} has a gap (null)")
    prompt, completion, positions = row["prompt_ids"], row["completion_ids"], row["step_positions"]
    if not len(positions) == len(row["label_ids"]) == len(row["label_probs"]):
        raise ValueError(
            f"there are {len(positions)} step positions, {len(row['label_ids'])} lists of label ids and "
            f"{len(row['label_probs'])} lists of label probabilities"
        )
    if bad := [i for i in (*prompt, *completion) if not 0 <= i < width]:
        raise ValueError(f"token id {bad[0]} is outside the model's {width} embeddings")
    if any(later <= earlier for earlier, later in zip(positions, positions[1:], strict=False)):
        raise ValueError(f"step positions are not ascending: {positions}")
    for position, ids, probs in zip(positions, row["label_ids"], row["label_probs"], strict=True):
        if not 0 <= position < len(completion):
            raise ValueError(f"step position {position} is outside the completion of {len(completion)} tokens")
        if position == 0 and not prompt:
            raise ValueError("step position 0 has no context, since the prompt is empty")
        if not ids or len(ids) != len(probs):
            raise ValueError(f"the label at step {position} has {len(ids)} ids and {len(probs)} probabilities")
        if len(set(ids)) < len(ids):
            raise ValueError(f"the label at step {position} names a token twice: {ids}")
        if unknown := [i for i in ids if i not in vocabulary]:
            raise ValueError(f"label id {unknown[0]} at step {position} is outside the model's vocabulary")
        if not all(math.isfinite(p) and p >= 0 for p in probs):
            raise ValueError(f"the label at step {position} has a probability that is negative or not finite: {probs}")
        if abs(sum(probs) - 1) > _SUM_TOLERANCE:
            raise ValueError(f"the label at step {position} sums to {sum(probs):.4g}, not to 1")


def prepare_rows(
    dataset: Dataset | IterableDataset,
    name: str,
    vocabulary: Vocabulary,
    width: int,
    max_length: int | None,
    one_step_per_row: bool,
) -> Dataset | IterableDataset:
    """
    Rows that can be trained on.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows as [`ContrastiveStepSampler`] makes
            them.
        name (`str`): What to call it in messages: "train", "eval".
        vocabulary ([`Vocabulary`]): The model's tokens.
        width (`int`): Number of the model's embeddings.
        max_length (`int`, *optional*): Steps with a longer context are dropped and counted.
        one_step_per_row (`bool`): Whether a row with several kept steps becomes as many rows of one.

    Returns:
        The rows that have a step left, with the columns of `dataset`. An iterable dataset is checked as it is read.

    Raises:
        `ValueError`: If a column is missing, a row does not add up (it is named, with the reason), or nothing is left.
    """
    columns = dataset.column_names
    if columns is not None and (missing := [column for column in STEP_COLUMNS if column not in columns]):
        raise ValueError(
            f"The {name} dataset has no column {missing[0]!r}; it has {columns}. Make it with "
            "`ContrastiveStepSampler` or `lightreasoner sample`."
        )
    features = dataset.features
    for column in () if features is None else STEP_COLUMNS:
        depth, feature = (2 if column.startswith("label") else 1), features[column]
        while isinstance(feature, List | LargeList):
            depth, feature = depth - 1, feature.feature
        whole = column != "label_probs"
        dtypes = ("int", "uint") if whole else ("int", "uint", "float")
        if depth != 0 or not isinstance(feature, Value) or not feature.dtype.startswith(dtypes):
            raise ValueError(
                f"The column {column!r} of the {name} dataset must hold lists of {'whole ' if whole else ''}numbers, "
                f"got {features[column]}. Make it with `ContrastiveStepSampler` or `lightreasoner sample`."
            )
    dataset = dataset.with_format(None)  # lists, whatever the user looked at it as

    def prepare(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        kept_rows: dict[str, list] = {column: [] for column in batch}
        for i, index in enumerate(indices):
            row = {column: values[i] for column, values in batch.items()}
            try:
                check_row(row, vocabulary, width)
            except ValueError as error:
                raise ValueError(f"Row {index} of the {name} dataset cannot be trained on: {error}.") from None
            prompt_length = len(row["prompt_ids"])
            steps = [
                k for k, t in enumerate(row["step_positions"]) if max_length is None or prompt_length + t <= max_length
            ]
            for group in [[k] for k in steps] if one_step_per_row else [steps] if steps else []:
                for column in ("step_positions", "label_ids", "label_probs"):
                    kept_rows[column].append([row[column][k] for k in group])
                for column in row.keys() - {"step_positions", "label_ids", "label_probs"}:
                    kept_rows[column].append(row[column])
        return kept_rows

    if isinstance(dataset, IterableDataset):
        return dataset.map(prepare, with_indices=True, batched=True)
    prepared = dataset.map(prepare, with_indices=True, batched=True, desc=f"Checking the {name} dataset")
    num_steps, num_left = count_steps(dataset), count_steps(prepared)
    if num_left == 0:
        reason = (
            f"all {num_steps:,} of its steps lie beyond max_length={max_length}; raise it"
            if num_steps
            else "no row has one; sample with a lower `beta` or a weaker amateur"
        )
        raise ValueError(f"The {name} dataset has no step to train on: {reason}.")
    if num_left < num_steps:
        logger.warning(
            f"Dropped {num_steps - num_left:,} of {num_steps:,} steps of the {name} dataset, which lie beyond "
            f"max_length={max_length}."
        )
    return prepared
