"""How far training has moved the model, what is said of it, and where it can be followed."""

import importlib.util
import json
import sqlite3
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.training.watching import DriftWarnings, adapter_off


pytestmark = pytest.mark.usefixtures("propagated_logs")


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def config(folder, **kwargs) -> LightReasonerConfig:
    kwargs = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 1, **kwargs}
    kwargs = {"report_to": "none", "save_strategy": "no", "per_device_eval_batch_size": 4, **kwargs}
    return LightReasonerConfig(str(folder), use_cpu=True, disable_tqdm=True, **kwargs)


def make_trainer(model, steps, folder, peft_config=LORA, **kwargs) -> LightReasonerTrainer:
    args = config(folder, **kwargs)
    return LightReasonerTrainer(model, args, train_dataset=steps, eval_dataset=steps, peft_config=peft_config)


@torch.no_grad()
def naive_drift(model, expert, tokenizer, rows) -> float:
    divergences = []
    for row in rows:
        for t in row["step_positions"]:
            context = torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])
            p, q = (each(context).logits[0, -1, : len(tokenizer)].double().softmax(-1) for each in (model, expert))
            divergences.append(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))
    return (sum(divergences) / len(divergences)).item()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_divergence_from_the_expert_is_the_mean_over_held_out_steps(
    batch_size, expert, expert_path, tokenizer, steps, tmp_path
):
    trainer = make_trainer(expert_path, steps, tmp_path, per_device_eval_batch_size=batch_size)
    assert trainer.evaluate()["eval_kl_to_expert"] == 0
    trainer.train()
    drift = trainer.evaluate()["eval_kl_to_expert"]
    assert drift > 1e-3
    assert drift == pytest.approx(naive_drift(trainer.model.eval(), expert, tokenizer, steps), rel=1e-4)


