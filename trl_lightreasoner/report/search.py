"""The search of a report: its form, the data that is searched, and the same data as CSV.

The form is in `page_files/search.html`, and the searching is done by `index.js`.
"""

import hashlib
from html import escape
from pathlib import Path
from typing import Any

from .csv_tables import save_table
from .row_index import ROWS_A_FILE, as_json, index_data, index_tables, kept_per_prompt
from .shown_steps import ReportedDataset


_FORM = Path(__file__).parent / "page_files" / "search.html"


def page_index(datasets: list[ReportedDataset]) -> dict[str, Any]:
    """What the page searches, with a key by which it knows the files that lie beside it."""
    first, data = 0, []
    for each in datasets:
        data.append(index_data(each.index, each.name, each.statistics.beta, each.texts, first))
        first += -(-each.statistics.num_rows // ROWS_A_FILE)
    key = hashlib.sha256(as_json(data).encode()).hexdigest()[:16]
    return {"key": key, "size": ROWS_A_FILE, "datasets": data}


def save_index(datasets: list[ReportedDataset], folder: Path) -> None:
    """Write every kept step and every row as CSV."""
    for i, each in enumerate(datasets):
        for table in index_tables(each.index, each.texts, f"_{i + 1}" if len(datasets) > 1 else ""):
            save_table(table, folder)


def search_form(datasets: list[ReportedDataset]) -> str:
    """The form, and how many kept steps a prompt has."""
    sentences = " ".join(_say_counts(each, len(datasets) > 1) for each in datasets)
    return _FORM.read_text(encoding="utf-8").replace("$counts", sentences)


def _say_counts(dataset: ReportedDataset, is_named: bool) -> str:
    counts = kept_per_prompt(dataset.index, dataset.statistics.prompt_keys)
    none = (counts == 0).sum()
    where = f' in <b class="name">{escape(dataset.name)}</b>' if is_named else ""
    half = int(counts[len(counts) // 2])
    return (
        f"Kept steps a prompt{where}, of {len(counts):,} prompts: {half:,} or more with half of them, "
        f"{counts[-1]:,} at the most, none with {none:,}."
    )
