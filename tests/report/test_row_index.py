"""The index of all rows, and the rows that the page opens, against the Dataset itself."""

import base64
import csv
import json
import math
import re

import numpy as np
import pytest
from datasets import Value

from trl_lightreasoner import write_report
from trl_lightreasoner.models.token_text import TokenTexts
from trl_lightreasoner.report.page import as_json
from trl_lightreasoner.report.row_answers import RIGHT, UNKNOWN, WRONG, grade_rows
from trl_lightreasoner.report.row_index import (
    ROWS_A_FILE,
    index_data,
    index_rows,
    kept_per_prompt,
    pack,
    place_rows,
    rows_data,
)
from trl_lightreasoner.report.statistics import StepStatistics

from .test_statistics import as_dataset, make_rows


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return make_rows(ROWS_A_FILE + 20, longest=40)


@pytest.fixture(scope="module")
def index(rows):
    return index_rows(as_dataset(rows))


def unpack(packed: list[str]) -> np.ndarray:
    kind, text = packed
    return np.frombuffer(base64.b64decode(text), dtype=f"<{kind}")


def without_pictures(monkeypatch):
    monkeypatch.setattr("trl_lightreasoner.report.write_report.save_pictures", lambda *args: [])


def test_every_kept_step_of_every_row_is_in_the_index(index, rows):
    naive = []
    for number, row in enumerate(rows):
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            best = max(range(len(ids)), key=lambda i: probs[i])
            naive.append((number, t, row["completion_ids"][t], ids[best], row["kl_divergence"][t]))
    found = zip(index.rows, index.positions, index.taken, index.preferred, index.nats, strict=True)
    assert list(found) == naive


def test_every_row_is_in_the_index(index, rows):
    assert index.num_kept.tolist() == [len(row["step_positions"]) for row in rows]
    assert index.num_tokens.tolist() == [len(row["completion_ids"]) for row in rows]
    assert index.highest.tolist() == [max(row["kl_divergence"]) for row in rows]


def test_a_divergence_that_is_not_known_stays_so(rows):
    row = {**rows[0], "kl_divergence": [None] * len(rows[0]["kl_divergence"])}
    row.update(step_positions=[0], label_ids=[[1]], label_probs=[[1.0]])
    found = index_rows(as_dataset([row]))
    assert np.isnan(found.highest[0]) and np.isnan(found.nats[0])


