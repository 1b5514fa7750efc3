"""From trajectories to kept steps: one forward pass a trajectory and model, then the contrast at every step."""

from typing import NamedTuple

import torch

from .contrast import NonFiniteLogitsError, contrast_steps
from .models import accepts_logits_to_keep, forward_at, get_base_model
from .vocabulary import Vocabulary


class Trajectory(NamedTuple):
    """A prompt and the expert's answer to it, as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]


class TrajectoryScores(NamedTuple):
    """
    What the contrast says of one trajectory of T completion tokens.

    Attributes:
        kl_divergence (`list[float]`): D_KL(pi_E || pi_A) in nats at each of the T steps.
        step_positions (`list[int]`): t of each kept step, ascending.
        label_ids (`list[list[int]]`): Support of v_C at each kept step, most probable first.
        label_probs (`list[list[float]]`): v_C there.
    """

    kl_divergence: list[float]
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
) -> list[TrajectoryScores]:
    """
    Divergence and labels of every step of a batch of trajectories.

    Both models read the same ids, prompt and completion, once. The logits at the last token of a context are the
    distribution of the token that follows it, so the step t of a completion is read at position len(prompt) + t - 1.

    Args:
        expert (`torch.nn.Module`): pi_E, in eval mode.
        amateur (`torch.nn.Module`): pi_A, in eval mode, on any device.
        trajectories (`list[Trajectory]`): Prompts and completions, none empty.
        vocabulary ([`Vocabulary`]): The tokens that the two models share.
        alpha (`float`): Plausibility threshold, in (0, 1].
        beta (`float`): A step is kept if its divergence is at least this many nats.
        include_first_step (`bool`): Whether t = 0 can be kept.
        names (`list[str]`, *optional*): What to call each trajectory in an error message.

    Returns:
        `list[TrajectoryScores]`, in the order of the trajectories.

    Raises:
        [`NonFiniteLogitsError`]: If a model's logits are NaN or infinite; names the trajectory and the step.
    """
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in trajectories]
    input_ids = torch.zeros(len(trajectories), max(lengths), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    positions = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, ((prompt, completion), length) in enumerate(zip(trajectories, lengths, strict=True)):
        input_ids[row, :length] = torch.tensor(prompt + completion[:-1])
        attention_mask[row, :length] = 1
        positions[row, len(prompt) - 1 : length] = True

    logits = [_logits_at(model, positions, input_ids, attention_mask) for model in (expert, amateur)]
    try:
        steps = contrast_steps(*(vocabulary.select(each) for each in logits), alpha=alpha, beta=beta)
    except NonFiniteLogitsError as error:
        steps_of = [(i, t) for i, (_, completion) in enumerate(trajectories) for t in range(len(completion))]
        i, t = steps_of[error.row]
        place = f"step {t} of {names[i] if names else f'trajectory {i}'}"
        raise NonFiniteLogitsError(error.model, error.row, place) from None
    label_ids, label_probs = vocabulary.ids_of(steps.label_ids).tolist(), steps.label_probs.tolist()
    # A label over the shared tokens cannot speak of a step at which the expert takes a token that is not shared
    readable = vocabulary.contains(torch.tensor([i for _, completion in trajectories for i in completion])).tolist()

    divergences, kept = steps.kl_divergence.tolist(), steps.kept.tolist()
    scores, step, label = [], 0, 0
    for _, completion in trajectories:
        divergence = divergences[step : step + len(completion)]
        row = TrajectoryScores(divergence, [], [], [])
        for t in range(len(completion)):
            if kept[step]:
                if readable[step] and (t > 0 or include_first_step):
                    support = [(i, p) for i, p in zip(label_ids[label], label_probs[label], strict=True) if p > 0]
                    row.step_positions.append(t)
                    row.label_ids.append([i for i, _ in support])
                    row.label_probs.append([p for _, p in support])
                label += 1
            step += 1
        scores.append(row)
    return scores


def _logits_at(
    model: torch.nn.Module, positions: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    device = get_base_model(model).get_input_embeddings().weight.device
    return forward_at(
        model,
        positions.to(device),
        accepts_logits_to_keep(model),
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
    ).logits
