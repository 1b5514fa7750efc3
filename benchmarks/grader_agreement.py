"""
Does the grader agree with people? Grades model solutions to GSM8K that people have marked, and lists where it differs.

The file has a row a question, with `ground_truth` and, by model, a `solution` and its `is_correct`. Each ends with a
line "A: 18": how these solutions mark their answer is a rule of this file, so the line is rewritten in each of the
ways that models mark answers in. A solution without that line was cut off; it stays as it is.

```bash
python benchmarks/grader_agreement.py --dataset gsm8k_graded_solutions.jsonl
```
"""

import argparse
import json
import re
from pathlib import Path

from trl_lightreasoner import grade_all
from trl_lightreasoner.grading.verdicts import Verdict


MARKS = {
    "box": r"So it is $\boxed{{{}}}$.",
    "sentence": "The answer is {}.",
    "hashes": "#### {}",
    "none": "So it is {}",
}
LAST_LINE = re.compile(r"\nA: *(.+?)\s*$")


def marked(solution: str, mark: str) -> str:
    return LAST_LINE.sub(lambda line: "\n" + mark.format(line[1]), solution)


def read_rows(path: Path) -> list[dict]:
    """One row a solution: `question`, `model`, `solution`, `gold` and `is_correct`."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        gold = LAST_LINE.search(question["ground_truth"])[1]
        for model, graded in question.items():
            if isinstance(graded, dict):
                rows.append({"question": question["question"], "model": model, "gold": gold, **graded})
    return rows


def why(row: dict, verdict: Verdict) -> str:
    if not LAST_LINE.search(row["solution"]):
        return "the solution was cut off, and its last number counts as its answer"
    if row["is_correct"]:
        return f"people accept {verdict.answer!r} for {row['gold']!r}"
    return f"people do not accept {verdict.answer!r} for {row['gold']!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="JSON lines of questions with marked solutions.")
    rows = read_rows(parser.parse_args().dataset)

    for name, mark in MARKS.items():
        items = [{"completion": marked(row["solution"], mark), "gold": row["gold"]} for row in rows]
        verdicts = grade_all(items)
        differing = [(r, v) for r, v in zip(rows, verdicts, strict=True) if v.correct != r["is_correct"]]
        print(f"{name}: {len(rows) - len(differing)} of {len(rows)} agree, {1 - len(differing) / len(rows):.2%}")
        for row, verdict in differing:
            print(f"- {row['question'][:60]}... ({row['model']}): {why(row, verdict)}")


if __name__ == "__main__":
    main()
