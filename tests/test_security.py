"""Local folders need no network, files run no code, and secrets stay where they are."""

import copy
import importlib.metadata
import json
import os
import pickletools
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_lightreasoner import LightReasonerConfig
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.commands.demo import report

from .conftest import QUESTIONS


# Before anything else is imported: whoever asks for a name or a connection ends the process. Raising would not do,
# since libraries go on without a network
GUARD = """
import os, socket, sys, traceback

def guard(name):
    function = getattr(socket.socket if name.startswith("connect") else socket, name)

    def guarded(*args, **kwargs):
        if isinstance(args[0], socket.socket) and args[0].family == socket.AF_UNIX:
            return function(*args, **kwargs)
        traceback.print_stack()
        print("NETWORK", name, args, file=sys.stderr, flush=True)
        os._exit(99)

    setattr(socket.socket if name.startswith("connect") else socket, name, guarded)

for name in ("connect", "connect_ex", "create_connection", "getaddrinfo", "gethostbyname"):
    guard(name)
"""


def run_python(code: str, *argv: str | Path, **environment: str) -> subprocess.CompletedProcess:
    names = ("PATH", "PYTHONPATH", "HOME", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TMPDIR")
    inherited = {name: os.environ[name] for name in names if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
    )


WHOLE_PATH = """
from trl_lightreasoner.commands.cli import main
expert, amateur, prompts, folder = sys.argv[1:]

def run(command, output_dir, *argv):
    assert main([command, "--output_dir", f"{folder}/{output_dir}", *argv]) == 0

pair = ["--amateur", amateur, "--dataset_name", prompts, "--max_new_tokens", "4", "--beta", "0"]
run("sample", "steps", "--expert", expert, *pair)
token = ["--hub_token", "hf_SECRET"]
steps = ["--dataset_name", f"{folder}/steps"]
run("train", "adapter", "--model_name_or_path", expert, *steps, "--use_cpu", "--max_steps", "1", *token)
run("sample", "again", "--expert", f"{folder}/adapter", *pair)
"""


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS[:2]))
    return path


