"""The study of small pairs: its datasets are what they say, its intervals right, and it runs whole."""

import importlib
import json
import random
import statistics
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Qwen2ForCausalLM

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler
from trl_lightreasoner.contrast import plausibility_mask
from trl_lightreasoner.demo.bundled_pair import PAIR, as_prompt
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.models.loading import load_model, load_tokenizer
from trl_lightreasoner.steps.dataset import count_steps, raise_beta


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    folders = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    sys.path[:0] = folders
    yield importlib.import_module("study")
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def expert():
    return load_model(str(PAIR / "expert"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def every_step(tmp_path_factory, expert):
    sampler = ContrastiveStepSampler(
        expert, str(PAIR / "amateur"), ContrastiveSamplingConfig(str(tmp_path_factory.mktemp("steps")), beta=0.0)
    )
    problems = make_problems(12, seed=0)
    return sampler.sample(Dataset.from_list([{"prompt": as_prompt(problem)} for problem in problems]))


@pytest.fixture(scope="module")
def steps(every_step):
    selected = raise_beta(every_step, 0.4)
    assert 0 < count_steps(selected) < count_steps(every_step)
    return selected


def test_one_hot_puts_all_mass_on_the_experts_token(study, steps):
    changed = study.one_hot(steps)
    assert changed["step_positions"][:] == steps["step_positions"][:]
    for row in changed:
        assert row["label_ids"] == [[row["completion_ids"][t]] for t in row["step_positions"]]
        assert row["label_probs"] == [[1.0]] * len(row["step_positions"])


def test_whole_answers_have_every_token_as_its_label(study, steps):
    for row in study.whole_answers(steps):
        assert row["step_positions"] == list(range(len(row["completion_ids"])))
        assert row["label_ids"] == [[token_id] for token_id in row["completion_ids"]]


def test_random_steps_are_as_many_a_row_and_keep_their_labels(study, every_step, steps):
    drawn = study.random_steps(every_step, steps, seed=0)
    assert list(map(len, drawn["step_positions"])) == list(map(len, steps["step_positions"]))
    assert drawn["step_positions"][:] != steps["step_positions"][:]
    for row, whole in zip(drawn, every_step, strict=True):
        assert row["step_positions"] == sorted(set(row["step_positions"]))
        own = {t: (ids, probs) for t, ids, probs in study.steps_of(whole)}
        assert all(own[t] == (ids, probs) for t, ids, probs in study.steps_of(row))
    assert study.random_steps(every_step, steps, seed=0)["step_positions"][:] == drawn["step_positions"][:]


def test_no_contrast_is_the_expert_over_its_plausible_tokens(study, steps, expert):
    changed = study.no_contrast(steps, expert)
    assert changed["step_positions"][:] == steps["step_positions"][:]
    for row in changed:
        for t, ids, probs in study.steps_of(row):
            with torch.no_grad():
                logits = expert(torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])).logits[:, -1]
            mask = plausibility_mask(logits, alpha=0.2)
            expected = logits.masked_fill(~mask, -torch.inf).softmax(-1)[0]
            assert sorted(ids) == mask[0].nonzero()[:, 0].tolist()
            assert probs == pytest.approx(expected[ids].tolist(), abs=1e-5)
            assert probs == sorted(probs, reverse=True)


def test_decoding_by_one_model_is_greedy_decoding(study, every_step, expert):
    tokenizer = load_tokenizer(str(PAIR / "expert"))
    ids = study.decode([expert], every_step["prompt_ids"][:], lambda logits: logits.argmax(-1), tokenizer.eos_token_id)
    assert ids == every_step["completion_ids"][:]


def test_contrastive_decoding_takes_the_favourite_of_the_label(study, steps, expert):
    amateur = load_model(str(PAIR / "amateur"), dtype=torch.float32).eval()
    for row in steps:
        for t, label_ids, _ in study.steps_of(row):
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])
            with torch.no_grad():
                logits = [model(ids).logits[:, -1] for model in (expert, amateur)]
            assert study.contrastive_choice(*logits, beta=0.3).tolist() == [label_ids[0]]
            assert study.contrastive_choice(*logits, beta=1e3).tolist() == [logits[0].argmax().item()]


