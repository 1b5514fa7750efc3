"""
What rounds bring on tiny pairs: `run_pipeline` with one round, with as many updates as two, and with several rounds,
by labels of the first expert and of the live one. Writes table.md, a row a run with the accuracy after every round.

```bash
python benchmarks/rounds.py --seeds 0 1 2 --output_dir rounds
python benchmarks/rounds.py --pairs small1 small2 --output_dir rounds
```
"""

import argparse
import json
from pathlib import Path

from trl_lightreasoner import RunConfig, run_pipeline
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR
from trl_lightreasoner.demo.task import make_problems


CONDITIONS = {
    "one round": {},
    "one round, twice the updates": {"max_steps": 250},
    "two rounds": {"num_rounds": 2},
    "two rounds, the new steps alone": {"num_rounds": 2, "keep_earlier_steps": False},
    "two rounds, labels of the live expert": {"num_rounds": 2, "label_expert": "live"},
    "three rounds": {"num_rounds": 3},
}


def play(pair: Path, condition: str, seed: int, folder: Path, num_prompts: int, num_held_out: int) -> list[str]:
    """A row of the table."""
    problems = make_problems(3 * num_prompts + num_held_out, seed=seed, kind_shares=KIND_SHARES)
    rows = [{"question": problem["question"], "answer": problem["answer"]} for problem in problems]
    questions = folder / f"questions-{seed}.jsonl"
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    output_dir = folder / f"{pair.name}-{condition.replace(' ', '_').replace(',', '')}-{seed}"
    args = RunConfig(
        output_dir=str(output_dir),
        expert=str(pair / "expert"),
        amateur=str(pair / "amateur"),
        dataset_name=str(questions),
        system_prompt="",
        num_prompts=num_prompts,
        num_held_out=num_held_out,
        seed=seed,
        **CONDITIONS[condition],
    )
    result = run_pipeline(args)
    places = sorted((output_dir / "rounds").glob("*/round.json")) or [output_dir / "round.json"]
    accuracies = [
        json.loads(place.read_text())["results"]["benchmarks"]["held_out"]["model"]["accuracy"] for place in places
    ]
    assert result.accuracy_before is not None
    before, *after = (f"{100 * accuracy:.1f}" for accuracy in (result.accuracy_before, *accuracies))
    return [pair.name, condition, str(seed), before, ", ".join(after), f"{result.num_kept:,}", str(result.best_round)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, nargs="+", default=[PAIR], help="Folders with `expert` and `amateur`.")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_prompts", type=int, default=200, help="A round.")
    parser.add_argument("--num_held_out", type=int, default=500)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines = ["| pair | condition | seed | before | after each round | kept steps | best round |", "|" + "---|" * 7]
    for pair in args.pairs:
        for condition in args.conditions:
            for seed in args.seeds:
                row = play(pair, condition, seed, args.output_dir, args.num_prompts, args.num_held_out)
                lines.append(f"| {' | '.join(row)} |")
                (args.output_dir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
