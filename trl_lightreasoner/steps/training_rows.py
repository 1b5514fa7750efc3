"""Prepare a Dataset of steps for training: check every row, and drop and count the steps that are too long."""

import math
from collections.abc import Container
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, LargeList, List, Value
from transformers import logging

from ..vocabulary import Vocabulary
from .caches import map_rows
from .dataset import MAKE_STEPS, PER_STEP_COLUMNS, STEP_COLUMNS, check_columns, count_steps


logger = logging.get_logger(__name__)

# Labels are stored in fp32, and some file formats round them further
SUM_TOLERANCE = 1e-3
# Smallest weight of a step that is not 0. Sums of products of smaller ones are 0 in single precision, and those of
# weights above its inverse are infinite
_LEAST = 1e-30
# Columns that hold real numbers. The others hold whole numbers
_REAL = ("label_probs", "step_weights")


def check_row(row: dict[str, Any], vocabulary: Container[int], width: int) -> None:
    """
    Refuse a row that is inconsistent.

    Args:
        row (`dict`): A row with the columns `STEP_COLUMNS`, and with `step_weights` if the Dataset has that column.
        vocabulary ([`Vocabulary`] or other `Container[int]`): Ids of the model's tokens.
        width (`int`): Number of the model's embeddings.

    Raises:
        `ValueError`: If it is. The message gives the reason.

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
    for column in _checked(row):
        if row.get(column) is None:
            raise ValueError(f"{column} is missing")
        _check_numbers(column, row[column])
    prompt, completion, positions = row["prompt_ids"], row["completion_ids"], row["step_positions"]
    if not len(positions) == len(row["label_ids"]) == len(row["label_probs"]):
        raise ValueError(
            f"there are {len(positions)} step positions, {len(row['label_ids'])} lists of label ids and "
            f"{len(row['label_probs'])} lists of label probabilities"
        )
    weights = row.get("step_weights", [1.0] * len(positions))
    if len(weights) != len(positions):
        raise ValueError(f"there are {len(positions)} step positions and {len(weights)} step weights")
    if wrong := [(t, w) for t, w in zip(positions, weights, strict=True) if w != 0 and not _LEAST <= w <= 1 / _LEAST]:
        position, weight = wrong[0]
        raise ValueError(
            f"the weight of step {position} must be 0, or between {_LEAST:g} and {1 / _LEAST:g}, and is {weight}"
        )
    if bad := [i for i in (*prompt, *completion) if not 0 <= i < width]:
        raise ValueError(f"token id {bad[0]} is outside the model's {width} embeddings")
    if any(later <= earlier for earlier, later in zip(positions, positions[1:], strict=False)):
        raise ValueError(f"step positions are not ascending: {positions}")
    for position, ids, probs in zip(positions, row["label_ids"], row["label_probs"], strict=True):
        if not 0 <= position < len(completion):
            raise ValueError(f"step position {position} is outside the completion of {len(completion)} tokens")
        if position == 0 and not prompt:
            raise ValueError("step position 0 has no context, because the prompt is empty")
        if not ids or len(ids) != len(probs):
            raise ValueError(f"the label at step {position} has {len(ids)} ids and {len(probs)} probabilities")
        if len(set(ids)) < len(ids):
            raise ValueError(f"the label at step {position} names a token twice: {ids}")
        if unknown := [i for i in ids if i not in vocabulary]:
            raise ValueError(f"label id {unknown[0]} at step {position} is outside the model's vocabulary")
        if not all(math.isfinite(p) and p >= 0 for p in probs):
            raise ValueError(f"the label at step {position} has a probability that is negative or not finite: {probs}")
        if abs(sum(probs) - 1) > SUM_TOLERANCE:
            raise ValueError(f"the label at step {position} sums to {sum(probs):.4g}, not to 1")


def _most_probable_first(row: dict[str, Any]) -> dict[str, Any]:
    """The labels of a row that has passed [`check_row`], in the order that metrics rely on. The sampler's have it."""
    label_ids, label_probs = [*row["label_ids"]], [*row["label_probs"]]
    for k, (ids, probs) in enumerate(zip(label_ids, label_probs, strict=True)):
        if probs[0] < max(probs):
            order = sorted(range(len(ids)), key=lambda i: -probs[i])
            label_ids[k], label_probs[k] = [ids[i] for i in order], [probs[i] for i in order]
    return {"label_ids": label_ids, "label_probs": label_probs}


