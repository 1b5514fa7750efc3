"""From the numbers of one or two Datasets to one HTML page that makes no requests.

Style and script are in `page_files`, next to this module, and are inserted into the page. A Content-Security-Policy
allows only that script, and the files of rows that it loads, and forbids every other request. All text of models and
datasets is escaped.
"""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from .. import __version__
from ..models.token_text import TokenTexts, label_of, spell_out
from ..sampling.pair_check import CAVEAT, RESTS_ON, PairCheck
from ..steps.dataset import last_parts
from .charts import Axis, write_number, write_share
from .figures import V_C, divergence_figures, label_figures, training_figures
from .row_index import as_json
from .row_texts import prompt_text, spell_lines
from .search import search_form
from .shown_steps import MAX_TOKENS, ReportedDataset, ShownStep, ShownTrajectory
from .training_curves import Curve
from .trials import SearchResult, trial_figures


_FILES = Path(__file__).parent / "page_files"
# Thresholds of the text's colours, in nats
HEAT_EDGES = (0.001, 0.01, 0.05, 0.1, 0.4, 1.0, 2.0)
_NUM_OPEN = 4  # trajectories shown before the user asks for more
_SCRIPTS = ("index.js", "page.js", "search.js")
PI_E = "π<sub>E</sub>"
PI_A = "π<sub>A</sub>"


def make_page(
    datasets: list[ReportedDataset],
    curves: dict[str, dict[str, Curve]] | None,
    paired: bool,
    search: SearchResult | None,
    index: dict[str, Any],
    rows: list[str] | None,
) -> str:
    """
    Make the page.

    Args:
        datasets (`list[ReportedDataset]`): One or two.
        curves (`dict`, *optional*): Curves of a training, from [`load_curves`].
        paired (`bool`): Whether the datasets' trajectories have the same prompts, in the same order.
        search ([`SearchResult`], *optional*): Result of the search whose best training is shown.
        index (`dict`): Result of [`page_index`].
        rows (`list[str]`, *optional*): Rows for the page, from [`place_rows`]. `None` if they are in separate files.

    Returns:
        `str`: HTML.
    """
    script = "\n".join(map(_file, _SCRIPTS))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    details: dict[str, dict] = {}
    sections = {
        "overview": ("Overview", _overview(datasets)),
        "trajectories": ("Trajectories", _trajectories(datasets, paired, details)),
    }
    if all(each.statistics.num_known for each in datasets):
        sections["divergence"] = ("Divergence", divergence_figures(datasets))
    sections["labels"] = ("Labels", label_figures(datasets))
    if search is not None:
        sections["settings"] = ("Settings", trial_figures(search))
    if curves is not None:
        sections["training"] = ("Training", training_figures(curves))
    names = " and ".join(f"<span class='name'>{escape(each.name)}</span>" for each in datasets)
    # Files of rows run if the page's own script loads them
    loads = " 'strict-dynamic'" if rows is None else ""
    return Template(_file("page.html")).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{loads}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        title=escape(" and ".join(each.name for each in datasets)),
        names=names,
        style=_file("page.css"),
        script=script,
        links="".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items()),
        sections="".join(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{body}</section>'
            for key, (title, body) in sections.items()
        ),
        details=as_json(details),
        index=as_json(index),
        rows="null" if rows is None else f"[{','.join(rows)}]",
        beside=" Beside it lie rows that it opens on demand." if loads else "",
        version=__version__,
    )


