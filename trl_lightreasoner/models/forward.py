"""Calling a model at chosen positions only, and what its forward pass can leave out."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .weights import get_base_model


# What `head_makes_logits` has found out
_HEAD_MAKES_LOGITS: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def accepts_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether the forward can leave out the positions whose logits nobody reads."""
    return "logits_to_keep" in inspect.signature(get_base_model(model).forward).parameters


def without_routers(model: torch.nn.Module) -> dict[str, bool]:
    """
    Arguments of the forward by which a mixture of experts leaves out the loss of its routers, which nobody reads and
    which fails while tokens are generated, though its config asks for it.
    """
    model = get_base_model(model)
    names = inspect.signature(getattr(model, "forward", model)).parameters
    return {"output_router_logits": False} if "output_router_logits" in names else {}


def has_full_attention(model: torch.nn.Module) -> bool:
    """
    Whether every layer attends to all tokens before its own by PyTorch's scaled dot product, so that whoever masks or
    packs tokens differently gets what the model means.
    """
    config = get_base_model(model).config
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    return config._attn_implementation == "sdpa" and layers == {DynamicLayer}


def attention_backends(device: torch.device) -> AbstractContextManager:
    """
    PyTorch's kernels of the scaled dot product without cuDNN's, which can return NaN from the backward pass of a
    padded batch for a loss that is finite (seen with torch 2.11 on an H100, bf16).
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def forward_at(model: torch.nn.Module, positions: torch.Tensor, to_keep: bool, **inputs: torch.Tensor) -> Any:
    """
    Run `model` and keep the logits of chosen positions only.

    Args:
        model (`torch.nn.Module`): The model as it is called, wrapped by DDP or not.
        positions (`torch.Tensor` of shape `(batch, length)`, bool): True where logits are wanted. Or, if there is one
            row, where that is: `(n,)`, int64.
        to_keep (`bool`): What [`accepts_logits_to_keep`] says of the model. If False, all logits are computed and the
            rest is dropped afterwards.
        inputs: `input_ids`, `attention_mask` and so on.

    Returns:
        The model's output with `logits` of shape `(positions.sum(), W)` or `(n, W)`, in the order of the batch's rows.
    """
    inputs |= without_routers(model)
    if to_keep:
        outputs = model(**inputs, logits_to_keep=positions, use_cache=False)
        _check_logits(model, outputs)
        outputs.logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])
    else:
        outputs = model(**inputs, use_cache=False)
        _check_logits(model, outputs)
        logits = outputs.logits if positions.ndim == 2 else outputs.logits[0]
        outputs.logits = logits[positions.to(logits.device)]
    return outputs


@torch.no_grad()
def next_token_log_probs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """What a model says behind each of some tokens, `(len(ids), W)`, on the CPU."""
    input_ids = torch.tensor([ids], device=get_base_model(model).get_input_embeddings().weight.device)
    outputs = model(input_ids=input_ids, use_cache=False, **without_routers(model))
    return outputs.logits[0].float().log_softmax(-1).cpu()


def divergence(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> float:
    """Mean of `D_KL(p || q)` in nats over rows of log probabilities; infinite if they have no number."""
    nats = torch.nn.functional.kl_div(other_log_probs, log_probs, reduction="sum", log_target=True) / len(log_probs)
    return nats.nan_to_num(nan=float("inf")).item()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on another device, without waiting until a GPU has done what it had to do before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def hidden_states_at(model: torch.nn.Module, positions: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor | None:
    """
    What the output head would get at chosen positions.

    Args:
        model (`torch.nn.Module`): The model.
        positions (`torch.Tensor` of shape `(n,)`, int64): Where, in the flattened batch, hidden states are wanted.
        input_ids (`torch.Tensor` of shape `(batch, length)`): Ids, padding behind them if there is any.

    Returns:
        `(n, hidden_size)`, from which `get_output_embeddings()` makes the logits; or `None` where
        [`head_makes_logits`] is false.
    """
    if not head_makes_logits(model, input_ids):
        return None
    hidden_states = get_base_model(model).get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden_states.flatten(0, 1)[positions]


def head_makes_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> bool:
    """
    Whether the logits of a model are what its output head makes of its last hidden states. Some models scale them, cap
    them or take tokens out, which shows in a few tokens of `input_ids` `(batch, length)`, read once a model.
    """
    base = get_base_model(model)
    if base not in _HEAD_MAKES_LOGITS:
        decoder, head = base.get_decoder(), base.get_output_embeddings()
        # What is called decoder may be the head
        makes = isinstance(decoder, PreTrainedModel) and decoder is not base and head is not None
        if makes:
            few = {"input_ids": input_ids[:1, :8], "use_cache": False}
            outputs = base(**few, **without_routers(base))
            _check_logits(base, outputs)
            logits, made = outputs.logits, head(decoder(**few).last_hidden_state)
            makes = logits.shape == made.shape and torch.allclose(logits, made, rtol=0, atol=0, equal_nan=True)
        _HEAD_MAKES_LOGITS[base] = makes
    return _HEAD_MAKES_LOGITS[base]


def _check_logits(model: torch.nn.Module, outputs: Any) -> None:
    if getattr(outputs, "logits", None) is None:
        raise ValueError(
            f"`{type(model).__name__}` returned no logits. LightReasoner needs a causal language model whose forward "
            "gives an output with `logits`."
        )
