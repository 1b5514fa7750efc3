"""The expert's next token after q, for the texts that an amateur can write there, and whether more text can change it.

The expert's tokenizer is slow beside everything else, and the texts are many. But there are places in a text at which
it treats what is before and what is behind independently of each other (`independent_texts`), such as before a blank.
Most answers are known from other steps then: of q only what is behind its last such place matters, or nothing if the
text after q begins at one, and of this text what comes before its first one. A tokenizer without such places is asked
about every text.
"""

from collections import defaultdict
from itertools import accumulate, pairwise
from typing import NamedTuple

from ..models.token_bytes import TokenBytes, split_characters
from .independent_texts import independent_places
from .joined_texts import JoinedTexts


# Texts that show whether a tokenization is final, and the number of longer tokens tried with them
_PROBES = [text.encode() for text in (" ", "a", " a", "0", "\n", "\n\na", ".", "'s")]
_LONGER_TOKENS = 4
# Texts in the cache: about half a GiB
_MOST_KNOWN = 2**20

# What can take the place of an expert token after q
LOST = -1  # the text is not tokenized as q
OPEN = -2  # nothing yet, or part of a character
NO_TEXT = -3  # bytes that are not UTF-8, whatever follows


class Edge(NamedTuple):
    """
    The end of q: all that its continuation can depend on.

    Attributes:
        tail (`tuple[int, ...]`): Its last expert tokens.
        content (`bytes`): Their bytes.
    """

    tail: tuple[int, ...]
    content: bytes


_NOTHING = Edge((), b"")


