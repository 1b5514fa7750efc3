"""With weights every mean over kept steps is the weighted one, whatever the cut of an update."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_lightreasoner import DataCollatorForLightReasoner, LightReasonerTrainer
from trl_lightreasoner.training import evaluating

from .test_lightreasoner_trainer import naive_steps
from .test_trainer_batches import LEARNING_RATE, config, flat, naive_losses


@pytest.fixture(scope="module")
def weighted(steps) -> Dataset:
    """8 rows of kept steps with weights from 0 to 2, whose sums differ from row to row."""
    rows = (steps.to_list() * 2)[:8]
    for i, row in enumerate(rows):
        row["step_weights"] = [((i + 3 * k) % 5) / 2 for k in range(len(row["step_positions"]))]
    assert len({sum(row["step_weights"]) for row in rows}) > 4
    return Dataset.from_list(rows)


def weights_of(rows) -> list[float]:
    return [weight for row in rows for weight in row["step_weights"]]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4)])
def test_the_update_is_that_of_the_weighted_mean(batch_size, accumulation, weighted, expert_path, tokenizer, tmp_path):
    naive = AutoModelForCausalLM.from_pretrained(expert_path)
    before = flat(naive)
    losses, weights = naive_losses(naive, tokenizer, weighted), weights_of(weighted)
    loss = sum(w * each for w, each in zip(weights, losses, strict=True)) / sum(weights)
    loss.backward()
    expected = torch.cat([(p - LEARNING_RATE * p.grad).detach().flatten() for p in naive.parameters()])

    model = AutoModelForCausalLM.from_pretrained(expert_path)
    args = config(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
    )
    trainer = LightReasonerTrainer(model, args, train_dataset=weighted)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (flat(model) - expected).norm() < 1e-4 * (expected - before).norm()


def test_what_is_logged_and_evaluated_is_weighted_alike(weighted, expert, tokenizer, tmp_path):
    naive, weights = naive_steps(expert, tokenizer, weighted), weights_of(weighted)

    def mean(key: str) -> float:
        return sum(w * step[key] for w, step in zip(weights, naive, strict=True)) / sum(weights)

    args = config(tmp_path, per_device_train_batch_size=8, per_device_eval_batch_size=3)
    trainer = LightReasonerTrainer(expert, args, train_dataset=weighted, eval_dataset=weighted)
    metrics = trainer.evaluate()
    trainer.train()
    logged = trainer.state.log_history[0]
    for name, key in (("loss", "loss"), ("entropy", "entropy"), ("mean_token_accuracy", "agreement")):
        assert metrics[f"eval_{name}"] == pytest.approx(mean(key), rel=1e-5)
        assert logged[name] == pytest.approx(mean(key), rel=1e-5)
    assert logged["num_kept_steps"] == len(weights)


def test_weights_of_1_train_as_none_and_their_scale_is_nothing(weighted, expert_path, tmp_path):
    trained = []
    for weight in (None, 1.0, 2.0**-20):
        rows = weighted.remove_columns("step_weights")
        if weight is not None:
            rows = rows.add_column("step_weights", [[weight] * len(each) for each in rows["step_positions"]])
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        LightReasonerTrainer(model, config(tmp_path), train_dataset=rows).train()
        trained.append(flat(model))
    assert torch.equal(trained[0], trained[1])
    torch.testing.assert_close(trained[2], trained[0])


def test_an_update_whose_weights_are_all_0_changes_nothing(weighted, expert, tmp_path):
    rows = weighted.map(lambda row, i: {"step_weights": [float(i == 7)] * len(row["step_weights"])}, with_indices=True)
    before = flat(expert)
    args = config(tmp_path, per_device_train_batch_size=4, train_sampling_strategy="sequential", max_steps=1)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert torch.equal(flat(expert), before)


@pytest.mark.parametrize(("weight", "is_said"), [(0.0, True), (1.0, False)])
def test_a_stream_whose_weights_are_all_0_says_so(weight, is_said, weighted, expert, tmp_path, caplog):
    rows = weighted.map(lambda row: {"step_weights": [weight] * len(row["step_weights"])})
    evaluating.logger.warning_once.cache_clear()
    args = config(tmp_path, max_steps=1)
    LightReasonerTrainer(expert, args, train_dataset=rows.to_iterable_dataset()).train()
    assert ("of the stream since the last log have weight 0" in caplog.text) == is_said


def test_a_collator_that_leaves_the_weights_out_is_refused(weighted, expert, tmp_path):
    def collate(examples):
        batch = DataCollatorForLightReasoner()(examples)
        return {name: tensor for name, tensor in batch.items() if name != "step_weights"}

    trainer = LightReasonerTrainer(expert, config(tmp_path), data_collator=collate, train_dataset=weighted)
    with pytest.raises(ValueError, match="^The batches of the `data_collator` lack `step_weights`"):
        trainer.train()
