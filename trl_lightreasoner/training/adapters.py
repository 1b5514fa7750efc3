"""From a model and the user's `peft_config` to the model to train, or a refusal."""

import re
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset
from peft import AdaLoraModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..models.adapter_loading import load_adapter_config
from ..models.forward import check_causal, evaluating
from ..models.loading import add_quantization, hub_kwargs, load_config, resolve_dtype
from ..steps.beta import has_corrections
from .combinations import check_combinations
from .lightreasoner_config import LightReasonerConfig


def plan_loading(
    model: str | PreTrainedModel | PeftModel,
    args: LightReasonerConfig,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
) -> tuple[dict[str, Any], PretrainedConfig, bool]:
    """
    How the model of a trainer is loaded. The arguments are the trainer's.

    Returns:
        The arguments of [`~trl_lightreasoner.models.loading.load_model`], the model's config, and whether an adapter
        is trained, and not all weights.

    Raises:
        `ValueError`: If the model cannot be used, or its quantization or dtype not be trained.
    """
    kwargs = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # no text by now
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    kwargs = add_quantization(kwargs, model, quantization_config, "trainer")
    config = load_config(model, **kwargs)
    trains_adapter = (
        peft_config is not None
        or not isinstance(model, str)  # the folder may hold one
        or load_adapter_config(model, **hub_kwargs(kwargs)) is not None
    )
    quantization = None
    if isinstance(model, str):
        quantization = kwargs.get("quantization_config")
        # Full training uses fp32 weights. Frozen weights keep the dtype of the sampling
        dtype = kwargs.get("dtype", "auto" if trains_adapter else "float32")
        kwargs["dtype"] = resolve_dtype(dtype, config, args.device.type, quantization)
    dtype = config.dtype if kwargs.get("dtype") == "auto" else kwargs.get("dtype")
    quantization = quantization or getattr(config, "quantization_config", None)
    check_combinations(args, quantization, dtype, trains_adapter)
    return kwargs, config, trains_adapter


def prepare_adapter(model: torch.nn.Module, peft_config: PeftConfig | None, revision: str | None) -> torch.nn.Module:
    """
    The model with its adapter, if any, with the adapter's weights in their training dtype.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model, loaded.
        peft_config ([`~peft.PeftConfig`], *optional*): A new adapter.
        revision (`str`, *optional*): Revision of the model on the Hub.

    Raises:
        `ValueError`: If there are two adapters, or nothing to train.
    """
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "You passed a `PeftModel` instance together with a `peft_config` to the trainer. Please first merge "
                "and unload the existing adapter, save the resulting base model, and then pass that base model along "
                "with the new `peft_config` to the trainer."
            )
        model = get_peft_model(model, peft_config, revision=revision)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The model has no trainable parameter. Load the adapter with `is_trainable=True`, or pass a `peft_config`."
        )
    # QLoRA's adapter weights are bf16, as in its paper. DoRA's magnitude vector would not change in bf16.
    if is_quantized(model):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def check_forward(model: torch.nn.Module, ids: list[int]) -> None:
    """
    Refuse a model whose forward pass does not give the distribution of each step, or does not run with its adapter.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model with its adapter.
        ids (`list[int]`): Tokens to test it on.

    Raises:
        `ValueError`: If so.
    """
    try:
        with evaluating(model):
            check_causal(model, "model", ids)
    except (RuntimeError, AttributeError, TypeError) as error:
        if not isinstance(model, PeftModel) or should_reduce_batch_size(error):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"The model does not run with its adapter: {reason}. Choose other `target_modules`."
        ) from error


def target_modules(names: list[str] | None) -> str | list[str] | None:
    """
    The `target_modules` of an adapter, from a list on the command line: names of modules, or one pattern.

    Example:

    ```python
    >>> target_modules(["q_proj"]), target_modules(["all-linear"]), target_modules([r".*[qv]_proj"])
    (['q_proj'], 'all-linear', '.*[qv]_proj')

    ```
    """
    # PEFT reads text as a pattern that must match the whole name of a module
    if names is None or len(names) != 1 or re.fullmatch(r"[\w.]+", names[0]):
        return names
    return names[0]


def choose_target_modules(dataset: Dataset | IterableDataset, model_type: str) -> list[str]:
    """
    The default layers of a new adapter.

    If the steps that diverge most hold corrections ([`has_corrections`]), these are PEFT's defaults for the
    architecture, usually the query and value projections. Otherwise they are all linear layers (docs/evidence.md).

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows from [`ContrastiveStepSampler`].
        model_type (`str`): The model type, from its config.

    Example:

    ```python
    >>> choose_target_modules(dataset, "qwen2")  # doctest: +SKIP
    ['q_proj', 'v_proj']

    ```
    """
    named = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    return list(named) if named and has_corrections(dataset) else ["all-linear"]


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether bitsandbytes stores the model's weights in 4 or 8 bits."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def is_plain_lora(model: PeftModel) -> bool:
    """Whether all adapters are LoRA without DoRA's magnitudes."""
    return all(isinstance(config, LoraConfig) and not config.use_dora for config in model.peft_config.values())


class AllocateRanks(TrainerCallback):
    """
    Lets AdaLoRA reallocate its ranks after every update, which PEFT leaves to the trainer.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer whose model has the adapter.

    Raises:
        `ValueError`: When training begins, if it would end before AdaLoRA reaches its final ranks.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    @property
    def _tuner(self) -> AdaLoraModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False).base_model

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        config = self._tuner.peft_config[self._tuner.trainable_adapter_name]
        if config.total_step - config.tfinal > state.max_steps - 1:
            raise ValueError(
                f"AdaLoRA prunes its ranks until update {config.total_step - config.tfinal} (`total_step` minus "
                f"`tfinal`), but training makes {state.max_steps}. Set `total_step={state.max_steps}`, and `tinit` "
                "and `tfinal` to parts of it."
            )

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        for parameter in self._tuner.parameters():
            # A skipped update says nothing about ranks
            if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
                parameter.grad = torch.zeros_like(parameter)
        self._tuner.update_and_allocate(state.global_step)
