"""Reads one step of an expert's completion with an amateur that has other tokens: the states of a [`Covering`].

No model is used here. `CoveredStep.wanted` returns the contexts at which the amateur must be read, and `open_contexts`
takes its distributions there, for many steps together.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from .covering import Covering, Start
from .next_tokens import LOST, NO_TEXT, OPEN
from .token_lookup import Reply, Request, Table, look_up


_NONE = np.empty(0, np.int64)


class Pruning(NamedTuple):
    """
    What a step leaves out.

    Attributes:
        of_candidate, of_all (`float`): A state is opened if it has this share of the probability of a needed token, or
            of everything.
        rest (`float`): Tokens that are not followed can together have this share of the least probable needed token
            that they could become.
        blank (`float`): Where a blank splits the text, a token that begins with one is followed if it has this
            probability. The others are summed.
        most_contexts (`int`): Contexts that a step can open.
    """

    of_candidate: float
    of_all: float
    rest: float
    blank: float
    most_contexts: int


USUAL = Pruning(1e-3, 2e-2, 1e-4, 1e-2, 48)
# For the few steps that would be kept if their intervals were narrower. When the amateur's own tokens of q are opened,
# it is not yet known how probable q is, so `rest` is a share of 1; q can have less than 1e-5
FINE = Pruning(1e-4, 2e-2, 1e-12, 0.0, 96)


@dataclass(slots=True, eq=False)
class _Source:
    """A context that is opened, and its state before."""

    mass: float
    context: tuple[int, ...]  # the amateur's tokens after u
    near: np.ndarray  # which of the needed tokens can still become the next token
    missing: bytes = b""  # the bytes of q that are still to come
    beyond: bytes = b""  # the bytes after q
    token: int = OPEN  # the expert's next token if the text ends here
    lost: bool = True  # whether further text can change the tokens of q


class _States(NamedTuple):
    """
    Columns of S states, most of which are never opened. A state that is settled or opened has no mass any more.

    Attributes:
        source (`np.ndarray`): Index of the context that led to it.
        ids (`np.ndarray`): The amateur's token that led to it, or -1 if it cannot be opened.
        mass (`np.ndarray`): Its probability.
        tokens (`np.ndarray`): The expert's next token if the text ends there.
        lost (`np.ndarray`): Whether further text can change the tokens of q.
        tried (`np.ndarray`): Whether it is known to be unsettled.
        near (`np.ndarray` of shape `(S, needed)`): Which needed tokens can still become the next token.
    """

    source: np.ndarray
    ids: np.ndarray
    mass: np.ndarray
    tokens: np.ndarray
    lost: np.ndarray
    tried: np.ndarray
    near: np.ndarray


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
        pruning ([`Pruning`]): What is left out.
    """

    def __init__(
        self,
        covering: Covering,
        start: Start,
        needed: list[int | None],
        asked: list[int | None],
        pruning: Pruning = USUAL,
    ):
        self.covering, self.needed, self.pruning = covering, needed, pruning
        self._edge, self._start = covering.next_tokens.edge(start.tail), start.context
        self._settled: defaultdict[int | None, float] = defaultdict(float)  # the end of the answer among them
        # Sums of the table: over everything, of tokens in `asked`, and over what can become a token in `needed`
        self._by_table = 0.0
        self._asked_by_table = {token: 0.0 for token in asked if token is not None}
        self._near_by_table = np.zeros(len(needed))
        self._is_text = np.array([token is not None for token in needed], dtype=bool)
        everything = np.ones(len(needed), dtype=bool)
        # Contexts of the amateur's own tokens up to the step. Their probability says which others are likely
        ends = [0, *accumulate(len(covering.amateur.bytes[token_id] or b"") for token_id in start.path)]
        self._path = [_Source(1.0, start.path[:k], everything, start.missing[end:]) for k, end in enumerate(ends)]
        self._sources: list[_Source] = []
        self._opening = {source.context: source for source in self._path}
        self._opened: list[tuple[_Source, Request, Reply]] = []
        self._found: list[_States] = []
        one, true = np.zeros(1, np.int64), np.ones(1, dtype=bool)
        self._states = _States(one, one - 1, np.ones(1), one + OPEN, true, true, everything[None])
        self.num_opened = 0
        self._is_done = False
        # What the states were last compared with
        self._likely, self._highest_now = 0.0, np.zeros(len(needed))

    def wanted(self) -> list[tuple[int, ...]]:
        """
        Contexts at which the amateur must be read, as its tokens of the completion; none once the intervals cannot
        become narrower.
        """
        if self._is_done:
            return []
        if self._path and not self._opened:
            return [(*self._start, *context) for context in self._opening]
        self._absorb()
        states = self._states
        self._likely, self._highest_now = self.pruning.of_all * self._everything(), self._highest()
        likely = states.mass >= self._likely
        likely |= (states.near & (states.mass[:, None] >= self.pruning.of_candidate * self._highest_now)).any(1)
        likely &= states.ids >= 0
        self._try(np.flatnonzero(likely & ~states.tried))
        rows = [row for row in np.flatnonzero(likely & (states.ids >= 0)).tolist() if self._matters(row)]
        rows.sort(key=lambda row: -states.mass[row])
        rows = rows[: max(0, self.pruning.most_contexts - self.num_opened)]
        self._is_done = not rows
        for row in rows:
            source = self._as_source(row)
            self._opening[source.context] = source
        self._remove(rows)
        return [(*self._start, *context) for context in self._opening]

    def _as_source(self, row: int) -> _Source:
        states = self._states
        source, token_id = self._sources[states.source[row]], states.ids[row].item()
        content, before = self.covering.amateur.bytes[token_id] or b"", len(source.missing)
        return _Source(
            states.mass[row].item(),
            (*source.context, token_id),
            states.near[row].copy(),
            source.missing[len(content) :],
            source.beyond + content[before:],
            states.tokens[row].item(),
            states.lost[row].item(),
        )

    def _beyond(self, row: int) -> bytes:
        source = self._sources[self._states.source[row]]
        content = self.covering.amateur.bytes[self._states.ids[row]] or b""
        return source.beyond + content[len(source.missing) :]

    def _matters(self, row: int) -> bool:
        """Whether what follows a state can change an estimate or an interval."""
        if self._states.lost[row] or self._states.near[row].any():
            return True
        beyond, contents = self._beyond(row), self.covering.expert.bytes
        return any(_comparable(beyond, contents[token] or b"") for token in self._asked_by_table)

    def _remove(self, rows: list[int]) -> None:
        self._states.mass[rows] = 0.0
        self._states.ids[rows] = -1
        self._states.tried[rows] = True

    def start_opening(self, context: tuple[int, ...], row: int) -> tuple[_Source, Request]:
        """
        Begin to open a context.

        Args:
            context (`tuple[int, ...]`): One of [`~CoveredStep.wanted`].
            row (`int`): Its row among the distributions that are looked up together.

        Returns:
            `tuple[_Source, Request]`: Its state, and what [`~CoveredStep.open`] needs to know.
        """
        source = self._opening.pop(context[len(self._start) :])
        self._sources.append(source)
        self.num_opened += 1
        return source, self._request(source, row)

    def _request(self, source: _Source, row: int) -> Request:
        covering, missing = self.covering, source.missing
        least = self._highest_now[source.near].min() if source.near.any() else self._likely / self.pruning.of_all
        rest = self.pruning.rest * max(1.0, least / max(source.mass, 1e-300))
        if missing:
            longer = covering.amateur.starting_with(missing)
            same = len(covering.amateur.ids.get(missing, ()))
            return Request(row, slice(longer.start + same, longer.stop), rest, covering.inside(missing))
        # A blank then settles the text before it, and the table is right about what begins with it
        is_split = covering.next_tokens.is_independent(self._edge.content + source.beyond, b" ")
        if source.beyond:
            return Request(row, None, rest, _NONE, math.inf if is_split else 0.0)
        needed = [token for token in self.needed if token is not None]
        similar = [covering.similar(token) for token in needed]
        others = np.unique(np.concatenate(similar)) if similar else _NONE
        asked = np.array([covering.expert_places[token] for token in self._asked_by_table], np.int64)
        near = [covering.starting_with(token) for token in needed]
        blank = self.pruning.blank if is_split else 0.0
        return Request(row, None, rest, others, blank, Table(asked, near))

    def open(self, opened: list[tuple[_Source, Request, Reply]], found: _States) -> None:
        """Take the results of [`look_up`] for some contexts, and the states to which these lead."""
        self._opened += opened
        self._found.append(found)

    def _absorb(self) -> None:
        """Add the states that follow those that were opened."""
        if self._path:
            self._follow_path()
        masses = np.array([source.mass for source in self._sources])
        found = [each._replace(mass=each.mass * masses[each.source]) for each in self._found]
        self._states = _States(*map(np.concatenate, zip(self._states, *found, strict=True)))
        for source, following in zip(self._path, self._path[1:], strict=False):
            place = next(i for i, each in enumerate(self._sources) if each is source)
            at = (self._states.source == place) & (self._states.ids == following.context[-1])
            self._remove(np.flatnonzero(at).tolist())
        for source, request, reply in self._opened:
            if source.missing:
                continue
            end = self.covering.next_tokens.ends_with(self._edge, source.beyond)
            if end != LOST:
                self._settled[None if end == OPEN else end] += source.mass * reply.at_end
            if request.table is None:
                if source.token >= 0:
                    self._settled[source.token] += source.mass * reply.blank
                continue
            self._by_table += source.mass * reply.total
            for token, prob in zip(self._asked_by_table, reply.tokens.tolist(), strict=True):
                self._asked_by_table[token] += source.mass * prob
            self._near_by_table[self._is_text] += source.mass * reply.near
        self._path, self._opened, self._found = [], [], []

    def _follow_path(self) -> None:
        """The probability of each context on the path, and nothing else in the place of the state before."""
        opened = {source.context: (request, reply) for source, request, reply in self._opened}
        for source, following in zip(self._path, self._path[1:], strict=False):
            request, reply = opened[source.context]
            following.mass = source.mass * reply.others[request.others == following.context[-1]].item()
        self._states = _States(*(column[:0] for column in self._states))

    def _try(self, rows: Iterable[int]) -> None:
        """Determine which of some untried states are settled."""
        rows = list(map(int, rows))
        if not rows:
            return
        finality = self.covering.next_tokens.finality(self._edge, list(map(self._beyond, rows)))
        states, settled = self._states, []
        for row, (open_, lost) in zip(rows, finality, strict=True):
            states.lost[row] = lost
            if not open_:
                settled.append(row)
                if (token := states.tokens[row].item()) != LOST:
                    self._settled[token] += states.mass[row].item()
        states.tried[rows] = True
        self._remove(settled)

    def _everything(self) -> float:
        """The estimate of P[tau_E(b(Y)) begins with q]."""
        unsettled = self._states.mass @ (self._states.tokens >= 0)
        return sum(self._settled.values()) + self._by_table + unsettled.item()

    def _highest(self) -> np.ndarray:
        """The probability of each needed token if every state that can become it does."""
        settled = np.array([self._settled.get(token, 0.0) for token in self.needed])
        return settled + self._near_by_table + self._states.mass @ self._states.near

    @property
    def is_read(self) -> bool:
        """Whether any text that begins with q was found."""
        return self._everything() > 0

    def estimate(self, tokens: list[int | None]) -> list[float]:
        """pi_A^E of some tokens in `asked`, as if every open text ended where it is."""
        everything = self._everything()
        if not everything:
            return [0.0] * len(tokens)
        # No text that goes on ends the answer
        columns = np.array([NO_TEXT if token is None else token for token in tokens])
        masses = self._states.mass @ (self._states.tokens[:, None] == columns)
        masses += [
            self._settled.get(token, 0.0) + (0.0 if token is None else self._asked_by_table[token]) for token in tokens
        ]
        return (masses / everything).tolist()

    def bounds(self, tokens: list[int | None], width: float = 0.0) -> Bounds:
        """
        pi_A^E of some tokens in `needed` with intervals, at most `width` nats wide if possible, or as narrow as
        possible if it is 0.
        """
        if width and self._least_width(tokens) > width:
            return Bounds(self.estimate(tokens), *self._intervals(tokens))
        while True:
            low, high = self._intervals(tokens)
            untried = np.flatnonzero(~self._states.tried)
            if not len(untried) or width and max(map(log_width, low, high)) <= width:
                return Bounds(self.estimate(tokens), low, high)
            # Those with half of the probability, or all
            untried = untried[np.argsort(-self._states.mass[untried], kind="stable")]
            masses = self._states.mass[untried].cumsum()
            half = np.searchsorted(masses, masses[-1] / 2, side="right").item() + 1
            self._try(untried[: half if width else len(untried)])

    def _least_width(self, tokens: list[int | None]) -> float:
        """Nats below which no trial can bring every interval: as if each untried state turned out to be settled."""
        untried = self._states.mass * ~self._states.tried @ self._states.near
        highest = self._highest()
        places = [(token, self.needed.index(token)) for token in tokens]
        return max(log_width(self._settled.get(token, 0.0) + untried[k], highest[k]) for token, k in places)

    def _intervals(self, tokens: list[int | None]) -> tuple[list[float], list[float]]:
        # The certain and the uncertain part of P[... begins with q], and what of this can become a token
        at_risk = self._states.mass * self._states.lost
        risk = at_risk.sum().item()
        alive = sum(self._settled.values()) + self._by_table + self._states.mass.sum().item() - risk
        places = [self.needed.index(token) for token in tokens]
        highest, certain = self._highest()[places], alive + (at_risk @ self._states.near)[places]
        low = [self._settled.get(token, 0.0) / (alive + risk) if alive + risk else 0.0 for token in tokens]
        high = [min(1.0, a / b) if b else 1.0 for a, b in zip(highest.tolist(), certain.tolist(), strict=True)]
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
    of_step: dict[CoveredStep, list[tuple[_Source, Request]]] = {}
    for step, context, row in openings:
        of_step.setdefault(step, []).append(step.start_opening(context, row))
    found = [(step, *each) for step, pairs in of_step.items() for each in pairs]
    replies = look_up(covering, probs, [request for _, _, request in found])
    opened = [(step, source, request, reply) for (step, source, request), reply in zip(found, replies, strict=True)]
    states, ends = _states_after(covering, opened)
    first = 0
    for step, pairs in of_step.items():
        last = first + len(pairs)
        rows = slice(ends[first], ends[last])
        own = _States(*(column[rows] for column in states))
        step.open([each[1:] for each in opened[first:last]], own._replace(near=own.near[:, : len(step.needed)]))
        first = last


