"""Two real processes (gloo) compute what one does."""

import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.commands.cli import _leave_process_group
from trl_lightreasoner.training import packed_attention
from trl_lightreasoner.training.cuda_graphs import GraphedLayers
from trl_lightreasoner.training.packed_attention import varlen_attn

from ..conftest import QUESTIONS
from .test_packed_attention import naive_varlen_attn


# An update of 8 rows: rows of a process's batch, batches
ONE = {"8 x 1": (8, 1), "1 x 8": (1, 8)}
TWO = {"4 x 1": (4, 1), "2 x 2": (2, 2)}
EVAL_ROWS = [5, 7, 12]
# Questions answered beside them: fewer than there are processes, shares of unequal size, and of equal
NUM_QUESTIONS = {5: 1, 7: 5, 12: 6} if importlib.util.find_spec("math_verify") else dict.fromkeys(EVAL_ROWS, 0)


def settings(
    batch: int,
    accumulation: int,
    num_eval_rows: int = 12,
    lora: bool = True,
    graphs: bool = False,
    num_questions: int = 0,
    mixed: bool = False,
) -> dict:
    args = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    # What the random expert writes into some of its answers
    questions = [{"prompt": question, "answer": "and"} for question in QUESTIONS[:num_questions]]
    run = {"args": args, "num_eval_rows": num_eval_rows, "lora": lora, "graphs": graphs, "questions": questions}
    answers = [question[: 5 * i + 1] for i, question in enumerate(QUESTIONS)]
    demonstrations = [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    return {**run, "weighted": mixed, "sft_rows": demonstrations if mixed else []}


class Graphs(TrainerCallback):
    """How many sizes of batch are captured by the end of an update."""

    def __init__(self, trainer):
        self.trainer, self.count = trainer, 0

    def on_step_end(self, *args, **kwargs):
        self.count = len(self.trainer._graphs._captured)


def train(settings: dict) -> None:
    """A few updates of plain SGD; saves the weights, the losses and the number of processes."""
    steps = Dataset.from_parquet(settings["rows"])
    if not settings["weighted"]:
        steps = steps.remove_columns("step_weights")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = LightReasonerTrainer(
        AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        LightReasonerConfig(
            settings["output_dir"],
            max_steps=3,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            max_grad_norm=0.0,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            per_device_eval_batch_size=2,
            eval_strategy="steps" if settings["questions"] else "no",
            eval_steps=3,
            eval_max_new_tokens=8,
            **settings["args"],
        ),
        train_dataset=steps,
        eval_dataset=steps.select(range(settings["num_eval_rows"])),
        peft_config=lora if settings["lora"] else None,
        eval_questions=Dataset.from_list(settings["questions"]) if settings["questions"] else None,
        sft_dataset=Dataset.from_list(settings["sft_rows"]) if settings["sft_rows"] else None,
    )
    graphs, attention = Graphs(trainer), packed_attention.varlen_attn
    if settings["graphs"]:  # as on a GPU, where packed layers are replayed
        attention = naive_varlen_attn
        trainer._packs, trainer._graphs = True, GraphedLayers(trainer.model)
        trainer.add_callback(graphs)
    with mock.patch.object(packed_attention, "varlen_attn", attention):
        trainer.train()
        metrics = trainer.evaluate()
    of_processes = gather_object([metrics.get("eval_accuracy")])
    if trainer.is_world_process_zero():
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(weights, f"{settings['output_dir']}/weights.safetensors")
        logs = [log for log in trainer.state.log_history if "loss" in log]
        result = {
            "world_size": trainer.args.world_size,
            "num_graphs": graphs.count,
            "losses": [log["loss"] for log in logs],
            "sft_losses": [log.get("sft_loss") for log in logs],
            "num_kept_steps": [log["num_kept_steps"] for log in logs],
            "eval_loss": metrics["eval_loss"],
            "eval_kl_to_expert": metrics.get("eval_kl_to_expert"),
            "accuracies": [
                {name: value for name, value in log.items() if "accuracy" in name}
                for log in trainer.state.log_history
                if "eval_accuracy" in log
            ],
            "accuracies_of_processes": of_processes,
        }
        with open(f"{settings['output_dir']}/result.json", "w") as file:
            json.dump(result, file)


def train_all(rank: int, runs: list[dict]) -> None:
    torch.set_num_threads(1)
    for each in runs:
        train(each)
    _leave_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, steps, expert_path, in_group) -> tuple[dict[str, Any], dict[str, Any]]:
    """All trainings by one process, and all by two."""
    folder = tmp_path_factory.mktemp("trained")
    # 16 rows, two updates of 8, with very unequal numbers of kept steps
    rows = (steps.to_list() + steps.to_list()[::-1] + steps.to_list())[:16]
    for i, row in enumerate(rows):
        for name in ("step_positions", "label_ids", "label_probs"):
            row[name] = row[name][: max(1, len(row[name]) - i % 5)]
        row["step_weights"] = [((i + k) % 4) / 2 for k in range(len(row["step_positions"]))]
    type(steps).from_list(rows).to_parquet(folder / "rows.parquet")

    def launch(num_processes: int, runs: dict[str, dict]) -> dict[str, Any]:
        for name, run in runs.items():
            run |= {"rows": str(folder / "rows.parquet"), "model": expert_path}
            run |= {"output_dir": str(folder / f"{num_processes} {name}")}
        if num_processes > 1:
            in_group(num_processes, train_all, list(runs.values()))
        else:
            train_all(0, list(runs.values()))
        results = {}
        for name, run in runs.items():
            output = Path(run["output_dir"])
            results[name] = json.loads((output / "result.json").read_text())
            results[name]["weights"] = load_file(output / "weights.safetensors")
            assert results[name]["world_size"] == num_processes
        return results

    kinds = {"full": False, "lora": True}
    one, two = (
        {f"{kind} {name}": settings(*size, lora=lora) for kind, lora in kinds.items() for name, size in sizes.items()}
        for sizes in (ONE, TWO)
    )
    for n in EVAL_ROWS:
        one[f"evaluated on {n}"] = settings(4, 1, num_eval_rows=n, num_questions=NUM_QUESTIONS[n])
        two[f"evaluated on {n}"] = settings(2, 1, num_eval_rows=n, num_questions=NUM_QUESTIONS[n])
    one["mixed"], two["mixed"] = settings(8, 1, mixed=True), settings(2, 2, mixed=True)
    two["lora reentrant"] = settings(4, 1)
    two["lora reentrant"]["args"] |= {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    }
    if varlen_attn is not None:
        two["replayed"] = settings(2, 2, graphs=True)
    return launch(1, one), launch(2, two)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_train_as_one(kind, trained):
    one, two = trained
    expected = one[f"{kind} 8 x 1"]
    names = ["1 x 8", *TWO] + ["reentrant"] * (kind == "lora")
    others = [one[f"{kind} 1 x 8"], *(two[f"{kind} {name}"] for name in names[1:])]
    for other, name in zip(others, names, strict=True):
        for parameter, weight in expected["weights"].items():
            torch.testing.assert_close(other["weights"][parameter], weight, rtol=1e-5, atol=1e-6, msg=name)
        assert other["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
        assert other["num_kept_steps"] == expected["num_kept_steps"], name


def test_two_processes_take_the_means_of_weighted_steps_and_demonstrations_as_one(trained):
    one, two = (results["mixed"] for results in trained)
    for parameter, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][parameter], weight, rtol=1e-5, atol=1e-6)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["sft_losses"] == pytest.approx(one["sft_losses"], rel=1e-5) and None not in one["sft_losses"]
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert one["losses"] != trained[0]["lora 8 x 1"]["losses"]


