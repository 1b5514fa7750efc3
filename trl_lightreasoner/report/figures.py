"""The figures of a report: one Dataset, or two overlaid, and a training."""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from ..models.token_text import label_of
from .charts import Axis, Chart, figure, write_number, write_share
from .shown_steps import ReportedDataset
from .statistics import StepStatistics, TokenGain
from .training_curves import Curve


SHARES = (0.05, 0.1, 0.2)
V_C = "<i>v</i><sub>C</sub>"
_NUM_TOKENS = 10  # rows in each table of tokens
_LEAST_GAIN = 0.005  # smaller gains would be written as 0

CURVE_TITLES = {
    "accuracy": "Accuracy",
    "loss": "Loss",
    "entropy": "Entropy",
    "mean_token_accuracy": "Agreement",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "num_nonfinite_updates": "Skipped updates",
    "accuracy_num_cut": "Answers cut",
    "accuracy_num_undecided": "Answers without a verdict",
}
CURVE_TEXTS = {
    "accuracy": "Fraction of the questions that the model answers correctly, with one standard error to both sides.",
    "loss": f"D<sub>KL</sub>({V_C} ‖ π<sub>θ</sub>) at the kept steps, in nats.",
    "entropy": "Of π<sub>θ</sub> at the kept steps, in nats. A fall to 0 is a collapse.",
    "mean_token_accuracy": f"Fraction of the kept steps at which π<sub>θ</sub> and {V_C} have the same most probable "
    "token.",
    "grad_norm": "Before clipping.",
    "learning_rate": "As set by the schedule.",
    "num_nonfinite_updates": "Updates skipped because of NaN or Inf gradients.",
    "accuracy_num_cut": "Answers longer than <code>eval_max_new_tokens</code>.",
    "accuracy_num_undecided": "Answers that could not be graded. They count as wrong.",
}
_ERROR = "_standard_error"
# Counts of events that should not happen
_FAULTS = ("num_nonfinite_updates", "accuracy_num_cut", "accuracy_num_undecided")


# Divergence


def divergence_figures(datasets: list[ReportedDataset]) -> str:
    """How far expert and amateur diverge: over all steps, against beta, along the trajectories (figures 2 and 3)."""
    return (
        _legend(datasets)
        + '<div class="grid">'
        + _kl_distribution(datasets)
        + _share_against_beta(datasets)
        + _kl_by_position(datasets)
        + _kept_by_position(datasets)
        + "</div>"
    )


def _legend(datasets: list[ReportedDataset]) -> str:
    if len(datasets) == 1:
        return ""
    return (
        '<p class="legend">'
        + "".join(f'<span><i class="swatch s{i}"></i>{escape(each.name)}</span>' for i, each in enumerate(datasets))
        + "</p>"
    )


def _styles(datasets: list[ReportedDataset]) -> list[tuple[str, ReportedDataset]]:
    return [(f"s{i}", each) for i, each in enumerate(datasets)]


def _mark_betas(chart: Chart, datasets: list[ReportedDataset], across: bool = False) -> None:
    draw = chart.level if across else chart.mark
    betas = [each.statistics.beta for each in datasets]
    if len(set(betas)) == 1:
        datasets = datasets[:1]
    for i, each in enumerate(datasets):
        if each.statistics.beta:
            style = f"s{i}" if len(datasets) > 1 else ""
            draw(each.statistics.beta, f"β = {write_number(each.statistics.beta)}", style)


def _sentences(datasets: list[ReportedDataset], say: Callable[[StepStatistics], str]) -> str:
    """The sentence of `say` for each dataset, with its name if there are two."""
    if len(datasets) == 1:
        return say(datasets[0].statistics)
    return "<br>".join(f"<b>{escape(each.name)}</b> {say(each.statistics)}" for each in datasets)


