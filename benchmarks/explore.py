"""
What helps a pair beside what `lightreasoner tune` searches? Samples, trains and evaluates one setting after another:
settings of sampling, other labels, other amateurs, rounds. `lightreasoner tune` searches threshold, learning rate,
updates and layers, and samples once.

A setting is a line of JSON with the fields of `Setting` that differ from their defaults; without any it is the
default of the commands. The first rows of the dataset are sampled. The last ones are held out and answered, and so
are the problems of other files (`--held_out`, JSON lines with `question` and `answer`), by the expert and by the
adapter of each setting. A setting is judged by its gain, the mean over these sets. With `--seeds 0 1 2 --finalists 3`
every setting is trained with seed 0, and the first and the best three with the other seeds as well. Test sets are for
the one that is chosen in the end (`lightreasoner eval`).

The same command started several times shares the work, and nothing is repeated: NAME-SEED.json is a result,
NAME-SEED/adapter what was trained, and table.md shows all of them.

```bash
echo '{"name": "default"}' > settings.jsonl
echo '{"name": "one-hot", "label": "one-hot"}' >> settings.jsonl
python benchmarks/explore.py --expert Qwen/Qwen2.5-Math-1.5B --amateur Qwen/Qwen2.5-0.5B \
    --dataset_name gsm8k_train.jsonl --settings settings.jsonl --output_dir exploration
```
"""

import argparse
import copy
import fcntl
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import datasets
import study
import torch
import transformers
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from peft import LoraConfig
from transformers.trainer_callback import PrinterCallback

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    EvaluationConfig,
    LightReasonerConfig,
    LightReasonerTrainer,
    PromptFormat,
    count_steps,
)
from trl_lightreasoner.evaluation.candidate import Candidate
from trl_lightreasoner.evaluation.evaluation import grade_candidates
from trl_lightreasoner.evaluation.sets import read_problems
from trl_lightreasoner.evaluation.statistics import Z_95
from trl_lightreasoner.models.adapter_loading import load_adapter
from trl_lightreasoner.models.loading import load_model, load_tokenizer
from trl_lightreasoner.processes import Processes
from trl_lightreasoner.steps.prompt_format import SYSTEM_PROMPT
from trl_lightreasoner.training.adapters import choose_target_modules, target_modules


HELD_OUT = "held_out"


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        name (`str`): What results are called.
        prompt_style (`str`): `"chat"` or `"raw"`, in sampling and in evaluation.
        num_prompts (`int`): Questions to sample, of each round.
        amateur (`str`, *optional*): `"given"`; `"rounded to 3 bits"` (or 2, 4), the expert with rounded weights; the
            path of a model or an adapter; `None` for the expert itself, which `sampling` then makes an amateur of.
        sampling (`dict`): Fields of [`ContrastiveSamplingConfig`].
        label (`str`): `"contrast"`; `"one-hot"`, the expert's own token; or `"anchored"`, v_C from 1.6 nats on, and
            pi_E over the same tokens at four other steps of each trajectory, which `training` needs `beta` 0 for.
        training (`dict`): Fields of [`LightReasonerConfig`].
        lora (`dict`): Fields of [`~peft.LoraConfig`].
        rounds (`int`): How often to sample other questions with the model as it is, and train on all steps so far. The
            labels are the first expert's, unless `sampling` has `label_expert` "live".
        seed (`int`): Of training; from `--seeds`.
    """

    name: str
    prompt_style: str = "chat"
    num_prompts: int = 1000
    amateur: str | None = "given"
    sampling: dict = field(default_factory=dict)
    label: str = "contrast"
    training: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    rounds: int = 1
    seed: int = 0

    @property
    def run(self) -> str:
        return f"{self.name}-{self.prompt_style}-{self.seed}"


def read_settings(path: Path) -> list[Setting]:
    settings = [Setting(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    names = [setting.run for setting in settings]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"Settings must have names of their own; these are repeated: {', '.join(sorted(repeated))}.")
    return settings


class Work:
    """What several processes share: each piece is made by one of them, and its result is a file."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def result(self, name: str, make: Callable[[], dict[str, Any]], waits: bool = True) -> dict[str, Any] | None:
        """The result of a piece, made if nobody has. `None` if another process is at it and this one does not wait."""
        path = self.folder / f"{name}.json"
        with (self.folder / f"{name}.lock").open("w") as lock:  # a killed process holds none
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            if not path.exists():
                text = json.dumps(make())
                path.with_suffix(".tmp").write_text(text)
                path.with_suffix(".tmp").rename(path)
        return json.loads(path.read_text())


