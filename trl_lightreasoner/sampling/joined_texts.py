"""The tokens of many short texts, several of which are tokenized as one.

A tokenizer needs as much time for a call as for the word in it. Texts at whose ends it treats both sides independently
(`independent_texts`) are put one after another, with a word between them where needed, and their tokens are told apart
by the bytes.
"""

import math
import re

import numpy as np

from ..models.token_bytes import TokenBytes


# Stands between two texts, after a letter or sign and after the end of a line
_WORDS = b" a", b"a"
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
    >>> from trl_lightreasoner.sampling.independent_texts import independent_places
    >>> tokens = TokenBytes(tokenizer, len(tokenizer))
    >>> joined = JoinedTexts(tokens, independent_places(tokens))
    >>> joined.encode_all([b" has 12", b"Ann"]) == tokens.encode_all([b" has 12", b"Ann"])
    True

    ```
    """

    def __init__(self, tokens: TokenBytes, places: re.Pattern[bytes] | None):
        self.tokens = tokens
        self._lengths = np.array([len(content or b"") for content in tokens.bytes])

        def is_independent(before: bytes, behind: bytes) -> bool:
            return bool(places and places.match(before[-1:] + behind[:1], 1))

        each = [bytes([byte]) for byte in range(256)]
        # By the first byte of a text, whether one of the words can stand before it, and by the last, which one behind
        self._can_follow = [all(is_independent(word, first) for word in _WORDS) for first in each]
        self._word_behind = [next((word for word in _WORDS if is_independent(last, word)), None) for last in each]

    def encode_all(self, contents: list[bytes]) -> list[list[int] | None]:
        """The tokens of many byte strings, `None` for those that the tokens do not restore."""
        groups = self._groups(contents)
        joined = [self._join([contents[row] for row in rows]) for rows in groups]
        flat: list[int] = []
        rows, starts, alone = [], [], []
        num_bytes = 0
        encoded = self.tokens.encode_all([whole for whole, _ in joined])
        for group, (whole, begins), ids in zip(groups, joined, encoded, strict=True):
            if ids is None:
                alone += group
                continue
            flat += ids
            rows += group
            starts += [num_bytes + begin for begin in begins]
            num_bytes += len(whole)
        found: list[list[int] | None] = [None] * len(contents)
        places = np.concatenate([[0], self._lengths[np.array(flat, np.int64)].cumsum()])
        ends = np.array(starts, np.int64) + [len(contents[row]) for row in rows]
        first, last = places.searchsorted(starts), places.searchsorted(ends)
        if (places[first] != starts).any() or (places[last] != ends).any():  # they are not independent after all
            return self.tokens.encode_all(contents)
        for row, start, end in zip(rows, first.tolist(), last.tolist(), strict=True):
            found[row] = flat[start:end]
        for row, ids in zip(alone, self.tokens.encode_all([contents[row] for row in alone]), strict=True):
            found[row] = ids
        return found

    def _groups(self, contents: list[bytes]) -> list[list[int]]:
        """Which texts become one. The first can begin with anything, and the last can end with anything."""
        alone: list[list[int]] = []
        first: list[int] = []
        between: list[int] = []
        last: list[int] = []
        for row, content in enumerate(contents):
            if not content:
                alone.append([row])
            elif self._can_follow[content[0]]:
                (between if self._word_behind[content[-1]] else last).append(row)
            elif self._word_behind[content[-1]]:
                first.append(row)
            else:
                alone.append([row])
        count = max(len(first), len(last), math.ceil(len(between) / _MOST))
        ends = [len(between) * i // count for i in range(count + 1)] if count else [0]
        return alone + [first[i : i + 1] + between[ends[i] : ends[i + 1]] + last[i : i + 1] for i in range(count)]

    def _join(self, parts: list[bytes]) -> tuple[bytes, list[int]]:
        """One text, and where each part begins in it."""
        whole, starts = bytearray(), []
        for part in parts:
            if whole:
                word = self._word_behind[whole[-1]] or b""
                # Before a blank, only behind the end of a line
                whole += word if part[:1] != word[:1] else b""
            starts.append(len(whole))
            whole += part
        return bytes(whole), starts
