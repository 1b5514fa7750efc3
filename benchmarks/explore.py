"""
What helps a real pair beside the settings that `lightreasoner tune` searches? Other labels, other amateurs, several
rounds: samples, trains and evaluates one setting after another, and keeps a log of all. Threshold, rate, updates and
layers alone are found by `lightreasoner tune`, which samples once.

A setting is a line of JSON with the fields of `Setting` that differ from their defaults. The first rows of the dataset
are learned from, the last ones are held back and answered, by the expert as it was and as it is after each setting;
test sets are for the one that is chosen in the end. What was evaluated already is not done again, and nothing is left
out of the log: log.jsonl has a line a setting, table.md shows them all, NAME/adapter is what a setting has trained.

```bash
echo '{"name": "one-hot", "label": "one-hot"}' > settings.jsonl
python benchmarks/explore.py --expert Qwen/Qwen2.5-Math-1.5B --amateur Qwen/Qwen2.5-0.5B \
    --dataset_name gsm8k_train.jsonl --settings settings.jsonl --output_dir exploration
```
"""

import argparse
import copy
import json
import statistics
import sys
import time
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import study
import torch
import transformers
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers.trainer_callback import PrinterCallback

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    EvaluationConfig,
    LightReasonerConfig,
    LightReasonerTrainer,
    count_steps,
    evaluate,
    kl_quantiles,
)
from trl_lightreasoner.contrast import contrast_steps
from trl_lightreasoner.evaluation.statistics import Z_95, compare, standard_error
from trl_lightreasoner.models.loading import load_model, load_tokenizer
from trl_lightreasoner.steps.prompts import encode_rows


