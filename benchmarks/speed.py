"""
How much faster than the published way, in how much memory, and is the result the same?

Samples a dataset and trains on it for one epoch, both ways: the published one (`published.py`) on a slice, whose rate
is scaled to the whole, and `ContrastiveStepSampler` and `LightReasonerTrainer` in full. Then does a part again in the
slowest and simplest way that this library has, and compares. Models are loaded before anything is timed. Prints
Markdown tables and writes speed.json. Without arguments it runs the bundled pair.

```bash
python benchmarks/speed.py --expert Qwen/Qwen2.5-Math-1.5B --amateur Qwen/Qwen2.5-0.5B --dataset_name train.jsonl \
    --prompt_column question --system_prompt 'Please reason step by step.' --num_problems 1000 --output_dir bench
```
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import published
import torch
import transformers
from datasets import Dataset, disable_caching, disable_progress_bars
from peft import LoraConfig, get_peft_model
from published import Measured, clock, peak_gib, reset_peak
from transformers import BitsAndBytesConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
    __version__,
    count_steps,
    raise_beta,
)
from trl_lightreasoner.commands.pair_arguments import PairArguments, as_prompts
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR, as_prompt
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.generation.greedy import find_eos_ids, generate_greedy
from trl_lightreasoner.models.loading import load_model, load_tokenizer
from trl_lightreasoner.sampling.scoring import Trajectory, group_by_length, score_trajectories
from trl_lightreasoner.steps.splits import load_split
from trl_lightreasoner.vocabulary import model_vocabulary, shared_vocabulary


ALPHA, BETA = 0.2, 0.4
# What the slow path generates together
CHECK_BATCH = 16
# Of every number of trajectories an update that is tried
UPDATES_OF_EACH = 40


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", default=str(PAIR / "expert"), help="Id or path.")
    parser.add_argument("--amateur", default=str(PAIR / "amateur"), help="Id or path.")
    parser.add_argument("--dataset_name", help="Prompts; by default the bundled pair's problems.")
    parser.add_argument("--prompt_column", default="prompt", help="Column that holds the prompts.")
    parser.add_argument("--conversational", action="store_true", help="Make each text prompt a user's message.")
    parser.add_argument("--system_prompt", help="System message before each prompt.")
    parser.add_argument("--num_problems", type=int, default=1000, help="Prompts, repeated if the file has fewer.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Longest completion.")
    parser.add_argument("--dtype", help="Of the models; by default bfloat16 on a GPU, float32 on a CPU.")
    parser.add_argument("--per_device_batch_size", type=int, help="Prompts a batch; by default the sampler's own.")
    parser.add_argument("--train_rows", type=int, default=64, help="Trajectories an update.")
    parser.add_argument("--train_share", type=float, help="Raise beta until this share of the steps is kept.")
    parser.add_argument("--load_in_4bit", action="store_true", help="Load the expert in NF4.")
    parser.add_argument("--use_liger_kernel", action="store_true", help="Train with Liger's kernels.")
    parser.add_argument("--baseline_problems", type=int, default=3, help="Prompts of the published way's slice.")
    parser.add_argument("--baseline_updates", type=int, default=10, help="Updates of the published way's slice.")
    parser.add_argument("--check_problems", type=int, default=32, help="Prompts to do again in the slow way.")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="Numbers of problems for a scaling table.")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[], help="The same of prompts sampled together.")
    parser.add_argument("--update_rows", type=int, nargs="*", default=[], help="The same of trajectories an update.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for speed.json.")
    return parser


class Trained(NamedTuple):
    """
    What a training took.

    Attributes:
        seconds (`float`): All of it.
        rate (`float`): Kept steps a second after the first update, which sets things up.
        update_s (`float`): The median of an update's seconds, without the first.
        peak_gib (`float`, *optional*): As of [`Measured`].
    """

    seconds: float
    rate: float
    update_s: float
    peak_gib: float | None


class Ends(TrainerCallback):
    """When each update ended; on a GPU, when it was launched."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def pace(start: float, ends: list[float], end: float, num_steps: int, first_share: float) -> tuple[float, float]:
    """
    Steps a second after the first update, as the published way is timed, and the median of an update's seconds.

    Args:
        start, end (`float`): When the training began and was over, in seconds.
        ends (`list[float]`): When each update ended.
        num_steps (`int`): Kept steps of all updates.
        first_share (`float`): Share of them that the first update holds.
    """
    if len(ends) == 1:
        return num_steps / (end - start), ends[0] - start
    updates = [later - sooner for sooner, later in itertools.pairwise(ends)]
    return num_steps * (1 - first_share) / (end - ends[0]), statistics.median(updates)


