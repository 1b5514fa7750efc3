"""`lightreasoner demo`: sample, train and evaluate the bundled pair, offline, on a CPU, in a minute."""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config_help import help_from_docstring
from ..text import printable
from .arguments import ArgumentParser
from .late_compiling import compiling_late
from .next_command import next_command
from .running_on import announce


NUM_UNLABELLED = 200
NUM_TEST = 300
# A pair this small is trained in seconds: with fewer updates than the default, a larger rate and all kept steps.
NUM_UPDATES = 50
LEARNING_RATE = 5e-4
_BATCH_SIZE = 50


EXAMPLE = r"""example:
  lightreasoner demo --output_dir lightreasoner-demo"""


@dataclass
@help_from_docstring
class DemoArguments:
    """
    Settings of `lightreasoner demo`.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"lightreasoner-demo"`):
            Folder for the Dataset, the adapter, metrics.json, and questions.jsonl with the problems and their answers.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the problems and of the training.
    """

    output_dir: str = "lightreasoner-demo"
    seed: int = 0


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([DemoArguments], prog=prog, description=__doc__, epilog=EXAMPLE)


def main(args: DemoArguments) -> dict[str, float]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # models this small are faster on a CPU
    import datasets
    import torch
    import transformers

    with compiling_late():
        from peft import LoraConfig

    from ..demo.bundled_pair import KIND_SHARES, PAIR, as_prompt
    from ..demo.task import make_problems
    from ..models.loading import load_model, load_tokenizer
    from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
    from ..sampling.contrastive_step_sampler import ContrastiveStepSampler
    from ..steps.dataset import count_steps
    from ..training.lightreasoner_config import LightReasonerConfig
    from ..training.lightreasoner_trainer import LightReasonerTrainer
    from ..training.log_lines import log_in_lines

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    announce("float32", f"{_BATCH_SIZE} prompts at a time", "prompts in the chat template", cpu=True)
    start = time.perf_counter()
    folder = Path(args.output_dir)
    tokenizer = load_tokenizer(str(PAIR / "expert"))
    expert = load_model(str(PAIR / "expert"), dtype=torch.float32)
    test = make_problems(NUM_TEST, seed=args.seed, split="test", kind_shares=KIND_SHARES)
    print(f"1. The expert answers {NUM_TEST} test problems")
    before = _answer(expert, tokenizer, test)

    print(f"2. Expert and amateur read {NUM_UNLABELLED} other problems, without their answers")
    unlabelled = make_problems(NUM_UNLABELLED, seed=args.seed, split="train", kind_shares=KIND_SHARES)
    sampler = ContrastiveStepSampler(
        expert,
        str(PAIR / "amateur"),
        ContrastiveSamplingConfig(
            str(folder / "dataset"), overwrite_output_dir=True, dtype="float32", per_device_batch_size=_BATCH_SIZE
        ),
        processing_class=tokenizer,
    )
    dataset = sampler.sample(datasets.Dataset.from_list([{"prompt": as_prompt(problem)} for problem in unlabelled]))

    num_steps, num_kept = sum(map(len, dataset["completion_ids"])), count_steps(dataset)
    print(f"3. The expert learns from the {num_kept:,} of {num_steps:,} steps at which it knows more than the amateur")
    trainer = LightReasonerTrainer(
        expert,
        LightReasonerConfig(
            str(folder / "adapter"),
            max_steps=NUM_UPDATES,
            learning_rate=LEARNING_RATE,
            beta=0,
            gradient_accumulation_steps=1,
            per_device_train_batch_size=16,
            save_strategy="no",
            seed=args.seed,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )
    log_in_lines(trainer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # includes the log that `lightreasoner report` plots

    print(f"4. The trained expert answers the {NUM_TEST} test problems")
    after = _answer(trainer.model.eval(), tokenizer, test)
    metrics = {
        "accuracy_before": sum(right for _, right in before) / NUM_TEST,
        "accuracy_after": sum(right for _, right in after) / NUM_TEST,
        "num_test_problems": NUM_TEST,
        "num_unlabelled_problems": NUM_UNLABELLED,
        "num_steps": num_steps,
        "num_kept_steps": num_kept,
        "num_updates": NUM_UPDATES,
        "seed": args.seed,
        "seconds": time.perf_counter() - start,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    rows = [{name: problem[name] for name in ("question", "answer")} for problem in (*unlabelled, *test)]
    questions = folder / "questions.jsonl"
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    print(report(test, before, after, metrics, folder))
    flags = {
        **{"expert": PAIR / "expert", "amateur": PAIR / "amateur", "dataset_name": questions, "system_prompt": ""},
        **{"num_prompts": NUM_UNLABELLED, "output_dir": folder / "run"},
        "num_held_out": min(NUM_TEST, len(rows) // 2),  # `run` holds out half at most
    }
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    print(next_command("run", *parts, label="The same by one command, with the defaults and a verdict"))
    return metrics


def _answer(model: Any, tokenizer: Any, problems: list[dict]) -> list[tuple[str, bool]]:
    from tqdm.auto import tqdm

    from ..demo.bundled_pair import solve

    # Answers of a batch end at about the same step if the problems are about as long
    order = sorted(range(len(problems)), key=lambda i: -len(problems[i]["question"]))
    answers: dict[int, tuple[str, bool]] = {}
    with tqdm(total=len(problems), desc="Answering", unit="problem") as bar:
        for start in range(0, len(problems), _BATCH_SIZE):
            batch = order[start : start + _BATCH_SIZE]
            answers.update(zip(batch, solve(model, tokenizer, [problems[i] for i in batch]), strict=True))
            bar.update(len(batch))
    return [answers[i] for i in range(len(problems))]


def report(
    problems: list[dict],
    before: list[tuple[str, bool]],
    after: list[tuple[str, bool]],
    metrics: dict[str, float],
    folder: Path,
) -> str:
    """The demo's final output: three answers before and after training, a table of accuracies, and a summary."""
    lines = [""]
    for problem, (old, old_right), (new, new_right) in list(zip(problems, before, after, strict=True))[:3]:
        lines += [
            f"Problem  {problem['question']}",
            f"  before {printable(old)}  ({'right' if old_right else 'wrong'})",
            f"  after  {printable(new)}  ({'right' if new_right else 'wrong'})",
            "",
        ]
    lines += ["           accuracy   standard error", "           --------   --------------"]
    for name in ("before", "after"):
        accuracy = metrics[f"accuracy_{name}"]
        error = math.sqrt(accuracy * (1 - accuracy) / metrics["num_test_problems"])
        lines.append(f"  {name:<7}  {accuracy:8.1%}   {error:14.1%}")
    gain = 100 * (metrics["accuracy_after"] - metrics["accuracy_before"])
    lines += [
        "",
        f"{gain:+.1f} points from {metrics['num_kept_steps']:,} steps of {metrics['num_unlabelled_problems']} "
        f"problems without their answers, in {metrics['num_updates']} updates and {metrics['seconds']:.0f} s.",
        f"The steps are in {folder}/dataset, the adapter in {folder}/adapter, and metrics in {folder}/metrics.json.",
        next_command(
            "report", f"{folder}/dataset", "--training_dir", f"{folder}/adapter", "--output_dir", f"{folder}/report"
        ),
    ]
    return "\n".join(lines)
