"""The method as pure tensor functions: logits in, kept steps and loss out. No models, no files.

Names and equations follow the paper (LightReasoner, arXiv 2510.07962, section 3). At a step t the expert pi_E and the
amateur pi_A give two distributions over one vocabulary. `step_divergence` measures how much they disagree,
`plausibility_mask` selects the tokens that the expert finds plausible, `contrastive_label` computes what the expert
knows and the amateur does not (v_C), and `contrastive_loss` measures how far a model is from that label.
`contrast_steps` applies the first three to many steps.

From the log-softmax on, everything is computed in fp32 and log space, whatever the dtype of the logits. Rows are
processed a few at a time, so that the extra memory does not grow with the number of steps.
"""

import math
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from .fused_divergence import can_fuse, fused_divergence


# Elements of one fp32 chunk (rows x vocabulary): 2**26 is 256 MiB, 442 rows of Qwen2.5's vocabulary
CHUNK_ELEMENTS = 2**26


class ContrastedSteps(NamedTuple):
    """
    Result of [`contrast_steps`] for N steps, of which K are kept.

    Attributes:
        kl_divergence (`torch.Tensor` of shape `(N,)`, fp32):
            D_KL(pi_E || pi_A) in nats at every step, kept or not.
        kept (`torch.Tensor` of shape `(N,)`, bool):
            Whether the divergence is at least beta.
        label_ids (`torch.Tensor` of shape `(K, S)`, int64):
            Columns of the vocabulary in v_C's support, most probable first. S is the size of the largest support.
        label_probs (`torch.Tensor` of shape `(K, S)`, fp32):
            v_C there. Columns beyond a step's own support have probability 0.
    """

    kl_divergence: torch.Tensor
    kept: torch.Tensor
    label_ids: torch.Tensor
    label_probs: torch.Tensor


class ContrastiveLoss(NamedTuple):
    """
    Result of [`contrastive_loss`] for N steps.

    Attributes:
        kl_divergence (`torch.Tensor` of shape `(N,)`, fp32):
            D_KL(v_C || pi_theta) in nats, differentiable with respect to the logits.
        entropy (`torch.Tensor` of shape `(N,)`, fp32):
            Entropy of pi_theta in nats, detached.
        agreement (`torch.Tensor` of shape `(N,)`, bool):
            Whether pi_theta's most probable token is v_C's.
    """

    kl_divergence: torch.Tensor
    entropy: torch.Tensor
    agreement: torch.Tensor


class NonFiniteLogitsError(ValueError):
    """Logits of `model` (such as "expert") at `row` are NaN or infinite, so no probability can be trusted."""

    def __init__(self, model: str, row: int, place: str | None = None):
        self.model, self.row, self.place = model, row, place
        super().__init__(
            f"The {model}'s logits at {place or f'row {row}'} are not finite. Load the {model} in bfloat16 or "
            "float32, and check its weights for NaN."
        )


def step_divergence(expert_logps: torch.Tensor, amateur_logps: torch.Tensor) -> torch.Tensor:
    """
    D_KL(pi_E || pi_A) of each step, the measure of how informative it is (section 3.1).

    Args:
        expert_logps (`torch.Tensor` of shape `(N, V)`): Log-probabilities of the expert.
        amateur_logps (`torch.Tensor` of shape `(N, V)`): Log-probabilities of the amateur.

    Returns:
        `torch.Tensor` of shape `(N,)`: Nats, never negative, and exactly 0 if the two are equal.

    Example:

    ```python
    >>> import torch
    >>> expert, amateur = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> step_divergence(expert, amateur)
    tensor([0.1438])

    ```
    """
    return (expert_logps.exp() * (expert_logps - amateur_logps)).sum(-1).clamp_min(0)