class Pair:
    """Two models that are loaded, with all that the slow path needs."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        self.expert = load_model(args.expert, dtype=dtype, **quantization(args.load_in_4bit)).eval()
        self.amateur = load_model(args.amateur, dtype=dtype).eval()
        self.tokenizer, self.amateur_tokenizer = map(load_tokenizer, (args.expert, args.amateur))
        widths = [model.config.get_text_config().vocab_size for model in (self.expert, self.amateur)]
        self.vocabulary = model_vocabulary(self.tokenizer, widths[0])
        self.shared_vocabulary = shared_vocabulary(self.tokenizer, self.amateur_tokenizer, *widths)
        self.eos_ids = find_eos_ids(self.expert, self.tokenizer)

    def sample(self, prompts: Dataset, batch_size: int | None = None) -> Measured:
        """What `ContrastiveStepSampler` makes of the prompts, everything but the loading of models included."""
        reset_peak()
        start = clock()
        sampler = ContrastiveStepSampler(
            self.expert,
            self.amateur,
            ContrastiveSamplingConfig(
                str(self.args.output_dir / "steps"),
                alpha=ALPHA,
                beta=BETA,
                max_new_tokens=self.args.max_new_tokens,
                overwrite_output_dir=True,
                per_device_batch_size=batch_size or self.args.per_device_batch_size,
            ),
            processing_class=self.tokenizer,
            amateur_processing_class=self.amateur_tokenizer,
        )
        dataset = sampler.sample(prompts)
        seconds = clock() - start
        self.batch_size = sampler.batch_size
        return Measured(dataset, seconds, len(prompts) / seconds, peak_gib())

    def train(self, dataset: Dataset, rows: int | None = None) -> tuple[Trained, float]:
        """One epoch of `LightReasonerTrainer`, and the seconds before, for construction with its check of all rows."""
        rows = rows or self.args.train_rows
        ends = Ends()
        reset_peak()
        start = clock()
        trainer = LightReasonerTrainer(
            self.expert,
            LightReasonerConfig(
                str(self.args.output_dir / "adapter"),
                num_train_epochs=1,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=1,
                use_liger_kernel=self.args.use_liger_kernel,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=dataset,
            processing_class=self.tokenizer,
            callbacks=[ends],
            peft_config=lora(),
        )
        trainer.remove_callback(PrinterCallback)
        constructed = clock()
        trainer.train()
        end, peak = clock(), peak_gib()
        trainer.model.unload()
        first_share = min(1, rows / len(dataset))  # of the rows, and so about of the steps
        rate, update_s = pace(constructed, ends.times, end, count_steps(dataset), first_share)
        return Trained(end - constructed, rate, update_s, peak), constructed - start

    def train_published(self, dataset: Dataset) -> Measured:
        model = get_peft_model(self.expert, lora())
        rows = published.one_step_rows(dataset, self.tokenizer)
        measured = published.train(model, self.tokenizer, rows, self.args.baseline_updates)
        model.unload()
        return measured

    def alone(self, work: Callable[[], Any]) -> Any:
        """What `work` gives while the expert alone is on the device, as in training."""
        device = self.amateur.device
        self.amateur.to("cpu")
        try:
            return work()
        finally:
            self.expert.eval()
            self.amateur.to(device)


def quantization(in_4bit: bool) -> dict[str, BitsAndBytesConfig]:
    """What loads a model in NF4, if it is to be."""
    if not in_4bit:
        return {}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    }


def lora() -> LoraConfig:
    return LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )


def load_prompts(args: argparse.Namespace, num_problems: int) -> tuple[Dataset, int]:
    """As many prompts as asked for, and how many of them are different ones."""
    if args.dataset_name is None:
        problems = make_problems(num_problems, seed=0, split="train", kind_shares=KIND_SHARES)
        return Dataset.from_list([{"prompt": as_prompt(problem)} for problem in problems]), num_problems
    names = ("expert", "amateur", "dataset_name", "prompt_column", "conversational", "system_prompt")
    sample_args = PairArguments(**{name: getattr(args, name) for name in names})
    prompts, _ = as_prompts(load_split(args.dataset_name, None, "train"), sample_args)
    prompts = prompts.select_columns("prompt")
    return prompts.select([i % len(prompts) for i in range(num_problems)]), min(num_problems, len(prompts))


def padding_share(lengths: list[int], groups: list[list[int]]) -> float:
    """Share of padding among the tokens that are scored, if each group of rows is padded to its longest."""
    padded = sum(max(lengths[row] for row in group) * len(group) for group in groups)
    return 1 - sum(lengths[row] for group in groups for row in group) / padded


def scored_padding(dataset: Dataset, batch_size: int) -> float:
    """[`padding_share`] of the batches that `ContrastiveStepSampler` forms: longest prompts first, as many each."""
    rows = zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)
    trajectories = sorted((Trajectory(*row) for row in rows), key=lambda each: -len(each.prompt_ids))
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in trajectories]
    groups = []
    for start in range(0, len(lengths), batch_size):
        batch = group_by_length(trajectories[start : start + batch_size])
        groups += [[start + row for row in group] for group in batch]
    return padding_share(lengths, groups)


def compare(pair: Pair, dataset: Dataset) -> dict[str, Any]:
    """
    The rows of a dataset against the slow path: completions generated in batches of `CHECK_BATCH`, in the order of the
    dataset, and the dataset's trajectories scored one at a time.

    Where completions part, the gap is taken at the first token that differs: how much lower the logit of the dataset's
    token is than the largest one. It is a near-tie if the gap is a rounding or two of the logits' dtype.
    """
    rows = list(dataset)
    prompts, completions = ([row[name] for row in rows] for name in ("prompt_ids", "completion_ids"))
    slow = []
    for start in range(0, len(rows), CHECK_BATCH):
        batch = prompts[start : start + CHECK_BATCH]
        slow += generate_greedy(pair.expert, batch, pair.vocabulary, pair.eos_ids, pair.args.max_new_tokens)
    gaps, near_ties = [], 0
    for prompt, fast, other in zip(prompts, completions, slow, strict=True):
        if fast != other:
            gap, rounding = _gap(pair, prompt, fast, other)
            gaps.append(gap)
            near_ties += gap <= 2 * rounding

    steps = alike = supports = 0
    largest_label = largest_kl = 0.0
    for row in rows:
        trajectory = Trajectory(row["prompt_ids"], row["completion_ids"])
        scores = score_trajectories(pair.expert, pair.amateur, [trajectory], pair.shared_vocabulary, ALPHA, BETA)[0]
        fast, other = _labels(row), _labels(scores._asdict())
        steps += len(fast.keys() | other.keys())
        alike += len(fast.keys() & other.keys())
        for t in fast.keys() & other.keys():
            if fast[t].keys() == other[t].keys():
                supports += 1
                largest_label = max(largest_label, *(abs(fast[t][i] - other[t][i]) for i in fast[t]))
        pairs = zip(row["kl_divergence"], scores.kl_divergence, strict=True)
        largest_kl = max(largest_kl, *(abs(a - b) for a, b in pairs))
    return {
        "problems": len(rows),
        "completions_alike": len(rows) - len(gaps),
        "near_ties": near_ties,
        "largest_gap": max(gaps, default=0.0),
        "kept_steps": steps,
        "kept_steps_alike": alike,
        "supports_alike": supports,
        "largest_label_difference": largest_label,
        "largest_kl_difference": largest_kl,
    }


@torch.no_grad()
def _gap(pair: Pair, prompt: list[int], fast: list[int], other: list[int]) -> tuple[float, float]:
    """How much lower the logit of `fast`'s first own token is than the best, and the spacing of such logits."""
    t = next(t for t, (a, b) in enumerate(itertools.zip_longest(fast, other)) if a != b)
    context = torch.tensor([prompt + fast[:t]], device=pair.expert.device)
    logits = pair.vocabulary.select(pair.expert(context).logits[0, -1])
    best = logits.max().item()
    token = fast[t] if t < len(fast) else other[t]
    own = logits[pair.vocabulary.columns_of(torch.tensor(token, device=logits.device))].item()
    # A completion that ends without a token to end it is no near-tie
    gap = best - own if t < len(fast) and t < len(other) else math.inf
    return gap, torch.finfo(logits.dtype).eps * 2 ** math.floor(math.log2(max(abs(best), abs(own), 1e-6)))