def _checked(columns: Container[str]) -> tuple[str, ...]:
    return (*STEP_COLUMNS, "step_weights") if "step_weights" in columns else STEP_COLUMNS


def _check_numbers(column: str, values: Any) -> None:
    kinds, what = ({int, float}, "numbers") if column in _REAL else ({int}, "whole numbers")
    parts = values if column.startswith("label") else [values]
    if not isinstance(values, list) or not all(isinstance(part, list) for part in parts if part is not None):
        raise ValueError(f"{column} does not hold lists of {what}")
    found = {type(value) for part in parts for value in ([None] if part is None else part)}
    if type(None) in found:
        raise ValueError(f"{column} has a gap (null)")
    if wrong := found - kinds:
        raise ValueError(f"{column} does not hold {what}, but {', '.join(sorted(kind.__name__ for kind in wrong))}")


def select_steps(row: dict[str, Any], max_length: int | None = None, beta: float | None = None) -> list[int]:
    """
    Select the kept steps of a row that are trained on.

    Args:
        row (`dict`): A row that has passed [`check_row`], with `kl_divergence` if it is known.
        max_length (`int`, *optional*): Maximum length of a step's context. Longer steps are excluded.
        beta (`float`, *optional*): Minimum divergence in nats. Steps below it are excluded.

    Returns:
        `list[int]`: Indices into `step_positions`, ascending.

    Raises:
        `ValueError`: If `beta` is given and a divergence is not known.

    Example:

    ```python
    >>> row = {"prompt_ids": [5, 6], "kl_divergence": [0.1, 0.9, 0.5, 2.0], "step_positions": [1, 2, 3]}
    >>> select_steps(row, beta=0.8), select_steps(row, max_length=4)
    ([0, 2], [0, 1])

    ```
    """
    prompt_length = len(row["prompt_ids"])
    steps = [k for k, t in enumerate(row["step_positions"]) if max_length is None or prompt_length + t <= max_length]
    if not beta:
        return steps
    divergences = divergences_of(row)
    if None in divergences:
        raise ValueError("it has a kept step of unknown divergence; set `beta` to 0 to train on all steps")
    return [k for k in steps if divergences[k] >= beta]  # type: ignore[operator]  # no `None` here


def divergences_of(row: dict[str, Any]) -> list[float | None]:
    """D_KL(pi_E || pi_A) in nats at the kept steps of a row, `None` for steps at which it is not known."""
    divergence = row.get("kl_divergence") or []
    if not isinstance(divergence, list):
        raise ValueError(f"kl_divergence does not hold lists of numbers, but {divergence!r}")
    if wrong := [d for d in divergence if d is not None and (type(d) not in (int, float) or math.isnan(d))]:
        raise ValueError(f"kl_divergence does not hold numbers, but {wrong[0]!r}")
    return [divergence[t] if t < len(divergence) else None for t in row["step_positions"]]


