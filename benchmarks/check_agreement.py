"""
How often `lightreasoner check` is right: its verdict on every amateur of the study, beside what the amateur brought.

The gains are those of docs/evidence_tiny_pairs.md ("Other amateurs" and the method itself, 1,000 test problems, three
pairs). The verdict is right if it is "promising" for an amateur that brought points, and another one for all the
others. Prints a Markdown table, and writes it with all numbers to the output folder. Below it stand pairs in the
wrong order, whose gain nobody has measured.

```bash
for seed in 1 2; do
    python examples/make_demo_pair.py --size small --seed $seed --device cpu --output_dir small$seed
done
python benchmarks/check_agreement.py --pairs trl_lightreasoner/demo/pair small1 small2 --output_dir agreement
```
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path


sys.path.append(str(Path(__file__).parent))

import study
import torch
from datasets import Dataset

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler, PairCheck
from trl_lightreasoner.demo.bundled_pair import PAIR, as_prompt


NUM_PROMPTS = 50
HELPED = 5.0  # points
# By the name of the pair's folder; nothing is kept with an amateur that is too close, so that nothing is trained
GAINS = {
    "pair": {
        "own": 64.7,
        "skill gap": 0.0,
        "as careful": -0.1,
        "more careful": -11.9,
        "too close": 0.0,
        "random weights": 0.2,
        "shuffled": -0.4,
    },
    "small1": {
        "own": 50.7,
        "skill gap": 0.0,
        "as careful": 0.1,
        "more careful": -0.1,
        "too close": 0.0,
        "random weights": 0.0,
        "shuffled": 7.9,
    },
    "small2": {
        "own": 34.4,
        "skill gap": -0.2,
        "as careful": -0.1,
        "more careful": -0.2,
        "too close": 0.0,
        "random weights": 0.1,
        "shuffled": 0.3,
    },
}


def check(lab: study.Lab, expert: torch.nn.Module, amateur: torch.nn.Module, beta: float) -> PairCheck:
    with tempfile.TemporaryDirectory() as folder:
        sampler = ContrastiveStepSampler(
            expert,
            amateur,
            ContrastiveSamplingConfig(
                folder, beta=beta, include_first_step=False, max_new_tokens=study.MAX_NEW_TOKENS
            ),
            processing_class=lab.tokenizer,
            amateur_processing_class=lab.tokenizer,
        )
        prompts = Dataset.from_list([{"prompt": as_prompt(problem)} for problem in lab.unlabelled])
        return sampler.check(prompts, NUM_PROMPTS)


def row_of(pair: str, amateur: str, check: PairCheck, gain: float | None) -> dict:
    right = None if gain is None else check.promising == (gain >= HELPED)
    return {"pair": pair, "amateur": amateur, "gain": gain, "right": right, **check.to_dict()}


def table_of(rows: list[dict]) -> list[str]:
    header = ["pair", "amateur", "KL 50 %", "KL 90 %", "kept at 0.4", "another token", "verdict", "gain", "right"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        changed = row["judged_changed_share"]
        cells = [row["pair"], row["amateur"], f"{row['kl_50']:.3f}", f"{row['kl_90']:.3f}"]
        cells += [f"{100 * row['judged_kept_share']:.1f}", "-" if changed is None else f"{100 * changed:.1f}"]
        cells += [row["verdict"], "not measured" if row["gain"] is None else f"{row['gain']:+.1f}"]
        cells += ["" if row["right"] is None else "yes" if row["right"] else "**no**"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for agreement.json and .md.")
    parser.add_argument("--pairs", nargs="+", default=[str(PAIR)], help="Folders that hold `expert` and `amateur`.")
    parser.add_argument("--amateurs", nargs="+", default=list(study.AMATEURS), choices=list(study.AMATEURS))
    parser.add_argument("--beta", type=float, default=study.BETA, help="Threshold that is asked for.")
    parser.add_argument("--device", default="cpu", help="Where the models are, for instance `cuda`.")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    args = make_parser().parse_args(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {"kinds": list(study.KIND_SHARES), "device": args.device, "seed": 0, "num_test": 1}
    rows, swapped = [], []
    for pair in args.pairs:
        lab = study.Lab(pair, argparse.Namespace(num_unlabelled=NUM_PROMPTS, **settings))
        name = lab.pair.name
        for amateur in args.amateurs:
            gain = GAINS.get(name, {}).get(amateur)
            rows.append(row_of(name, amateur, check(lab, lab.expert, lab.amateur(amateur), args.beta), gain))
            print(f"{name}: {amateur}: {rows[-1]['verdict']}", flush=True)
        swapped.append(row_of(name, "swapped", check(lab, lab.amateur(), lab.expert, args.beta), None))
    judged = [row["right"] for row in rows if row["right"] is not None]
    lines = [
        *table_of([*rows, *swapped]),
        "",
        f"Right on {sum(judged)} of {len(judged)} amateurs, {NUM_PROMPTS} prompts each, beta = {args.beta:g}, without "
        "first steps.",
    ]
    print("\n" + "\n".join(lines))
    (args.output_dir / "agreement.md").write_text("\n".join(lines) + "\n")
    (args.output_dir / "agreement.json").write_text(json.dumps([*rows, *swapped], indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
