"""A few rounds of `scripts/fuzz.py`, which takes more by hand."""

import pytest

from .scripts.fuzz import fuzz


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(("part", "rounds"), [("rows", 30), ("damage", 20), ("kills", 3)])
def test_what_goes_in_comes_out_whole_or_is_refused(part, rounds):
    assert sum(fuzz(part, seed=0, rounds=rounds).values()) == rounds
