"""One step of an expert's completion as an amateur with other tokens reads it: [`Covering`]'s states, with intervals.

No models here: `CoveredStep.wanted` says at which contexts the amateur must be read, `CoveredStep.open` takes what it
says there.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from .covering import LOST, NO_TEXT, OPEN, Covering, Start


# A state is opened if it has this share of a candidate that the label needs, or of everything
_OPEN_OF_CANDIDATE, _OPEN_OF_ALL = 1e-3, 2e-2
# Amateur tokens of one context that are looked at in context, unless the others have less than this together
_MOST_TOKENS, _REST = 256, 1e-4
# Contexts that a step can open
_MOST_CONTEXTS = 48


@dataclass
class _State:
    mass: float
    context: tuple[int, ...] | None  # amateur tokens, or `None` if it cannot be opened
    missing: bytes = b""  # of q
    beyond: bytes = b""  # behind q
    token: int = OPEN  # the expert's next, if the text ends here
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


def covered_steps(covering: Covering, completion_ids: list[int], num_steps: int) -> list["CoveredStep | None"]:
    """The first steps of a completion; `None` where [`Covering.starts`] has none."""
    starts = covering.starts(completion_ids, num_steps)
    return [None if start is None else CoveredStep(covering, start) for start in starts]


class CoveredStep:
    """
    One step: a distribution over the expert's next tokens, as far as the amateur has been read.

    Args:
        covering ([`Covering`]): The two tokenizers.
        start ([`Start`]): Where the step starts.

    Attributes:
        needed (`list[int | None]`): Expert tokens that are to be known exactly; `None` is the end of the answer.
    """

    def __init__(self, covering: Covering, start: Start):
        self.covering, self.tail = covering, start.tail
        self.needed: list[int | None] = []
        width = len(covering.expert.bytes)
        self._settled = torch.zeros(width, dtype=torch.float64)
        self._by_table = torch.zeros(width, dtype=torch.float64)
        self._end = 0.0
        self._states = [_State(1.0, start.context, start.missing)]
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
        if end == OPEN:
            self._end += at_end
        elif end != LOST:
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
            if token == NO_TEXT:
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
            elif state.token != LOST:
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


def log_width(low: float, high: float) -> float:
    """Width of an interval in nats."""
    return math.log(high / low) if low > 0 else math.inf
