"""Every example runs, in a small form."""

import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_lightreasoner.demo import bundled_pair
from trl_lightreasoner.demo.task import make_problems

from .evaluation.test_sets import write


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
EXPERT, AMATEUR = (str(bundled_pair.PAIR / role) for role in ("expert", "amateur"))


def run(name: str, *flags: str):
    script = runpy.run_path(str(EXAMPLES / name))
    return script["main"](script["make_parser"]().parse_args(flags))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_needs(name):
    text = (EXAMPLES / name).read_text()
    [header] = re.findall(r"^# /// script$\n((?:^#.*$\n)+?)^# ///$", text, re.MULTILINE)
    needs = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert needs == {"requires-python": project["requires-python"], "dependencies": [project["name"]]}


def test_the_launcher_trains_on_what_was_sampled(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    problems = make_problems(4, seed=0, split="train", kind_shares=bundled_pair.KIND_SHARES)
    write(tmp_path / "prompts.jsonl", [{"prompt": bundled_pair.as_prompt(problem)} for problem in problems])
    steps, adapter = str(tmp_path / "steps"), str(tmp_path / "adapter")
    flags = ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--output_dir", steps, "--beta", "0.1"]
    monkeypatch.setattr(sys, "argv", ["sample.py", "--expert", EXPERT, "--amateur", AMATEUR, *flags])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(EXAMPLES / "sample.py"), run_name="__main__")
    assert len(load_dataset("parquet", data_dir=f"{steps}/data", split="train")) == 4
    # `accelerate launch`, without a process of its own: the script has one
    argv = ["--cpu", "--num_processes", "1", str(EXAMPLES / "train.py"), "--config", str(EXAMPLES / "paper.yaml")]
    argv += ["--model_name_or_path", EXPERT, "--dataset_name", steps, "--output_dir", adapter]
    launch_command(launch_command_parser().parse_args([*argv, "--max_steps", "1", "--use_cpu"]))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EXPERT), adapter)


def test_a_bonus_for_entropy_keeps_entropy_up(tmp_path):
    flags = ["--num_problems", "16", "--max_steps", "5", "--entropy_bonus", "10"]
    without, with_bonus = run("custom_loss.py", "--output_dir", str(tmp_path), *flags).values()
    assert with_bonus > without
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_completions_from_elsewhere_are_scored(tmp_path):
    dataset = run("given_completions.py", "--output_dir", str(tmp_path), "--num_problems", "4")
    given = load_dataset("json", data_files=str(tmp_path / "completions.jsonl"), split="train")
    assert dataset["completion"][:] == given["completion"][:]
    assert sum(map(len, dataset["step_positions"])) > 0


def test_lightreasoner_goes_before_sft_and_dpo(tmp_path):
    accuracies = run(
        "before_sft_and_dpo.py", "--output_dir", str(tmp_path), "--num_problems", "16", "--max_steps", "2"
    )
    assert list(accuracies) == ["before", "LightReasoner", "SFT", "DPO"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def code_cells() -> list[dict]:
    cells = json.loads((EXAMPLES / "first_look.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_cells_of_the_notebook_run(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    sizes = ("NUM_UPDATES = 200, 300, 50", "NUM_UPDATES = 24, 8, 10")
    namespace = {}
    for number, cell in enumerate(code_cells()):
        code = "".join(cell["source"]).replace(*sizes)
        exec(compile(code, f"cell {number}", "exec"), namespace)
    assert namespace["NUM_PROBLEMS"] == 24
    assert len(namespace["plt"].get_fignums()) == 5
    namespace["plt"].close("all")


def test_the_notebook_shows_what_it_computed():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert (EXAMPLES / "first_look.ipynb").stat().st_size < 300_000
