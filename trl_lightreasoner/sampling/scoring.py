"""From trajectories to kept steps: one forward pass per trajectory and model, then the contrast at every step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from ..contrast import ContrastedSteps, NonFiniteLogitsError, contrast_steps
from ..fused_divergence import compile_ahead
from ..models.forward import accepts_logits_to_keep, attention_backends, forward_at, hidden_states_at, to_device
from ..models.weights import get_base_model
from ..vocabulary import Vocabulary


# Tokens in one pass through the layers: enough to fill a GPU, a small model too
GROUP_TOKENS = 2**15
# Logits of a model that exist at a time: 0.5 GiB in half precision, 1,766 steps of Qwen2.5's vocabulary
PART_LOGITS = 2**28


class Trajectory(NamedTuple):
    """A prompt and the expert's answer to it, as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]


class TrajectoryScores(NamedTuple):
    """
    The contrast on one trajectory of T completion tokens.

    Attributes:
        kl_divergence (`list[float | None]`): D_KL(pi_E || pi_A) in nats at each of the T steps. `None` at steps that
            an amateur with a different tokenizer cannot read.
        step_positions (`list[int]`): t of each kept step, ascending.
        label_ids (`list[list[int]]`): Support of v_C at each kept step, most probable first.
        label_probs (`list[list[float]]`): v_C there.
    """

    kl_divergence: list[float | None]
    step_positions: list[int]
    label_ids: list[list[int]]
    label_probs: list[list[float]]


@torch.no_grad()
def score_trajectories(
    expert: torch.nn.Module,
    amateur: torch.nn.Module,
    trajectories: list[Trajectory],
    vocabulary: Vocabulary,
    alpha: float,
    beta: float,
    include_first_step: bool = True,
    names: list[str] | None = None,
    expert_hidden_states: list[torch.Tensor] | None = None,
    contrast_strength: float = 1.0,
    expert_anchor: float = 0.0,
    amateur_prompts: list[list[int]] | None = None,
    as_amateur: Callable[[], AbstractContextManager] = nullcontext,
    as_expert: Callable[[], AbstractContextManager] = nullcontext,
) -> list[TrajectoryScores]:
    """
    Divergence and labels of every step of a batch of trajectories.

    Both models read the ids of prompt and completion once, in batches of trajectories of similar length. The amateur
    can have its own prompts. The logits at a token give the distribution of the next one, so step t of a completion is
    read at position len(prompt) + t - 1.

    Args:
        expert (`torch.nn.Module`): pi_E, in eval mode.
        amateur (`torch.nn.Module`): pi_A, in eval mode, on any device.
        trajectories (`list[Trajectory]`): Prompts and completions, none empty.
        vocabulary ([`Vocabulary`]): The tokens that the two models share.
        alpha (`float`): Plausibility threshold, in (0, 1].
        beta (`float`): A step is kept if its divergence is at least this many nats.
        include_first_step (`bool`): Whether t = 0 can be kept.
        names (`list[str]`, *optional*): Name of each trajectory in error messages.
        expert_hidden_states (`list[torch.Tensor]`, *optional*): For a trajectory of T completion tokens, the inputs of
            the expert's output head at each step, of shape `(T, hidden_size)`, if the expert has just generated it. If
            `None`, they are computed.
        contrast_strength, expert_anchor (`float`): gamma and lambda of the labels.
        amateur_prompts (`list[list[int]]`, *optional*): Each prompt in the amateur's form, if it differs from the
            expert's.
        as_amateur, as_expert (`Callable`, *optional*): Make a context manager for each pass of the amateur or the
            expert, for example if the amateur is the expert without its adapter.

    Returns:
        `list[TrajectoryScores]`, in the order of the trajectories.

    Raises:
        [`NonFiniteLogitsError`]: If a model's logits are NaN or infinite. The message names the trajectory and the
        step.
    """
    scores: dict[int, TrajectoryScores] = {}
    contrasted: list[tuple[list[int], ContrastedSteps]] = []

    def read() -> None:
        while contrasted:
            part, steps = contrasted.pop()
            completions = [trajectories[i].completion_ids for i in part]
            for i, row in zip(part, _by_trajectory(steps, completions, vocabulary, include_first_step), strict=True):
                scores[i] = row

    read_by_amateur = trajectories
    if amateur_prompts is not None:
        pairs = zip(amateur_prompts, trajectories, strict=True)
        read_by_amateur = [Trajectory(prompt_ids, each.completion_ids) for prompt_ids, each in pairs]
    longer = [
        max(pair, key=lambda each: len(each.prompt_ids)) for pair in zip(trajectories, read_by_amateur, strict=True)
    ]
    for group in group_by_length(longer):
        input_ids, positions = batch = as_batch([trajectories[i] for i in group])
        if amateur_prompts is not None:
            batch = as_batch([read_by_amateur[i] for i in group])
        known = None if expert_hidden_states is None else torch.cat([expert_hidden_states[i] for i in group])
        expert_logits = LogitsAtSteps(expert, input_ids, positions, known, within=as_expert)
        amateur_logits = LogitsAtSteps(amateur, *batch, within=as_amateur)
        read()  # of the group before, while a GPU is at work on this one
        for rows in _parts(positions.sum(-1).tolist(), max(expert_logits.width, amateur_logits.width)):
            part = group[rows]
            of_expert, of_amateur = (vocabulary.select(each(rows)) for each in (expert_logits, amateur_logits))
            try:
                steps = contrast_steps(of_expert, of_amateur, alpha, beta, contrast_strength, expert_anchor)
            except NonFiniteLogitsError as error:
                i, t = [(i, t) for i in part for t in range(len(trajectories[i].completion_ids))][error.row]
                place = f"step {t} of {names[i] if names else f'trajectory {i}'}"
                raise NonFiniteLogitsError(error.model, error.row, place) from None
            contrasted.append((part, ContrastedSteps(*(each.cpu() for each in steps))))
    read()
    return [scores[i] for i in range(len(trajectories))]


