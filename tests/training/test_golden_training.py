"""The training objective against the numbers of the method's published scripts, on two tiny models."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer


# A few prompts that come with the tests, and all of them where they lie beside the repository
PART = Path(__file__).parents[1] / "data" / "sampling_golden"
WHOLE = Path(__file__).parents[3] / "shared" / "reference" / "sampling_golden"


@pytest.fixture(scope="module", params=[PART, WHOLE], ids=["part", "whole"])
def folder(request) -> Path:
    if not (request.param / "samples.jsonl").is_file():
        pytest.skip("the full set of golden outputs is not beside this repository")
    return request.param


@pytest.fixture(scope="module")
def golden(folder) -> dict:
    return json.loads((folder / "loss.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows(folder) -> Dataset:
    """The samples in their order, one step a row."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "expert")
    rows = []
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        messages = [
            {"role": "system", "content": "Please reason step by step."},
            {"role": "user", "content": sample["prompt_id"]},
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A token is a character, so that the text before a step has the tokens that were generated
        prefix_ids = tokenizer(sample["prefix"], add_special_tokens=False)["input_ids"]
        assert len(prefix_ids) == sample["step"]
        rows.append(
            {
                "question": sample["prompt_id"],
                "prompt_ids": tokenizer(prompt, add_special_tokens=False)["input_ids"],
                "completion_ids": [*prefix_ids, sample["token_ids"][0]],
                "step_positions": [sample["step"]],
                "label_ids": [sample["token_ids"]],
                "label_probs": [sample["weights"]],
            }
        )
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def trajectories(rows) -> Dataset:
    """The same steps, those of a prompt in one row."""
    merged = {}
    for row in rows:
        empty = {**row, "step_positions": [], "label_ids": [], "label_probs": []}
        trajectory = merged.setdefault(row["question"], empty)
        for column in ("step_positions", "label_ids", "label_probs"):
            trajectory[column] = trajectory[column] + row[column]
        trajectory["completion_ids"] = row["completion_ids"]  # the samples of a prompt come in order
    return Dataset.from_list(list(merged.values()))


def make_trainer(folder, dataset, tmp_path) -> LightReasonerTrainer:
    args = LightReasonerConfig(
        str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", per_device_eval_batch_size=13
    )
    trainer = LightReasonerTrainer(str(folder / "expert"), args, train_dataset=dataset, eval_dataset=dataset)
    trainer.model.eval()
    return trainer


def test_number_of_samples(rows, trajectories, golden):
    assert len(rows) == len(golden["per_sample_loss"]) == sum(map(len, trajectories["step_positions"]))
    assert 1 < len(trajectories) < len(rows)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_loss_of_each_sample(padding_side, folder, rows, golden, tmp_path):
    trainer = make_trainer(folder, rows, tmp_path)
    trainer.data_collator.padding_side = padding_side
    losses = []
    for start in range(0, len(rows), 32):
        batch = trainer.data_collator(list(rows.select(range(start, min(start + 32, len(rows))))))
        with torch.no_grad():
            _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        losses += outputs.steps.kl_divergence.tolist()
    assert losses == pytest.approx(golden["per_sample_loss"], rel=1e-4, abs=1e-5)


def test_loss_of_each_sample_of_a_trajectory(folder, rows, trajectories, golden, tmp_path):
    expected = {
        (row["question"], row["step_positions"][0]): loss
        for row, loss in zip(rows, golden["per_sample_loss"], strict=True)
    }
    trainer = make_trainer(folder, trajectories, tmp_path)
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trajectories)), True)
    steps = [(row["question"], t) for row in trajectories for t in row["step_positions"]]
    losses = outputs.steps.kl_divergence.tolist()
    assert dict(zip(steps, losses, strict=True)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["rows", "trajectories"])
def test_mean_loss(name, folder, golden, tmp_path, request):
    trainer = make_trainer(folder, request.getfixturevalue(name), tmp_path)
    mean_loss = sum(golden["per_sample_loss"]) / len(golden["per_sample_loss"])
    assert golden.get("mean_loss", mean_loss) == pytest.approx(mean_loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_loss, rel=1e-4)


@pytest.mark.parametrize("name", ["rows", "trajectories"])
def test_gradient_norms_of_the_mean_loss(name, folder, golden, tmp_path, request):
    if "grad_norms_of_mean_loss" not in golden:
        pytest.skip("gradients belong to the full set of golden outputs")
    dataset = request.getfixturevalue(name)
    trainer = make_trainer(folder, dataset, tmp_path)
    batches = [
        trainer.data_collator(list(dataset.select(range(start, min(start + 48, len(dataset))))))
        for start in range(0, len(dataset), 48)
    ]
    num_steps = torch.tensor(len(golden["per_sample_loss"]))
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_steps).backward()
    parameters = dict(trainer.model.named_parameters())
    norms = {name: parameters[name].grad.norm().item() for name in golden["grad_norms_of_mean_loss"]}
    assert norms == pytest.approx(golden["grad_norms_of_mean_loss"], rel=1e-3)
