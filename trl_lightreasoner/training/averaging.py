"""What the loss of an update is the mean over: its kept steps, each by its weight, and the tokens of its SFT rows.

Both are counted over every batch and process of an update before the first of its batches is read, so that the means
are the same however its rows are cut.
"""

import torch


def weighted(values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Values `(N,)` at the kept steps of a batch times the weights of those steps, if the batch has any."""
    if "step_weights" not in batch:
        return values
    return values * batch["step_weights"].flatten()[batch["label_index"]]


def count_items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    What the sum over the kept steps of a batch is divided by.

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
    """Number of kept steps of a batch, those of SFT rows aside."""
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
    A batch's share of the mean over an update.

    Args:
        divergence (`torch.Tensor` of shape `(N,)`): D_KL(v_C || pi_theta) in nats at the kept steps of the batch.
        batch (`dict`): The batch, with what [`find_indices`] makes.
        num_items (`torch.Tensor`, *optional*): What [`count_items`] gives for the whole update. If `None`, the update
            is the batch.

    Returns:
        `torch.Tensor` without dimensions: Nats; 0 if there is nothing to take a mean over.
    """
    num_items = count_items(batch) if num_items is None else num_items
    # Weights may be as small as one likes, steps are whole
    least = torch.finfo(num_items.dtype).tiny if num_items.is_floating_point() else 1
    return weighted(divergence, batch).sum() / num_items.clamp_min(least)
