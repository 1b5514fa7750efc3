"""A few families by the script that examines all of them."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def families():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("families")
    sys.path.remove(folder)


@pytest.mark.parametrize("family", ["qwen2", "rwkv", "camembert"])
def test_a_family_is_exact(families, family, tmp_path):
    assert families.examine(family, tmp_path)[0] == "exact"


def test_a_family_that_reads_ahead_is_refused(families):
    result, reason = families.examine_in_time("cpmant")
    assert result == "refused" and "depend on later tokens" in reason


def test_a_sampling_that_is_wrong_is_told(families):
    right = {"completion_ids": [5, 6], "kl_divergence": [0.1, 0.2], "labels": [{5: 1.0}, {6: 0.5, 7: 0.5}]}
    row = {"completion_ids": [5, 6], "kl_divergence": [0.1, 0.2], "step_positions": [1], "label_ids": [[6, 7]]}
    assert families.compare([{**row, "label_probs": [[0.5, 0.5]]}], [right], "alone") == []
    assert families.compare([{**row, "label_probs": [[0.6, 0.4]]}], [right], "alone") == [
        "alone: labels of 1 of 1 rows"
    ]
    wrong = {**row, "kl_divergence": [0.1, 0.3], "label_probs": [[0.5, 0.5]]}
    assert families.compare([wrong], [right], "alone") == ["alone: divergences of 1 of 1 rows by 5.0e-01"]