def plausibility_mask(expert_logps: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    V_mask: the tokens whose expert probability is at least alpha times that of the most probable one (section 3.2).

    Args:
        expert_logps (`torch.Tensor` of shape `(N, V)`): Log-probabilities of the expert, or its logits: the normaliser
            cancels, and with logits a tie at the threshold is not lost to rounding.
        alpha (`float`): Fraction of the largest probability, in (0, 1]. A token exactly at the threshold is included.

    Returns:
        `torch.Tensor` of shape `(N, V)`, bool. The most probable token is always included.

    Example:

    ```python
    >>> import torch
    >>> plausibility_mask(torch.tensor([[0.7, 0.2, 0.1]]).log(), alpha=0.2)
    tensor([[ True,  True, False]])

    ```
    """
    return expert_logps >= expert_logps.amax(-1, keepdim=True) + math.log(alpha)


def contrastive_label(
    expert_logps: torch.Tensor,
    amateur_logps: torch.Tensor,
    mask: torch.Tensor,
    contrast_strength: float = 1.0,
    expert_anchor: float = 0.0,
) -> torch.Tensor:
    """
    v_C: the softmax of log pi_E - log pi_A over the plausible tokens (section 3.2). With gamma and lambda it is the
    softmax of lambda log pi_E + gamma (log pi_E - log pi_A).

    Args:
        expert_logps (`torch.Tensor` of shape `(N, V)`): Log-probabilities of the expert.
        amateur_logps (`torch.Tensor` of shape `(N, V)`): Log-probabilities of the amateur.
        mask (`torch.Tensor` of shape `(N, V)`, bool): V_mask, see [`plausibility_mask`].
        contrast_strength (`float`): gamma, 0 or more. At 0 the label does not depend on the amateur.
        expert_anchor (`float`): lambda, 0 or more.

    Returns:
        `torch.Tensor` of shape `(N, V)`: Rows sum to 1, and are 0 outside the mask.

    Example:

    ```python
    >>> import torch
    >>> expert, amateur = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.6, 0.1, 0.3]]).log()
    >>> contrastive_label(expert, amateur, torch.tensor([[True, True, False]]))
    tensor([[0.2500, 0.7500, 0.0000]])

    ```
    """
    contrast = expert_logps - amateur_logps
    if (contrast_strength, expert_anchor) != (1.0, 0.0):  # the paper's label needs no further pass
        contrast = contrast_strength * contrast + expert_anchor * expert_logps
    return contrast.masked_fill(~mask, -math.inf).softmax(-1)


def contrast_steps(
    expert_logits: torch.Tensor,
    amateur_logits: torch.Tensor,
    alpha: float,
    beta: float,
    contrast_strength: float = 1.0,
    expert_anchor: float = 0.0,
) -> ContrastedSteps:
    """
    Find the informative ones among N steps, and the label of each.

    Args:
        expert_logits (`torch.Tensor` of shape `(N, V)`): Raw logits of the expert, any floating dtype.
        amateur_logits (`torch.Tensor` of shape `(N, V)`): Raw logits of the amateur over the same V tokens.
        alpha (`float`): Plausibility threshold, in (0, 1].
        beta (`float`): A step is kept if its divergence is at least this many nats.
        contrast_strength, expert_anchor (`float`): gamma and lambda of the label, see [`contrastive_label`].

    Returns:
        [`ContrastedSteps`]

    Raises:
        [`NonFiniteLogitsError`]: If a logit is NaN or infinite. It is a `ValueError` that names the model and the row.

    Example:

    ```python
    >>> import torch
    >>> expert = torch.tensor([[4.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    >>> amateur = torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    >>> steps = contrast_steps(expert, amateur, alpha=0.2, beta=0.4)
    >>> steps.kept.tolist(), steps.label_ids.tolist()
    ([True, False], [[1, 0]])

    ```
    """
    rows = _rows_per_chunk(expert_logits)
    amateur_logits = amateur_logits.to(expert_logits.device)
    if can_fuse(expert_logits, amateur_logits):
        divergence = fused_divergence(expert_logits, amateur_logits)
    else:
        chunks = zip(expert_logits.split(rows), amateur_logits.split(rows), strict=True)
        divergence = torch.cat([step_divergence(*map(_log_softmax, chunk)) for chunk in chunks])
    # A single logit that is NaN or infinite makes the divergence so
    if not divergence.isfinite().all():
        _refuse_nonfinite(expert_logits, amateur_logits)
    kept = divergence >= beta
    labels = []
    for steps in kept.nonzero()[:, 0].split(rows):
        mask = plausibility_mask(expert_logits[steps].float(), alpha)
        expert_logps, amateur_logps = (_log_softmax(logits[steps]) for logits in (expert_logits, amateur_logits))
        label = contrastive_label(expert_logps, amateur_logps, mask, contrast_strength, expert_anchor)
        del expert_logps, amateur_logps  # each is as large as a chunk, and only one chunk should be in memory
        # After topk the dense rows are freed with the chunk. Outside a row's own support it selects zeros
        labels.append(label.topk(int(mask.sum(-1).max()) if len(mask) else 0))
    support = max(label.values.shape[1] for label in labels)
    return ContrastedSteps(
        kl_divergence=divergence,
        kept=kept,
        label_ids=torch.cat([_widen(label.indices, support) for label in labels]),
        label_probs=torch.cat([_widen(label.values, support) for label in labels]),
    )


def contrastive_loss(logits: torch.Tensor, label_ids: torch.Tensor, label_probs: torch.Tensor) -> ContrastiveLoss:
    """
    D_KL(v_C || pi_theta) of each step, the fine-tuning objective (section 3.3).

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): Raw logits of pi_theta at the kept steps, any floating dtype.
        label_ids (`torch.Tensor` of shape `(N, S)`, int64): Columns of v_C's support, most probable first, padded with
            any valid column.
        label_probs (`torch.Tensor` of shape `(N, S)`, fp32): v_C there. Padding has probability 0.

    Returns:
        [`ContrastiveLoss`]

    Example:

    ```python
    >>> import torch
    >>> loss = contrastive_loss(torch.zeros(1, 4), torch.tensor([[2, 1]]), torch.tensor([[0.75, 0.25]]))
    >>> loss.kl_divergence
    tensor([0.8240])

    ```
    """
    rows = _rows_per_chunk(logits)
    parts = []
    # `split` rather than slices: its backward writes the gradient once instead of adding a full tensor per chunk
    for chunk in zip(logits.split(rows), label_ids.split(rows), label_probs.split(rows), strict=True):
        if torch.is_grad_enabled() and logits.requires_grad and len(logits) > rows:
            # The fp32 copy of a chunk is recomputed in the backward pass, so only one chunk is in memory at a time
            parts.append(checkpoint(_chunk_loss, *chunk, use_reentrant=False))
        else:
            parts.append(_chunk_loss(*chunk))
    return ContrastiveLoss(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _chunk_loss(
    logits: torch.Tensor, label_ids: torch.Tensor, label_probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logps = _log_softmax(logits)
    # xlogy is 0 where the probability is 0, so padding adds nothing
    negative_entropy = torch.special.xlogy(label_probs, label_probs).sum(-1)
    divergence = negative_entropy - (label_probs * logps.gather(-1, label_ids)).sum(-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
        # The first column is the most probable token. There is none without any step
        agreement = (logps.argmax(-1, keepdim=True) == label_ids[:, :1]).any(-1)
    return divergence, entropy, agreement


def _rows_per_chunk(logits: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, logits.shape[-1]))


def _refuse_nonfinite(expert_logits: torch.Tensor, amateur_logits: torch.Tensor) -> None:
    for name, logits in (("expert", expert_logits), ("amateur", amateur_logits)):
        for row, values in enumerate(logits):
            if not values.isfinite().all():
                raise NonFiniteLogitsError(name, row)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)


def _widen(values: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
