"""The space of a search, from YAML: the fields to try, each with a range or a list of values."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig


if TYPE_CHECKING:
    from optuna import Trial


# Fields that `lightreasoner run` and `train` share and that need no second sampling
FIELDS: dict[str, type] = {
    "beta": float,
    "learning_rate": float,
    "max_steps": int,
    "lora_r": int,
    "lora_alpha": int,
    "lora_target_modules": str,
}
# Ranges in which the real pair and the tiny ones gained (docs/evidence.md). Layer names differ between models
DEFAULT_SPACE: dict[str, Any] = {
    "beta": {"low": 0.4, "high": 3.0, "log": True},
    "learning_rate": {"low": 3e-5, "high": 1e-3, "log": True},
    "max_steps": {"low": 50, "high": 250, "log": True},
}
_MIN_BETA = ContrastiveSamplingConfig.beta


@dataclass(frozen=True)
class Parameter:
    """
    One field of a setting and its values.

    Attributes:
        name (`str`): The field.
        choices (`list`, *optional*): Its values, if they are named one by one.
        low, high (`float`): The ends of its values otherwise.
        log (`bool`): Whether they are spread evenly on a logarithmic scale.
    """

    name: str
    choices: list | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def suggest(self, trial: "Trial") -> Any:
        """A value for a trial. Fractions have three significant digits."""
        if self.choices is not None:
            return trial.suggest_categorical(self.name, self.choices)
        if FIELDS[self.name] is int:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return float(f"{trial.suggest_float(self.name, self.low, self.high, log=self.log):.3g}")

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""
        return value in self.choices if self.choices is not None else self.low <= value <= self.high

    def ends(self) -> list:
        """All values that are named. If any value of the range is invalid, one of these is."""
        return [FIELDS[self.name](value) for value in self.choices or (self.low, self.high)]


def read_space(space: Mapping[str, Any] | str | None) -> list[Parameter]:
    """
    Read a search space.

    Args:
        space (`dict[str, Any]` or `str`, *optional*): For each field, a list of values or the keys `low`, `high` and
            `log`, or else the path of a YAML file that holds this. If `None`, it is `DEFAULT_SPACE`.

    Returns:
        `list[Parameter]`

    Raises:
        `ValueError`: If there is no such file or field, or its values are invalid.

    Example:

    ```python
    >>> read_space({"max_steps": [60, 125], "learning_rate": {"low": 1e-5, "high": "1e-3", "log": True}})[1].high
    0.001
    >>> read_space({"learning_rat": [1e-4]})
    Traceback (most recent call last):
    ValueError: `learning_rat` cannot be searched. Did you mean `learning_rate`?

    ```
    """
    space = load_space(space)
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"The search space must name a field and its values, {_example()}, got {space!r}.")
    return [_read_parameter(name, values) for name, values in space.items()]


def load_space(space: Mapping[str, Any] | str | None) -> Any:
    """The content of a YAML file, or the default space. Anything else is returned unchanged."""
    if not isinstance(space, str):
        return DEFAULT_SPACE if space is None else space
    file = Path(space).expanduser()
    if not file.is_file():
        reason = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"The search space {space!r} {reason}. It must be a YAML file, {_example()}.")
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The search space {space!r} is not valid YAML: {' '.join(str(error).split())}.") from None


def _example() -> str:
    return "such as `learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}` or `max_steps: [60, 125]`"


def _read_parameter(name: Any, values: Any) -> Parameter:
    if name not in FIELDS:
        close = difflib.get_close_matches(str(name), FIELDS)[:1]
        hint = f"Did you mean `{close[0]}`?" if close else f"Choose from {', '.join(FIELDS)}."
        raise ValueError(f"`{name}` cannot be searched. {hint}")
    if isinstance(values, list) and values:
        choices = [_read_value(name, value) for value in values]
        if len(set(choices)) < len(choices):
            raise ValueError(f"`{name}` in the search space names a value twice: {values!r}.")
        return Parameter(name, choices)
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        raise ValueError(
            f"`{name}` in the search space must be a list of values, or have `low`, `high` and optionally `log`, "
            f"{_example()}, got {values!r}."
        )
    if FIELDS[name] is str:
        raise ValueError(f"`{name}` in the search space must be a list of values, got {values!r}.")
    low, high = (_read_value(name, values[end]) for end in ("low", "high"))
    log = values.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"`log` of `{name}` in the search space must be true or false, got {log!r}.")
    if not low < high:
        raise ValueError(f"`low` of `{name}` in the search space must be less than `high`, got {low} and {high}.")
    if log and low <= 0:
        raise ValueError(f"`low` of `{name}` in the search space must be above 0 with `log: true`, got {low}.")
    return Parameter(name, None, low, high, log)


def _read_value(name: str, value: Any) -> Any:
    kind = FIELDS[name]
    if kind is str:  # names of layers, as a list or separated by spaces
        words = value if isinstance(value, list) else [value]
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"`{name}` in the search space must hold names of layers, got {value!r}.")
        return " ".join(part for word in words for part in word.split())
    number = value
    if isinstance(value, str):  # how YAML reads 1e-4
        try:
            number = float(value)
        except ValueError:
            pass
    is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if not is_number or kind is int and number != int(number):
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"`{name}` in the search space must hold {what}, got {value!r}.")
    if name == "beta" and 0 < number < _MIN_BETA:
        raise ValueError(
            f"`beta` in the search space must be 0 or at least {_MIN_BETA} nats, the sampling threshold, got "
            f"{value!r}."
        )
    return kind(number)
