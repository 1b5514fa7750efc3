"""The trials of a search as a table and charts: accuracy over the trials, and against each varied setting."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any

import numpy as np

from .charts import Axis, Chart, figure, table, write_number, write_share


@dataclass(frozen=True)
class Trial:
    """
    One setting and its result.

    Attributes:
        number (`int`): Its number in the search.
        setting (`dict[str, Any]`): Its fields.
        accuracies (`dict[int, float]`): Accuracies during its training, by part of the training, in order.
        accuracy (`float`, *optional*): The final accuracy. `None` if the trial was stopped because others were better.
        is_default (`bool`): Whether it is the default setting.
        note (`str`): An additional remark.
    """

    number: int
    setting: dict[str, Any]
    accuracies: dict[int, float]
    accuracy: float | None
    is_default: bool = False
    note: str = ""

    @property
    def is_pruned(self) -> bool:
        return self.accuracy is None

    @property
    def last_accuracy(self) -> float | None:
        """The last known accuracy."""
        trained = [accuracy for part, accuracy in self.accuracies.items() if part > 0]
        return self.accuracy if self.accuracy is not None else trained[-1] if trained else None

    def remark(self) -> str:
        """The remark for a table, next to the accuracy."""
        parts = ["default"] if self.is_default else []
        parts += [self.note] if self.note else ["broken off"] if self.is_pruned else []
        return ", ".join(parts)


def write_value(value: Any) -> str:
    return write_number(value) if isinstance(value, int | float) else str(value)


def write_setting(setting: dict[str, Any], names: Sequence[str]) -> str:
    """
    Write the fields of a setting in one line.

    Example:

    ```python
    >>> write_setting({"beta": 0.8, "learning_rate": 0.0003, "seed": 0}, ["beta", "learning_rate"])
    'beta 0.8, learning_rate 0.0003'

    ```
    """
    values = ((name, setting[name]) for name in names)
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values
    )


@dataclass(frozen=True)
class SearchResult:
    """
    The trials of a search.

    Attributes:
        trials (`list[Trial]`): The finished trials, the default setting first.
        names (`list[str]`): The varied fields.
    """

    trials: list[Trial]
    names: list[str]

    @property
    def best(self) -> Trial:
        """The trial of highest accuracy. Of several it is the first, so that none replaces an equal default."""
        return max((trial for trial in self.trials if not trial.is_pruned), key=lambda trial: trial.accuracy or 0.0)

    @property
    def num_settings(self) -> int:
        """Number of different settings."""
        return len({tuple(trial.setting.values()) for trial in self.trials})

    def shown(self) -> list[Trial]:
        """The trials with an accuracy."""
        return [trial for trial in self.trials if trial.last_accuracy is not None]

    def best_so_far(self) -> tuple[list[int], list[float]]:
        """Numbers of the completed trials, and the highest accuracy up to each."""
        ended = [trial for trial in self.trials if not trial.is_pruned]
        return [trial.number for trial in ended], list(accumulate((trial.accuracy or 0.0 for trial in ended), max))

    def accuracy_range(self) -> tuple[float, float]:
        """The ends of an accuracy axis that shows all trials."""
        values = [each for trial in self.shown() for each in (trial.last_accuracy, trial.accuracies.get(0))]
        known = [value for value in values if value is not None]
        margin = max(0.02, 0.08 * (max(known) - min(known)))
        return max(0.0, min(known) - margin), min(1.0, max(known) + margin)


def trial_figures(search: SearchResult) -> str:
    """A table of all trials, and charts, as HTML."""
    trials, names = search.trials, search.names
    num_pruned = sum(trial.is_pruned for trial in trials)
    rows = [
        [
            f"{trial.number}",
            *(write_value(trial.setting[name]) for name in names),
            "" if trial.last_accuracy is None else write_share(trial.last_accuracy),
            ", ".join(filter(None, ["best" if trial is search.best else "", trial.remark()])),
        ]
        for trial in trials
    ]
    pruned = f" {num_pruned} of them were stopped early because others were better." if num_pruned else ""
    text = (
        f"<p>{len(trials)} settings were trained on the same steps and answered the same questions.{pruned} These "
        "accuracies chose the best setting, so its own accuracy here is optimistic.</p>"
    )
    head = ["Trial", *names, "Accuracy", ""]
    charts = [_over_trials(search), *(_against(name, search) for name in names)]
    return f'{text}<div class="card numbers trials">{table(head, rows)}</div><div class="grid">{"".join(charts)}</div>'


def _over_trials(search: SearchResult) -> str:
    trials = search.trials
    chart = Chart(Axis(-0.5, max(trial.number for trial in trials) + 0.5, label="Trial"), _y(search))
    numbers, highest = search.best_so_far()
    chart.line(np.repeat(numbers, 2)[1:], np.repeat(highest, 2)[:-1], "s1")
    _draw_points(chart, search, lambda trial: trial.number)
    if (before := trials[0].accuracies.get(0)) is not None:
        chart.level(before, "the expert")
    parts = sorted({part for trial in trials for part in trial.accuracies if part})
    rows = [
        [
            f"{trial.number}",
            *(write_share(trial.accuracies[part]) if part in trial.accuracies else "" for part in parts),
        ]
        for trial in trials
    ]
    text = (
        "A point is a setting, hollow if it was stopped early.<br>"
        '<span class="key"><i class="swatch s1"></i>best so far</span>'
    )
    head = ["Trial", *(f"part {part} of {parts[-1]}" for part in parts)]
    return figure("Accuracy over the trials", text, chart.html("Accuracy of each trial."), head, rows)


def _against(name: str, search: SearchResult) -> str:
    values = [trial.setting[name] for trial in search.trials]
    is_number = all(isinstance(value, int | float) for value in values)
    words = [] if is_number else list(dict.fromkeys(map(str, values)))

    def place(trial: Trial) -> float:
        return trial.setting[name] if is_number else words.index(str(trial.setting[name])) + 1

    if is_number:
        low, high = min(values), max(values)
        is_log = low > 0 and high > 5 * low
        pad = (high / low) ** 0.05 if is_log else 0.05 * (high - low) or 1
        ends = (low / pad, high * pad) if is_log else (low - pad, high + pad)
        axis = Axis(*ends, is_log=is_log, label=name)
    else:
        label = ", ".join(f"{i} = {word}" for i, word in enumerate(words, 1))
        axis = Axis(0.5, len(words) + 0.5, label=f"{name}: {label}")
    chart = Chart(axis, _y(search))
    _draw_points(chart, search, place)
    rows = [
        [write_value(trial.setting[name]), write_share(trial.last_accuracy or 0.0)]
        for trial in sorted(search.shown(), key=place)
    ]
    text = "The other fields differ from point to point."
    return figure(escape(name), text, chart.html(f"Accuracy against {name}."), [name, "Accuracy"], rows)


def _y(search: SearchResult) -> Axis:
    return Axis(*search.accuracy_range(), is_share=True, label="Accuracy")


def _draw_points(chart: Chart, search: SearchResult, place: Callable[[Trial], float]) -> None:
    shown = search.shown()
    styles = ["hollow" if trial.is_pruned else "" for trial in shown]
    chart.points([place(trial) for trial in shown], [trial.last_accuracy or 0.0 for trial in shown], styles)