def test_kept_steps_are_counted_a_prompt(rows):
    """Two rows of one prompt, as where a row holds a single step."""
    some = [{**row, "prompt_ids": [i // 2]} for i, row in enumerate(rows)]
    found = kept_per_prompt(index_rows(as_dataset(some)), StepStatistics(as_dataset(some)).prompt_keys)
    naive = [sum(len(row["step_positions"]) for row in some[i : i + 2]) for i in range(0, len(some), 2)]
    assert found.tolist() == sorted(naive)


@pytest.mark.parametrize(
    "values", [[0, 255], [256], [65536, 3], [0.1, float("nan")], []], ids=["bytes", "words", "long", "floats", "none"]
)
def test_numbers_come_back_as_they_were(values):
    array = np.array(values) if values else np.zeros(0, dtype=int)
    assert unpack(pack(array)).tolist() == pytest.approx(array.astype(np.float32).tolist(), nan_ok=True)


def test_the_page_knows_the_tokens_of_the_index(index, rows):
    data = index_data(index, "a", 0.4, TokenTexts(None), 0)
    tokens = np.array(data["tokens"])
    assert tokens[unpack(data["steps"]["taken"])].tolist() == [f"#{token}" for token in index.taken]
    assert tokens[unpack(data["steps"]["preferred"])].tolist() == [f"#{token}" for token in index.preferred]


def test_a_row_comes_back_as_the_dataset_has_it(rows):
    files = list(rows_data(as_dataset(rows), TokenTexts(None)))
    assert [len(file["rows"]) for file in files] == [ROWS_A_FILE, 20]
    for number, row in enumerate(rows):
        file = files[number // ROWS_A_FILE]
        data = file["rows"][number % ROWS_A_FILE]
        tokens = np.array(file["tokens"])
        assert tokens[unpack(data["taken"])].tolist() == [f"#{token}" for token in row["completion_ids"]]
        assert unpack(data["nats"]).tolist() == row["kl_divergence"]
        assert unpack(data["kept"]).tolist() == row["step_positions"]
        assert unpack(data["sizes"]).tolist() == [len(ids) for ids in row["label_ids"]]
        assert tokens[unpack(data["label"])].tolist() == [f"#{token}" for ids in row["label_ids"] for token in ids]
        assert unpack(data["probs"]) == pytest.approx([value for probs in row["label_probs"] for value in probs])


def test_few_rows_are_in_the_page_and_many_in_files(rows, tmp_path, monkeypatch):
    files = list(rows_data(as_dataset(rows), TokenTexts(None)))
    for name in ("rows-000.js", "rows-007.js", "rows-of-mine.js"):
        (tmp_path / name).write_text("")
    inside = place_rows(files, tmp_path, "key")
    assert [json.loads(text) for text in inside] == json.loads(as_json(files))
    assert [path.name for path in tmp_path.iterdir()] == ["rows-of-mine.js"]  # the others were of another report
    monkeypatch.setattr("trl_lightreasoner.report.row_index.MAX_CHARACTERS", len(inside[0]))
    assert place_rows(files, tmp_path, "key") is None
    for number, text in enumerate(inside):
        assert (tmp_path / f"rows-00{number}.js").read_text() == f'receiveRows("key",{number},{text});\n'


def test_hostile_text_is_no_script_in_a_file(steps, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_lightreasoner.report.row_index.MAX_CHARACTERS", 0)
    hostile = '</script>"});alert(1)//\u2028'
    dataset = steps.remove_columns("prompt").add_column("prompt", [hostile] * len(steps))
    assert place_rows(rows_data(dataset, TokenTexts(tokenizer)), tmp_path, "key") is None
    script = (tmp_path / "rows-000.js").read_text()
    assert script.isascii() and "<" not in script
    start, end = 'receiveRows("key",0,', ");\n"
    assert script.startswith(start) and script.endswith(end)
    data = json.loads(script[len(start) : -len(end)])  # JSON as a whole: nothing ended the call before
    assert '"});alert(1)//' in data["rows"][0]["prompt"]


def test_the_index_of_ten_thousand_rows_is_small():
    rng = np.random.default_rng(0)
    row = {"label_ids": [[1, 2]] * 13, "label_probs": [[0.75, 0.25]] * 13, "step_positions": list(range(13))}
    row |= {"prompt_ids": [1], "kl_divergence": rng.exponential(0.5, 26).tolist(), "sampling_metadata": "{}"}
    dataset = as_dataset([{**row, "completion_ids": rng.integers(0, 5000, 26).tolist()} for _ in range(10_000)])
    index = index_rows(dataset)
    assert len(index.rows) == 130_000
    assert len(as_json(index_data(index, "a", 0.4, TokenTexts(None), 0))) < 2_000_000


def test_the_page_says_how_many_kept_steps_prompts_have(steps, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    page = write_report(steps, str(tmp_path), load_models=False).read_text(encoding="utf-8")
    counts = sorted(map(len, steps["step_positions"]))
    median = f"{(counts[2] + counts[3]) / 2:g}"
    assert f"{median} in the median, {counts[-1]} at most; {counts.count(0)} of 6 prompts have none" in page


@pytest.mark.parametrize("limit", [0, 2_000_000])
def test_the_page_may_load_files_only_where_there_are_any(limit, steps, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    monkeypatch.setattr("trl_lightreasoner.report.row_index.MAX_CHARACTERS", limit)
    page = write_report(steps, str(tmp_path), load_models=False).read_text(encoding="utf-8")
    assert ("'strict-dynamic'" in page) == (tmp_path / "rows-000.js").exists() == (limit == 0)
    assert "script-src 'sha256-" in page and "default-src 'none'" in page


# Right and wrong


def test_rows_are_graded_by_their_answers(steps, tokenizer):
    pytest.importorskip("math_verify")
    texts = ["#### 7", "#### 4", "The answer is 3.", "It is 5. #### 5", "#### 1", "#### 2"]
    answers = ["3+4=7 #### 7", "5", "3", None, "", "2"]
    ids = [tokenizer(text).input_ids for text in texts]
    dataset = steps.remove_columns("completion_ids").add_column("completion_ids", ids).add_column("answer", answers)
    assert grade_rows(dataset, tokenizer).tolist() == [RIGHT, WRONG, RIGHT, UNKNOWN, UNKNOWN, RIGHT]


def test_rows_are_graded_by_numbers_of_single_precision(steps, tokenizer):
    pytest.importorskip("math_verify")
    ids = [tokenizer(f"#### {number}").input_ids for number in (0.1, 2, 3.3, 0.2, 5, 6)]
    dataset = steps.remove_columns("completion_ids").add_column("completion_ids", ids)
    dataset = dataset.add_column("answer", [0.1, math.nan, 3.3, 0.3, 5, None], feature=Value("float32"))
    assert grade_rows(dataset, tokenizer).tolist() == [RIGHT, UNKNOWN, RIGHT, WRONG, RIGHT, UNKNOWN]


def test_without_answers_nothing_is_said_of_them(steps, tokenizer):
    assert grade_rows(steps, tokenizer) is None
    assert grade_rows(steps.add_column("answer", [""] * len(steps)), tokenizer) is None


def test_a_column_of_answers_that_is_named_must_be_there(steps, tokenizer):
    with pytest.raises(ValueError, match="The dataset has no column 'solution'; it has .*Name the one that holds the"):
        grade_rows(steps, tokenizer, "solution")


def test_right_and_wrong_are_in_the_page_and_in_the_files(steps, tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    without_pictures(monkeypatch)
    dataset = steps.add_column("solution", ["#### 123456"] * len(steps))
    path = write_report(dataset, str(tmp_path), load_models=False, answer_column="solution")
    data = json.loads(re.search('id="index">(.*?)</script>', path.read_text(encoding="utf-8"))[1])
    assert unpack(data["datasets"][0]["rows"]["answer"]).tolist() == [WRONG] * len(steps)
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["answer"] for row in csv.DictReader(file)] == ["wrong"] * len(steps)


def test_without_math_verify_the_page_says_what_is_missing(steps, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = write_report(steps.add_column("answer", ["7"] * len(steps)), str(tmp_path), load_models=False)
    assert "answers is not shown. Grading needs math-verify" in path.read_text()
