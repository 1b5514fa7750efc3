"""The search of a report: its form, the data that is searched, and the same data as CSV.

The form is in `page_files/search.html`, and `index.js` does the search.
"""

import hashlib
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .charts import table, write_number
from .csv_tables import save_table
from .row_index import ROWS_A_FILE, as_json, index_data, index_tables, kept_per_prompt
from .shown_steps import ReportedDataset


_FORM = Path(__file__).parent / "page_files" / "search.html"


def page_index(datasets: list[ReportedDataset]) -> dict[str, Any]:
    """The data that the page searches, with a key that identifies its files of rows."""
    first, data = 0, []
    for each in datasets:
        data.append(index_data(each.index, each.name, each.statistics.beta, each.texts, first))
        first += -(-each.statistics.num_rows // ROWS_A_FILE)
    key = hashlib.sha256(as_json(data).encode()).hexdigest()[:16]
    return {"key": key, "size": ROWS_A_FILE, "datasets": data}


def save_index(datasets: list[ReportedDataset], folder: Path) -> None:
    """Write every kept step and every row as CSV."""
    for i, each in enumerate(datasets):
        for each_table in index_tables(each.index, each.texts, f"_{i + 1}" if len(datasets) > 1 else ""):
            save_table(each_table, folder)


def search_form(datasets: list[ReportedDataset]) -> str:
    """The form, and the numbers of kept steps per prompt."""
    counts = "".join(_counts(each, len(datasets) > 1) for each in datasets)
    return _FORM.read_text(encoding="utf-8").replace("$counts", counts)


def _counts(dataset: ReportedDataset, is_named: bool) -> str:
    counts = kept_per_prompt(dataset.index, dataset.statistics.prompt_keys)
    where = f' in <b class="name">{escape(dataset.name)}</b>' if is_named else ""
    rows = [(f"{kept:,}", f"{count:,}") for kept, count in enumerate(np.bincount(counts).tolist()) if count]
    median = write_number(float(np.median(counts)))
    return (
        f'<details class="numbers counts"><summary>Kept steps per prompt{where}: {median} in the median, '
        f"{counts[-1]:,} at most; {(counts == 0).sum():,} of {len(counts):,} prompts have none</summary>"
        f"{table(('Kept steps', 'Prompts'), rows)}</details>"
    )
