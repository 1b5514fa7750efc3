"""[`~trl_lightreasoner.sampling.scoring.score_trajectories`] for an amateur with other tokens: one pass over its own
tokens of a completion, and batches of the further contexts that the covering asks for. Steps that would be kept but
are too uncertain are read twice."""

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import NamedTuple

import torch

from ..contrast import NonFiniteLogitsError, contrastive_label, step_divergence
from ..models.weights import get_base_model
from ..vocabulary import Vocabulary
from .branches import BranchedRows
from .covered_step import FINE, USUAL, CoveredStep, Pruning, log_width, open_contexts
from .covering import Covering, Start
from .scoring import PART_LOGITS, LogitsAtSteps, Trajectory, TrajectoryScores, as_batch, group_by_length


# The expert's most probable tokens that the divergence tells apart; the rest is one event
TOP_TOKENS = 40
# Nats that log pi_A of a token in the mask can be uncertain by, gamma times, as it counts in the label
MAX_WIDTH = 0.1
# In place of a probability that is 0 as far as is known, so that no divergence is infinite
_FLOOR = 1e-12
# Probabilities of the amateur, in fp64, that exist together: few for a CPU's memory, and 256 MiB on a GPU, where each
# transfer is waited for and several processes can share the memory
_PART_PROBS, _PART_PROBS_ON_DEVICE = 2**23, 2**25

# A row, and the amateur's tokens of its completion
_Context = tuple[int, tuple[int, ...]]


class _ExpertStep(NamedTuple):
    """The expert's most probable tokens, `None` for the end of the answer, and which of them are plausible."""

    ids: list[int]
    tokens: list[int | None]
    log_probs: list[float]
    plausible: list[bool]


class _Compared(NamedTuple):
    """
    What the amateur says of an `_ExpertStep`: its log-probabilities, the divergence, and how uncertain it is of the
    plausible tokens, which is 0 if the step cannot be kept.
    """

    log_probs: torch.Tensor
    divergence: float
    width: float


