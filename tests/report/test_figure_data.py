"""The CSV files of a report against the rows of the Dataset."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from trl_lightreasoner import write_report
from trl_lightreasoner.models.token_text import TokenTexts
from trl_lightreasoner.report.figure_data import save_figure_data
from trl_lightreasoner.report.row_index import index_rows
from trl_lightreasoner.report.shown_steps import ReportedDataset
from trl_lightreasoner.report.statistics import StepStatistics

from .test_statistics import BETA, as_dataset, make_rows


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return make_rows()


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    dataset = as_dataset(rows)
    reported = ReportedDataset("=a", [], StepStatistics(dataset), TokenTexts(None), [], [], index_rows(dataset))
    curves = {"loss": {"train": [(1, 0.5), (2, 0.25)], "eval": [(2, 0.3)]}}
    assert len(save_figure_data([reported], curves, folder)) == 8
    return folder


def test_the_bins_of_the_distribution_hold_what_lies_in_them(folder, rows):
    values = np.array([value for row in rows for value in row["kl_divergence"]])
    bins = read(folder / "kl_distribution.csv")
    assert sum(int(each["steps"]) for each in bins) == len(values)
    kept = [int(each["steps"]) for each in bins if float(each["nats_from"]) >= BETA * (1 - 1e-6)]
    assert sum(kept) == (values >= np.float32(BETA)).sum()


def test_kept_steps_are_counted_by_position(folder, rows):
    for each in read(folder / "kept_by_position.csv"):
        inside = range(int(each["position_from"]), int(each["position_to"]) + 1)
        assert int(each["kept_steps"]) == sum(t in inside for row in rows for t in row["step_positions"])


def test_a_support_and_a_token_are_counted(folder, rows):
    labels = [ids for row in rows for ids in row["label_ids"]]
    supports = read(folder / "label_support.csv")
    assert [int(each["kept_steps"]) for each in supports[:9]] == [
        sum(len(ids) == size for ids in labels) for size in range(1, 10)
    ]
    for each in read(folder / "tokens.csv"):
        assert int(each["kept_steps"]) == sum(int(each["token_id"]) in ids for ids in labels)


def test_every_value_that_was_logged_is_in_the_file(folder):
    values = [(each["while"], int(each["update"]), float(each["value"])) for each in read(folder / "training.csv")]
    assert values == [("training", 1, 0.5), ("training", 2, 0.25), ("evaluation", 2, 0.3)]


def test_text_of_others_is_no_formula(folder):
    assert {each["dataset"] for each in read(folder / "kl_distribution.csv")} == {json.dumps("=a")}
    assert all(each["token"].startswith('"#') for each in read(folder / "tokens.csv"))


def test_a_report_has_them_beside_its_figures(steps, tmp_path):
    pytest.importorskip("matplotlib")
    write_report(steps, str(tmp_path), load_models=False)
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names <= {path.stem for path in tmp_path.glob("*.csv")}
