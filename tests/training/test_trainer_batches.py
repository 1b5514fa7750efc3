"""However the rows of an update are cut into batches, it is the same update."""

import math

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from trl_lightreasoner import DataCollatorForLightReasoner, LightReasonerConfig, LightReasonerTrainer


LEARNING_RATE = 0.02


@pytest.fixture(scope="module")
def rows(steps) -> Dataset:
    """19 rows of 1 to 11 kept steps: updates of 8, 8 and 3 rows."""
    shorter = steps.map(
        lambda row, index: {key: row[key][: index + 1] for key in ("step_positions", "label_ids", "label_probs")},
        with_indices=True,
    )
    rows = concatenate_datasets([steps, shorter, steps, shorter.select([0])])
    numbers = [len(positions) for positions in rows["step_positions"]]
    assert len(numbers) == 19 and len(set(numbers)) > 5
    return rows


def config(tmp_path, **kwargs) -> LightReasonerConfig:
    # Plain SGD, so that the scale of a gradient shows in the weights
    return LightReasonerConfig(
        str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        **kwargs,
    )


def flat(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def naive_losses(model, tokenizer, rows) -> list[torch.Tensor]:
    """The loss of every kept step alone, on its own context."""
    losses = []
    for row in rows:
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            context = torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])
            logps = model(context).logits[0, -1, : len(tokenizer)].log_softmax(-1)
            losses.append(sum(p * (math.log(p) - logps[i]) for i, p in zip(ids, probs, strict=True)))
    return losses


def naive_training(model, tokenizer, rows) -> list[float]:
    """SGD on the mean over the kept steps of 8 rows, then the next 8; the loss of each update."""
    logged = []
    for start in range(0, len(rows), 8):
        window = rows.select(range(start, min(start + 8, len(rows))))
        losses = naive_losses(model, tokenizer, window)
        loss = sum(losses) / len(losses)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
        logged.append(loss.item())
    return logged


class WithoutLossKwargs(Qwen2ForCausalLM):
    # `Trainer` scales the loss of such a model by the number of batches, unless it is told not to
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0):
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )


CUTS = [(8, 1), (1, 8), (2, 4), (4, 2)]


@pytest.fixture(scope="module")
def naive(expert_path, tokenizer, rows) -> tuple[torch.Tensor, list[float]]:
    model = AutoModelForCausalLM.from_pretrained(expert_path)
    logged = naive_training(model, tokenizer, rows)
    return flat(model), logged


