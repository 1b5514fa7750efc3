"""What the commands share: a parser that answers a mistake in one sentence, and how a dataset is named."""

import argparse
import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml
from trl import TrlParser

from ..text import read_text


if TYPE_CHECKING:  # slow to import, and `--help` needs none of them
    from transformers import BitsAndBytesConfig
    from trl import ModelConfig


class ArgumentParser(TrlParser):
    """
    [`~trl.TrlParser`] whose mistakes are `ValueError`s of one sentence: unknown flags and keys are refused with the
    name that was probably meant, and a value in a YAML file must be what the flag would take.

    Args:
        dataclass_types (`Iterable[type]`): Dataclasses whose fields become flags.
        first (`str`, *optional*): Field whose values may come first, without their flag.
        hint (`str`, *optional*): What is said where a value stands in another place without a flag.
        kwargs: For [`argparse.ArgumentParser`].

    Example:

    ```python
    >>> from trl_lightreasoner.sampling.contrastive_sampling_config import ContrastiveSamplingConfig
    >>> (args,) = ArgumentParser([ContrastiveSamplingConfig]).parse(["--output_dir", "steps", "--beta", "5e-1"])
    >>> args.beta
    0.5
    >>> ArgumentParser([ContrastiveSamplingConfig]).parse(["--output_dir", "steps", "--bta", "0.5"])
    Traceback (most recent call last):
    ValueError: There is no flag `--bta`. Did you mean `--beta`?

    ```
    """

    def __init__(
        self,
        dataclass_types: Iterable[type],
        first: str | None = None,
        hint: str = "Settings are given as flags, such as `--output_dir DIR`.",
        **kwargs: Any,
    ):
        dataclass_types = list(dataclass_types)
        self._first, self._hint = first, hint
        self._hints = {name: str(hint) for each in dataclass_types for name, hint in get_type_hints(each).items()}
        super().__init__(dataclass_types=dataclass_types, allow_abbrev=False, **kwargs)
        # `parse` takes `--config` out before argparse sees it; declared for `--help`
        self.add_argument("--config", help="YAML file whose keys are the flags below. Flags override it.")

    def parse(self, args: Sequence[str]) -> tuple:
        """Instances of the dataclasses, from flags and from the YAML file that `--config` names."""
        if self._first is not None and args and not args[0].startswith("-"):
            args = [f"--{self._first}", *args]
        args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        unknown_keys: list[str] = []
        if "--config" in args:
            index = args.index("--config")
            if index + 1 == len(args) or args[index + 1].startswith("--"):
                raise ValueError("`--config` needs the path of a YAML file.")
            if "--config" in args[index + 1 :]:
                raise ValueError("`--config` can be given once.")
            # As `parse_args_and_config` does, which reads the file in the encoding of the locale
            config = _read_config(args[index + 1])
            os.environ.update({key: str(value) for key, value in config.pop("env", {}).items()})
            unknown_keys = self.set_defaults_with_config(**config)
            args = [*args[:index], *args[index + 2 :]]
        try:
            *parsed, unknown_flags = self.parse_args_into_dataclasses(args, return_remaining_strings=True)
        except json.JSONDecodeError as error:
            raise ValueError(f"A setting is not the JSON that it must be: {error.doc!r} ({error}).") from None
        for kind, unknown in (("key", unknown_keys), ("flag", unknown_flags)):
            if unknown:
                raise ValueError(self._unknown(kind, unknown[0]))
        return tuple(value for value in parsed if not isinstance(value, argparse.Namespace))

    def error(self, message: str):
        raise ValueError(f"{message[:1].upper()}{message[1:].rstrip('.')}.")

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        for action in self._actions:
            value = kwargs.get(action.dest)
            if action.dest not in ("help", "config") and value is not None:
                kwargs[action.dest] = self._as_flag_would(action, value)
        unknown = [key for key in ("help", "config") if key in kwargs]  # flags, but not settings
        return [f"--{key} {kwargs.pop(key)}" for key in unknown] + super().set_defaults_with_config(**kwargs)

    def _as_flag_would(self, action: argparse.Action, value: Any) -> Any:
        takes_list, hint = action.nargs in ("+", "*"), self._hints[action.dest]
        # What a flag can only hold as text
        if isinstance(value, dict) and "dict" in hint or isinstance(value, list) and "list" in hint and not takes_list:
            return value
        if isinstance(value, dict) or isinstance(value, list) != takes_list:
            raise ValueError(
                f"`{action.dest}` in the config file must be {'a list' if takes_list else 'one value'}, got {value!r}."
            )
        if value is False and "no" in (action.choices or ()):  # how YAML reads a bare `no`
            value = "no"
        values = [self._get_value_of(action, item) for item in (value if takes_list else [value])]
        return values if takes_list else values[0]

    def _get_value_of(self, action: argparse.Action, value: Any) -> Any:
        try:
            converted = self._get_value(action, str(value))
            self._check_value(action, converted)
        except argparse.ArgumentError as error:
            raise ValueError(f"`{action.dest}` in the config file: {error.message.rstrip('.')}.") from None
        return converted

    def _unknown(self, kind: str, name: str) -> str:
        if not name.startswith("--"):
            return f"Unexpected argument {name!r}. {self._hint}"
        name = re.split("[ =]", name)[0]
        names = [option for action in self._actions for option in action.option_strings]
        if kind == "key":
            name, names = name.removeprefix("--"), [action.dest for action in self._actions]
        close = [each for each in difflib.get_close_matches(name, names) if each not in ("help", "config")][:1]
        hint = f"Did you mean `{close[0]}`?" if close else "`--help` lists them all."
        return f"There is no {kind} `{name}`. {hint}"


def _read_config(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise ValueError(f"The config file {path!r} {'is a folder' if os.path.isdir(path) else 'does not exist'}.")
    try:
        config = yaml.safe_load(read_text(path, "The config file"))
    except yaml.YAMLError as error:
        raise ValueError(f"The config file is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f"The config file {path!r} must hold lines of the form `name: value`.")
    if not isinstance(config.get("env", {}), dict):
        raise ValueError(f"`env` in the config file {path!r} must hold lines of the form `NAME: value`.")
    return config


def quantization_of(model_args: "ModelConfig") -> "BitsAndBytesConfig | None":
    """The quantization that TRL's flags ask for; where no dtype is named, it computes in bfloat16."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    from trl import get_quantization_config  # with all that TRL's trainers need

    # TRL takes the dtype for the one to compute in as well, which has to be named
    dtype = "bfloat16" if model_args.dtype in (None, "auto") else model_args.dtype
    return get_quantization_config(replace(model_args, dtype=dtype))