def _labels(row: dict[str, Any]) -> dict[int, dict[int, float]]:
    """Each kept step's label."""
    steps = zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True)
    return {t: dict(zip(ids, probs, strict=True)) for t, ids, probs in steps}


def keep_share(dataset: Dataset, share: float | None) -> Dataset:
    """The dataset with a beta that keeps this share of the steps, if it keeps more now."""
    num_steps = sum(map(len, dataset["kl_divergence"]))
    if share is None or count_steps(dataset) <= share * num_steps:
        return dataset
    divergences = sorted((kl for row in dataset["kl_divergence"] for kl in row), reverse=True)
    return raise_beta(dataset, max(BETA, divergences[int(share * num_steps)]))


def measure(pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    prompts, num_different = load_prompts(args, args.num_problems)
    tell(f"published way, {args.baseline_problems} problems (after two tokens of one, to warm up)")
    published.sample(pair.expert, pair.amateur, pair.tokenizer, prompts["prompt"][:1], max_new_tokens=2)
    slice_ = published.sample(
        pair.expert,
        pair.amateur,
        pair.tokenizer,
        prompts["prompt"][: args.baseline_problems],
        args.max_new_tokens,
        ALPHA,
        BETA,
    )
    tell(f"{slice_.seconds:.1f} s. Sampling {args.num_problems:,} problems")
    sampled = pair.sample(prompts)
    dataset = sampled.result
    tell(f"{sampled.seconds:.1f} s. Doing {args.check_problems} again in the slow way")
    quality = compare(pair, dataset.select(range(min(args.check_problems, len(dataset)))))
    kept = keep_share(dataset, args.train_share)
    tell(f"Published training, {args.baseline_updates} updates")
    trained_slice = pair.alone(lambda: pair.train_published(kept))
    tell(f"{trained_slice.seconds:.1f} s. Training on {count_steps(kept):,} steps")
    trained, constructed = pair.alone(lambda: pair.train(kept))
    tell(f"{trained.seconds:.1f} s.")

    labels = [ids for row in kept["label_ids"] for ids in row]
    num_steps = sum(map(len, dataset["completion_ids"]))
    sample_s, train_s = args.num_problems / slice_.rate, len(labels) / trained_slice.rate
    return {
        "problems": args.num_problems,
        "different_problems": num_different,
        "steps": num_steps,
        "kept_steps": len(labels),
        "mean_support": sum(map(len, labels)) / len(labels),
        "padding_share": scored_padding(dataset, pair.batch_size),
        "train_rows": args.train_rows,
        "training": (" in NF4" if args.load_in_4bit else "") + (", Liger's kernels" if args.use_liger_kernel else ""),
        "construction_s": constructed,
        "published": {
            "problems": args.baseline_problems,
            "updates": args.baseline_updates,
            "sample_s": sample_s,
            "sample_peak_gib": slice_.peak_gib,
            "train_steps_per_s": trained_slice.rate,
            "train_peak_gib": trained_slice.peak_gib,
            "whole_s": sample_s + train_s,
        },
        "ours": {
            "sample_s": sampled.seconds,
            "sample_peak_gib": sampled.peak_gib,
            "train_steps_per_s": trained.rate,
            "train_peak_gib": trained.peak_gib,
            "train_s": trained.seconds,
            "update_s": trained.update_s,
            "whole_s": sampled.seconds + trained.seconds + constructed,
        },
        "quality": quality,
    }


def measure_size(pair: Pair, args: argparse.Namespace, num_problems: int) -> dict[str, Any]:
    tell(f"Sampling {num_problems:,} problems")
    prompts, num_different = load_prompts(args, num_problems)
    sampled = pair.sample(prompts)
    kept = keep_share(sampled.result, args.train_share)
    tell(f"{sampled.seconds:.1f} s. Training on {count_steps(kept):,} steps")
    trained, constructed = pair.alone(lambda: pair.train(kept))
    tell(f"{trained.seconds:.1f} s.")
    return {
        "problems": num_problems,
        "different_problems": num_different,
        "kept_steps": count_steps(kept),
        "sample_s": sampled.seconds,
        "sample_peak_gib": sampled.peak_gib,
        "train_s": trained.seconds,
        "train_steps_per_s": trained.rate,
        "construction_s": constructed,
        "train_peak_gib": trained.peak_gib,
    }


def measure_batches(pair: Pair, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Sampling by `args.batch_sizes` prompts together, and training by `args.update_rows` trajectories an update."""
    prompts, _ = load_prompts(args, args.num_problems)
    batches, updates = [], []
    for size in args.batch_sizes:
        tell(f"Sampling by {size}")
        sampled = pair.sample(prompts, size)
        tell(f"{sampled.seconds:.1f} s.")
        batches.append({"prompts": size, "sample_s": sampled.seconds, "sample_peak_gib": sampled.peak_gib})
    if args.update_rows:
        kept = keep_share(pair.sample(prompts).result, args.train_share)
    for rows in args.update_rows:
        tell(f"Training by {rows}")
        part = kept.select(range(min(len(kept), rows * UPDATES_OF_EACH)))
        trained, _ = pair.alone(lambda part=part, rows=rows: pair.train(part, rows))
        tell(f"{trained.seconds:.1f} s.")
        updates.append(
            {
                "rows": rows,
                "update_s": trained.update_s,
                "train_steps_per_s": trained.rate,
                "train_peak_gib": trained.peak_gib,
            }
        )
    return {"batch_sizes": batches, "update_rows": updates}


def report(results: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    old, new, quality = results["published"], results["ours"], results["quality"]

    def row(name: str, key: str, peak: str | None, digits: int, better: Callable[[float, float], float]) -> str:
        peaks = "| | |" if peak is None else f"| {gib(old[peak])} | {gib(new[peak])} |"
        ratio = better(old[key], new[key])
        return f"| {name} | {old[key]:,.{digits}f} | {new[key]:,.{digits}f} | {ratio:,.1f} {peaks}"

    padding = results["padding_share"]
    share = results["kept_steps"] / results["steps"]
    parted = ""
    if num_parted := quality["problems"] - quality["completions_alike"]:
        parted = (
            f"; of the other {num_parted}, {quality['near_ties']} part at a near-tie[^4], and the largest gap between "
            f"the two tokens' logits is {quality['largest_gap']:.3g}"
        )
    lines = [
        f"{results['device']}, {results['dtype']}, torch {results['torch']}, transformers {results['transformers']}; "
        f"{results['problems']:,} problems, {results['steps']:,} steps, {results['kept_steps']:,} of them trained on "
        f"({share:.1%}, {results['mean_support']:.1f} tokens a label).",
        "",
        "| work | published way[^1] | this library | ratio | peak GiB, published | peak GiB |",
        "|---|---|---|---|---|---|",
        row(f"sample {results['problems']:,} problems, s", "sample_s", "sample_peak_gib", 1, lambda a, b: a / b),
        row("train, kept steps a second[^2]", "train_steps_per_s", "train_peak_gib", 1, lambda a, b: b / a),
        row("whole job, s[^3]", "whole_s", None, 1, lambda a, b: a / b),
        "",
        f"[^1]: Scaled from {old['problems']} problems and {old['updates']} updates of {published.ROWS_PER_BATCH} x "
        f"{published.BATCHES_PER_UPDATE} steps.",
        f"[^2]: {results['train_rows']} trajectories an update, LoRA{results['training']}; after the first update, "
        f"which sets things up. One took {new['update_s']:.3f} s (median).",
        f"[^3]: Sampling, one epoch of training ({new['train_s']:.1f} s) and, of this library, "
        f"{results['construction_s']:.1f} s in which the trainer is made and checks every row. Models are loaded "
        "already.",
        "",
        f"Of the {quality['problems']} problems done again in the slow way, {quality['completions_alike']} have the "
        f"same completion{parted}. {quality['kept_steps_alike']:,} of {quality['kept_steps']:,} kept steps are the "
        f"same, {quality['supports_alike']:,} of them with the same tokens in the label, whose probabilities differ "
        f"by at most {quality['largest_label_difference']:.2g}; divergences differ by at most "
        f"{quality['largest_kl_difference']:.2g} nats.",
    ]
    if parted:
        lines += [
            "",
            "[^4]: The two best logits are so close that the dtype's rounding, which differs with the shape of a "
            "batch, decides. From there on the texts are different ones, each as good as the other.",
        ]
    lines += ["", f"{padding:.1%} of the tokens that are scored are padding."]
    if repeated := note(results):
        lines += ["", repeated]
    if sizes := results["sizes"]:
        lines += table(
            "| problems | kept steps | sampling, s | peak GiB | trainer, s | training, s | steps/s | peak GiB |",
            [
                f"| {size['problems']:,} | {size['kept_steps']:,} | {size['sample_s']:.1f} | "
                f"{gib(size['sample_peak_gib'])} | {size['construction_s']:.1f} | {size['train_s']:.1f} | "
                f"{size['train_steps_per_s']:,.0f} | {gib(size['train_peak_gib'])} |"
                for size in sizes
            ],
        )
        if repeated := note(sizes[-1]):
            lines += ["", repeated]
    if batches := results["batch_sizes"]:
        lines += table(
            "| prompts together | sampling, s | peak GiB |",
            [f"| {b['prompts']:,} | {b['sample_s']:.1f} | {gib(b['sample_peak_gib'])} |" for b in batches],
        )
    if updates := results["update_rows"]:
        lines += table(
            "| trajectories an update | s an update, median | kept steps a second | peak GiB |",
            [
                f"| {u['rows']:,} | {u['update_s']:.3f} | {u['train_steps_per_s']:,.0f} | {gib(u['train_peak_gib'])} |"
                for u in updates
            ],
        )
    return "\n".join(lines)


def table(header: str, rows: list[str]) -> list[str]:
    return ["", header, "|---" * (header.count("|") - 1) + "|", *rows]


def note(results: dict[str, Any]) -> str | None:
    if results["different_problems"] == results["problems"]:
        return None
    return f"The dataset's {results['different_problems']:,} problems are repeated to {results['problems']:,}."


def gib(peak: float | None) -> str:
    return "–" if peak is None else f"{peak:.1f}"


def tell(stage: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {stage}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = make_parser().parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    # What an earlier run left would be found, and would cost no time
    disable_caching()
    disable_progress_bars()
    transformers.logging.disable_progress_bar()
    tell("Loading the models")
    pair = Pair(args)
    device = f"CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    results = {
        "expert": args.expert,
        "amateur": args.amateur,
        "device": device,
        "dtype": str(pair.expert.dtype).removeprefix("torch."),
        "version": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **measure(pair, args),
        "sizes": [measure_size(pair, args, num_problems) for num_problems in args.sizes],
        **measure_batches(pair, args),
    }
    (args.output_dir / "speed.json").write_text(json.dumps(results, indent=2) + "\n")
    print(report(results))
    return results


if __name__ == "__main__":
    main()
