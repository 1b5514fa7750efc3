"""Switches of the chat template, such as whether a model thinks: TRL's column `chat_template_kwargs`.

They are JSON objects, and part of the prompt format of rows that share them. Nulls in them are left out, because
Arrow fills them in where rows have different keys.
"""

import json
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..text import shown_value


COLUMN = "chat_template_kwargs"


def as_switches(value: Any) -> dict[str, Any]:
    """
    Switches in the form in which they are stored and compared.

    Raises:
        `ValueError`: If they are not a dict of JSON values.
    """
    try:
        switches = json.loads(json.dumps(value))
    except (TypeError, ValueError):
        switches = None
    if not isinstance(switches, dict):
        raise ValueError(f"`{COLUMN}` must be a dict of JSON values, got {shown_value(value)}.")
    return without_nulls(switches)


def list_switches(dataset: Dataset) -> list[dict[str, Any]]:
    """The switches of each row with a prompt. Without such a column there are none."""
    if COLUMN not in dataset.column_names:
        return []
    rows = dataset.with_format(None).select_columns(["prompt", COLUMN])
    return [without_nulls(row[COLUMN] or {}) for row in rows if row["prompt"]]


def find_switches(dataset: Dataset) -> dict[str, Any] | None:
    """The switches that all rows share, empty without such a column, or `None` if rows differ."""
    switches = list_switches(dataset)
    if any(each != switches[0] for each in switches):
        return None
    return switches[0] if switches else {}


def put_switches(dataset: Dataset, switches: dict[str, Any] | None) -> Dataset:
    """
    Rows with a column of the same switches. Without any, they are left alone.

    Raises:
        `ValueError`: If there is such a column with others, or they do not fit into a column.
    """
    if not switches:
        return dataset
    if COLUMN not in dataset.column_names:
        try:
            return dataset.add_column(COLUMN, [switches] * len(dataset))
        except pa.ArrowException as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(f"`{COLUMN}` does not fit into a column of a dataset: {reason}. Change it.") from error
    if find_switches(dataset) != switches:
        raise ValueError(
            f"The rows have a column {COLUMN!r} with other values than the setting `{COLUMN}`. Remove one of them."
        )
    return dataset


def without_nulls(value: Any) -> Any:
    """Messages or switches without the nulls that Arrow fills in."""
    # Like `trl.trainer.utils.remove_none_values`, whose import loads what TRL's trainers need
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