def _file(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


# Overview


def _overview(datasets: list[ReportedDataset]) -> str:
    return "".join(_summary(each, f"s{i}" if len(datasets) > 1 else "") for i, each in enumerate(datasets))


def _summary(dataset: ReportedDataset, style: str) -> str:
    numbers = dataset.statistics
    share = numbers.num_kept / numbers.num_steps
    tiles = {
        "trajectories": f"{numbers.num_trajectories:,}",
        "steps": f"{numbers.num_steps:,}",
        "kept steps": f"{numbers.num_kept:,}",
        "of the steps kept": write_share(share),
    }
    if numbers.num_kept:
        tiles[f"of them with a label {V_C} that prefers another token"] = write_share(
            numbers.num_changed / numbers.num_kept
        )
    settings = []
    for role, symbol in (("expert", PI_E), ("amateur", PI_A)):
        if names := dict.fromkeys(filter(None, (_name_of(made.get(role) or {}) for made in dataset.samplings))):
            settings.append((f"{role.capitalize()} {symbol}", escape(spell_out(" and ".join(names)))))
    settings += [(key, write_number(value)) for key, value in (("α", numbers.alpha), ("β", numbers.beta)) if value]
    if numbers.label_power not in ((1.0, 0.0), None):
        settings += list(zip(("γ", "λ"), map(write_number, numbers.label_power), strict=True))
    rows = ""
    if numbers.num_rows > numbers.num_trajectories:
        rows = (
            f"<p>The {numbers.num_rows:,} rows hold {numbers.num_trajectories:,} trajectories. Divergences count once "
            "per trajectory, labels once per row.</p>"
        )
    if numbers.num_known < numbers.num_steps:
        rows += (
            f"<p>Divergences are known at {numbers.num_known:,} of the {numbers.num_steps:,} steps. All figures of "
            "divergence cover only these steps.</p>"
        )
    heading = f'<h3><span class="swatch {style}"></span>{escape(dataset.name)}</h3>' if style else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in dataset.notes)
    return (
        f'<div class="summary {style}">{heading}{_verdict(dataset.check)}<dl class="tiles">'
        + "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles.items())
        + '</dl><dl class="settings">'
        + "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in settings)
        + f"</dl>{rows}{notes}</div>"
    )


def _name_of(model: dict[str, Any]) -> str | None:
    name = model.get("adapter") or model.get("model")
    return name and last_parts(name if isinstance(name, str) else ", ".join(map(str, name)))


def _verdict(check: PairCheck | None) -> str:
    """The verdict on the pair, with its reasons."""
    if check is None:
        return ""
    notes = [*check.warnings, f"{CAVEAT} They are listed under Labels. {RESTS_ON}"]
    return f'<p class="verdict"><b>{escape(check.headline)}</b> {escape(" ".join(check.reasons))}</p>' + "".join(
        f'<p class="note">{escape(note)}</p>' for note in notes
    )


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
        f'<span class="h{i}">{"" if i else "under "}{write_number(HEAT_EDGES[max(i - 1, 0)])}</span>'
        for i in range(len(HEAT_EDGES) + 1)
    )
    intro = (
        f"<p>Shown here: {which}. All other numbers on this page cover all rows, and the search can open each row. "
        "<span class='how'>Choose a framed token to see the models' predictions. The arrow keys move from one to the "
        "next. Other tokens open too.</span></p>"
        f'<p class="legend" aria-hidden="true"><b>Divergence in nats</b> {legend}<span class="kept">kept</span></p>'
    )
    articles = [
        [_article(trajectory, dataset, f"{i}.{trajectory.row}", details) for trajectory in dataset.trajectories]
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
        "<p>The predictions of expert and amateur at a kept step, and the contrastive label, appear here.</p>"
        '</div></aside><p id="status" class="visually-hidden" role="status"></p>'
    )
    texts = f"{search_form(datasets)}{first}{rest}"
    return f'{intro}<div class="reader"><div class="texts">{texts}</div>{panel}</div>'


def _interleave(cards: list[str], counts: list[int]) -> list[list[str]]:
    starts = np.cumsum([0, *counts])
    return [
        [cards[start + i] for start, count in zip(starts, counts, strict=False) if i < count]
        for i in range(max(counts))
    ]


def _prompt(trajectory: ShownTrajectory, texts: TokenTexts) -> str:
    prompt = prompt_text(trajectory.prompt, trajectory.prompt_ids, texts)
    return f'<p class="prompt"><b>Row {trajectory.row:,}</b> <bdi>{escape(prompt)}</bdi></p>'


