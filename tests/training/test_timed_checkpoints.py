"""Checkpoints by the clock, which a test sets."""

import copy
import json
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils.hub import PushInProgress

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.training import timed_checkpoints


LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def config(folder, **kwargs) -> LightReasonerConfig:
    kwargs = {"max_steps": 12, "learning_rate": 1e-2, "gradient_accumulation_steps": 1, **kwargs}
    return LightReasonerConfig(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **kwargs)


class Clock(TrainerCallback):
    """A clock that an update, an evaluation and a saving move on by some seconds. It notes the updates saved."""

    def __init__(self, update: float = 0.0, evaluation: float = 0.0, saving: float = 0.0):
        self.now, self.update, self.evaluation, self.saving = 0.0, update, evaluation, saving
        self.saved: list[int] = []

    def monotonic(self) -> float:
        return self.now

    def on_step_begin(self, *args, **kwargs):
        self.now += self.update

    def on_evaluate(self, *args, **kwargs):
        self.now += self.evaluation

    def on_save(self, args, state, control, **kwargs):
        self.now += self.saving
        self.saved.append(state.global_step)


@pytest.fixture
def train(expert_path, steps, tmp_path, monkeypatch):
    def run(clock: Clock, eval_dataset=None, resume_from_checkpoint=None, **settings) -> list[int]:
        """The updates whose checkpoints are saved."""
        monkeypatch.setattr(timed_checkpoints, "time", clock)
        LightReasonerTrainer(
            expert_path,
            config(settings.pop("output_dir", tmp_path / "out"), **settings),
            train_dataset=steps,
            eval_dataset=eval_dataset,
            peft_config=copy.copy(LORA),
            callbacks=[clock],
        ).train(resume_from_checkpoint)
        return clock.saved

    return run


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("seconds", "saved"),
    [(0.05, [12]), (60, [5, 10, 12]), (299, [2, 4, 6, 8, 10, 12]), (3600, [*range(1, 13)])],
)
def test_a_checkpoint_is_saved_when_five_minutes_have_passed_and_at_the_end(seconds, saved, train):
    assert train(Clock(seconds)) == saved


@pytest.mark.parametrize(("limit", "count"), [(None, 2), (1, 1), (4, 4), (0, 12)])
def test_the_newest_are_kept(limit, count, train, tmp_path):
    train(Clock(3600), save_total_limit=limit)
    assert kept(tmp_path / "out") == [*range(1, 13)][-count:]


@pytest.mark.parametrize("out", ["out", "./out", "out/"])
def test_the_best_is_kept_too(out, train, steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = {"metric_for_best_model": "loss", "greater_is_better": True}  # which falls: the best one is the first
    train(Clock(3600), steps, eval_strategy="steps", eval_steps=1, max_steps=5, output_dir=out, **best)
    assert kept(tmp_path / "out") == [1, 4, 5]


@pytest.mark.parametrize("always", [False, True], ids=["after the last", "always"])
def test_a_checkpoint_stays_while_it_is_uploaded(always, tmp_path):
    args, control = config(tmp_path), TrainerControl()
    trainer = SimpleNamespace(push_in_progress=None)
    checkpoints = timed_checkpoints.TimedCheckpoints(trainer)
    checkpoints.on_train_begin(args, TrainerState(), control)

    def save(update: int) -> list[int]:
        (tmp_path / f"checkpoint-{update}").mkdir()
        job = futures.Future()
        if trainer.push_in_progress is None or trainer.push_in_progress.is_done():  # as `Trainer` does before
            trainer.push_in_progress = PushInProgress([job])
        elif always:
            trainer.push_in_progress.jobs.append(job)
        checkpoints.on_step_end(args, TrainerState(global_step=update), control)
        checkpoints.on_save(args, TrainerState(global_step=update), control)
        return kept(tmp_path)

    assert [save(update) for update in (1, 2, 3, 4)][-1] == [1, 2, 3, 4]
    for job in trainer.push_in_progress.jobs:
        job.set_result(None)
    assert [save(update) for update in (5, 6, 7)] == [[4, 5], [5, 6], [5, 6, 7]]


def test_the_checkpoints_of_an_earlier_part_stay(train, tmp_path):
    """Of a training that resumes without the `save_steps` that it began with."""
    train(Clock(), save_steps=2, max_steps=6)
    train(Clock(3600), max_steps=10, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert kept(tmp_path / "out") == [2, 4, 6, 9, 10]


def test_a_resumed_training_saves_at_the_times_that_are_chosen_now(train, tmp_path):
    train(Clock(), max_steps=4)
    checkpoint = str(tmp_path / "out" / "checkpoint-4")
    assert train(Clock(), max_steps=9, save_steps=2, resume_from_checkpoint=checkpoint) == [6, 8, 9]


def test_where_saving_is_slow_it_takes_a_twentieth_of_the_time(train):
    # The first one at 300 seconds, and the next not before 300 + 100 + 20 * 100
    assert train(Clock(update=300, saving=100)) == [1, 8, 12]


def test_an_evaluation_before_a_saving_is_not_taken_for_it(train, steps):
    # Updates end 300, 1700, 3000 and 4300 seconds after the start. The first checkpoint is saved in 100, at 1400
    clock = Clock(update=300, evaluation=1000, saving=100)
    assert train(clock, steps, eval_strategy="steps", eval_steps=1, max_steps=5) == [1, 4, 5]


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_steps": 5}, [5, 10, 12]),
        ({"save_steps": 0.5}, [6, 12]),
        ({"save_strategy": "epoch", "per_device_train_batch_size": 4}, [2, 4, 6, 8, 10, 12]),
    ],
)
def test_the_time_that_the_user_chose_is_kept_and_so_are_all_checkpoints(settings, saved, train, tmp_path):
    assert train(Clock(3600), **settings) == saved == kept(tmp_path / "out")


