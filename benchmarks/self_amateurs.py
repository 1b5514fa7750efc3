"""
What does an amateur bring that is made of the expert? For each of some amateurs: sample, train an adapter by the
defaults, answer questions that were held back before and after, and a table of the paired differences.

An amateur is a line of JSON: `name`, and the settings of `RunConfig` that make it. Without `--amateurs` they are the
expert without a tenth of its layers (early, middle, late ones), and the expert behind a careless prompt. If there is
an `--amateur`, it comes first, for comparison. Then come the expert with the adapter that this brought, and the two
the other way round: the trained model as the expert, and the first expert as its amateur. Without `--expert` it is the
bundled pair and its problems.

```bash
python benchmarks/self_amateurs.py --output_dir self_amateurs
```
"""

import argparse
import json
from pathlib import Path

import datasets
import transformers
from transformers import AutoConfig

from trl_lightreasoner import RunConfig, RunResult, run_pipeline
from trl_lightreasoner.commands import merge
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR
from trl_lightreasoner.demo.task import make_problems


SECOND = "a second model"
CARELESS = "Answer at once with the final number in \\boxed{}, without any steps."


def default_amateurs(expert: str, amateur: str | None, output_dir: Path) -> list[dict]:
    count = AutoConfig.from_pretrained(expert).get_text_config().num_hidden_layers
    tenth = -(-count // 10)  # rounded up
    firsts = {"early": 1, "middle": (count - tenth) // 2, "late": count - tenth}
    amateurs = []
    if amateur:
        amateurs = [
            {"name": SECOND, "amateur": amateur},
            {"name": "an adapter of the expert", "amateur": str(output_dir / folder_of(SECOND) / "adapter")},
            {"name": "the expert, of its adapter", "expert": str(output_dir / "merged"), "amateur": expert},
        ]
    amateurs += [
        {"name": f"{name} layers left out", "amateur_skipped_layers": list(range(first, first + tenth))}
        for name, first in firsts.items()
    ]
    return [*amateurs, {"name": "a careless prompt", "amateur_system_prompt": CARELESS}]


def folder_of(name: str) -> str:
    return name.replace(" ", "_")


def write_problems(path: Path, count: int, seed: int) -> str:
    """Problems of the bundled pair's task, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = make_problems(count, seed=seed, split="train", kind_shares=KIND_SHARES)
    path.write_text(
        "".join(json.dumps({name: row[name] for name in ("question", "answer")}) + "\n" for row in problems)
    )
    return str(path)


def row(name: str, result: RunResult) -> str:
    gain, low, high = (100 * result.difference[key] for key in ("difference", "low", "high"))
    return (
        f"| {name} | {result.num_kept / result.num_steps:.1%} | {result.pair} | {result.accuracy_before:.1%} | "
        f"{result.accuracy_after:.1%} | {gain:+.1f} ({low:+.1f} to {high:+.1f}) |"
    )


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", help="Id or path. By default the bundled pair's.")
    parser.add_argument("--amateur", help="Id or path of a second model, for comparison.")
    parser.add_argument("--dataset_name", help="Questions and answers, as of `lightreasoner run`.")
    parser.add_argument("--dataset_config", help="Configuration of the dataset.")
    parser.add_argument("--amateurs", type=Path, help="JSON lines, an amateur each.")
    parser.add_argument("--num_prompts", type=int, default=200, help="Questions that are sampled.")
    parser.add_argument("--num_held_out", type=int, default=250, help="Questions that are held back.")
    parser.add_argument("--max_steps", type=int, default=125, help="Updates.")
    parser.add_argument("--system_prompt", default="", help="Of the expert.")
    parser.add_argument("--seed", type=int, default=0, help="Of the training, and of the bundled pair's problems.")
    parser.add_argument("--output_dir", required=True, type=Path, help="A folder for each amateur, and table.md.")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    if args.expert is None:
        args.expert, args.amateur = str(PAIR / "expert"), args.amateur or str(PAIR / "amateur")
    if args.dataset_name is None:
        count = args.num_held_out + max(args.num_prompts, args.num_held_out)  # half of the rows at most are held back
        args.dataset_name = write_problems(args.output_dir / "problems.jsonl", count, args.seed)
    names = (
        "expert",
        "dataset_name",
        "dataset_config",
        "num_prompts",
        "num_held_out",
        "max_steps",
        "system_prompt",
        "seed",
    )
    settings = {name: getattr(args, name) for name in names}
    amateurs = default_amateurs(args.expert, args.amateur, args.output_dir)
    if args.amateurs is not None:
        amateurs = [json.loads(line) for line in args.amateurs.read_text().splitlines() if line.strip()]
    lines = [
        "| amateur | kept | check | before | after | difference in points (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for amateur in amateurs:
        name = amateur.pop("name")
        folder = args.output_dir / folder_of(name)
        try:
            lines.append(row(name, run_pipeline(RunConfig(str(folder), **{**settings, **amateur}))))
            if name == SECOND and not (args.output_dir / "merged").exists():
                merge.main(merge.MergeArguments(str(folder / "adapter"), str(args.output_dir / "merged")))
        except ValueError as error:
            lines.append(f"| {name} | | {error} | | | |")
        (args.output_dir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
