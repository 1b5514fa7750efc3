"""The structure of an answer: lists, sets, pairs, intervals and unions, and what their brackets are.

Text in, text out; standard library only.
"""

import re
from typing import NamedTuple


INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt|ne|neq)\b")
_OPENING, _CLOSING = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
_TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|.", re.S)
_THOUSANDS = re.compile(r"(?<![\d,.])[-+]?¤?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!,?\d)")


class Parts(NamedTuple):
    """`brackets` is "" for a bare list, "{}" for a set, "∪" for a union, else the two brackets that were written."""

    brackets: str
    items: list[str]


def parts_of(text: str) -> Parts:
    r"""
    The parts of a cleaned answer.

    Example:

    ```python
    >>> parts_of("(3, 4)"), parts_of("1,450,000 and 2")
    (Parts(brackets='()', items=['3', '4']), Parts(brackets='', items=['1450000', '2']))

    ```
    """
    text = re.sub(r"^\s*[a-zA-Z]\w*\s*\\in\b(?!fty)", "", text).strip()
    # "(x, y) = (3, 4)", "S = \{1, 2\}"
    named = re.match(r"(?:\(\s*[A-Za-z\\][\w\\{}, ]*\)|[A-Za-z]\w*)\s*=\s*(?=\(|\[|\\\{)", text)
    if named and _is_enclosed(text[named.end() :].strip()):
        text = text[named.end() :].strip()
    union = split(text, {r"\cup"})
    if len(union) == 1 and INEQUALITY.search(text) and not _is_enclosed(text):  # x < -1 or x > 3
        conditions = re.split(r"[,;]|\bor\b|\\lor\b|\\vee\b", text)
        union = conditions if all(re.search(r"[<>=]|\\[gl]e\b", condition) for condition in conditions) else union
    if len(union) > 1:
        return Parts("∪", union)
    if _is_enclosed(text):
        tokens = _TOKEN.findall(text)
        inner = "".join(tokens[1:-1])
        items = _with_both_signs(split(inner, {",", ";"}))
        if tokens[0] == r"\{":
            return Parts("{}", items)
        if len(items) > 1:
            return Parts(tokens[0] + tokens[-1], items)
    # Out of brackets "1,450,000" is one number
    bare = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text) if not re.match(r"[(\[]", text) else text
    items = split(re.sub(r",?\s+(?:and|or)\s+(?=[-+\\(\d¤a-z]\W?)", ",", bare), {",", ";"})
    return Parts("", _with_both_signs(items))


def split(text: str, separators: set[str]) -> list[str]:
    """
    What stands between separators out of brackets.

    Example:

    ```python
    >>> split("(1, 2), 3", {","})
    ['(1, 2)', '3']

    ```
    """
    items, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if token in separators and depth <= 0:
            items.append("")
        else:
            items[-1] += token
    return [item.strip() for item in items if item.strip()] or [""]


def _is_enclosed(text: str) -> bool:
    """Whether the bracket that the text starts with closes at its end; "(2, 5]" is, "(a+5)(b+2)" is not."""
    tokens, depth = _TOKEN.findall(text), 0
    if len(tokens) < 2 or tokens[0] not in {"(", "[", r"\{"} or tokens[-1] not in {")", "]", r"\}"}:
        return False
    for index, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _with_both_signs(items: list[str]) -> list[str]:
    signed = []
    for item in items:
        if r"\pm" in item:
            signed.append(item.replace(r"\pm", "+").replace(r"\mp", "-").lstrip("+ "))
            signed.append(item.replace(r"\pm", "-").replace(r"\mp", "+"))
        else:
            signed.append(item)
    return signed
