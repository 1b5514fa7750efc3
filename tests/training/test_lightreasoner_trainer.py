import copy
import dataclasses
import json
import logging
import math
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from trl_lightreasoner import DataCollatorForLightReasoner, LightReasonerConfig, LightReasonerTrainer

from ..conftest import make_model


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def config(tmp_path, **kwargs) -> LightReasonerConfig:
    kwargs = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", **kwargs}
    return LightReasonerConfig(str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, report_to="none", **kwargs)


@torch.no_grad()
def naive_steps(model, tokenizer, rows) -> list[dict[str, float]]:
    """Every kept step alone, on its own context, over the tokens of the tokenizer."""
    tokens = sorted(set(tokenizer.get_vocab().values()))
    steps = []
    for row in rows:
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            context = torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])
            logits = model(context).logits[0, -1].double().tolist()
            normaliser = math.log(sum(math.exp(logits[token]) for token in tokens))
            logps = {token: logits[token] - normaliser for token in tokens}
            steps.append(
                {
                    "loss": sum(p * (math.log(p) - logps[i]) for i, p in zip(ids, probs, strict=True)),
                    "entropy": -sum(math.exp(logp) * logp for logp in logps.values()),
                    "agreement": float(max(logps, key=logps.get) == ids[probs.index(max(probs))]),
                }
            )
    return steps


def mean(steps, key="loss") -> float:
    return sum(step[key] for step in steps) / len(steps)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before, model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


class Recorder(TrainerCallback):
    """The weights after every update."""

    def __init__(self, model):
        self.weights = [weights_of(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights_of(model))

    def moved(self) -> list[bool]:
        pairs = zip(self.weights, self.weights[1:], strict=False)
        return [any(not torch.equal(before[name], after[name]) for name in before) for before, after in pairs]


class WithoutLogitsToKeep(Qwen2ForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )


# Loss


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_the_loss_is_the_mean_over_steps_computed_one_by_one(padding_side, expert, tokenizer, steps, tmp_path):
    expected = naive_steps(expert, tokenizer, steps)
    collator = DataCollatorForLightReasoner(padding_side=padding_side)
    trainer = LightReasonerTrainer(expert, config(tmp_path), collator, steps)
    assert trainer.compute_loss(expert, collator(list(steps))).item() == pytest.approx(mean(expected), rel=1e-5)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_goes_behind_the_tokens_so_that_no_mask_is_passed(padding_side, expert, steps, tmp_path):
    collator = DataCollatorForLightReasoner(padding_side=padding_side)
    trainer = LightReasonerTrainer(expert, config(tmp_path), collator, steps)
    seen = []
    expert.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask") is not None), with_kwargs=True
    )
    trainer.compute_loss(expert, collator(list(steps)))
    assert seen == [False]


@pytest.mark.parametrize("bf16, dora, casts", [(True, False, False), (True, True, True), (False, False, True)])
def test_lora_layers_do_not_cast_what_autocast_casts(bf16, dora, casts, expert, steps, tmp_path):
    class Watcher(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({module.cast_input_dtype_enabled for module in lora_layers(model)})

    def lora_layers(model):
        return [module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")]

    seen = []
    trainer = LightReasonerTrainer(
        expert,
        config(tmp_path, bf16=bf16),
        train_dataset=steps,
        callbacks=[Watcher()],
        peft_config=LoraConfig(**LORA, use_dora=dora),
    )
    trainer.train()
    assert seen == [{casts}] * 2
    assert {module.cast_input_dtype_enabled for module in lora_layers(trainer.model)} == {True}


def test_operations_are_counted_as_trainer_counts_them(expert, steps, tmp_path):
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps)
    for count in (1, 4):
        batch = trainer.data_collator(list(steps.select(range(count))))
        assert trainer.floating_point_ops(batch) == Trainer.floating_point_ops(trainer, batch) > 0


def test_the_loss_of_a_peft_model_is_that_of_its_merged_weights(expert, tokenizer, steps, tmp_path):
    model = get_peft_model(expert, LoraConfig(**LORA, init_lora_weights=False))
    trainer = LightReasonerTrainer(model, config(tmp_path), train_dataset=steps)
    loss = trainer.compute_loss(model, trainer.data_collator(list(steps))).item()
    assert loss == pytest.approx(mean(naive_steps(model.merge_and_unload(), tokenizer, steps)), rel=1e-5)


def test_with_the_items_of_the_update_the_loss_is_its_share_of_them(expert, tokenizer, steps, tmp_path):
    expected = sum(step["loss"] for step in naive_steps(expert, tokenizer, steps.select([1, 2])))
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps)
    batch = trainer.data_collator(list(steps.select([1, 2])))
    loss = trainer.compute_loss(expert, batch, num_items_in_batch=torch.tensor(50)).item()
    assert loss == pytest.approx(expected / 50, rel=1e-5)


