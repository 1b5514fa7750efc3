"""Check before training that the model can be saved, and after it that the saved files match the trained weights."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, logging

from ..models.adapter_loading import unknown_tensors
from ..models.forward import divergence, evaluating, next_token_log_probs
from ..models.loading import left_out, load_model, name_parts
from ..models.weights import get_base_model, lies_beside
from .adapters import is_quantized


logger = logging.get_logger(__name__)

# What FSDP, activation checkpointing and `torch.compile` put into the names of a model's parts
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def warn_of_left_out(model: PreTrainedModel, name: str, **kwargs: Any) -> None:
    """Warn of the tensors of a checkpoint that will not be saved. `kwargs` are those of [`left_out`]."""
    if lost := left_out(model, name, **kwargs):
        logger.warning(
            f"{len(lost):,} tensors of {name!r} are not part of the trained language model and will not be saved: "
            f"{name_parts(lost)}."
        )


def rehearse(model: PreTrainedModel | PeftModel, save: Callable[[str], None]) -> None:
    """
    Save everything but the weights of a full model into a temporary folder, to find errors before training.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model, not yet trained.
        save (`Callable`): Saves the other files of a model into a folder.

    Raises:
        `ValueError`: If anything cannot be saved, or the adapter changes when it is reloaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            (model if isinstance(model, PeftModel) else model.config).save_pretrained(folder)
            save(folder)
        except Exception as error:
            raise ValueError(
                f"The trained model could not be saved: {' '.join(str(error).split()).rstrip('.')}. Fix this before "
                "training."
            ) from error
        if _has_its_base(model):
            check_saved(model, folder, [])


def keep_weights(model: torch.nn.Module, state_dict: dict[str, torch.Tensor] | None, folder: str) -> str:
    """Write the trained weights with safetensors after `save_pretrained` has failed, and return the path."""
    os.makedirs(folder, exist_ok=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    every = state_dict or model.state_dict()
    path = os.path.join(folder, "trained_weights.safetensors")
    save_file({name: every[name].detach().cpu().contiguous() for name in trained if name in every}, path)
    return path


def check_saved(model: PreTrainedModel | PeftModel, folder: str, ids: list[int], **kwargs: Any) -> None:
    """
    Compare a model with its saved files. A LoRA adapter is loaded into the model in place. Anything else is loaded as
    a second model, such as an adapter that changes the base model's weights at creation, and both read the same
    tokens.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The trained model, on a single device.
        folder (`str`): Folder of the saved model.
        ids (`list[int]`): Tokens for both to read. kwargs: For [`load_model`].

    Raises:
        `ValueError`: If they differ. The saved files are kept.
    """
    if _has_its_base(model):
        difference = _differing_tensor(model, folder)
    else:
        difference = _differing_logits(model, folder, ids, **kwargs)
    if difference is not None:
        raise ValueError(
            f"The files saved in {folder!r} differ from the trained weights: {difference}. The files are kept. Train "
            "an adapter that can be reloaded, such as LoRA with PEFT's default `init_lora_weights`, or all weights."
        )


def check_gathered(model: PreTrainedModel | PeftModel, state_dict: dict[str, torch.Tensor], folder: str) -> None:
    """
    Compare the saved files of a model that is sharded over several processes with its trained tensors, name by name.
    If that is not possible, a warning is logged.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The trained model.
        state_dict (`dict[str, torch.Tensor]`): Its full tensors, gathered from all processes.
        folder (`str`): Folder of the saved model.

    Raises:
        `ValueError`: If they differ. The saved files are kept.
    """
    trained = {_WRAPPERS.sub("", name) for name, each in model.named_parameters() if each.requires_grad}
    adapter = re.escape(model.active_adapter) if isinstance(model, PeftModel) else None
    saved = _list_saved(Path(folder))
    for name in sorted(trained):
        # PEFT saves tensors without the adapter's name
        place = name if adapter is None else re.sub(rf"\.(modules_to_save\.)?{adapter}(?=\.|$)", "", name)
        place = place.removesuffix(".weight") if place.endswith(".lora_magnitude_vector.weight") else place  # DoRA
        if name not in state_dict or place not in saved:
            logger.warning(
                f"The files in {folder!r} cannot be compared with the trained weights: the processes did not gather "
                f"{name!r}, or it has another name in the files. Evaluate the saved model before you rely on it."
            )
            return
        with safe_open(saved[place], framework="pt") as file:
            on_disk = file.get_tensor(place)
        if not torch.allclose(on_disk, state_dict[name].cpu().to(on_disk.dtype), rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"The files saved in {folder!r} differ from the trained weights: {name!r} has different values. The "
                "files are kept. Save again, or resume from the last checkpoint."
            )


def _list_saved(folder: Path) -> dict[str, Path]:
    """The file of every tensor that was saved in a folder."""
    saved: dict[str, Path] = {}
    for pattern in ("model*.safetensors", "adapter_model.safetensors"):
        for path in folder.glob(pattern):
            with safe_open(path, framework="pt") as file:
                saved |= dict.fromkeys(file.keys(), path)
    return saved


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
                return f"{name!r} was trained, but is missing"
            if not torch.allclose(trained[name], value, rtol=0, atol=0, equal_nan=True):
                trained[name].copy_(value)
                return f"{name!r} has different values"
    unknown = unknown_tensors(result.unexpected_keys, model)
    return f"{min(unknown)!r} does not belong to the model" if unknown else None


def _differing_logits(model: PreTrainedModel | PeftModel, folder: str, ids: list[int], **kwargs: Any) -> str | None:
    base = get_base_model(model)
    if isinstance(model, PeftModel) and not base.config._name_or_path:
        logger.warning(
            f"The files in {folder!r} cannot be compared with the trained weights: the base model has no name."
        )
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
        logger.warning(f"There is not enough memory to load {folder!r} and compare it with the model.")
        return None
    limit = 1e-4 if base.dtype == torch.float32 else 1e-2  # difference due to rounding
    return None if nats <= limit else f"reloaded, it differs by {nats:.2g} nats per token"