def _states_after(
    covering: Covering, opened: list[tuple[CoveredStep, _Source, Request, Reply]]
) -> tuple[_States, list[int]]:
    """
    The states to which some contexts lead, where each one's begin in the columns, and their number. `mass` is that
    after the context. They are the tokens within q, then those that reach beyond it, then all others together.
    """
    following = covering.following
    if following.is_full:
        following.forget()
    ids, masses, counts, places = [], [], [], []
    for step, source, request, reply in opened:
        within, beyond, probs, rest = _NONE, reply.ids, reply.probs, [reply.rest]
        if source.missing:
            within = request.others
            masses.append(reply.others)
        elif request.table is not None:
            new = ~np.isin(request.others, beyond)
            beyond = np.concatenate([beyond, request.others[new]])
            probs, rest = np.concatenate([probs, reply.others[new]]), []
        ids += [within, beyond, np.full(len(rest), -1)]
        masses += [probs, np.array(rest)]
        counts.append((len(within), len(beyond), len(rest)))
        places.append(following.place(step._edge, source.beyond, len(source.missing)))
    sizes = np.array(counts)
    ends = [0, *accumulate(sizes.sum(1).tolist())]
    kind = np.repeat(np.tile([0, 1, 2], len(opened)), sizes.ravel())
    opening = np.repeat(np.arange(len(opened)), sizes.sum(1))
    token_ids, is_beyond, is_rest = np.concatenate(ids), kind == 1, kind == 2
    sources = np.array([step._sources.index(source) for step, source, *_ in opened])
    tokens = np.where(is_rest, np.array([source.token for _, source, *_ in opened])[opening], OPEN)
    lost = np.where(is_rest, np.array([source.lost for _, source, *_ in opened])[opening], True)
    tokens[is_beyond], whole = following(np.array(places)[opening[is_beyond]], token_ids[is_beyond])
    tried = np.ones(len(kind), dtype=bool)
    tried[is_beyond] = ~whole
    mass = np.concatenate(masses)
    no_text = tokens == NO_TEXT
    mass[no_text], token_ids[no_text], tried[no_text] = 0.0, -1, True
    near = _near(covering, opened, opening, is_beyond, token_ids)
    return _States(sources[opening], token_ids, mass, tokens, lost, tried, near), ends