def _kl_distribution(datasets: list[ReportedDataset]) -> str:
    histograms = [each.statistics.histogram() for each in datasets]
    low = max(1e-7, min(edges[0] for edges, _ in histograms))
    high = max(1.0, *(edges[-1] for edges, _ in histograms))
    shares = [counts / counts.sum() for _, counts in histograms]
    chart = Chart(
        Axis(low, high, is_log=True, label="KL divergence of expert and amateur at a step, nats"),
        Axis(0, 1.05 * max(values.max() for values in shares), is_share=True, label="Share of steps"),
    )
    for (style, each), (edges, _), values in zip(_styles(datasets), histograms, shares, strict=True):
        # Values below the axis are in its first bar
        first = max(0, int(np.searchsorted(edges, low * (1 + 1e-9), side="right")) - 1)
        values = np.concatenate([[values[: first + 1].sum()], values[first + 1 :]])
        edges = edges[first:]
        if len(datasets) > 1:
            chart.bars(edges, values, style, outline=True)
            continue
        beta = each.statistics.beta or np.inf
        kept = edges[:-1] >= beta * (1 - 1e-6)  # beta is an edge, in single precision
        chart.bars(edges, np.where(kept, 0, values), "quiet")
        chart.bars(edges, np.where(kept, values, 0), style)
    _mark_betas(chart, datasets)

    def say(numbers: StepStatistics) -> str:
        half = f"Half of the steps diverge by less than {write_number(numbers.beta_for(0.5))} nats"
        return (
            f"{half}."
            if numbers.beta is None
            else f"{half}, {write_share(numbers.share_kept(numbers.beta))} by β or more."
        )

    quantiles = (0.5, 0.75, 0.9, 0.95, 0.99)
    rows = [
        [f"{write_share(q)} are below", *(write_number(each.statistics.beta_for(1 - q)) for each in datasets)]
        for q in quantiles
    ]
    rows.append(["Largest", *(write_number(each.statistics.highest) for each in datasets)])
    text = _sentences(datasets, say)
    head = ["Steps", *(f"{_column(each, datasets)}nats" for each in datasets)]
    return figure("How far the two diverge", text, chart.html("Distribution of the divergence."), head, rows, "wide")


def _column(dataset: ReportedDataset, datasets: list[ReportedDataset]) -> str:
    return f"{dataset.name}: " if len(datasets) > 1 else ""


def _share_against_beta(datasets: list[ReportedDataset]) -> str:
    every = [each.statistics for each in datasets]
    top = max(0.3, *(1.25 * each.share_kept(each.beta) for each in every if each.beta), 0)
    top = min(top, 1.0)
    low = max(1e-7, min(each.beta_for(top) for each in every))
    high = max(2 * low, *(each.highest for each in every))
    chart = Chart(
        Axis(low, high, is_log=True, label="β, nats"), Axis(0, top, is_share=True, label="Share of steps kept")
    )
    betas = np.geomspace(low, high, 200)
    for style, each in _styles(datasets):
        chart.line(betas, each.statistics.shares(betas), style)
    _mark_betas(chart, datasets)

    def say(numbers: StepStatistics) -> str:
        parts = [f"β = {write_number(numbers.beta_for(share))} keeps {write_share(share)}" for share in SHARES]
        return ", ".join(parts) + "."

    rows = [[write_share(share), *(write_number(each.beta_for(share)) for each in every)] for share in SHARES]
    head = ["Steps kept", *(f"{_column(each, datasets)}β" for each in datasets)]
    text = f"{_sentences(datasets, say)}"
    return figure("What another β would keep", text, chart.html("Share of steps kept against beta."), head, rows)


def _kl_by_position(datasets: list[ReportedDataset]) -> str:
    quantiles = (0.5, 0.9, 0.99) if len(datasets) == 1 else (0.5, 0.9)
    curves = [{q: each.statistics.quantiles_by_position(q) for q in quantiles} for each in datasets]
    values = np.concatenate([line for each in curves for line in each.values()])
    low = max(1e-6, values[values > 0].min(initial=1.0))
    high = max(10 * low, values.max(), *(each.statistics.beta or 0 for each in datasets))
    chart = Chart(
        Axis(
            0, max(each.statistics.position_edges[-1] for each in datasets), label="Position in the completion, tokens"
        ),
        Axis(low, 1.3 * high, is_log=True, label="KL divergence, nats"),
    )
    for (style, each), lines in zip(_styles(datasets), curves, strict=True):
        edges = each.statistics.position_edges
        for q, line in lines.items():
            chart.line((edges[:-1] + edges[1:]) / 2, line, f"{style} q{round(100 * q)}")
    _mark_betas(chart, datasets, across=True)
    others = "90th and 99th" if len(quantiles) > 2 else "90th"
    text = f"Median (thin) and {others} percentile (thicker) over all trajectories."
    head = ["Tokens"]
    rows = _by_position(
        datasets,
        [[write_number(value) for value in line] for lines in curves for line in lines.values()],
    )
    head += [f"{_column(each, datasets)}{write_share(q)}" for each in datasets for q in quantiles]
    return figure(
        "Divergence along the trajectories", text, chart.html("Divergence against the position."), head, rows
    )


