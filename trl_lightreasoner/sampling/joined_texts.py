"""The tokens of many short texts, several of which are tokenized as one.

A tokenizer needs as much time for a call as for the word in it. Texts at whose ends it treats both sides independently
(`independent_texts`) are put one after another, with a word between them where needed, and their tokens are told apart
by the bytes.
"""

import math
import re

import numpy as np

from ..models.token_bytes import TokenBytes


# Stands before a text that does not begin with a blank
_WORD = b" a"
# Texts in one
_MOST = 64


class JoinedTexts:
    """
    [`~trl_lightreasoner.models.token_bytes.TokenBytes.encode_all`] for many short texts.

    Args:
        tokens ([`~trl_lightreasoner.models.token_bytes.TokenBytes`]): The tokenizer.
        places (`re.Pattern[bytes]`, *optional*): Its
            [`~trl_lightreasoner.sampling.independent_texts.independent_places`].

    Example:

    ```python
    >>> joined = JoinedTexts(tokens, independent_places(tokens))
    >>> joined.encode_all([b" has 12", b"Ann"]) == tokens.encode_all([b" has 12", b"Ann"])
    True

    ```
    """

    def __init__(self, tokens: TokenBytes, places: re.Pattern[bytes] | None):
        self.tokens = tokens
        self._lengths = np.array([len(content or b"") for content in tokens.bytes])
        # By a text's first and last byte
        each = [bytes([byte]) for byte in range(256)]
        self._can_follow = [bool(places and places.match(_WORD[-1:] + first, 1)) for first in each]
        self._can_precede = [bool(places and places.match(last + _WORD[:1], 1)) for last in each]

    def encode_all(self, contents: list[bytes]) -> list[list[int] | None]:
        """The tokens of many byte strings, `None` for those that the tokens do not restore."""
        found: list[list[int] | None] = [None] * len(contents)
        groups = self._groups(contents)
        wholes, starts = zip(*(_join([contents[row] for row in rows]) for rows in groups), strict=True)
        alone: list[int] = []
        for rows, begins, ids in zip(groups, starts, self.tokens.encode_all(list(wholes)), strict=True):
            if len(rows) == 1:
                found[rows[0]] = ids
                continue
            parts = None if ids is None else self._split(ids, begins, [len(contents[row]) for row in rows])
            if parts is None:
                alone += rows
                continue
            for row, part in zip(rows, parts, strict=True):
                found[row] = part
        for row, ids in zip(alone, self.tokens.encode_all([contents[row] for row in alone]), strict=True):
            found[row] = ids
        return found

    def _groups(self, contents: list[bytes]) -> list[list[int]]:
        """Which texts become one. The first can begin with anything, and the last can end with anything."""
        alone, first, last, between = [], [], [], []
        for row, content in enumerate(contents):
            if not content:
                alone.append([row])
            elif self._can_follow[content[0]]:
                (between if self._can_precede[content[-1]] else last).append(row)
            elif self._can_precede[content[-1]]:
                first.append(row)
            else:
                alone.append([row])
        count = max(len(first), len(last), math.ceil(len(between) / _MOST))
        ends = [len(between) * i // count for i in range(count + 1)] if count else [0]
        return alone + [
            first[i : i + 1] + between[ends[i] : ends[i + 1]] + last[i : i + 1] for i in range(count)
        ]

    def _split(self, ids: list[int], starts: list[int], lengths: list[int]) -> list[list[int]] | None:
        """The tokens of each text, or `None` if a token reaches across the end of one."""
        places = np.concatenate([[0], self._lengths[ids].cumsum()])
        bytes_at = np.array(starts)
        bytes_at = np.stack([bytes_at, bytes_at + lengths])
        found = places.searchsorted(bytes_at)
        if (places[found] != bytes_at).any():
            return None
        return [ids[start:end] for start, end in found.T.tolist()]


def _join(parts: list[bytes]) -> tuple[bytes, list[int]]:
    """One text, and where each begins in it."""
    whole, starts = bytearray(), []
    for part in parts:
        if whole and part[0] != 32:
            whole += _WORD
        starts.append(len(whole))
        whole += part
    return bytes(whole), starts
