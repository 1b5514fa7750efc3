"""Several real processes (gloo) sample what one does, and lose no more than one does."""

import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler

from ..conftest import die_at_call, find_port, join_group


ROOT = Path(__file__).parents[2]


def sample(expert, amateur, questions, rank, world_size, port, folder, kill=None, pause=0.0, timeout=60, beta=1.95):
    """One process of `world_size`, which may kill itself at its `kill`-th rename or pause before each batch."""
    sys.stderr = open(f"{folder}-{rank}.log", "w", buffering=1)
    torch.set_num_threads(1)
    join_group(rank, world_size, port)
    state = PartialState(cpu=True, timeout=timedelta(seconds=timeout))
    assert state.num_processes == world_size
    if kill is not None:
        die_at_call("replace", kill)
    run = ContrastiveStepSampler._run
    ContrastiveStepSampler._run = lambda *args: (time.sleep(pause), run(*args))[1]
    args = ContrastiveSamplingConfig(folder, max_new_tokens=8, beta=beta, per_device_batch_size=2)
    try:
        made = ContrastiveStepSampler(expert, amateur, args).sample(prompts_of(questions))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
    assert len(made) == len(questions)  # every process has the whole


@pytest.fixture
def start(forkserver, expert_path, amateur_path, tmp_path):
    def run(questions: list[str], world_size: int, of_rank: dict[int, dict] | None = None, **kwargs) -> list[int]:
        """Exit statuses of the processes, by rank."""
        port, processes = find_port(), []
        for rank in range(world_size):
            own = {"folder": str(tmp_path / "steps"), **kwargs, **(of_rank or {}).get(rank, {})}
            args = (expert_path, amateur_path, questions, rank, world_size, port)
            processes.append(forkserver.Process(target=sample, args=args, kwargs=own))
            processes[-1].start()
        for process in processes:
            process.join(120)
            assert process.exitcode is not None, "a process hangs"
        return [process.exitcode for process in processes]

    return run


@pytest.fixture
def one(expert_path, amateur_path, tmp_path):
    """What one process makes of the questions."""

    def run(questions: list[str]) -> list[dict]:
        args = ContrastiveSamplingConfig(str(tmp_path / "one"), max_new_tokens=8, beta=1.95, per_device_batch_size=2)
        return ContrastiveStepSampler(expert_path, amateur_path, args).sample(prompts_of(questions)).to_list()

    return run


def prompts_of(questions: list[str]) -> Dataset:
    return Dataset.from_dict({"prompt": questions})


def questions(number: int) -> list[str]:
    return [f"What is {i} + {i * i}?" for i in range(number)]


def made(folder: Path) -> list[dict]:
    return Dataset.from_parquet([str(path) for path in sorted((folder / "data").iterdir())]).to_list()


@pytest.mark.parametrize(
    ("num_prompts", "world_size"), [(13, 2), (12, 3), (1, 2), (2, 3)], ids=lambda value: str(value)
)
def test_several_processes_sample_what_one_does(num_prompts, world_size, start, one, tmp_path):
    assert start(questions(num_prompts), world_size) == [0] * world_size
    # To the last bit, since the batches are the same
    assert made(tmp_path / "steps") == one(questions(num_prompts))
    assert {path.name for path in (tmp_path / "steps").iterdir()} == {"data", "run.json", ".lock"}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_costs_its_batch_and_any_number_goes_on(rank, world_size, start, one, tmp_path):
    statuses = start(questions(12), 2, {rank: {"kill": 3}})
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] not in (0, None)
    # The other has finished its own three batches; the main process has renamed the run file as well
    assert len(list((tmp_path / "steps" / "shards").glob("*.parquet"))) == 3 + (1 if rank == 0 else 2)
    assert start(questions(12), world_size) == [0] * world_size
    rows, expected = made(tmp_path / "steps"), one(questions(12))
    assert [row["completion_ids"] for row in rows] == [row["completion_ids"] for row in expected]
    assert [row["step_positions"] for row in rows] == [row["step_positions"] for row in expected]


def test_processes_may_finish_long_after_each_other(start, one, tmp_path):
    # Longer than the default process group waits
    assert start(questions(4), 2, {1: {"pause": 6.0}}, timeout=3) == [0, 0]
    assert made(tmp_path / "steps") == one(questions(4))


def test_what_the_main_process_refuses_ends_all(start, tmp_path):
    assert start(questions(4), 2) == [0, 0]
    assert start(questions(4), 2, beta=2.5) == [1, 1]
    for rank in range(2):
        message = (tmp_path / f"steps-{rank}.log").read_text()
        assert "ValueError: " in message and "was started with beta = 1.95, but it is now 2.5." in message


def test_processes_that_share_no_folder_are_told_so(start, tmp_path):
    assert start(questions(4), 2, {1: {"folder": str(tmp_path / "other disk")}}) == [1, 1]
    message = (
        "other disk/run.json' of the main process is not visible. Choose an `output_dir` that all processes share."
    )
    assert message in (tmp_path / "other disk-1.log").read_text()
    message = (
        "ConnectionError: Process 0 waited for another process, which has ended. Rerun the same command to resume."
    )
    assert message in (tmp_path / "steps-0.log").read_text()


def test_torchrun_starts_the_example(one, expert_path, amateur_path, tmp_path):
    prompts_of(questions(5)).to_json(tmp_path / "prompts.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "examples" / "sample.py"), "--expert", expert_path, "--amateur", amateur_path]
    command += ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--output_dir", str(tmp_path / "steps")]
    command += ["--max_new_tokens", "8", "--beta", "1.95", "--per_device_batch_size", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("5 trajectories with") == 1
    rows = [made(tmp_path / "steps"), one(questions(5))]
    for row in [*rows[0], *rows[1]]:
        del row["sampling_metadata"]  # the command knows that these are questions as they are
    assert rows[0] == rows[1]
