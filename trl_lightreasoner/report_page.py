"""From the numbers of one Dataset or two to one HTML page that needs nothing else: no request ever leaves it.

Style and script are in `report_page_files`, next to this module, and are put into the page. A Content-Security-Policy
lets that script alone run and forbids the browser every request. All text of models and datasets is escaped.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from . import __version__
from .charts import Axis, Chart, figure, table, write_number, write_share
from .shown_steps import MAX_TOKENS, ReportedDataset, ShownStep, ShownTrajectory
from .token_text import TokenTexts, label_of, spell_out
from .training_curves import Curve


_FILES = Path(__file__).parent / "report_page_files"
# Where the colours of the text change, in nats
HEAT_EDGES = (0.001, 0.01, 0.05, 0.1, 0.4, 1.0, 2.0)
SHARES = (0.05, 0.1, 0.2)
_NUM_TOKENS = 10  # in each table of tokens
_NUM_OPEN = 4  # trajectories that are seen before more are asked for
_MAX_PROMPT = 1000  # characters
_CHANGE = "At how many kept steps v_C prefers another token than the one taken"
V_C = "<i>v</i><sub>C</sub>"
PI_E = "π<sub>E</sub>"
PI_A = "π<sub>A</sub>"

CURVE_TITLES = {
    "loss": "Loss",
    "entropy": "Entropy",
    "mean_token_accuracy": "Agreement",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "num_nonfinite_updates": "Updates left out",
}
CURVE_TEXTS = {
    "loss": f"D<sub>KL</sub>({V_C} ‖ π<sub>θ</sub>) at the kept steps, in nats.",
    "entropy": "Of π<sub>θ</sub> at the kept steps, in nats. A fall to 0 is a collapse.",
    "mean_token_accuracy": f"Share of the kept steps at which π<sub>θ</sub> and {V_C} have the same favourite.",
    "grad_norm": "Before clipping.",
    "learning_rate": "As the schedule sets it.",
    "num_nonfinite_updates": "Their gradient was not finite.",
}


def make_page(datasets: list[ReportedDataset], curves: dict[str, dict[str, Curve]] | None, paired: bool) -> str:
    """
    The page.

    Args:
        datasets (`list[ReportedDataset]`): One or two.
        curves (`dict`, *optional*): Of a training, as [`load_curves`] returns them.
        paired (`bool`): Whether the datasets' trajectories are of the same prompts, one by one.

    Returns:
        `str`: HTML.
    """
    script, style = ((_FILES / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    details: dict[str, dict] = {}
    sections = {
        "overview": ("Overview", _overview(datasets)),
        "trajectories": ("Trajectories", _trajectories(datasets, paired, details)),
        "divergence": ("Divergence", _divergence(datasets)),
        "labels": ("Labels", _labels(datasets)),
    }
    if curves is not None:
        sections["training"] = ("Training", _training(curves))
    names = " and ".join(f"<span class='name'>{escape(each.name)}</span>" for each in datasets)
    return Template((_FILES / "page.html").read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        title=escape(" and ".join(each.name for each in datasets)),
        names=names,
        style=style,
        script=script,
        links="".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items()),
        sections="".join(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{body}</section>'
            for key, (title, body) in sections.items()
        ),
        details=as_json(details),
        version=__version__,
    )


def as_json(value: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or opens another."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# Overview


def _overview(datasets: list[ReportedDataset]) -> str:
    return "".join(_summary(each, f"s{i}" if len(datasets) > 1 else "") for i, each in enumerate(datasets))


def _summary(dataset: ReportedDataset, style: str) -> str:
    numbers, made = dataset.statistics, dataset.metadata
    share = numbers.num_kept / numbers.num_steps
    tiles = {
        "trajectories": f"{numbers.num_trajectories:,}",
        "steps": f"{numbers.num_steps:,}",
        "kept steps": f"{numbers.num_kept:,}",
        "of the steps kept": write_share(share),
    }
    if numbers.num_kept:
        tiles[f"of them with another favourite in {V_C}"] = write_share(numbers.num_changed / numbers.num_kept)
    settings = []
    for role, symbol in (("expert", PI_E), ("amateur", PI_A)):
        if name := (made.get(role) or {}).get("adapter") or (made.get(role) or {}).get("model"):
            name = name if isinstance(name, str) else ", ".join(map(str, name))
            settings.append((f"{role.capitalize()} {symbol}", escape(spell_out(short_name(name)))))
    settings += [(key, write_number(value)) for key, value in (("α", numbers.alpha), ("β", numbers.beta)) if value]
    rows = ""
    if numbers.num_rows > numbers.num_trajectories:
        rows = (
            f"<p>The {numbers.num_rows:,} rows hold {numbers.num_trajectories:,} different trajectories. Divergences "
            "count once a trajectory, labels once a row.</p>"
        )
    heading = f'<h3><span class="swatch {style}"></span>{escape(dataset.name)}</h3>' if style else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in dataset.notes)
    return (
        f'<div class="summary {style}">{heading}<dl class="tiles">'
        + "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles.items())
        + '</dl><dl class="settings">'
        + "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in settings)
        + f"</dl>{rows}{notes}</div>"
    )


def short_name(name: str) -> str:
    """An id as it is, and of a path the last two parts: the rest belongs to one machine."""
    return "/".join(name.replace("\\", "/").rstrip("/").split("/")[-2:])


# Trajectories


def _trajectories(datasets: list[ReportedDataset], paired: bool, details: dict[str, dict]) -> str:
    shown = [len(each.trajectories) for each in datasets]
    with_kept = [int((each.statistics.kept_per_row > 0).sum()) for each in datasets]
    which = (
        f"{shown[0]:,} prompts that both datasets hold, drawn at random"
        if paired
        else " and ".join(
            f"{count:,} of the {total:,} rows with a kept step"
            if total
            else f"{count:,} of {each.statistics.num_rows:,} rows, none with a kept step"
            for count, total, each in zip(shown, with_kept, datasets, strict=True)
        )
        + ", drawn at random"
    )
    legend = "".join(
        f'<span class="h{i}">{"under " + write_number(HEAT_EDGES[0]) if i == 0 else write_number(HEAT_EDGES[i - 1])}</span>'
        for i in range(len(HEAT_EDGES) + 1)
    )
    intro = (
        f"<p>Shown are {which}; every number elsewhere on this page is over all rows. "
        "<span class='how'>Choose a framed token to see what the models say there; the arrow keys go from one to the "
        "next.</span></p>"
        f'<p class="legend" aria-hidden="true"><b>Divergence in nats</b> {legend}<span class="kept">kept</span></p>'
    )
    articles = [
        [_article(trajectory, dataset, f"{i}.{j}", details) for j, trajectory in enumerate(dataset.trajectories)]
        for i, dataset in enumerate(datasets)
    ]
    titles = [
        f'<h4><span class="swatch s{i}"></span>{escape(each.name)}</h4>' if len(datasets) > 1 else ""
        for i, each in enumerate(datasets)
    ]
    if paired:
        cards = [
            f'<article class="card pair">{_prompt(trajectories[0], datasets[0].texts)}<div class="columns">'
            + "".join(f"<div>{title}{text}</div>" for title, text in zip(titles, texts, strict=True))
            + "</div></article>"
            for trajectories, texts in zip(
                zip(*(each.trajectories for each in datasets), strict=True), zip(*articles, strict=True), strict=True
            )
        ]
    else:
        cards = [
            f'<article class="card">{titles[i]}{_prompt(trajectory, dataset.texts)}{text}</article>'
            for i, dataset in enumerate(datasets)
            for trajectory, text in zip(dataset.trajectories, articles[i], strict=True)
        ]
        cards = [card for group in _interleave(cards, shown) for card in group]
    first, rest = "".join(cards[:_NUM_OPEN]), "".join(cards[_NUM_OPEN:])
    if rest:
        rest = f'<details class="more"><summary>Show {len(cards) - _NUM_OPEN} more</summary>{rest}</details>'
    panel = (
        '<aside id="panel" class="card empty" aria-label="Kept step"><div id="panel-body">'
        "<p>What expert and amateur say at a kept step, and the label that the contrast makes of it, appear here.</p>"
        '</div></aside><p id="status" class="visually-hidden" role="status"></p>'
    )
    return f'{intro}<div class="reader"><div class="texts">{first}{rest}</div>{panel}</div>'


def _interleave(cards: list[str], counts: list[int]) -> list[list[str]]:
    starts = np.cumsum([0, *counts])
    return [
        [cards[start + i] for start, count in zip(starts, counts, strict=False) if i < count]
        for i in range(max(counts))
    ]


def _prompt(trajectory: ShownTrajectory, texts: TokenTexts) -> str:
    prompt = trajectory.prompt
    if isinstance(prompt, list):
        prompt = "\n".join(str(message.get("content")) for message in prompt if message.get("role") != "system")
    if isinstance(prompt, str):
        prompt = spell_out(prompt).replace("↵\n", "\n")
    else:
        prompt = "".join(map(texts, trajectory.prompt_ids))
    cut = prompt if len(prompt) <= _MAX_PROMPT else f"{prompt[:_MAX_PROMPT]} …"
    return f'<p class="prompt"><b>Row {trajectory.row:,}</b> <bdi>{escape(cut)}</bdi></p>'


def _article(trajectory: ShownTrajectory, dataset: ReportedDataset, key: str, details: dict[str, dict]) -> str:
    steps = {step.position: step for step in trajectory.steps}
    texts, parts = dataset.texts, []
    for t, (token_id, divergence) in enumerate(zip(trajectory.completion_ids, trajectory.kl_divergence, strict=True)):
        text = texts(token_id)
        style = f"h{int(np.searchsorted(HEAT_EDGES, divergence, side='right'))}"
        style += " special" if texts.is_special(token_id) else ""
        nats = f"{write_number(divergence)} nats"
        if t in steps:
            label = f"Step {t}, {label_of(text)}, {nats}"
            parts.append(
                f'<button type="button" class="{style}" data-step="{key}.{t}" aria-label="{escape(label)}" '
                f'aria-controls="panel" aria-expanded="false" title="{nats}">{escape(label_of(text))}</button>'
            )
            parts.append("<br>" if text.endswith("\n") else "")
            details[f"{key}.{t}"] = _detail(steps[t], trajectory, dataset)
        else:
            parts.append(f'<span class="{style}" title="{nats}">{escape(text)}</span>')
    left = trajectory.num_tokens - len(trajectory.completion_ids)
    more = f'<p class="note">The first {MAX_TOKENS:,} of {trajectory.num_tokens:,} tokens.</p>' if left else ""
    label = f"Completion, {len(steps)} kept {'step' if len(steps) == 1 else 'steps'}"
    return (
        f'<div class="text" role="group" aria-label="{label}">{"".join(parts)}</div>{more}'
        f"{_strip(trajectory, dataset.statistics.beta)}"
    )


def _strip(trajectory: ShownTrajectory, beta: float | None) -> str:
    """The divergence along one trajectory, small; each token says its own."""
    y = Axis(1e-3, 10, is_log=True)
    width = len(trajectory.kl_divergence)
    kept = {step.position for step in trajectory.steps}
    bars = "".join(
        f'<rect{" class=kept" if t in kept else ""} x="{t}.1" y="{100 - place:.1f}" width=".8" height="{place:.1f}"/>'
        for t, place in enumerate(100 * y.place(value) for value in trajectory.kl_divergence)
        if place > 0
    )
    line = f'<path d="M0 {100 - 100 * y.place(beta):.1f}H{width}"/>' if beta else ""
    return f'<svg class="strip" viewBox="0 0 {width} 100" preserveAspectRatio="none" aria-hidden="true">{bars}{line}</svg>'


def _detail(step: ShownStep, trajectory: ShownTrajectory, dataset: ReportedDataset) -> dict:
    taken = trajectory.completion_ids[step.position]
    best = max(step.label_probs)
    columns: dict[str, Sequence[float]] = {"v": step.label_probs}
    if step.expert_probs is not None and step.amateur_probs is not None:
        columns = {"e": step.expert_probs, "a": step.amateur_probs, **columns}
    else:  # of log pi_E - log pi_A the label holds all but a constant
        columns["r"] = [value / best for value in step.label_probs]
    return {
        "row": trajectory.row,
        "t": step.position,
        "kl": write_number(trajectory.kl_divergence[step.position]),
        "taken": step.token_ids.index(taken),
        "tokens": [label_of(dataset.texts(token_id)) for token_id in step.token_ids],
        **{key: [round(float(value), 5) for value in values] for key, values in columns.items()},
    }


# Divergence


def _divergence(datasets: list[ReportedDataset]) -> str:
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


def _mark_betas(chart: Chart, datasets: list[ReportedDataset], draw: str = "mark") -> None:
    betas = [each.statistics.beta for each in datasets]
    if len(set(betas)) == 1:
        datasets = datasets[:1]
    for i, each in enumerate(datasets):
        if each.statistics.beta:
            style = f"s{i}" if len(datasets) > 1 else ""
            getattr(chart, draw)(each.statistics.beta, f"β = {write_number(each.statistics.beta)}", style)


def _sentences(datasets: list[ReportedDataset], say) -> str:
    """What `say` says of each dataset, by name where there are two."""
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
        # What lies below the axis is in its first bar
        first = int(np.searchsorted(edges, low * (1 + 1e-9), side="right")) - 1
        values = np.concatenate([[values[: first + 1].sum()], values[first + 1 :]])
        edges = edges[first:]
        if len(datasets) > 1:
            chart.bars(edges, values, style, outline=True)
            continue
        beta = each.statistics.beta or np.inf
        kept = edges[:-1] >= beta * (1 - 1e-9)
        chart.bars(edges, np.where(kept, 0, values), "quiet")
        chart.bars(edges, np.where(kept, values, 0), style)
    _mark_betas(chart, datasets)

    def say(numbers) -> str:
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

    def say(numbers) -> str:
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
    _mark_betas(chart, datasets, "level")
    text = f"Median (thin){', 90th and 99th percentile (thicker)' if len(quantiles) > 2 else ' and 90th percentile'} over all trajectories."
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
        # Datasets of other lengths are grouped otherwise
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
    text = "Of the steps that reach a position, how many are kept."
    chart_html = chart.html("Share of steps kept against the position.")
    return figure("Where kept steps lie", text, chart_html, head, _by_position(datasets, columns))


# Labels


def _labels(datasets: list[ReportedDataset]) -> str:
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

    def say(numbers) -> str:
        return f"{write_share(numbers.support_counts[0] / max(numbers.num_kept, 1))} of the kept steps have one plausible token, which needs no choice."

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

    def say(numbers) -> str:
        return f"At {write_share(numbers.mass_counts[-1] / max(numbers.num_kept, 1))} of the kept steps the favourite holds 90 % or more."

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
    up = [token for token in gains if token.gain > 1e-9][:_NUM_TOKENS]
    down = [token for token in gains[::-1] if token.gain < -1e-9][:_NUM_TOKENS]
    largest = max((abs(token.gain) for token in (*up, *down)), default=1.0)
    texts = dataset.texts

    def moved(title: str, tokens) -> str:
        rows = "".join(
            f'<tr><th scope="row"><code>{escape(label_of(texts(token.token_id)))}</code></th>'
            f'<td class="bar-cell"><span style="width:{100 * abs(token.gain) / largest:.1f}%"></span></td>'
            f"<td>{token.gain:+.1f}</td><td>{token.count:,}</td></tr>"
            for token in tokens
        )
        return (
            f'<div><h4>{title}</h4><table class="tokens"><thead><tr><th scope="col">Token</th>'
            '<th scope="col"><span class="visually-hidden">Bar</span></th><th scope="col">Moved</th>'
            f'<th scope="col">Steps</th></tr></thead><tbody>{rows}</tbody></table></div>'
        )

    changes = "".join(
        f'<tr><th scope="row"><code>{escape(label_of(texts(taken)))}</code> → '
        f"<code>{escape(label_of(texts(favourite)))}</code></th>"
        f'<td class="bar-cell"><span style="width:{100 * count / numbers.changes.most_common(1)[0][1]:.1f}%"></span></td>'
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
        f'<div class="card"><h3>{name}Tokens that gain and lose under {V_C}</h3><p>Against an even split among the '
        f"plausible tokens, summed over the kept steps: {V_C} − 1/|support|. A token gains where the expert prefers "
        "it to the others more than the amateur does.</p>"
        f'<div class="columns three">{moved("Gain", up)}{moved("Lose", down)}{changes}</div></div>'
    )


# Training


def _training(curves: dict[str, dict[str, Curve]]) -> str:
    return f'<div class="grid">{"".join(_curve(key, curves[key]) for key in order_curves(curves))}</div>'


def order_curves(curves: dict[str, dict[str, Curve]]) -> list[str]:
    """Loss, entropy, agreement and divergences first, then the rest by name; without what never happened."""
    known = list(CURVE_TITLES)
    keys = [
        key
        for key, kinds in curves.items()
        if key != "num_nonfinite_updates" or any(value for curve in kinds.values() for _, value in curve)
    ]

    def place(key: str) -> tuple[int, int, str]:
        if key in known[:3]:
            return 0, known.index(key), key
        return (1, 0, key) if "kl" in key.lower() else (2, known.index(key) if key in known else 99, key)

    return sorted(keys, key=place)


def curve_title(key: str) -> str:
    """What a curve is called: by its key, if it is not a known one."""
    if key in CURVE_TITLES:
        return CURVE_TITLES[key]
    words = key.replace("_", " ").replace("/", " ").strip()
    return " ".join("KL" if word.lower() == "kl" else word for word in (words[:1].upper() + words[1:]).split())


def _curve(key: str, kinds: dict[str, Curve]) -> str:
    values = [value for curve in kinds.values() for _, value in curve]
    updates = [update for curve in kinds.values() for update, _ in curve]
    is_share = key.endswith("accuracy") and max(values) <= 1
    low = min(0.0, *values)
    high = 1.0 if is_share else max(values)
    high = high if high > low else low + 1
    chart = Chart(
        Axis(min(0, *updates), max(1, *updates), label="Update"),
        Axis(low, low + 1.05 * (high - low) if not is_share else 1.0, is_share=is_share, label=""),
    )
    write = write_share if is_share else write_number
    for kind, style in (("train", "s0"), ("eval", "s1")):
        if kind in kinds:
            xs, ys = zip(*kinds[kind], strict=True)
            if len(xs) == 1:
                chart.level(ys[0], "", style)
            chart.line(xs, ys, style)
    names = {"train": "training", "eval": "evaluation"}
    by_update = {kind: dict(curve) for kind, curve in kinds.items()}
    rows = [
        [f"{update:,}", *(write(values[update]) if update in values else "" for values in by_update.values())]
        for update in sorted(set(updates))
    ]
    text = CURVE_TEXTS.get(key, f"Logged as <code>{escape(key)}</code>.")
    if len(kinds) > 1 or "eval" in kinds:
        text += " " + " ".join(
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
