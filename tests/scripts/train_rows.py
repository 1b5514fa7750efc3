"""A few updates of plain SGD for each of some settings; saves the weights, the losses and the number of processes."""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.commands.cli import _leave_process_group
from trl_lightreasoner.training import packed_attention
from trl_lightreasoner.training.cuda_graphs import GraphedLayers


class Graphs(TrainerCallback):
    """How many sizes of batch are captured by the end of an update."""

    def __init__(self, trainer):
        self.trainer, self.count = trainer, 0

    def on_step_end(self, *args, **kwargs):
        self.count = len(self.trainer._graphs._captured)


def train(settings: dict) -> None:
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
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from tests.training.test_packed_attention import naive_varlen_attn as attention

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(sys.argv[1]):
        train(each)
    _leave_process_group()