def _by_position(datasets: list[ReportedDataset], columns: list[list[str]]) -> list[list[str]]:
    edges = max((each.statistics.position_edges for each in datasets), key=lambda edges: edges[-1])
    if any(edges[1] != each.statistics.position_edges[1] for each in datasets):
        # Datasets with other lengths have other groups
        return [
            [f"Group {i + 1}", *(column[i] if i < len(column) else "" for column in columns)]
            for i in range(max(map(len, columns)))
        ]
    return [
        [
            f"{left}" if right - left == 1 else f"{left} to {right - 1}",
            *(column[i] if i < len(column) else "" for column in columns),
        ]
        for i, (left, right) in enumerate(zip(edges, edges[1:], strict=False))
    ]


def _kept_by_position(datasets: list[ReportedDataset]) -> str:
    shares = [each.statistics.kept_by_position / np.maximum(each.statistics.steps_by_position, 1) for each in datasets]
    chart = Chart(
        Axis(
            0, max(each.statistics.position_edges[-1] for each in datasets), label="Position in the completion, tokens"
        ),
        Axis(0, max(0.01, 1.1 * max(share.max() for share in shares)), is_share=True, label="Share of steps kept"),
    )
    for (style, each), share in zip(_styles(datasets), shares, strict=True):
        chart.bars(each.statistics.position_edges, share, style, outline=len(datasets) > 1)
    columns = [
        column
        for each, share in zip(datasets, shares, strict=True)
        for column in (
            [
                f"{kept:,} of {steps:,}"
                for kept, steps in zip(
                    each.statistics.kept_by_position, each.statistics.steps_by_position, strict=True
                )
            ],
            list(map(write_share, share)),
        )
    ]
    head = ["Tokens", *(f"{_column(each, datasets)}{name}" for each in datasets for name in ("kept", "share"))]
    text = "Fraction of the steps at a position that are kept."
    chart_html = chart.html("Share of steps kept against the position.")
    return figure("Where the kept steps are", text, chart_html, head, _by_position(datasets, columns))


# Labels


def label_figures(datasets: list[ReportedDataset]) -> str:
    """The size and mass of the labels, and the tokens that they raise and lower."""
    if not any(each.statistics.num_kept for each in datasets):
        return "<p>No step is kept, so there is no label.</p>"
    return f'{_legend(datasets)}<div class="grid">{_support(datasets)}{_mass(datasets)}</div>' + "".join(
        _tokens(each, f"s{i}" if len(datasets) > 1 else "") for i, each in enumerate(datasets)
    )


def _counted(
    datasets: list[ReportedDataset], title: str, text: str, counts: list[np.ndarray], edges, labels, x: Axis, alt: str
) -> str:
    shares = [values / max(values.sum(), 1) for values in counts]
    chart = Chart(x, Axis(0, 1.1 * max(share.max() for share in shares), is_share=True, label="Share of kept steps"))
    for (style, _), share in zip(_styles(datasets), shares, strict=True):
        chart.bars(edges, share, style, outline=len(datasets) > 1)
    rows = [
        [label, *(f"{values[i]:,} ({write_share(share[i])})" for values, share in zip(counts, shares, strict=True))]
        for i, label in enumerate(labels)
    ]
    head = [x.label, *(f"{_column(each, datasets)}kept steps" for each in datasets)]
    return figure(title, text, chart.html(alt), head, rows)


def _support(datasets: list[ReportedDataset]) -> str:
    counts = [each.statistics.support_counts for each in datasets]
    size = max(int(values.nonzero()[0].max(initial=0)) + 1 for values in counts)
    size = max(size, 3)
    labels = [f"{i + 1}{' or more' if i + 1 == len(counts[0]) else ''}" for i in range(size)]

    def say(numbers: StepStatistics) -> str:
        share = write_share(numbers.support_counts[0] / max(numbers.num_kept, 1))
        return f"{share} of the kept steps have one plausible token."

    return _counted(
        datasets,
        f"Size of {V_C}’s support",
        _sentences(datasets, say),
        [values[:size] for values in counts],
        np.arange(size + 1) + 0.5,
        labels,
        Axis(0.5, size + 0.5, label="Tokens in the support" + (" (10 or more in the last)" if size == 10 else "")),
        "How many tokens the labels hold.",
    )


