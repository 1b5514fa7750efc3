"""All rows of a Dataset in a form in which a page can search and open them.

Two things come out: an index of every kept step and every row, which is in the page, and the rows themselves, which
are in the page as long as they are few and else in files beside it, a hundred rows each. A browser runs such a file as
a script, the one way in which a page from the disk may read another file.

Numbers are columns, packed as base64 of their bytes: exact, and a third of the size of the digits.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..models.token_text import TokenTexts, label_of
from ..steps.columns import StepColumns, flatten, read_columns
from ..steps.whole_files import whole_file
from .csv_tables import Table, token_cells
from .row_answers import RIGHT, WRONG
from .row_texts import completion_text, prompt_text, spell_lines


ROWS_A_FILE = 100
MAX_CHARACTERS = 2_000_000  # of rows that are in the page
_FILE = "rows-{:03d}.js"


@dataclass
class RowIndex:
    """
    Columns over all rows of a Dataset, and over all kept steps in the order of the rows.

    Attributes:
        num_kept, num_tokens (`np.ndarray` of shape `(R,)`): Kept steps and completion tokens of each row.
        highest (`np.ndarray` of shape `(R,)`): Largest known divergence of each row in nats, NaN where none is known.
        answers (`np.ndarray` of shape `(R,)`, *optional*): As [`grade_rows`] returns them.
        rows, positions, taken, preferred (`np.ndarray` of shape `(S,)`): Of each kept step its row, t, the id of the
            token that was taken, and that of v_C's favourite.
        nats (`np.ndarray` of shape `(S,)`): Divergence of each kept step, NaN where it is not known.
    """

    num_kept: np.ndarray
    num_tokens: np.ndarray
    highest: np.ndarray
    answers: np.ndarray | None
    rows: np.ndarray
    positions: np.ndarray
    taken: np.ndarray
    preferred: np.ndarray
    nats: np.ndarray


def index_rows(dataset: Dataset, answers: np.ndarray | None = None) -> RowIndex:
    """
    Read every row once.

    Args:
        dataset ([`~datasets.Dataset`]): Rows as [`ContrastiveStepSampler`] makes them, checked by [`StepStatistics`].
        answers (`np.ndarray`, *optional*): As [`grade_rows`] returns them.

    Example:

    ```python
    >>> dataset = dataset.add_column("prompt_ids", [[5]]).add_column("completion_ids", [[2, 1, 3, 4, 3]])
    >>> index = index_rows(dataset)
    >>> index.positions.tolist(), index.taken.tolist(), index.preferred.tolist()
    ([1, 2, 4], [1, 3, 3], [1, 2, 3])

    ```
    """
    num_kept, num_tokens, highest, steps = [], [], [], []
    start = 0
    for columns in read_columns(dataset):
        num_kept.append(np.diff(columns.steps))
        num_tokens.append(np.diff(columns.completions))
        nats = columns.divergences.astype(np.float32)
        largest = np.full(len(num_tokens[-1]), np.nan, dtype=np.float32)
        has_tokens = num_tokens[-1] > 0
        if has_tokens.any():
            largest[has_tokens] = np.fmax.reduceat(nats, columns.completions[:-1][has_tokens])
        highest.append(largest)
        places = columns.places
        taken, preferred = columns.completion_ids[places], columns.label_ids[columns.favourites]
        steps.append((columns.rows + start, columns.positions, taken, preferred, nats[places]))
        start += len(largest)
    rows, positions, taken, preferred, nats = map(np.concatenate, zip(*steps, strict=True))
    return RowIndex(
        num_kept=np.concatenate(num_kept),
        num_tokens=np.concatenate(num_tokens),
        highest=np.concatenate(highest),
        answers=answers,
        rows=rows,
        positions=positions,
        taken=taken,
        preferred=preferred,
        nats=nats,
    )


def index_data(index: RowIndex, name: str, beta: float | None, texts: TokenTexts, first_file: int) -> dict[str, Any]:
    """The index as the page has it; `first_file` is the number of the file that holds row 0."""
    token_ids, places = np.unique(np.concatenate([index.taken, index.preferred]), return_inverse=True)
    taken, preferred = np.split(places, 2)
    return {
        "name": name,
        "beta": beta,
        "first": first_file,
        "tokens": [label_of(texts(token_id)) for token_id in token_ids.tolist()],
        "rows": {
            "kept": pack(index.num_kept),
            "length": pack(index.num_tokens),
            "highest": pack(index.highest),
            "answer": None if index.answers is None else pack(index.answers),
        },
        "steps": {
            "position": pack(index.positions),
            "taken": pack(taken),
            "preferred": pack(preferred),
            "nats": pack(index.nats),
        },
    }


def index_tables(index: RowIndex, texts: TokenTexts, ending: str = "") -> Iterator[Table]:
    """The index as tables: every kept step, and every row."""

    def say(row: int) -> str:
        return "" if index.answers is None else {RIGHT: "right", WRONG: "wrong"}.get(int(index.answers[row]), "")

    token_ids = np.unique(np.concatenate([index.taken, index.preferred])).tolist()
    cells = {token_id: token_cells(texts, token_id) for token_id in token_ids}
    steps = zip(
        index.rows.tolist(),
        index.positions.tolist(),
        index.taken.tolist(),
        index.preferred.tolist(),
        index.nats,
        strict=True,
    )
    yield Table(
        f"kept_steps{ending}",
        ("row", "step", "taken_id", "taken", "preferred_id", "preferred", "nats", "answer"),
        (
            (row, t, *cells[taken], *cells[preferred], _number(nats), say(row))
            for row, t, taken, preferred, nats in steps
        ),
    )
    yield Table(
        f"rows{ending}",
        ("row", "kept_steps", "tokens", "highest_nats", "answer"),
        (
            (row, kept, length, _number(highest), say(row))
            for row, (kept, length, highest) in enumerate(
                zip(index.num_kept.tolist(), index.num_tokens.tolist(), index.highest, strict=True)
            )
        ),
    )


def _number(nats: np.float32) -> str:
    return "" if np.isnan(nats) else str(nats)


def kept_per_prompt(index: RowIndex, prompt_keys: np.ndarray) -> np.ndarray:
    """Kept steps of each prompt `(P,)`, whose rows have one key; ascending."""
    _, places = np.unique(prompt_keys, return_inverse=True)
    return np.sort(np.bincount(places, weights=index.num_kept).astype(int))


def pack(values: np.ndarray) -> list[str]:
    """
    Numbers as the name of their type and base64: floats in single precision, others unsigned and as small as they can.

    Example:

    ```python
    >>> pack(np.array([1, 2, 3])), pack(np.array([0.5]))
    (['u1', 'AQID'], ['f4', 'AAAAPw=='])

    ```
    """
    if values.dtype.kind == "f":
        kind = "f4"
    else:
        largest = int(values.max(initial=0))
        kind = "u1" if largest < 2**8 else "u2" if largest < 2**16 else "u4"
    return [kind, base64.b64encode(values.astype(f"<{kind}").tobytes()).decode()]


def rows_data(dataset: Dataset, texts: TokenTexts) -> Iterator[dict[str, Any]]:
    """
    The rows as the page opens them, `ROWS_A_FILE` at a time, with the texts of their tokens.

    Args:
        dataset ([`~datasets.Dataset`]): Rows as [`ContrastiveStepSampler`] makes them, checked by [`StepStatistics`].
        texts ([`TokenTexts`]): Of its tokens.
    """
    for batch in dataset.with_format("arrow").iter(batch_size=ROWS_A_FILE):
        columns = flatten(batch)
        assert columns is not None
        prompts, completions = (
            batch[name].to_pylist() if name in batch.column_names else [None] * len(batch)
            for name in ("prompt", "completion")
        )
        yield _file_data(columns, prompts, completions, texts)


def _file_data(columns: StepColumns, prompts: list, completions: list, texts: TokenTexts) -> dict[str, Any]:
    used = np.concatenate([columns.completion_ids, columns.label_ids])
    token_ids, places = np.unique(used, return_inverse=True)
    taken, labels = np.split(places, [len(columns.completion_ids)])

    def say(row: int) -> dict[str, Any]:
        tokens, steps = (slice(*offsets[row : row + 2]) for offsets in (columns.completions, columns.steps))
        label = slice(columns.labels[steps.start], columns.labels[steps.stop])
        prompt_ids = columns.prompt_ids[slice(*columns.prompts[row : row + 2])].tolist()
        data = {
            "prompt": prompt_text(prompts[row], prompt_ids, texts),
            "taken": pack(taken[tokens]),
            "nats": pack(columns.divergences[tokens]),
            "kept": pack(columns.positions[steps]),
            "sizes": pack(np.diff(columns.labels[steps.start : steps.stop + 1])),
            "label": pack(labels[label]),
            "probs": pack(columns.label_probs[label]),
        }
        if texts.tokenizer is None and (text := completion_text({"completion": completions[row]}, None)) is not None:
            data["text"] = spell_lines(text)
        return data

    return {
        "tokens": [texts(token_id) for token_id in token_ids.tolist()],
        "special": [place for place, token_id in enumerate(token_ids.tolist()) if texts.is_special(token_id)],
        "rows": [say(row) for row in range(len(prompts))],
    }


def place_rows(files: Iterable[dict[str, Any]], folder: Path, key: str) -> list[str] | None:
    """
    Put the rows into the page, or into files beside it if they are too many.

    Args:
        files (`Iterable[dict]`): What [`rows_data`] yields.
        folder (`Path`): Where the page will be. Files of another report there are removed.
        key (`str`): By which the page knows its own files.

    Returns:
        `list[str]`: What is for the page, as JSON; `None` if there are files.
    """
    for path in folder.iterdir():
        if re.fullmatch(r"rows-\d{3,}\.js", path.name):
            path.unlink()
    inside: list[str] | None = []
    size = 0
    for number, data in enumerate(files):
        text = as_json(data)
        if inside is None:
            _write(folder, number, key, text)
            continue
        inside.append(text)
        size += len(text)
        if size > MAX_CHARACTERS:
            for earlier, content in enumerate(inside):
                _write(folder, earlier, key, content)
            inside = None
    return inside


def _write(folder: Path, number: int, key: str, text: str) -> None:
    script = f'receiveRows("{key}",{number},{text});\n'
    with whole_file(folder / _FILE.format(number)) as temporary:
        temporary.write_text(script, encoding="utf-8")


def as_json(value: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or opens another."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
