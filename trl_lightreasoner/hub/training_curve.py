"""The curve of a training: as a picture, and as a table of a few rows."""

import importlib.util
import math
from typing import TYPE_CHECKING

from .card_parts import table


if TYPE_CHECKING:
    from transformers import TrainerState


_ACCURACY, _ACCURACY_ERROR = "eval_accuracy", "eval_accuracy_standard_error"
_CURVE = (
    *("loss", "entropy", "mean_token_accuracy"),
    *(_ACCURACY, _ACCURACY_ERROR, "eval_loss", "eval_entropy", "eval_kl_to_expert"),
)
_MAX_CURVE_ROWS = 20


def draw_curve(state: "TrainerState", path: str) -> bool:
    """
    Draw loss, entropy and accuracy over the updates, and say whether it was done: matplotlib must be installed and
    something have been logged.
    """
    logs = _merged_logs(state)
    if importlib.util.find_spec("matplotlib") is None or len(logs) < 2:
        return False
    from matplotlib.figure import Figure

    answered = [(step, log[_ACCURACY], log[_ACCURACY_ERROR]) for step, log in logs.items() if _ACCURACY in log]
    panels = [("loss", "eval_loss", "eval_kl_to_expert"), ("entropy", "eval_entropy")]
    count = len(panels) + bool(answered)
    figure = Figure(figsize=(4 * count, 3), layout="constrained")
    every = list(figure.subplots(1, count))
    if answered:
        axes = every.pop(0)
        steps, accuracies, errors = zip(*answered, strict=True)
        axes.errorbar(steps, accuracies, yerr=errors, fmt="o-", markersize=3, capsize=3, label=_ACCURACY)
        axes.legend()
        axes.set(xlabel="update", ylabel="share, +- standard error")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes, names in zip(every, panels, strict=True):
        highest = 0.0
        for name in names:
            points = [(step, log[name]) for step, log in logs.items() if name in log]
            if points:
                axes.plot(*zip(*points, strict=True), "o-" if len(points) < 30 else "-", markersize=3, label=name)
                highest = max(highest, *(value for _, value in points if math.isfinite(value)), 1e-6)
        if axes.lines:
            axes.legend()
            axes.set_ylim(0, 1.1 * highest)
        axes.set(xlabel="update", ylabel="nats, at kept steps")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)
    return True


def curve_table(state: "TrainerState") -> str:
    logs = list(_merged_logs(state).items())
    if len(logs) > _MAX_CURVE_ROWS:  # the first, the last, others at equal distances, and those with an accuracy
        last = len(logs) - 1
        shown = {round(i * last / (_MAX_CURVE_ROWS - 1)) for i in range(_MAX_CURVE_ROWS)}
        answered = [i for i, (_, log) in enumerate(logs) if _ACCURACY in log]
        shown |= set(answered[:: 1 + len(answered) // _MAX_CURVE_ROWS])
        logs = [logs[i] for i in sorted(shown)]
    names = [name for name in _CURVE if name != _ACCURACY_ERROR and any(name in log for _, log in logs)]

    def cell(log: dict[str, float], name: str) -> str:
        error = f" +- {log[_ACCURACY_ERROR]:.2g}" if name == _ACCURACY and name in log else ""
        return f"{log[name]:.3g}{error}" if name in log else ""

    rows = [[f"{step:,}", *(cell(log, name) for name in names)] for step, log in logs]
    return table(["update", *names], rows) if rows else ""


def _merged_logs(state: "TrainerState") -> dict[int, dict[str, float]]:
    """What was logged at each update, of training and evaluation together."""
    logs: dict[int, dict[str, float]] = {}
    for log in state.log_history:
        values = {name: log[name] for name in _CURVE if name in log}
        if values:
            logs.setdefault(log["step"], {}).update(values)
    return dict(sorted(logs.items()))