def test_it_is_logged_at_every_evaluation(expert_path, steps, tmp_path):
    trainer = make_trainer(expert_path, steps, tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    drifts = [log["eval_kl_to_expert"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(drifts) == 3 and all(drifts)


def test_evaluating_changes_nothing_about_training(expert_path, steps, tmp_path):
    weights = []
    for eval_strategy in ("no", "steps"):
        trainer = make_trainer(expert_path, steps, tmp_path, eval_strategy=eval_strategy, eval_steps=1)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *weights))


def test_what_was_frozen_of_an_adapter_stays_frozen(expert):
    model = get_peft_model(expert, LORA)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with adapter_off(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == before and any(before)


def trained_adapter(expert):
    model = get_peft_model(expert, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 if "lora_B" in name else 0)
    return model, None


WITHOUT_EXPERT = {
    "full": lambda expert: (expert, None),
    "trained before": trained_adapter,
    "PiSSA": lambda expert: (expert, LoraConfig(r=4, init_lora_weights="pissa", task_type="CAUSAL_LM")),
    "bias": lambda expert: (expert, LoraConfig(r=4, bias="all", task_type="CAUSAL_LM")),
}


@pytest.mark.parametrize("make", WITHOUT_EXPERT.values(), ids=WITHOUT_EXPERT.keys())
def test_it_is_left_out_where_the_expert_is_not_at_hand(make, expert, steps, tmp_path):
    model, peft_config = make(expert)
    metrics = make_trainer(model, steps, tmp_path, peft_config).evaluate()
    assert "eval_loss" in metrics and "eval_kl_to_expert" not in metrics


def labelled_by(steps, label_expert, adapter="adapters/first"):
    """The steps as those of a round that the model with its adapter answered."""

    def rewrite(row):
        sampling = json.loads(row["sampling_metadata"])
        sampling["settings"]["label_expert"] = label_expert
        sampling["expert"]["adapter"] = adapter
        return {"sampling_metadata": json.dumps(sampling)}

    return steps.map(rewrite)


@pytest.mark.parametrize("earlier", [False, True])
def test_in_a_later_round_the_expert_of_the_labels_is_the_base(
    earlier, expert, expert_path, tokenizer, steps, tmp_path
):
    model, _ = trained_adapter(expert)
    rows = labelled_by(steps, "base")
    rows = concatenate_datasets([steps, rows]) if earlier else rows
    drift = make_trainer(model, rows, tmp_path, None).evaluate()["eval_kl_to_expert"]
    base = AutoModelForCausalLM.from_pretrained(expert_path)
    assert drift > 1e-3
    assert drift == pytest.approx(naive_drift(model.eval(), base, tokenizer, steps), rel=1e-4)


def test_in_a_later_round_with_live_labels_the_expert_is_not_at_hand(expert, steps, tmp_path):
    model, _ = trained_adapter(expert)
    rows = concatenate_datasets([labelled_by(steps, "base"), labelled_by(steps, "live")])
    assert "eval_kl_to_expert" not in make_trainer(model, rows, tmp_path, None).evaluate()


def test_an_adapter_of_the_users_own_that_is_new_is_compared(expert, steps, tmp_path):
    assert make_trainer(get_peft_model(expert, LORA), steps, tmp_path, None).evaluate()["eval_kl_to_expert"] == 0


def test_a_resumed_run_is_compared_with_the_expert_that_it_began_as(expert, expert_path, tokenizer, steps, tmp_path):
    make_trainer(expert_path, steps, tmp_path, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(expert_path, steps, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.evaluate()["eval_kl_to_expert"] == pytest.approx(
        naive_drift(trainer.model.eval(), expert, tokenizer, steps), rel=1e-4
    )


# Warnings


def test_drift_is_told_once(expert_path, steps, tmp_path, caplog):
    trainer = make_trainer(expert_path, steps, tmp_path, learning_rate=2.0, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert trainer.state.log_history[-2]["eval_kl_to_expert"] > 1
    assert caplog.text.count("The model drifts: `eval_kl_to_expert` is") == 1


def test_nothing_is_told_where_nothing_is_wrong(expert_path, steps, tmp_path, caplog):
    trainer = make_trainer(expert_path, steps, tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert "drifts" not in caplog.text and "collapsed" not in caplog.text


def test_a_collapse_of_the_entropy_is_told_with_full_fine_tuning_too(expert, steps, tmp_path, caplog):
    with torch.no_grad():
        expert.lm_head.weight.mul_(20)  # surer of everything
    trainer = make_trainer(expert, steps, tmp_path, None)
    metrics = trainer.evaluate(metric_key_prefix="test")
    told = f"The entropy has collapsed: `test_entropy` is {metrics['test_entropy']:.3g} nats, less than half of the "
    assert told in caplog.text and "Lower `learning_rate`" in caplog.text


@pytest.mark.parametrize(
    ("means", "told"),
    [
        ({"entropy": 0.1, "label_entropy": 0.2}, 0),
        ({"entropy": 0.09, "label_entropy": 0.2}, 1),
        ({"entropy": 0.0, "label_entropy": 0.0}, 0),  # labels of one token each
        ({"entropy": 1.0, "label_entropy": 0.2, "kl_to_expert": 0.6, "expert_loss": 0.3}, 0),
        ({"entropy": 1.0, "label_entropy": 0.2, "kl_to_expert": 0.61, "expert_loss": 0.3}, 1),
    ],
)
def test_thresholds_follow_the_labels(means, told, caplog):
    warnings = DriftWarnings()
    for _ in range(2):
        warnings.look_at(means, "eval")
    assert len(caplog.records) == told


# Trackers, none of which reaches for a network


def read_tensorboard(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return set(accumulator.Tags()["scalars"])


def read_wandb(folder: Path) -> set[str]:
    import wandb

    wandb.finish()
    (log,) = folder.rglob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    return {name for name in NAMES if name.encode() in content}


def read_trackio(folder: Path) -> set[str]:
    (database,) = folder.rglob("*.db")
    with sqlite3.connect(database) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        text = str([connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables])
    return {name for name in NAMES if name in text}


NAMES = {"train/loss", "train/entropy", "train/mean_token_accuracy", "eval/loss", "eval/entropy", "eval/kl_to_expert"}
READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_gets_the_metrics_and_no_token(tracker, expert_path, steps, tmp_path, monkeypatch):
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    folder = tmp_path / "tracked"
    folder.mkdir()
    for name, value in {
        "TENSORBOARD_LOGGING_DIR": str(folder),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(folder),
    }.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(
        expert_path,
        steps,
        tmp_path / "adapter",
        report_to=tracker,
        run_name="run",
        eval_strategy="steps",
        eval_steps=1,
        hub_token="hf_SECRET",
        model_init_kwargs={"token": "hf_SECRET"},
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert READERS[tracker](folder) >= NAMES
    assert [path for path in folder.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()] == []


def test_the_model_that_was_compared_is_the_one_that_is_saved(expert_path, steps, tmp_path):
    trainer = make_trainer(expert_path, steps, tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.save_model()
    context = torch.arange(5, 25)[None]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(expert_path), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(context).logits, trainer.model.eval()(context).logits)
