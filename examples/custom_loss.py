# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lightreasoner"]
# ///
"""
Change the loss in a subclass: here a bonus for entropy, against a model that becomes too sure of itself.

`compute_loss` of the superclass returns the model's outputs as well: `outputs.logits` at the kept steps of the batch,
and `outputs.steps` with what is known of each. Without arguments it runs the bundled pair, on a CPU in a quarter of a
minute, without the bonus and with it:

```bash
python examples/custom_loss.py --output_dir custom-loss
```
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
)
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR, as_prompt
from trl_lightreasoner.demo.task import make_problems


class EntropyBonusTrainer(LightReasonerTrainer):
    """`LightReasonerTrainer`, its loss less by `entropy_bonus` times the mean entropy of pi_theta at kept steps."""

    entropy_bonus = 0.5

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logps = outputs.logits.float().log_softmax(dim=-1)
        entropy = -(logps.exp() * logps).sum(dim=-1)
        # As the loss: the mean over the kept steps of the whole update, however they are spread
        if num_items_in_batch is None:
            bonus = entropy.sum() / max(len(entropy), 1)
        else:
            bonus = entropy.sum() / num_items_in_batch.clamp_min(1)
            if self.args.average_tokens_across_devices:
                bonus = bonus * self.accelerator.num_processes
        loss = loss - self.entropy_bonus * bonus
        return (loss, outputs) if return_outputs else loss


def main(args: argparse.Namespace) -> dict[str, float]:
    if args.dataset_name is None:
        problems = make_problems(args.num_problems, seed=0, split="train", kind_shares=KIND_SHARES)
        sampler = ContrastiveStepSampler(
            args.expert,
            args.amateur,
            ContrastiveSamplingConfig(f"{args.output_dir}/steps", dtype="float32", overwrite_output_dir=True),
        )
        dataset = sampler.sample(Dataset.from_list([{"prompt": as_prompt(problem)} for problem in problems]))
    else:
        dataset = load_dataset(args.dataset_name, split="train")

    entropies = {}
    for bonus in (0.0, args.entropy_bonus):
        torch.manual_seed(0)  # the adapter begins the same
        trainer = EntropyBonusTrainer(
            model=args.expert,
            args=LightReasonerConfig(
                f"{args.output_dir}/adapter",
                learning_rate=5e-4,
                max_steps=args.max_steps,
                logging_steps=args.max_steps,
            ),
            train_dataset=dataset,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        trainer.entropy_bonus = bonus
        trainer.train()
        entropies[f"bonus {bonus}"] = trainer.state.log_history[0]["entropy"]
    trainer.save_model()
    print("Mean entropy at the kept steps while training, in nats:", entropies)
    return entropies


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", default=str(PAIR / "expert"), help="Id or path.")
    parser.add_argument("--amateur", default=str(PAIR / "amateur"), help="Id or path.")
    parser.add_argument("--dataset_name", help="Dataset of kept steps; by default the bundled problems are sampled.")
    parser.add_argument("--output_dir", default="custom-loss", help="Folder for the steps and the adapter.")
    parser.add_argument("--entropy_bonus", type=float, default=0.5, help="Weight of the entropy.")
    parser.add_argument("--num_problems", type=int, default=200, help="Of the bundled task.")
    parser.add_argument("--max_steps", type=int, default=50, help="Updates.")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