def test_the_best_model_is_chosen_among_all_that_are_evaluated(train, steps, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "max_steps": 6}
    assert train(Clock(3600), steps, **evaluated) == [3, 6] == kept(tmp_path / "out")


@pytest.mark.parametrize("eval_steps", [0.25, 3, None])
def test_with_the_best_model_every_evaluation_has_a_checkpoint(eval_steps, tmp_path):
    args = config(tmp_path, eval_strategy="steps", eval_steps=eval_steps, load_best_model_at_end=True)
    assert args.save_steps == args.eval_steps == (eval_steps or args.logging_steps)


def test_an_interrupted_command_says_how_to_resume_and_ends_with_the_weights_of_an_uninterrupted_one(
    expert_path, steps, tmp_path, monkeypatch, capsys
):
    def command(folder: str, *flags: str) -> int:
        argv = ["train", "--expert", expert_path, "--dataset_name", str(tmp_path / "steps.parquet"), "--use_cpu"]
        argv += ["--output_dir", str(tmp_path / folder), "--max_steps", "4", "--gradient_accumulation_steps", "1"]
        return main([*argv, "--report_to", "none", "--disable_tqdm", "true", *flags])

    def break_off(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return training_step(trainer, *args, **kwargs)

    steps.to_parquet(tmp_path / "steps.parquet")
    assert command("straight") == 0
    training_step = LightReasonerTrainer.training_step
    monkeypatch.setattr(timed_checkpoints, "_SECONDS", 0.0)
    monkeypatch.setattr(timed_checkpoints, "_TIMES_SAVING", 0)
    with monkeypatch.context() as patch:
        patch.setattr(LightReasonerTrainer, "training_step", break_off)
        assert command("out") == 130
    remedy = "Rerun the same command with `--resume_from_checkpoint true` to resume from the last checkpoint."
    assert capsys.readouterr().err.splitlines()[-1].endswith(remedy)
    assert command("out") == 2
    assert "Set `--resume_from_checkpoint true` to resume it" in capsys.readouterr().err
    assert command("out", "--resume_from_checkpoint", "true") == 0
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert kept(tmp_path / "out") == [2, 3, 4] and log[-1]["step"] == 4
    resumed, straight = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "straight"))
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


def train_by_own_clock(rank: int, clocks: list[float], rows: str, model: str, folder: str) -> None:
    torch.set_num_threads(1)
    clock = Clock(clocks[rank])
    timed_checkpoints.time = SimpleNamespace(monotonic=clock.monotonic)
    LightReasonerTrainer(
        model,
        config(folder, dataloader_pin_memory=False),
        train_dataset=Dataset.from_parquet(rows),
        peft_config=copy.copy(LORA),
        callbacks=[clock],
    ).train()
    Path(folder, f"saved_by_{rank}.json").write_text(json.dumps(clock.saved))


@pytest.mark.parametrize(("clocks", "saved"), [([3600.0, 0.0], [10, 12]), ([0.0, 3600.0], [12])])
def test_several_processes_save_together_by_the_clock_of_the_first(
    clocks, saved, in_group, expert_path, steps, tmp_path
):
    steps.to_parquet(tmp_path / "steps.parquet")
    in_group(2, train_by_own_clock, clocks, str(tmp_path / "steps.parquet"), expert_path, str(tmp_path / "out"))
    for rank in range(2):
        assert json.loads((tmp_path / "out" / f"saved_by_{rank}.json").read_text()) == saved