def prepare_rows(
    dataset: Dataset | IterableDataset,
    name: str,
    vocabulary: Vocabulary,
    width: int,
    max_length: int | None,
    one_step_per_row: bool,
    beta: float | None = None,
    context: int | None = None,
) -> Dataset | IterableDataset:
    """
    Check the rows, and keep the steps that can be trained on.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows from [`ContrastiveStepSampler`].
        name (`str`): What to call it in messages: "train" or "eval".
        vocabulary ([`Vocabulary`]): The model's tokens.
        width (`int`): Number of the model's embeddings.
        max_length (`int`, *optional*): Maximum length of a step's context. Longer steps are dropped and counted.
        one_step_per_row (`bool`): Whether to split a row with several kept steps into rows of one step.
        beta (`float`, *optional*): Minimum divergence in nats. Steps below it are excluded.
        context (`int`, *optional*): Maximum number of tokens that the model reads, a limit like `max_length`.

    Returns:
        The rows that still have a step, with the columns of `dataset`. An iterable dataset is checked as it is read.

    Raises:
        `ValueError`: If a column is missing, a row is inconsistent, or no step is left. The message names the row and
            the reason.
    """
    columns = dataset.column_names
    if columns is not None:
        check_columns(columns, f"{name} dataset")
    features = dataset.features
    for column in () if features is None else _checked(features):
        depth, feature = (2 if column.startswith("label") else 1), features[column]
        while isinstance(feature, List | LargeList):
            depth, feature = depth - 1, feature.feature
        whole = column not in _REAL
        dtypes = ("int", "uint") if whole else ("int", "uint", "float")
        if depth != 0 or not isinstance(feature, Value) or not feature.dtype.startswith(dtypes):
            is_weight = column == "step_weights"
            remedy = "Give each kept step a number, or remove the column." if is_weight else MAKE_STEPS
            raise ValueError(
                f"The column {column!r} of the {name} dataset must hold lists of {'whole ' if whole else ''}numbers, "
                f"got {features[column]}. {remedy}"
            )
    limit, remedy = f"`max_length={max_length}`", "raise it"
    if context is not None and (max_length is None or context < max_length):
        max_length, limit, remedy = context, f"the model's context of {context} tokens", "sample with shorter prompts"
    dataset = dataset.with_format(None)  # lists, whatever format the user has set

    def prepare(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        kept_rows: dict[str, list] = {column: [] for column in batch}
        for i, index in enumerate(indices):
            row = {column: values[i] for column, values in batch.items()}
            try:
                check_row(row, vocabulary, width)
                row |= _most_probable_first(row)
                steps = select_steps(row, max_length, beta)
            except ValueError as error:
                raise ValueError(f"Row {index} of the {name} dataset cannot be used for training: {error}.") from None
            for group in [[k] for k in steps] if one_step_per_row else [steps] if steps else []:
                for column, value in row.items():
                    per_step = column in PER_STEP_COLUMNS
                    kept_rows[column].append([value[k] for k in group] if per_step else value)
        return kept_rows

    if isinstance(dataset, IterableDataset):
        prepared = dataset.map(prepare, with_indices=True, batched=True)
        if next(iter(prepared), None) is None:
            least = f" that reaches `beta={beta}`" if beta else ""
            raise ValueError(
                f"The {name} dataset has no step to train on: none of its streamed rows has one{least} within {limit}."
            )
        return prepared
    prepared = map_rows(dataset, prepare, with_indices=True, batched=True, desc=f"Checking the {name} dataset")
    num_steps, num_too_long = count_steps(dataset), _count_too_long(dataset, max_length)
    if count_steps(prepared) == 0:
        if num_steps == 0:
            reason = "no row has one; sample with a lower `beta` or a weaker amateur"
        elif num_too_long == num_steps:
            reason = f"all {num_steps:,} of its steps are beyond {limit}; {remedy}"
        else:
            reason = f"none of its {num_steps:,} steps reaches `beta={beta}`; lower it"
        raise ValueError(f"The {name} dataset has no step to train on: {reason}.")
    if "step_weights" in prepared.column_names and not any(map(any, prepared["step_weights"])):
        raise ValueError(f"The {name} dataset has no step to train on: all of its `step_weights` are 0.")
    if num_too_long:
        logger.warning(
            f"Dropped {num_too_long:,} of {num_steps:,} steps of the {name} dataset, which are beyond {limit}."
        )
    return prepared


def _count_too_long(dataset: Dataset, max_length: int | None) -> int:
    if max_length is None:
        return 0
    table = dataset.select_columns(["prompt_ids", "step_positions"]).with_format("arrow")[:].combine_chunks()
    prompt_lengths = pc.list_value_length(table["prompt_ids"].combine_chunks())
    positions = table["step_positions"].combine_chunks()
    lengths = pc.add(pc.take(prompt_lengths, pc.list_parent_indices(positions)), pc.list_flatten(positions))
    return pc.sum(pc.greater(lengths, max_length)).as_py() or 0
