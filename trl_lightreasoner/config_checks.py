"""Checks of fields that several configs share. Each refuses a value with a sentence that names the field."""

import json
import math
import os
from collections.abc import Iterable
from typing import Any

from .text import read_text


def check_args(args: Any, kind: type) -> None:
    """Refuse `args` that are no settings of this kind."""
    if not isinstance(args, kind):
        raise TypeError(f"`args` must be a `{kind.__name__}`, got `{type(args).__name__}`.")


def check_init_kwargs(config: Any, names: Iterable[str]) -> None:
    for name in names:  # given as JSON on the command line
        setattr(config, name, _as_dict(name, getattr(config, name), '{"revision": "main"}'))


def check_template_kwargs(config: Any) -> None:
    value = _as_dict("chat_template_kwargs", config.chat_template_kwargs, '{"enable_thinking": false}')
    config.chat_template_kwargs = value
    if value and config.prompt_style == "raw":
        raise ValueError(
            "`prompt_style='raw'` cannot be combined with `chat_template_kwargs`: plain text has no chat template."
        )


def check_json_files(config: Any, names: Iterable[str]) -> None:
    """Refuse the name of a file that is missing or holds no JSON object. JSON itself and dicts are left alone."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, str) or value.lstrip().startswith("{"):
            continue
        if not os.path.isfile(value):
            raise ValueError(
                f"The file {value!r} of `{name}` does not exist. Name a JSON file, or give the JSON itself."
            )
        try:
            content = json.loads(read_text(value, f"The file of `{name}`"))
        except json.JSONDecodeError as error:
            raise ValueError(f"The file {value!r} of `{name}` is not JSON ({error}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"The file {value!r} of `{name}` must hold a JSON object, got {content!r}.")


def check_choices(config: Any, names: Iterable[str], optional: Iterable[str] = ()) -> None:
    for name in (*names, *optional):
        value, choices = getattr(config, name), config.__dataclass_fields__[name].metadata["choices"]
        if value not in choices and not (value is None and name in optional):
            raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def check_output_dir(config: Any) -> None:
    if not config.output_dir or not isinstance(config.output_dir, str | os.PathLike):
        raise ValueError(f"`output_dir` must name a folder, got {config.output_dir!r}.")
    config.output_dir = os.path.expanduser(config.output_dir)  # as TrainingArguments does


def check_flags(config: Any, names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"`{name}` must be true or false, got {getattr(config, name)!r}.")


def check_numbers(config: Any, names: Iterable[str]) -> None:
    for name in names:
        if isinstance(getattr(config, name), bool) or not isinstance(getattr(config, name), int | float):
            raise ValueError(f"`{name}` must be a number, got {getattr(config, name)!r}.")


def check_finite(config: Any, names: Iterable[str], optional: Iterable[str] = ()) -> None:
    for name in (*names, *optional):
        value = getattr(config, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and 0 <= value < math.inf) and not (value is None and name in optional):
            raise ValueError(f"`{name}` must be a finite number, 0 or more, got {value!r}.")


def check_whole_numbers(config: Any, names: Iterable[str], optional: Iterable[str] = (), least: int = 1) -> None:
    for name in (*names, *optional):
        value = getattr(config, name)
        if value is not None or name not in optional:
            check_whole_number(name, value, least)


def check_whole_number(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be a whole number, {least} or more, got {value!r}.")


def check_amateur_settings(config: Any) -> None:
    for name in ("amateur_chat_template", "amateur_system_prompt", "amateur_prompt_template"):
        if not isinstance(getattr(config, name), str | None):
            raise ValueError(f"`{name}` must be text, got {getattr(config, name)!r}.")
    check_whole_numbers(config, (), optional=("amateur_num_skipped_layers",))
    layers = config.amateur_skipped_layers
    if layers is None:
        return
    is_list = isinstance(layers, list | tuple) and len(layers) > 0
    if not is_list or any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers):
        raise ValueError(
            f"`amateur_skipped_layers` must be a list of numbers of layers, from 0, such as [8, 9], got {layers!r}."
        )
    if config.amateur_num_skipped_layers is not None:
        raise ValueError(
            "`amateur_skipped_layers` and `amateur_num_skipped_layers` cannot be combined. Name the layers, or say "
            "how many."
        )
    config.amateur_skipped_layers = sorted(set(layers))


def check_label_settings(config: Any) -> None:
    check_numbers(config, ("contrast_strength", "expert_anchor"))
    for name in ("contrast_strength", "expert_anchor"):
        # It multiplies the fp32 rounding of a log-probability, which above this value would show in the label
        if not 0 <= getattr(config, name) <= 100:
            raise ValueError(f"`{name}` must be a number from 0 to 100, got {getattr(config, name)}.")
    if config.contrast_strength == config.expert_anchor == 0:
        raise ValueError(
            "`contrast_strength` and `expert_anchor` are both 0, which makes every plausible token of a label equally "
            "probable. The paper uses 1 and 0. 0 and 1 give the expert's own distribution."
        )


def check_vllm_settings(config: Any) -> None:
    if not str(config.vllm_server_base_url).startswith(("http://", "https://")):
        raise ValueError(
            "`vllm_server_base_url` must be a URL such as 'http://localhost:8000', got "
            f"{config.vllm_server_base_url!r}."
        )
    if not 0 < config.vllm_server_timeout < float("inf"):
        raise ValueError(
            f"`vllm_server_timeout` must be a number of seconds above 0, got {config.vllm_server_timeout}."
        )
    if not 0 < config.vllm_gpu_memory_utilization <= 1:
        raise ValueError(f"`vllm_gpu_memory_utilization` must be in (0, 1], got {config.vllm_gpu_memory_utilization}.")


def _as_dict(name: str, value: Any, example: str) -> dict[str, Any] | None:
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
    if not isinstance(value, dict | None):
        raise ValueError(f"`{name}` must be a dict or a JSON object, such as '{example}', got {given!r}.")
    return value