def test_only_kept_positions_go_through_the_head(expert, steps, tmp_path):
    rows = []
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps)
    expert.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    trainer.compute_loss(expert, trainer.data_collator(list(steps)))
    assert rows == [sum(map(len, steps["step_positions"]))]


def test_a_model_that_computes_all_logits_has_the_same_loss_and_gradients(expert, expert_path, steps, tmp_path):
    losses, gradients = [], []
    for model in (expert, WithoutLogitsToKeep.from_pretrained(expert_path)):
        trainer = LightReasonerTrainer(model, config(tmp_path), train_dataset=steps)
        loss = trainer.compute_loss(model, trainer.data_collator(list(steps)))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [1e4, math.nan])
def test_padded_logit_columns_change_nothing(value, expert, tokenizer, steps, tmp_path):
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps)
    batch = trainer.data_collator(list(steps))
    losses, gradients = [], []
    for _ in range(2):
        expert.zero_grad()
        loss = trainer.compute_loss(expert, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(expert.model.layers[0].self_attn.q_proj.weight.grad.clone())
        mask = torch.arange(expert.config.vocab_size) >= len(tokenizer)
        expert.lm_head.register_forward_hook(lambda m, inputs, logits, mask=mask: logits.masked_fill(mask, value))
    assert losses[0] == losses[1]
    assert torch.equal(*gradients)


def test_a_column_that_no_token_owns_may_lie_between_tokens(tmp_path):
    vocabulary = {"a": 0, "b": 1, "c": 3, "d": 4, "e": 6}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="a")))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    row = {
        "prompt_ids": [0, 3],
        "completion_ids": [6, 4, 1],
        "step_positions": [0, 2],
        "label_ids": [[6, 3], [1]],
        "label_probs": [[0.75, 0.25], [1.0]],
    }
    dataset = Dataset.from_list([row])
    trainer = LightReasonerTrainer(model, config(tmp_path), train_dataset=dataset, processing_class=tokenizer)
    loss = trainer.compute_loss(model, trainer.data_collator([row]))
    assert loss.item() == pytest.approx(mean(naive_steps(model, tokenizer, [row])), rel=1e-5)


def test_outputs_hold_the_logits_and_the_loss_of_every_step(expert, tokenizer, steps, tmp_path):
    expected = naive_steps(expert, tokenizer, steps)
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps)
    loss, outputs = trainer.compute_loss(expert, trainer.data_collator(list(steps)), return_outputs=True)
    assert outputs.logits.shape == (len(expected), expert.config.vocab_size)
    assert outputs.steps.kl_divergence.tolist() == pytest.approx([step["loss"] for step in expected], rel=1e-4)
    assert outputs.steps.entropy.tolist() == pytest.approx([step["entropy"] for step in expected], rel=1e-4)
    assert outputs.steps.agreement.tolist() == [step["agreement"] == 1 for step in expected]
    assert loss.item() == pytest.approx(outputs.steps.kl_divergence.mean().item(), rel=1e-6)


# Training


def test_training_changes_every_weight_and_lowers_the_loss(expert, tokenizer, steps, tmp_path):
    before, untrained = weights_of(expert), mean(naive_steps(expert, tokenizer, steps))
    trainer = LightReasonerTrainer(expert, config(tmp_path, max_steps=8, learning_rate=1e-3), train_dataset=steps)
    trainer.train()
    assert changed(before, trainer.model) == set(before)
    assert mean(naive_steps(trainer.model, tokenizer, steps)) < untrained


