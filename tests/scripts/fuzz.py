"""Random rows, damage and kills, by a seed: what goes in comes out whole, or is refused in one sentence.

    python -m tests.scripts.fuzz --seed 0 --rounds 1000

Each round has a generator of its own, made of the seed, the part and its number, so that `--first` repeats it.

    rows      JSON lines of odd types, from a file to token ids and through the folder of a run
    damage    bits flipped in shards, in finished files and in run.json; files cut, emptied, copied and removed
    kills     two processes that share a run, killed at any moment, by one or both, and started again
    rounds    `lightreasoner run --num_rounds 2` on the bundled pair, killed in any stages and started again. It takes
              half a minute a round, and is not among the parts unless it is named
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetsError
from safetensors.torch import load_file

from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.steps.messages import render_row
from trl_lightreasoner.steps.prompt_format import PromptFormat, format_of_prompts, make_prompts, name_prompts
from trl_lightreasoner.steps.prompts import check_prompts, encode_rows
from trl_lightreasoner.steps.splits import load_split
from trl_lightreasoner.steps.writer import StepWriter, describe_rows

from ..conftest import make_tokenizer


NUM_ROWS = 12
INPUT = Dataset.from_dict({"prompt": [f"question {i}" for i in range(NUM_ROWS)]})


def made_up(rows: list[int]) -> dict[str, list]:
    """What a run makes of rows, without models."""
    return {
        "completion": [f"answer {i}" for i in rows],
        "prompt_ids": [[i] for i in rows],
        "completion_ids": [[i, i + 1] for i in rows],
        "kl_divergence": [[0.5, i / 7] for i in rows],
        "step_positions": [[1] for _ in rows],
        "label_ids": [[[i, 90]] for i in rows],
        "label_probs": [[[0.75, 0.25]] for _ in rows],
    }


EXPECTED = made_up(list(range(NUM_ROWS)))
IDENTITY, METADATA = {"beta": 0.4, "prompts": "a"}, {"settings": {"beta": 0.4}}


def run(folder: Path, rng: random.Random, batches: int | None = None, pause: float = 0.0) -> Dataset | None:
    """Make the rows that are not there yet; of `batches` batches, all that are missing if `None`."""
    writer = StepWriter(str(folder), INPUT)
    try:
        done = writer.open(IDENTITY, METADATA)
        for batch in cut(rng, [row for row in range(NUM_ROWS) if row not in done])[:batches]:
            time.sleep(pause)
            writer.write(batch, made_up(batch))
        if batches is not None:
            return None
        writer.finish(set(range(NUM_ROWS)))
        return writer.load()
    finally:
        writer.close()


def cut(rng: random.Random, rows: list[int]) -> list[list[int]]:
    rng.shuffle(rows)
    size = rng.randint(1, 5)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def check(dataset: Dataset) -> None:
    for name, values in EXPECTED.items():
        found = dataset[name][:]
        if name == "kl_divergence":  # stored in fp32
            found, values = ([[round(v, 5) for v in row] for row in each] for each in (found, values))
        assert found == values, f"{name} is {found}"
    assert dataset["prompt"][:] == INPUT["prompt"][:]


def refusal(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What comes out, or the sentence with which it is refused. Anything else is a fault."""
    try:
        return work(), None
    except (ValueError, OSError) as error:
        sentence = str(error)
        assert sentence and not isinstance(error, DatasetsError | UnicodeError | json.JSONDecodeError), repr(error)
        return None, sentence


# Rows

TEXTS = ["", " ", "2+2?", "Größe 🍎", "\x00", "\u2028", "{question}", "{{ 1 }}", "<|im_end|>", "a\n\nb", "%s", "null"]


