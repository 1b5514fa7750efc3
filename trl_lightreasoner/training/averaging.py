"""The mean that is the loss of an update: over its kept steps, each with its weight, and over the tokens of its SFT
rows.

Both are counted over all batches and processes of an update before its first batch is read, so the means do not depend
on the division into batches.
"""

import torch


def weighted(values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Values `(N,)` at the kept steps of a batch, times the steps' weights if the batch has weights."""
    if "step_weights" not in batch:
        return values
    return values * batch["step_weights"].flatten()[batch["label_index"]]


def count_items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The divisor of a sum over the kept steps of a batch.

    Args:
        batch (`dict`): A batch of [`DataCollatorForLightReasoner`].

    Returns:
        `torch.Tensor` without dimensions: The number of the kept steps, or the sum of their weights.

    Example:

    ```python
    >>> step_mask = torch.tensor([[True, True], [False, True]])
    >>> count_items({"step_mask": step_mask})
    tensor(3)
    >>> count_items({"step_mask": step_mask, "step_weights": torch.tensor([[0.5, 1.0], [2.0, 0.0]])})
    tensor(3.5000)

    ```
    """
    if "step_weights" in batch:
        return batch["step_weights"].sum()
    return count_steps(batch)


def count_steps(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Number of kept steps of a batch, without its SFT rows."""
    if "sft_mask" in batch:
        return (batch["step_mask"] & ~batch["sft_mask"][:, None]).sum()
    return batch["step_mask"].sum()


def count_sft_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Number of tokens of the completions of the SFT rows of a batch."""
    return (batch["step_mask"] & batch["sft_mask"][:, None]).sum()


def mean_loss(
    divergence: torch.Tensor, batch: dict[str, torch.Tensor], num_items: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The contribution of a batch to the mean over an update.

    Args:
        divergence (`torch.Tensor` of shape `(N,)`): D_KL(v_C || pi_theta) in nats at the kept steps of the batch.
        batch (`dict`): The batch, with the indices of [`find_indices`].
        num_items (`torch.Tensor`, *optional*): [`count_items`] of the whole update. If `None`, the update is the
            batch.

    Returns:
        `torch.Tensor` without dimensions: In nats, 0 if there is nothing to average.
    """
    num_items = count_items(batch) if num_items is None else num_items
    # Weights can be arbitrarily small, and steps are whole numbers
    least = torch.finfo(num_items.dtype).tiny if num_items.is_floating_point() else 1
    return weighted(divergence, batch).sum() / num_items.clamp_min(least)
