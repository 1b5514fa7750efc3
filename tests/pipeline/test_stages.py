"""Training in `run` and `tune` where memory runs out."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.models.loading import load_model
from trl_lightreasoner.pipeline.stages import train_adapter
from trl_lightreasoner.training.memory import TrainingMemoryError


LORA = SimpleNamespace(lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "v_proj"])


@pytest.fixture
def train(expert_path, tokenizer, steps, tmp_path):
    def run(name: str, earlier=None, **settings) -> dict[str, torch.Tensor]:
        args = LightReasonerConfig(
            str(tmp_path / name), max_steps=3, beta=0.0, learning_rate=1e-2, use_cpu=True, report_to="none", **settings
        )
        train_adapter(load_model(expert_path), tokenizer, steps, args, LORA, earlier=earlier and tmp_path / earlier)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    return run


@pytest.fixture
def room(monkeypatch):
    """Lets training run out of memory with more rows than this at a time."""

    def limit(rows: int) -> list[int]:
        step, asked = LightReasonerTrainer.training_step, []

        def training_step(self, model, inputs, *args):
            asked.append(self.args.per_device_train_batch_size)
            if asked[-1] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step(self, model, inputs, *args)

        monkeypatch.setattr(LightReasonerTrainer, "training_step", training_step)
        return asked

    return limit


def test_a_training_that_runs_out_of_memory_takes_fewer_rows_at_a_time(train, room, tmp_path, caplog):
    expected = train("two", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    asked = room(2)
    adapter = train("eight", per_device_train_batch_size=8)
    assert asked[:2] == [8, 4] and {*asked[2:]} == {2}
    assert all(torch.equal(adapter[name], each) for name, each in expected.items())
    state = json.loads((tmp_path / "eight" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert "from its last checkpoint, if it has one, with 2 trajectories at a time" in caplog.text


def test_a_training_that_runs_out_of_memory_keeps_the_updates_of_its_last_checkpoint(train, monkeypatch):
    step, updates = LightReasonerTrainer.training_step, []

    def training_step(self, model, inputs, *args):
        updates.append(self.state.global_step)
        if len(updates) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(LightReasonerTrainer, "training_step", training_step)
    train("out", per_device_train_batch_size=8, save_steps=1)
    assert updates == [0, 1, 2, 2, 2]  # the last one with two batches


def test_an_adapter_that_is_trained_further_begins_again_as_it_was(train, room):
    train("before", per_device_train_batch_size=4)
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    expected = train("two", "before", **halves)
    room(2)
    adapter = train("four", "before", per_device_train_batch_size=4)
    assert all(torch.equal(adapter[name], each) for name, each in expected.items())


def test_a_training_without_room_for_a_row_says_what_needs_less(train, room):
    room(0)
    with pytest.raises(TrainingMemoryError, match="^Memory ran out with 1 row per batch. Lower `max_length`, or set"):
        train("none", per_device_train_batch_size=2)
