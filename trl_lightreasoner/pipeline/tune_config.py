"""Settings of `tune`: those of a run, which make the first setting that is tried, and those of the search."""

from dataclasses import dataclass, field
from typing import Any

from ..config_checks import check_init_kwargs, check_whole_numbers
from .run_config import RunConfig
from .search_space import load_space, read_space


@dataclass
class TuneConfig(RunConfig):
    """
    Configuration class for [`tune`] and `lightreasoner tune`. It has the fields of [`RunConfig`], too: those that
    control the training make the default setting, which is the first that is tried.

    Parameters:
        num_held_out (`int`, *optional*, defaults to `500`):
            How many questions, from the last, are held back from the choice. They are answered once, at the end, by
            the expert, by the default setting and by the best one; at most a third of the rows.
        num_validation (`int`, *optional*, defaults to `300`):
            How many questions, before those, every setting answers while it is trained and at its end. Their accuracy
            chooses; at most a third of the rows.
        num_trials (`int`, *optional*, defaults to `20`):
            How many settings are tried, the default one included. It can be raised to search on in the same folder.
        space (`dict[str, Any]` or `str`, *optional*):
            YAML file with the search space: by field, a list of values or `low`, `high` and `log`; in Python and in a
            config file also the fields themselves. They can be beta, learning_rate, max_steps, lora_r, lora_alpha and
            lora_target_modules. If `None`, it is beta from 0.4 to 3, learning_rate from 3e-5 to 1e-3 and max_steps
            from 50 to 250, all of them logarithmic.
    """

    num_held_out: int = field(
        default=500,
        metadata={
            "help": "How many questions, from the last, are held back from the choice. They are answered once, at the "
            "end, by the expert, by the default setting and by the best one; at most a third of the rows."
        },
    )
    num_validation: int = field(
        default=300,
        metadata={
            "help": "How many questions, before those, every setting answers while it is trained and at its end. "
            "Their accuracy chooses; at most a third of the rows."
        },
    )
    num_trials: int = field(
        default=20,
        metadata={
            "help": "How many settings are tried, the default one included. It can be raised to search on in the same "
            "folder."
        },
    )
    space: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "YAML file with the search space: by field, a list of values or `low`, `high` and `log`; in "
            "Python and in a config file also the fields themselves. They can be beta, learning_rate, max_steps, "
            "lora_r, lora_alpha and lora_target_modules. If `None`, it is beta from 0.4 to 3, learning_rate from 3e-5 "
            "to 1e-3 and max_steps from 50 to 250, all of them logarithmic."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_rounds != 1:
            raise ValueError(
                "A search tries settings of one round. Leave out `num_rounds`, and give `run` what it finds."
            )
        check_whole_numbers(self, ("num_held_out", "num_validation", "num_trials"))
        if isinstance(self.space, str) and self.space.lstrip().startswith("{"):
            check_init_kwargs(self, ("space",))
        self.space = load_space(self.space)  # what it holds, not where it lies, is a setting
        self.parameters = read_space(self.space)
