"""What a loaded model says of itself: where it comes from, a checksum of its weights, and settled 4-bit layers."""

import hashlib
from typing import Any

import torch
from peft import PeftModel


def settle_4bit_layers(model: torch.nn.Module) -> torch.nn.Module:
    """
    The model itself, whose 4-bit layers no forward pass changes any more. To be called before the first one.

    On a CPU with AVX512-BF16 bitsandbytes repacks the weights for inference in the first pass in evaluation mode;
    training then gets wrong gradients, and saving wrong weights. On any device it casts the biases.

    Raises:
        `ValueError`: If the weights are repacked already.
    """
    for module in model.modules():
        if not hasattr(module, "compute_type_is_set"):  # which bitsandbytes' `Linear4bit` alone has
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "The 4-bit weights of the model were repacked for inference on this CPU by a forward pass; it can no "
                "longer be trained or saved. Load it again and pass it before its first use, or give its path."
            )
        module.support_avx512bf16_for_cpu = False
        if module.bias is not None and module.compute_dtype is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)
    return model


def describe_model(model: torch.nn.Module, name: str | None = None) -> dict[str, Any]:
    """
    What tells one expert from another, in values that JSON can hold.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        name (`str`, *optional*): Id or path that the user gave; of an adapter, the model itself does not know it.
    """
    base = get_base_model(model)
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_diff_dict()
    return {
        "model": base.config._name_or_path,
        "revision": getattr(base.config, "_commit_hash", None),
        "dtype": str(base.dtype).removeprefix("torch."),
        "num_parameters": base.num_parameters(),
        "quantization": quantization and {key: str(value) for key, value in quantization.items()},
        "adapter": (name or list(model.active_adapters)) if isinstance(model, PeftModel) else None,
    }


def get_base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def weight_fingerprint(model: torch.nn.Module) -> str:
    """A checksum over the names, shapes, dtypes and bytes of all weights and the active adapters, on every device."""
    adapters = [model.active_adapters, model.get_model_status().enabled] if isinstance(model, PeftModel) else []
    digest = hashlib.sha256(str(adapters).encode())
    for name, tensor in model.state_dict().items():
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        whole = len(content) // 8 * 8
        words = content[:whole].view(torch.int64)
        # The sum (modulo 2**64) sees a change anywhere, the sample sees values that change places
        sample = words[:: max(1, len(words) // 64)].tolist()
        summary = [words.sum().item(), *sample, *content[whole:].tolist()]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {summary}".encode())
    return digest.hexdigest()
