"""Facts about a loaded model: its origin, a checksum of its weights, and stable 4-bit layers."""

import hashlib
import json
import re
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard

import torch


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftConfig, PeftModel


_BLOCK = 2**20  # number of words that are summed together
_CACHED_BLOCK = 2**15  # on a CPU, as many as one thread computes alone. Several wait for each other on busy cores
# What LoRA adds to a model, and how PEFT renames the tensors of the layers that it wraps
_ADDED = re.compile(r"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.")
_WRAPPED = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.)")
# Arguments of `from_pretrained` that say where to find or put a model, or that its weights, dtype or attention show
_ELSEWHERE = (
    *("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "force_download", "subfolder"),
    *("device_map", "max_memory", "low_cpu_mem_usage", "offload_folder", "use_safetensors"),
    *("dtype", "torch_dtype", "attn_implementation", "quantization_config"),
)


def settle_4bit_layers(model: torch.nn.Module) -> torch.nn.Module:
    """
    Keep forward passes from changing a model's 4-bit layers, and return the model. Call it before the first pass.

    On a CPU with AVX512-BF16, bitsandbytes repacks the weights for inference in the first pass in evaluation mode.
    After that, gradients and saved weights are wrong. On any device it casts the biases.

    Raises:
        `ValueError`: If the weights have been repacked already.
    """
    for module in model.modules():
        if not hasattr(module, "compute_type_is_set"):  # only bitsandbytes' `Linear4bit` has it
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "The 4-bit weights of the model were repacked for inference on this CPU by a forward pass, so it can "
                "no longer be trained or saved. Load it again and pass it before its first use, or give its path."
            )
        module.support_avx512bf16_for_cpu = False
        if module.bias is not None and module.compute_dtype is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)
    return model


def describe_model(model: torch.nn.Module, name: str | None = None) -> dict[str, Any]:
    """
    Facts that distinguish one expert from another, as JSON-serializable values.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        name (`str`, *optional*): Id or path that the user gave. A loaded adapter does not know its own.
    """
    base = get_base_model(model)
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_diff_dict()
    return {
        "model": base.config._name_or_path,
        "revision": getattr(base.config, "_commit_hash", None),
        "dtype": str(base.dtype).removeprefix("torch."),
        "attention": getattr(base.config, "_attn_implementation", None),
        "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type,
        "num_parameters": base.num_parameters(),
        "quantization": quantization and {key: str(value) for key, value in quantization.items()},
        "adapter": (name or list(model.active_adapters)) if is_peft_model(model) else None,
    }


def leaves_base(config: "PeftConfig") -> bool:
    """
    Whether the base model says what it said before, once an adapter is off. Trained biases and replicated layers stay
    as they are.
    """
    init = getattr(config, "init_lora_weights", True)
    stays = getattr(config, "bias", "none") != "none" or getattr(config, "layer_replication", None)
    return init in (True, False, "gaussian", "eva", "orthogonal") and not stays


def lies_beside(config: "PeftConfig") -> bool:
    """Whether an adapter is LoRA that, unlike PiSSA and similar ones, does not change the base model's weights."""
    from peft import LoraConfig

    return type(config) is LoraConfig and config.init_lora_weights in (True, False, "gaussian", "eva", "orthogonal")


def comes_off(config: "PeftConfig") -> bool:
    """Whether PEFT's `unload` gives the base model back as it was. Whole modules that were trained stay in it."""
    return lies_beside(config) and leaves_base(config) and not config.modules_to_save


def check_bare(model: Any, name: str) -> None:
    """
    Refuse a loaded model on whose layers `get_peft_model` has put an adapter, with which it answers in the base
    model's name. `name` is what to call it.

    Raises:
        `ValueError`: If it is one, and the adapter is on.
    """
    if not isinstance(model, torch.nn.Module) or "peft" not in sys.modules or is_peft_model(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    is_told = getattr(model, "_hf_peft_config_loaded", False)  # by `add_adapter` of transformers
    layers = [] if is_told else [each for each in model.modules() if isinstance(each, BaseTunerLayer)]
    if any(not layer.disable_adapters for layer in layers):
        raise ValueError(
            f"The {name} has an adapter on its layers, where `get_peft_model` or a training has put it, so it is no "
            "longer the base model. Pass the `PeftModel` to use the adapter. To leave it out, call that model's "
            "`unload()`, or load the base model again."
        )


def is_peft_model(model: Any) -> "TypeGuard[PeftModel]":
    """Whether it is a [`~peft.PeftModel`]. PEFT is not imported for this."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def get_base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def short_name(model: "str | torch.nn.Module") -> str:
    """The last part of the id or path of a model, for folders that are named after it."""
    name = model if isinstance(model, str) else get_base_model(model).config._name_or_path
    return name.rstrip("/").split("/")[-1]


def weight_fingerprint(model: torch.nn.Module) -> str:
    """A checksum of the names, shapes, dtypes and bytes of all weights and active adapters, equal on every device."""
    adapters = [model.active_adapters, model.get_model_status().enabled] if is_peft_model(model) else []
    return _checksum(model.state_dict(), adapters)


def base_fingerprint(model: "PeftModel") -> str:
    """The [`weight_fingerprint`] of the base model as it was before its plain LoRA adapters."""
    tensors = get_base_model(model).state_dict()
    return _checksum({_WRAPPED.sub("", name): each for name, each in tensors.items() if not _ADDED.search(name)}, [])


def _checksum(tensors: dict[str, torch.Tensor], adapters: list) -> str:
    sums: dict[torch.device, list[torch.Tensor]] = {}  # read at the end: each reading waits for the device
    factors: dict[torch.device, torch.Tensor] = {}  # make the sum depend on the position of a value
    drawn = torch.randint(-(2**63), 2**63 - 1, (_BLOCK,), generator=torch.Generator().manual_seed(0))
    rows = []
    for name, tensor in tensors.items():
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        whole = len(content) // 8 * 8
        blocks = content[:whole].view(torch.int64).split(_BLOCK)
        if tensor.device not in factors:
            factors[tensor.device], sums[tensor.device] = drawn.to(tensor.device), []
        factor = factors[tensor.device]
        sums[tensor.device] += [_weighted_sum(block, factor[: len(block)]) for block in blocks]
        rest = content[whole:].tolist() if whole < len(content) else []
        rows.append((f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor.device, len(blocks), rest))
    read = {device: iter(torch.stack(each).tolist()) for device, each in sums.items()}
    digest = hashlib.sha256(str(adapters).encode())
    for text, device, num_blocks, rest in rows:
        digest.update(f"{text} {[*islice(read[device], num_blocks), *rest]}".encode())
    return digest.hexdigest()


def _weighted_sum(words: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The sum of the products modulo 2**64. A low copy of a word's high bits makes them count too."""
    size = _CACHED_BLOCK if words.device.type == "cpu" else _BLOCK
    parts = zip(words.split(size), factor.split(size), strict=True)
    return torch.stack([(part >> 32).bitwise_xor_(part).mul_(by).sum() for part, by in parts]).sum()


def describe_loading(model: torch.nn.Module, role: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    What a model's results depend on besides its weights and their dtype, by the user's names.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        role (`str`): Such as `"expert"`.
        kwargs (`dict[str, Any]`): Arguments that it was loaded with. Only those that change its config are used.
    """
    settings = {name: value for name, value in kwargs.items() if name not in _ELSEWHERE}
    attention = getattr(get_base_model(model).config, "_attn_implementation", None)
    return {f"{role} attention": attention, f"{role} model_init_kwargs": json.loads(json.dumps(settings, default=str))}