CARELESS = "Answer at once with the final number in \\boxed{}, without any steps."
TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        name (`str`): What the log calls it.
        prompt_style (`str`): `"chat"` or `"raw"`, in sampling and in evaluation.
        amateur (`str`): `"given"`; `"rounded to 3 bits"` (or 2, 4): the expert with rounded weights; `"careless
            prompt"`: the expert, asked to answer without steps; or the path of a model or an adapter.
        num_problems, max_new_tokens, alpha, beta, include_first_step: Of sampling.
        label (`str`): `"contrast"`, or for comparison `"one-hot"` (the expert's own token) and `"expert"` (pi_E over
            the same tokens).
        learning_rate, updates, rows: Of training; rows are whole trajectories an update.
        lora (`str`): `"attention"` or `"all"` linear layers.
        rounds (`int`): How often to sample with the model as it is and train it on.
        seed (`int`): Of training.
    """

    name: str
    prompt_style: str = "chat"
    amateur: str = "given"
    num_problems: int = 1000
    max_new_tokens: int = 128
    alpha: float = 0.2
    beta: float = 0.4
    include_first_step: bool = True
    label: str = "contrast"
    learning_rate: float = 5e-5
    updates: int = 125
    rows: int = 8
    lora: str = "attention"
    rounds: int = 1
    seed: int = 0


def read_settings(path: Path) -> list[Setting]:
    settings = [Setting(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    names = [setting.name for setting in settings]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"Settings must have names of their own; these are repeated: {', '.join(sorted(repeated))}.")
    return settings


class Exploration:
    """The pair, the two parts of the dataset, and what was sampled already."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.output_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer, self.amateur_tokenizer = map(load_tokenizer, (args.expert, args.amateur))
        self.expert, self.given = (load_model(name, dtype=args.dtype).eval() for name in (args.expert, args.amateur))
        rows = load_dataset("json", data_files=args.dataset_name, split="train")
        self.train_rows = rows.select(range(len(rows) - args.num_held_out))
        held_out = rows.select(range(len(rows) - args.num_held_out, len(rows)))
        held_out.select_columns(["question", "answer"]).to_json(self.folder / "gsm8k.jsonl")
        self.sampled: dict[tuple, Dataset] = {}

    # ---- Evaluation ----

    def evaluation(self, name: str, style: str) -> EvaluationConfig:
        return EvaluationConfig(
            str(self.folder / name / style),
            overwrite_output_dir=True,
            benchmarks=["gsm8k"],
            data_dir=str(self.folder),
            prompt_style=style,
            max_new_tokens=self.args.max_new_tokens,
        )

    def evaluate(self, model: torch.nn.Module, name: str, style: str) -> dict[str, Any]:
        start = time.perf_counter()
        config = self.evaluation(name, style)
        scores = evaluate(model, config, processing_class=self.tokenizer).results["benchmarks"]["gsm8k"]["model"]
        correct = read_verdicts(self.folder, name, style)
        return {**scores, "correct": correct, "evaluation_s": time.perf_counter() - start}

    def base(self, style: str) -> dict[str, Any]:
        path = self.folder / f"base_{style}.json"
        if not path.exists():
            path.write_text(json.dumps(self.evaluate(self.expert, "base", style)))
        return json.loads(path.read_text())

    # ---- Sampling ----

    def sample(self, setting: Setting, model: torch.nn.Module) -> Dataset:
        key = (setting.prompt_style, setting.amateur, setting.num_problems, setting.max_new_tokens, setting.alpha)
        key += (setting.beta, setting.include_first_step)
        if model is self.expert and key in self.sampled:
            return self.sampled[key]
        prompt_format = self.evaluation("prompts", setting.prompt_style).prompt_format()
        questions = self.train_rows["question"][: setting.num_problems]
        careless = setting.amateur == "careless prompt"
        sampler = ContrastiveStepSampler(
            model,
            self.amateur(setting.amateur),
            ContrastiveSamplingConfig(
                str(self.folder / "steps"),
                overwrite_output_dir=True,
                alpha=setting.alpha,
                # The expert does not differ from itself: its steps are found below
                beta=0.0 if careless else setting.beta,
                max_new_tokens=setting.max_new_tokens,
                include_first_step=setting.include_first_step,
            ),
            processing_class=self.tokenizer,
            amateur_processing_class=self.amateur_tokenizer if setting.amateur == "given" else self.tokenizer,
        )
        prompts = Dataset.from_dict({"prompt": [prompt_format.make_prompt(text) for text in questions]})
        dataset = sampler.sample(prompts, prompt_format)
        if careless:
            dataset = self.contrast_with_careless_prompt(dataset, model, setting)
        if model is self.expert:
            self.sampled[key] = dataset
        return dataset

    def amateur(self, name: str) -> torch.nn.Module:
        if name == "given":
            return self.given
        if name == "careless prompt":
            return self.expert
        if name.startswith("rounded to "):
            return rounded(self.expert, int(name.split()[2]))
        return load_model(name, dtype=self.args.dtype).eval()

    @torch.no_grad()
    def contrast_with_careless_prompt(self, dataset: Dataset, model: torch.nn.Module, setting: Setting) -> Dataset:
        """The same trajectories, their steps found against the model's own distribution behind another prompt."""

        def logits_behind(prompt_ids: list[int], completion_ids: list[int]) -> torch.Tensor:
            ids = torch.tensor([prompt_ids + completion_ids[:-1]], device=self.device)
            return model(ids, logits_to_keep=len(completion_ids)).logits[0, :, : len(self.tokenizer)]

        def contrast(row: dict[str, Any]) -> dict[str, Any]:
            careless = encode_rows([{"prompt": careless_prompt(row["prompt"])}], self.tokenizer, set())
            prompt_ids = careless["prompt_ids"][0]
            logits = [logits_behind(ids, row["completion_ids"]) for ids in (row["prompt_ids"], prompt_ids)]
            steps = contrast_steps(*logits, alpha=setting.alpha, beta=setting.beta)
            positions = steps.kept.nonzero()[:, 0].tolist()
            supports = (steps.label_probs > 0).sum(-1).tolist()
            first = 0 if setting.include_first_step else 1
            kept = [i for i, t in enumerate(positions) if t >= first]
            return {
                "kl_divergence": steps.kl_divergence.tolist(),
                "step_positions": [positions[i] for i in kept],
                "label_ids": [steps.label_ids[i, : supports[i]].tolist() for i in kept],
                "label_probs": [steps.label_probs[i, : supports[i]].tolist() for i in kept],
            }

        # With a fingerprint of ours `map` need not hash the model
        return dataset.with_format(None).map(contrast, keep_in_memory=True, new_fingerprint=uuid.uuid4().hex)

    # ---- One setting ----

    def run(self, setting: Setting) -> dict[str, Any]:
        model, seconds, entry = self.expert, {"sampling_s": 0.0, "training_s": 0.0}, {}
        trainer = None
        try:
            for number in range(setting.rounds):
                start = time.perf_counter()
                dataset = self.sample(setting, model)
                seconds["sampling_s"] += time.perf_counter() - start
                if number == 0:
                    quantiles = kl_quantiles(dataset, [0.5, 0.9])
                    num_steps = sum(map(len, dataset["completion_ids"]))
                    entry |= {"kl_50": quantiles[0], "kl_90": quantiles[1], "kept_steps": count_steps(dataset)}
                    entry |= {"kept_share": count_steps(dataset) / num_steps}
                if setting.label == "one-hot":
                    dataset = study.one_hot(dataset)
                elif setting.label == "expert":
                    dataset = study.no_contrast(dataset, self.expert)
                start = time.perf_counter()
                trainer = self.trainer(setting, model, dataset, number)
                trainer.train()
                seconds["training_s"] += time.perf_counter() - start
                model = trainer.model.eval()
            trainer.save_model(str(self.folder / setting.name / "adapter"))
            logs = [log for log in trainer.state.log_history if "loss" in log]
            entry |= {
                f"{name}_{key}": logs[i][key]
                for key in ("loss", "entropy")
                for i, name in ((0, "first"), (-1, "last"))
            }
            scores = self.evaluate(model, setting.name, setting.prompt_style)
        finally:
            if trainer is not None:
                trainer.model.unload()
                self.expert.eval()
        base = self.base(setting.prompt_style)
        difference = compare(scores.pop("correct"), base["correct"])
        return {**asdict(setting), **entry, **seconds, **scores, **difference._asdict(), "base": base["accuracy"]}

    def trainer(self, setting: Setting, model: torch.nn.Module, dataset: Dataset, number: int) -> LightReasonerTrainer:
        lora = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS[setting.lora], task_type="CAUSAL_LM"
        )
        trainer = LightReasonerTrainer(
            model,
            LightReasonerConfig(
                str(self.folder / "run"),
                max_steps=setting.updates,
                learning_rate=setting.learning_rate,
                per_device_train_batch_size=setting.rows,
                gradient_accumulation_steps=1,
                beta=0.0,  # that of the sampling
                logging_steps=max(1, setting.updates // 5),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=setting.seed + number,
                use_cpu=self.device == "cpu",
                use_liger_kernel=self.args.use_liger_kernel,
            ),
            train_dataset=dataset,
            processing_class=self.tokenizer,
            peft_config=lora if number == 0 else None,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def careless_prompt(prompt: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
    """The same question, asked for the bare number."""
    if isinstance(prompt, str):
        return f"{CARELESS}\n\n{prompt}"
    return [{"role": "system", "content": CARELESS}, prompt[-1]]


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


def table(log: list[dict[str, Any]], bases: dict[str, dict[str, Any]]) -> str:
    """Every setting of the log, with what differs from the defaults."""
    defaults = {field.name: field.default for field in fields(Setting)}
    lines = [
        "| setting | kept steps | loss | accuracy | difference (95 %) | p | tokens | cut |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for style, base in bases.items():
        count = len(base["correct"])
        error = standard_error(base["accuracy"], count)
        lines.append(
            f"| expert, {style}, {count:,} problems | | | {base['accuracy']:.1%} +- {error:.1%} | | | "
            f"{base['mean_tokens']:.0f} | {base['num_cut'] / count:.1%} |"
        )
    for entry in log:
        own = [f"{key} {entry[key]}" for key in defaults if key != "name" and entry[key] != defaults[key]]
        count = len(bases[entry["prompt_style"]]["correct"])
        interval = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * entry[key] for key in ("difference", "low", "high")))
        lines.append(
            f"| {', '.join(own) or 'defaults'} | {entry['kept_steps']:,} ({entry['kept_share']:.1%}) | "
            f"{entry['first_loss']:.3f} to {entry['last_loss']:.3f} | {entry['accuracy']:.1%} | {interval} | "
            f"{entry['p_value']:.2g} | {entry['mean_tokens']:.0f} | {entry['num_cut'] / count:.1%} |"
        )
    return "\n".join(lines)


def read_verdicts(folder: Path, name: str, style: str) -> list[bool]:
    path = folder / name / style / "model" / "gsm8k.parquet"
    return Dataset.from_parquet(str(path), keep_in_memory=True)["correct"][:]


def label_table(log: list[dict[str, Any]], bases: dict[str, dict[str, Any]], folder: Path) -> str:
    """
    What v_C and other labels of the same steps gain over the expert, and v_C over each of them: the means over the
    questions and over the seeds, of the others those that v_C has, too. Intervals are over the questions.
    """
    shared = [field.name for field in fields(Setting) if field.name not in ("name", "label", "seed")]
    runs: dict[tuple, dict[str, dict[int, list[bool]]]] = {}  # by setting, label and seed
    for entry in log:
        labels = runs.setdefault(tuple(entry[name] for name in shared), {})
        verdicts = read_verdicts(folder, entry["name"], entry["prompt_style"])
        labels.setdefault(entry["label"], {})[entry["seed"]] = verdicts
    lines = []
    for values, labels in runs.items():
        setting = dict(zip(shared, values, strict=True))
        own = [f"{key} {value}" for key, value in setting.items() if value != getattr(Setting(""), key)]
        base = bases[setting["prompt_style"]]["correct"]
        contrast = labels.get("contrast", {})
        rows = []
        for label, others in labels.items():
            if not (seeds := contrast.keys() & others.keys()):
                continue
            ours, theirs = (
                [statistics.mean(verdicts) for verdicts in zip(*(each[seed] for seed in seeds), strict=True)]
                for each in (contrast, others)
            )
            rows.append(
                f"| {label} | {', '.join(own) or 'defaults'} | {len(seeds)} | {statistics.mean(theirs):.1%} | "
                f"{gain(theirs, base)} | {'' if label == 'contrast' else gain(ours, theirs)} |"
            )
        lines += rows if len(rows) > 1 else []  # v_C alone is in the other table
    header = ["| label | setting | seeds | accuracy | against the expert (95 %) | v_C against it (95 %) |"]
    return "\n".join([*header, "|---|---|---|---|---|---|", *lines]) if lines else ""


def gain(ours: list[float], theirs: list[float]) -> str:
    """The mean of paired differences, in points, with its interval."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    return f"{100 * mean:+.1f} ({100 * (mean - Z_95 * error):+.1f} to {100 * (mean + Z_95 * error):+.1f})"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", required=True, help="Id or path.")
    parser.add_argument("--amateur", required=True, help="Id or path.")
    parser.add_argument(
        "--dataset_name", required=True, help="JSON lines with question and answer, as GSM8K has them."
    )
    parser.add_argument("--settings", required=True, type=Path, help="JSON lines, a setting each.")
    parser.add_argument("--num_held_out", type=int, default=500, help="Rows, from the last, to evaluate on.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer in the evaluation.")
    parser.add_argument("--dtype", default="bfloat16", help="Of the models.")
    parser.add_argument("--use_liger_kernel", action="store_true", help="Train with Liger's kernels.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for log.jsonl and table.md.")
    return parser


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = make_parser().parse_args(argv)
    settings = read_settings(args.settings)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    exploration = Exploration(args)
    path = args.output_dir / "log.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {entry["name"]: {field.name: entry[field.name] for field in fields(Setting)} for entry in log}
    for setting in settings:
        if setting.name in done:
            if done[setting.name] != asdict(setting):
                raise ValueError(f"The log holds another setting of the name {setting.name!r}. Give it a new name.")
            continue
        entry = exploration.run(setting)
        log.append(entry)
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {setting.name}: {entry['accuracy']:.1%}", file=sys.stderr, flush=True)
    bases = {style: exploration.base(style) for style in dict.fromkeys(entry["prompt_style"] for entry in log)}
    text = "\n\n".join(filter(None, [table(log, bases), label_table(log, bases, args.output_dir)]))
    (args.output_dir / "table.md").write_text(text + "\n")
    print(text)
    return log


if __name__ == "__main__":
    main()
