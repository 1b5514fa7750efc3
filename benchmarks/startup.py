"""
What a command takes before and beside its work: seconds by the clock and of processor time, each in a process of its
own. Prints a Markdown table of medians.

Runs every `--help`, `lightreasoner sample` of one prompt of the bundled pair, and `lightreasoner demo`; and
`trl sft --help` beside them. The first run of each, which fills the caches of files, is not counted.

```bash
CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python benchmarks/startup.py --runs 3
```
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from trl_lightreasoner.commands.cli import COMMANDS
from trl_lightreasoner.demo.bundled_pair import PAIR, as_prompt
from trl_lightreasoner.demo.task import make_problems


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds by the clock and of processor time, of the process and of those that it waited for."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {error.decode()}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def commands(folder: Path) -> dict[str, list[str]]:
    lightreasoner = [sys.executable, "-m", "trl_lightreasoner"]
    (problem,) = make_problems(1, seed=0)
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": as_prompt(problem)}) + "\n")
    pair = ["--expert", str(PAIR / "expert"), "--amateur", str(PAIR / "amateur"), "--dataset_name", str(prompts)]
    steps = ["--output_dir", str(folder / "steps"), "--overwrite_output_dir"]
    return {
        "trl sft --help": [sys.executable, "-c", "from trl.cli import main; main()", "sft", "--help"],
        **{f"lightreasoner {name} --help": [*lightreasoner, name, "--help"] for name in COMMANDS},
        "lightreasoner sample, one prompt": [*lightreasoner, "sample", *pair, *steps],
        "lightreasoner demo": [*lightreasoner, "demo", "--output_dir", str(folder / "demo")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="How often each is run, after a first time.")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start", flush=True)
    print("\n| command | by the clock, s | processor time, s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for title, command in commands(Path(name)).items():
            clock, processor = zip(*[measure(command) for _ in range(1 + args.runs)][1:], strict=True)
            print(f"| `{title}` | {median(clock):.1f} | {median(processor):.1f} |", flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
