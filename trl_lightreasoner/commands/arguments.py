"""What the commands share: a parser that reports a mistake in one sentence, and the quantization flags."""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml
from trl import TrlParser

from ..text import read_text
from .flag_names import guess, other_names, settings_as_flags, shown_name
from .help_page import HelpFormatter, make_sections, metavar


if TYPE_CHECKING:  # slow to import, and not needed for `--help`
    from transformers import BitsAndBytesConfig


# Short names, as in `--bf16` and `--fp16` of the Trainer
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def split_list(text: str) -> list[str]:
    """
    Split a text at commas, except within brackets, which patterns contain.

    Example:

    ```python
    >>> split_list("q_proj, v_proj"), split_list(r".*[0-9]{1,2}.*")
    (['q_proj', 'v_proj'], ['.*[0-9]{1,2}.*'])

    ```
    """
    parts = [part.strip() for part in re.split(r",(?![^\[({]*[\])}])", text)]
    return list(filter(None, parts)) or [text]


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser._print_message(parser.format_help(everything=True), sys.stdout)
        parser.exit()


class ConfigFileError(ValueError):
    """A mistake in a config file, whose settings are keys instead of flags."""


class ArgumentParser(TrlParser):
    """
    [`~trl.TrlParser`] that reports mistakes as `ValueError`s of one sentence. Unknown flags and keys are refused, with
    the name that was probably meant. A value in a YAML file must be one that the flag accepts.

    Args:
        dataclass_types (`Iterable[type]`): Dataclasses whose fields become flags.
        first (`str`, *optional*): Field whose values may come first, without their flag.
        hint (`str`, *optional*): Advice for a value without a flag in another place.
        common (`Sequence[str]`, *optional*): Fields that `--help` shows, besides those in sections. The others need
            `--help-all`. If `None`, `--help` shows all fields.
        refused (`Sequence[str]`, *optional*): Fields that the command refuses, which no help shows.
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
        common: Sequence[str] | None = None,
        refused: Sequence[str] = (),
        **kwargs: Any,
    ):
        dataclass_types = list(dataclass_types)
        self._first, self._hint, self._common, self._refused = first, hint, common, refused
        self._hints = {name: str(hint) for each in dataclass_types for name, hint in get_type_hints(each).items()}
        kwargs = {
            "formatter_class": HelpFormatter,
            "usage": "%(prog)s [--flag VALUE ...] [--config FILE.yaml]",
            **kwargs,
        }
        super().__init__(dataclass_types=dataclass_types, allow_abbrev=False, **kwargs)
        if common is not None:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="Show every flag and exit.")
        if dataclass_types:
            # `parse` removes `--config` before argparse sees it. It is declared for `--help`
            self.add_argument("--config", help="YAML file whose keys are flags without `--`. Flags override it.")
        self._fields = [action.dest for action in self._actions if action.dest in self._hints]
        self._other_names = other_names(self._fields)
        self._name_flags()

    def _name_flags(self) -> None:
        """Let every flag have its other names too, and show it by a single one."""
        for action in self._actions:
            if action.dest not in self._fields or action.const is False:  # `--no_...`
                continue
            names = [name for name, field in self._other_names.items() if field == action.dest]
            for name in {*names, *(name.replace("_", "-") for name in names)}:
                self._option_string_actions[f"--{name}"] = action
            shown = shown_name(action.dest, self._other_names)
            action.option_strings = [f"--{shown}"]
            if action.choices is None:
                action.metavar = metavar(action)
            # Help is written for Python, as the config's docstring is
            action.help = self.with_flags((action.help or "").replace("f `None`,", "f not set,"))

    def explain(self, error: Exception) -> str:
        """The message of an error, in terms of this command's flags."""
        return str(error) if isinstance(error, ConfigFileError) else self.with_flags(str(error))

    def with_flags(self, message: str) -> str:
        """A message with the settings of this command written as flags."""
        flags = {name: f"--{shown_name(name, self._other_names)}" for name in self._fields}
        return settings_as_flags(message, flags)

    def parse(self, args: Sequence[str]) -> tuple:
        """Instances of the dataclasses, from the flags and the YAML file of `--config`."""
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
            # Like `parse_args_and_config`, which would read the file in the encoding of the locale
            config = _read_config(args[index + 1])
            os.environ.update({key: str(value) for key, value in config.pop("env", {}).items()})
            unknown_keys = self.set_defaults_with_config(**config)
            args = [*args[:index], *args[index + 2 :]]
        try:
            self._check_flags(args, unknown_keys)
            parsed = self.parse_args_into_dataclasses(args)
        except json.JSONDecodeError as error:
            raise ValueError(f"A setting is not the JSON that it must be: {error.doc!r} ({error}).") from None
        return tuple(value for value in parsed if not isinstance(value, argparse.Namespace))

    def format_help(self, everything: bool = False) -> str:
        """The text of `--help`, or of `--help-all` with `everything`."""
        shown = [
            action
            for action in self._actions
            if action.dest not in self._refused and not (action.dest in self._fields and action.const is False)
        ]
        sections, others = make_sections(shown, self._common)
        if everything:
            sections["everything else"] = others
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if others and not everything:
            formatter.add_text(f"`--help-all` shows {len(others)} more flags.")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs == "+" and action.dest != self._first:  # whose file names may contain commas
            arg_strings = [part for each in arg_strings for part in split_list(each)]
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.choices is not None and "bfloat16" in action.choices:
            arg_string = _DTYPES.get(arg_string, arg_string)
        return super()._get_value(action, arg_string)

    def _check_flags(self, args: Sequence[str], unknown_keys: list[str]) -> None:
        """Refuse unknown keys and flags, and report all missing flags at once."""
        if unknown_keys:
            raise ConfigFileError(self._unknown("key", unknown_keys[0]))
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        given, unknown = self.parse_known_args(args)
        for action in required:
            action.required = True
        # What follows an unknown flag is its value
        sentences = [self._unknown("flag", arg) for i, arg in enumerate(unknown) if i == 0 or arg.startswith("--")]
        missing = [action.option_strings[0] for action in required if getattr(given, action.dest) is None]
        if missing:
            sentences.append(self.sentence(f"the following arguments are required: {', '.join(missing)}"))
        if sentences:
            raise ValueError(" ".join(sentences))

    def error(self, message: str):
        raise ValueError(self.sentence(message))

    def sentence(self, message: str) -> str:
        """A mistake that argparse has found, as a sentence."""
        return f"{message[:1].upper()}{message[1:].rstrip('.')}."

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        for name, field in self._other_names.items():
            if name in kwargs:
                if field in kwargs:
                    raise ConfigFileError(f"`{name}` and `{field}` in the config file are the same. Leave one out.")
                kwargs[field] = kwargs.pop(name)
        for action in self._actions:
            value = kwargs.get(action.dest)
            if value is None and action.required:
                kwargs.pop(action.dest, None)  # is missing, as if it were not in the file
            elif value is None and action.dest in kwargs and not self._may_be_none(action):
                raise ConfigFileError(f"`{action.dest}` in the config file has no value. Give it one, or remove it.")
            if action.dest not in ("help", "config") and value is not None:
                kwargs[action.dest] = self._as_flag_would(action, value)
        unknown = [key for key in ("help", "config") if key in kwargs]  # flags that are not settings
        return [f"--{key} {kwargs.pop(key)}" for key in unknown] + super().set_defaults_with_config(**kwargs)

    def _may_be_none(self, action: argparse.Action) -> bool:
        hint = self._hints.get(action.dest, "None")
        return action.default is None or "None" in hint or "Optional" in hint

    def _as_flag_would(self, action: argparse.Action, value: Any) -> Any:
        takes_list, hint = action.nargs in ("+", "*"), self._hints[action.dest]
        # A flag can hold these only as text
        if isinstance(value, dict) and "dict" in hint or isinstance(value, list) and "list" in hint and not takes_list:
            return value
        if isinstance(value, dict) or isinstance(value, list) != takes_list:
            raise ConfigFileError(
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
            raise ConfigFileError(f"`{action.dest}` in the config file: {error.message.rstrip('.')}.") from None
        return converted

    def _unknown(self, kind: str, name: str) -> str:
        if not name.startswith("--"):
            return f"Unexpected argument {name!r}. {self._hint}"
        name = re.split("[ =]", name)[0].removeprefix("--")
        prefix = "--" if kind == "flag" else ""
        meant = guess(name, [*self._fields, *self._other_names])
        hint = "`--help` lists them all."
        if meant is not None:
            meant = shown_name(self._other_names.get(meant, meant), self._other_names)
            hint = f"Did you mean `{prefix}{meant}`?"
        return f"There is no {kind} `{prefix}{name}`. {hint}"


def _read_config(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise ConfigFileError(
            f"The config file {path!r} {'is a folder' if os.path.isdir(path) else 'does not exist'}."
        )
    try:
        config = yaml.safe_load(read_text(path, "The config file"))
    except yaml.YAMLError as error:
        raise ConfigFileError(f"The config file is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ConfigFileError(f"The config file {path!r} must hold lines of the form `name: value`.")
    if not isinstance(config.get("env", {}), dict):
        raise ConfigFileError(f"`env` in the config file {path!r} must hold lines of the form `NAME: value`.")
    return config


def quantization_of(args: Any, dtype: str | None, prefix: str = "") -> "BitsAndBytesConfig | None":
    """
    The quantization set by TRL's flags, or `None`.

    Args:
        args: Arguments with the fields of [`~trl.ModelConfig`], or itself.
        dtype (`str`, *optional*): Data type of the weights that are not quantized. Without one it computes in
            bfloat16.
        prefix (`str`): Prefix of `load_in_4bit` and `load_in_8bit`, such as "amateur_".
    """
    bits = {name: getattr(args, prefix + name) for name in ("load_in_4bit", "load_in_8bit")}
    if not any(bits.values()):
        return None
    from trl import ModelConfig, get_quantization_config  # imports all that TRL's trainers need

    names = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
    how = {name: getattr(args, name) for name in names if hasattr(args, name)}
    # TRL also uses the dtype for computing, so it must be explicit
    return get_quantization_config(ModelConfig(dtype="bfloat16" if dtype in (None, "auto") else dtype, **bits, **how))
