"""Arguments that are no good, and settings that are, but not beside each other: refused before weights are loaded."""

import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import TrainingArguments

from ..grading.verdicts import check_math_verify


def check_arguments(train_dataset: Any, peft_config: Any) -> None:
    """Refuse arguments of a trainer that are not what they must be."""
    if train_dataset is None:
        raise ValueError("`train_dataset` is required")
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` must be a `peft.PeftConfig` instance (e.g. `peft.LoraConfig`), got "
            f"{type(peft_config).__name__}."
        )
    if not isinstance(train_dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(train_dataset).__name__}`."
        )


def check_combinations(
    args: TrainingArguments, quantization: Any, dtype: str | torch.dtype | None, adapter: bool
) -> None:
    """
    Refuse settings that cannot work together.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings of the training.
        quantization (`dict` or [`~transformers.BitsAndBytesConfig`], *optional*): How the model's weights are stored.
        dtype (`str` or `torch.dtype`, *optional*): Of the weights that are not quantized.
        adapter (`bool`): Whether an adapter is trained, and not all weights.

    Raises:
        `ValueError`: Naming the two settings and what to do.
    """
    quantization = quantization if isinstance(quantization, dict | None) else quantization.to_dict()
    bits = next((bits for bits in (4, 8) if (quantization or {}).get(f"load_in_{bits}bit")), None)
    if bits is not None and not adapter:
        raise ValueError(
            f"`load_in_{bits}bit` does not go with training all weights, since quantized weights cannot be updated. "
            "Train an adapter (`peft_config`; `--use_peft true` on the command line), or load the model unquantized."
        )
    # The gradient scaler, where it is not DeepSpeed's own, takes gradients in float32 only
    scales = args.mixed_precision == "fp16" and args.deepspeed_plugin is None
    if scales and bits is not None:
        raise ValueError(
            f"`fp16` does not go with `load_in_{bits}bit`, whose adapter is trained in bfloat16. Set `bf16` instead."
        )
    dtype = str(dtype).removeprefix("torch.")
    if scales and not adapter and dtype in ("float16", "bfloat16"):
        raise ValueError(
            f"`fp16` does not go with training all weights in {dtype}. Leave `dtype` out, for float32, or set `bf16`."
        )
    version = fsdp_version(args)
    if version is None or bits is None:
        return
    if bits == 8:
        raise ValueError(
            "`load_in_8bit` does not go with FSDP, which cannot split 8-bit weights. Launch with DDP, or set "
            "`load_in_4bit`, and `bnb_4bit_quant_storage` to float32."
        )
    # FSDP cannot split bytes. And where two bytes are stored as one bfloat16, PyTorch's `_foreach_copy_`, by which
    # FSDP2 gathers weights, turns each of the bit patterns that mean NaN into the same one: one in a thousand
    storage = str(quantization.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    if storage == "uint8" or version == 2 and storage != "float32":
        needed = "float32" if version == 2 else "bfloat16"
        raise ValueError(
            f"`load_in_4bit` goes with FSDP{version} only if `bnb_4bit_quant_storage` is {needed}, got {storage}. Set "
            "it so, or launch with DDP."
        )


def check_answers(args: TrainingArguments, has_rows: bool) -> None:
    """
    Refuse settings by which questions could not be answered while training, or their accuracy would go unused.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings of the training.
        has_rows (`bool`): Whether there are rows for `eval_loss` as well.

    Raises:
        `ValueError`: Naming the setting and what to do.
        `ImportError`: If math-verify is not installed.
    """
    check_math_verify()
    deepspeed = getattr(args.deepspeed_plugin, "hf_ds_config", None)
    sharded = "FSDP" if fsdp_version(args) is not None else None
    sharded = "DeepSpeed ZeRO-3" if deepspeed is not None and deepspeed.is_zero3() else sharded
    if sharded is not None:
        raise ValueError(
            f"`eval_questions` do not go with {sharded}: a model whose weights are split does not generate here. "
            "Launch with DDP, or leave them out and ask the checkpoints by `lightreasoner eval`."
        )
    if not has_rows and args.metric_for_best_model in ("loss", "eval_loss"):
        raise ValueError(
            "The best model cannot be told by `eval_loss` without an `eval_dataset`. Set "
            "`metric_for_best_model='accuracy'`, or hold kept steps out."
        )


def fsdp_version(args: TrainingArguments) -> int | None:
    """1 or 2 where the weights are split by PyTorch, through `args` or `accelerate launch`; otherwise `None`."""
    if args.fsdp_plugin_args is not None:
        return args.fsdp_plugin_args["fsdp_version"]
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return int(os.environ.get("FSDP_VERSION", "1"))
    return None
