"""Reads one step of an expert's completion with an amateur that has other tokens: the states of a [`Covering`].

No model is used here. `CoveredStep.wanted` returns the contexts at which the amateur must be read, and `open_contexts`
takes its distributions there, for many steps together.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from .covering import Covering, Start
from .next_tokens import LOST, NO_TEXT, OPEN
from .token_lookup import Reply, Request, Table, look_up


# A state is opened if it has this share of the probability of a needed token, or of everything
_OPEN_OF_CANDIDATE, _OPEN_OF_ALL = 1e-3, 2e-2
# Tokens that are not followed can together have this share of the least probable needed token that they could become
_REST = 1e-4
# Contexts that a step can open
_MOST_CONTEXTS = 48


@dataclass(slots=True, eq=False)
class _State:
    mass: float
    context: tuple[int, ...] | None  # the amateur's tokens after u, or `None` if it cannot be opened
    near: tuple[int | None, ...]  # the needed tokens that can still become the next token
    missing: bytes = b""  # the bytes of q that are still to come
    beyond: bytes = b""  # the bytes after q
    token: int = OPEN  # the expert's next token if the text ends here
    lost: bool = True  # whether further text can change the tokens of q


@dataclass
class Bounds:
    """
    pi_A^E of some expert tokens.

    Attributes:
        estimate (`list[float]`): The estimate, as if every open text ended where it is.
        low, high (`list[float]`): Where the true value lies.
    """

    estimate: list[float]
    low: list[float]
    high: list[float]


class CoveredStep:
    """
    The distribution over the expert's next tokens at one step, as far as the amateur has been read.

    Args:
        covering ([`Covering`]): The two tokenizers.
        start ([`Start`]): Where the step starts.
        needed (`list[int | None]`): Expert tokens that need a narrow interval. `None` is the end of the answer.
        asked (`list[int | None]`): Expert tokens that need an estimate, including those in `needed`.
    """

    def __init__(self, covering: Covering, start: Start, needed: list[int | None], asked: list[int | None]):
        self.covering, self.needed = covering, needed
        self._edge, self._start = covering.next_tokens.edge(start.tail), start.context
        self._settled: defaultdict[int | None, float] = defaultdict(float)  # the end of the answer among them
        # Sums of the table: over everything, of tokens in `asked`, and over what can become a token in `needed`
        self._by_table = 0.0
        self._asked_by_table = {token: 0.0 for token in asked if token is not None}
        self._near_by_table = {token: 0.0 for token in needed if token is not None}
        # Contexts of the amateur's own tokens up to the step. Their probability says which others are likely
        self._path = [start.path[:count] for count in range(len(start.path) + 1)]
        # Unsettled states: those that can be opened, by context, and the others
        self._states: dict[tuple[int, ...], _State] = {(): _State(1.0, (), tuple(needed), start.missing)}
        self._closed: list[_State] = []
        # States not yet known to be settled
        self._untried: list[_State] = []
        self.num_opened = 0
        self._is_done = False
        # What the states were last compared with
        self._likely, self._highest_now = 0.0, dict.fromkeys(needed, 0.0)

    def wanted(self) -> list[tuple[int, ...]]:
        """
        Contexts at which the amateur must be read, as its tokens of the completion; none once the intervals cannot
        become narrower.
        """
        if self._is_done:
            return []
        if on_path := [context for context in self._path if context in self._states]:
            return [(*self._start, *context) for context in on_path]
        self._likely, self._highest_now = _OPEN_OF_ALL * self._everything(), self._highest()
        self._try([state for state in self._untried if self._is_likely(state)])
        wanted = [state for state in self._states.values() if self._is_likely(state) and self._matters(state)]
        wanted.sort(key=lambda state: -state.mass)
        wanted = wanted[: _MOST_CONTEXTS - self.num_opened]
        self._is_done = not wanted
        return [(*self._start, *(state.context or ())) for state in wanted]

    def _is_likely(self, state: _State) -> bool:
        highest = self._highest_now
        return state.mass >= self._likely or any(
            state.mass >= _OPEN_OF_CANDIDATE * highest[token] for token in state.near
        )

    def _matters(self, state: _State) -> bool:
        """Whether what follows a state can change an estimate or an interval."""
        return state.lost or bool(state.near) or any(self._comparable(state.beyond, t) for t in self._asked_by_table)

    def start_opening(self, context: tuple[int, ...], row: int) -> tuple[_State, Request]:
        """
        Remove the state of a context, to be replaced by those that follow it.

        Args:
            context (`tuple[int, ...]`): One of [`~CoveredStep.wanted`].
            row (`int`): Its row among the distributions that are looked up together.

        Returns:
            `tuple[_State, Request]`: The state, and what [`~CoveredStep.open`] needs to know.
        """
        state = self._states.pop(context[len(self._start) :])
        self.num_opened += 1
        return state, self._request(state, row)

    def _request(self, state: _State, row: int) -> Request:
        covering, missing = self.covering, state.missing
        least = min([self._highest_now[token] for token in state.near], default=self._likely / _OPEN_OF_ALL)
        rest = _REST * max(1.0, least / max(state.mass, 1e-300))
        if missing:
            shorter = [token_id for token_id, _ in self._inside(missing)]
            longer = covering.amateur.starting_with(missing)
            same = len(covering.amateur.ids.get(missing, ()))
            return Request(row, slice(longer.start + same, longer.stop), rest, shorter)
        # A blank then settles the text before it, and the table is right about what begins with it
        is_split = covering.next_tokens.is_split(self._edge, state.beyond)
        if state.beyond:
            return Request(row, None, rest, [], math.inf if is_split else 0.0)
        similar = dict.fromkeys(i for token in self._near_by_table for i in covering.similar(token))
        asked = [covering.expert_places[token] for token in self._asked_by_table]
        near = [covering.starting_with(token) for token in self._near_by_table]
        blank = _OPEN_OF_ALL / 2 if is_split else 0.0
        return Request(row, None, rest, list(similar), blank, Table(asked, near))

    def _inside(self, missing: bytes) -> list[tuple[int, int]]:
        """Amateur tokens that are a prefix of the missing bytes, and their lengths."""
        ids = self.covering.amateur.ids
        return [(token_id, end) for end in range(1, len(missing) + 1) for token_id in ids.get(missing[:end], ())]

    def open(self, state: _State, request: Request, reply: Reply) -> None:
        """Add the states that follow a state, given the result of [`look_up`]."""
        context, mass = state.context or (), state.mass
        if state.missing:
            for (token_id, end), prob in zip(self._inside(state.missing), reply.others, strict=True):
                self._add(_State(mass * prob, (*context, token_id), state.near, state.missing[end:]))
            self._look_at(state, reply.ids, reply.probs, len(state.missing))
            self._add(_State(mass * reply.rest, None, state.near))
            return
        end = self.covering.next_tokens.ends_with(self._edge, state.beyond)
        if end != LOST:
            self._settled[None if end == OPEN else end] += mass * reply.at_end
        if request.table is None:
            if state.token >= 0:
                self._settled[state.token] += mass * reply.blank
            self._look_at(state, reply.ids, reply.probs, 0)
            self._add(replace(state, mass=mass * reply.rest, context=None))
            return
        likely = dict(zip(reply.ids, reply.probs, strict=True))
        likely |= zip(request.others, reply.others, strict=True)
        self._look_at(state, list(likely), list(likely.values()), 0)
        self._by_table += mass * reply.total
        for sums, found in ((self._asked_by_table, reply.tokens), (self._near_by_table, reply.near)):
            for token, prob in zip(sums, found, strict=True):
                sums[token] += mass * prob

    def _look_at(self, state: _State, token_ids: list[int], probs: list[float], skipped: int) -> None:
        """Add the states to which amateur tokens lead, `skipped` bytes of them being part of q."""
        contents, context = self.covering.amateur.bytes, state.context or ()
        beyond = [state.beyond + (contents[i] or b"")[skipped:] for i in token_ids]
        next_tokens = self.covering.next_tokens.after(self._edge, beyond)
        for token_id, prob, text, (token, whole) in zip(token_ids, probs, beyond, next_tokens, strict=True):
            if token == NO_TEXT:
                continue
            # Nothing that follows brings a state nearer to a token
            near = tuple([needed for needed in state.near if self._comparable(text, needed)])
            found = _State(state.mass * prob, (*context, token_id), near, b"", text, token)
            if whole:
                self._untried.append(found)
            else:
                self._add(found)

    def _add(self, state: _State) -> None:
        if state.context is None:
            self._closed.append(state)
        else:
            self._states[state.context] = state

    def _try(self, states: list[_State]) -> None:
        """Determine which of some untried states are settled."""
        if not states:
            return
        tried = set(map(id, states))
        self._untried = [state for state in self._untried if id(state) not in tried]
        finality = self.covering.next_tokens.finality(self._edge, [state.beyond for state in states])
        for state, (open_, lost) in zip(states, finality, strict=True):
            state.lost = lost
            if open_:
                self._add(state)
            elif state.token != LOST:
                self._settled[state.token] += state.mass

    def _comparable(self, beyond: bytes, token: int | None) -> bool:
        """Whether a text after q can begin with an expert token, or become one that does."""
        if not beyond:
            return True
        if token is None:
            return False
        content = self.covering.expert.bytes[token] or b""
        return beyond.startswith(content) or content.startswith(beyond)

    def _unsettled(self) -> list[_State]:
        return [*self._states.values(), *self._closed, *self._untried]

    def _everything(self) -> float:
        """The estimate of P[tau_E(b(Y)) begins with q]."""
        unsettled = sum([state.mass for state in self._unsettled() if state.token >= 0])
        return sum(self._settled.values()) + self._by_table + unsettled

    def _highest(self) -> dict[int | None, float]:
        """The probability of each needed token if every state that can become it does."""
        near = self._near_by_table
        highest = {t: self._settled[t] + (0.0 if t is None else near[t]) for t in self.needed}
        for state in self._unsettled():
            for token in state.near:
                highest[token] += state.mass
        return highest

    @property
    def is_read(self) -> bool:
        """Whether any text that begins with q was found."""
        return self._everything() > 0

    def estimate(self, tokens: list[int | None]) -> list[float]:
        """pi_A^E of some tokens in `asked`, as if every open text ended where it is."""
        everything = self._everything()
        masses = self._settled.copy()
        for state in self._unsettled():
            masses[state.token] += state.mass
        for token in tokens:
            masses[token] += 0.0 if token is None else self._asked_by_table[token]
        return [masses[token] / everything if everything else 0.0 for token in tokens]

    def bounds(self, tokens: list[int | None], width: float = 0.0) -> Bounds:
        """
        pi_A^E of some tokens in `needed` with intervals, at most `width` nats wide if possible, or as narrow as
        possible if it is 0.
        """
        if width and self._least_width(tokens) > width:
            return Bounds(self.estimate(tokens), *self._intervals(tokens))
        while True:
            low, high = self._intervals(tokens)
            if not self._untried or width and max(map(log_width, low, high)) <= width:
                return Bounds(self.estimate(tokens), low, high)
            # Those with half of the probability, or all
            states = sorted(self._untried, key=lambda state: -state.mass)
            masses = list(accumulate([state.mass for state in states]))
            self._try(states[: bisect_right(masses, masses[-1] / 2) + 1 if width else len(states)])

    def _least_width(self, tokens: list[int | None]) -> float:
        """Nats below which no trial can bring every interval: as if each untried state turned out to be settled."""
        most = {token: self._settled[token] for token in self.needed}
        for state in self._untried:
            for token in state.near:
                most[token] += state.mass
        highest = self._highest()
        return max(log_width(most[token], highest[token]) for token in tokens)

    def _intervals(self, tokens: list[int | None]) -> tuple[list[float], list[float]]:
        # The certain and the uncertain part of P[... begins with q], and what of this can become a token
        alive, at_risk = sum(self._settled.values()) + self._by_table, 0.0
        of_risk = dict.fromkeys(self.needed, 0.0)
        for state in self._unsettled():
            if not state.lost:
                alive += state.mass
                continue
            at_risk += state.mass
            for token in state.near:
                of_risk[token] += state.mass
        highest, certain = self._highest(), [alive + of_risk[token] for token in tokens]
        low = [self._settled[token] / (alive + at_risk) if alive + at_risk else 0.0 for token in tokens]
        high = [min(1.0, highest[token] / most) if most else 1.0 for token, most in zip(tokens, certain, strict=True)]
        return low, high


def open_contexts(
    covering: Covering, openings: list[tuple[CoveredStep, tuple[int, ...], int]], probs: torch.Tensor
) -> None:
    """
    Open contexts of some steps, with one lookup for all of them.

    Args:
        covering ([`Covering`]): The two tokenizers.
        openings (`list[tuple[CoveredStep, tuple[int, ...], int]]`): A step, one of [`CoveredStep.wanted`], and the row
            of the distribution there.
        probs (`torch.Tensor` of shape `(N, W)`, fp64): The amateur's next token. Modified in place.
    """
    found = [(step, *step.start_opening(context, row)) for step, context, row in openings]
    replies = look_up(covering, probs, [request for _, _, request in found])
    for (step, state, request), reply in zip(found, replies, strict=True):
        step.open(state, request, reply)


def log_width(low: float, high: float) -> float:
    """Width of an interval in nats."""
    return math.log(high / low) if low > 0 else math.inf
