"""Names of flags: ours, TRL's, and those that users of other programs expect."""

import difflib
import re
from collections.abc import Collection, Mapping


# From our name to TRL's. Both work in every command, as a flag and as a key of a config file
_TRL_NAMES = {"expert": "model_name_or_path", "model": "model_name_or_path", "dataset_split": "dataset_train_split"}
# Names that users may expect. In each line, the first name is the one that they mean
_SYNONYMS = (
    ("expert", "model", "model_id", "model_path", "base_model", "teacher", "teacher_model"),
    ("model", "expert", "adapter", "adapter_path", "lora_path", "checkpoint"),
    ("amateur", "weak_model", "amateur_model", "draft_model"),
    ("base_model_name_or_path", "base_model"),
    ("dataset_split", "split"),
    ("file", "dataset_name", "dataset", "data", "dataset_path", "data_path"),
    ("dataset_name", "file", "dataset", "data", "dataset_path", "data_path", "train_file", "prompts"),
    ("benchmarks", "tasks", "benchmark", "dataset_name", "dataset"),
    ("dataset_config", "dataset_config_name", "subset"),
    ("prompt_column", "column", "text_column", "question_column", "dataset_text_field"),
    ("prompt_template", "template"),
    ("output_dir", "output", "output_path", "out", "out_dir", "save_dir"),
    ("num_prompts", "max_questions", "num_samples", "limit"),
    ("max_samples", "num_prompts", "num_samples", "limit"),
    ("max_new_tokens", "max_tokens", "max_completion_length"),
    ("per_device_train_batch_size", "per_device_batch_size", "batch_size", "per_device_eval_batch_size"),
    ("per_device_batch_size", "per_device_train_batch_size", "batch_size"),
    ("learning_rate", "lr"),
    ("num_train_epochs", "epochs", "num_epochs"),
    ("lora_r", "lora_rank", "rank"),
    ("lora_target_modules", "target_modules"),
    ("dtype", "torch_dtype", "precision"),
    ("resume_from_checkpoint", "resume"),
)


def other_names(fields: Collection[str]) -> dict[str, str]:
    """
    Other names of a command's fields, each with its field.

    Example:

    ```python
    >>> other_names(["model_name_or_path", "beta"])
    {'expert': 'model_name_or_path'}
    >>> other_names(["expert", "dataset_split"])
    {'model_name_or_path': 'expert', 'dataset_train_split': 'dataset_split'}

    ```
    """
    names: dict[str, str] = {}
    for ours, trls in _TRL_NAMES.items():
        if ours in fields and trls not in fields:
            names.setdefault(trls, ours)
        elif trls in fields and ours not in fields and trls not in names.values():
            names[ours] = trls
    return names


def shown_name(field: str, others: Mapping[str, str]) -> str:
    """The name of a field in help and messages: ours if TRL has another."""
    return next((name for name, each in others.items() if each == field and name in _TRL_NAMES), field)


def guess(name: str, known: Collection[str]) -> str | None:
    """
    The known name that the user probably meant.

    Example:

    ```python
    >>> guess("lr", ["learning_rate", "beta"]), guess("bta", ["learning_rate", "beta"])
    ('learning_rate', 'beta')

    ```
    """
    name = name.replace("-", "_")
    for first, *others in _SYNONYMS:
        if first in known and name in others:
            return first
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def settings_as_flags(text: str, flags: Mapping[str, str]) -> str:
    """
    Write the settings in a message as flags.

    Args:
        text (`str`): Message of the Python library.
        flags (`Mapping[str, str]`): From the name of a setting to its flag.

    Example:

    ```python
    >>> settings_as_flags("Set `prompt_style='raw'`, or `beta`.", {"prompt_style": "--prompt_style"})
    'Set `--prompt_style raw`, or `beta`.'

    ```
    """

    def as_flag(match: re.Match) -> str:
        name, value = match.groups()
        if name not in flags:
            return match[0]
        if value in ("True", "False", "None"):
            value = value.lower()
        return f"`{flags[name]}`" if value is None else f"`{flags[name]} {value.strip(chr(39) + chr(34))}`"

    return re.sub(r"`(\w+)(?:=([^`]+))?`", as_flag, text)