def _mass(datasets: list[ReportedDataset]) -> str:
    edges = np.linspace(0, 1, len(datasets[0].statistics.mass_counts) + 1)

    def say(numbers: StepStatistics) -> str:
        share = write_share(numbers.mass_counts[-1] / max(numbers.num_kept, 1))
        return f"At {share} of the kept steps the most probable token has 90\u00a0% or more."

    text = _sentences(datasets, say)
    probabilities = [
        (sum(step.expert_probs[:n]), sum(step.amateur_probs[:n]))
        for each in datasets
        for trajectory in each.trajectories
        for step in trajectory.steps
        if step.expert_probs is not None and step.amateur_probs is not None
        for n in [sum(p > 0 for p in step.label_probs)]
    ]
    if probabilities:
        expert, amateur = np.median(probabilities, axis=0)
        text += (
            f" On the trajectories shown, the support holds {write_share(expert)} of the expert’s probability and "
            f"{write_share(amateur)} of the amateur’s (medians)."
        )
    return _counted(
        datasets,
        f"Mass of {V_C} on its favourite",
        text,
        [each.statistics.mass_counts for each in datasets],
        edges,
        [f"{left:.1f} to {right:.1f}" for left, right in zip(edges, edges[1:], strict=False)],
        Axis(0, 1, label="v_C of its favourite"),
        "How much of a label its favourite holds.",
    )


def _tokens(dataset: ReportedDataset, style: str) -> str:
    numbers = dataset.statistics
    if not numbers.num_kept:
        return ""
    gains = numbers.gains()
    up = [token for token in gains if token.gain >= _LEAST_GAIN][:_NUM_TOKENS]
    down = [token for token in gains[::-1] if token.gain <= -_LEAST_GAIN][:_NUM_TOKENS]
    largest = max((abs(token.gain) for token in (*up, *down)), default=1.0)
    texts = dataset.texts

    def moved(title: str, tokens: Sequence[TokenGain]) -> str:
        rows = "".join(
            f'<tr><th scope="row"><code>{escape(label_of(texts(token.token_id)))}</code></th>'
            f'<td class="bar-cell"><span style="width:{100 * abs(token.gain) / largest:.1f}%"></span></td>'
            f"<td>{_signed(token.gain)}</td><td>{token.num_steps:,}</td></tr>"
            for token in tokens
        )
        return (
            f'<div><h4>{title}</h4><table class="tokens"><thead><tr><th scope="col">Token</th>'
            '<th scope="col"><span class="visually-hidden">Bar</span></th><th scope="col">Moved</th>'
            f'<th scope="col">Steps</th></tr></thead><tbody>{rows}</tbody></table></div>'
        )

    most = max(numbers.changes.values(), default=1)
    changes = "".join(
        f'<tr><th scope="row"><code>{escape(label_of(texts(taken)))}</code> → '
        f"<code>{escape(label_of(texts(favourite)))}</code></th>"
        f'<td class="bar-cell"><span style="width:{100 * count / most:.1f}%"></span></td>'
        f"<td>{count:,}</td></tr>"
        for (taken, favourite), count in numbers.changes.most_common(_NUM_TOKENS)
    )
    if changes:
        changes = (
            f'<div><h4>Taken → preferred by {V_C}</h4><table class="tokens"><thead><tr><th scope="col">Tokens</th>'
            '<th scope="col"><span class="visually-hidden">Bar</span></th><th scope="col">Steps</th></tr></thead>'
            f"<tbody>{changes}</tbody></table></div>"
        )
    name = f'<span class="swatch {style}"></span>{escape(dataset.name)}: ' if style else ""
    return (
        f'<div class="card"><h3>{name}Tokens that gain and lose under {V_C}</h3><p>Compared with an even split among '
        f"the plausible tokens, summed over the kept steps: {V_C} − 1/|support|. A token gains if the expert prefers "
        "it to the others more than the amateur does.</p>"
        f'<div class="columns three">{moved("Gain", up)}{moved("Lose", down)}{changes}</div></div>'
    )


def _signed(gain: float) -> str:
    text = f"{gain:+,.1f}" if abs(gain) >= 0.95 else f"{gain:+.2f}"
    return text.replace("-", "\u2212")