@pytest.mark.parametrize("model_class", [Qwen2ForCausalLM, WithoutLossKwargs])
@pytest.mark.parametrize(("batch_size", "accumulation"), CUTS)
def test_updates_are_those_of_the_mean_over_their_kept_steps(
    batch_size, accumulation, model_class, expert_path, rows, naive, tmp_path
):
    weights, logged = naive
    model = model_class.from_pretrained(expert_path)
    args = config(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    before = flat(model)
    trainer = LightReasonerTrainer(model, args, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 3
    moved = (weights - before).norm()
    assert (flat(model) - weights).norm() < 1e-4 * moved
    assert [log["loss"] for log in trainer.state.log_history[:3]] == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("with_lora", [False, True])
def test_every_cut_of_an_update_gives_the_same_weights(with_lora, expert_path, rows, tmp_path):
    # Shuffled, and with clipping, as training runs by default
    weights, logs = [], []
    for batch_size, accumulation in CUTS:
        args = config(tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        trainer = LightReasonerTrainer(
            AutoModelForCausalLM.from_pretrained(expert_path),
            args,
            train_dataset=rows,
            peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]) if with_lora else None,
        )
        trainer.train()
        weights.append(flat(trainer.model))
        logs.append([(log["loss"], log["entropy"], log["num_kept_steps"]) for log in trainer.state.log_history[:3]])
    for other, log in zip(weights[1:], logs[1:], strict=True):
        assert (other - weights[0]).norm() < 1e-6 * weights[0].norm()
        for ours, theirs in zip(log, logs[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


class Penalised(LightReasonerTrainer):
    """Adds a term of its own, of which each batch brings the share that its kept steps are of the update's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        share = 1 if num_items_in_batch is None else len(outputs.logits) / num_items_in_batch
        loss = loss + share * self.penalty(model)
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def penalty(model) -> torch.Tensor:
        return 1e-3 * sum(parameter.square().sum() for parameter in model.parameters())


def test_a_subclass_that_shares_its_term_out_is_cut_alike(expert_path, tokenizer, rows, tmp_path):
    weights = []
    for batch_size, accumulation in CUTS:
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        with torch.no_grad():
            losses = torch.stack(naive_losses(model, tokenizer, rows.select(range(8))))
            expected = (losses.mean() + Penalised.penalty(model)).item()
        args = config(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
        )
        trainer = Penalised(model, args, train_dataset=rows, eval_dataset=rows.select(range(8)))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        weights.append(flat(model))
    assert all((other - weights[0]).norm() < 1e-6 * weights[0].norm() for other in weights[1:])


def test_rows_of_one_step_give_the_update_of_their_trajectories(expert_path, steps, tmp_path):
    # All rows in one update, whole or exploded
    weights = []
    for one_step_per_row in (False, True):
        args = config(
            tmp_path,
            one_step_per_row=one_step_per_row,
            per_device_train_batch_size=7,
            gradient_accumulation_steps=7,
        )
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        trainer = LightReasonerTrainer(model, args, train_dataset=steps)
        trainer.train()
        assert trainer.state.global_step == 1
        weights.append(flat(model))
    assert (weights[1] - weights[0]).norm() < 1e-6 * weights[0].norm()


def test_padding_on_either_side_gives_the_same_update(expert_path, rows, tmp_path):
    weights = []
    for padding_side in ("right", "left"):
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        collator = DataCollatorForLightReasoner(padding_side=padding_side)
        LightReasonerTrainer(
            model, config(tmp_path, per_device_train_batch_size=8), data_collator=collator, train_dataset=rows
        ).train()
        weights.append(flat(model))
    assert (weights[1] - weights[0]).norm() < 1e-6 * weights[0].norm()


def test_a_collator_may_leave_the_indices_to_the_trainer(expert_path, rows, tmp_path):
    def without_indices(examples):
        batch = DataCollatorForLightReasoner()(examples)
        return {name: tensor for name, tensor in batch.items() if not name.endswith("_index")}

    weights = []
    for collator in (None, without_indices):
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        args = config(tmp_path, per_device_train_batch_size=8)
        LightReasonerTrainer(model, args, data_collator=collator, train_dataset=rows).train()
        weights.append(flat(model))
    assert torch.equal(*weights)


@pytest.mark.parametrize("pins", [False, True])
def test_batches_from_pinned_memory_are_not_waited_for(pins, expert, rows, tmp_path):
    args = config(tmp_path)
    args.dataloader_pin_memory = pins  # as it is by default where there is a GPU
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows)
    assert trainer.get_train_dataloader()._non_blocking == pins
    # What the trainer sets for itself is not the user's
    assert args.logging_nan_inf_filter and not args.accelerator_config.non_blocking


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_eval_loss_is_the_mean_over_steps(batch_size, drop_last, expert, tokenizer, rows, tmp_path):
    expected = torch.stack(naive_losses(expert, tokenizer, rows)).mean().item()
    args = config(tmp_path, per_device_eval_batch_size=batch_size, dataloader_drop_last=drop_last)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("max_steps", [3, -1])
def test_fewer_rows_than_a_batch_are_refused_if_the_last_batch_is_dropped(max_steps, expert, rows, tmp_path):
    args = config(tmp_path, per_device_train_batch_size=len(rows) + 1, dataloader_drop_last=True, max_steps=max_steps)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows)
    with pytest.raises(ValueError, match="`dataloader_drop_last` leaves nothing to train on"):
        trainer.train()


def test_the_last_batch_is_dropped_in_training_alone(expert, rows, tmp_path):
    args = config(tmp_path, per_device_train_batch_size=len(rows) - 1, dataloader_drop_last=True, max_steps=2)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows, eval_dataset=rows)
    trainer.evaluate()
    assert len(trainer.get_train_dataloader()) == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_eval_loss_of_streamed_rows_is_that_of_a_dataset(batch_size, expert, rows, tmp_path):
    args = config(tmp_path, per_device_eval_batch_size=batch_size)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows)
    streamed = trainer.evaluate(rows.to_iterable_dataset())["eval_loss"]
    assert streamed == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=1e-6)


def test_predict_takes_rows_as_they_were_sampled(expert, rows, tmp_path):
    without = {"step_positions": [], "label_ids": [], "label_probs": []}
    sampled = rows.map(lambda row, i: row if i else without, with_indices=True)
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=rows)
    assert trainer.predict(sampled).metrics["test_loss"] == trainer.evaluate(sampled)["eval_loss"]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_can_be_grouped_by_length(strategy, expert, rows, tmp_path):
    args = config(tmp_path, train_sampling_strategy=strategy, max_steps=1)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows)
    trainer.train()
    ends = [len(row["prompt_ids"]) + row["step_positions"][-1] for row in rows if row["step_positions"]]
    assert trainer.train_dataset["length"][:] == ends


class OwnLoss(LightReasonerTrainer):
    """A loss that has nothing of the parent's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def test_a_loss_all_of_a_subclass_is_evaluated(expert, tokenizer, rows, tmp_path):
    args = config(tmp_path, per_device_eval_batch_size=1)
    trainer = OwnLoss(expert, args, train_dataset=rows)
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    with torch.no_grad():
        losses = [trainer.model(input_ids=batch["input_ids"]).logits.square().mean().item() for batch in batches]
    weights = [batch["step_mask"].sum().item() for batch in batches]
    mean = sum(w * each for w, each in zip(weights, losses, strict=True)) / sum(weights)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(mean, rel=1e-5)


def test_eval_loss_is_on_the_scale_of_the_training_loss(expert, rows, tmp_path):
    args = config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=5, per_device_eval_batch_size=3)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows, eval_dataset=rows)
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(eval_loss, rel=1e-5)


def test_eval_metrics_are_means_over_steps(expert, tokenizer, rows, tmp_path):
    entropies, agreements = [], []
    for row in rows:
        for t, ids in zip(row["step_positions"], row["label_ids"], strict=True):
            context = torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])
            with torch.no_grad():
                probs = expert(context).logits[0, -1, : len(tokenizer)].softmax(-1)
            entropies.append(-sum(p * math.log(p) for p in probs.tolist()))
            agreements.append(probs.argmax().item() == ids[0])
    trainer = LightReasonerTrainer(
        expert, config(tmp_path, per_device_eval_batch_size=4), train_dataset=rows, eval_dataset=rows
    )
    metrics = trainer.evaluate()
    assert metrics["eval_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(sum(agreements) / len(agreements))


def test_evaluation_leaves_what_is_logged_of_training_alone(expert_path, rows, tmp_path):
    logs = []
    for eval_strategy in ("no", "steps"):
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        args = config(tmp_path, eval_strategy=eval_strategy, eval_steps=1)
        trainer = LightReasonerTrainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        names = ("loss", "entropy", "mean_token_accuracy", "num_kept_steps", "num_tokens")
        logs.append([[log[name] for name in names] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == logs[1]


def test_each_of_several_eval_datasets_has_its_own_loss(expert, tokenizer, rows, tmp_path):
    parts = {"first": rows.select(range(5)), "second": rows.select(range(5, 19))}
    expected = {name: torch.stack(naive_losses(expert, tokenizer, part)).mean().item() for name, part in parts.items()}
    args = config(tmp_path, per_device_eval_batch_size=4, eval_strategy="epoch")
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows, eval_dataset=parts)
    metrics = trainer.evaluate()
    for name, loss in expected.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.train()
    assert {f"eval_{name}_loss" for name in parts} <= {name for log in trainer.state.log_history for name in log}