def odd(rng: random.Random, depth: int = 0) -> Any:
    """A value of any type that JSON has."""
    kinds = [None, True, 0, -1, 2**63, 1e300, 0.5, "", "text", "text"]
    if depth < 3:
        kinds += [list, dict, "message", "parts"]
    kind = rng.choice(kinds)
    if kind == "text":
        return rng.choice(TEXTS)
    if kind is list:
        return [odd(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind is dict:
        names = ["role", "content", "type", "text", "name", "a"]
        return {name: odd(rng, depth + 1) for name in rng.sample(names, rng.randint(0, 3))}
    if kind == "message":
        return message(rng)
    if kind == "parts":
        return [{"type": rng.choice(["text", "text", "image"]), "text": rng.choice(TEXTS)}]
    return kind


def message(rng: random.Random) -> dict[str, Any]:
    content = rng.choice(TEXTS) if rng.random() < 0.7 else odd(rng, 2)
    made = {"role": rng.choice(["user", "user", "assistant", "system", "tool"]), "content": content}
    if rng.random() < 0.2:
        made[rng.choice(["tool_calls", "name", "reasoning_content"])] = odd(rng, 1)
    if rng.random() < 0.1:
        del made[rng.choice(["role", "content"])]
    return made


def prompt(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(TEXTS)
    return [message(rng) for _ in range(rng.randint(0, 3))] if kind < 0.85 else odd(rng)


def row(rng: random.Random, names: list[str]) -> dict[str, Any]:
    made = {name: odd(rng) for name in names}
    made["prompt"] = prompt(rng)
    if "completion" in names:
        made["completion"] = rng.choice([rng.choice(TEXTS), [message(rng)], odd(rng)])
    return made


def rows_round(rng: random.Random, folder: Path) -> str:
    names = [name for name in ("completion", "tools", "chat_template_kwargs", "id", "answer") if rng.random() < 0.2]
    alike = row(rng, names)
    rows = [alike if rng.random() < 0.5 else row(rng, names) for _ in range(rng.randint(1, 3))]
    content = "".join(json.dumps(each) + "\n" for each in rows).encode()
    if rng.random() < 0.15:
        content = damaged(rng, content)
    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    tokenizer = make_tokenizer() if not hasattr(rows_round, "tokenizer") else rows_round.tokenizer
    rows_round.tokenizer = tokenizer

    def read() -> Dataset:
        dataset = name_prompts(load_split(str(path), None, "train"), "prompt")
        if isinstance(dataset[0]["prompt"], str) and rng.random() < 0.3:
            dataset = make_prompts(dataset, PromptFormat("chat", system_prompt="Think."))
        check_prompts(dataset, tokenizer)
        format_of_prompts(dataset)
        return dataset

    dataset, sentence = refusal(read)
    if sentence:
        return "refused as a file"
    texts, sentence = refusal(lambda: encode_rows(dataset.to_list(), tokenizer, {tokenizer.eos_token_id}))
    if sentence:
        assert sentence.startswith("Row "), sentence
        return "refused as a row"
    for each, ids in zip(dataset, texts["prompt_ids"], strict=True):
        text = render_row(each, tokenizer)["prompt"]
        assert tokenizer.decode(ids) == text, (each, tokenizer.decode(ids))
        given = each["prompt"] if isinstance(each["prompt"], list) else []
        contents = [one["content"] for one in given if isinstance(one.get("content"), str)]
        assert all("".join(one.split()) in "".join(text.split()) for one in contents), (each, text)

    def through_a_run() -> Dataset:
        writer = StepWriter(str(folder / "steps"), dataset)
        try:
            writer.open(describe_rows(dataset), METADATA)
            for index in range(len(dataset)):
                columns = made_up([index])
                if "completion" in dataset.column_names:
                    del columns["completion"]
                writer.write([index], columns)
            writer.finish(set(range(len(dataset))))
            return writer.load()
        finally:
            writer.close()

    made, sentence = refusal(through_a_run)
    if sentence:
        return "refused by the folder"
    given = dataset.to_list()
    assert made.select_columns(dataset.column_names).to_list() == given
    return "came out whole"


# Damage


def damaged(rng: random.Random, content: bytes) -> bytes:
    kind = rng.random()
    if kind < 0.1 or not content:
        return b""
    place = rng.randrange(len(content))
    if kind < 0.3:
        return content[:place]
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def damage_round(rng: random.Random, folder: Path) -> str:
    folder = folder / "steps"
    is_finished = rng.random() < 0.5
    run(folder, rng, None if is_finished else rng.randint(1, 4))
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    for path in rng.sample(paths, min(len(paths), rng.randint(1, 2))):
        kind = rng.random()
        if kind < 0.8:
            path.write_bytes(damaged(rng, path.read_bytes()))
        elif kind < 0.9:
            shutil.copy(path, path.with_name(f"{rng.randrange(NUM_ROWS):09d}-{path.name.partition('-')[2]}"))
        else:
            path.unlink()
    if is_finished:
        loaded, sentence = refusal(lambda: load_split(str(folder), None, "train"))
        if sentence is None and (folder / "run.json").exists():
            check(loaded)
    made, sentence = refusal(lambda: run(folder, rng))
    if sentence:
        assert str(folder) in sentence, sentence
        return "refused"
    check(made)
    return "made whole"


# Kills


def wait_for(path: Path) -> bool:
    """Whether a file comes. A queue between processes would hang where one is killed that holds its lock."""
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    return path.exists()


def work(folder: Path, number: int, seed: str, is_main: bool, pause: float) -> None:
    """One of two processes of a run: the main one opens and finishes it."""
    rng = random.Random(seed)
    sys.stderr = open(os.devnull, "w")
    opened, done = folder / f"opened-{number}", folder / f"done-{number}"
    writer = StepWriter(str(folder / "steps"), INPUT)
    if is_main:
        there = writer.open(IDENTITY, METADATA)
        (folder / f"there-{number}").write_text(json.dumps([sorted(there), writer.opening]))
        (folder / f"there-{number}").rename(opened)
    elif wait_for(opened):
        there, opening = json.loads(opened.read_text())
        writer.join(opening)
    for batch in cut(rng, [row for row in range(is_main, NUM_ROWS, 2) if row not in there]):
        time.sleep(pause)
        writer.write(batch, made_up(batch))
    if not is_main:
        done.touch()
    elif wait_for(done):
        writer.finish(set(range(NUM_ROWS)))


def kills_round(rng: random.Random, folder: Path) -> str:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = []
    for number in range(rng.randint(1, 3)):
        pause = rng.choice([0.0, 0.02, 0.05, 0.1])
        pair = [
            context.Process(target=work, args=(folder, number, f"{rng.random()}", is_main, pause))
            for is_main in (True, False)
        ]
        for process in pair:
            process.start()
        if rng.random() < 0.8:  # otherwise it may be killed as it starts
            assert wait_for(folder / f"opened-{number}")
        time.sleep(rng.uniform(0.0, 0.3))
        # The launcher dies with the main process, or with both; what is left over goes on beside the next start
        for process in pair if rng.random() < 0.3 else pair[:1]:
            process.kill()
            process.join()
        processes += pair
    deadline = time.monotonic() + 60
    while True:
        made, sentence = refusal(lambda: run(folder / "steps", rng, pause=rng.choice([0.0, 0.05])))
        if sentence is None:
            break
        assert "Another run is writing" in sentence and time.monotonic() < deadline, sentence
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    check(made)
    check(run(folder / "steps", rng))  # and what was left over has written nothing into it
    return "made whole"


# Kills of a run of two rounds

SETTINGS = {
    **{"expert": str(PAIR / "expert"), "amateur": str(PAIR / "amateur"), "system_prompt": ""},
    **{"num_prompts": 40, "prompts_per_round": 40, "num_held_out": 24, "num_rounds": 2},
    **{"max_new_tokens": 48, "eval_max_new_tokens": 48, "max_steps": 8, "learning_rate": 5e-4},
}


def run_rounds(folder: Path, questions: Path) -> None:
    """The process of a run. It says on `stdout` which stage it is in."""
    import torch

    from trl_lightreasoner import RunConfig, run_pipeline
    from trl_lightreasoner.pipeline import rounds  # slow to import, and only this part needs it

    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(folder / "stdout", "w"), open(folder / "stderr", "w")
    rounds.why_stop = lambda last: None
    training_config = rounds.training_config
    rounds.training_config = lambda *args: training_config(*args, save_strategy="steps", save_steps=3)
    run_pipeline(RunConfig(output_dir=str(folder / "run"), dataset_name=str(questions), **SETTINGS))


def start_run(folder: Path, questions: Path) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "trl_lightreasoner.pipeline.run"])
    (folder / "stdout").unlink(missing_ok=True)
    process = context.Process(target=run_rounds, args=(folder, questions))
    process.start()
    return process


def stage_of(folder: Path) -> int:
    """The number of stages that a run has begun."""
    lines = (folder / "stdout").read_text().splitlines() if (folder / "stdout").exists() else []
    return sum(line.partition(" ")[0].partition("/")[0].isdigit() for line in lines)


def outcome_of(folder: Path) -> dict[str, Any]:
    """All that a finished run must have in common with one that was left alone."""
    run = folder / "run"

    def content(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text().replace(str(folder), ""))

    outcome: dict[str, Any] = {"verdict": {**content(run / "verdict.json"), "seconds": None}}
    files = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    outcome |= {f"file {name}": True for name in files if not name.endswith(".lock")}
    for path in run.rglob("adapter_model.safetensors"):
        outcome[str(path.relative_to(run))] = {name: each.tolist() for name, each in load_file(path).items()}
    for path in run.rglob("round.json"):
        outcome[str(path.relative_to(run))] = content(path)
    for number in ("1", "2"):
        data = load_dataset("parquet", data_dir=str(run / "rounds" / number / "steps" / "data"), split="train")
        outcome[f"steps {number}"] = data.remove_columns("sampling_metadata").to_list()
    return outcome


def left_alone(questions: Path) -> tuple[dict[str, Any], list[float]]:
    """The outcome of a run that nobody kills, and the seconds that each of its stages took."""
    if not hasattr(left_alone, "known"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            process = start_run(folder, questions)
            process.join()
            assert process.exitcode == 0, (folder / "stderr").read_text()
            seconds = json.loads((folder / "run" / "verdict.json").read_text())["seconds"]
            left_alone.known = outcome_of(folder), [value for name, value in seconds.items() if name != "total"]
    return left_alone.known


def rounds_round(rng: random.Random, folder: Path) -> str:
    questions = folder / "questions.jsonl"
    problems = make_problems(150, seed=0, kind_shares=KIND_SHARES)
    rows = [{"question": problem["question"], "answer": problem["answer"]} for problem in problems]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected, seconds = left_alone(questions)
    killed = []
    for _ in range(rng.randint(1, 4)):
        stage = rng.randrange(len(seconds))
        process = start_run(folder, questions)
        while process.is_alive() and stage_of(folder) <= stage:
            time.sleep(0.005)
        process.join(rng.uniform(0, 1.2 * seconds[stage] + 0.1))
        if process.is_alive():
            killed.append(stage_of(folder))
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), (folder / "stderr").read_text()
    process = start_run(folder, questions)
    process.join()
    assert process.exitcode == 0, (folder / "stderr").read_text()
    found = outcome_of(folder)
    different = [name for name in sorted(expected.keys() | found.keys()) if found.get(name) != expected.get(name)]
    assert not different, f"killed in the stages {killed}, {different} differ"
    print(f"killed in the stages {killed}", flush=True)
    return f"killed {len(killed)} times, and ended as one left alone"


PARTS = {"rows": rows_round, "damage": damage_round, "kills": kills_round, "rounds": rounds_round}


def fuzz(part: str, seed: int, rounds: int, first: int = 0) -> Counter:
    """How often a part ended in which way. Raises at the end if a round ended in none of them, with its number."""
    ways: Counter = Counter()
    faults = []
    for number in range(first, first + rounds):
        with tempfile.TemporaryDirectory() as folder:
            try:
                ways[PARTS[part](random.Random(f"{seed} {part} {number}"), Path(folder))] += 1
            except Exception as error:
                faults.append(f"--part {part} --seed {seed} --first {number} --rounds 1: {error!r}")
                if rounds == 1:
                    raise
    assert not faults, f"{len(faults):,} faults, {dict(ways)}\n" + "\n".join(faults)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, nargs="*", default=["rows", "damage", "kills"])
    args = parser.parse_args()
    disable_progress_bars()
    logging.disable(logging.WARNING)
    for part in args.part:
        start = time.monotonic()
        ways = fuzz(part, args.seed, args.rounds, args.first)
        print(f"{part}: {dict(ways)}, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    # Processes find their work in the module, not in the program
    __import__("tests.scripts.fuzz", fromlist=["main"]).main()
