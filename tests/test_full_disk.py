"""Disks that are really full: small ones in memory. One sentence, and with more room the same command goes on."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerState

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.pipeline.search import search
from trl_lightreasoner.report import write_report as page_writer
from trl_lightreasoner.steps import writer
from trl_lightreasoner.training.resuming import ResumableTrainer


class SmallDisk:
    def __init__(self, path):
        self.path = path
        mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(path)]
        done = subprocess.run(mount, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.path.rglob("*") if path.is_file())


@pytest.fixture
def disk(tmp_path):
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    path = tmp_path / "disk"
    path.mkdir()
    disk = SmallDisk(path)
    yield disk
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def adapter(expert, tmp_path) -> str:
    get_peft_model(expert, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_a_sampling_on_a_full_disk_goes_on_with_more_room(disk, expert_path, amateur_path, tmp_path, monkeypatch):
    prompts = Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(12)]})

    def sample(folder):
        args = ContrastiveSamplingConfig(str(folder), max_new_tokens=24, beta=0.1, per_device_batch_size=4)
        return ContrastiveStepSampler(expert_path, amateur_path, args).sample(prompts)

    folder = disk.path / "steps"
    with pytest.raises(OSError, match=r"^Cannot write to '.*' \(No space left on device\).*rerun the same command"):
        sample(folder)
    assert not [name for name in disk.files if name.endswith(".tmp")]
    disk.resize("100k")
    with pytest.raises(OSError, match=r"^Merging the rows of '.*' takes 0\.\d\d MB, but only 0\.\d\d MB are free"):
        sample(folder)
    # The room that was there is taken by somebody else while the rows are put together
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
        with pytest.raises(OSError, match=r"^Cannot finish '.*' \(No space left on device\)\. All rows are kept"):
            sample(folder)
        assert not (folder / "merging").exists() and not (folder / "data").exists()
    disk.resize("10m")
    assert sample(folder).to_dict() == sample(tmp_path / "steps").to_dict()


def test_a_merged_model_that_does_not_fit_is_not_left_half_written(disk, adapter, expert_path, capsys):
    argv = ["merge", "--model", adapter, "--base_model_name_or_path", expert_path]
    argv += ["--output_dir", str(disk.path / "model")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "error: Cannot write the model to" in said and "Free disk space" in said
    assert disk.files == []
    disk.resize("10m")
    assert main(argv) == 0


def test_a_report_that_does_not_fit_is_not_left_half_written(disk, steps, tmp_path, capsys, monkeypatch):
    steps.to_parquet(tmp_path / "steps.parquet")
    argv = ["report", "--dataset_name", str(tmp_path / "steps.parquet"), "--load_models", "false"]
    argv += ["--output_dir", str(disk.path / "report")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "Cannot write" in said and "(No space left on device). Free disk space" in said
    assert not any(name.endswith((".html", ".tmp")) for name in disk.files)  # what there is, is whole
    disk.resize("20m")

    def save_pictures(*_):  # which takes long, and says what the system does
        (disk.path / "picture.png").write_bytes(b"0" * 2**25)

    monkeypatch.setattr(page_writer, "save_pictures", save_pictures)
    assert main(argv) == 2
    said = "error: A file cannot be written (No space left on device). Free disk space or fix the permissions, and"
    assert said in capsys.readouterr().err
    (disk.path / "picture.png").unlink()
    monkeypatch.setattr(page_writer, "save_pictures", lambda *_: None)
    assert main(argv) == 0


def test_a_log_that_is_half_written_is_none(disk):
    """By it `lightreasoner run` tells that a training is finished."""
    state = TrainerState(log_history=[{"loss": 0.5, "step": step} for step in range(1000)])
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(disk.path)), state=state)
    trainer.is_world_process_zero = lambda: True
    with pytest.raises(OSError, match=r"^Cannot write '.*trainer_state.json' \(No space left on device\)\. Free disk"):
        ResumableTrainer.save_state(trainer)
    assert disk.files == []


def test_a_search_goes_on_with_more_room(disk):
    pytest.importorskip("optuna")
    folder = SimpleNamespace(study=disk.path / "study.db", trials=disk.path / "trials")
    folder.trial = lambda number: folder.trials / str(number)
    tried = []

    def train(setting, path, reporter, answers_before):
        tried.append(path.name)
        path.mkdir(parents=True)
        reporter.accuracy = 0.5
        if len(tried) == 1:
            (disk.path / "of another").write_bytes(b"0" * 2**21)  # which fills the disk

    def run():
        return search([], {"max_steps": 3}, train, folder, 1, 0, "a checksum")

    sentence = r"^Cannot write '.*study.db' \(No space left on device\)\. Finished trials are kept\. Free disk space"
    with pytest.raises(OSError, match=sentence):
        run()
    assert tried == []
    disk.resize("1m")
    with pytest.raises(OSError, match=r"No space left on device"):
        run()
    (disk.path / "of another").unlink()
    assert len(run().trials) == 1 and len(tried) == 2
