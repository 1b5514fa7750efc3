"""What a command imports is what the user waits for, so none imports what it does not need."""

import json
import subprocess
import sys

import pytest

from trl_lightreasoner.demo.bundled_pair import PAIR


COMPILER = "torch._inductor.compile_fx"
MODELS = {"datasets", "torch", "transformers", "transformers.modeling_utils"}
# PEFT imports bitsandbytes, and that would import the compiler of PyTorch
ADAPTERS = MODELS | {"peft", "transformers.trainer_utils", "bitsandbytes.nn"}
# What each may import of the modules below. They run one after the other in one process, whose modules add up
ALLOWED = {
    "demo --help": set(),
    "env --help": set(),
    "import --help": set(),
    "merge --help": set(),
    "report --help": set(),
    "sample --help": {"datasets"},
    "run --help": {"datasets"},
    "tune --help": {"datasets"},
    "check --help": {"datasets"},
    "eval --help": {"datasets"},
    "sample": MODELS,
    "train --help": ADAPTERS,
    "train": ADAPTERS | {"transformers.trainer", "trl.trainer.utils"},
}
SLOW = [
    *ADAPTERS,
    COMPILER,
    "transformers.trainer",
    "trl.trainer.utils",
    "trl.trainer.sft_trainer",
    "trl.trainer.base_trainer",
]
SLOW += ["liger_kernel", "math_verify", "matplotlib", "optuna", "vllm"]

RUN = """
import contextlib, json, sys
from trl_lightreasoner.commands.cli import main

commands, slow = json.loads(sys.argv[1])
imported = {}
for command, flags in commands.items():
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):  # by which argparse ends the help
        assert main([*command.split(), *flags]) == 0, command
    imported[command] = [name for name in slow if name in sys.modules]
print(json.dumps(imported))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, list[str]]:
    """Of the slow modules, those that are imported after each command."""
    folder = tmp_path_factory.mktemp("startup")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "What is 2+2?"}]}))
    settings = {
        "sample": {
            **{"expert": PAIR / "expert", "amateur": PAIR / "amateur", "dataset_name": folder / "prompts.jsonl"},
            **{"output_dir": folder / "steps", "beta": 0, "max_new_tokens": 4},
        },
        "train": {
            **{"model_name_or_path": PAIR / "expert", "dataset_name": folder / "steps", "beta": 0, "max_steps": 1},
            **{"output_dir": folder / "adapter", "report_to": "none"},
        },
    }
    commands = {
        command: [part for name, value in settings.get(command, {}).items() for part in (f"--{name}", str(value))]
        for command in ALLOWED
    }
    argv = [sys.executable, "-c", RUN, json.dumps([commands, SLOW])]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "gemm_4bit" not in result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", ALLOWED)
def test_a_command_imports_only_what_it_needs(command, imported):
    assert set(imported[command]) <= ALLOWED[command]
