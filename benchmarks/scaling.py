"""
How many times as fast are several GPUs as one?

Runs the same sampling and the same epoch of LoRA training in one process, and under `torchrun` in as many as
there are GPUs, with as many trajectories an update on each GPU. Each takes a part first, to warm up; the models are
loaded before. Takes the arguments of speed.py, prints a Markdown table and writes scaling.json.

```bash
python benchmarks/scaling.py --expert Qwen/Qwen2.5-Math-1.5B --amateur Qwen/Qwen2.5-0.5B --dataset_name train.jsonl \
    --prompt_column question --num_problems 10000 --num_processes 2 --output_dir scaling
```
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import speed
import torch
import transformers
from datasets import disable_caching, disable_progress_bars

from trl_lightreasoner import count_steps
from trl_lightreasoner.processes import Processes


WARM_UP_PROBLEMS = 128


def work(argv: list[str]) -> None:
    """One process of a run; the first one writes its result to `args.output_dir`."""
    args = speed.make_parser().parse_args(argv)
    disable_caching()
    disable_progress_bars()
    transformers.logging.disable_progress_bar()
    processes = Processes()  # before anything else asks which device is this process's own
    pair = speed.Pair(args)
    prompts, _ = speed.load_prompts(args, args.num_problems)

    def sample_and_train(num_problems: int) -> dict[str, float]:
        sampled = pair.sample(prompts.select(range(min(num_problems, len(prompts)))))
        kept = speed.keep_share(sampled.result, args.train_share)
        trained, _ = pair.alone(lambda: pair.train(kept))
        return {
            "sample_s": sampled.seconds,
            "sample_peak_gib": sampled.peak_gib,
            "kept_steps": count_steps(kept),
            "train_s": trained.seconds,
            "train_peak_gib": trained.peak_gib,
        }

    sample_and_train(WARM_UP_PROBLEMS)
    result = sample_and_train(args.num_problems)
    if processes.is_main:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        result |= {"processes": processes.count, "device": device}
        (args.output_dir / f"{processes.count}.json").write_text(json.dumps(result))


def main(argv: list[str]) -> None:
    parser = speed.make_parser()
    parser.description = __doc__
    parser.add_argument("--num_processes", type=int, default=2, help="GPUs to use.")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    passed = [word for i, word in enumerate(argv) if "--num_processes" not in (word, argv[i - 1] if i else "")]
    results = []
    for count in (1, args.num_processes):
        command = [sys.executable]
        environment = dict(os.environ)
        if count > 1:
            command += ["-m", "torch.distributed.run", "--nproc_per_node", str(count)]
        elif torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0] if visible else "0"
        subprocess.run([*command, __file__, "--process", *passed], env=environment, check=True)
        results.append(json.loads((args.output_dir / f"{count}.json").read_text()))
    (args.output_dir / "scaling.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{results[0]['device']}; {args.num_problems:,} problems, {results[0]['kept_steps']:,} kept steps.\n")
    print("| processes | sampling, s | times one | peak GiB | training, s | times one | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        ratios = [results[0][key] / result[key] for key in ("sample_s", "train_s")]
        print(
            f"| {result['processes']} | {result['sample_s']:.1f} | {ratios[0]:.2f} | "
            f"{speed.gib(result['sample_peak_gib'])} | {result['train_s']:.1f} | {ratios[1]:.2f} | "
            f"{speed.gib(result['train_peak_gib'])} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        sys.path.insert(0, str(Path(__file__).parent))
        work(sys.argv[2:])
    else:
        main(sys.argv[1:])
