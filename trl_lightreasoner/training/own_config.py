"""Convert the config that the user passed into a `LightReasonerConfig`."""

import copy
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments, logging

from ..models.weights import short_name
from .lightreasoner_config import LightReasonerConfig


logger = logging.get_logger(__name__)

_SHARED = {field.name for field in fields(TrainingArguments)}
# Also in TRL's configs, with the same meaning. (Their `beta` has another meaning.)
_SHARED |= {"model_init_kwargs", "trust_remote_code", "max_length"}


def own_config(args: TrainingArguments | None, model: Any) -> LightReasonerConfig:
    """
    A copy of the user's settings, which the trainer may change, or the defaults for a model.

    Args:
        args ([`LightReasonerConfig`] or [`~transformers.TrainingArguments`], *optional*): The settings. If they are
            another trainer's, those that the user changed are kept, and a warning lists what is ignored or replaced.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model, which gives the default
            folder its name.

    Raises:
        `TypeError`: If `args` is neither.
    """
    if args is None:
        args = LightReasonerConfig(f"{short_name(model)}-LightReasoner")
    elif not isinstance(args, TrainingArguments):
        raise TypeError(f"`args` must be a `LightReasonerConfig` or `TrainingArguments`, got `{type(args).__name__}`.")
    elif not isinstance(args, LightReasonerConfig):
        args = _convert(args)
    args = copy.copy(args)
    args.accelerator_config = copy.copy(args.accelerator_config)
    return args


def _convert(args: TrainingArguments) -> LightReasonerConfig:
    changed = _changed_settings(args)
    # The user did not choose the other trainer's defaults, and ours are the ones that were measured
    converted = LightReasonerConfig(**{name: value for name, value in changed.items() if name in _SHARED})
    notes = [f"`args` is a config of another trainer, `{type(args).__name__}`."]
    if ignored := [f"`{name}`" for name in changed if name not in _SHARED]:
        notes.append(f"`LightReasonerTrainer` ignores its {', '.join(ignored)}.")
    if replaced := _replaced_defaults(args, converted, changed):
        notes.append(f"Unset fields take the defaults of `LightReasonerConfig`: {', '.join(replaced)}.")
    if len(notes) > 1:
        logger.warning(" ".join([*notes, "Pass a `LightReasonerConfig` to set them all."]))
    return converted


def _replaced_defaults(args: TrainingArguments, converted: LightReasonerConfig, changed: dict[str, Any]) -> list[str]:
    replaced = []
    for name in [field.name for field in fields(args) if field.name in _SHARED - changed.keys()]:
        ours, other = getattr(converted, name), getattr(args, name)
        if ours == other or not (ours or other):  # `None` and `False` mean the same
            continue
        if name == "max_steps":
            other = f"{args.num_train_epochs:g} epochs"
        replaced.append(f"`{name}` = {ours} (not {other})")
    return replaced


def _changed_settings(args: TrainingArguments) -> dict[str, Any]:
    """The settings that differ from the defaults of their class, both as declared and as set by `__post_init__`."""
    always = {"output_dir": args.output_dir, "use_cpu": args.use_cpu}
    try:
        completed = vars(type(args)(**always))
    except (TypeError, ValueError):  # the class has other arguments, or a default that this machine does not allow
        completed = {}
    changed = {}
    for field in fields(args):
        value = getattr(args, field.name)
        if field.init and value not in (_default(field), completed.get(field.name, MISSING)):
            changed[field.name] = value
    return {**changed, **always}


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
