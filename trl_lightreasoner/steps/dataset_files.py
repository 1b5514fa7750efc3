"""Find what is wrong with a file of rows if `datasets` does not say: the line, and how to fix it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..text import line_not_in_utf8, shown_value


_JSON = (".json", ".jsonl")
_ENDINGS = (*_JSON, ".csv", ".txt")
_TYPES = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
_EXACT_TYPES = {**_TYPES, int: "a whole number", float: "a number with a point"}


def check_encoding(name: str) -> None:
    """
    Refuse a JSON file that is not in UTF-8, or a folder with one. `datasets` notices it only when a row is used.

    Raises:
        `ValueError`: If there is one. The message names the line.
    """
    for file in _text_files(Path(name)):
        if file.suffix in _JSON:
            try:
                _check_encoding(file)
            except ValueError as error:
                place = _place(file, Path(name))
                raise ValueError(f"The dataset {name!r} cannot be read: {place}{error}.") from None


def find_fault(path: Path, is_cast: bool) -> str | None:
    """
    The first fault in a file of JSON lines or text, or in such files of a folder, and how to fix it, or `None`.
    `is_cast` says that later rows did not fit the columns of earlier ones.
    """
    for file in _text_files(path):
        try:
            _check_encoding(file)
            text = file.read_text(encoding="utf-8-sig")
            if not text.strip():
                raise ValueError("it is empty. Repair or replace the file")
            if file.suffix in _JSON:
                _check_types(_read_rows(text), _TYPES)
                if is_cast:
                    _check_types(_read_rows(text), _EXACT_TYPES)
                    _check_columns(_read_rows(text))
        except ValueError as error:
            return f"{_place(file, path)}{error}."
    return None


def _check_encoding(file: Path) -> None:
    if (line := line_not_in_utf8(file)) is not None:
        raise ValueError(f"line {line} is not in UTF-8. Save the file as UTF-8")


def _text_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    return [file for file in files if file.suffix in _ENDINGS and file.is_file()]


def _place(file: Path, path: Path) -> str:
    return "" if file == path else f"in {str(file.relative_to(path))!r} "


def _read_rows(text: str) -> Iterator[tuple[str, Any]]:
    """Each row and what to call it. Rows are the elements of a JSON array, or else the lines that are not blank."""
    try:
        whole = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"it is not JSON: {error}. Repair or replace the file") from None
    else:
        yield from ((f"row {number}", row) for number, row in enumerate(whole if isinstance(whole, list) else [whole]))
        return
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would also split at other characters
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                reason = str(error).partition(": line")[0]
                raise ValueError(f"line {number} is not JSON ({reason}). Fix or remove it") from None


def _check_types(rows: Iterator[tuple[str, Any]], types: dict[type, str]) -> None:
    first: dict[str, tuple[str, str]] = {}  # by column, its type and the row in which it was found
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f'{place} must be an object, such as {{"prompt": "..."}}, got {shown_value(row)}. Fix it')
        for column, value in row.items():
            if value is None:
                continue
            kind = types[type(value)]
            known, where = first.setdefault(column, (kind, place))
            if kind != known:
                raise ValueError(
                    f"{place} has {kind} in the column {column!r}, where {where} has {known}. Give all rows one type, "
                    "or remove the column"
                )


def _check_columns(rows: Iterator[tuple[str, Any]]) -> None:
    first_place, first = next(rows)
    for place, row in rows:
        if added := [column for column in row if column not in first]:
            raise ValueError(
                f"{place} has a column {added[0]!r}, which {first_place} lacks. Give all rows the same columns, or "
                "remove it"
            )
