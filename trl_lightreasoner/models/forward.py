"""Compute a model's logits at chosen positions only, and find out what its forward pass can skip."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .weights import get_base_model


# Number of tokens with which a model's behaviour is tested
_PROBED_LENGTH = 32
# Results of `head_makes_logits`
_HEAD_MAKES_LOGITS: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """A context without dropout."""
    was_training = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def accepts_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether the forward can skip the logits of positions that are not needed."""
    return "logits_to_keep" in inspect.signature(get_base_model(model).forward).parameters


def without_routers(model: torch.nn.Module) -> dict[str, bool]:
    """
    Arguments of the forward with which a mixture of experts skips the loss of its routers, even if its config asks for
    it. Nothing uses this loss, and computing it fails during generation.
    """
    model = get_base_model(model)
    names = inspect.signature(getattr(model, "forward", model)).parameters
    return {"output_router_logits": False} if "output_router_logits" in names else {}


def has_full_attention(model: torch.nn.Module) -> bool:
    """
    Whether every layer attends to all earlier tokens with PyTorch's scaled dot product, so that other masks or packed
    rows give the same results.
    """
    config = get_base_model(model).config
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    return config._attn_implementation == "sdpa" and layers == {DynamicLayer}


def context_length(config: PretrainedConfig) -> int | None:
    """
    Maximum number of tokens that a model can read, or `None` for any.

    Example:

    ```python
    >>> from transformers import LlamaConfig, MambaConfig, XLNetConfig
    >>> [context_length(config) for config in (LlamaConfig(max_position_embeddings=256), MambaConfig(), XLNetConfig())]
    [256, None, None]

    ```
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return length if length > 0 else None  # XLNet says -1


def rope_switch(config: PretrainedConfig) -> int | None:
    """
    The number of tokens beyond which a model uses a different rope (`longrope`), or `None`. transformers chooses the
    rope for a whole batch, by its longest row.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    of_layers = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    limits = [each["original_max_position_embeddings"] for each in of_layers if each.get("rope_type") == "longrope"]
    return min(limits, default=None)


def attention_backends(device: torch.device) -> AbstractContextManager:
    """
    PyTorch's kernels of the scaled dot product, without cuDNN's. The backward pass of the latter can return NaN for a
    padded batch with a finite loss (seen with torch 2.11 on an H100, bf16).
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@contextmanager
def attention_named(config: PretrainedConfig, name: str) -> Iterator[None]:
    """Context in which the layers of the model with this `config` use a registered attention."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def forward_at(model: torch.nn.Module, positions: torch.Tensor, to_keep: bool, **inputs: torch.Tensor) -> Any:
    """
    Run `model` and keep the logits at chosen positions only.

    Args:
        model (`torch.nn.Module`): The model to call, wrapped by DDP or not.
        positions (`torch.Tensor` of shape `(batch, length)`, bool): True at positions whose logits are needed. For a
            single row also their indices, `(n,)`, int64.
        to_keep (`bool`): Result of [`accepts_logits_to_keep`]. If False, all logits are computed, and those not needed
            are dropped afterwards.
        inputs: `input_ids`, `attention_mask` and so on.

    Returns:
        The model's output with `logits` of shape `(positions.sum(), W)` or `(n, W)`, in the order of the batch's rows.
    """
    switch = rope_switch(get_base_model(getattr(model, "module", model)).config)
    if switch is not None and inputs["input_ids"].shape[1] > switch:
        return _forward_on_both_sides(model, switch, positions, to_keep, **inputs)
    return _forward_at(model, positions, to_keep, **inputs)


def _forward_on_both_sides(
    model: torch.nn.Module, switch: int, positions: torch.Tensor, to_keep: bool, **inputs: torch.Tensor
) -> Any:
    """[`forward_at`] in two passes: one up to `switch` tokens, and one for the rows with later positions."""
    is_beyond = (torch.arange(positions.shape[1], device=positions.device) >= switch).expand_as(positions)[positions]
    beyond = positions.clone()
    beyond[:, :switch] = False
    rows = beyond.any(-1)
    passes = []
    if not is_beyond.all() or not len(is_beyond):
        near = {name: tensor[:, :switch] for name, tensor in inputs.items()}
        passes.append(_forward_at(model, positions[:, :switch], to_keep, **near))
    if is_beyond.any():
        far = {name: tensor[rows] for name, tensor in inputs.items()}
        passes.append(_forward_at(model, beyond[rows], to_keep, **far))
    outputs = passes[0]
    order = is_beyond.int().argsort(stable=True).argsort()
    outputs.logits = torch.cat([each.logits for each in passes])[order.to(outputs.logits.device)]
    return outputs


