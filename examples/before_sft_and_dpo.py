# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lightreasoner"]
# ///
"""
LightReasoner, then SFT, then DPO: three trainers of one kind in a row, on the bundled pair on a CPU in a minute.

LightReasoner sees prompts alone; SFT needs solutions, and DPO pairs of a good and a bad one. Each stage trains an
adapter of its own, which is merged before the next one begins, so that DPO's reference is the model before it.

```bash
python examples/before_sft_and_dpo.py --output_dir three-stages
```
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
)
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR, as_prompt, solve
from trl_lightreasoner.demo.task import careful_solution, make_problems, sloppy_solution


def main(args: argparse.Namespace) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(args.expert)
    model = AutoModelForCausalLM.from_pretrained(args.expert, dtype=torch.float32)
    rng = random.Random(0)
    problems = {
        split: make_problems(args.num_problems, seed=seed, split=split, kind_shares=KIND_SHARES)
        for split, seed in (("train", 0), ("test", 0))
    }
    accuracies = {"before": accuracy(model, tokenizer, problems["test"])}

    def settings(stage: str) -> dict:
        return {
            "output_dir": f"{args.output_dir}/{stage}",
            "max_steps": args.max_steps,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }

    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    # Prompts alone
    sampler = ContrastiveStepSampler(
        model,
        args.amateur,
        ContrastiveSamplingConfig(f"{args.output_dir}/steps", dtype="float32", overwrite_output_dir=True),
        processing_class=tokenizer,
    )
    steps = sampler.sample(Dataset.from_list([{"prompt": as_prompt(problem)} for problem in problems["train"]]))
    trainer = LightReasonerTrainer(
        model,
        LightReasonerConfig(learning_rate=5e-4, **settings("lightreasoner")),
        train_dataset=steps,
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    model = trainer.model.merge_and_unload()
    accuracies["LightReasoner"] = accuracy(model, tokenizer, problems["test"])

    # Prompts with solutions
    solutions = [
        {"prompt": as_prompt(problem), "completion": as_answer(careful_solution(problem))}
        for problem in problems["train"]
    ]
    trainer = SFTTrainer(
        model,
        SFTConfig(learning_rate=2e-4, **settings("sft")),
        train_dataset=Dataset.from_list(solutions),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    model = trainer.model.merge_and_unload()
    accuracies["SFT"] = accuracy(model, tokenizer, problems["test"])

    # Prompts with a good and a bad solution
    preferences = [
        {
            "prompt": as_prompt(problem),
            "chosen": as_answer(careful_solution(problem)),
            "rejected": as_answer(sloppy_solution(problem, rng)),
        }
        for problem in problems["train"]
    ]
    trainer = DPOTrainer(
        model,
        args=DPOConfig(learning_rate=1e-4, **settings("dpo")),
        train_dataset=Dataset.from_list(preferences),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    model = trainer.model.merge_and_unload()
    accuracies["DPO"] = accuracy(model, tokenizer, problems["test"])

    model.save_pretrained(f"{args.output_dir}/model")
    tokenizer.save_pretrained(f"{args.output_dir}/model")
    Path(args.output_dir, "accuracies.json").write_text(json.dumps(accuracies, indent=2) + "\n")
    for stage, value in accuracies.items():
        print(f"{stage:<14} {value:.1%}")
    return accuracies


def as_answer(solution: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": solution}]


def accuracy(model, tokenizer, problems: list[dict]) -> float:
    return sum(right for _, right in solve(model.eval(), tokenizer, problems)) / len(problems)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", default=str(PAIR / "expert"), help="Id or path of a model that knows the task.")
    parser.add_argument("--amateur", default=str(PAIR / "amateur"), help="Id or path.")
    parser.add_argument("--output_dir", default="three-stages", help="Folder for the Dataset and the models.")
    parser.add_argument("--num_problems", type=int, default=200, help="To train on, and as many others to test on.")
    parser.add_argument("--max_steps", type=int, default=50, help="Updates of each stage.")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