# The network


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "online"])
def test_local_folders_need_no_network(environment, expert_path, amateur_path, prompts_file, tmp_path):
    environment = {**environment, "HF_HOME": str(tmp_path / "cache")}
    result = run_python(GUARD + WHOLE_PATH, expert_path, amateur_path, prompts_file, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again" / "data").is_dir()
    # What is left behind, and what was said, does not hold the token
    paths = [
        path for folder in ("steps", "adapter", "again") for path in (tmp_path / folder).rglob("*") if path.is_file()
    ]
    assert {"README.md", "run.json", "training_args.bin", "trainer_state.json"} <= {path.name for path in paths}
    assert [path for path in paths if b"SECRET" in path.read_bytes()] == []
    assert "SECRET" not in result.stdout + result.stderr


def test_the_guard_guards():
    result = run_python(GUARD + "import urllib.request; urllib.request.urlopen('http://localhost')")
    assert result.returncode == 99 and "NETWORK" in result.stderr


# The folder that a command is started in

EVERY_COMMAND = """
import os, sys
from trl_lightreasoner.commands.cli import COMMANDS, main
expert, amateur, prompts, benchmarks, folder = sys.argv[1:]

def run(*argv):
    assert main(list(argv)) in (0, 1), argv

pair = ["--expert", expert, "--amateur", amateur, "--dataset_name", prompts, "--max_new_tokens", "4", "--beta", "0"]
run("check", *pair)
run("sample", *pair, "--output_dir", f"{folder}/steps")
run("train", "--model_name_or_path", expert, "--dataset_name", f"{folder}/steps", "--output_dir", f"{folder}/adapter",
    "--use_cpu", "--max_steps", "1", "--dataloader_num_workers", "1")
run("merge", "--model_name_or_path", f"{folder}/adapter", "--output_dir", f"{folder}/model")
run("report", f"{folder}/steps", "--output_dir", f"{folder}/report")
run("eval", "--model", f"{folder}/model", "--benchmarks", "math500", "--data_dir", benchmarks, "--prompt_style", "raw",
    "--max_new_tokens", "4", "--output_dir", f"{folder}/evaluation")
for command in COMMANDS:
    try:
        main([command, "--help"])
    except SystemExit:
        pass
# What such a process starts is safe as well: trackers of multiprocessing, vLLM
os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", "import queue, sympy"])
"""


def plant_modules(folder: Path, names: set[str]) -> Path:
    """Modules that say that they were imported, and are of no use."""
    for name in names:
        (folder / f"{name}.py").write_text(f"print('PLANTED', {name!r})\nopen({str(folder / 'obeyed')!r}, 'a')\n")
    return folder / "obeyed"


def test_no_command_imports_from_where_it_is_started(expert_path, amateur_path, prompts_file, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    names = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    obeyed = plant_modules(folder, {name for name in names if name.isidentifier()} - {"trl_lightreasoner"})
    (tmp_path / "math500.jsonl").write_text(json.dumps({"problem": "2+2?", "answer": r"2\sqrt{2}"}) + "\n")
    program = tmp_path / "program.py"  # beside which the console script lies, and not in the current folder
    program.write_text(EVERY_COMMAND)
    monkeypatch.chdir(folder)
    paths = (expert_path, amateur_path, prompts_file, tmp_path, tmp_path / "out")
    result = subprocess.run([sys.executable, program, *map(str, paths)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    assert not obeyed.exists(), result.stdout


def test_the_module_leaves_out_where_it_is_started(tmp_path):
    loaded = "import runpy, sys; print(*sys.modules)"  # before anything of the package
    loaded = subprocess.run([sys.executable, "-P", "-c", loaded], capture_output=True, text=True).stdout.split()
    obeyed = plant_modules(tmp_path, sys.stdlib_module_names - set(loaded))
    command = [sys.executable, "-m", "trl_lightreasoner", "report", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not obeyed.exists(), result.stdout


# Secrets


def test_a_token_is_kept_in_memory_and_written_nowhere(tmp_path):
    args = LightReasonerConfig(
        str(tmp_path),
        hub_token="hf_SECRET",
        model_init_kwargs={"token": "hf_SECRET", "revision": "main"},
        use_cpu=True,
    )
    torch.save(args, tmp_path / "training_args.bin")
    assert b"SECRET" not in (tmp_path / "training_args.bin").read_bytes()
    copied = copy.copy(args)
    assert (copied.hub_token, copied.model_init_kwargs["token"]) == ("hf_SECRET", "hf_SECRET")
    assert copied == args and copied is not args


# Files that run code when they are read carelessly


def write_payload(path: Path, victim: Path) -> None:
    """A file as PyTorch writes it, which makes `victim` in a reader that calls what it is told to."""
    command = f"touch '{victim}'".encode()
    program = b"\x80\x02c" + b"posix\nsystem\n" + b"X" + struct.pack("<I", len(command)) + command + b"\x85R."
    assert "REDUCE" in [opcode.name for opcode, _, _ in pickletools.genops(program)]  # it calls
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")


@pytest.fixture
def payload(tmp_path):
    """Writes such files, and looks afterwards whether one was obeyed."""
    victim = tmp_path / "obeyed"
    yield lambda path: write_payload(path, victim)
    assert not victim.exists()


def refusal(capsys, *argv: str | Path) -> str:
    assert main([str(part) for part in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 1
    return lines[0]


def sample(expert, amateur, prompts, tmp_path) -> tuple:
    return (
        "sample",
        "--expert",
        expert,
        "--amateur",
        amateur,
        "--dataset_name",
        prompts,
        "--output_dir",
        tmp_path / "out",
    )


def test_weights_run_no_code(payload, expert_path, amateur_path, prompts_file, tmp_path, capsys):
    shutil.copytree(expert_path, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    payload(tmp_path / "model" / "pytorch_model.bin")
    sentence = refusal(capsys, *sample(tmp_path / "model", amateur_path, prompts_file, tmp_path))
    assert f"The model '{tmp_path / 'model'}' cannot be loaded: its weights are damaged, or hold Python" in sentence


def test_an_adapter_runs_no_code(payload, expert, amateur_path, prompts_file, tmp_path, capsys):
    get_peft_model(expert, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    payload(tmp_path / "adapter" / "adapter_model.bin")
    sentence = refusal(capsys, *sample(tmp_path / "adapter", amateur_path, prompts_file, tmp_path))
    assert f"The model '{tmp_path / 'adapter'}' cannot be loaded: its weights are damaged, or hold Python" in sentence


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_runs_no_code(name, payload, expert_path, steps, tmp_path, capsys):
    steps.to_parquet(tmp_path / "steps.parquet")
    train = ("train", "--model_name_or_path", expert_path, "--dataset_name", tmp_path / "steps.parquet")
    train = (*train, "--output_dir", tmp_path / "out", "--use_cpu", "--save_steps", "1", "--max_steps")
    assert main([str(part) for part in (*train, 1)]) == 0
    payload(tmp_path / "out" / "checkpoint-1" / name)
    sentence = refusal(capsys, *train, 2, "--resume_from_checkpoint", "true")
    assert f"The checkpoint '{tmp_path / 'out' / 'checkpoint-1'}' is damaged, or holds Python objects" in sentence


def test_code_of_a_model_is_not_run_unasked(expert_path, amateur_path, prompts_file, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(expert_path, folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'obeyed')!r}, 'w')\n")
    for argv in (
        sample(folder, amateur_path, prompts_file, tmp_path),
        ("train", "--model_name_or_path", folder, "--dataset_name", prompts_file, "--output_dir", tmp_path / "out"),
    ):
        sentence = refusal(capsys, *argv)
        assert "contains custom code" in sentence and "trust_remote_code" in sentence
    assert not (tmp_path / "obeyed").exists()


# What a model or a file says is shown, not obeyed


HOSTILE = "\x1b[2J\x1b]0;title\x07\r4\n\x9b31m"


def test_a_sentence_does_not_steer_the_terminal(expert_path, amateur_path, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": [{"role": HOSTILE, "content": "2+2="}]}))
    sentence = refusal(capsys, *sample(expert_path, amateur_path, tmp_path / "prompts.jsonl", tmp_path))
    assert sentence.isprintable() and r"\x1b[2J" in sentence


def test_the_demo_does_not_steer_the_terminal(tmp_path):
    answers = [(HOSTILE, False)]
    metrics = dict.fromkeys(("accuracy_before", "accuracy_after", "num_test_problems", "seconds"), 1.0)
    metrics |= dict.fromkeys(("num_kept_steps", "num_unlabelled_problems", "num_updates"), 1)
    shown = report([{"question": "2+2?"}], answers, answers, metrics, tmp_path)
    assert all(line.isprintable() for line in shown.split("\n"))
    assert r"\x1b[2J\x1b]0;title\x07\r4\n\x9b31m  (wrong)" in shown