class CrossScoring:
    """
    Scores an expert's trajectories against an amateur with a different tokenizer.

    Args:
        covering ([`Covering`]): The two tokenizers.
        vocabulary ([`Vocabulary`]): The expert's tokens.
        amateur_vocabulary ([`Vocabulary`]): The amateur's.
        eos_ids (`list[int]`): Tokens that end the expert's answer. Together they are one event, which is the end of
            the amateur's answer.
        max_length (`int`, *optional*): Maximum number of tokens that the amateur reads.

    Attributes:
        dropped (`Counter[str]`): Steps that could not be kept, by reason.
    """

    def __init__(
        self,
        covering: Covering,
        vocabulary: Vocabulary,
        amateur_vocabulary: Vocabulary,
        eos_ids: list[int],
        max_length: int | None = None,
    ):
        self.covering, self.vocabulary, self.amateur_vocabulary = covering, vocabulary, amateur_vocabulary
        self.eos_ids, self.max_length = set(eos_ids), max_length
        self.dropped: Counter[str] = Counter()

    @torch.no_grad()
    def __call__(
        self,
        expert: torch.nn.Module,
        amateur: torch.nn.Module,
        trajectories: list[Trajectory],
        amateur_prompts: list[list[int]],
        alpha: float,
        beta: float,
        include_first_step: bool = True,
        names: list[str] | None = None,
        expert_hidden_states: list[torch.Tensor] | None = None,
        contrast_strength: float = 1.0,
        expert_anchor: float = 0.0,
        as_amateur: Callable[[], AbstractContextManager] = nullcontext,
        as_expert: Callable[[], AbstractContextManager] = nullcontext,
    ) -> list[TrajectoryScores]:
        """
        Args:
            expert, amateur, trajectories, alpha, beta, include_first_step, names, expert_hidden_states,
            contrast_strength, expert_anchor, as_amateur, as_expert: As of [`score_trajectories`].
            amateur_prompts (`list[list[int]]`): Each prompt in the amateur's form.
        """
        self._as_amateur, self._as_expert = as_amateur, as_expert
        names = names or [f"trajectory {i}" for i in range(len(trajectories))]
        width = get_base_model(amateur).config.get_text_config().vocab_size
        experts = self._read_expert(expert, trajectories, alpha, names, expert_hidden_states)
        # log pi_A counts gamma times in the label
        most_width = MAX_WIDTH / contrast_strength if contrast_strength else math.inf
        scores: dict[int, TrajectoryScores] = {}
        for group in _groups([len(each.completion_ids) for each in trajectories], width):
            least = [[beta] * len(experts[i]) for i in group]
            if not include_first_step:
                least = [[math.inf, *each[1:]] for each in least]
            compared = self._compare(
                amateur,
                [trajectories[i].completion_ids for i in group],
                [amateur_prompts[i] for i in group],
                [experts[i] for i in group],
                [names[i] for i in group],
                least,
                most_width,
            )
            for place, i in enumerate(group):
                scores[i] = self._score(
                    compared[place], experts[i], least[place], most_width, contrast_strength, expert_anchor
                )
        return [scores[i] for i in range(len(trajectories))]

    def _read_expert(
        self,
        expert: torch.nn.Module,
        trajectories: list[Trajectory],
        alpha: float,
        names: list[str],
        hidden_states: list[torch.Tensor] | None,
    ) -> list[list[_ExpertStep]]:
        read: dict[int, list[_ExpertStep]] = {}
        for group in group_by_length(trajectories):
            known = None if hidden_states is None else torch.cat([hidden_states[i] for i in group])
            logits_at = LogitsAtSteps(expert, *as_batch([trajectories[i] for i in group]), known, self._as_expert)
            for place, i in enumerate(group):
                logits = self.vocabulary.select(logits_at(slice(place, place + 1)))
                _check_finite(logits, names[i])
                read[i] = self._top(logits.float(), alpha)
        return [read[i] for i in range(len(trajectories))]

    def _top(self, logits: torch.Tensor, alpha: float) -> list[_ExpertStep]:
        edge = logits.amax(-1, keepdim=True) + math.log(alpha)
        count = max(int((logits >= edge).sum(-1).max().item()), min(TOP_TOKENS, logits.shape[-1]))
        top = logits.topk(count)
        log_probs = (top.values - logits.logsumexp(-1, keepdim=True)).tolist()
        plausible = (top.values >= edge).tolist()
        steps = []
        for ids, logps, mask in zip(self.vocabulary.ids_of(top.indices).tolist(), log_probs, plausible, strict=True):
            # Of several tokens that end an answer the most probable one is the amateur's end
            end = next((token_id for token_id in ids if token_id in self.eos_ids), None)
            kept = [
                place
                for place, token_id in enumerate(ids)
                if mask[place] or place < TOP_TOKENS and (token_id == end or self.covering.expert.bytes[token_id])
            ]
            tokens = [None if ids[place] == end else ids[place] for place in kept]
            steps.append(
                _ExpertStep([ids[k] for k in kept], tokens, [logps[k] for k in kept], [mask[k] for k in kept])
            )
        return steps

    def _compare(
        self,
        amateur: torch.nn.Module,
        completions: list[list[int]],
        prompts: list[list[int]],
        experts: list[list[_ExpertStep]],
        names: list[str],
        least: list[list[float]],
        most_width: float,
    ) -> list[list[_Compared | None]]:
        """
        Read the steps of some completions with the amateur. Those of at least a divergence that are more uncertain
        than `most_width` are read again, with less left out.
        """
        # The amateur's own tokens of each completion; row k of its logits is after the first k of them
        trunks = [self.covering.own_tokens(completion[:-1]) for completion in completions]
        room = [None if self.max_length is None else self.max_length - len(prompt) for prompt in prompts]
        trunks = [trunk if most is None else trunk[: max(0, most)] for trunk, most in zip(trunks, room, strict=True)]
        own = [Trajectory(prompt, [*trunk, 0]) for prompt, trunk in zip(prompts, trunks, strict=True)]
        read = BranchedRows(amateur, own, self._as_amateur)
        starts = [self.covering.starts(completion, len(completion)) for completion in completions]
        compared: list[list[_Compared | None]] = [[None] * len(completion) for completion in completions]
        places = [(row, t) for row, completion in enumerate(completions) for t in range(len(completion))]
        for pruning in (USUAL, FINE):
            steps = {
                (row, t): self._step(starts[row][t], experts[row][t], completions[row][t], pruning)
                for row, t in places
            }
            self._cover(read, trunks, room, names, steps)
            for (row, t), step in steps.items():
                if step is not None and step.is_read:
                    compared[row][t] = _compare_step(step, experts[row][t], least[row][t], most_width)
            places = [
                (row, t) for row, t in places if (each := compared[row][t]) is not None and each.width > most_width
            ]
        return compared

    def _cover(
        self,
        read: BranchedRows,
        trunks: list[list[int]],
        room: list[int | None],
        names: list[str],
        steps: dict[tuple[int, int], CoveredStep | None],
    ) -> None:
        """Open contexts of steps, by row and number, as long as they want any. Those that cannot become `None`."""
        most_probs = _PART_PROBS if read.logits[0].device.type == "cpu" else _PART_PROBS_ON_DEVICE
        while True:
            asked = self._wanted(room, steps)
            if not asked:
                return
            found = self._read(read, trunks, list(asked))
            while part := list(islice(found, max(1, most_probs // len(self.covering.amateur.bytes)))):
                contexts = [(names[row], context, asked[row, context]) for (row, context), _ in part]
                self._open(contexts, torch.stack([each for _, each in part]))

    def _wanted(
        self, room: list[int | None], steps: dict[tuple[int, int], CoveredStep | None]
    ) -> dict[_Context, list[CoveredStep]]:
        """The contexts that some steps want, and by which. Steps that the amateur cannot read become `None`."""
        asked: dict[_Context, list[CoveredStep]] = {}
        with _uncollected():
            for (row, t), step in steps.items():
                if step is None:
                    continue
                for context in step.wanted():
                    most = room[row]
                    if most is not None and len(context) > most:  # beyond what the amateur reads
                        steps[row, t] = None
                        break
                    asked.setdefault((row, context), []).append(step)
        return asked

    def _read(
        self, read: BranchedRows, trunks: list[list[int]], contexts: list[_Context]
    ) -> Iterator[tuple[_Context, torch.Tensor]]:
        """The logits after contexts, those along the amateur's own tokens first."""
        further = []
        for row, context in contexts:
            if list(context) == trunks[row][: len(context)]:
                yield (row, context), read.logits[row][len(context)]
            else:
                further.append((row, context))
        for place, found in read.after(further):
            yield further[place], found

    def _open(self, contexts: list[tuple[str, tuple[int, ...], list[CoveredStep]]], logits: torch.Tensor) -> None:
        """Open contexts, each of a named trajectory and wanted by some steps, with the logits `(N, W)` there."""
        probs = self._probabilities(logits, [(name, context) for name, context, _ in contexts])
        openings = [(step, context, row) for row, (_, context, steps) in enumerate(contexts) for step in steps]
        with _uncollected():
            open_contexts(self.covering, openings, probs)

    def _probabilities(self, logits: torch.Tensor, contexts: list[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
        no_token = ~self.amateur_vocabulary.contains(torch.arange(logits.shape[1], device=logits.device))
        # In place, since memory of this size is slow to get
        probs = logits.double().masked_fill_(no_token, 0.0)
        finite = probs.sum(-1).isfinite().tolist()
        if not all(finite):
            name, context = contexts[finite.index(False)]
            raise NonFiniteLogitsError("amateur", len(context), f"token {len(context)} of {name}")
        probs.masked_fill_(no_token, -math.inf)
        probs.sub_(probs.amax(-1, keepdim=True)).exp_()
        return probs.div_(probs.sum(-1, keepdim=True))

    def _step(self, start: Start | None, top: _ExpertStep, taken: int, pruning: Pruning) -> CoveredStep | None:
        if start is None or not self._is_readable(top, taken):
            return None
        needed = [token for token, mask in zip(top.tokens, top.plausible, strict=True) if mask]
        return CoveredStep(self.covering, start, needed, top.tokens, pruning)

    def _is_readable(self, top: _ExpertStep, taken: int) -> bool:
        """Whether every plausible token, and the one that was taken, stands for text or for the end of the answer."""
        plausible = [token for token, mask in zip(top.tokens, top.plausible, strict=True) if mask]
        plausible += [] if taken in self.eos_ids else [taken]
        return all(token is None or bool(self.covering.expert.bytes[token]) for token in plausible)

    def _score(
        self,
        compared: list[_Compared | None],
        experts: list[_ExpertStep],
        least: list[float],
        most_width: float,
        contrast_strength: float,
        expert_anchor: float,
    ) -> TrajectoryScores:
        scores = TrajectoryScores([], [], [], [])
        for t, (amateur, top) in enumerate(zip(compared, experts, strict=True)):
            if amateur is None:
                self.dropped["not readable"] += 1
                scores.kl_divergence.append(None)
                continue
            scores.kl_divergence.append(amateur.divergence)
            if amateur.divergence < least[t]:
                continue
            if amateur.width > most_width:
                self.dropped["not exact enough"] += 1
                continue
            mask, of_expert = torch.tensor(top.plausible), torch.tensor(top.log_probs, dtype=torch.float64)
            label = contrastive_label(of_expert, amateur.log_probs, mask, contrast_strength, expert_anchor).float()
            label, order = label.sort(descending=True, stable=True)
            support = int((label > 0).sum().item())
            scores.step_positions.append(t)
            scores.label_ids.append([top.ids[place] for place in order[:support].tolist()])
            scores.label_probs.append(label[:support].tolist())
        return scores


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without searches for garbage in cycles, of which there is none. Each looks at all texts in the caches."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _compare_step(step: CoveredStep, top: _ExpertStep, least: float, most_width: float) -> _Compared:
    """The intervals of a step of at least a divergence are made at most `most_width` nats wide, if possible."""
    of_expert = torch.tensor(top.log_probs, dtype=torch.float64)
    of_amateur = torch.tensor(step.estimate(top.tokens), dtype=torch.float64).clamp_min(_FLOOR)
    # {the most probable tokens, the rest}
    rests = [(1 - probs.sum()).clamp_min(_FLOOR).log()[None] for probs in (of_expert.exp(), of_amateur)]
    of_amateur = of_amateur.log()
    parts = [torch.cat(each) for each in zip((of_expert, of_amateur), rests, strict=True)]
    divergence = step_divergence(*parts).item()
    if divergence < least:
        return _Compared(of_amateur, divergence, 0.0)
    bounds = step.bounds(step.needed, most_width)
    return _Compared(of_amateur, divergence, max(map(log_width, bounds.low, bounds.high)))


def _check_finite(logits: torch.Tensor, name: str) -> None:
    finite = logits.isfinite().all(-1)
    if not finite.all():
        step = int((~finite).nonzero()[0, 0].item())
        raise NonFiniteLogitsError("expert", step, f"step {step} of {name}")


def _groups(lengths: list[int], width: int) -> list[list[int]]:
    """Trajectories of which the amateur's logits exist together."""
    groups: list[list[int]] = []
    size = 0
    for i, length in enumerate(lengths):
        if not groups or size + length * width > PART_LOGITS:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += length * width
    return groups
