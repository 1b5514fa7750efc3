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
    result, _, (before, after) = families.examine(family, tmp_path)
    assert result == "exact" and after < before


def test_a_family_that_reads_ahead_is_refused(families):
    result, reason, losses = families.examine_in_time("cpmant")
    assert result == "refused" and "depend on later tokens" in reason and not losses


def test_the_table_names_families_of_which_the_loss_did_not_fall(families):
    results = {
        "falls": ("exact", "264 logits", [0.5, 0.2]),
        "rises": ("exact", "264 logits", [0.5, 0.6]),
        "unbuilt": ("cannot be built", "no", []),
    }
    assert "The loss fell in 1 of 2; not in: `rises` (0.5 to 0.6)." in families.as_table(results)


def test_a_sampling_that_is_wrong_is_told(families):
    right = {"completion_ids": [5, 6], "kl_divergence": [0.1, 0.2], "labels": [{5: 1.0}, {6: 0.5, 7: 0.5}]}
    row = {"completion_ids": [5, 6], "kl_divergence": [0.1, 0.2], "step_positions": [1], "label_ids": [[6, 7]]}
    assert families.compare([{**row, "label_probs": [[0.5, 0.5]]}], [right], "alone") == []
    assert families.compare([{**row, "label_probs": [[0.6, 0.4]]}], [right], "alone") == [
        "alone: labels of 1 of 1 rows"
    ]
    wrong = {**row, "kl_divergence": [0.1, 0.3], "label_probs": [[0.5, 0.5]]}
    assert families.compare([wrong], [right], "alone") == ["alone: divergences of 1 of 1 rows by 5.0e-01"]
