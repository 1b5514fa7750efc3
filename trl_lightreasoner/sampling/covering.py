"""Reads an amateur with other tokens in the expert's: a covering over byte strings, with intervals.

Let q be the expert's tokens so far, b(.) bytes, tau_E the expert's tokenizer, and Y what the amateur writes. The
probability of the expert's next token a, when the expert tokenizes the amateur's text, is

    pi_A^E(a) = P[tau_E(b(Y)) begins with q a] / P[tau_E(b(Y)) begins with q]

The amateur starts from a context u: its own tokens of the bytes of q, up to a boundary some tokens back. Each of its
tokens w leads from one state (its tokens and the bytes that they add) to another. A state is settled when no further
text can change whether tau_E reproduces q, nor which token follows; its probability is then counted. Any other state
is opened, or it is counted as if the text ended there and as unsettled. The interval holds in both cases.

The expert's longer tokens, and a few texts that are tried, show whether further text can change something. Trying them
is most of the work and does not change the estimate. So a state is tried only if it can become a needed token, if it
has enough probability to be opened, or if an interval is too wide otherwise.

This module holds what depends on the two tokenizers.
[`~trl_lightreasoner.sampling.covered_step.CoveredStep`] is the covering of one step.
"""

from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from ..models.token_bytes import TokenBytes, split_characters


# Expert tokens between the place where the amateur starts and the step
_BACK = 3
# Fewest and most expert tokens before the step that its tokenizer must reproduce
_TAIL = (4, 16)
# Texts that show whether a tokenization is final, and the number of longer tokens tried with them
_PROBES = [text.encode() for text in (" ", "a", " a", "0", "\n", "\n\na", ".", "'s")]
_LONGER_TOKENS = 4
# Improbable amateur tokens looked at because they begin with a needed token
_LONGEST_LIST = 64
# Next tokens in the cache: about a quarter of a GiB
_MOST_KNOWN = 2**20

# What can take the place of an expert token after q
LOST = -1  # the text is not tokenized as q
OPEN = -2  # nothing yet, or part of a character
NO_TEXT = -3  # bytes that are not UTF-8, whatever follows


class Start(NamedTuple):
    """
    Where the covering of a step starts.

    Attributes:
        tail (`tuple[int, ...]`): The last expert tokens before the step.
        context (`tuple[int, ...]`): u, the amateur's tokens of the completion.
        missing (`bytes`): The bytes of the completion between u and the step.
        path (`tuple[int, ...]`): The amateur's own tokens of these bytes.
    """

    tail: tuple[int, ...]
    context: tuple[int, ...]
    missing: bytes
    path: tuple[int, ...]


