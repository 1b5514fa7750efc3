"""The functions and the optimizer class that TRL's trainers take."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_lightreasoner import LightReasonerTrainer

from .test_trainer_batches import LEARNING_RATE, config, flat


@pytest.fixture(scope="module")
def rows(steps) -> Dataset:
    """7 rows of 1 to 7 kept steps."""
    rows = (steps.to_list() * 2)[:7]
    for i, row in enumerate(rows):
        for name in ("step_positions", "label_ids", "label_probs"):
            row[name] = row[name][: i + 1]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_metrics_are_computed_from_the_logits_at_the_kept_steps(batch_size, rows, expert, tokenizer, tmp_path):
    def compute_metrics(prediction):
        logits, labels = prediction.predictions, prediction.label_ids
        for i, row in enumerate(rows):
            num_steps = len(row["step_positions"])
            assert labels[i].tolist() == [ids[0] for ids in row["label_ids"]] + [-100] * (len(labels[i]) - num_steps)
            for k, t in enumerate(row["step_positions"]):
                with torch.no_grad():
                    expected = expert(torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])).logits[0, -1]
                np.testing.assert_allclose(logits[i, k, : len(tokenizer)], expected[: len(tokenizer)], atol=1e-4)
            assert (logits[i, :num_steps, len(tokenizer) :] == -np.inf).all()  # no token
            assert (logits[i, num_steps:] == -100).all()
        return {"accuracy": (logits.argmax(-1) == labels)[labels != -100].mean()}

    args = config(tmp_path, per_device_eval_batch_size=batch_size)
    trainer = LightReasonerTrainer(
        expert, args, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics
    )
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"])


def test_logits_are_processed_before_they_are_kept(rows, expert, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        is_step = prediction.label_ids != -100
        return {"accuracy": (prediction.predictions == prediction.label_ids)[is_step].mean()}

    trainer = LightReasonerTrainer(
        expert,
        config(tmp_path, per_device_eval_batch_size=2),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"])
    assert seen == [(7, max(map(len, rows["step_positions"])))]


def test_the_best_checkpoint_can_be_told_by_a_metric_of_ones_own(rows, expert, tmp_path):
    args = config(tmp_path, eval_strategy="steps", eval_steps=1, metric_for_best_model="own")
    trainer = LightReasonerTrainer(
        expert, args, train_dataset=rows, eval_dataset=rows, compute_metrics=lambda prediction: {"own": 3.0}
    )
    trainer.train()
    assert trainer.state.best_metric == 3.0


def test_a_metric_under_a_name_that_is_taken_is_refused(rows, expert, tmp_path):
    trainer = LightReasonerTrainer(
        expert, config(tmp_path), train_dataset=rows, compute_metrics=lambda prediction: {"entropy": 1.0}
    )
    with pytest.raises(ValueError, match="^`compute_metrics` returns 'entropy', a name that is already logged"):
        trainer.evaluate(rows)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(7, 1), (2, 4)])
def test_a_loss_function_gets_logits_and_v_c_and_divides_by_the_items(
    batch_size, accumulation, rows, expert_path, tokenizer, tmp_path
):
    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        label_ids, label_probs = labels
        logps = outputs.logits[:, : len(tokenizer)].log_softmax(-1).gather(-1, label_ids)
        losses = (torch.special.xlogy(label_probs, label_probs) - label_probs * logps).sum(-1)
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    trained = []
    for function in (None, compute_loss_func):
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        args = config(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            eval_strategy="epoch",
        )
        trainer = LightReasonerTrainer(model, args, train_dataset=rows, eval_dataset=rows, compute_loss_func=function)
        trainer.train()
        logged = trainer.state.log_history
        trained.append((flat(model), torch.tensor([logged[0]["loss"], logged[1]["eval_loss"]])))
    torch.testing.assert_close(trained[1], trained[0])


def test_a_loss_function_that_would_leave_something_out_is_refused(rows, expert, tmp_path):
    weights = [[1.0] * len(positions) for positions in rows["step_positions"]]
    demonstrations = Dataset.from_dict({"prompt": ["2+2="], "completion": ["4"]})
    for dataset, sft_dataset, what in (
        (rows.add_column("step_weights", weights), None, "the `step_weights`"),
        (rows, demonstrations, "the loss of `sft_dataset`"),
    ):
        with pytest.raises(ValueError, match=f"^`compute_loss_func` does not receive {what}, so the loss"):
            LightReasonerTrainer(
                expert, config(tmp_path), train_dataset=dataset, compute_loss_func=sum, sft_dataset=sft_dataset
            )


def test_logits_that_nobody_would_read_are_not_processed(rows, expert, tmp_path):
    with pytest.raises(ValueError, match="^`preprocess_logits_for_metrics` needs `compute_metrics`"):
        LightReasonerTrainer(expert, config(tmp_path), train_dataset=rows, preprocess_logits_for_metrics=max)


def test_an_optimizer_class_is_the_one_that_trains(rows, expert_path, tmp_path):
    trained = []
    for settings in (None, (torch.optim.SGD, {"lr": LEARNING_RATE})):
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        args = config(tmp_path)
        args.optim = args.optim if settings is None else "adamw_torch"
        trainer = LightReasonerTrainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=settings)
        trainer.train()
        trained.append(flat(model))
    assert torch.equal(*trained)
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "| optim | SGD |" in card and f"| learning_rate | {LEARNING_RATE} |" in card
