"""An amateur with other tokens, read in the expert's: a covering over byte strings, with intervals.

Let q be the expert's tokens so far, b(.) bytes, tau_E the expert's tokenizer, and Y what the amateur writes. What is
wanted is the probability of the expert's next token a, as the amateur's text is tokenized by the expert:

    pi_A^E(a) = P[tau_E(b(Y)) begins with q a] / P[tau_E(b(Y)) begins with q]

The amateur starts from a context u, what its own tokenizer makes of the bytes of q up to a boundary some tokens back.
Each of its tokens w leads from a state (its tokens, the bytes that they add) to another one. A state is settled when
no text behind it changes whether tau_E gives q back, and which token follows; its probability is counted there. Any
other state is opened, or is counted as if the text ended there, and as unsettled: the interval holds it either way.
Whether text behind can change something is told by the expert's longer tokens and by a few texts that are tried, most
of the work. The estimate is the same either way, so states are tried only if they can become a token that is needed,
if they have enough mass to be opened, or if an interval is too wide without.

No models here: `CoveredStep.wanted` says at which contexts the amateur must be read, `CoveredStep.open` takes what it
says there.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from ..models.token_bytes import TokenBytes, split_characters


# Expert tokens between the place where the amateur starts and the step
_BACK = 3
# Expert tokens of which it is tested whether they are given back: fewest and most
_TAIL = (4, 16)
# A state is opened if it has this share of a candidate that the label needs, or of everything
_OPEN_OF_CANDIDATE, _OPEN_OF_ALL = 1e-3, 2e-2
# Amateur tokens of one context that are looked at in context, unless the others have less than this together
_MOST_TOKENS, _REST = 256, 1e-4
# Contexts that a step can open
_MOST_CONTEXTS = 48
# Texts by which it is tested whether a tokenization is final, and the longer tokens tried beside them
_PROBES = [text.encode() for text in (" ", "a", " a", "0", "\n", "\n\na", ".", "'s")]
_LONGER_TOKENS = 4
# Amateur tokens that begin with a token that is needed, of those with little probability
_LONGEST_LIST = 64

# Next tokens that are remembered: about a quarter of a GiB
_MOST_KNOWN = 2**20

# What can stand in place of an expert token behind q
_LOST = -1  # the text is not tokenized as q
_OPEN = -2  # nothing yet, or part of a character
_NO_TEXT = -3  # bytes that are no UTF-8, whatever follows


@dataclass
class _State:
    mass: float
    context: tuple[int, ...] | None  # amateur tokens, or `None` if it cannot be opened
    missing: bytes = b""  # of q
    beyond: bytes = b""  # behind q
    token: int = _OPEN  # the expert's next, if the text ends here
    lost: bool = True  # whether text behind can be such that q is not given back


@dataclass
class Bounds:
    """
    pi_A^E of some expert tokens.

    Attributes:
        estimate (`list[float]`): The estimate, as if every open text ended where it is.
        low, high (`list[float]`): Where the true value lies.
    """

    estimate: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


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
        width = len(amateur.bytes)
        self.end_ids = [token_id for token_id in amateur_end_ids if token_id < width]
        ends = set(self.end_ids)
        written = [i for i, content in enumerate(amateur.bytes) if content and i not in ends]
        self.written = torch.tensor(written, dtype=torch.long)  # tokens that stand for text
        self._places = {token_id: place for place, token_id in enumerate(written)}
        self._expert_lengths = [len(content or b"") for content in expert.bytes]
        self._first: torch.Tensor | None = None
        # Next tokens that are known, by the tail and the text behind it
        self._known: defaultdict[tuple[int, ...], dict[bytes, tuple[int, bool]]] = defaultdict(dict)
        self._num_known = 0

    @property
    def first(self) -> torch.Tensor:
        """f(w): the first expert token of each of `written` by itself; the width of its logits for none. Made once."""
        if self._first is None:
            contents = [self.amateur.bytes[token_id] for token_id in self.written.tolist()]
            encoded = self.expert.encode_all([content or b"" for content in contents])
            self._first = torch.tensor([ids[0] if ids else len(self.expert.bytes) for ids in encoded])
        return self._first

    def num_shared(self) -> int:
        """How many expert tokens are amateur tokens of the same bytes."""
        return sum(content in self.amateur.ids for content in self.expert.bytes if content)

    def own_tokens(self, completion_ids: list[int]) -> list[int]:
        """The amateur's own tokens of the expert's, as far as they stand for text that it can read."""
        content = self.expert.join(completion_ids)
        while content is None and completion_ids:
            completion_ids = completion_ids[:-1]
            content = self.expert.join(completion_ids)
        return self.amateur.encode(content or b"") or []

    def steps(self, completion_ids: list[int], num_steps: int) -> list["CoveredStep | None"]:
        """
        The first steps of a completion; `None` where the amateur cannot read what comes before, or where the expert's
        own tokenizer does not give it back. What follows a step plays no part in it.
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
        steps: list[CoveredStep | None] = []
        for t in range(num_steps):
            tail = self._tail(completion_ids[:t]) if t < len(ends) else None
            recent = tokens[max(0, t - _BACK) : t + 1]
            if tail is None or not recent or None in recent:
                steps.append(None)
                continue
            start = self._start(recent, ends[max(0, t - _BACK)])  # type: ignore[arg-type]
            covered = len(self.amateur.join(start) or b"")
            steps.append(CoveredStep(self, tail, start, whole[covered : ends[t]]))
        return steps

    def _start(self, recent: list[list[int]], end: int) -> tuple[int, ...]:
        """The amateur's tokens that the last expert tokens have not moved, within the first `end` bytes."""
        start = []
        for place, token_id in enumerate(recent[0]):
            if any(ids[place : place + 1] != [token_id] for ids in recent):
                break
            start.append(token_id)
        lengths = [len(self.amateur.bytes[token_id] or b"") for token_id in start]
        ends = list(accumulate(lengths))
        return tuple(start[: bisect_right(ends, end)])

    def _tail(self, ids: list[int]) -> tuple[int, ...] | None:
        """The last expert tokens, so many that the tokenizer gives them back."""
        fewest, most = _TAIL
        for count in range(min(fewest, len(ids)), min(most, len(ids)) + 1):
            tail = tuple(ids[len(ids) - count :])
            content = self.expert.join(tail)
            text = None if content is None else split_characters(content)
            if text is None:
                continue
            if text[1]:  # the rest of a character is to come: as far as there are whole ones
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
        The expert's next token, or what stands in its place, of texts that end in these bytes behind `tail`; and
        whether they end with a whole character.
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
                known[each] = (_NO_TEXT, True)
            elif text[1]:
                known[each] = (token if token >= 0 else _OPEN, False)
            else:
                known[each] = (token, True)
        self._num_known += len(new)
        return [known[each] for each in beyond]

    def finality(self, tail: tuple[int, ...], beyond: list[bytes], tokens: list[int]) -> list[tuple[bool, bool]]:
        """
        Whether a text behind can change the next token, and whether it can be such that `tail` is not given back, of
        texts that end with a character and have these next tokens.
        """
        base = self.expert.join(tail) or b""
        grown = [self._can_grow(tail, token, base, each) for token, each in zip(tokens, beyond, strict=True)]
        probes: list[bytes] = []
        ends = [0]
        for each, token, (_, lost) in zip(beyond, tokens, grown, strict=True):
            if token == _LOST or not lost:
                content = base + each
                behind = dict.fromkeys((*_PROBES, *self._longer_tokens(tail, base, each)))
                probes += [content + probe for probe in behind]
            ends.append(len(probes))
        outcomes = [_next_token(tail, ids) for ids in self.expert.encode_all(probes)]
        found = []
        for (first, end), token, (moves, lost) in zip(pairwise(ends), tokens, grown, strict=True):
            others = outcomes[first:end]
            if token == _LOST:
                found.append((any(other != _LOST for other in others), True))
            else:
                lost = lost or _LOST in others
                found.append((lost or moves or any(other != token for other in others), lost))
        return found

    def ends_with(self, tail: tuple[int, ...], beyond: bytes) -> int:
        """The next token if the text ends there: `_OPEN` for none, `_LOST` if `tail` is not given back."""
        token, whole = self._known[tail].get(beyond, (_OPEN, False))
        return token if whole else _next_token(tail, self.expert.encode((self.expert.join(tail) or b"") + beyond))

    def _can_grow(self, tail: tuple[int, ...], token: int, base: bytes, beyond: bytes) -> tuple[bool, bool]:
        """Whether a longer token could stand from the next token's beginning on, or from that of one in the tail."""
        text = base + beyond
        at, lost = len(base), False
        for token_id in reversed(tail[-3:]):
            at -= self._expert_lengths[token_id]
            lost = lost or bool(self.expert.going_on(text[at:], 1))
        return token == _OPEN or bool(self.expert.going_on(beyond, 1)), lost

    def _longer_tokens(self, tail: tuple[int, ...], base: bytes, beyond: bytes) -> list[bytes]:
        """Bytes that would make longer tokens of the end of a text, from places within the last tokens on."""
        text = base + beyond
        start = len(base) - (self._expert_lengths[tail[-1]] if tail else 0)
        places = range(max(start, len(text) - 8) + 1, len(text))
        return [more for at in places for more in self.expert.going_on(text[at:], _LONGER_TOKENS)]

    def places_of(self, token: int) -> list[int]:
        """Places in `written` of amateur tokens that an expert token begins with, or that are little longer."""
        content = self.expert.bytes[token] or b""
        shorter = [i for end in range(1, len(content) + 1) for i in self.amateur.ids.get(content[:end], ())]
        longer = self.amateur.starting_with(content)[:_LONGEST_LIST] if content else []
        return [self._places[i] for i in (*shorter, *longer) if i in self._places]

    def comparable(self, content: bytes) -> list[int]:
        """Expert tokens that begin with these bytes, or that these begin with."""
        shorter = [i for end in range(1, len(content)) for i in self.expert.ids.get(content[:end], ())]
        return shorter + self.expert.starting_with(content)


