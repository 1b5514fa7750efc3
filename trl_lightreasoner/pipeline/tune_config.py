"""Settings of `tune`: those of a run, which define the first trial, and those of the search."""

from dataclasses import dataclass
from typing import Any

from ..config_checks import check_init_kwargs, check_whole_numbers
from ..config_help import help_from_docstring
from .run_config import RunConfig
from .search_space import load_space, read_space


@dataclass
@help_from_docstring
class TuneConfig(RunConfig):
    """
    Configuration class for [`tune`] and `lightreasoner tune`. It also has the fields of [`RunConfig`]. Those that
    control the training are the default setting, which is tried first.

    Parameters:
        num_held_out (`int`, *optional*, defaults to `500`):
            Number of questions to hold out from the search, from the end of the dataset, at most a third of them.
            The expert, the default setting and the best setting answer them once, at the end.
        num_validation (`int`, *optional*, defaults to `300`):
            Number of validation questions, taken before the held-out ones, at most a third of them. Every setting
            answers them during and after its training, and the best accuracy wins.
        num_trials (`int`, *optional*, defaults to `20`):
            Number of settings to try, including the default one. Raise it to continue a search in the same folder.
        space (`dict[str, Any]` or `str`, *optional*):
            YAML file with the search space. Each field has a list of values, or `low`, `high` and `log`. Python code
            and config files can give the fields directly. The fields can be beta, learning_rate, max_steps, lora_r,
            lora_alpha and lora_target_modules. If `None`, the space is beta from 0.4 to 3, learning_rate from 3e-5 to
            1e-3 and max_steps from 50 to 250, all on a logarithmic scale.
    """

    num_held_out: int = 500
    num_validation: int = 300
    num_trials: int = 20
    space: dict[str, Any] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_rounds != 1:
            raise ValueError(
                "A search tries settings of a single round. Remove `num_rounds`, and pass the best setting to `run`."
            )
        check_whole_numbers(self, ("num_held_out", "num_validation", "num_trials"))
        if isinstance(self.space, str) and self.space.lstrip().startswith("{"):
            check_init_kwargs(self, ("space",))
        self.space = load_space(self.space)  # the setting is its content, not its path
        self.parameters = read_space(self.space)
