"""FSDP2 for real, with two processes (gloo) that each hold half of every weight. accelerate leaves CPUs out of it,
which the tests undo; everything else is as on GPUs."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate import state
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
DORA = {"r": 4, "target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}


def split_on_a_cpu() -> None:
    """Let FSDP be what two processes on a CPU do."""
    os.environ.update(FSDP2)
    init, barrier = state.PartialState.__init__, torch.distributed.barrier

    def as_if_of_gpus(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    state.PartialState.__init__ = as_if_of_gpus
    torch.distributed.barrier = lambda *args, **kwargs: barrier()  # gloo takes no devices


def make_trainer(model: str, rows: str, folder: str, lora: dict | None, **settings) -> LightReasonerTrainer:
    """A trainer on a CPU whose FSDP splits the weights. The first five rows are held out as well."""
    split_on_a_cpu()
    return LightReasonerTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LightReasonerConfig(
            folder,
            optim="sgd",
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=3,
            **settings,
        ),
        train_dataset=Dataset.from_parquet(rows),
        eval_dataset=Dataset.from_parquet(rows).select(range(5)),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora and LoraConfig(task_type="CAUSAL_LM", **lora),
    )


def train(rank: int, model: str, rows: str, folder: str, lora: dict | None, state_dict: str) -> None:
    """Train and save; write the weights as this test gathers them, and what saving refused before and after damage."""
    os.environ["FSDP_STATE_DICT_TYPE"] = state_dict
    made = make_trainer(model, rows, folder, lora, max_steps=2, learning_rate=0.05)
    made.train()
    trained = {name: each for name, each in made.model.named_parameters() if each.requires_grad}
    assert all(isinstance(each, DTensor) for each in trained.values())
    weights = {name: each.full_tensor().detach().clone() for name, each in trained.items()}
    refusals = [refusal_of(made.save_model)]
    save = made._save_beside

    def damage(to: str) -> None:
        save(to)
        path = next(Path(folder).glob("*model*.safetensors"))
        content = load_file(path)
        save_file({name: each + 1 for name, each in content.items()}, path, {"format": "pt"})

    made._save_beside = damage
    refusals.append(refusal_of(made.save_model))
    if rank == 0:
        save_file(weights, f"{folder}/gathered")
        Path(folder, "refusals.json").write_text(json.dumps(refusals))


def refusal_of(work) -> str | None:
    try:
        work()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("lora", "state_dict"),
    [(None, "SHARDED_STATE_DICT"), (DORA, "FULL_STATE_DICT")],
    ids=["all weights, sharded checkpoints", "DoRA and a head"],
)
def test_the_files_hold_what_the_processes_trained_and_damage_is_refused(
    lora, state_dict, in_group, expert_path, steps, tmp_path
):
    rows = str(tmp_path / "rows.parquet")
    steps.to_parquet(rows)
    in_group(2, train, expert_path, rows, str(tmp_path), lora, state_dict)
    refusals = json.loads((tmp_path / "refusals.json").read_text())
    assert refusals[0] is None and refusals[1].startswith("The files saved in ")
    gathered = load_file(tmp_path / "gathered")
    saved = load_file(next(tmp_path.glob("*model*.safetensors")))
    for name, each in gathered.items():
        place = re.sub(r"(?<=magnitude_vector)\.default\.weight|\.modules_to_save|\.default", "", name)
        torch.testing.assert_close(saved[place] - 1, each, rtol=1e-5, atol=1e-5)


def train_and_evaluate(rank: int, model: str, rows: str, folder: str) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    made = make_trainer(model, rows, folder, lora, max_steps=4, learning_rate=0.5, beta=0.0)
    made.train()
    metrics = made.evaluate()
    made.save_model()
    if rank == 0:
        Path(folder, "metrics.json").write_text(json.dumps(metrics))


@torch.no_grad()
def test_held_out_rows_are_scored_as_in_a_loop(in_group, expert_path, tokenizer, steps, tmp_path):
    rows = str(tmp_path / "rows.parquet")
    steps.to_parquet(rows)
    in_group(2, train_and_evaluate, expert_path, rows, str(tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expert, other = (AutoModelForCausalLM.from_pretrained(expert_path, dtype=torch.float32) for _ in range(2))
    trained = PeftModel.from_pretrained(other, tmp_path).eval()
    losses, drifts = [], []
    for row in steps.select(range(5)):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        log_pi, log_pi_expert = (
            model(ids).logits[0, :, : len(tokenizer)].double().log_softmax(-1) for model in (trained, expert)
        )
        for t, tokens, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            at = len(row["prompt_ids"]) + t - 1
            label = torch.tensor(probs, dtype=torch.float64)
            losses.append((label * (label.log() - log_pi[at, tokens])).sum().item())
            drifts.append((log_pi[at].exp() * (log_pi[at] - log_pi_expert[at])).sum().item())
    assert sum(drifts) / len(drifts) > 0.01  # the adapter has learned something
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert metrics["eval_kl_to_expert"] == pytest.approx(sum(drifts) / len(drifts), rel=1e-4)
