"""The expert's next token behind an amateur's token, for many tokens after many texts at once.

[`~trl_lightreasoner.sampling.next_tokens.NextTokens`] knows the answers by text. Here they are arrays by the amateur's
tokens, so that the thousands of tokens of a round are looked up together.
"""

import numpy as np

from ..models.token_bytes import TokenBytes
from .next_tokens import NO_TEXT, Edge, NextTokens


# Answers in the arrays: 50 MB
_MOST_KNOWN = 2**22
# New answers that wait before they are sorted into the arrays, and their share of them
_MOST_WAITING, _SHARE_WAITING = 2**13, 0.25

_NOTHING = Edge((), b"")


class Following:
    """
    What follows q if the amateur writes a token there.

    Args:
        next_tokens ([`NextTokens`]): What tau_E makes of texts after q.
        amateur ([`~trl_lightreasoner.models.token_bytes.TokenBytes`]): The amateur's tokens.

    Example:

    ```python
    >>> following = Following(next_tokens, amateur)  # doctest: +SKIP
    >>> place = following.place(next_tokens.edge(()))  # doctest: +SKIP
    >>> tokens, is_whole = following(np.array([place, place]), np.array([5, 6]))  # doctest: +SKIP

    ```
    """

    def __init__(self, next_tokens: NextTokens, amateur: TokenBytes):
        self.next_tokens, self._bytes = next_tokens, amateur.bytes
        self._first_bytes = np.array([content[0] if content else 256 for content in amateur.bytes])
        # By the bytes before and behind, none being 256
        self._splits = np.zeros((257, 257), dtype=bool)
        for before in range(256):
            for first in range(256):
                self._splits[before, first] = next_tokens.is_independent(bytes([before]), bytes([first]))
        self.forget()

    def forget(self) -> None:
        """Empty the cache."""
        self._places: dict[tuple[Edge, bytes, int], int] = {}
        self._of_place: list[tuple[Edge, bytes, int]] = []
        # Of each place the byte before, if a token can be independent of it
        self._before: list[int] = []
        self._keys, self._values = np.empty(0, np.int64), np.empty(0, np.int32)
        self._waiting: dict[int, int] = {}

    def place(self, edge: Edge, beyond: bytes = b"", skipped: int = 0) -> int:
        """
        Number of a place where the amateur writes: after q and some text, or within q, so that the first bytes of its
        token belong to q.
        """
        if self.next_tokens.is_independent(edge.content, beyond):
            edge = _NOTHING
        key = edge, beyond, skipped
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self._of_place)
            self._of_place.append(key)
            self._before.append(256 if beyond or skipped or not edge.content else edge.content[-1])
        return place

    def __call__(self, places: np.ndarray, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            places (`np.ndarray` of shape `(N,)`): Where the amateur writes. They are valid until `forget`.
            token_ids (`np.ndarray` of shape `(N,)`): What it writes.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: As of [`NextTokens.after`], the expert's next token or what takes its
            place, and whether the text ends with a whole character.
        """
        width = len(self._bytes)
        independent = self._splits[np.array(self._before)[places], self._first_bytes[token_ids]]
        keys = np.where(independent, self.place(_NOTHING), places) * width + token_ids
        found = np.empty(len(keys), np.int32)
        known = np.zeros(len(keys), bool)
        if len(self._keys):
            at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
            known, found = self._keys[at] == keys, self._values[at]
        if not known.all():
            unknown, back = np.unique(keys[~known], return_inverse=True)
            found[~known] = np.array(self._ask(unknown.tolist()), np.int32)[back]
        return (found >> 1) + NO_TEXT, (found & 1).astype(bool)

    def _ask(self, keys: list[int]) -> list[int]:
        new = [key for key in keys if key not in self._waiting]
        pairs = []
        for key in new:
            place, token_id = divmod(key, len(self._bytes))
            edge, beyond, skipped = self._of_place[place]
            pairs.append((edge, beyond + (self._bytes[token_id] or b"")[skipped:]))
        for key, (token, is_whole) in zip(new, self.next_tokens.after_each(pairs), strict=True):
            self._waiting[key] = (token - NO_TEXT) * 2 + is_whole
        found = [self._waiting[key] for key in keys]
        if len(self._waiting) > max(_MOST_WAITING, _SHARE_WAITING * len(self._keys)):
            self._keys = np.concatenate([self._keys, np.fromiter(self._waiting.keys(), np.int64)])
            self._values = np.concatenate([self._values, np.fromiter(self._waiting.values(), np.int32)])
            order = self._keys.argsort()
            self._keys, self._values = self._keys[order], self._values[order]
            self._waiting = {}
        return found

    @property
    def is_full(self) -> bool:
        """Whether it is time to `forget`."""
        return len(self._keys) > _MOST_KNOWN