def _near(
    covering: Covering,
    opened: list[tuple[CoveredStep, _Source, Request, Reply]],
    opening: np.ndarray,
    is_beyond: np.ndarray,
    token_ids: np.ndarray,
) -> np.ndarray:
    """Which needed tokens can become the next token in each state, `(S, most needed)`."""
    most = max(len(step.needed) for step, *_ in opened)
    of_source = np.zeros((len(opened), most), dtype=bool)
    pairs: list[tuple[int, int, int, int, list[int]]] = []
    for i, (step, source, *_) in enumerate(opened):
        of_source[i, : len(source.near)] = source.near
        for k in np.flatnonzero(source.near).tolist():
            token = step.needed[k]
            if token is None:
                continue
            content = covering.expert.bytes[token] or b""
            # Nothing that follows brings a state nearer to a token
            if source.beyond and source.beyond.startswith(content):
                pairs.append((i, k, 0, len(covering.places), []))
            elif content.startswith(source.beyond):
                pairs.append((i, k, *covering.reach(source.missing + content[len(source.beyond) :])))
    near = of_source[opening]
    near[is_beyond] = False
    if not pairs:
        return near
    rows = np.flatnonzero(is_beyond)
    bounds = np.searchsorted(opening[rows], np.arange(len(opened) + 1))
    of, column, first, end = np.array([pair[:4] for pair in pairs]).T
    counts = np.diff(bounds)[of]
    pair = np.repeat(np.arange(len(pairs)), counts)
    at = rows[np.arange(len(pair)) + np.repeat(bounds[of] - counts.cumsum() + counts, counts)]
    places = covering.places[token_ids[at]]
    comparable = (places >= first[pair]) & (places < end[pair])
    for shorter in range(max(len(each[4]) for each in pairs)):
        of_pair = np.array([each[4][shorter] if shorter < len(each[4]) else -1 for each in pairs])
        comparable |= places == of_pair[pair]
    near[at, column[pair]] = comparable
    return near


def _comparable(beyond: bytes, content: bytes) -> bool:
    """Whether a text after q can begin with an expert token, or become one that does."""
    return beyond.startswith(content) or content.startswith(beyond)


def log_width(low: float, high: float) -> float:
    """Width of an interval in nats."""
    return math.log(high / low) if low > 0 else math.inf
