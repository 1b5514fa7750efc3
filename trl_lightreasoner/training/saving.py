"""Can the model be saved, and is what lies on the disk what was trained? The first is tried before training."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel, logging

from ..generation.completions import evaluating
from ..models.forward import divergence, next_token_log_probs
from ..models.loading import left_out, load_model
from ..models.weights import get_base_model, lies_beside
from .adapters import is_quantized


logger = logging.get_logger(__name__)


def warn_of_left_out(model: PreTrainedModel, name: str, **kwargs: Any) -> None:
    """Say which tensors of a checkpoint will not be in what is saved of it; `kwargs` as of [`left_out`]."""
    if lost := left_out(model, name, **kwargs):
        logger.warning(
            f"{len(lost):,} tensors of {name!r}, such as {lost[0]!r}, are no part of the language model that is "
            "trained, and will not be in what is saved."
        )


def rehearse(model: PreTrainedModel | PeftModel, save: Callable[[str], None]) -> None:
    """
    Save what can be refused into a folder that is thrown away: everything but the weights of a whole model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model, not yet trained.
        save (`Callable`): Saves what lies beside a model into a folder.

    Raises:
        `ValueError`: If anything cannot be saved, or is another adapter when it is loaded again.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            (model if isinstance(model, PeftModel) else model.config).save_pretrained(folder)
            save(folder)
        except Exception as error:
            raise ValueError(
                f"What is to be trained could not be saved afterwards: {' '.join(str(error).split()).rstrip('.')}. "
                "Mend that first."
            ) from error
        if _has_its_base(model):
            check_saved(model, folder, [])


def keep_weights(model: torch.nn.Module, state_dict: dict[str, torch.Tensor] | None, folder: str) -> str:
    """Write the trained weights by safetensors alone, where `save_pretrained` has failed, and return the path."""
    os.makedirs(folder, exist_ok=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    every = state_dict or model.state_dict()
    path = os.path.join(folder, "trained_weights.safetensors")
    save_file({name: every[name].detach().cpu().contiguous() for name in trained if name in every}, path)
    return path


def check_saved(model: PreTrainedModel | PeftModel, folder: str, ids: list[int], **kwargs: Any) -> None:
    """
    Compare a model with what was saved of it. A LoRA adapter is loaded into the model in place; anything else, such as
    an adapter that changes the base model's weights when it is made, is loaded anew, and both read the same tokens.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As it was trained, all of it on one device.
        folder (`str`): Where it was saved.
        ids (`list[int]`): Tokens that both read.
        kwargs: For [`load_model`].

    Raises:
        `ValueError`: If they differ. What was saved stays.
    """
    if _has_its_base(model):
        difference = _differing_tensor(model, folder)
    else:
        difference = _differing_logits(model, folder, ids, **kwargs)
    if difference is not None:
        raise ValueError(
            f"What was saved in {folder!r} is not what was trained: {difference}. The files stay as they are. Train "
            "an adapter that can be loaded again, such as LoRA with PEFT's default `init_lora_weights`, or all "
            "weights."
        )


def _has_its_base(model: torch.nn.Module) -> bool:
    return isinstance(model, PeftModel) and all(map(lies_beside, model.peft_config.values()))


def _differing_tensor(model: PeftModel, folder: str) -> str | None:
    name = model.active_adapter
    weights = load_peft_weights(folder if name == "default" else os.path.join(folder, name), device="cpu")
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    before = {name: each.detach().clone() for name, each in trained.items()}
    result = set_peft_model_state_dict(model, weights, name)
    with torch.no_grad():
        for name, value in before.items():
            if name in result.missing_keys:
                return f"{name!r} was trained, and is not there"
            if not torch.allclose(trained[name], value, rtol=0, atol=0, equal_nan=True):
                trained[name].copy_(value)
                return f"{name!r} has other values"
    return f"{result.unexpected_keys[0]!r} has no place in the model" if result.unexpected_keys else None


def _differing_logits(model: PreTrainedModel | PeftModel, folder: str, ids: list[int], **kwargs: Any) -> str | None:
    base = get_base_model(model)
    if isinstance(model, PeftModel) and not base.config._name_or_path:
        logger.warning(f"Whether {folder!r} holds what was trained cannot be told: the base model has no name.")
        return None
    if is_quantized(base):
        kwargs["quantization_config"] = base.config.quantization_config
    kwargs["device_map"] = None if base.device.type == "cpu" else {"": base.device}
    kwargs["attn_implementation"] = base.config._attn_implementation
    try:
        loaded = load_model(folder, dtype=base.dtype, **kwargs)
        with evaluating(model, loaded):
            nats = divergence(next_token_log_probs(model, ids), next_token_log_probs(loaded, ids))
    except torch.OutOfMemoryError:
        logger.warning(f"The memory does not hold what is in {folder!r} beside the model, to compare the two.")
        return None
    limit = 1e-4 if base.dtype == torch.float32 else 1e-2  # what rounding makes of it
    return None if nats <= limit else f"loaded again, it differs by {nats:.2g} nats a token"