def test_the_binomial_interval_is_where_the_share_is_two_errors_away(study):
    for num_right, count in ((0, 40), (3, 40), (150, 300), (299, 300)):
        # Wilson's ends are the p for which |share - p| = 1.96 sqrt(p (1 - p) / n)
        for p in study.binomial_interval(num_right, count):
            assert abs(num_right / count - p) == pytest.approx(1.96 * (max(p * (1 - p), 0) / count) ** 0.5, abs=1e-7)


def test_the_interval_over_pairs_is_students(study):
    values = [0.6, 0.7, 0.95]
    mean = sum(values) / 3
    error = (sum((value - mean) ** 2 for value in values) / 2 / 3) ** 0.5
    assert study.mean_interval(values) == pytest.approx((mean - 4.303 * error, mean + 4.303 * error))


def test_the_interval_of_a_difference_is_paired(study):
    rng = random.Random(0)
    better, worse = ([rng.random() < share for _ in range(400)] for share in (0.6, 0.5))
    mean, low, high = study.difference_interval([better], [worse])
    only_better = sum(a and not b for a, b in zip(better, worse, strict=True)) / 400
    only_worse = sum(b and not a for a, b in zip(better, worse, strict=True)) / 400
    assert mean == pytest.approx(only_better - only_worse)
    error = ((only_better + only_worse - mean**2) / 400) ** 0.5
    assert (high - mean, mean - low) == pytest.approx((1.96 * error, 1.96 * error))
    three = study.difference_interval([better] * 3, [worse, better, worse])
    assert three == pytest.approx((2 * mean / 3, *study.mean_interval([mean, 0, mean])))


def test_it_runs_whole(study, tmp_path, capsys):
    pair = tmp_path / "tiny"
    for role in ("expert", "amateur"):
        tokenizer = load_tokenizer(str(PAIR / role))
        torch.manual_seed(len(role))
        config = load_model(str(PAIR / role)).config
        config.hidden_size, config.num_hidden_layers, config.intermediate_size = 16, 1, 16
        config.num_attention_heads = config.num_key_value_heads = 2
        config.layer_types = config.layer_types[:1]
        config.initializer_range = 0.5  # so that the two differ
        Qwen2ForCausalLM(config).save_pretrained(pair / role)
        tokenizer.save_pretrained(pair / role)
    only = ["LightReasoner", "no contrast (fit pi_E itself)", "too close: the expert with 5 % noise on its weights"]
    argv = ["--pairs", str(pair), "--output_dir", str(tmp_path / "out"), "--num_test", "5", "--num_unlabelled", "6"]
    report = study.main([*argv, "--workers", "1", "--only", *only, "updates = 12"])
    assert json.loads((tmp_path / "out" / "study.json").read_text())["results"] == json.loads(
        json.dumps(report["results"])
    )
    assert {result["condition"] for result in report["results"]} == {"base", *only, "updates = 12"}
    tuned = {result["condition"]: result["tuned_tokens"] for result in report["results"]}
    assert (tuned["base"], tuned["LightReasoner"], tuned["updates = 12"]) == (0, 50 * 16, 12 * 16)
    printed = capsys.readouterr().out
    assert "### Sweep of updates" in printed and "| updates = 50 (the method) |" in printed
    assert printed.count("| The method improves the expert |") == 1
    assert (tmp_path / "out" / "study.md").read_text() in printed


def test_every_condition_and_claim_is_known(study):
    names = [condition.name for condition in [*study.ablations(), *study.sweeps(), *study.failures()]]
    assert len(names) == len(set(names)) == len(study.CONDITIONS)
    for claim in study.claims():
        assert {claim.better, claim.worse} <= study.CONDITIONS.keys()
    assert statistics.mean(condition.quick for condition in study.CONDITIONS.values()) > 0.5