# Training


def training_figures(curves: dict[str, dict[str, Curve]]) -> str:
    """One curve per logged metric."""
    drawn = (_curve(key, curves[key], errors_of(key, curves)) for key in order_curves(curves))
    return f'<div class="grid">{"".join(drawn)}</div>'


def order_curves(curves: dict[str, dict[str, Curve]]) -> list[str]:
    """Accuracy, loss, entropy, agreement and divergences first, then the rest by name. Zero counts are left out."""
    known = list(CURVE_TITLES)
    keys = [
        key
        for key, kinds in curves.items()
        if key not in _FAULTS or any(value for curve in kinds.values() for _, value in curve)
        if not key.endswith(_ERROR)
    ]

    def place(key: str) -> tuple[int, int, str]:
        if key in known[:4]:
            return 0, known.index(key), key
        return (1, 0, key) if "kl" in key.lower() else (2, known.index(key) if key in known else 99, key)

    return sorted(keys, key=place)


def errors_of(key: str, curves: dict[str, dict[str, Curve]]) -> dict[str, dict[int, float]]:
    """Standard errors of a curve by update, for training and evaluation, if they were logged."""
    return {kind: dict(curve) for kind, curve in curves.get(f"{key}{_ERROR}", {}).items()}


def curve_title(key: str) -> str:
    """The title of a curve. Unknown curves are titled by their key."""
    if key in CURVE_TITLES:
        return CURVE_TITLES[key]
    words = key.replace("_", " ").replace("/", " ").strip()
    return " ".join("KL" if word.lower() == "kl" else word for word in (words[:1].upper() + words[1:]).split())


def _curve(key: str, kinds: dict[str, Curve], errors: dict[str, dict[int, float]]) -> str:
    bands = {
        kind: [(update, value - error, value + error) for update, value in kinds[kind] if (error := of.get(update))]
        for kind, of in errors.items()
        if kind in kinds
    }
    values = [value for curve in kinds.values() for _, value in curve]
    values += [value for band in bands.values() for _, *ends in band for value in ends]
    updates = [update for curve in kinds.values() for update, _ in curve]
    is_share = key.endswith("accuracy") and max(value for curve in kinds.values() for _, value in curve) <= 1
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1
    y = Axis(low, low + 1.05 * (high - low), is_share=is_share, label="")
    if is_share:
        y = Axis(0.0, 1.0, is_share=True, label="")
    if any(bands.values()):  # differences are as small as their errors
        margin = 0.1 * (max(values) - min(values))
        y = Axis(max(0.0, min(values) - margin), min(1.0, max(values) + margin), is_share=is_share, label="")
    chart = Chart(Axis(min(0, *updates), max(1, *updates), label="Update"), y)
    write = write_share if is_share else write_number
    for kind, style in (("train", "s0"), ("eval", "s1")):
        if bands.get(kind):
            at, lows, highs = zip(*bands[kind], strict=True)
            chart.band(at, lows, highs, style)
        if kind in kinds:
            xs, ys = zip(*kinds[kind], strict=True)
            if len(xs) == 1:
                chart.level(ys[0], "", style)
            chart.line(xs, ys, style)
    names = {"train": "training", "eval": "evaluation"}
    by_update = {kind: dict(curve) for kind, curve in kinds.items()}

    def cell(kind: str, update: int) -> str:
        if update not in by_update[kind]:
            return ""
        error = errors.get(kind, {}).get(update)
        return write(by_update[kind][update]) + ("" if error is None else f" ± {write(error)}")

    rows = [[f"{update:,}", *(cell(kind, update) for kind in kinds)] for update in sorted(set(updates))]
    text = CURVE_TEXTS.get(key, f"Logged as <code>{escape(key)}</code>.")
    if len(kinds) > 1 or "eval" in kinds:
        text += "<br>" + "".join(
            f'<span class="key"><i class="swatch {"s0" if kind == "train" else "s1"}"></i>{names[kind]}</span>'
            for kind in kinds
        )
    last = "; ".join(
        f"{names[kind]} from {write(curve[0][1])} to {write(curve[-1][1])}" for kind, curve in kinds.items()
    )
    head = ["Update", *(names[kind] for kind in kinds)]
    return figure(
        escape(curve_title(key)), text, chart.html(f"{curve_title(key)} over the updates: {last}."), head, rows
    )