class NextTokens:
    """
    What an expert's tokenizer makes of texts.

    Args:
        expert ([`~trl_lightreasoner.models.token_bytes.TokenBytes`]): tau_E.

    Attributes:
        places (`re.Pattern[bytes]`, *optional*): Where texts are independent of each other, see
            [`independent_places`].

    Example:

    ```python
    >>> next_tokens = NextTokens(TokenBytes(tokenizer, len(tokenizer)))
    >>> edge = next_tokens.edge(())
    >>> [(token, is_whole)] = next_tokens.after(edge, [b"2+2"])
    >>> next_tokens.expert.bytes[token], is_whole
    (b'2', True)

    ```
    """

    def __init__(self, expert: TokenBytes):
        self.expert = expert
        self.places = independent_places(expert)
        self._joined = JoinedTexts(expert, self.places)
        self._lengths = [len(content or b"") for content in expert.bytes]
        # By the end of q and the text after it
        self._known: defaultdict[Edge, dict[bytes, tuple[int, bool]]] = defaultdict(dict)
        self._final: defaultdict[Edge, dict[bytes, tuple[bool, bool]]] = defaultdict(dict)
        self._num_known = 0
        # By the last byte of a text
        self._probes_after: dict[bytes, list[bytes]] = {}

    def edge(self, tail: tuple[int, ...]) -> Edge:
        """The end of q, given so many of its tokens that the tokenizer reproduces them."""
        content = self.expert.join(tail) or b""
        if self.places and (cuts := [found.start() for found in self.places.finditer(content)]):
            ends = list(accumulate(self._lengths[token_id] for token_id in tail))
            if cuts[-1] in ends:
                return Edge(tail[ends.index(cuts[-1]) + 1 :], content[cuts[-1] :])
        return Edge(tail, content)

    def is_independent(self, before: bytes, text: bytes) -> bool:
        """Whether a text is independent of the one before, by the two bytes between which it begins."""
        return bool(self.places and before and self.places.match(before[-1:] + text[:1], 1))

    def after(self, edge: Edge, beyond: list[bytes]) -> list[tuple[int, bool]]:
        """
        For texts that follow q: the expert's next token or what takes its place, and whether the text ends with a
        whole character.
        """
        return self.after_each([(edge, each) for each in beyond])

    def after_each(self, pairs: list[tuple[Edge, bytes]]) -> list[tuple[int, bool]]:
        """The same for texts that each follow a q of their own."""
        if self._num_known > _MOST_KNOWN:
            self.forget()
        keys = [self._key(*pair) for pair in pairs]
        new = dict.fromkeys(key for key in keys if key[1] not in self._known[key[0]])
        texts = [split_characters(before.content + each) for before, each in new]
        encoded = self._joined.encode_all([text[0].encode() if text else b"" for text in texts]) if texts else []
        for (before, each), text, ids in zip(new, texts, encoded, strict=True):
            token = _next_token(before.tail, ids)
            if text is None:
                found = NO_TEXT, True
            elif text[1]:
                found = token if token >= 0 else OPEN, False
            else:
                found = token, True
            self._known[before][each] = found
        self._num_known += len(new)
        return [self._known[before][each] for before, each in keys]

    def finality(self, edge: Edge, beyond: list[bytes]) -> list[tuple[bool, bool]]:
        """
        For texts that follow q and end with a character: whether further text can change the next token, and whether
        it can change the tokens of q.
        """
        tokens = [token for token, _ in self.after(edge, beyond)]
        keys = [self._key(edge, each) for each in beyond]
        pairs = zip(keys, tokens, strict=True)
        new = {key: token for key, token in pairs if key[1] not in self._final[key[0]]}
        grown = [self._can_grow(key[0], key[1], token) for key, token in new.items()]
        probes: list[bytes] = []
        ends = [0]
        for ((before, each), token), (moves, lost) in zip(new.items(), grown, strict=True):
            if token == LOST or not lost and (before.tail or not moves):
                content = before.content + each
                further = dict.fromkeys((*self._probes(content), *self._longer_tokens(before, each)))
                probes += [content + probe for probe in further]
            ends.append(len(probes))
        encoded = self._joined.encode_all(probes) if probes else []
        for (first, end), ((before, each), token), (moves, lost) in zip(
            pairwise(ends), new.items(), grown, strict=True
        ):
            others = [_next_token(before.tail, ids) for ids in encoded[first:end]]
            if token == LOST:
                found = any(other != LOST for other in others), True
            else:
                lost = lost or LOST in others
                found = lost or moves or any(other != token for other in others), lost
            self._final[before][each] = found
        self._num_known += len(new)
        return [self._final[before][each] for before, each in keys]

    def ends_with(self, edge: Edge, beyond: bytes) -> int:
        """The next token if the text ends there: `OPEN` for none, `LOST` if q is not reproduced."""
        ((token, whole),) = self.after(edge, [beyond])
        return token if whole else _next_token(edge.tail, self.expert.encode(edge.content + beyond))

    def _key(self, edge: Edge, beyond: bytes) -> tuple[Edge, bytes]:
        """What matters of q and the text after it."""
        if not self.places or not beyond:
            return edge, beyond
        if self.is_independent(edge.content, beyond):
            edge = _NOTHING
        found = self.places.search(beyond)
        return edge, beyond[: found.end()] if found else beyond

    def forget(self) -> None:
        """Empty the cache."""
        self._known.clear()
        self._final.clear()
        self._num_known = 0

    def _can_grow(self, edge: Edge, beyond: bytes, token: int) -> tuple[bool, bool]:
        """Whether a longer token could begin where the next token begins, or where one of q does."""
        text = edge.content + beyond
        at, lost = len(edge.content), False
        for token_id in reversed(edge.tail[-3:]):
            at -= self._lengths[token_id]
            lost = lost or bool(self.expert.going_on(text[at:], 1))
        return token == OPEN or bool(self.expert.going_on(beyond, 1)), lost

    def _probes(self, content: bytes) -> list[bytes]:
        """Those of the probes that can change the tokens of a text."""
        last = content[-1:]
        if last not in self._probes_after:
            self._probes_after[last] = [probe for probe in _PROBES if not self.is_independent(last, probe)]
        return self._probes_after[last]

    def _longer_tokens(self, edge: Edge, beyond: bytes) -> list[bytes]:
        """Bytes that would complete longer tokens that begin within the last tokens of a text."""
        text = edge.content + beyond
        start = len(edge.content) - (self._lengths[edge.tail[-1]] if edge.tail else 0)
        places = range(max(start, len(text) - 8) + 1, len(text))
        return [more for at in places for more in self.expert.going_on(text[at:], _LONGER_TOKENS)]


def _next_token(tail: tuple[int, ...], ids: list[int] | None) -> int:
    if ids is None or tuple(ids[: len(tail)]) != tail:
        return LOST
    return ids[len(tail)] if len(ids) > len(tail) else OPEN
