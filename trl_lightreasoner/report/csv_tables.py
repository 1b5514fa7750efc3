"""Tables as CSV files, for spreadsheets and for pandas.

Text of models and datasets is quoted inside its cell, as in JSON. So spaces at its ends are visible, and spreadsheets
do not read it as a formula.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..models.token_text import TokenTexts
from ..steps.whole_files import whole_file


class Table(NamedTuple):
    """Name of the file without its extension, titles of the columns, and rows."""

    name: str
    head: Sequence[str]
    rows: Iterable[Sequence[Any]]


def save_table(table: Table, folder: Path) -> Path:
    """Write one table."""
    path = folder / f"{table.name}.csv"
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.head)
        writer.writerows(table.rows)
    return path


def quoted(text: str) -> str:
    """
    Quote text of a model or a dataset for a cell.

    Example:

    ```python
    >>> quoted(" =1+1")
    '" =1+1"'

    ```
    """
    return json.dumps(text, ensure_ascii=False)


def token_cells(texts: TokenTexts, token_id: int) -> tuple[int, str]:
    """A token, as its id and its text."""
    return token_id, quoted(texts(token_id))
