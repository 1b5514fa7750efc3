"""
Does training on several GPUs give what one GPU gives, with how much memory and in which time?

Runs `examples/train.py` on one GPU, with CUDA graphs and kernel by kernel, and under every file of
`examples/accelerate_configs`, as many rows an update each: LoRA, QLoRA and all weights. Prints a Markdown table and
writes it as JSON.

```bash
python benchmarks/several_gpus.py --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name steps --output_dir gpus
```
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
TRAINED = {
    "LoRA": ["--learning_rate", "5e-5", "--lora_dropout", "0"],
    "QLoRA": ["--learning_rate", "5e-5", "--lora_dropout", "0", "--load_in_4bit", "--dtype", "bfloat16"],
    "all weights": ["--learning_rate", "1e-6", "--use_peft", "false"],
}
# FSDP2 gathers 4-bit weights unchanged only if they are stored in this type
STORAGE = ["--bnb_4bit_quant_storage", "float32"]
# On one GPU, and under the files of examples/accelerate_configs
CONFIGS = {
    "LoRA": ["one", "kernels", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"],
    "QLoRA": ["one", "kernels", "ddp", "fsdp2"],
    "all weights": ["one", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"],
}


def train(output: str, argv: list[str]) -> None:
    """One process of a run."""
    import torch

    from trl_lightreasoner.commands.train import main, make_parser

    start = time.perf_counter()
    trainer = main(*make_parser().parse(argv))
    peak = torch.tensor([torch.cuda.max_memory_allocated() / 2**30], device=trainer.accelerator.device)
    peaks = trainer.accelerator.gather(peak).tolist()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        result = {
            "processes": trainer.args.world_size,
            "losses": [log["loss"] for log in history if "loss" in log],
            "grad_norms": [log["grad_norm"] for log in history if "grad_norm" in log],
            "train_s": next(log["train_runtime"] for log in history if "train_runtime" in log),
            "whole_s": time.perf_counter() - start,
            "peak_gib": peaks,
        }
        Path(output).write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="The expert that the steps were sampled with.")
    parser.add_argument("--dataset_name", required=True, help="Dataset of steps.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for several_gpus.json.")
    parser.add_argument("--num_processes", type=int, default=2, help="GPUs to use.")
    parser.add_argument("--rows", type=int, default=8, help="Whole trajectories an update, over all GPUs.")
    parser.add_argument("--updates", type=int, default=20, help="Updates a run.")
    parser.add_argument(
        "--trained", nargs="+", choices=TRAINED, default=list(TRAINED), help="What to train, in order."
    )
    parser.add_argument("--configs", nargs="+", choices=CONFIGS["LoRA"], help="How to train it; by default every way.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    results = []
    ways = {"one": "one", "kernels": "one, kernel by kernel"}
    print("| trained | GPUs | first loss | last loss | largest difference from one GPU | s | peak GiB a GPU |")
    print("|---|---|---|---|---|---|---|")
    runs = [(trained, config) for trained in args.trained for config in CONFIGS[trained]]
    for trained, config in runs:
        if args.configs and config not in args.configs:
            continue
        count = 1 if config in ("one", "kernels") else args.num_processes
        name = f"{trained} {config}".replace(" ", "_")
        output = args.output_dir / f"{name}.json"
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        if count == 1:
            command = [sys.executable]
        else:
            file = ROOT / "examples" / "accelerate_configs" / f"{config}.yaml"
            command += ["--config_file", str(file), "--num_processes", str(count)]
        command += [__file__, "--process", str(output), "--model_name_or_path", args.model_name_or_path]
        command += ["--dataset_name", args.dataset_name, "--output_dir", str(args.output_dir / name)]
        command += ["--per_device_train_batch_size", str(args.rows // count), "--gradient_accumulation_steps", "1"]
        command += ["--max_steps", str(args.updates), "--logging_steps", "1", "--save_strategy", "no"]
        command += ["--disable_tqdm", "true", "--report_to", "none", *TRAINED[trained]]
        if trained == "QLoRA" and config == "fsdp2":
            command += STORAGE
        if config == "kernels":
            command += ["--use_cuda_graphs", "false"]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "0"} if count == 1 else {})}
        log = args.output_dir / f"{name}.log"
        with open(log, "w") as file:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if status != 0:
            print(f"| {trained} | {config} | failed, see {log} | | | | |", flush=True)
            continue
        result = json.loads(output.read_text()) | {"trained": trained, "config": config}
        results.append(result)
        (args.output_dir / "several_gpus.json").write_text(json.dumps(results, indent=2) + "\n")
        one = next(each for each in results if each["trained"] == trained)["losses"]
        difference = max(abs(a - b) for a, b in zip(result["losses"], one, strict=True))
        peaks = ", ".join(f"{peak:.1f}" for peak in result["peak_gib"])
        print(
            f"| {trained} | {ways.get(config, f'{count}, {config}')} | {result['losses'][0]:.4f} | "
            f"{result['losses'][-1]:.4f} | {difference:.4f} | {result['train_s']:.1f} | {peaks} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        train(sys.argv[2], sys.argv[3:])
    else:
        main()
