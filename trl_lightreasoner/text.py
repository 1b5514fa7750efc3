"""Read text from files, and make text safe for a terminal or a card."""

import unicodedata
from pathlib import Path


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
