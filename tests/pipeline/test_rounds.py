"""Several rounds of a run on the bundled pair, with few questions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_lightreasoner import RunConfig, RunResult, TuneConfig, run_pipeline, sampling_metadata
from trl_lightreasoner.contrast import contrast_steps
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.pipeline import rounds
from trl_lightreasoner.pipeline import run as pipeline
from trl_lightreasoner.pipeline.rounds import Round, choose_round, rows_to_measure, split_prompts, why_stop

from ..evaluation.test_sets import write
from .test_run import interrupt_at, without_pictures  # noqa: F401


pytest.importorskip("math_verify")
NUM_PROMPTS, NUM_LATER, NUM_HELD_OUT = 10, 6, 8


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    problems = make_problems(30, seed=0, kind_shares=KIND_SHARES)
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write(path, [{"question": problem["question"], "answer": problem["answer"]} for problem in problems])
    return {
        **{"expert": str(PAIR / "expert"), "amateur": str(PAIR / "amateur"), "dataset_name": str(path)},
        **{"num_prompts": NUM_PROMPTS, "num_held_out": NUM_HELD_OUT, "system_prompt": "", "max_steps": 3},
        **{"max_new_tokens": 32, "eval_max_new_tokens": 32, "learning_rate": 5e-4},
        **{"num_rounds": 2, "prompts_per_round": NUM_LATER},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings) -> RunResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_lightreasoner.report.write_report.save_pictures", lambda *args: [])
        patch.setattr(rounds, "why_stop", lambda last: None)
        patch.setattr(rounds, "train_adapter", count_rows(rounds.train_adapter, counts := []))
        result = run_pipeline(RunConfig(output_dir=str(tmp_path_factory.mktemp("rounds") / "run"), **settings))
    assert counts == [NUM_PROMPTS, NUM_PROMPTS + NUM_LATER]  # a later round trains on the earlier steps, too
    return result


def count_rows(train_adapter, counts: list[int]):
    """The function, of whose calls the number of rows is noted."""

    def counted(expert, tokenizer, steps, *args, **kwargs):
        counts.append(len(steps))
        return train_adapter(expert, tokenizer, steps, *args, **kwargs)

    return counted


def steps_of(result: RunResult, number: int) -> list[dict]:
    folder = Path(result.output_dir, "rounds", str(number), "steps", "data")
    return load_dataset("parquet", data_dir=str(folder), split="train").to_list()


def test_each_round_samples_fresh_questions(finished, settings):
    asked = [json.loads(line)["question"] for line in Path(settings["dataset_name"]).read_text().splitlines()]
    sampled = [[row["prompt"][-1]["content"] for row in steps_of(finished, number)] for number in (1, 2)]
    assert sampled == [asked[:NUM_PROMPTS], asked[NUM_PROMPTS : NUM_PROMPTS + NUM_LATER]]
    assert finished.num_prompts == NUM_PROMPTS + NUM_LATER
    assert finished.num_updates == 2 * settings["max_steps"]


@torch.no_grad()
def test_a_later_round_is_answered_by_the_adapter_and_labelled_without_it(finished):
    folder = Path(finished.output_dir, "rounds", "1", "adapter")
    base, amateur = (
        AutoModelForCausalLM.from_pretrained(PAIR / name, dtype=torch.float32).eval() for name in ("expert", "amateur")
    )
    rows = steps_of(finished, 2)

    def logits(model, row):
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
        return model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]

    for row in rows:
        steps = contrast_steps(logits(base, row), logits(amateur, row), alpha=0.2, beta=0.4)
        assert row["kl_divergence"] == pytest.approx(steps.kl_divergence.tolist(), rel=1e-3, abs=1e-5)
    adapted = PeftModel.from_pretrained(base, folder).eval()
    for row in rows:
        assert logits(adapted, row).argmax(-1).tolist() == row["completion_ids"]


def test_the_best_round_is_kept(finished):
    outcomes = [json.loads(Path(finished.output_dir, "rounds", n, "round.json").read_text()) for n in ("1", "2")]
    best = max(outcomes, key=lambda each: each["results"]["benchmarks"]["held_out"]["model"]["accuracy"])
    assert finished.best_round == best["number"] and finished.results == best["results"]
    kept, of_best = (
        load_file(Path(finished.output_dir, folder, "adapter_model.safetensors"))
        for folder in ("adapter", f"rounds/{best['number']}/adapter")
    )
    assert all(torch.equal(kept[name], of_best[name]) for name in of_best)
    assert f"which also chose round {best['number']} of 2" in finished.sentence


def test_a_second_round_that_was_broken_off_ends_as_one_left_alone(finished, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "why_stop", lambda last: None)
    monkeypatch.setattr(pipeline, "write_report", lambda *_, **__: None)
    args = RunConfig(output_dir=str(tmp_path / "run"), **settings)
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "train_adapter", interrupt_at(2, rounds.train_adapter))
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(args)
    result = run_pipeline(args)
    apart = {"seconds": None, "output_dir": None}
    assert {**result.to_dict(), **apart} == {**finished.to_dict(), **apart}
    weights, expected = (
        load_file(Path(each.output_dir, "rounds", "2", "adapter", "adapter_model.safetensors"))
        for each in (result, finished)
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_report_shows_the_first_round_beside_the_last(finished):
    page = Path(finished.output_dir, "report", "report.html").read_text()
    assert "round 1" in page and "round 2" in page
    assert page.count("This pair is") == 1  # the steps of a later round do not judge it


def test_a_live_expert_labels_its_own_answers_and_earlier_steps_can_be_left_out(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "train_adapter", count_rows(rounds.train_adapter, counts := []))
    few = {"num_prompts": 4, "prompts_per_round": 5, "num_held_out": 0, "max_steps": 1}
    few |= {"label_expert": "live", "keep_earlier_steps": False}
    result = run_pipeline(RunConfig(output_dir=str(tmp_path / "run"), **{**settings, **few}))
    assert sampling_metadata(Dataset.from_list(steps_of(result, 2)))["settings"]["label_expert"] == "live"
    assert result.best_round == 2 and result.verdict == "not answered"
    assert counts == [4, 5]


# Without models


def outcome(number=1, corrections=0.3, warned=(), accuracy=0.5, num_cut=0, against_last=0.1) -> Round:
    model = {"accuracy": accuracy, "num_cut": num_cut}
    benchmarks = {"held_out": {"num_problems": 100, "model": model, "baseline": {"num_cut": 1}}}
    difference = {"difference": against_last}
    return Round(number, 10, 100, 20, corrections, list(warned), {"benchmarks": benchmarks}, difference)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (outcome(), None),
        (outcome(num_cut=3), None),
        (outcome(num_cut=4), "4.0% of its answers were cut off, compared with 1.0% of the expert's"),
        (outcome(against_last=-0.01), "it answered fewer of the held-out questions correctly"),
        (outcome(warned=["entropy"]), "the model has become more certain than its labels"),
        (outcome(corrections=0.009), "v_C prefers another token at 0.9% of the kept steps"),
    ],
)
def test_why_there_is_no_other_round(last, reason):
    told = why_stop(last)
    assert told is None if reason is None else told.startswith(reason)


def test_of_equal_rounds_the_first_is_kept():
    played = [outcome(1, accuracy=0.5), outcome(2, accuracy=0.7), outcome(3, accuracy=0.7)]
    assert choose_round(played).number == 2
    assert choose_round([each._replace(results=None) for each in played]).number == 3


def test_questions_are_split_without_rest(settings):
    args = RunConfig(output_dir="run", **{**settings, "num_rounds": 3})
    parts = split_prompts(Dataset.from_dict({"prompt": list(range(20))}), args)
    assert [part["prompt"][:] for part in parts] == [list(range(10)), list(range(10, 16)), list(range(16, 20))]


@pytest.mark.parametrize(("beta", "rows"), [(None, [0, 2]), (0.5, [0, 2]), (2.0, [2])])
def test_warnings_rest_on_rows_that_are_trained_on(beta, rows):
    steps = Dataset.from_dict(
        {"row": [0, 1, 2], "kl_divergence": [[0.1, 1.0], [0.2, 3.0], [2.5, 0.1]], "step_positions": [[1], [], [0]]}
    )
    assert rows_to_measure(steps, beta)["row"][:] == rows


def test_too_few_questions_for_the_rounds_are_refused(settings, tmp_path):
    args = RunConfig(output_dir=str(tmp_path / "run"), **{**settings, "num_rounds": 4})
    with pytest.raises(ValueError, match=r"samples 10 questions and each later one 6 others, but there are only 22\."):
        run_pipeline(args)


def test_a_search_has_one_round(settings):
    with pytest.raises(ValueError, match="A search tries settings of a single round"):
        TuneConfig(output_dir="tuned", **settings)
    assert dataclasses.replace(TuneConfig(output_dir="tuned", **{**settings, "num_rounds": 1})).num_rounds == 1
