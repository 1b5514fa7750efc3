"""Reads an amateur with other tokens in the expert's: a covering over byte strings, with intervals.

Let q be the expert's tokens so far, b(.) bytes, tau_E the expert's tokenizer, and Y what the amateur writes. The
probability of the expert's next token a, when the expert tokenizes the amateur's text, is

    pi_A^E(a) = P[tau_E(b(Y)) begins with q a] / P[tau_E(b(Y)) begins with q]

The amateur starts from a context u: its own tokens of the bytes of q, up to a boundary some tokens back. Each of its
tokens w leads from one state (its tokens and the bytes that they add) to another. A state is settled when no further
text can change whether tau_E reproduces q, nor which token follows; its probability is then counted. Any other state
is opened, or it is counted as if the text ended there and as unsettled. The interval holds in both cases.

The amateur's own tokens of q are followed first. Their probability says which other states are likely.

The expert's longer tokens, and a few texts that are tried, show whether further text can change something. Trying them
does not change the estimate. So a state is tried only if it has enough probability to be opened, or if an interval is
too wide otherwise.

This module holds what depends on the two tokenizers.
[`~trl_lightreasoner.sampling.covered_step.CoveredStep`] is the covering of one step.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from ..models.token_bytes import TokenBytes, split_characters
from .following import Following
from .independent_texts import independent_places
from .next_tokens import NextTokens


# Expert tokens between the place where the amateur starts and the step
_BACK = 3
# Fewest and most expert tokens before the step that its tokenizer must reproduce
_TAIL = (4, 16)
# Improbable amateur tokens looked at because they begin with a needed token
_LONGEST_LIST = 64


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


class Reach(NamedTuple):
    """
    The amateur's tokens that begin with some bytes, or that begin them, as places in its `sorted_ids`.

    Attributes:
        first, end (`int`): The tokens that begin with the bytes.
        shorter (`list[int]`): The tokens that are a proper beginning of them.
    """

    first: int
    end: int
    shorter: list[int]


class Covering:
    """
    What depends on the two tokenizers alone.

    Args:
        expert ([`~trl_lightreasoner.models.token_bytes.TokenBytes`]): tau_E.
        amateur ([`~trl_lightreasoner.models.token_bytes.TokenBytes`]): The amateur's.
        amateur_end_ids (`list[int]`): Tokens with which the amateur ends its answer.

    Attributes:
        next_tokens ([`NextTokens`]): What tau_E makes of texts after q.
        following ([`Following`]): The same, by the amateur's tokens.
        places (`np.ndarray` of shape `(W,)`): Of each amateur token its place in `sorted_ids`, or -1.
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
        self._similar: dict[int, np.ndarray] = {}
        self._starting_with: dict[int, slice] = {}
        self._reach: dict[bytes, Reach] = {}
        self._words = independent_places(amateur)
        self.next_tokens = NextTokens(expert)
        self.following = Following(self.next_tokens, amateur)
        self.places = np.full(len(amateur.bytes), -1)
        self.places[amateur.sorted_ids] = np.arange(len(amateur.sorted_ids))
        blanks = amateur.sorted_ids[amateur.starting_with(b" ")]
        self._begins_with_blank = torch.zeros(len(amateur.bytes), dtype=torch.bool)
        self._begins_with_blank[blanks] = True

    def no_text(self, device: torch.device | str) -> torch.Tensor:
        """Which of the amateur's tokens stand for no text, `(W,)`."""
        self._no_text = self._no_text.to(device)
        return self._no_text

    def begins_with_blank(self, device: torch.device | str) -> torch.Tensor:
        """Which of the amateur's tokens begin with a blank, `(W,)`."""
        self._begins_with_blank = self._begins_with_blank.to(device)
        return self._begins_with_blank

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
        tokens = self._own_tokens_up_to(whole, ends)
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

    def _own_tokens_up_to(self, content: bytes, ends: list[int]) -> list[list[int] | None]:
        """The amateur's own tokens of some beginnings of a text, tokenized word by word."""
        cuts = [0, *(found.start() for found in self._words.finditer(content))] if self._words else [0]
        last_cuts = [cuts[max(0, bisect_left(cuts, end) - 1)] for end in ends]
        wanted = dict.fromkeys([*pairwise(cuts), *zip(last_cuts, ends, strict=True)])
        words = dict(zip(wanted, self.amateur.encode_all([content[a:b] for a, b in wanted]), strict=True))
        before: dict[int, list[int] | None] = {0: []}
        for cut, end in pairwise(cuts):
            before[end] = _joined(before[cut], words[cut, end])
        return [_joined(before[cut], words[cut, end]) for cut, end in zip(last_cuts, ends, strict=True)]

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

    def similar(self, token: int) -> np.ndarray:
        """Amateur tokens that are a prefix of an expert token, and some of which it is a prefix."""
        if token not in self._similar:
            content = self.expert.bytes[token] or b""
            shorter = self.inside(content).tolist()
            longer = self.amateur.sorted_ids[self.starting_with(token)]
            self._similar[token] = np.array(shorter + longer[:_LONGEST_LIST], np.int64)
        return self._similar[token]

    def starting_with(self, token: int) -> slice:
        """Where in the amateur's `sorted_ids` the tokens are that begin with an expert token."""
        if token not in self._starting_with:
            content = self.expert.bytes[token]
            self._starting_with[token] = self.amateur.starting_with(content) if content else slice(0, 0)
        return self._starting_with[token]

    def inside(self, missing: bytes) -> np.ndarray:
        """The amateur's tokens that are a beginning of the missing bytes, or all of them."""
        ids = self.amateur.ids
        found = [token_id for end in range(1, len(missing) + 1) for token_id in ids.get(missing[:end], ())]
        return np.array(found, np.int64)

    def reach(self, content: bytes) -> Reach:
        """Which of the amateur's tokens begin with some bytes, or begin them."""
        if content not in self._reach:
            ids, longer = self.amateur.ids, self.amateur.starting_with(content)
            shorter = [self.places[i].item() for end in range(1, len(content)) for i in ids.get(content[:end], ())]
            self._reach[content] = Reach(longer.start, longer.stop, shorter)
        return self._reach[content]

    def forget(self) -> None:
        """Empty the caches, which grow with the texts."""
        self._reach.clear()
        self.next_tokens.forget()
        self.following.forget()


def _joined(first: list[int] | None, second: list[int] | None) -> list[int] | None:
    return None if first is None or second is None else first + second
