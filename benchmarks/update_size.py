"""
What should an update hold when rows are whole trajectories? Trains one Dataset of steps with updates of several sizes.

Nine tenths of the rows are trained on; the loss on the other tenth, D_KL(v_C || pi_theta) in nats, is what is
compared, beside the time and the number of kept steps that were read. Prints a Markdown table and writes it as JSON.

```bash
python benchmarks/update_size.py --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name steps --output_dir sizes
```
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer, count_steps
from trl_lightreasoner.steps.splits import load_split


ONE_STEP = {"one_step_per_row": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


def rows_per_update(rows: int) -> dict[str, int]:
    batch = min(rows, 8)
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": rows // batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="The expert that the steps were sampled with.")
    parser.add_argument("--dataset_name", required=True, help="Dataset of steps.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for sizes.json.")
    parser.add_argument("--rows", type=int, nargs="*", default=[2, 4, 16], help="Whole trajectories an update.")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-5, 2e-4], help="Of AdamW.")
    parser.add_argument("--epochs", type=float, nargs="+", default=[1, 2], help="Over the whole trajectories.")
    parser.add_argument("--one_step_updates", type=int, default=1000, help="Updates of 16 rows of one step; 0: none.")
    args = parser.parse_args()

    dataset = load_split(args.dataset_name, None, "train")
    num_train = len(dataset) * 9 // 10
    train, held_out = dataset.select(range(num_train)), dataset.select(range(num_train, len(dataset)))
    variants = [(rows_per_update(n), lr, e) for lr in args.learning_rates for e in args.epochs for n in args.rows]
    if args.one_step_updates:
        variants.append((ONE_STEP, args.learning_rates[0], None))

    results = []
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print("| an update holds | learning rate | updates | kept steps read | loss before | loss after | s | peak GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for size, learning_rate, epochs in variants:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        length = {"max_steps": args.one_step_updates} if epochs is None else {"num_train_epochs": epochs}
        trainer = LightReasonerTrainer(
            args.model_name_or_path,
            LightReasonerConfig(
                str(args.output_dir / "run"),
                learning_rate=learning_rate,
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
                **length,
                **size,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            peft_config=LoraConfig(
                r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            ),
        )
        before = trainer.evaluate()["eval_loss"]
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        rows = size["per_device_train_batch_size"] * size["gradient_accumulation_steps"]
        result = {
            "update": f"{rows} steps" if "one_step_per_row" in size else f"{rows} trajectories",
            "learning_rate": learning_rate,
            "updates": trainer.state.global_step,
            "steps_read": trainer.state.global_step * rows if epochs is None else round(epochs * count_steps(train)),
            "loss_before": before,
            "loss_after": trainer.evaluate()["eval_loss"],
            "seconds": seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }
        results.append(result)
        (args.output_dir / "sizes.json").write_text(json.dumps(results, indent=2) + "\n")
        peak = "" if result["peak_gib"] is None else f"{result['peak_gib']:.1f}"
        print(
            f"| {result['update']} | {learning_rate:g} | {result['updates']:,} | {result['steps_read']:,} | "
            f"{before:.4f} | {result['loss_after']:.4f} | {seconds:.1f} | {peak} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
