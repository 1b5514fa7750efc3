"""Parity with the published scripts: the same models and prompts give the same steps, labels and losses."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler
from trl_lightreasoner.contrast import contrastive_loss


# A few prompts that come with the tests, and all of them where they lie beside the repository
PART = Path(__file__).parents[1] / "data" / "sampling_golden"
WHOLE = Path(__file__).parents[3] / "shared" / "reference" / "sampling_golden"


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=[PART, WHOLE], ids=["part", "whole"])
def golden(request):
    folder = request.param
    if not (folder / "samples.jsonl").is_file():
        pytest.skip("the full set of golden outputs is not beside this repository")
    return folder


@pytest.fixture(scope="module")
def sampled(golden, tmp_path_factory):
    prompts = Dataset.from_list(
        [
            {
                "prompt": [
                    {"role": "system", "content": "Please reason step by step."},
                    {"role": "user", "content": row["question"]},
                ],
                "id": row["id"],
            }
            for row in read_lines(golden / "prompts.jsonl")
        ]
    )
    args = ContrastiveSamplingConfig(
        str(tmp_path_factory.mktemp("golden")), alpha=0.2, beta=0.4, max_new_tokens=64, include_first_step=False
    )
    return ContrastiveStepSampler(str(golden / "expert"), str(golden / "amateur"), args).sample(prompts)


@pytest.fixture(scope="module")
def steps(sampled):
    """Every kept step by its prompt and position: divergence and label."""
    return {
        (row["id"], t): (row["kl_divergence"][t], dict(zip(ids, probs, strict=True)))
        for row in sampled
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True)
    }


@pytest.fixture(scope="module")
def samples(golden):
    return {(row["prompt_id"], row["step"]): row for row in read_lines(golden / "samples.jsonl")}


def test_the_same_steps_are_kept(steps, samples):
    assert steps.keys() == samples.keys()
    assert len(samples) >= 50


def test_divergences_are_the_same(steps, samples):
    for key, row in samples.items():
        assert steps[key][0] == pytest.approx(row["kl_divergence"], rel=1e-4, abs=1e-5)


def test_labels_are_the_same(steps, samples):
    for key, row in samples.items():
        expected = dict(zip(row["token_ids"], row["weights"], strict=True))
        assert steps[key][1] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_contexts_are_the_same(golden, sampled, samples):
    tokenizer = ContrastiveStepSampler(
        str(golden / "expert"), str(golden / "amateur"), ContrastiveSamplingConfig("unused")
    ).processing_class
    completions = {row["id"]: row["completion_ids"] for row in sampled}
    for (prompt, t), row in samples.items():
        assert tokenizer.decode(completions[prompt][:t]) == row["prefix"]


def test_losses_are_the_same(golden, sampled, samples):
    expert = AutoModelForCausalLM.from_pretrained(golden / "expert")
    losses = {}
    for row in sampled:
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            context = row["prompt_ids"] + row["completion_ids"][:t]
            with torch.no_grad():
                logits = expert(torch.tensor([context])).logits[:, -1]
            loss = contrastive_loss(logits, torch.tensor([ids]), torch.tensor([probs]))
            losses[row["id"], t] = loss.kl_divergence.item()
    expected = json.loads((golden / "loss.json").read_text())["per_sample_loss"]
    assert [losses[key] for key in samples] == pytest.approx(expected, rel=1e-4, abs=1e-5)
