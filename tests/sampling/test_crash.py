"""Nothing sampled is lost: real processes are killed, files damaged, disks filled."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler
from trl_lightreasoner.commands.cli import main

from ..conftest import die_at_call


NUM_PROMPTS = 40


pytestmark = pytest.mark.usefixtures("propagated_logs")


@pytest.fixture(scope="module")
def many_prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [f"What is {i} + {i * i}?" for i in range(NUM_PROMPTS)]})


SETTINGS = {"max_new_tokens": 8, "beta": 1.95, "per_device_batch_size": 2}


@pytest.fixture
def sampler(expert_path, amateur_path, tmp_path):
    def make(**kwargs):
        args = {"output_dir": str(tmp_path / "steps"), **SETTINGS, **kwargs}
        return ContrastiveStepSampler(expert_path, amateur_path, ContrastiveSamplingConfig(**args))

    return make


@pytest.fixture(scope="module")
def left_alone(expert_path, amateur_path, many_prompts, tmp_path_factory):
    args = ContrastiveSamplingConfig(str(tmp_path_factory.mktemp("left alone")), **SETTINGS)
    return ContrastiveStepSampler(expert_path, amateur_path, args).sample(many_prompts)


def sample_and_die(expert: str, amateur: str, folder: str, questions: list[str], call: str | None, number: int):
    """Sample in a process of its own, which kills itself at the `number`-th call of a function of `os`."""
    torch.set_num_threads(1)
    if call is not None:
        die_at_call(call, number)
    args = ContrastiveSamplingConfig(folder, **SETTINGS)
    ContrastiveStepSampler(expert, amateur, args).sample(Dataset.from_dict({"prompt": questions}))


@pytest.fixture
def in_a_process(forkserver, expert_path, amateur_path, many_prompts, tmp_path):
    def start(call: str | None = None, number: int = 0) -> multiprocessing.Process:
        args = (expert_path, amateur_path, str(tmp_path / "steps"), many_prompts["prompt"][:], call, number)
        process = forkserver.Process(target=sample_and_die, args=args)
        process.start()
        return process

    return start


def shards(folder: Path) -> set[str]:
    return {path.name for path in (folder / "shards").glob("*.parquet")}


def equal(made: Dataset, expected: Dataset) -> bool:
    # The same batches give the same numbers to the last bit
    return made.to_list() == expected.to_list()


def test_a_run_killed_at_any_moment_ends_as_one_left_alone(in_a_process, sampler, many_prompts, left_alone, tmp_path):
    rng, kills, seen = random.Random(0), 0, set()
    while kills < 15:
        process = in_a_process()
        time.sleep(rng.uniform(0.1, 0.7))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was finished before the kill: once more from the beginning
            assert equal(sampler().sample(many_prompts), left_alone)
            subprocess.run(["rm", "-r", tmp_path / "steps"], check=True)
            seen = set()
            continue
        kills += 1
        # What was there before this run still is, unless it has become the finished Dataset
        if not (tmp_path / "steps" / "data").exists():
            assert seen <= shards(tmp_path / "steps")
            seen = shards(tmp_path / "steps")
    assert equal(sampler().sample(many_prompts), left_alone)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [1, 2, 7, 20, 22, 23, 41, 46])
def test_a_run_killed_inside_a_write_ends_as_one_left_alone(
    call, number, in_a_process, sampler, many_prompts, left_alone, tmp_path
):
    process = in_a_process(call, number)
    process.join(60)
    # There are 23 renames: of the run file twice, of 20 batches, and of the folder of the result
    assert process.exitcode == (0 if call == "replace" and number > 23 else -signal.SIGKILL)
    assert equal(sampler().sample(many_prompts), left_alone)
    assert {path.name for path in (tmp_path / "steps").iterdir()} == {"data", "run.json", ".lock"}


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.fixture
def stopped(sampler, many_prompts, tmp_path, monkeypatch):
    """A run that broke off after some batches."""
    run, calls = ContrastiveStepSampler._run, 0

    def break_off(*args):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("power cut")
        return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveStepSampler, "_run", break_off)
        with pytest.raises(RuntimeError, match="power cut"):
            sampler().sample(many_prompts)
    return tmp_path / "steps"


@pytest.mark.parametrize("damage", [cut, flip, lambda content: b""], ids=["cut", "flipped bit", "emptied"])
def test_a_damaged_shard_is_sampled_again_with_a_word(damage, stopped, sampler, many_prompts, left_alone, caplog):
    assert len(shards(stopped)) == 5
    shard = sorted((stopped / "shards").iterdir())[2]
    shard.write_bytes(damage(shard.read_bytes()))
    made = sampler().sample(many_prompts)
    assert f"{shard} is damaged. Its rows are sampled again." in caplog.text
    assert equal(made, left_alone)


def test_what_is_there_is_not_sampled_again(stopped, sampler, many_prompts, monkeypatch, caplog):
    sampled, run = [], ContrastiveStepSampler._run
    monkeypatch.setattr(
        ContrastiveStepSampler,
        "_run",
        lambda self, indices, *args: sampled.extend(indices) or run(self, indices, *args),
    )
    sampler().sample(many_prompts)
    assert "10 of 40 prompts are already sampled." in caplog.text
    assert len(sampled) == len(set(sampled)) == NUM_PROMPTS - 10


def test_a_finished_run_is_given_back_without_sampling(sampler, many_prompts, monkeypatch):
    made = sampler().sample(many_prompts)
    monkeypatch.setattr(ContrastiveStepSampler, "_run", None)
    assert equal(sampler().sample(many_prompts), made)


def test_a_damaged_result_is_sampled_again_with_a_word(sampler, many_prompts, left_alone, tmp_path, caplog):
    sampler().sample(many_prompts)
    (path,) = (tmp_path / "steps" / "data").iterdir()
    path.write_bytes(flip(path.read_bytes()))
    assert equal(sampler().sample(many_prompts), left_alone)
    assert "data is damaged. Everything is sampled again." in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0.3}, "started with alpha = 0.2, but it is now 0.3"),
        ({"beta": 2.5}, "started with beta = 1.95, but it is now 2.5"),
        ({"max_new_tokens": 9}, "started with max_new_tokens = 8, but it is now 9"),
        ({"max_prompt_length": 50}, "started with max_prompt_length = None, but it is now 50"),
        ({"include_first_step": True}, "started with include_first_step = False, but it is now True"),
        ({"dtype": "bfloat16"}, "started with expert dtype = 'torch.float32', but it is now 'torch.bfloat16'"),
    ],
)
def test_another_setting_is_refused_by_its_name(kwargs, message, stopped, sampler, many_prompts):
    before = shards(stopped)
    with pytest.raises(ValueError, match=message) as error:
        sampler(**kwargs).sample(many_prompts)
    assert "choose another `output_dir`, or set `overwrite_output_dir=True`" in str(error.value)
    assert shards(stopped) == before


def test_other_prompts_are_refused(stopped, sampler, many_prompts):
    with pytest.raises(ValueError, match=r"started with prompts \(tokens\) = "):
        sampler().sample(many_prompts.select(range(NUM_PROMPTS - 1, -1, -1)))


def test_other_columns_are_refused(stopped, sampler, many_prompts):
    with pytest.raises(ValueError, match="started with columns = .*but it is now .*'id'"):
        sampler().sample(many_prompts.add_column("id", list(range(NUM_PROMPTS))))


def test_a_refused_run_does_not_keep_the_folder(stopped, sampler, many_prompts, left_alone):
    with pytest.raises(ValueError, match="started with alpha") as error:
        sampler(alpha=0.3).sample(many_prompts)
    assert equal(sampler().sample(many_prompts), left_alone)
    assert error.value.__traceback__ is not None  # as a notebook keeps it, and with it all that the run held


def test_a_folder_that_cannot_be_made_is_one_sentence(sampler, many_prompts, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        OSError, match=r"^Cannot write to '.*file/steps' \(Not a directory\). Choose another `output_dir`"
    ):
        sampler(output_dir=str(tmp_path / "file" / "steps")).sample(many_prompts)


def test_fewer_prompts_are_refused(stopped, sampler, many_prompts):
    with pytest.raises(ValueError, match="started with number of prompts = 40, but it is now 39"):
        sampler().sample(many_prompts.select(range(NUM_PROMPTS - 1)))


@pytest.mark.parametrize("side", ["expert", "amateur"])
def test_other_weights_are_refused(side, stopped, sampler, many_prompts, expert, amateur):
    changed = {"expert": expert, "amateur": amateur}[side]
    with torch.no_grad():
        changed.model.layers[1].self_attn.v_proj.weight[3, 3] += 1e-3
    other = sampler()
    setattr(other._pair, side, changed)
    with pytest.raises(ValueError, match=f"started with {side} weights = "):
        other.sample(many_prompts)


def test_another_batch_size_goes_on(stopped, sampler, many_prompts, left_alone):
    made = sampler(per_device_batch_size=5).sample(many_prompts)
    for column in ("completion_ids", "step_positions", "label_ids"):
        assert made[column][:] == left_alone[column][:]


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_template_that_prints_the_date_does_not_end_a_run_at_midnight(
    is_finished, sampler, expert_path, tmp_path, today
):
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"What is {i}?"}] for i in range(4)]})

    def sample() -> Dataset:
        run = sampler()
        run.processing_class = tokenizer
        return run.sample(prompts)

    today(28)
    made = sample()
    if not is_finished:
        shutil.rmtree(tmp_path / "steps" / "data")
    today(29)
    assert equal(sample(), made)
    assert "28 Nov 2026" in tokenizer.decode(made["prompt_ids"][0])


def test_overwriting_starts_afresh(stopped, sampler, many_prompts):
    assert len(sampler(alpha=0.3, overwrite_output_dir=True).sample(many_prompts)) == NUM_PROMPTS


def test_two_runs_in_one_folder_are_refused(sampler, many_prompts, tmp_path, monkeypatch):
    run, messages = ContrastiveStepSampler._run, []

    def second_run(*args):
        if not messages:
            with pytest.raises(ValueError) as error:
                messages.append(None)
                sampler().sample(many_prompts)
            messages[0] = str(error.value)
        return run(*args)

    monkeypatch.setattr(ContrastiveStepSampler, "_run", second_run)
    assert len(sampler().sample(many_prompts)) == NUM_PROMPTS
    assert messages[0].startswith("Another run is writing into ")


@pytest.mark.parametrize("error", [28, 30], ids=["full disk", "read-only"])
def test_a_disk_that_takes_no_more_is_one_sentence_and_loses_nothing(
    error, sampler, many_prompts, left_alone, tmp_path, monkeypatch
):
    replace, calls = os.replace, 0

    def full(*args):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise OSError(error, os.strerror(error))
        return replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(
            OSError, match=rf"Cannot write to .*shards' \({os.strerror(error)}\).*rerun the same command"
        ):
            sampler().sample(many_prompts)
    assert len(shards(tmp_path / "steps")) == 5
    assert not list((tmp_path / "steps" / "shards").glob("*.tmp"))
    assert equal(sampler().sample(many_prompts), left_alone)


def run_command_and_signal(number: int, argv: list[str], log: str) -> None:
    """The command, in a process of its own that gets a signal at the beginning of each batch."""
    sys.stderr = open(log, "w", buffering=1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a server in the background has not
    run = ContrastiveStepSampler._run
    ContrastiveStepSampler._run = lambda *args: (os.kill(os.getpid(), number), run(*args))[1]
    sys.exit(main(argv))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_batch_and_says_how_to_resume(
    number, status, forkserver, expert_path, amateur_path, sampler, many_prompts, left_alone, tmp_path
):
    many_prompts.to_json(tmp_path / "prompts.jsonl")
    argv = ["sample", "--expert", expert_path, "--amateur", amateur_path, "--output_dir", str(tmp_path / "steps")]
    argv += ["--dataset_name", str(tmp_path / "prompts.jsonl")]
    argv += [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    log = tmp_path / "stderr"
    process = forkserver.Process(target=run_command_and_signal, args=(number, argv, str(log)))
    process.start()
    process.join(120)
    assert process.exitcode == status
    assert "Interrupted with 38 prompts left. Rerun the same command to resume." in log.read_text()
    assert "Traceback" not in log.read_text()
    assert len(shards(tmp_path / "steps")) == 1
    again = sampler().sample(many_prompts)  # the command knows that these are questions as they are
    assert equal(*(each.remove_columns("sampling_metadata") for each in (again, left_alone)))
