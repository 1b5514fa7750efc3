"""Two real processes (gloo) compute what one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


SCRIPT = Path(__file__).parent / "scripts" / "train_rows.py"


@pytest.fixture
def train(tmp_path, steps, expert_path):
    # 16 rows, two updates of 8, with very unequal numbers of kept steps
    rows = (steps.to_list() + steps.to_list()[::-1] + steps.to_list())[:16]
    for i, row in enumerate(rows):
        for name in ("step_positions", "label_ids", "label_probs"):
            row[name] = row[name][: max(1, len(row[name]) - i % 5)]
    path = tmp_path / "rows.parquet"
    type(steps).from_list(rows, features=steps.features).to_parquet(path)

    def run(
        name: str, num_processes: int, num_eval_rows: int = 12, lora: bool = False, graphs: bool = False, **args
    ) -> dict:
        folder = tmp_path / name
        settings = {"rows": str(path), "model": expert_path, "output_dir": str(folder), "args": args}
        settings |= {"num_eval_rows": num_eval_rows, "lora": lora, "graphs": graphs}
        launcher = [sys.executable]
        if num_processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        process = subprocess.run(
            [*launcher, str(SCRIPT), json.dumps(settings)], capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, process.stderr[-3000:]
        result = json.loads((folder / "result.json").read_text())
        assert result["world_size"] == num_processes
        return result | {"weights": load_file(folder / "weights.safetensors")}

    return run


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_processes_train_as_one(lora, train):
    sizes = {"8 x 1": (1, 8, 1), "1 x 8": (1, 1, 8), "two, 4 x 1": (2, 4, 1), "two, 2 x 2": (2, 2, 2)}
    results = {
        name: train(
            name, processes, lora=lora, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        for name, (processes, batch, accumulation) in sizes.items()
    }
    one = results.pop("8 x 1")
    for name, other in results.items():
        for parameter, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][parameter], weight, rtol=1e-5, atol=1e-6, msg=name)
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5), name
        assert other["num_kept_steps"] == one["num_kept_steps"], name


def test_two_processes_that_replay_their_layers_train_as_one_that_does_not(train):
    pytest.importorskip("torch.nn.attention.varlen", reason="needs PyTorch 2.10")
    one = train("one", 1, lora=True, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    two = train("two", 2, lora=True, graphs=True, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert two["num_graphs"] > 0 == one["num_graphs"]
    for parameter, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][parameter], weight, rtol=1e-5, atol=1e-6)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.parametrize("num_eval_rows", [5, 7, 12])
def test_eval_loss_is_that_of_one_process_for_any_number_of_rows(num_eval_rows, train):
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    one = train("one", 1, num_eval_rows, lora=True, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    two = train("two", 2, num_eval_rows, lora=True, **size)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert two["eval_kl_to_expert"] == pytest.approx(one["eval_kl_to_expert"], rel=1e-4) and one["eval_kl_to_expert"]
