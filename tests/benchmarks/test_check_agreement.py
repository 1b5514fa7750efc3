"""The benchmark that asks how often `lightreasoner check` is right runs, and judges as it says."""

import importlib
import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    folders = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    sys.path[:0] = folders
    yield importlib.import_module("check_agreement")
    for folder in folders:
        sys.path.remove(folder)


def test_every_amateur_of_the_study_has_a_gain(benchmark):
    for gains in benchmark.GAINS.values():
        assert list(gains) == list(benchmark.study.AMATEURS)


def test_verdicts_are_compared_with_gains(benchmark, tmp_path, capsys):
    rows = benchmark.main(["--amateurs", "own", "too close", "shuffled", "--output_dir", str(tmp_path)])
    assert [row["verdict"] for row in rows] == ["promising", "too close", "incoherent"]
    assert [row["right"] for row in rows] == [True, True, True]
    assert "Right on 3 of 3 amateurs" in capsys.readouterr().out
    written = json.loads((tmp_path / "agreement.json").read_text())
    assert [row["amateur"] for row in written] == ["own", "too close", "shuffled", "swapped"]
    assert written[-1]["verdict"] == "swapped" and written[-1]["right"] is None


def test_a_promise_that_was_not_kept_is_a_miss(benchmark):
    class Check:
        promising = True

        def to_dict(self) -> dict:
            return {}

    assert benchmark.row_of("pair", "own", Check(), 40.0)["right"] is True
    assert benchmark.row_of("pair", "own", Check(), -3.0)["right"] is False
