"""The search of a report, run by Node.js, against loops over the rows written out here."""

import json
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from trl_lightreasoner.models.token_text import TokenTexts
from trl_lightreasoner.report import search
from trl_lightreasoner.report.row_answers import RIGHT, UNKNOWN, WRONG
from trl_lightreasoner.report.row_index import index_data, index_rows

from .test_statistics import as_dataset, make_rows


pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js on the PATH")

EMPTY = dict.fromkeys(("token", "role", "low", "high", "from", "to", "label", "first", "answer"), "")
SCRIPT = Path(search.__file__).parent / "page_files" / "index.js"


def run(expression: str, data: object = None):
    """The value of a JavaScript expression beside the functions of the search; `data` is what it can name."""
    program = f"{SCRIPT.read_text(encoding='utf-8')}\nconst data = JSON.parse(require('fs').readFileSync(0, 'utf-8'));"
    program += f"\nprocess.stdout.write(JSON.stringify({expression}));"
    done = subprocess.run(["node", "-e", program], input=json.dumps(data), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rows = make_rows(40, longest=30)
    for row, nats in ((rows[3], None), (rows[4], float(np.float32(0.7)))):  # in single precision below 0.7
        row.update(step_positions=[0], label_ids=[[1, 2]], label_probs=[[0.75, 0.25]])
        row["kl_divergence"][0] = nats
    return rows


@pytest.fixture(scope="module")
def answers() -> np.ndarray:
    return np.random.default_rng(0).choice([WRONG, RIGHT, UNKNOWN], 40).astype(np.uint8)


@pytest.fixture(scope="module")
def data(rows, answers) -> dict:
    return index_data(index_rows(as_dataset(rows), answers), "a", 0.4, TokenTexts(None), 0)


def naive_steps(rows: list[dict], answers: np.ndarray, query: dict) -> list[int]:
    found, number = [], -1
    for i, row in enumerate(rows):
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            number += 1
            taken, preferred = row["completion_ids"][t], ids[int(np.argmax(probs))]
            tokens = {"": (taken, preferred), "taken": (taken,), "preferred": (preferred,)}[query["role"]]
            nats = row["kl_divergence"][t]
            if query["token"] and not any(query["token"] in f"#{token}" for token in tokens):
                continue
            if query["low"] != "" and (nats is None or np.float32(nats) < np.float32(query["low"])):
                continue
            if query["high"] != "" and (nats is None or np.float32(nats) > np.float32(query["high"])):
                continue
            if query["from"] != "" and t < query["from"] or query["to"] != "" and t > query["to"]:
                continue
            if query["label"] and (query["label"] == "same") != (taken == preferred):
                continue
            if query["first"] and (query["first"] == "only") != (t == 0):
                continue
            if query["answer"] and answers[i] != int(query["answer"]):
                continue
            found.append(number)
    return found


QUERIES = [
    {**EMPTY, **query}
    for query in [
        {},
        *({"token": "2", "role": role} for role in ("", "taken", "preferred")),
        *({"low": low, "high": high} for low, high in product(("", 0.4, 0.7), ("", 1.5))),
        {"from": 3},
        {"from": 3, "to": 9},
        *({"label": label} for label in ("same", "other")),
        *({"first": first} for first in ("only", "without")),
        *({"answer": str(answer)} for answer in (WRONG, RIGHT, UNKNOWN)),
        {"token": "1", "low": 0.5, "to": 20, "label": "other", "first": "without", "answer": "1"},
    ]
]


def test_filters_find_what_a_loop_finds(data, rows, answers):
    found = run("data[1].map((query) => findSteps(readIndex(data[0]), query))", [data, QUERIES])
    for query, steps in zip(QUERIES, found, strict=True):
        assert steps == naive_steps(rows, answers, query), query
    assert len({len(steps) for steps in found}) > 8  # they differ


def test_rows_are_those_with_a_step_that_was_asked_for_or_all(data, rows, answers):
    find = "data[1].map((query) => { const index = readIndex(data[0]);"
    found = run(f"{find} return findRows(index, query, findSteps(index, query)) }})", [data, QUERIES])
    step_rows = [i for i, row in enumerate(rows) for _ in row["step_positions"]]
    for query, got in zip(QUERIES, found, strict=True):
        if query == {**EMPTY, "answer": query["answer"]}:
            expected = [i for i in range(len(rows)) if query["answer"] in ("", str(answers[i]))]
        else:
            expected = sorted({step_rows[step] for step in naive_steps(rows, answers, query)})
        assert got == expected, query


@pytest.mark.parametrize("is_descending", [False, True])
def test_steps_are_sorted_and_what_is_not_known_comes_last(is_descending, data, rows):
    sort = f"(() => {{ const index = readIndex(data); const all = findSteps(index, {json.dumps(EMPTY)});"
    found = run(f"{sort} return sortFound(index, all, STEP_KEYS.nats, {json.dumps(is_descending)}) }})()", data)
    nats = [row["kl_divergence"][t] for row in rows for t in row["step_positions"]]
    assert None in nats
    sign = -1 if is_descending else 1
    assert found == sorted(range(len(nats)), key=lambda i: (nats[i] is None, sign * (nats[i] or 0), i))


def test_tokens_are_sorted_by_their_text(data):
    sort = f"(() => {{ const index = readIndex(data); const all = findSteps(index, {json.dumps(EMPTY)});"
    found = f"{sort} return sortFound(index, all, STEP_KEYS.taken, false)"
    texts = run(f"{found}.map((step) => index.tokens[index.steps.taken[step]]) }})()", data)
    assert texts == sorted(texts)


@pytest.mark.parametrize(
    ("typed", "found"),
    [("so", ["␣so", "SO", "also"]), ('"so"', ["␣so"]), ('" so"', ["␣so"]), (" ", ["␣so", "␣"]), ('"', ['"'])],
)
def test_a_token_is_found_by_a_part_or_as_a_whole(typed, found):
    tokens = ["␣so", "SO", "also", "␣", '"', "x"]
    assert run(f"data.filter((_, i) => matchTokens(data, {json.dumps(typed)})[i])", tokens) == found


@pytest.mark.parametrize(
    ("place", "fragment"),
    [
        ({"dataset": 0, "row": 12, "step": 7}, "row-12-step-7"),
        ({"dataset": 1, "row": 0, "step": 0}, "dataset-2-row-0-step-0"),
        ({"dataset": 0, "row": 3, "step": None}, "row-3"),
    ],
)
def test_a_place_and_its_address_are_one(place, fragment):
    assert run("[writePlace(data), readPlace('#' + writePlace(data))]", place) == [fragment, place]
    assert run("['', '#labels', '#row--1', '#row-1-step-x', '#xrow-1'].map(readPlace)") == [None] * 5