@pytest.mark.skipif(varlen_attn is None, reason="needs PyTorch 2.10")
def test_two_processes_that_replay_their_layers_train_as_one_that_does_not(trained):
    one, two = trained[0]["lora 8 x 1"], trained[1]["replayed"]
    assert two["num_graphs"] > 0 == one["num_graphs"]
    for parameter, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][parameter], weight, rtol=1e-5, atol=1e-6)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.parametrize("num_eval_rows", EVAL_ROWS)
def test_eval_loss_is_that_of_one_process_for_any_number_of_rows(num_eval_rows, trained):
    one, two = (results[f"evaluated on {num_eval_rows}"] for results in trained)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert two["eval_kl_to_expert"] == pytest.approx(one["eval_kl_to_expert"], rel=1e-4) and one["eval_kl_to_expert"]


@pytest.mark.parametrize("num_eval_rows", EVAL_ROWS)
def test_two_processes_share_the_questions_and_count_as_one(num_eval_rows, trained):
    pytest.importorskip("math_verify")
    one, two = (results[f"evaluated on {num_eval_rows}"] for results in trained)
    assert two["accuracies"] == one["accuracies"] and len(one["accuracies"]) == 3  # before, after, and by hand
    assert two["accuracies_of_processes"] == 2 * one["accuracies_of_processes"]
    if num_eval_rows == 12:
        assert 0 < one["accuracies"][0]["eval_accuracy"] < 1
