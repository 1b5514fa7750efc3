"""Readable logs of a training: one line per entry, next to the progress bar if there is one."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments


# Shown by the bar already, or reported at the end
_LEFT_OUT = ("epoch", "total_flos", "train_loss", "num_tokens")


def log_in_lines(trainer: Trainer) -> None:
    """Let a trainer print lines instead of the dictionaries of [`~transformers.Trainer`]."""
    for callback, lines in ((ProgressCallback, _LinesBesideBar), (PrinterCallback, _Lines)):
        if trainer.pop_callback(callback) is not None:
            trainer.add_callback(lines)


def as_line(logs: dict[str, Any], update: int) -> str:
    """
    An entry of the log as text, empty if nothing of it is news.

    Example:

    ```python
    >>> as_line({"loss": 0.13214, "learning_rate": 7.5e-05, "num_nonfinite_updates": 0, "epoch": 1.0}, 10)
    'update 10: loss 0.1321, learning_rate 7.5e-05'

    ```
    """
    shown = {
        name: value
        for name, value in logs.items()
        if name not in _LEFT_OUT and not name.endswith(("_runtime", "_per_second"))
    }
    if not shown.get("num_nonfinite_updates", 1):
        del shown["num_nonfinite_updates"]
    parts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()]
    return f"update {update}: {', '.join(parts)}" if parts else ""


class _Lines(TrainerCallback):
    def on_log(self, args: Arguments, state: State, control: Control, logs: Any = None, **kwargs: Any) -> None:
        line = as_line(logs, state.global_step)
        if state.is_world_process_zero and line:
            print(line, flush=True)


class _LinesBesideBar(ProgressCallback):
    def on_log(self, args: Arguments, state: State, control: Control, logs: Any = None, **kwargs: Any) -> None:
        line = as_line(logs, state.global_step)
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(line)