def _forward_at(model: torch.nn.Module, positions: torch.Tensor, to_keep: bool, **inputs: torch.Tensor) -> Any:
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
def logits_of_row(model: torch.nn.Module, ids: list[int], count: int) -> torch.Tensor:
    """Logits at the last `count` tokens of a single row, `(count, W)`."""
    input_ids = torch.tensor([ids], device=get_base_model(model).get_input_embeddings().weight.device)
    positions = (torch.arange(len(ids), device=input_ids.device) >= len(ids) - count)[None]
    return forward_at(model, positions, accepts_logits_to_keep(model), input_ids=input_ids).logits


def room_to_look(model: torch.nn.Module, length: int) -> int:
    """`length`, or the maximum number of tokens that a model reads with one rope, if that is smaller."""
    config = get_base_model(model).config
    limits = [context_length(config), rope_switch(config)]
    return min([length, *(limit for limit in limits if limit is not None)])


def same_logits(model: torch.nn.Module, logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits `(n, W)` equal the expected ones at most of the rows, up to the rounding of the model."""
    base = get_base_model(model)
    kind = base.get_input_embeddings().weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
    if getattr(base.config, "quantization_config", None) is not None:  # computes in half precision
        dtype = torch.bfloat16
    tolerance = max(2 * torch.finfo(dtype).eps ** 0.5, 1e-2)  # covers TF32, which is not a dtype
    expected = expected.float()
    errors = (logits.float().to(expected.device) - expected).square().mean(-1).sqrt()
    # Rounding can route a token to another expert of a mixture. A real fault shows at every token
    return bool((errors - tolerance * expected.std(-1)).median() <= 0)  # false for NaN


@torch.no_grad()
def check_causal(model: torch.nn.Module, name: str, ids: list[int]) -> None:
    """
    Refuse a model whose forward pass does not give the distribution of each step, tested on some tokens `ids`.

    Args:
        model (`torch.nn.Module`): In eval mode.
        name (`str`): What to call it in an error message.
        ids (`list[int]`): One or more.

    Raises:
        `ValueError`: If logits depend on later tokens, or on other rows.
    """
    count = room_to_look(model, _PROBED_LENGTH)
    ids = (ids * count)[:count]
    length = max(1, len(ids) // 2)
    rows = torch.tensor([ids[:length] + [0] * (len(ids) - length), ids])
    positions = torch.zeros_like(rows, dtype=torch.bool)
    positions[:, :length] = True
    device = get_base_model(model).get_input_embeddings().weight.device
    to_keep = accepts_logits_to_keep(model)
    logits = forward_at(model, positions.to(device), to_keep, input_ids=rows.to(device)).logits
    alone = logits_of_row(model, ids[:length], length)
    if not logits.isfinite().all() or not alone.isfinite().all():  # reported where the logits are used
        return
    if not all(same_logits(model, each, alone) for each in (logits[:length], logits[length:])):
        raise ValueError(
            f"The logits of the {name} (`{type(get_base_model(model)).__name__}`) at a token depend on later tokens, "
            "so a pass over a completion does not give the distributions of its steps. Choose a model that reads from "
            "left to right."
        )


@torch.no_grad()
def next_token_log_probs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token after each of some tokens, `(len(ids), W)`, on the CPU."""
    input_ids = torch.tensor([ids], device=get_base_model(model).get_input_embeddings().weight.device)
    outputs = model(input_ids=input_ids, use_cache=False, **without_routers(model))
    return outputs.logits[0].float().log_softmax(-1).cpu()


def divergence(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> float:
    """Mean of `D_KL(p || q)` in nats over rows of log-probabilities. Infinite if it is not a number."""
    nats = torch.nn.functional.kl_div(other_log_probs, log_probs, reduction="sum", log_target=True) / len(log_probs)
    return nats.nan_to_num(nan=float("inf")).item()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to another device, without waiting for a GPU's pending work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def hidden_states_at(model: torch.nn.Module, positions: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor | None:
    """
    The inputs of the output head at chosen positions.

    Args:
        model (`torch.nn.Module`): The model.
        positions (`torch.Tensor` of shape `(n,)`, int64): Positions in the flattened batch.
        input_ids (`torch.Tensor` of shape `(batch, length)`): Ids, padded on the right.

    Returns:
        `(n, hidden_size)`, from which `get_output_embeddings()` computes the logits. `None` if [`head_makes_logits`]
        is false, or if more than one pass is needed.
    """
    switch = rope_switch(get_base_model(model).config)
    beyond = switch is not None and input_ids.shape[1] > switch
    if beyond or not head_makes_logits(model, input_ids):
        return None
    hidden_states = get_base_model(model).get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden_states.flatten(0, 1)[positions]


def head_makes_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> bool:
    """
    Whether a model's logits are exactly its output head applied to its last hidden states. Some models also scale or
    cap them, or mask tokens. This is tested once per model, on a few tokens of `input_ids` `(batch, length)`.
    """
    base = get_base_model(model)
    if base not in _HEAD_MAKES_LOGITS:
        decoder, head = base.get_decoder(), base.get_output_embeddings()
        # `get_decoder` can return the model with its head
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
