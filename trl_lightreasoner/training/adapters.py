"""From a model and the user's `peft_config` to the model that is trained, or a refusal."""

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model


def prepare_adapter(model: torch.nn.Module, peft_config: PeftConfig | None, revision: str | None) -> torch.nn.Module:
    """
    The model with its adapter, if it is to have one, and the adapter's weights in the dtype that they are trained in.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model, loaded.
        peft_config ([`~peft.PeftConfig`], *optional*): A new adapter.
        revision (`str`, *optional*): Revision of the model on the Hub.

    Raises:
        `ValueError`: If there would be two adapters, one that adds positions, or nothing to train.
    """
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "You passed a `PeftModel` instance together with a `peft_config` to the trainer. Please first merge "
                "and unload the existing adapter, save the resulting base model, and then pass that base model along "
                "with the new `peft_config` to the trainer."
            )
        model = get_peft_model(model, peft_config, revision=revision)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} is not supported: it adds positions in front of the prompt. "
            "Use LoRA or another method that changes weights."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The model has no trainable parameter. Load the adapter with `is_trainable=True`, or pass a `peft_config`."
        )
    # QLoRA's adapter weights are bf16, as in its paper; DoRA's magnitude vector would freeze in bf16.
    if is_quantized(model):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def as_target_modules(names: list[str]) -> str | list[str]:
    """
    Names of layers as PEFT takes them: a text alone is a pattern for it, which a plain name would never match.

    Example:

    ```python
    >>> as_target_modules(["q_proj"]), as_target_modules(["all-linear"]), as_target_modules([r".*\\.q_proj"])
    (['q_proj'], 'all-linear', '.*\\\\.q_proj')

    ```
    """
    is_name = len(names) > 1 or names[0].replace(".", "_").isidentifier()
    return list(names) if is_name else names[0]


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether bitsandbytes holds the model's weights in 4 or 8 bits."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def is_plain_lora(model: PeftModel) -> bool:
    """Whether all adapters are LoRA without DoRA's magnitudes."""
    return all(isinstance(config, LoraConfig) and not config.use_dora for config in model.peft_config.values())