class Covering:
    """
    What depends on the two tokenizers alone.

    Args:
        expert ([`~trl_lightreasoner.models.token_bytes.TokenBytes`]): tau_E.
        amateur ([`~trl_lightreasoner.models.token_bytes.TokenBytes`]): The amateur's.
        amateur_end_ids (`list[int]`): Tokens with which the amateur ends its answer.
    """

    def __init__(self, expert: TokenBytes, amateur: TokenBytes, amateur_end_ids: list[int]):
        self.expert, self.amateur = expert, amateur
        self.end_ids = [token_id for token_id in amateur_end_ids if token_id < len(amateur.bytes)]
        ends = set(self.end_ids)
        self._no_text = torch.tensor([not content or i in ends for i, content in enumerate(amateur.bytes)])
        self._sorted_ids = torch.tensor(amateur.sorted_ids, dtype=torch.long)
        # Of each expert token its place in `sorted_ids`
        self.expert_places = {token_id: place for place, token_id in enumerate(expert.sorted_ids)}
        self._expert_lengths = [len(content or b"") for content in expert.bytes]
        self._first: torch.Tensor | None = None
        # Known next tokens, by the tail and the text after it
        self._known: defaultdict[tuple[int, ...], dict[bytes, tuple[int, bool]]] = defaultdict(dict)
        self._num_known = 0

    def no_text(self, device: torch.device | str) -> torch.Tensor:
        """Which of the amateur's tokens stand for no text, `(W,)`."""
        self._no_text = self._no_text.to(device)
        return self._no_text

    def sorted_ids(self, device: torch.device | str) -> torch.Tensor:
        """The amateur's tokens with bytes, in the order of their bytes."""
        self._sorted_ids = self._sorted_ids.to(device)
        return self._sorted_ids

    def first(self, device: torch.device | str) -> torch.Tensor:
        """
        f(w): for each amateur token the first expert token of its bytes by themselves, as a place in the expert's
        `sorted_ids`, or their number for none, `(W,)`. Made once.
        """
        if self._first is None:
            none = len(self.expert_places)
            encoded = self.expert.encode_all([content or b"" for content in self.amateur.bytes])
            self._first = torch.tensor([self.expert_places.get(ids[0], none) if ids else none for ids in encoded])
        self._first = self._first.to(device)
        return self._first

    def num_shared(self) -> int:
        """How many expert tokens are amateur tokens of the same bytes."""
        return sum(content in self.amateur.ids for content in self.expert.bytes if content)

    def own_tokens(self, completion_ids: list[int]) -> list[int]:
        """The amateur's own tokens of a completion, up to the first token that stands for no text."""
        content = self.expert.join(completion_ids)
        while content is None and completion_ids:
            completion_ids = completion_ids[:-1]
            content = self.expert.join(completion_ids)
        return self.amateur.encode(content or b"") or []

    def starts(self, completion_ids: list[int], num_steps: int) -> list[Start | None]:
        """
        Where the first steps of a completion start. `None` if the amateur cannot read the text before a step, or if
        the expert's own tokenizer does not reproduce it. The text after a step has no influence.
        """
        parts: list[bytes] = []
        for token_id in completion_ids[: num_steps - 1]:
            content = self.expert.bytes[token_id] if token_id < len(self.expert.bytes) else None
            if not content:
                break
            parts.append(content)
        ends = [0, *accumulate(map(len, parts))]
        whole = b"".join(parts)
        tokens = self.amateur.encode_all([whole[:end] for end in ends])
        starts: list[Start | None] = []
        for t in range(num_steps):
            tail = self._tail(completion_ids[:t]) if t < len(ends) else None
            recent = tokens[max(0, t - _BACK) : t + 1]
            if tail is None or not recent or None in recent:
                starts.append(None)
                continue
            context = self._context(recent, ends[max(0, t - _BACK)])  # type: ignore[arg-type]
            covered = len(self.amateur.join(context) or b"")
            path = tuple(recent[-1][len(context) :])  # type: ignore[index]
            starts.append(Start(tail, context, whole[covered : ends[t]], path))
        return starts

    def _context(self, recent: list[list[int]], end: int) -> tuple[int, ...]:
        """The amateur's tokens within the first `end` bytes that are the same in all `recent` tokenizations."""
        context = []
        for place, token_id in enumerate(recent[0]):
            if any(ids[place : place + 1] != [token_id] for ids in recent):
                break
            context.append(token_id)
        lengths = [len(self.amateur.bytes[token_id] or b"") for token_id in context]
        ends = list(accumulate(lengths))
        return tuple(context[: bisect_right(ends, end)])

    def _tail(self, ids: list[int]) -> tuple[int, ...] | None:
        """As few of the last expert tokens as the tokenizer reproduces."""
        fewest, most = _TAIL
        for count in range(min(fewest, len(ids)), min(most, len(ids)) + 1):
            tail = tuple(ids[len(ids) - count :])
            content = self.expert.join(tail)
            text = None if content is None else split_characters(content)
            if text is None:
                continue
            if text[1]:  # the last character is incomplete: compare the whole ones
                whole = len(text[0].encode())
                inside = bisect_right(list(accumulate(self._expert_lengths[i] for i in tail)), whole)
                found = self.expert.encode(content[:whole])  # type: ignore[index]
                if found is not None and tuple(found[:inside]) == tail[:inside]:
                    return tail
            elif (found := self.expert.encode(content)) is not None and tuple(found) == tail:  # type: ignore[arg-type]
                return tail
        return None

    def next_tokens(self, tail: tuple[int, ...], beyond: list[bytes]) -> list[tuple[int, bool]]:
        """
        For texts that end in these bytes after `tail`: the expert's next token or what takes its place, and whether
        the text ends with a whole character.
        """
        if self._num_known > _MOST_KNOWN:
            self._known.clear()
            self._num_known = 0
        known = self._known[tail]
        base = self.expert.join(tail) or b""
        new = list(dict.fromkeys(each for each in beyond if each not in known))
        texts = [split_characters(base + each) for each in new]
        encoded = self.expert.encode_all([text[0].encode() if text else b"" for text in texts])
        for each, text, ids in zip(new, texts, encoded, strict=True):
            token = _next_token(tail, ids)
            if text is None:
                known[each] = (NO_TEXT, True)
            elif text[1]:
                known[each] = (token if token >= 0 else OPEN, False)
            else:
                known[each] = (token, True)
        self._num_known += len(new)
        return [known[each] for each in beyond]

    def finality(self, tail: tuple[int, ...], beyond: list[bytes], tokens: list[int]) -> list[tuple[bool, bool]]:
        """
        For texts that end with a character and have these next tokens: whether further text can change the next token,
        and whether it can change the tokens of `tail`.
        """
        base = self.expert.join(tail) or b""
        grown = [self._can_grow(tail, token, base, each) for token, each in zip(tokens, beyond, strict=True)]
        probes: list[bytes] = []
        ends = [0]
        for each, token, (_, lost) in zip(beyond, tokens, grown, strict=True):
            if token == LOST or not lost:
                content = base + each
                further = dict.fromkeys((*_PROBES, *self._longer_tokens(tail, base, each)))
                probes += [content + probe for probe in further]
            ends.append(len(probes))
        outcomes = [_next_token(tail, ids) for ids in self.expert.encode_all(probes)]
        found = []
        for (first, end), token, (moves, lost) in zip(pairwise(ends), tokens, grown, strict=True):
            others = outcomes[first:end]
            if token == LOST:
                found.append((any(other != LOST for other in others), True))
            else:
                lost = lost or LOST in others
                found.append((lost or moves or any(other != token for other in others), lost))
        return found

    def ends_with(self, tail: tuple[int, ...], beyond: bytes) -> int:
        """The next token if the text ends there: `OPEN` for none, `LOST` if `tail` is not reproduced."""
        token, whole = self._known[tail].get(beyond, (OPEN, False))
        return token if whole else _next_token(tail, self.expert.encode((self.expert.join(tail) or b"") + beyond))

    def _can_grow(self, tail: tuple[int, ...], token: int, base: bytes, beyond: bytes) -> tuple[bool, bool]:
        """Whether a longer token could begin where the next token begins, or where one of the tail does."""
        text = base + beyond
        at, lost = len(base), False
        for token_id in reversed(tail[-3:]):
            at -= self._expert_lengths[token_id]
            lost = lost or bool(self.expert.going_on(text[at:], 1))
        return token == OPEN or bool(self.expert.going_on(beyond, 1)), lost

    def _longer_tokens(self, tail: tuple[int, ...], base: bytes, beyond: bytes) -> list[bytes]:
        """Bytes that would complete longer tokens that begin within the last tokens of a text."""
        text = base + beyond
        start = len(base) - (self._expert_lengths[tail[-1]] if tail else 0)
        places = range(max(start, len(text) - 8) + 1, len(text))
        return [more for at in places for more in self.expert.going_on(text[at:], _LONGER_TOKENS)]

    def similar(self, token: int) -> list[int]:
        """Amateur tokens that are a prefix of an expert token, and some of which it is a prefix."""
        content = self.expert.bytes[token] or b""
        shorter = [i for end in range(1, len(content) + 1) for i in self.amateur.ids.get(content[:end], ())]
        longer = self.amateur.sorted_ids[self.amateur.starting_with(content)] if content else []
        return shorter + longer[:_LONGEST_LIST]

    def comparable(self, token: int) -> tuple[list[int], slice]:
        """Places of expert tokens that are a prefix of an expert token, and of those of which it is a prefix."""
        content = self.expert.bytes[token]
        if not content:
            return [], slice(0, 0)
        shorter = [i for end in range(1, len(content)) for i in self.expert.ids.get(content[:end], ())]
        return [self.expert_places[i] for i in shorter], self.expert.starting_with(content)


def _next_token(tail: tuple[int, ...], ids: list[int] | None) -> int:
    if ids is None or tuple(ids[: len(tail)]) != tail:
        return LOST
    return ids[len(tail)] if len(ids) > len(tail) else OPEN