def _article(trajectory: ShownTrajectory, dataset: ReportedDataset, key: str, details: dict[str, dict]) -> str:
    steps = {step.position: step for step in trajectory.steps}
    texts, parts = dataset.texts, []
    # Token numbers are not readable text: without a tokenizer only the kept steps are shown by number
    is_readable = texts.tokenizer is not None or trajectory.completion is None
    for t, (token_id, divergence) in enumerate(zip(trajectory.completion_ids, trajectory.kl_divergence, strict=True)):
        text = texts(token_id)
        style = f"h{int(np.searchsorted(HEAT_EDGES, divergence or 0, side='right'))}"
        style += " special" if texts.is_special(token_id) else ""
        nats = _nats(divergence)
        if t in steps:
            label = f"Step {t}, {label_of(text)}, {nats}"
            parts.append(
                f'<button type="button" class="{style}" data-step="{key}.{t}" aria-label="{escape(label)}" '
                f'aria-controls="panel" aria-expanded="false" title="{nats}">{escape(label_of(text))}</button>'
            )
            parts.append("<br>" if text.endswith("\n") else "")
            details[f"{key}.{t}"] = _detail(steps[t], trajectory, dataset, int(key.split(".")[0]))
        elif is_readable:
            text += " " if texts.tokenizer is None else ""
            parts.append(f'<span class="{style}" title="{nats}">{escape(text)}</span>')
    left = trajectory.num_tokens - len(trajectory.completion_ids)
    more = f'<p class="note">The first {MAX_TOKENS:,} of {trajectory.num_tokens:,} tokens.</p>' if left else ""
    label = f"Completion, {len(steps)} kept {'step' if len(steps) == 1 else 'steps'}"
    plain = (
        "" if is_readable else f'<p class="plain"><bdi>{escape(spell_lines(trajectory.completion or ""))}</bdi></p>'
    )
    return (
        f'{plain}<div class="text" role="group" aria-label="{label}" data-row="{key}">{"".join(parts)}</div>{more}'
        f"{_strip(trajectory, dataset.statistics.beta)}"
    )


def _nats(divergence: float | None) -> str:
    return "divergence not known" if divergence is None else f"{write_number(divergence)} nats"


def _strip(trajectory: ShownTrajectory, beta: float | None) -> str:
    """A small chart of the divergence along a trajectory. Each token also has its own value."""
    y = Axis(1e-3, 10, is_log=True)
    width = len(trajectory.kl_divergence)
    kept = {step.position for step in trajectory.steps}
    bars = "".join(
        f'<rect{" class=kept" if t in kept else ""} x="{t}.1" y="{100 - place:.1f}" width=".8" height="{place:.1f}"/>'
        for t, place in enumerate(100 * y.place(value or 0) for value in trajectory.kl_divergence)
        if place > 0
    )
    line = f'<path d="M0 {100 - 100 * y.place(beta):.1f}H{width}"/>' if beta else ""
    box = f'viewBox="0 0 {width} 100" preserveAspectRatio="none"'
    return f'<svg class="strip" {box} aria-hidden="true">{bars}{line}</svg>'


def _detail(step: ShownStep, trajectory: ShownTrajectory, dataset: ReportedDataset, number: int) -> dict:
    taken = trajectory.completion_ids[step.position]
    best = max(step.label_probs)
    columns: dict[str, Sequence[float]] = {"v": step.label_probs}
    if step.expert_probs is not None and step.amateur_probs is not None:
        columns = {"e": step.expert_probs, "a": step.amateur_probs, **columns}
    elif dataset.statistics.label_power == (1.0, 0.0):  # the label determines log pi_E - log pi_A up to a constant
        columns["r"] = [value / best for value in step.label_probs]
    if step.trained_probs is not None:
        columns["m"] = step.trained_probs
    return {
        "name": dataset.name,
        "d": number,
        "row": trajectory.row,
        "t": step.position,
        "kl": _nats(trajectory.kl_divergence[step.position]),
        "taken": step.token_ids.index(taken),
        "tokens": [label_of(dataset.texts(token_id)) for token_id in step.token_ids],
        **{key: [round(float(value), 5) for value in values] for key, values in columns.items()},
    }
