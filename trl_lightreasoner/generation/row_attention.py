"""Attention of one new token in each row to that row's own tokens, for a step of decoding on a CUDA GPU.

Under a mask, the scaled dot product reads the buffers of keys and values to their end. PyTorch's FlashAttention takes
the length of each row from the GPU's memory and reads no more than that, so one captured graph serves all lengths. A
layer gets its rows' bounds, see [`row_bounds`], in the place of the attention mask.
"""

from contextlib import AbstractContextManager

import torch
from transformers import AttentionInterface, PretrainedConfig

from ..models.forward import attention_named


_NAME = "rows"
# Arguments with which a layer asks for more than the scaled dot product
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask")


def why_no_row_attention(keys: torch.Tensor, values: torch.Tensor) -> str | None:
    """The reason why the buffers of a layer cannot be read by length, or `None` if they can."""
    if keys.device.type != "cuda" or torch.cuda.get_device_capability(keys.device) < (8, 0):
        return "it needs a CUDA GPU from Ampere on"
    if keys.dtype not in (torch.bfloat16, torch.float16) or values.dtype != keys.dtype:
        return "it needs keys and values in half precision"
    if keys.shape[-1] != values.shape[-1] or keys.shape[-1] > 256 or keys.shape[-1] % 8:
        return "it needs heads of at most 256 numbers, a multiple of 8"
    return None


def row_attention(config: PretrainedConfig) -> AbstractContextManager:
    """Context in which the layers of the model with this `config` read the bounds of rows instead of a mask."""
    return attention_named(config, _NAME)


def row_bounds(num_rows: int, num_columns: int, device: torch.device) -> torch.Tensor:
    """
    Bounds of B rows in buffers of L columns, `(3, 1, 1, B + 1)`, int32: their lengths, to be filled in before each
    step, and where their queries and keys begin. Masks of four dimensions reach the layers as they are.

    Example:

    ```python
    >>> row_bounds(2, 16, torch.device("cpu")).flatten(1).tolist()
    [[0, 0, 0], [0, 1, 2], [0, 16, 32]]

    ```
    """
    rows = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    return torch.stack([torch.zeros_like(rows), rows, rows * num_columns])[:, None, None]


def row_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention of a layer as transformers calls it.

    Args:
        module (`torch.nn.Module`): The layer.
        query (`torch.Tensor` of shape `(B, H, 1, D)`): One token of each row.
        key, value (`torch.Tensor` of shape `(B, H_k, L, D)`): Views of contiguous `(B, L, H_k, D)`.
        attention_mask (`torch.Tensor`): Result of [`row_bounds`], with the lengths.
        scaling (`float`, *optional*, defaults to `D ** -0.5`): Factor of the scores.

    Returns:
        `(B, 1, H, D)`, and `None` for the weights.

    Raises:
        `ValueError`: If the layer asks for more than the scaled dot product.
    """
    if asked := [name for name in _REFUSED if kwargs.get(name) is not None]:
        raise ValueError(f"attention by length has no `{asked[0]}`")
    lengths, query_starts, key_starts = attention_mask.flatten(1)
    keys, values = (states.transpose(1, 2).flatten(0, 1) for states in (key, value))
    queries = query[:, :, 0].to(key.dtype)  # autocast does not cast the inputs of this kernel
    starts = (query_starts, key_starts, 1, key.shape[2])
    return flash_attention(queries, keys, values, *starts, lengths[:-1], scaling)[:, None], None


def flash_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest_query: int,
    longest_key: int,
    lengths: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """
    PyTorch's FlashAttention of concatenated rows, of which each has a number of keys in use. Nothing here depends on
    the lengths but what the kernel reads, which holds for this form of it only: the one with batches ignores lengths.
    """
    sequences = (query_starts, key_starts, longest_query, longest_key)
    return torch.ops.aten._flash_attention_forward(
        queries, keys, values, *sequences, 0.0, False, False, scale=scale, seqused_k=lengths
    )[0]


AttentionInterface.register(_NAME, row_attention_forward)
