"""Going on from a checkpoint: exactly, or with a sentence that says why not."""

import copy
import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.steps.dataset import SFT_COLUMNS
from trl_lightreasoner.steps.sft_rows import encode_sft_rows
from trl_lightreasoner.training import checkpoints
from trl_lightreasoner.training.checkpoints import find_checkpoint, last_checkpoint, saving
from trl_lightreasoner.training.dataset import put_beside
from trl_lightreasoner.training.resuming import _checksum

from ..conftest import make_tokenizer


pytestmark = pytest.mark.usefixtures("propagated_logs")

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def config(folder, **kwargs) -> LightReasonerConfig:
    kwargs = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, **kwargs}
    return LightReasonerConfig(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **kwargs)


@pytest.fixture(scope="module")
def straight(expert_path, steps, tmp_path_factory) -> Path:
    """A training of 4 updates that was left alone, with checkpoints after 2 and 4, and its adapter."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = LightReasonerTrainer(expert_path, config(folder), train_dataset=steps, peft_config=copy.copy(LORA))
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def halfway(straight, tmp_path) -> Path:
    """The same, broken off after 2 updates."""
    return Path(shutil.copytree(straight / "checkpoint-2", tmp_path / "out" / "checkpoint-2"))


@pytest.fixture
def resume(expert_path, steps, tmp_path):
    def resume(checkpoint=True, rows=steps, lora=LORA, **settings) -> LightReasonerTrainer:
        args = config(tmp_path / "out", **settings)
        trainer = LightReasonerTrainer(expert_path, args, train_dataset=rows, peft_config=copy.copy(lora))
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    return resume


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_its_state_is_refused(name, halfway, resume):
    (halfway / name).unlink()
    message = rf"Training cannot resume exactly from '{halfway}': there is no {name}, for example because of"
    for checkpoint in (True, str(halfway)):
        with pytest.raises(ValueError, match=message):
            resume(checkpoint)


def test_weights_alone_are_refused_before_any_are_loaded(expert_path, steps, tmp_path, capsys):
    args = config(tmp_path / "out", max_steps=2, save_only_model=True)
    LightReasonerTrainer(expert_path, args, train_dataset=steps, peft_config=copy.copy(LORA)).train()
    flags = ["--output_dir", str(tmp_path / "out"), "--dataset_name", "none", "--resume_from_checkpoint", "true"]
    assert main(["train", "--model_name_or_path", expert_path, "--use_cpu", *flags]) == 2
    assert "for example because of `--save_only_model`. Resume from another checkpoint, or" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"]
)
def test_a_cut_file_is_named(name, halfway, resume):
    cut(halfway / name)
    with pytest.raises(
        ValueError, match=f"^The checkpoint '{halfway}' is damaged: {name} is truncated. Resume from another"
    ):
        resume(str(halfway))


# Of a checkpoint whose saving was killed, and of one that the disk has lost the end of
@pytest.mark.parametrize("break_off", [Path.unlink, cut])
@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt"])
def test_the_newest_complete_checkpoint_is_gone_on_from(break_off, name, straight, halfway, resume, caplog):
    broken = Path(shutil.copytree(straight / "checkpoint-4", halfway.parent / "checkpoint-4"))
    break_off(broken / name)
    assert find_checkpoint("true", str(halfway.parent)) == last_checkpoint(str(halfway.parent)) == str(halfway)
    assert caplog.text.count(f"Resuming from '{halfway}', because a newer checkpoint is skipped. ") == 2
    if (break_off, name) == (Path.unlink, "trainer_state.json"):
        resume().save_model()
        trained, expected = (load_file(f / "adapter_model.safetensors") for f in (halfway.parent, straight))
        assert all(torch.equal(trained[name], weight) for name, weight in expected.items())
        assert last_checkpoint(str(halfway.parent)) == str(broken)


def test_only_an_incomplete_checkpoint_is_none(halfway):
    (halfway / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="^There is no complete checkpoint in .* to start from the beginning.$"):
        find_checkpoint(True, str(halfway.parent))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate was 0\.01 and is now 0\.001 \(the old value is used\)"),
        ({"weight_decay": 0.1}, r"weight_decay was 0\.0 and is now 0\.1 \(the old value is used\)"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was 'linear' and is now 'cosine'"),
        ({"seed": 7}, "seed was 42 and is now 7"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "dtype was 'float32' and is now 'bfloat16'"),
        ({"lora": replace(LORA, lora_dropout=0.0)}, r"peft_config\.lora_dropout was 0\.1 and is now 0\.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_refused_unless_the_checkpoint_is_named(settings, said, halfway, resume):
    message = (
        f"^The checkpoint '{halfway}' is from a different training: {said}. Restore the old value, or choose another "
    )
    with pytest.raises(ValueError, match=message):
        resume(**settings)


def test_what_differs_is_said_where_the_checkpoint_is_named(straight, halfway, resume, caplog):
    trainer = resume(str(halfway), learning_rate=1e-3, weight_decay=0.1)
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("trl_lightreasoner")]
    assert "learning_rate was 0.01 and is now 0.001 (the old value is used); weight_decay was" in warning
    assert warning.endswith("The weights will differ from those of an uninterrupted run.")
    # What is said is what is done
    expected = json.loads((straight / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    rates = [[log["learning_rate"] for log in logs if "loss" in log] for logs in (trainer.state.log_history, expected)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": replace(LORA, r=2)}, r"peft_config\.r was 4 and is now 2"),
        ({"lora": replace(LORA, lora_alpha=16)}, r"peft_config\.lora_alpha was 8 and is now 16"),
        ({"lora": replace(LORA, target_modules=["q_proj"])}, r"peft_config\.target_modules was .*"),
        ({"lora": None}, r"adapter was 'default' and is now None\. Restore the old value"),
        ({"optim": "sgd"}, "optim was 'adamw_torch_fused' and is now 'sgd'"),
    ],
    ids=["r", "alpha", "layers", "full", "optim"],
)
def test_what_does_not_fit_is_refused_even_where_the_checkpoint_is_named(settings, said, halfway, resume):
    with pytest.raises(ValueError, match=f"^Training cannot resume from '{halfway}': {said}"):
        resume(str(halfway), **settings)


def test_another_dataset_is_said(halfway, steps, resume, caplog):
    message = "the rows of the dataset, or their order, have changed"
    for rows in (steps.select([1, 0, 2, 3, 4, 5]), steps.select(range(5))):
        with pytest.raises(ValueError, match=message):
            resume(rows=rows)
        caplog.clear()
        resume(str(halfway), rows=rows)
        assert caplog.text.count(message) == 1


def test_weights_and_demonstrations_are_part_of_the_rows(steps):
    weights = [[float(t) for t in positions] for positions in steps["step_positions"]]
    weighted = steps.add_column("step_weights", weights)
    demonstrations = [
        encode_sft_rows(Dataset.from_dict({"prompt": ["2+2="], "completion": [answer]}), make_tokenizer())
        for answer in ("4", "5")
    ]
    mixed = [put_beside(steps, rows) for rows in demonstrations]
    assert len({_checksum(rows) for rows in (steps, weighted, *mixed)}) == 4
    assert _checksum(mixed[0].remove_columns(SFT_COLUMNS)) == _checksum(steps)


def test_the_same_rows_in_other_types_are_the_same(halfway, steps, resume, caplog):
    resume(rows=type(steps).from_list(steps.to_list()))
    assert "another training" not in caplog.text


def test_another_trainings_checkpoint_is_not_saved_under_ones_own_name(straight, steps, resume, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    with pytest.raises(ValueError, match="is from a different training: the rows of the dataset"):
        resume(rows=steps.select(range(4)), max_steps=2)


def test_a_checkpoint_that_says_nothing_of_its_training_must_fit_all_the_same(halfway, resume):
    state = json.loads((halfway / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["RememberTraining"]
    (halfway / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"^The checkpoint '{halfway}' does not fit the model, or is damaged: "):
        resume(lora=replace(LORA, r=2))
    with pytest.raises(ValueError, match="it holds no weights of the whole model"):
        resume(lora=None)


def test_the_best_model_is_loaded_into_an_adapter_that_has_a_name(expert, steps, tmp_path):
    class Worsening(LightReasonerTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (loss, outputs) if return_outputs else -loss

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    model = get_peft_model(expert, copy.copy(LORA), adapter_name="own")
    trainer = Worsening(model, config(tmp_path, max_steps=2, **settings), train_dataset=steps, eval_dataset=steps)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
    # And is gone on from
    args = config(tmp_path, max_steps=3, **settings)
    again = Worsening(model, args, train_dataset=steps, eval_dataset=steps)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_memory_that_runs_out_is_one_sentence(halfway, resume, monkeypatch):
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LightReasonerTrainer, "compute_loss", run_out)
    with pytest.raises(
        ValueError, match="^Memory ran out with 8 rows per batch. Lower `per_device_train_batch_size` and"
    ):
        resume()


def test_two_trainings_do_not_share_a_folder(expert_path, steps, resume, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "_lock"), pytest.raises(ValueError, match="^Another training is writing into"):
        resume(None)
    resume(None, max_steps=1)


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer.json", "optimizer.pt", "rng_state.pth"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(name, halfway, resume):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs Linux")
    full = halfway.parent / "checkpoint-4"
    full.mkdir()
    (full / name).symlink_to("/dev/full")
    reason = r"\((No space left on device|a file could not be written completely, as on a full disk)\)"
    kept = r"Earlier checkpoints are kept\. Free disk space or fix the permissions, and resume from the last one\."
    with pytest.raises(OSError, match=rf"^Cannot write the checkpoint '{full}' {reason}\. {kept}"):
        resume()
    assert [path.name for path in halfway.parent.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_model_that_does_not_fit_on_the_disk_need_not_be_trained_again(halfway, resume):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs Linux")
    trainer = resume(save_strategy="no")
    (halfway.parent / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"^Cannot write the model to .*, and resume from the last checkpoint"):
        trainer.save_model()
    shutil.rmtree(halfway)
    with pytest.raises(OSError, match=r"^Cannot write the model to .*, and train again\.$"):
        trainer.save_model()


def test_nothing_is_said_to_be_kept_where_nothing_is(tmp_path):
    with pytest.raises(OSError, match=r"No such file or directory.*Free disk space .* train again\.$"):
        with saving(tmp_path / "gone" / "checkpoint-1"):
            (tmp_path / "gone" / "checkpoint-1" / "file").write_text("")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("")])
def test_a_state_that_is_half_written_is_none(error, tmp_path):
    with pytest.raises(OSError, match="^Cannot write the checkpoint"), saving(tmp_path / "checkpoint-1"):
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "trainer_state.json").write_text('{"epoch": 1, ')
        raise error
    assert not (tmp_path / "checkpoint-1").exists()


def test_what_goes_wrong_behind_a_checkpoint_leaves_it(tmp_path):
    with pytest.raises(ConnectionError, match="^no Hub$"), saving(tmp_path):
        (tmp_path / "trainer_state.json").write_text("{}")
        raise ConnectionError("no Hub")
    assert (tmp_path / "trainer_state.json").exists()


def test_a_checkpoint_dated_in_the_future_is_not_taken_for_the_newest(halfway, resume):
    os.utime(halfway, (time.time() + 1e6,) * 2)
    resume(save_total_limit=1)
    assert [path.name for path in halfway.parent.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_checkpoint_that_is_written_over_is_not_taken_for_complete(straight, tmp_path):
    folder = Path(shutil.copytree(straight / "checkpoint-2", tmp_path / "checkpoint-2"))
    with saving(folder):
        assert checkpoints.last_checkpoint(str(tmp_path)) is None


@pytest.mark.parametrize("left", ["adapter", "checkpoint", "half an adapter"])
def test_the_command_does_not_write_over_a_training(left, straight, expert_path, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    if left == "checkpoint":
        shutil.copytree(straight / "checkpoint-2", out / "checkpoint-2")
    else:
        shutil.copy(straight / "adapter_model.safetensors", out)
    if left == "adapter":
        (out / "trainer_state.json").write_text("{}")
    flags = ["--output_dir", str(out), "--dataset_name", str(tmp_path / "none.jsonl"), "--use_cpu"]
    assert main(["train", "--model_name_or_path", expert_path, *flags]) == 2
    is_refused = f"'{out}' holds" in capsys.readouterr().err
    assert is_refused == (left != "half an adapter")
