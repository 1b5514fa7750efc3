# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lightreasoner"]
# ///
"""
Score completions that were made elsewhere: by an inference server, by another machine, or last week.

A dataset with a `completion` column beside `prompt` is TRL's prompt-completion format; nothing is generated then. The
completions should be the expert's own, greedy ones: the method takes them for what the expert does. Without
`--dataset_name`, plain `transformers` stands in for what makes them elsewhere:

```bash
python examples/given_completions.py --output_dir scored
```
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import pipeline

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler, count_steps
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR, as_prompt
from trl_lightreasoner.demo.task import make_problems


def complete_elsewhere(expert: str, num_problems: int, path: Path) -> None:
    """Write prompts and the expert's answers to them as JSON lines, both as messages."""
    generate = pipeline("text-generation", expert, device="cpu")
    problems = make_problems(num_problems, seed=0, split="train", kind_shares=KIND_SHARES)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            prompt = as_prompt(problem)
            [answer] = generate(prompt, do_sample=False, max_new_tokens=128)
            file.write(json.dumps({"prompt": prompt, "completion": answer["generated_text"][-1:]}) + "\n")


def main(args: argparse.Namespace) -> Dataset:
    path = args.dataset_name
    if path is None:
        path = Path(args.output_dir, "completions.jsonl")
        complete_elsewhere(args.expert, args.num_problems, path)
    sampler = ContrastiveStepSampler(
        args.expert, args.amateur, ContrastiveSamplingConfig(f"{args.output_dir}/steps", dtype="float32")
    )
    dataset = sampler.sample(load_dataset("json", data_files=str(path), split="train"))
    num_steps = sum(map(len, dataset["completion_ids"]))
    print(f"{count_steps(dataset):,} of {num_steps:,} steps of {len(dataset):,} given completions were kept.")
    print(f"Next: lightreasoner train --expert {args.expert} --dataset_name {args.output_dir}/steps ...")
    return dataset


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", default=str(PAIR / "expert"), help="Id or path.")
    parser.add_argument("--amateur", default=str(PAIR / "amateur"), help="Id or path.")
    parser.add_argument(
        "--dataset_name", help="JSON lines with `prompt` and `completion`, both text or both messages."
    )
    parser.add_argument("--output_dir", default="scored", help="Folder for the completions and the Dataset.")
    parser.add_argument("--num_problems", type=int, default=50, help="Of the bundled task.")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
