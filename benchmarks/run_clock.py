"""
How long `lightreasoner run` takes: in a process of its own, in all and by stage, and its processor time. Prints a
Markdown table.

Without flags it runs the bundled pair on 200 questions, with 300 held out; flags behind `--` are given to
`lightreasoner run` instead.

```bash
python benchmarks/run_clock.py
python benchmarks/run_clock.py -- --expert EXPERT --amateur AMATEUR --dataset_name openai/gsm8k --dataset_config main
```
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR
from trl_lightreasoner.demo.task import make_problems


NUM_PROMPTS, NUM_HELD_OUT = 200, 300


def bundled(folder: Path) -> list[str]:
    """The flags of the bundled pair, and its questions in a file."""
    problems = make_problems(2 * NUM_HELD_OUT, seed=0, kind_shares=KIND_SHARES)  # at most half are held out
    rows = [{"question": problem["question"], "answer": problem["answer"]} for problem in problems]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {
        **{"expert": PAIR / "expert", "amateur": PAIR / "amateur", "dataset_name": folder / "questions.jsonl"},
        **{"num_prompts": NUM_PROMPTS, "num_held_out": NUM_HELD_OUT, "system_prompt": ""},
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def main(flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "trl_lightreasoner", "run", *(flags or bundled(folder))]
        start = time.perf_counter()
        subprocess.run([*command, "--output_dir", str(folder / "run")], check=True)
        seconds = time.perf_counter() - start
        verdict = json.loads((folder / "run" / "verdict.json").read_text())
    stages = {stage: value for stage, value in verdict["seconds"].items() if stage != "total"}
    print(f"\n{verdict['sentence']}\n\n| stage | seconds |\n|---|---|")
    for stage, value in {**stages, "start, tokenizers and end": seconds - sum(stages.values())}.items():
        print(f"| {stage} | {value:.1f} |")
    print(f"| **in all** | **{seconds:.1f}** |")
    times = os.times()
    print(f"| processor time | {times.children_user + times.children_system:.1f} |")


if __name__ == "__main__":
    main([flag for flag in sys.argv[1:] if flag != "--"])
