"""Training without padding: the rows of a batch are concatenated, and PyTorch's `varlen_attn` keeps them apart.

For models with full attention under attn_implementation="sdpa", in half precision on a CUDA GPU; `flash_attention_2`
reads the same arguments. In any other case a batch stays padded.
"""

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig

from ..models.forward import attention_named, has_full_attention, rope_switch
from ..models.weights import get_base_model


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None

_NAME = "packed"


def can_pack(model: torch.nn.Module) -> bool:
    """Whether the layers of a model can attend to packed rows."""
    base = get_base_model(model)
    # `varlen_attn` has no dropout of attention weights
    dropout = getattr(base.config.get_text_config(), "attention_dropout", 0)
    return (
        varlen_attn is not None
        and getattr(base, "_supports_attention_backend", False)
        and has_full_attention(base)
        and rope_switch(base.config) is None
        and not dropout
    )


def packed_attention(config: PretrainedConfig) -> AbstractContextManager:
    """Context in which the layers of the model with this `config` accept only packed batches from [`pack`]."""
    return attention_named(config, _NAME)


def is_packed(config: PretrainedConfig) -> bool:
    """Whether [`packed_attention`] is on."""
    return config._attn_implementation == _NAME


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, token_index: torch.Tensor) -> dict[str, Any]:
    """
    Remove the padding from a batch.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`): Ids.
        attention_mask (`torch.Tensor` of shape `(B, L)`): 1 at the N tokens that are not padding.
        token_index (`torch.Tensor` of shape `(N,)`, int64): Indices of those tokens in the flattened batch.

    Returns:
        `dict`: `input_ids` `(1, N)`, and the tensors that mark the beginnings of the rows.

    Example:

    ```python
    >>> packed = pack(torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]]), torch.tensor([0, 1, 2]))
    >>> packed["input_ids"].tolist(), packed["position_ids"].tolist(), packed["cu_seq_lens_q"].tolist()
    ([[5, 6, 7]], [[0, 1, 0]], [0, 2, 3])

    ```
    """
    ends = attention_mask.sum(-1).cumsum(0)
    begins = torch.nn.functional.pad(ends, (1, 0)).int()
    longest = attention_mask.shape[1]
    return {
        "input_ids": input_ids.flatten()[token_index][None],
        "position_ids": (attention_mask.cumsum(-1) - 1).flatten()[token_index][None],
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": begins,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer as transformers calls it: `(1, H, N, D)` in, `(1, N, H, D)` out."""
    # Autocast does not cast the inputs of `varlen_attn`
    dtype = (
        torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else value.dtype
    )
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    sequences = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(query, key, value, *sequences, scale=scaling, **_CAUSAL)[None], None


if varlen_attn is not None:
    # Its arguments still change between versions of PyTorch
    _arguments = inspect.signature(varlen_attn).parameters
    _CAUSAL: dict[str, Any] = {"is_causal": True} if "is_causal" in _arguments else {"window_size": (-1, 0)}
    if "enable_gqa" in _arguments:
        _CAUSAL["enable_gqa"] = True
    AttentionInterface.register(_NAME, packed_attention_forward)