def prepare_scoring(expert: torch.nn.Module, amateur: torch.nn.Module, vocabulary: Vocabulary) -> None:
    """Compile what [`score_trajectories`] needs on a GPU while the expert generates."""

    def logits(model: torch.nn.Module) -> torch.Tensor:
        width = model.config.get_text_config().vocab_size
        return vocabulary.select(torch.empty(1, width, dtype=model.dtype, device="meta"))

    expert, amateur = get_base_model(expert), get_base_model(amateur)
    compile_ahead(logits(expert), logits(amateur), expert.get_input_embeddings().weight.device)


def _by_trajectory(
    steps: ContrastedSteps, completions: list[list[int]], vocabulary: Vocabulary, include_first_step: bool
) -> Iterator[TrajectoryScores]:
    """The result of [`score_trajectories`] for these completions and their contrasted steps."""
    divergences = steps.kl_divergence.tolist()
    kept = steps.kept.nonzero()[:, 0].tolist()
    supports = (steps.label_probs > 0).sum(-1).tolist()
    label_ids, label_probs = vocabulary.ids_of(steps.label_ids).tolist(), steps.label_probs.tolist()
    labels = zip(kept, supports, label_ids, label_probs, strict=True)
    label = next(labels, None)
    first = 0
    for completion in completions:
        row = TrajectoryScores(divergences[first : first + len(completion)], [], [], [])
        while label is not None and (t := label[0] - first) < len(completion):
            # A label over the shared tokens cannot speak of a step at which the expert takes one that is not shared
            if completion[t] in vocabulary and (t > 0 or include_first_step):
                _, support, ids, probs = label
                row.step_positions.append(t)
                row.label_ids.append(ids[:support])
                row.label_probs.append(probs[:support])
            label = next(labels, None)
        yield row
        first += len(completion)


def group_by_length(trajectories: list[Trajectory]) -> list[list[int]]:
    """
    Indices of trajectories to pass through a model together. They have similar length, to save padding, and at most
    `GROUP_TOKENS` tokens with padding, unless a single trajectory has more.

    Example:

    ```python
    >>> trajectories = [Trajectory([1], [2, 3]), Trajectory([1, 2, 3], [4, 5]), Trajectory([1, 2], [3, 4])]
    >>> group_by_length(trajectories)
    [[1, 2, 0]]

    ```
    """
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in trajectories]
    longest_first = sorted(range(len(trajectories)), key=lambda i: -lengths[i])
    groups = []
    while longest_first:
        rows = max(1, GROUP_TOKENS // lengths[longest_first[0]])
        groups.append(longest_first[:rows])
        longest_first = longest_first[rows:]
    return groups


def as_batch(trajectories: list[Trajectory]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, padded on the right, and the mask of positions at which steps are read, both `(B, L)`."""
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in trajectories]
    input_ids = torch.zeros(len(trajectories), max(lengths), dtype=torch.long)
    positions = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, ((prompt, completion), length) in enumerate(zip(trajectories, lengths, strict=True)):
        input_ids[row, :length] = torch.tensor(prompt + completion[:-1])
        positions[row, len(prompt) - 1 : length] = True
    return input_ids, positions


def _parts(num_steps: list[int], width: int) -> Iterator[slice]:
    """Rows of a batch whose logits are in memory together: at most `PART_LOGITS`, unless a single row has more."""
    first = size = 0
    for row, steps in enumerate(num_steps):
        if row > first and (size + steps) * width > PART_LOGITS:
            yield slice(first, row)
            first, size = row, 0
        size += steps
    yield slice(first, len(num_steps))


class LogitsAtSteps:
    """
    Logits of one model at the steps of a batch, `(steps, W)`, for as many rows as requested at a time.

    A large batch goes through the layers at once, of which the hidden states at the steps are kept; the output head,
    whose results are the larger by far, is applied to some of them at a time. Models that do something else with the
    head's results compute some rows at a time from the beginning. `within` makes a context for each pass.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
        within: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.within = model, within
        self.width = get_base_model(model).config.get_text_config().vocab_size
        device = get_base_model(model).get_input_embeddings().weight.device
        self.input_ids, self.positions = to_device(input_ids, device), to_device(positions, device)
        self.ends = [0, *positions.sum(-1).cumsum(0).tolist()]
        # Padding is behind the tokens, where no causal model looks: without a mask the fastest attention applies
        if hidden_states is None:
            index = to_device(positions.flatten().nonzero().flatten(), device)
            with attention_backends(device), within():
                hidden_states = hidden_states_at(model, index, self.input_ids)
        self.hidden_states = hidden_states

    def __call__(self, rows: slice) -> torch.Tensor:
        if self.hidden_states is not None:
            head = get_base_model(self.model).get_output_embeddings()
            with self.within():
                return head(self.hidden_states[self.ends[rows.start] : self.ends[rows.stop]])
        with attention_backends(self.input_ids.device), self.within():
            positions, to_keep = self.positions[rows], accepts_logits_to_keep(self.model)
            return forward_at(self.model, positions, to_keep, input_ids=self.input_ids[rows]).logits