class Exploration:
    """The pair, the questions, and what was done already."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder, self.work = args, args.output_dir, Work(args.output_dir)
        self.tokenizer, self.amateur_tokenizer = map(load_tokenizer, (args.expert, args.amateur))
        self.expert, self.given = (load_model(name, dtype=args.dtype).eval() for name in (args.expert, args.amateur))
        rows = load_dataset("json", data_files=args.dataset_name, split="train")
        edge = len(rows) - args.num_held_out
        self.questions = rows.select(range(edge))["question"]
        sets = {HELD_OUT: rows.select(range(edge, len(rows)))} if args.num_held_out else {}
        sets |= {path.stem: load_dataset("json", data_files=str(path), split="train") for path in args.held_out}
        self.sets = {name: read_problems(each, "question", "answer") for name, each in sets.items()}

    # ---- Evaluation ----

    def prompt_format(self, style: str) -> PromptFormat:
        system = self.args.system_prompt if style == "chat" else ""
        return PromptFormat(style, None, SYSTEM_PROMPT if system is None else system)

    def answer(self, model: torch.nn.Module, name: str, style: str) -> dict[str, Any]:
        """Which problems of each set the model solves. Sets are answered together: their last long answers share."""
        start = time.perf_counter()
        together = concatenate_datasets(list(self.sets.values()))
        config = EvaluationConfig(
            str(self.folder / name / style),
            overwrite_output_dir=True,
            max_new_tokens=self.args.max_new_tokens,
            dtype=self.args.dtype,
            **self.prompt_format(style).to_dict(),
        )
        candidate = Candidate("model", model, self.tokenizer, None, config, {HELD_OUT: together}, Processes())
        candidate.answer(model)
        scores = grade_candidates([candidate], config)["benchmarks"][HELD_OUT]["model"]
        file = str(self.folder / name / style / "model" / f"{HELD_OUT}.parquet")
        verdicts = Dataset.from_parquet(file, keep_in_memory=True)["correct"][:]
        correct, first = {}, 0
        for each, problems in self.sets.items():
            correct[each] = verdicts[first : first + len(problems)]
            first += len(problems)
        scores = {key: scores[key] for key in ("mean_tokens", "num_cut")}
        return {"correct": correct, **scores, "answering_s": time.perf_counter() - start}

    def base(self, style: str) -> dict[str, Any]:
        return self.work.result(f"base_{style}", lambda: self.answer(self.expert, "base", style))

    # ---- Sampling ----

    def sample(self, setting: Setting, number: int, adapter: Path | None, **settings: Any) -> Dataset:
        """The steps of a round. Settings that differ in training alone share them."""
        settings = {"label_expert": "base", **setting.sampling, **settings}
        if adapter is None:
            del settings["label_expert"]
        whole = [setting.prompt_style, setting.amateur, setting.num_prompts, settings, number, str(adapter)]
        key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]
        path = self.folder / "steps" / key

        def make() -> dict[str, Any]:
            start = time.perf_counter()
            first = number * setting.num_prompts
            prompt_format = self.prompt_format(setting.prompt_style)
            questions = self.questions[first : first + setting.num_prompts]
            expert = self.expert if adapter is None else load_adapter(self.expert, str(adapter))
            amateur, own = self.amateur(setting.amateur)
            sampler = ContrastiveStepSampler(
                expert,
                amateur,
                ContrastiveSamplingConfig(str(path / "sampled"), overwrite_output_dir=True, **settings),
                processing_class=self.tokenizer,
                amateur_processing_class=own,
            )
            prompts = Dataset.from_dict({"prompt": [prompt_format.make_prompt(text) for text in questions]})
            steps = sampler.sample(prompts, prompt_format)
            if adapter is not None:
                expert.unload()
            steps.save_to_disk(path / "saved")
            others = sum(
                label_ids[0] != row["completion_ids"][t]
                for row in steps
                for t, label_ids in zip(row["step_positions"], row["label_ids"], strict=True)
            )
            num_kept, num_steps = count_steps(steps), sum(map(len, steps["completion_ids"]))
            seconds = time.perf_counter() - start
            return {"kept": num_kept, "steps": num_steps, "another_token": others, "seconds": seconds, "of": whole}

        self.work.result(f"steps_{key}", make)
        return load_from_disk(path / "saved")

    def amateur(self, name: str | None) -> tuple[torch.nn.Module | None, Any]:
        """The amateur and its tokenizer."""
        if name is None:
            return None, None
        if name == "given":
            return self.given, self.amateur_tokenizer
        if name.startswith("rounded to "):
            return rounded(self.expert, int(name.split()[2])), self.tokenizer
        return load_model(name, dtype=self.args.dtype).eval(), load_tokenizer(name)

    def labelled(self, setting: Setting, steps: Dataset, number: int, adapter: Path | None) -> Dataset:
        if setting.label == "one-hot":
            return study.one_hot(steps)
        if setting.label == "anchored":
            own = self.sample(setting, number, adapter, contrast_strength=0.0, expert_anchor=1.0, beta=0.0)
            return anchored(steps, own)
        return steps

    # ---- One setting ----

    def result(self, setting: Setting, waits: bool) -> dict[str, Any] | None:
        """The result of a setting, from the folder if it is there."""
        entry = self.work.result(setting.run, lambda: self.run(setting), waits)
        if entry is not None and any(entry[key] != value for key, value in asdict(setting).items()):
            raise ValueError(f"The folder holds another setting of the name {setting.name!r}. Give it a new name.")
        return entry

    def run(self, setting: Setting) -> dict[str, Any]:
        adapter, sampled, entry = None, [], {}
        for number in range(setting.rounds):
            steps = self.sample(setting, number, adapter)
            sampled.append(self.labelled(setting, steps, number, adapter))
            start = time.perf_counter()
            entry = self.train(setting, concatenate_datasets(sampled), number, adapter)
            entry |= {"kept_steps": count_steps(steps), "training_s": time.perf_counter() - start}
            adapter = self.folder / setting.run / f"adapter-{number}"
        adapted = load_adapter(self.expert, str(adapter))
        try:
            entry = {**asdict(setting), **entry, **self.answer(adapted, setting.run, setting.prompt_style)}
            average = write_gain(*gain([entry], self.base(setting.prompt_style))["average"])
            print(f"{time.strftime('%H:%M:%S')} {setting.run}: {average}", file=sys.stderr, flush=True)
            return entry
        finally:
            adapted.unload()
            clear_device_cache(garbage_collection=True)

    def train(self, setting: Setting, steps: Dataset, number: int, adapter: Path | None) -> dict[str, Any]:
        model, peft_config = self.expert, None
        if adapter is None:
            layers = target_modules(choose_target_modules(steps, self.expert.config.model_type))
            lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": layers, **setting.lora}
            peft_config = LoraConfig(task_type="CAUSAL_LM", **lora)
        else:
            model = load_adapter(self.expert, str(adapter), is_trainable=True)
        own = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": setting.seed}
        args = LightReasonerConfig(
            str(self.folder / setting.run / f"adapter-{number}"), **{"logging_steps": 5, **own, **setting.training}
        )
        trainer = LightReasonerTrainer(
            model, args, train_dataset=steps, processing_class=self.tokenizer, peft_config=peft_config
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
            trainer.save_model()
            history = trainer.state.log_history
            losses = [log["loss"] for log in history if "loss" in log] or [history[-1]["train_loss"]]
            return {"first_loss": losses[0], "last_loss": losses[-1]}
        finally:
            trainer.model.unload()
            self.expert.eval()
            del trainer
            clear_device_cache(garbage_collection=True)


def anchored(steps: Dataset, own: Dataset, beta: float = 1.6, num_others: int = 4) -> Dataset:
    """v_C from `beta` on, and the labels of `own` at `num_others` other steps of such rows, drawn at random."""
    rows = {tuple(row["prompt_ids"]): row for row in own}

    def draw(row: dict, index: int) -> list[study.Step]:
        nats = row["kl_divergence"]
        corrections = [step for step in study.steps_of(row) if nats[step[0]] >= beta]
        others = [step for step in study.steps_of(rows[tuple(row["prompt_ids"])]) if nats[step[0]] < beta]
        others = random.Random(index).sample(others, min(num_others, len(others)))
        return sorted([*corrections, *(others if corrections else [])], key=lambda step: step[0])

    return study.replace_steps(steps, draw)


@torch.no_grad()
def rounded(model: torch.nn.Module, bits: int, group: int = 64) -> torch.nn.Module:
    """A copy whose linear weights are rounded to `2**bits - 1` equidistant values in each group of a row."""
    copied = copy.deepcopy(model)
    largest = 2 ** (bits - 1) - 1
    for name, module in copied.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            weights = module.weight.view(-1, group).float()
            scale = weights.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
            module.weight.copy_(((weights / scale).round() * scale).view_as(module.weight))
    return copied


def gain(entries: list[dict[str, Any]], base: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """
    The gain over the expert on each set and on their `"average"`, the mean over the seeds, and its standard error over
    the questions.
    """
    gains = {}
    for name, before in base["correct"].items():
        after = [statistics.mean(verdicts) for verdicts in zip(*(e["correct"][name] for e in entries), strict=True)]
        differences = [a - b for a, b in zip(after, before, strict=True)]
        gains[name] = (statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5)
    means, errors = zip(*gains.values(), strict=True)
    return {**gains, "average": (statistics.mean(means), sum(e**2 for e in errors) ** 0.5 / len(errors))}


def write_gain(mean: float, error: float) -> str:
    return f"{100 * mean:+.1f} ({100 * (mean - Z_95 * error):+.1f} to {100 * (mean + Z_95 * error):+.1f})"


def table(log: list[dict[str, Any]], bases: dict[str, dict[str, Any]]) -> str:
    """Every setting, with what differs from the defaults, the mean over its seeds."""
    defaults = {each.name: each.default if each.name != "name" else None for each in fields(Setting)}
    lines = []
    for style, base in bases.items():
        names = [*base["correct"], "average"]
        accuracies = [f"{100 * statistics.mean(verdicts):.1f} %" for verdicts in base["correct"].values()]
        lines += [f"| {style} | seeds | {' | '.join(names)} | tokens | cut | loss |", "|---" * (len(names) + 5) + "|"]
        lines.append(f"| expert | | {' | '.join(accuracies)} | | {base['mean_tokens']:.0f} | {base['num_cut']} | |")
        settings: dict[str, list[dict[str, Any]]] = {}
        for entry in log:
            if entry["prompt_style"] == style:
                settings.setdefault(entry["name"], []).append(entry)
        for name, entries in settings.items():
            own = {key: entries[0][key] for key in defaults if key not in ("name", "prompt_style", "seed")}
            own = {key: value for key, value in own.items() if value not in (defaults[key], {})}
            shown = f"{name}: {json.dumps(own)}" if own else name
            gains = " | ".join(write_gain(*each) for each in gain(entries, base).values())
            tokens, cut, *losses = (
                statistics.mean(entry[key] for entry in entries)
                for key in ("mean_tokens", "num_cut", "first_loss", "last_loss")
            )
            seeds = " ".join(str(entry["seed"]) for entry in entries)
            loss = " to ".join(f"{each:.3f}" for each in losses)
            lines.append(f"| {shown} | {seeds} | {gains} | {tokens:.0f} | {cut:.0f} | {loss} |")
        lines.append("")
    return "\n".join(lines).strip()


def choose(settings: list[Setting], log: list[dict], bases: dict[str, dict], count: int) -> list[Setting]:
    """The first setting, and the `count` others that gain most on average, of each prompt style."""
    gains = {(e["name"], e["prompt_style"]): gain([e], bases[e["prompt_style"]])["average"][0] for e in log}
    chosen = []
    for style in bases:
        first, *others = (setting for setting in settings if setting.prompt_style == style)
        chosen += [first, *sorted(others, key=lambda each: -gains[each.name, style])[:count]]
    return chosen


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", required=True, help="Id or path.")
    parser.add_argument("--amateur", required=True, help="Id or path.")
    parser.add_argument(
        "--dataset_name", required=True, help="JSON lines with question and answer, as GSM8K has them."
    )
    parser.add_argument("--settings", required=True, type=Path, help="JSON lines, a setting each.")
    parser.add_argument("--num_held_out", type=int, default=500, help="Rows, from the last, to evaluate on.")
    parser.add_argument("--held_out", type=Path, nargs="+", default=[], help="Other files to evaluate on.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="The first is for all settings.")
    parser.add_argument("--finalists", type=int, help="How many settings get the other seeds. Default: all.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer in the evaluation.")
    parser.add_argument("--system_prompt", help="Of chat prompts. Default: that of the commands.")
    parser.add_argument("--dtype", default="bfloat16", help="Of the models.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for results and table.md.")
    return parser


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = make_parser().parse_args(argv)
    settings = read_settings(args.settings)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    exploration = Exploration(args)
    bases = {style: exploration.base(style) for style in dict.fromkeys(each.prompt_style for each in settings)}

    def run(settings: list[Setting]) -> list[dict[str, Any]]:
        for waits in (False, True):  # first what no other process is at
            log = [exploration.result(setting, waits) for setting in settings]
        return log

    first, *others = args.seeds
    settings = [replace(setting, seed=first) for setting in settings]
    log = run(settings)
    if others:
        finalists = settings if args.finalists is None else choose(settings, log, bases, args.finalists)
        log += run([replace(setting, seed=seed) for seed in others for setting in finalists])
    text = table(log, bases)
    (args.output_dir / "table.md").write_text(text + "\n")
    print(text)
    return log


if __name__ == "__main__":
    main()
