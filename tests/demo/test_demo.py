"""The demo as a user runs it."""

import contextlib
import io
import json
import shlex
from pathlib import Path

import pytest
from datasets import Dataset
from peft import PeftModel

from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.commands.run import make_parser
from trl_lightreasoner.demo.bundled_pair import PAIR
from trl_lightreasoner.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_lightreasoner.commands.demo.NUM_TEST", 100)
        assert main(["demo", "--output_dir", str(folder), "--seed", "1"]) == 0
    return folder, printed.getvalue()


def test_the_expert_gains_at_least_40_points(demo):
    metrics = json.loads((demo[0] / "metrics.json").read_text())
    assert metrics["accuracy_before"] < 0.4
    assert metrics["accuracy_after"] - metrics["accuracy_before"] >= 0.4


def test_metrics_hold_the_seconds(demo):
    assert json.loads((demo[0] / "metrics.json").read_text())["seconds"] > 0


def test_the_dataset_is_left_behind(demo):
    dataset = Dataset.from_parquet([str(path) for path in (demo[0] / "dataset" / "data").glob("*.parquet")])
    assert len(dataset) == 200


def test_the_adapter_loads_with_its_tokenizer(demo):
    model = PeftModel.from_pretrained(load_model(str(PAIR / "expert")), demo[0] / "adapter")
    assert model.active_adapters == ["default"]
    assert load_tokenizer(str(demo[0] / "adapter")).eos_token == "<|im_end|>"


def test_the_questions_are_left_for_the_command_that_is_shown(demo):
    (line,) = [line for line in demo[1].splitlines() if line.startswith("The same by one command")]
    args = make_parser().parse(shlex.split(line.partition("lightreasoner run ")[2]))[0]
    rows = [json.loads(row) for row in Path(args.dataset_name).read_text().splitlines()]
    sampled = Dataset.from_parquet([str(path) for path in (demo[0] / "dataset" / "data").glob("*.parquet")])
    assert len(rows) == args.num_prompts + args.num_held_out
    assert [row["question"] for row in rows[: args.num_prompts]] == [row[0]["content"] for row in sampled["prompt"]]
    assert all(isinstance(row["answer"], int) for row in rows)


def test_three_answers_and_a_table_are_shown(demo):
    assert demo[1].count("Problem  ") == 3
    assert "accuracy   standard error" in demo[1]
    assert "points from" in demo[1]
    assert "\nNext: lightreasoner report " in demo[1] and "{'" not in demo[1]