class CoveredStep:
    """
    One step: a distribution over the expert's next tokens, as far as the amateur has been read.

    Args:
        covering ([`Covering`]): The two tokenizers.
        tail (`tuple[int, ...]`): The last expert tokens before the step.
        start (`tuple[int, ...]`): u, the amateur's tokens of the completion.
        missing (`bytes`): What of the completion before the step comes behind u.

    Attributes:
        needed (`list[int | None]`): Expert tokens that are to be known exactly; `None` is the end of the answer.
    """

    def __init__(self, covering: Covering, tail: tuple[int, ...], start: tuple[int, ...], missing: bytes):
        self.covering, self.tail = covering, tail
        self.needed: list[int | None] = []
        width = len(covering.expert.bytes)
        self._settled = torch.zeros(width, dtype=torch.float64)
        self._by_table = torch.zeros(width, dtype=torch.float64)
        self._end = 0.0
        self._states = [_State(1.0, start, missing)]
        # States of which it is not known whether they are settled, none of them comparable to a token that is needed
        self._untried: list[_State] = []
        self.num_opened = 0

    def wanted(self) -> list[tuple[int, ...]]:
        """
        Contexts, as amateur tokens of the completion, at which the amateur must be read; none when the tokens that are
        needed are as exact as can be.
        """
        everything = self._everything()
        self._try([state for state in self._untried if state.mass >= _OPEN_OF_ALL * everything])
        highest = [self._range(token, self._states)[1] for token in self.needed]
        wanted = []
        for state in self._states:
            if state.context is None:
                continue
            matters = any(
                self._comparable(state, token) and state.mass >= _OPEN_OF_CANDIDATE * high
                for token, high in zip(self.needed, highest, strict=True)
            )
            if matters or state.mass >= _OPEN_OF_ALL * everything:
                wanted.append(state)
        wanted.sort(key=lambda state: -state.mass)
        return [state.context for state in wanted[: _MOST_CONTEXTS - self.num_opened] if state.context is not None]

    def open(self, context: tuple[int, ...], probs: torch.Tensor) -> None:
        """
        Go on from a context.

        Args:
            context (`tuple[int, ...]`): One of [`~CoveredStep.wanted`].
            probs (`torch.Tensor` of shape `(W,)`, fp64): The amateur's next token there.
        """
        states, self._states = self._states, []
        for state in states:
            if state.context != context:
                self._states.append(state)
            elif state.missing:
                self._open_inside(state, probs)
            else:
                self._open_behind(state, probs)
        self.num_opened += 1

    def _open_inside(self, state: _State, probs: torch.Tensor) -> None:
        amateur, missing, context = self.covering.amateur, state.missing, state.context or ()
        shorter = [(i, end) for end in range(1, len(missing) + 1) for i in amateur.ids.get(missing[:end], ())]
        masses = (state.mass * probs[[token_id for token_id, _ in shorter]]).tolist()
        for (token_id, end), mass in zip(shorter, masses, strict=True):
            self._states.append(_State(mass, (*context, token_id), missing[end:]))
        longer = [i for i in amateur.starting_with(missing) if len(amateur.bytes[i] or b"") > len(missing)]
        chosen, likely, rest = _most_probable(probs[longer])
        self._look_at(state, [longer[i] for i in chosen], likely, len(missing))
        self._states.append(_State(rest * state.mass, None))

    def _open_behind(self, state: _State, probs: torch.Tensor) -> None:
        covering, beyond = self.covering, state.beyond
        end = covering.ends_with(self.tail, beyond)
        at_end = state.mass * probs[covering.end_ids].sum().item()
        if end == _OPEN:
            self._end += at_end
        elif end != _LOST:
            self._settled[end] += at_end
        covering.written = covering.written.to(probs.device)
        of_text = probs[covering.written]
        chosen, likely, rest = _most_probable(of_text)
        if beyond:
            self._look_at(state, covering.written[chosen].tolist(), likely, 0)
            self._states.append(_State(rest * state.mass, None, beyond=beyond, token=state.token, lost=state.lost))
            return
        similar = [place for token in self.needed if token is not None for place in covering.places_of(token)]
        chosen = list(dict.fromkeys([*chosen, *similar]))
        likely += of_text[chosen[len(likely) :]].tolist()
        self._look_at(state, covering.written[chosen].tolist(), likely, 0)
        # The many tokens of little mass, by the table
        of_text[chosen] = 0.0
        first = covering.first.to(probs.device)
        table = torch.zeros(len(self._by_table) + 1, dtype=torch.float64, device=probs.device)
        self._by_table += state.mass * table.index_add_(0, first, of_text).cpu()[:-1]

    def _look_at(self, state: _State, token_ids: list[int], probs: list[float], skipped: int) -> None:
        """Add the states that amateur tokens lead to."""
        beyond = [state.beyond + (self.covering.amateur.bytes[i] or b"")[skipped:] for i in token_ids]
        context = state.context or ()
        next_tokens = self.covering.next_tokens(self.tail, beyond)
        to_try = []
        for token_id, prob, text, (token, whole) in zip(token_ids, probs, beyond, next_tokens, strict=True):
            if token == _NO_TEXT:
                continue
            found = _State(state.mass * prob, (*context, token_id), beyond=text, token=token)
            if not whole:
                self._states.append(found)
            else:
                self._untried.append(found)
                if any(self._comparable(found, needed) for needed in self.needed):
                    to_try.append(found)
        self._try(to_try)

    def _try(self, states: list[_State]) -> None:
        """Find out of some of the states that have not been tried whether they are settled."""
        if not states:
            return
        tried = set(map(id, states))
        self._untried = [state for state in self._untried if id(state) not in tried]
        finality = self.covering.finality(
            self.tail, [state.beyond for state in states], [state.token for state in states]
        )
        for state, (open_, lost) in zip(states, finality, strict=True):
            state.lost = lost
            if open_:
                self._states.append(state)
            elif state.token != _LOST:
                self._settled[state.token] += state.mass

    def _comparable(self, state: _State, token: int | None) -> bool:
        """Whether a state can become the expert's next token."""
        if not state.beyond or state.missing:
            return True
        if token is None:
            return False
        content = self.covering.expert.bytes[token] or b""
        return state.beyond.startswith(content) or content.startswith(state.beyond)

    def _everything(self) -> float:
        """The estimate of P[tau_E(b(Y)) begins with q]."""
        unsettled = sum(state.mass for state in (*self._states, *self._untried) if state.token >= 0)
        return self._settled.sum().item() + self._by_table.sum().item() + self._end + unsettled

    def _range(self, token: int | None, states: list[_State]) -> tuple[float, float]:
        """Mass of a next token: settled, and at most, if some states become it."""
        if token is None:
            settled = highest = self._end
        else:
            settled = self._settled[token].item()
            highest = settled + self._by_table[token].item()
            content = self.covering.expert.bytes[token]
            if content:
                others = self.covering.comparable(content)
                highest = settled + self._by_table[others].sum().item()
        return settled, highest + sum(state.mass for state in states if self._comparable(state, token))

    @property
    def is_read(self) -> bool:
        """Whether a text that begins with q was found at all."""
        return self._everything() > 0

    def estimate(self, tokens: list[int | None]) -> list[float]:
        """pi_A^E of expert tokens, `None` for the end of the answer, as if every open text ended where it is."""
        everything = self._everything()
        masses: defaultdict[int | None, float] = defaultdict(float, {None: self._end})
        for state in (*self._states, *self._untried):
            masses[state.token] += state.mass
        for token in tokens:
            if token is not None:
                masses[token] += (self._settled[token] + self._by_table[token]).item()
        return [masses[token] / everything if everything else 0.0 for token in tokens]

    def bounds(self, tokens: list[int | None], width: float = 0.0) -> Bounds:
        """
        pi_A^E of expert tokens, `None` for the end of the answer, each with its interval: as narrow as can be, or at
        most `width` nats wide.
        """
        while True:
            bounds = self._bounds(tokens)
            if not self._untried or width and max(map(log_width, bounds.low, bounds.high)) <= width:
                return bounds
            # Those that have half of the mass, or all
            states = sorted(self._untried, key=lambda state: -state.mass)
            masses = list(accumulate(state.mass for state in states))
            self._try(states[: bisect_right(masses, masses[-1] / 2) + 1 if width else len(states)])

    def _bounds(self, tokens: list[int | None]) -> Bounds:
        states = [*self._states, *self._untried]
        # Of P[... begins with q]: what is certain, and what is not
        alive = self._settled.sum().item() + self._by_table.sum().item() + self._end
        alive += sum(state.mass for state in states if not state.lost)
        at_risk = sum(state.mass for state in states if state.lost)
        bounds = Bounds(self.estimate(tokens))
        for token in tokens:
            settled, highest = self._range(token, states)
            of_risk = sum(state.mass for state in states if state.lost and self._comparable(state, token))
            bounds.low.append(settled / (alive + at_risk) if alive + at_risk else 0.0)
            bounds.high.append(min(1.0, highest / (alive + of_risk)) if alive + of_risk else 1.0)
        return bounds

    def distribution(self) -> torch.Tensor:
        """The estimate over all expert tokens and, last, the end of the answer: `(W + 1,)`, which sums to 1."""
        masses = self._settled + self._by_table
        for state in (*self._states, *self._untried):
            if state.token >= 0:
                masses[state.token] += state.mass
        masses = torch.cat([masses, torch.tensor([self._end], dtype=torch.float64)])
        return masses / masses.sum()


def _most_probable(probs: torch.Tensor) -> tuple[list[int], list[float], float]:
    """Places and probabilities of the tokens to look at, and what the others have together."""
    top = probs.topk(min(_MOST_TOKENS, len(probs)))
    likely, rest = top.values.tolist(), probs.sum().item()
    for count, prob in enumerate(likely):
        if rest <= _REST:
            return top.indices[:count].tolist(), likely[:count], max(rest, 0.0)
        rest -= prob
    return top.indices.tolist(), likely, max(rest, 0.0) if len(likely) < len(probs) else 0.0


def _next_token(tail: tuple[int, ...], ids: list[int] | None) -> int:
    if ids is None or tuple(ids[: len(tail)]) != tail:
        return _LOST
    return ids[len(tail)] if len(ids) > len(tail) else _OPEN


def log_width(low: float, high: float) -> float:
    """Width of an interval in nats."""
    return math.log(high / low) if low > 0 else math.inf
