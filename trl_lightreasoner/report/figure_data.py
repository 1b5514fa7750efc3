"""The numbers of each figure of a report as CSV, under the name of its picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .csv_tables import Table, quoted, save_table, token_cells
from .shown_steps import ReportedDataset
from .training_curves import Curve
from .trials import SearchResult


def save_figure_data(
    datasets: list[ReportedDataset],
    curves: dict[str, dict[str, Curve]] | None,
    folder: Path,
    search: SearchResult | None = None,
) -> list[Path]:
    """
    Write the numbers of the figures.

    Args:
        datasets (`list[ReportedDataset]`): One or two.
        curves (`dict`, *optional*): Curves of a training, from [`load_curves`].
        folder (`Path`): An existing folder for the files.
        search ([`SearchResult`], *optional*): The trials of a search.

    Returns:
        `list[Path]`: The written files.
    """
    return [save_table(table, folder) for table in _tables(datasets, curves or {}, search)]


def _tables(
    datasets: list[ReportedDataset], curves: dict[str, dict[str, Curve]], search: SearchResult | None
) -> Iterator[Table]:
    names = [quoted(each.name) for each in datasets]
    numbers = [each.statistics for each in datasets]
    if all(each.num_known for each in numbers):
        rows: list[Sequence[Any]] = [
            (name, left, right, count, count / each.num_known)
            for name, each in zip(names, numbers, strict=True)
            for left, right, count in _between(*each.histogram())
        ]
        yield Table("kl_distribution", ("dataset", "nats_from", "nats_below", "steps", "share"), rows)
        rows = []
        for name, each in zip(names, numbers, strict=True):
            quantiles = [each.quantiles_by_position(quantile) for quantile in (0.5, 0.9, 0.99)]
            groups = _between(each.position_edges, each.steps_by_position, *quantiles)
            rows += [(name, left, right - 1, steps, *values) for left, right, steps, *values in groups if steps]
        head = ("dataset", "position_from", "position_to", "steps", "nats_50", "nats_90", "nats_99")
        yield Table("kl_along_trajectories", head, rows)
        rows = []
        for name, each in zip(names, numbers, strict=True):
            low = max(1e-7, each.beta_for(0.5))
            betas = np.geomspace(low, max(2 * low, each.highest), 200)
            rows += [(name, *pair) for pair in zip(betas, each.shares(betas), strict=True)]
        yield Table("share_kept", ("dataset", "beta_nats", "share"), rows)
        rows = [
            (name, left, right - 1, steps, kept)
            for name, each in zip(names, numbers, strict=True)
            for left, right, steps, kept in _between(
                each.position_edges, each.steps_by_position, each.kept_by_position
            )
        ]
        yield Table("kept_by_position", ("dataset", "position_from", "position_to", "steps", "kept_steps"), rows)
    if any(each.num_kept for each in numbers):
        rows = [
            (name, f"{size} or more" if size == len(each.support_counts) else size, count)
            for name, each in zip(names, numbers, strict=True)
            for size, count in enumerate(each.support_counts, 1)
        ]
        yield Table("label_support", ("dataset", "tokens", "kept_steps"), rows)
        rows = [
            (name, i / len(each.mass_counts), (i + 1) / len(each.mass_counts), count)
            for name, each in zip(names, numbers, strict=True)
            for i, count in enumerate(each.mass_counts)
        ]
        yield Table("label_mass", ("dataset", "from", "to", "kept_steps"), rows)
        for i, dataset in enumerate(datasets):
            rows = [
                (*token_cells(dataset.texts, token.token_id), token.gain, token.num_steps)
                for token in dataset.statistics.gains()
            ]
            name = "tokens" if len(datasets) == 1 else f"tokens_{i + 1}"
            yield Table(name, ("token_id", "token", "gain", "kept_steps"), rows)
    if search is not None:
        rows = [
            (trial.number, *(trial.setting[name] for name in search.names), trial.last_accuracy, trial.remark())
            for trial in search.trials
        ]
        yield Table("trials", ("trial", *search.names, "accuracy", "remark"), rows)
    if curves:
        rows = [
            (quoted(key), "training" if kind == "train" else "evaluation", *pair)
            for key, kinds in curves.items()
            for kind, curve in kinds.items()
            for pair in curve
        ]
        yield Table("training", ("logged_as", "while", "update", "value"), rows)


def _between(edges: np.ndarray, *columns: np.ndarray) -> Iterator[tuple]:
    """Each group with its two edges."""
    return zip(edges[:-1], edges[1:], *columns, strict=True)
