"""Read text from files, and make text safe for a terminal or a card."""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any


_LONGEST = 200  # characters of a value in a message


def read_text(path: str | Path, what: str) -> str:
    """
    Read a user's text file as UTF-8, whatever the locale, with or without a byte order mark.

    Args:
        path (`str` or `Path`): The file.
        what (`str`): What to call it in an error message, with a capital letter.

    Raises:
        `ValueError`: If it is not in UTF-8. The message names the line.
    """
    if (line := line_not_in_utf8(path)) is not None:
        raise ValueError(f"{what} {str(path)!r} is not in UTF-8 (line {line}). Save it as UTF-8.")
    return Path(path).read_text(encoding="utf-8-sig")


def line_not_in_utf8(path: str | Path) -> int | None:
    """The number, from 1, of the first line of a file that is not in UTF-8, or `None`."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return None


def shown_value(value: Any) -> str:
    """
    A value of a user's dataset or file, for an error message: lists and objects as JSON, and long ones shortened.

    Example:

    ```python
    >>> shown_value(None), shown_value("12"), shown_value([{"role": "user"}])
    ('nothing (null)', "'12'", '[{"role": "user"}]')

    ```
    """
    if value is None:
        return "nothing (null)"
    is_nested = isinstance(value, dict | list)
    text = json.dumps(value, ensure_ascii=False, default=str) if is_nested else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def name_columns(columns: Iterable[str]) -> str:
    """
    The columns of a dataset, for an error message.

    Example:

    ```python
    >>> name_columns(["question", "answer"])
    "'question', 'answer'"

    ```
    """
    return ", ".join(map(repr, columns)) or "none"


def printable(text: str, keep: str = "") -> str:
    """
    Escape the control characters of a text, except those to `keep`. Text from a model or a file must not control a
    terminal or be hidden in a card.

    Example:

    ```python
    >>> printable("\\x1b[2Jone\\ntwo", keep="\\n")
    '\\\\x1b[2Jone\\ntwo'

    ```
    """
    if text.isprintable():
        return text
    return "".join(char if char in keep or _is_seen(char) else _escape(char) for char in text)


def _is_seen(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"  # unusual spaces


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()
