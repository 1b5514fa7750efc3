"""Invalid arguments, and settings that cannot be combined, are refused before weights are loaded."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import TrainingArguments, logging

from ..grading.verdicts import check_math_verify


logger = logging.get_logger(__name__)

_SPEEDS = ("runtime", "samples_per_second", "steps_per_second")
_METRICS = ("loss", "entropy", "mean_token_accuracy", *_SPEEDS)


def check_arguments(train_dataset: Any, peft_config: Any, amateur_model: Any, sampling_args: Any) -> None:
    """Refuse invalid arguments of a trainer."""
    if train_dataset is None:
        raise ValueError("`train_dataset` is required")
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            "`peft_config` must be a `peft.PeftConfig` instance (e.g. `peft.LoraConfig`), got "
            f"{type(peft_config).__name__}."
        )
    if not isinstance(train_dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(train_dataset).__name__}`."
        )
    if sampling_args is not None and amateur_model is None:
        raise ValueError("`sampling_args` needs an `amateur_model` to sample with. Remove it, or give the amateur.")


def check_functions(
    compute_loss_func: Any,
    compute_metrics: Any,
    preprocess_logits_for_metrics: Any,
    train_dataset: Dataset | IterableDataset,
    sft_dataset: Any,
) -> None:
    """Refuse functions passed to a trainer that would omit something or never be called."""
    if preprocess_logits_for_metrics is not None and compute_metrics is None:
        raise ValueError("`preprocess_logits_for_metrics` needs `compute_metrics`, for which it prepares the logits.")
    if compute_loss_func is None:
        return
    is_weighted = "step_weights" in (train_dataset.column_names or ())
    if sft_dataset is not None or is_weighted:
        raise ValueError(
            "`compute_loss_func` does not receive "
            f"{'the `step_weights`' if is_weighted else 'the loss of `sft_dataset`'}, so the loss would lack it. "
            "Subclass the trainer and override `compute_loss` instead."
        )


def check_combinations(
    args: TrainingArguments, quantization: Any, dtype: str | torch.dtype | None, adapter: bool
) -> None:
    """
    Refuse settings that cannot work together, and warn of `fp16` on a CPU.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings of the training.
        quantization (`dict` or [`~transformers.BitsAndBytesConfig`], *optional*): Quantization of the model's weights.
        dtype (`str` or `torch.dtype`, *optional*): Data type of the weights that are not quantized.
        adapter (`bool`): Whether an adapter is trained, and not all weights.

    Raises:
        `ValueError`: If two settings conflict. The message names them and says what to do.
    """
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise ValueError(
            "`accelerator_config` cannot have `even_batches: false` with several processes: one with fewer batches "
            "would take part in no more updates or means, and the others would wait for it. Remove it."
        )
    quantization = quantization if isinstance(quantization, dict | None) else quantization.to_dict()
    bits = next((bits for bits in (4, 8) if (quantization or {}).get(f"load_in_{bits}bit")), None)
    if bits is not None and not adapter:
        raise ValueError(
            f"`load_in_{bits}bit` cannot be combined with training all weights: quantized weights cannot be updated. "
            "Train an adapter (`peft_config`; `--use_peft true` on the command line), or load the model unquantized."
        )
    if args.use_liger_kernel and args.device.type == "cpu":
        raise ValueError("`use_liger_kernel` needs a GPU. Remove it.")
    scales = _scales_gradients(args)
    if scales and bits is not None:
        raise ValueError(
            f"`fp16` cannot be combined with `load_in_{bits}bit`, whose adapter is trained in bfloat16. Set `bf16` "
            "instead."
        )
    if scales and args.device.type == "cpu":  # accelerate ignores it without a word
        logger.warning("`fp16` needs a GPU, so this CPU computes as without it. Set `bf16` for half precision here.")
    dtype = str(dtype).removeprefix("torch.")
    if scales and not adapter and dtype in ("float16", "bfloat16"):
        raise ValueError(
            f"`fp16` cannot be combined with training all weights in {dtype}. Remove `dtype` to train in float32, or "
            "set `bf16`."
        )
    version = fsdp_version(args)
    if version is None or bits is None:
        return
    if bits == 8:
        raise ValueError(
            "`load_in_8bit` cannot be combined with FSDP, which cannot split 8-bit weights. Launch with DDP, or set "
            "`load_in_4bit`, and `bnb_4bit_quant_storage` to float32."
        )
    # FSDP1 splits what is of one dtype, FSDP2 what is no bytes. And where two bytes are stored as one bfloat16,
    # PyTorch's `_foreach_copy_`, by which FSDP2 gathers weights, turns each of the bit patterns that mean NaN into the
    # same one: one in a thousand
    storage = str(quantization.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    needed = "float32" if version == 2 or dtype == "None" else dtype
    if storage != needed:
        raise ValueError(
            f"`load_in_4bit` works with FSDP{version} only if `bnb_4bit_quant_storage` is {needed}, got {storage}. "
            "Change it, or launch with DDP."
        )


def check_rope(args: TrainingArguments, switch: int | None, train_dataset: Any, eval_dataset: Any) -> None:
    """
    Refuse rows that need a second pass with another rope if several processes must make equal numbers of passes.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings of the training.
        switch (`int`, *optional*): Result of [`~trl_lightreasoner.models.forward.rope_switch`] for the model.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows from `prepare_rows`.
        eval_dataset (the same, or a `dict` of them, *optional*): Likewise.

    Raises:
        `ValueError`: If a row may have kept steps beyond the switch.
    """
    if switch is None or args.world_size == 1 or (args.max_length is not None and args.max_length <= switch):
        return
    sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for dataset in [train_dataset, *(each for each in sets if each is not None)]:
        if isinstance(dataset, IterableDataset) or any(
            len(row["prompt_ids"]) + row["step_positions"][-1] > switch for row in dataset
        ):
            raise ValueError(
                f"The model reads contexts beyond {switch} tokens with another rope (longrope), which several "
                f"processes cannot train. Set `max_length={switch}`, or train in one process."
            )


def check_trained_weights(args: TrainingArguments, model: torch.nn.Module) -> None:
    """
    Refuse weights that cannot be trained in their dtype.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings of the training.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model with its adapter.

    Raises:
        `ValueError`: If there is such a weight. The message names it and says what to do.
    """
    trained = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    half = next((name for name, dtype in trained.items() if dtype in (torch.float16, torch.bfloat16)), None)
    if _scales_gradients(args) and half is not None:
        raise ValueError(
            f"`fp16` cannot be combined with trained weights in {str(trained[half]).removeprefix('torch.')}, such as "
            f"{half}. Load the model with `dtype='float32'`, or set `bf16` instead."
        )
    # Otherwise accelerate casts them for FSDP2
    is_cast = args.mixed_precision != "no" and not getattr(model, "is_loaded_in_4bit", False)
    if fsdp_version(args) == 2 and not is_cast and len(set(trained.values())) > 1:
        one, other = {dtype: name for name, dtype in trained.items()}.values()
        raise ValueError(
            f"FSDP2 needs all trained weights in one dtype, but {one} is in {trained[one]} and {other} in "
            f"{trained[other]}. Remove everything beyond plain LoRA (`use_dora`, `bias`, `modules_to_save`), or "
            "launch with DDP."
        )


def check_metric(args: TrainingArguments, sets: Iterable[str], has_questions: bool, adapter: bool) -> None:
    """
    Refuse a `metric_for_best_model` that no evaluation reports.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings of the training.
        sets (`Iterable[str]`): Names of the evaluated sets of rows, a single `""` if they are not in a `dict`.
        has_questions (`bool`): Whether there are questions to answer.
        adapter (`bool`): Whether an adapter is trained, which makes the expert available.

    Raises:
        `ValueError`: If there is no such metric. The message names those that exist.
    """
    if args.eval_strategy == "no" or args.metric_for_best_model is None:
        return
    names = [*_METRICS, "kl_to_expert"] if adapter else _METRICS
    known = [f"{each}_{name}".strip("_") for each in sets for name in names]
    known += ["accuracy", "accuracy_standard_error", "accuracy_num_cut"] if has_questions else []
    if args.metric_for_best_model.removeprefix("eval_") not in known:
        raise ValueError(
            f"`metric_for_best_model` must be an evaluated metric, got {args.metric_for_best_model!r}. Choose from "
            f"{', '.join(name for name in known if not name.endswith(_SPEEDS))}."
        )


def check_answers(args: TrainingArguments, has_rows: bool) -> None:
    """
    Refuse settings with which questions cannot be answered during training, or their accuracy would be unused.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings of the training.
        has_rows (`bool`): Whether there are rows for `eval_loss` as well.

    Raises:
        `ValueError`: If there is such a setting. The message names it and says what to do.
        `ImportError`: If math-verify is not installed.
    """
    check_math_verify()
    deepspeed = getattr(args.deepspeed_plugin, "hf_ds_config", None)
    sharded = "FSDP" if fsdp_version(args) is not None else None
    sharded = "DeepSpeed ZeRO-3" if deepspeed is not None and deepspeed.is_zero3() else sharded
    if sharded is not None:
        raise ValueError(
            f"`eval_questions` cannot be combined with {sharded}: a model with split weights cannot generate here. "
            "Launch with DDP, or remove them and evaluate the checkpoints with `lightreasoner eval`."
        )
    if not has_rows and args.metric_for_best_model in ("loss", "eval_loss"):
        raise ValueError(
            "The best model cannot be chosen by `eval_loss` without an `eval_dataset`. Set "
            "`metric_for_best_model='accuracy'`, or hold out kept steps."
        )


def _scales_gradients(args: TrainingArguments) -> bool:
    """Whether there is a gradient scaler other than DeepSpeed's own. It accepts only float32 gradients."""
    return args.mixed_precision == "fp16" and args.deepspeed_plugin is None


def fsdp_version(args: TrainingArguments) -> int | None:
    """1 or 2 if PyTorch's FSDP splits the weights, through `args` or `accelerate launch`. Otherwise `None`."""
    if args.fsdp_plugin_args is not None:
        return args.fsdp_plugin_args["fsdp_version"]
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return int(os.environ.get("FSDP_VERSION", "1"))
    return None
