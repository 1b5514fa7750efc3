"""The figures of a report as PNG files, for papers and slides, by matplotlib."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..models.token_text import label_of
from ..steps.whole_files import whole_file
from .charts import write_number
from .figures import curve_title, errors_of, order_curves
from .shown_steps import ReportedDataset
from .training_curves import Curve
from .trials import SearchResult


_COLOURS = ("#0067a5", "#c04f00")  # apart for the colour-blind, and by dashes without colour
_STROKES = ("-", "--")
_NUM_TOKENS = 10
_NUM_TRAJECTORIES = 3


def save_pictures(
    datasets: list[ReportedDataset],
    curves: dict[str, dict[str, Curve]] | None,
    folder: Path,
    search: SearchResult | None = None,
) -> list[Path]:
    """
    Draw what the page shows.

    Args:
        datasets (`list[ReportedDataset]`): One or two.
        curves (`dict`, *optional*): Of a training, as [`load_curves`] returns them.
        folder (`Path`): Where the files go. It exists.
        search ([`SearchResult`], *optional*): The trials of a search.

    Returns:
        `list[Path]`: The files.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        # Without pyplot, which would look for a screen
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The PNG figures need matplotlib: `pip install 'trl-lightreasoner[report]'`.") from error
    paths = []
    for name, draw in _pictures(datasets, curves, search):
        figure = Figure(figsize=(6.4, 3.8), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        path = folder / f"{name}.png"
        with whole_file(path) as temporary:
            FigureCanvasAgg(figure).print_png(temporary)  # `savefig` would draw everything twice
        paths.append(path)
    return paths


def _pictures(
    datasets: list[ReportedDataset], curves: dict[str, dict[str, Curve]] | None, search: SearchResult | None
) -> Iterator[tuple]:
    if all(each.statistics.num_known for each in datasets):
        yield "kl_distribution", lambda axes: _kl_distribution(axes, datasets)
        yield "kl_along_trajectories", lambda axes: _kl_along_trajectories(axes, datasets)
        yield "share_kept", lambda axes: _share_kept(axes, datasets)
        yield "kept_by_position", lambda axes: _kept_by_position(axes, datasets)
    if any(each.statistics.num_kept for each in datasets):
        yield "label_support", lambda axes: _label_support(axes, datasets)
        yield "label_mass", lambda axes: _label_mass(axes, datasets)
        for i, each in enumerate(datasets):
            name = "tokens" if len(datasets) == 1 else f"tokens_{i + 1}"
            yield name, lambda axes, each=each: _tokens(axes, each, len(datasets) > 1)
    if search is not None:
        yield "trials", lambda axes: _trials(axes, search)
        for name in search.names:
            yield f"trials_{name}", lambda axes, name=name: _trials_against(axes, name, search)
    curves = curves or {}
    for key in order_curves(curves):
        name = "".join(char if char.isalnum() else "_" for char in key)
        yield f"training_{name}", lambda axes, key=key: _curve(axes, key, curves[key], errors_of(key, curves))


def _series(datasets: list[ReportedDataset]) -> Iterator[tuple[dict, ReportedDataset]]:
    for each, colour, stroke in zip(datasets, _COLOURS, _STROKES, strict=False):
        # A name that begins with _ would be left out of the legend
        yield {"color": colour, "linestyle": stroke, "label": each.name.lstrip("_")}, each


def _finish(axes, datasets: list[ReportedDataset], xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(datasets) > 1:
        for text in axes.legend(frameon=False).get_texts():
            text.set_parse_math(False)


def _mark_betas(axes, datasets: list[ReportedDataset], across: bool = False) -> None:
    for style, each in _series(datasets):
        if each.statistics.beta:
            draw = axes.axhline if across else axes.axvline
            colour = "#1c1d1f" if len(datasets) == 1 else style["color"]
            draw(each.statistics.beta, color=colour, linewidth=1, linestyle=":")
            at = {"xy": (0.99, each.statistics.beta), "xycoords": ("axes fraction", "data"), "ha": "right"}
            if not across:
                at = {"xy": (each.statistics.beta, 0.99), "xycoords": ("data", "axes fraction"), "ha": "left"}
            offset = {"xytext": (4, 3 if across else -9), "textcoords": "offset points"}
            axes.annotate(rf"$\beta$ = {write_number(each.statistics.beta)}", **at, **offset, color=colour, fontsize=9)


def _kl_distribution(axes, datasets: list[ReportedDataset]) -> None:
    for style, each in _series(datasets):
        edges, counts = each.statistics.histogram()
        axes.stairs(counts / counts.sum(), edges, **style, fill=len(datasets) == 1)
    axes.set_xscale("log")
    _mark_betas(axes, datasets)
    _finish(axes, datasets, "KL divergence of expert and amateur at a step (nats)", "share of steps")


def _kl_along_trajectories(axes, datasets: list[ReportedDataset]) -> None:
    lowest = 1e-6
    for i, trajectory in enumerate(datasets[0].trajectories[:_NUM_TRAJECTORIES]):
        values = np.maximum(np.array(trajectory.kl_divergence, dtype=float), lowest)
        axes.plot(values, color="#8a8f98", linewidth=0.8, linestyle=("-", "--", "-.")[i], zorder=1)
    for style, each in _series(datasets):
        edges = each.statistics.position_edges
        for quantile, width in ((0.5, 1.2), (0.9, 2.2)):
            values = np.maximum(each.statistics.quantiles_by_position(quantile), lowest)
            label = f"{style['label']}, " if len(datasets) > 1 else ""
            label += "median" if quantile == 0.5 else "90th percentile"
            axes.plot((edges[:-1] + edges[1:] - 1) / 2, values, **{**style, "label": label}, linewidth=width)
    axes.set_yscale("log")
    _mark_betas(axes, datasets, across=True)
    axes.set_xlabel(f"position in the completion (tokens); grey: {_NUM_TRAJECTORIES} trajectories at most")
    axes.set_ylabel("KL divergence (nats)")
    for text in axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)


def _share_kept(axes, datasets: list[ReportedDataset]) -> None:
    low = max(1e-7, min(each.statistics.beta_for(0.5) for each in datasets))
    betas = np.geomspace(low, max(2 * low, *(each.statistics.highest for each in datasets)), 300)
    for style, each in _series(datasets):
        axes.plot(betas, each.statistics.shares(betas), **style)
    for share in (0.05, 0.1, 0.2):
        axes.axhline(share, color="#c9ccd1", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    _mark_betas(axes, datasets)
    _finish(axes, datasets, r"$\beta$ (nats)", "share of steps kept")


def _kept_by_position(axes, datasets: list[ReportedDataset]) -> None:
    for style, each in _series(datasets):
        numbers = each.statistics
        shares = numbers.kept_by_position / np.maximum(numbers.steps_by_position, 1)
        axes.stairs(shares, numbers.position_edges, **style, fill=len(datasets) == 1)
    _finish(axes, datasets, "position in the completion (tokens)", "share of steps kept")


def _label_support(axes, datasets: list[ReportedDataset]) -> None:
    for style, each in _series(datasets):
        counts = each.statistics.support_counts
        axes.stairs(counts / max(counts.sum(), 1), np.arange(len(counts) + 1) + 0.5, **style, fill=len(datasets) == 1)
    axes.set_xticks(range(1, 11), [*map(str, range(1, 10)), "10+"])
    _finish(axes, datasets, "tokens in the support of $v_C$", "share of kept steps")


def _label_mass(axes, datasets: list[ReportedDataset]) -> None:
    for style, each in _series(datasets):
        counts = each.statistics.mass_counts
        axes.stairs(
            counts / max(counts.sum(), 1), np.linspace(0, 1, len(counts) + 1), **style, fill=len(datasets) == 1
        )
    _finish(axes, datasets, "$v_C$ of its favourite", "share of kept steps")


def _tokens(axes, dataset: ReportedDataset, is_named: bool) -> None:
    gains = dataset.statistics.gains()
    tokens = [token for token in gains if token.gain > 0][:_NUM_TOKENS]
    tokens += [token for token in gains if token.gain < 0][-_NUM_TOKENS:]
    axes.figure.set_figheight(1.4 + 0.24 * len(tokens))
    heights = range(len(tokens))
    axes.barh(heights, [token.gain for token in tokens], color=[_COLOURS[token.gain < 0] for token in tokens])
    labels = [_drawable(label_of(dataset.texts(token.token_id))) for token in tokens]
    axes.set_yticks(heights, labels, parse_math=False, family="monospace", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("$v_C$ - 1/|support|, summed over the kept steps")
    if is_named:
        axes.set_title(dataset.name, fontsize=10, parse_math=False)


def _drawable(text: str) -> str:
    """What the font of matplotlib has no picture of, by number."""
    return "".join(
        char if ord(char) < 0x250 or char in "\u2423\u21b5\u21e5\u25cc\u27e8\u27e9" else f"U+{ord(char):04X}"
        for char in text
    )


def _curve(axes, key: str, kinds: dict[str, Curve], errors: dict[str, dict[int, float]]) -> None:
    for (kind, curve), colour, stroke in zip(sorted(kinds.items(), reverse=True), _COLOURS, _STROKES, strict=False):
        name = "training" if kind == "train" else "evaluation"
        bars = [errors.get(kind, {}).get(update, 0.0) for update, _ in curve]
        style = {"color": colour, "linestyle": stroke, "marker": ".", "label": name}
        if any(bars):
            axes.errorbar(*zip(*curve, strict=True), yerr=bars, capsize=3, **style)
        else:
            axes.plot(*zip(*curve, strict=True), **style)
    if len(kinds) > 1:
        axes.legend(frameon=False)
    axes.set_xlabel("update")
    axes.set_ylabel(curve_title(key), parse_math=False)


def _trials(axes, search: SearchResult) -> None:
    numbers, highest = search.best_so_far()
    axes.step(numbers, highest, where="post", color=_COLOURS[1], linestyle=_STROKES[1], label="best so far")
    _trial_points(axes, search, lambda trial: trial.number)
    if (before := search.trials[0].accuracies.get(0)) is not None:
        axes.axhline(before, color="#8a8f98", linewidth=0.8, label="the expert")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("trial")
    axes.legend(frameon=False)


def _trials_against(axes, name: str, search: SearchResult) -> None:
    values = [trial.setting[name] for trial in search.trials]
    is_number = all(isinstance(value, int | float) for value in values)
    _trial_points(axes, search, lambda trial: trial.setting[name] if is_number else str(trial.setting[name]))
    if is_number and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_xscale("log")
    axes.set_xlabel(name, parse_math=False)


def _trial_points(axes, search: SearchResult, place) -> None:
    for is_pruned, fill in ((False, _COLOURS[0]), (True, "none")):
        shown = [trial for trial in search.shown() if trial.is_pruned == is_pruned]
        if shown:
            axes.scatter(
                [place(trial) for trial in shown],
                [trial.last_accuracy for trial in shown],
                facecolors=fill,
                edgecolors=_COLOURS[0],
                label="broken off" if is_pruned else "setting",
            )
    axes.set_ylabel("accuracy")