def test_logged_metrics_are_those_of_the_steps(expert, tokenizer, steps, tmp_path):
    # One update over all rows, so that what is logged is said of the untouched weights
    expected = naive_steps(expert, tokenizer, steps)
    args = config(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    trainer = LightReasonerTrainer(expert, args, train_dataset=steps)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(mean(expected), rel=1e-4)
    assert first["entropy"] == pytest.approx(mean(expected, "entropy"), rel=1e-4)
    assert first["mean_token_accuracy"] == pytest.approx(mean(expected, "agreement"))
    assert first["num_kept_steps"] == len(expected)
    num_tokens = sum(len(row["prompt_ids"]) + row["step_positions"][-1] for row in steps)
    assert first["num_tokens"] == num_tokens
    assert first["num_nonfinite_updates"] == 0
    # Counts are since the start
    assert (second["num_kept_steps"], second["num_tokens"]) == (2 * len(expected), 2 * num_tokens)


def test_logged_means_are_since_the_last_log(expert, tokenizer, steps, tmp_path):
    recorder = Recorder(expert)
    args = config(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    trainer = LightReasonerTrainer(expert, args, train_dataset=steps, callbacks=[recorder])
    trainer.train()
    expert.load_state_dict(recorder.weights[1])
    expected = naive_steps(expert, tokenizer, steps)
    second = trainer.state.log_history[1]
    assert second["loss"] == pytest.approx(mean(expected), rel=1e-4)
    assert second["entropy"] == pytest.approx(mean(expected, "entropy"), rel=1e-4)
    assert second["mean_token_accuracy"] == pytest.approx(mean(expected, "agreement"))


def test_means_over_several_updates_count_every_step_once(expert, tokenizer, steps, tmp_path):
    # With a learning rate of 0 every update sees the same weights
    expected = naive_steps(expert, tokenizer, steps)
    args = config(
        tmp_path,
        num_train_epochs=1,
        max_steps=-1,
        learning_rate=0.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        logging_steps=2,
    )
    trainer = LightReasonerTrainer(expert, args, train_dataset=steps)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["step"] == 2
    assert logged["entropy"] == pytest.approx(mean(expected, "entropy"), rel=1e-4)
    assert logged["mean_token_accuracy"] == pytest.approx(mean(expected, "agreement"))


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_training_ignores_other_columns(remove_unused_columns, expert, expert_path, steps, tmp_path):
    weights = []
    for dataset in (steps, steps.select_columns([c for c in steps.column_names if c.endswith(("ids", "s"))])):
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        args = config(tmp_path, remove_unused_columns=remove_unused_columns)
        trainer = LightReasonerTrainer(model, args, train_dataset=dataset, eval_dataset=dataset)
        trainer.train()
        assert "eval_loss" in trainer.evaluate()
        weights.append(weights_of(model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("named_columns", [True, False])
def test_training_on_an_iterable_dataset(named_columns, expert, tokenizer, steps, tmp_path):
    expected = naive_steps(expert, tokenizer, steps)
    before = weights_of(expert)
    rows = steps.to_iterable_dataset() if named_columns else IterableDataset.from_generator(lambda: iter(steps))
    args = config(tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean(expected), rel=1e-5)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.log_history[0]["loss"] == pytest.approx(mean(expected), rel=1e-5)
    assert changed(before, expert) == set(before)


@pytest.mark.parametrize("accumulation", [2, 4, 5])
def test_an_update_that_the_end_of_a_stream_does_not_fill_goes_on_at_its_beginning(
    accumulation, expert, expert_path, steps, tmp_path
):
    rows = steps.select(range(5))
    shared = {"max_steps": 4, "optim": "sgd", "lr_scheduler_type": "constant"}
    args = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, **shared)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows.to_iterable_dataset())
    trainer.train()
    # The same rows in the same order from a Dataset, an update a batch
    read = Dataset.from_list((rows.to_list() * 4)[: 4 * accumulation])
    whole = {"per_device_train_batch_size": accumulation, "train_sampling_strategy": "sequential"}
    args = config(tmp_path, **whole, **shared)
    other = LightReasonerTrainer(Qwen2ForCausalLM.from_pretrained(expert_path), args, train_dataset=read)
    other.train()
    for name in ("loss", "num_kept_steps"):
        logged = [[log[name] for log in each.state.log_history if name in log] for each in (trainer, other)]
        assert logged[0] == pytest.approx(logged[1], rel=1e-5) and len(logged[0]) == 4
    for weight, expected in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_a_stream_shorter_than_an_update_is_refused(expert, steps, tmp_path):
    args = config(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = LightReasonerTrainer(expert, args, train_dataset=steps.to_iterable_dataset())
    with pytest.raises(ValueError, match="^All streamed rows fill 3 of the 4 batches of an update. Lower"):
        trainer.train()


def test_streams_that_processes_would_not_share_evenly_are_refused(expert, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(LightReasonerConfig, "world_size", 2)
    monkeypatch.setattr(LightReasonerConfig, "main_process_first", nullcontext)
    rows = steps.to_iterable_dataset(num_shards=2)
    with pytest.raises(ValueError, match="The train dataset is streamed from 2 files.* Load it without streaming."):
        LightReasonerTrainer(expert, config(tmp_path, max_steps=3), train_dataset=rows)


def test_epochs_of_an_iterable_dataset_are_refused(expert, steps, tmp_path):
    rows = steps.to_iterable_dataset()
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        LightReasonerTrainer(expert, config(tmp_path, max_steps=-1, num_train_epochs=1), train_dataset=rows)


def test_rows_of_one_step_have_the_same_total_loss(expert, steps, tmp_path):
    losses = []
    for one_step_per_row in (False, True):
        args = config(tmp_path, one_step_per_row=one_step_per_row)
        trainer = LightReasonerTrainer(expert, args, train_dataset=steps, eval_dataset=steps)
        losses.append(trainer.evaluate()["eval_loss"])
    assert len(trainer.train_dataset) == sum(map(len, steps["step_positions"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_gradient_checkpointing_with_lora_trains_the_adapter(expert, expert_path, steps, tmp_path):
    adapters = []
    for kwargs in (
        {},
        {"gradient_checkpointing": True},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        args = config(tmp_path, **kwargs)
        trainer = LightReasonerTrainer(model, args, train_dataset=steps, peft_config=LoraConfig(**LORA))
        before = weights_of(trainer.model)
        trainer.train()
        assert changed(before, trainer.model) == {name for name in before if "lora_" in name}
        adapters.append({name: weight for name, weight in weights_of(trainer.model).items() if "lora_" in name})
    for adapter in adapters[1:]:
        for name, weight in adapter.items():
            torch.testing.assert_close(weight, adapters[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("named", [False, True])
def test_evaluate_takes_a_dataset_as_it_was_sampled(named, expert, tokenizer, steps, tmp_path):
    # With a row without a kept step and a row with a step that is too long
    expected = naive_steps(expert, tokenizer, steps.select([4]))
    none = {"step_positions": [], "label_ids": [], "label_probs": []}
    rows = concatenate_datasets([steps.select([4, 5]), steps.select([0]).map(lambda row: none)])
    trainer = LightReasonerTrainer(expert, config(tmp_path, max_length=30), train_dataset=steps)
    metrics = trainer.evaluate({"other": rows} if named else rows)
    assert metrics["eval_other_loss" if named else "eval_loss"] == pytest.approx(mean(expected), rel=1e-5)


def test_training_in_bf16_mixed_precision(expert, tokenizer, steps, tmp_path):
    expected = naive_steps(expert, tokenizer, steps)
    before = weights_of(expert)
    trainer = LightReasonerTrainer(expert, config(tmp_path, bf16=True), train_dataset=steps)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(mean(expected), rel=0.05)
    assert {parameter.dtype for parameter in expert.parameters()} == {torch.float32}
    assert changed(before, expert) == set(before)


def test_training_a_model_with_tied_embeddings(tokenizer, steps, tmp_path):
    model = make_model(tokenizer, tie_word_embeddings=True)
    args = config(tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=1)
    expected = mean(naive_steps(model, tokenizer, steps))
    trainer = LightReasonerTrainer(model, args, train_dataset=steps, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert mean(naive_steps(saved, tokenizer, steps)) == pytest.approx(mean(naive_steps(model, tokenizer, steps)))


def test_the_seed_decides_the_adapter(expert_path, steps, tmp_path):
    adapters = []
    for seed in (1, 1, 2):
        trainer = LightReasonerTrainer(
            expert_path, config(tmp_path, seed=seed), train_dataset=steps, peft_config=LoraConfig(**LORA)
        )
        trainer.train()
        weights = weights_of(trainer.model)
        adapters.append(torch.cat([weight.flatten() for name, weight in weights.items() if "lora_" in name]))
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


# A user's subclass


class Scaled(LightReasonerTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (3 * loss, outputs) if return_outputs else 3 * loss


class Regularised(LightReasonerTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 0.5
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(("trainer_class", "scale", "shift"), [(Scaled, 3, 0), (Regularised, 1, 0.5)])
def test_what_a_subclass_adds_is_trained_on_and_evaluated(
    trainer_class, scale, shift, expert, tokenizer, steps, tmp_path
):
    expected = scale * mean(naive_steps(expert, tokenizer, steps)) + shift
    before = weights_of(expert)
    args = config(tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=1, per_device_eval_batch_size=4)
    trainer = trainer_class(expert, args, train_dataset=steps, eval_dataset=steps)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert changed(before, expert) == set(before)


# Updates that are not finite


class Poisoned(LightReasonerTrainer):
    """The loss of some updates (counted from 0) is not finite."""

    poison = math.nan
    updates = ()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * self.poison if model.training and self.state.global_step in self.updates else loss


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_an_update_that_is_not_finite_is_left_out(poison, max_grad_norm, optim, expert, steps, tmp_path, caplog):
    recorder = Recorder(expert)
    args = config(tmp_path, max_steps=5, max_grad_norm=max_grad_norm, weight_decay=0.1, optim=optim)
    trainer = Poisoned(expert, args, train_dataset=steps, callbacks=[recorder])
    trainer.poison, trainer.updates = poison, (1, 2)
    with caplog.at_level(logging.WARNING, logger="trl_lightreasoner.training.lightreasoner_trainer"):
        trainer.train()
    assert recorder.moved() == [True, False, False, True, True]
    assert all(weight.isfinite().all() for weight in recorder.weights[-1].values())
    logged = [log["num_nonfinite_updates"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [0, 1, 2, 2, 2]
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert "The gradient of update 2 is not finite. The update is skipped (1 so far)." in caplog.messages


def test_the_last_update_is_told_of_as_well(expert, steps, tmp_path, caplog):
    trainer = Poisoned(expert, config(tmp_path, max_steps=2, logging_steps=10), train_dataset=steps)
    trainer.updates = (1,)
    with caplog.at_level(logging.WARNING, logger="trl_lightreasoner.training.nonfinite_updates"):
        trainer.train()
    assert "The gradient of update 2 is not finite. The update is skipped (1 so far)." in caplog.messages
    assert not hasattr(trainer.optimizer.optimizer, "found_inf")  # or it would leave out what others do with it


def test_one_bad_batch_of_an_update_leaves_the_whole_update_out(expert, steps, tmp_path):
    class OneBatch(LightReasonerTrainer):
        num_batches = 0

        def compute_loss(self, model, inputs, **kwargs):
            self.num_batches += 1
            return super().compute_loss(model, inputs, **kwargs) * (math.nan if self.num_batches == 5 else 1)

    recorder = Recorder(expert)
    args = config(tmp_path, max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    OneBatch(expert, args, train_dataset=steps, callbacks=[recorder]).train()
    assert recorder.moved() == [True, False, True, True]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_three_updates_in_a_row_that_are_not_finite_stop_the_training(optim, expert, steps, tmp_path):
    recorder = Recorder(expert)
    args = config(tmp_path, max_steps=9, optim=optim)
    trainer = Poisoned(expert, args, train_dataset=steps, callbacks=[recorder])
    trainer.updates = range(2, 9)
    with pytest.raises(FloatingPointError, match="3 times in a row.*update 5.*NaN in the base model's weights.*0.01"):
        trainer.train()
    assert all(torch.equal(weight, recorder.weights[2][name]) for name, weight in weights_of(expert).items())


def test_training_that_was_stopped_stops_again(expert, steps, tmp_path):
    trainer = Poisoned(expert, config(tmp_path, max_steps=9), train_dataset=steps)
    trainer.updates = range(9)
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            trainer.train()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_updates_that_the_gradient_scaler_of_fp16_leaves_out_are_counted(optim, expert, steps, tmp_path, caplog):
    recorder = Recorder(expert)
    trainer = Poisoned(expert, config(tmp_path, max_steps=7, optim=optim), train_dataset=steps, callbacks=[recorder])
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)  # accelerate makes it for GPUs alone
    trainer.updates = (0, 1, 2, 3, 5)  # at scales of 8, 4, 2, 1, 1/2
    with caplog.at_level(logging.WARNING, logger="trl_lightreasoner.training.nonfinite_updates"):
        trainer.train()
    assert recorder.moved() == [False, False, False, False, True, False, True]
    logged = [log["num_nonfinite_updates"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [1, 2, 3, 4, 4, 5, 5]
    said = [message[:25] for message in caplog.messages if message.startswith("The gradient of update")]
    assert said == ["The gradient of update 4 ", "The gradient of update 6 "]  # before, the scale was too high


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_fp16_stops_if_the_gradient_is_not_finite_at_any_scale(optim, expert, steps, tmp_path):
    before = {name: weight.clone() for name, weight in weights_of(expert).items()}
    trainer = Poisoned(expert, config(tmp_path, max_steps=9, optim=optim), train_dataset=steps)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
    trainer.updates = range(9)
    with pytest.raises(FloatingPointError, match="3 times in a row, so training stopped at update 6"):
        trainer.train()
    assert trainer.skip_nonfinite_updates.count == 6
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(expert).items())


def test_updates_that_are_not_finite_may_come_again_after_a_good_one(expert, steps, tmp_path):
    trainer = Poisoned(expert, config(tmp_path, max_steps=8), train_dataset=steps)
    trainer.updates = (0, 1, 3, 4, 6, 7)
    trainer.train()
    assert trainer.skip_nonfinite_updates.count == 6


def test_nan_in_the_base_model_is_never_trained_into_an_adapter(expert, steps, tmp_path):
    with torch.no_grad():
        expert.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    args = config(tmp_path, max_steps=5)
    trainer = LightReasonerTrainer(expert, args, train_dataset=steps, peft_config=LoraConfig(**LORA))
    before = weights_of(trainer.model)
    with pytest.raises(FloatingPointError, match="NaN in the base model's weights"):
        trainer.train()
    assert all(
        torch.equal(weight, before[name]) for name, weight in weights_of(trainer.model).items() if "lora_" in name
    )


# Length of training


def one_step_rows(steps):
    return steps.map(
        lambda row: {key: row[key][:1] for key in ("step_positions", "label_ids", "label_probs")}, batched=False
    )


@pytest.mark.parametrize("kwargs", [{}, {"one_step_per_row": True}])
def test_updates_are_as_many_however_many_rows_there_are(kwargs, expert, steps, tmp_path):
    for rows in (steps, steps.select([0]), one_step_rows(steps)):
        args = LightReasonerTrainer(expert, config(tmp_path, max_steps=-1, **kwargs), train_dataset=rows).args
        assert (args.max_steps, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (125, 8, 1)


def test_the_config_passed_in_is_left_as_it_was(expert, steps, tmp_path):
    args = config(tmp_path)
    names = [field.name for field in dataclasses.fields(args)]
    before = {name: copy.deepcopy(getattr(args, name)) for name in names}
    LightReasonerTrainer(expert, args, train_dataset=steps)
    assert {name: getattr(args, name) for name in names} == before


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"max_steps": 7}, (7, None)),
        ({"num_train_epochs": 5.0, "max_steps": -1}, (-1, 5.0)),
        ({"num_train_epochs": 5.0, "max_steps": 7}, (7, 5.0)),
    ],
)
def test_a_length_that_is_set_is_kept(kwargs, expected, expert, steps, tmp_path):
    trainer = LightReasonerTrainer(expert, config(tmp_path, **kwargs), train_dataset=one_step_rows(steps))
    assert trainer.args.max_steps == expected[0]
    assert expected[1] is None or trainer.args.num_train_epochs == expected[1]


# The threshold


def diverging(steps, divergence: float, beta: float = 0.4):
    """The steps as if all had diverged by `divergence`, and had been sampled with `beta`."""

    def change(row):
        made = json.loads(row["sampling_metadata"])
        made["settings"]["beta"] = beta
        kl_divergence = [divergence] * len(row["completion_ids"])
        return {"kl_divergence": kl_divergence, "sampling_metadata": json.dumps(made)}

    return steps.map(change)


def test_a_threshold_below_that_of_the_sampling_is_refused(expert, steps, tmp_path, caplog):
    rows = concatenate_datasets([diverging(steps, 2.0, beta=0.4), diverging(steps, 2.0, beta=1.2)])
    with pytest.raises(ValueError, match="`beta=0.8` is below 1.2, the `beta` of the sampling"):
        LightReasonerTrainer(expert, config(tmp_path, beta=0.8), train_dataset=rows)
    for beta in (0, 1.2, 2.0):
        assert LightReasonerTrainer(expert, config(tmp_path, beta=beta), train_dataset=rows).beta == beta
    assert "was sampled with" not in caplog.text


@pytest.mark.parametrize(("beta", "is_told"), [(0.4, False), (1.9, True)])
def test_held_out_rows_of_a_higher_threshold_are_told(beta, is_told, expert, steps, tmp_path, caplog):
    rows, held_out = diverging(steps, 2.0), diverging(steps, 2.0, beta)
    LightReasonerTrainer(expert, config(tmp_path, beta=1.0), train_dataset=rows, eval_dataset=held_out)
    told = "The eval dataset was sampled with `beta` = 1.9, and training uses the steps of 1 nats or more"
    assert (told in caplog.text) == is_told


@pytest.mark.parametrize("beta", [0.4, 1.95])
def test_a_threshold_that_nobody_named_is_not_below_that_of_the_sampling(beta, expert, steps, tmp_path):
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=diverging(steps, 2.0, beta))
    assert trainer.beta >= beta
    assert trainer.beta == 1.95 or beta == 0.4


def test_a_threshold_that_nobody_named_is_that_of_the_training_rows(expert, steps, tmp_path):
    rows = concatenate_datasets([diverging(steps, 2.0), diverging(steps, 0.5)])
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=rows, eval_dataset=rows)
    assert trainer.beta in (1.6, 0.8)
    num_high = sum(map(len, steps["step_positions"]))
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        assert sum(map(len, dataset["step_positions"])) == num_high


def test_held_out_rows_that_do_not_reach_it_are_evaluated_as_they_are(expert, steps, tmp_path):
    low = diverging(steps, 0.5)
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=diverging(steps, 2.0), eval_dataset=low)
    assert trainer.eval_dataset["step_positions"][:] == low["step_positions"][:]


def test_held_out_rows_that_do_not_reach_a_threshold_of_the_users_are_refused(expert, steps, tmp_path):
    args = config(tmp_path, beta=1.0)
    with pytest.raises(
        ValueError, match="The eval dataset has no step to train on: none .* reaches `beta=1.0`; lower"
    ):
        LightReasonerTrainer(expert, args, train_dataset=diverging(steps, 2.0), eval_dataset=diverging(steps, 0.5))


# Arguments


def test_args_can_be_left_out(expert, steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = LightReasonerTrainer(expert, train_dataset=steps)
    assert isinstance(trainer.args, LightReasonerConfig)
    assert trainer.args.output_dir.endswith("expert-LightReasoner")


def test_plain_training_arguments_are_accepted(expert, steps, tmp_path):
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, learning_rate=0.5, hub_token="secret", report_to="none"
    )
    trainer = LightReasonerTrainer(expert, args, train_dataset=steps)
    assert isinstance(trainer.args, LightReasonerConfig)
    assert (trainer.args.learning_rate, trainer.args.gradient_accumulation_steps) == (0.5, 1)
    assert trainer.args.hub_token == "secret"
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_tokenizer_is_loaded_from_beside_the_model(expert, tokenizer, steps, tmp_path):
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps)
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()


def test_a_model_that_does_not_know_its_folder_needs_a_tokenizer(tokenizer, steps, tmp_path):
    with pytest.raises(ValueError, match="Pass the tokenizer as `processing_class`"):
        LightReasonerTrainer(make_model(tokenizer), config(tmp_path), train_dataset=steps)
    LightReasonerTrainer(make_model(tokenizer), config(tmp_path), train_dataset=steps, processing_class=tokenizer)


def test_a_processing_class_of_another_kind_is_refused(expert, steps, tmp_path):
    with pytest.raises(TypeError, match="`processing_class` must be a `PreTrainedTokenizerBase`"):
        LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps, processing_class="tokenizer")


def test_a_train_dataset_is_required(expert, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        LightReasonerTrainer(expert, config(tmp_path))


def test_a_train_dataset_of_another_kind_is_refused(expert, steps, tmp_path):
    with pytest.raises(TypeError, match="must be a `Dataset` or `IterableDataset`, got `list`"):
        LightReasonerTrainer(expert, config(tmp_path), train_dataset=list(steps))


def test_a_malformed_row_is_refused_before_the_weights_are_loaded(expert_path, steps, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_lightreasoner.training.lightreasoner_trainer.load_model", None)
    rows = steps.map(lambda row: {"label_ids": [[299 + 12] * len(ids) for ids in row["label_ids"]]})
    with pytest.raises(ValueError, match="Row 0 of the train dataset cannot be used for training"):
        LightReasonerTrainer(expert_path, config(tmp_path), train_dataset=rows)


def test_a_malformed_eval_row_names_its_dataset(expert, steps, tmp_path):
    rows = steps.map(lambda row: {"step_positions": row["step_positions"][::-1]})
    with pytest.raises(ValueError, match="Row 0 of the held_out dataset cannot be used for training"):
        LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps, eval_dataset={"held_out": rows})


def test_several_gpus_in_one_process_are_refused(expert, steps, tmp_path):
    args = config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="does not support `nn.DataParallel`.*`accelerate launch`"):
        LightReasonerTrainer(expert, args, train_dataset=steps)


# Model


def test_a_path_is_loaded_and_trained_in_float32(expert, expert_path, tokenizer, steps, tmp_path):
    expert.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    trainer = LightReasonerTrainer(str(tmp_path / "bf16"), config(tmp_path), train_dataset=steps)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    before = weights_of(trainer.model)
    trainer.train()
    assert changed(before, trainer.model) == set(before)


def test_with_a_peft_config_the_frozen_weights_keep_their_dtype(expert, tokenizer, steps, tmp_path):
    expert.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    trainer = LightReasonerTrainer(
        str(tmp_path / "bf16"), config(tmp_path), train_dataset=steps, peft_config=LoraConfig(**LORA)
    )
    dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    before = weights_of(trainer.model)
    trainer.train()
    assert changed(before, trainer.model) == {name for name in before if "lora_" in name}


def test_an_adapter_of_a_float16_checkpoint_is_trained_in_float32_on_a_cpu(expert, tokenizer, steps, tmp_path):
    expert.to(torch.float16).save_pretrained(tmp_path / "fp16")
    tokenizer.save_pretrained(tmp_path / "fp16")
    trainer = LightReasonerTrainer(
        str(tmp_path / "fp16"), config(tmp_path), train_dataset=steps, peft_config=LoraConfig(**LORA)
    )
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_an_adapter_folder_keeps_the_dtype_of_its_base(expert, tokenizer, steps, tmp_path):
    expert.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    get_peft_model(base, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    trainer = LightReasonerTrainer(str(tmp_path / "adapter"), config(tmp_path), train_dataset=steps)
    dtypes = {parameter.dtype for name, parameter in trainer.model.named_parameters() if "lora_" not in name}
    assert dtypes == {torch.bfloat16}


def test_model_init_kwargs_reach_the_model(expert_path, steps, tmp_path):
    args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"})
    trainer = LightReasonerTrainer(expert_path, args, train_dataset=steps)
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.model.config._attn_implementation == "eager"


def test_model_init_kwargs_of_a_loaded_model_are_said_to_be_ignored(expert, steps, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_lightreasoner.training.lightreasoner_trainer"):
        LightReasonerTrainer(expert, config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}), train_dataset=steps)
    assert any("`model_init_kwargs` will be ignored" in record.message for record in caplog.records)
    assert expert.dtype == torch.float32


def test_a_peft_model_is_trained_as_it_is(expert, steps, tmp_path):
    model = get_peft_model(expert, LoraConfig(**LORA, init_lora_weights=False))
    before = weights_of(model)
    trainer = LightReasonerTrainer(model, config(tmp_path), train_dataset=steps)
    assert trainer.model is model
    trainer.train()
    assert changed(before, model) == {name for name in before if "lora_" in name}


def test_an_adapter_folder_is_trained_further(expert, steps, tmp_path):
    first = LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps, peft_config=LoraConfig(**LORA))
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    second = LightReasonerTrainer(str(tmp_path / "adapter"), config(tmp_path), train_dataset=steps)
    before = weights_of(second.model)
    assert all(torch.equal(weight, weights_of(first.model)[name]) for name, weight in before.items())
    second.train()
    assert changed(before, second.model) == {name for name in before if "lora_" in name}


def test_a_peft_model_with_a_peft_config_is_refused(expert, steps, tmp_path):
    model = get_peft_model(expert, LoraConfig(**LORA))
    with pytest.raises(ValueError, match="You passed a `PeftModel` instance together with a `peft_config`"):
        LightReasonerTrainer(model, config(tmp_path), train_dataset=steps, peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["all weights", "an adapter"])
def test_a_base_model_that_still_has_an_adapter_on_its_layers_is_refused(peft_config, expert, steps, tmp_path):
    adapted = get_peft_model(expert, LoraConfig(**LORA))
    with pytest.raises(ValueError, match="^The model has an adapter on its layers, .* call that model's `unload"):
        LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps, peft_config=peft_config)
    bare = adapted.unload().requires_grad_(True)
    LightReasonerTrainer(bare, config(tmp_path), train_dataset=steps, peft_config=peft_config)


def test_a_peft_model_that_cannot_be_trained_is_refused(expert, expert_path, steps, tmp_path):
    get_peft_model(expert, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(expert_path), str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="no trainable parameter. Load the adapter with `is_trainable=True`"):
        LightReasonerTrainer(frozen, config(tmp_path), train_dataset=steps)


def test_prompt_tuning_is_refused(expert, steps, tmp_path):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="`peft_config` is an adapter of virtual tokens .`PROMPT_TUNING`., .* Use"):
        LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps, peft_config=peft_config)


def test_a_peft_config_of_another_kind_is_refused(expert, steps, tmp_path):
    with pytest.raises(TypeError, match="`peft_config` must be a `peft.PeftConfig` instance .* got dict"):
        LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps, peft_config=LORA)


@pytest.mark.parametrize("as_path", [True, False])
def test_an_encoder_decoder_model_is_refused(as_path, tokenizer, steps, tmp_path):
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    model.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="encoder-decoder model .`t5`.*causal language model, such as Qwen2.5"):
        LightReasonerTrainer(
            str(tmp_path / "t5") if as_path else model,
            config(tmp_path),
            train_dataset=steps,
            processing_class=tokenizer,
        )


def test_an_encoder_is_refused(tokenizer, steps, tmp_path):
    model = BertModel(
        BertConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ValueError, match="(?s)no next-token distribution"):
        LightReasonerTrainer(model, config(tmp_path), train_dataset=steps, processing_class=tokenizer)


def test_a_folder_that_does_not_exist_is_refused(steps, tmp_path):
    with pytest.raises(ValueError, match="The model .* cannot be found. It must be a folder with a config.json"):
        LightReasonerTrainer(str(tmp_path / "nowhere"), config(tmp_path), train_dataset=steps)


# Quantization


def test_quantization_set_in_two_places_is_refused(expert_path, steps, tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="You set `quantization_config` both"):
        LightReasonerTrainer(
            expert_path,
            config(tmp_path, model_init_kwargs={"quantization_config": {"load_in_4bit": True}}),
            train_dataset=steps,
            quantization_config=quantization,
        )


def test_qlora_trains_a_bfloat16_adapter_of_a_model_evaluated_before(tokenizer, steps, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model(tokenizer, hidden_size=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    gradients = []
    for evaluate in (False, True):
        trainer = LightReasonerTrainer(
            str(tmp_path / "model"),
            config(tmp_path),
            train_dataset=steps,
            eval_dataset=steps,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
            peft_config=LoraConfig(**LORA),
        )
        if evaluate:
            trainer.evaluate()
        before = weights_of(trainer.model)
        assert {before[name].dtype for name in before if "lora_" in name} == {torch.bfloat16}
        trainer.train()
        assert changed(before, trainer.model) == {name for name in before if "lora_" in name}
        gradients.append(torch.cat([w.flatten() for name, w in weights_of(trainer.model).items() if "lora_" in name]))
    assert torch.equal(*gradients)
