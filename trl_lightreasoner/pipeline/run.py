"""`run_pipeline`: check, sample, train, answer and report, each model loaded once, and a verdict at the end."""

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.evaluation import Candidate, Evaluation, grade_candidates
from ..evaluation.evaluation_config import EvaluationConfig
from ..grading.verdicts import check_math_verify
from ..models.loading import load_adapter, load_adapter_config
from ..processes import Processes
from ..report.write_report import write_report
from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
from ..sampling.contrastive_step_sampler import ContrastiveStepSampler
from ..steps.dataset import count_steps
from ..training.adapters import target_modules
from ..training.lightreasoner_config import LightReasonerConfig
from ..training.lightreasoner_trainer import LightReasonerTrainer
from .folder import RunFolder, write_json
from .questions import prepare_questions
from .run_config import RunConfig
from .verdict import deciding, judge


@dataclass
class RunResult:
    """
    What [`run_pipeline`] did. Text by `result.summary()`, numbers by `result.to_dict()`, as verdict.json holds them.

    Attributes:
        verdict (`str`):
            `"better"`, `"not told"`, `"worse"`, or `"not answered"` where there was no question with an answer.
        sentence (`str`):
            The same with its numbers.
        accuracy_before (`float`, *optional*):
            Accuracy of the expert, between 0 and 1: on the questions that were held back, or else the mean over the
            benchmarks.
        accuracy_after (`float`, *optional*):
            The same with the adapter.
        difference (`dict[str, float]`, *optional*):
            Of the two, as of [`PairedDifference`].
        num_held_out (`int`):
            Questions that were held back.
        num_prompts (`int`):
            Questions that were sampled.
        num_steps (`int`):
            Steps of their completions.
        num_kept (`int`):
            Kept steps.
        num_updates (`int`):
            Updates of the training.
        pair (`str`):
            Verdict of the check of the pair, such as `"promising"`.
        seconds (`dict[str, float]`):
            By stage, and `"total"`, of this call.
        results (`dict[str, Any]`, *optional*):
            What evaluation/results.json holds.
        output_dir (`str`):
            The folder.
        expert (`str`):
            Id or path of the expert.
    """

    verdict: str
    sentence: str
    accuracy_before: float | None
    accuracy_after: float | None
    difference: dict[str, float] | None
    num_held_out: int
    num_prompts: int
    num_steps: int
    num_kept: int
    num_updates: int
    pair: str
    seconds: dict[str, float]
    results: dict[str, Any] | None
    output_dir: str
    expert: str

    def to_dict(self) -> dict[str, Any]:
        """Everything but `results`, which has a file of its own, in values that JSON can hold."""
        return {name: value for name, value in asdict(self).items() if name != "results"}

    def summary(self) -> str:
        """The accuracies, where everything is, what can be done next, and the verdict in one sentence."""
        folder = Path(self.output_dir)
        adapter = str(folder / "adapter")
        lines = [] if self.results is None else [Evaluation(self.results).table(), ""]
        lines += [self.sentence, "", f"adapter  {adapter}", f"report   {folder / 'report' / 'report.html'}"]
        lines += [] if self.results is None else [f"answers  {folder / 'evaluation' / 'results.json'}"]
        lines += [f"numbers  {folder / 'verdict.json'}", "", "Next:"]
        compare = ["--model", adapter, "--baseline", self.expert, "--output_dir", "BENCHMARKS"]
        commands = [["lightreasoner", "eval", *compare]]
        if self.verdict != "worse":
            commands.append(
                ["lightreasoner", "merge", "--model_name_or_path", adapter, "--output_dir", "MODEL"],
            )
            commands.append(["hf", "upload", "OWNER/NAME", adapter])
        return "\n".join([*lines, *(f"  {shlex.join(command)}" for command in commands)])


def run_pipeline(args: RunConfig) -> RunResult:
    """
    Check a pair, sample, train an adapter, answer questions before and after, and say whether to keep the adapter.

    Each stage leaves what the single command would leave, under `args.output_dir`: steps, adapter, evaluation, report.
    A run that was broken off goes on where it was. One line a stage is printed.

    Args:
        args ([`RunConfig`]): Settings.

    Returns:
        [`RunResult`]

    Raises:
        `ValueError`: If a setting, a model or the dataset is not what it must be, the two models have equal weights,
            no step is kept, or `args.output_dir` holds another run.
        `ImportError`: If questions are to be answered and math-verify is not installed.

    Example:

    ```python
    from trl_lightreasoner import RunConfig, run_pipeline

    args = RunConfig(
        output_dir="run",
        expert="Qwen/Qwen2.5-Math-1.5B",
        amateur="Qwen/Qwen2.5-0.5B",
        dataset_name="openai/gsm8k",
        dataset_config="main",
    )
    print(run_pipeline(args).sentence)
    ```
    """
    stages = _Stages()
    processes = Processes()
    if processes.count > 1:
        raise ValueError(
            "`lightreasoner run` is one process. Start it without `accelerate launch`, or use `sample`, `train` and "
            "`eval`, which several processes share."
        )
    folder = RunFolder(args)
    # What can be refused before weights are loaded
    if load_adapter_config(args.expert, "expert") is not None:
        raise ValueError(
            f"The expert {args.expert!r} is an adapter. Make a plain model of it with `lightreasoner merge`, or use "
            "`sample` and `train`, which trains it further."
        )
    training_args = LightReasonerConfig(
        str(folder.adapter),
        beta=args.beta,
        learning_rate=args.learning_rate,
        max_steps=args.max_steps,
        logging_steps=min(10, args.max_steps),
        seed=args.seed,
    )
    if training_args.n_gpu > 1:
        raise ValueError(
            "`lightreasoner run` takes one GPU, and several are visible. Make a single one visible with "
            "`CUDA_VISIBLE_DEVICES=0`, or use `sample`, `train` and `eval`, which several processes share."
        )
    dtype = args.dtype or ("auto" if torch.accelerator.is_available() else "float32")
    sampling_args = ContrastiveSamplingConfig(
        str(folder.steps), dtype=dtype, alpha=args.alpha, max_new_tokens=args.max_new_tokens
    )
    sampler = ContrastiveStepSampler(args.expert, args.amateur, sampling_args)
    tokenizer = sampler.processing_class
    prompts, problems, prompt_format = prepare_questions(args, tokenizer)
    eval_args = EvaluationConfig(
        str(folder.evaluation),
        dtype=dtype,
        max_new_tokens=args.eval_max_new_tokens,
        data_dir=args.data_dir,
        **prompt_format.to_dict(),
    )
    baseline = None
    if problems:
        check_math_verify()
        baseline = Candidate("baseline", args.expert, tokenizer, None, eval_args, problems, processes)
    stages.total = 6 if problems else 4
    asked = f"{sum(map(len, problems.values())):,} questions"

    with folder:
        with stages("check", f"Checking the pair on {min(50, len(prompts))} questions"):
            check = _check(sampler, prompts, folder.check)
        if not check["promising"]:
            print(f"Warning: {check['headline']} {check['reasons'][0]}")
        with stages("sample", f"Expert and amateur read {len(prompts):,} questions"):
            steps = sampler.sample(prompts, prompt_format)
        num_steps, num_kept = sum(map(len, steps["completion_ids"])), count_steps(steps)
        if not num_kept:
            raise ValueError("No step is kept, so that there is nothing to train on: choose a weaker amateur.")
        expert, amateur = sampler.expert, sampler.amateur
        del sampler  # and its graphs and caches: training needs the memory
        clear_device_cache(garbage_collection=True)
        if baseline is not None:
            with stages("answer_before", f"The expert answers {asked}"):
                baseline.answer(expert)
        with stages("train", f"The expert learns: {num_kept:,} of {num_steps:,} steps are kept"):
            if not folder.is_trained:
                _train(expert, tokenizer, steps, training_args, args, folder.find_checkpoint())
        with stages("report", "Writing the report"):
            if not (folder.report / "report.html").is_file():
                name = f"{folder.path.name}/steps"
                write_report({name: steps}, str(folder.report), str(folder.adapter), expert, amateur)
        del amateur
        results = None
        if baseline is not None:
            with stages("answer_after", f"The trained expert answers {asked}"):
                candidate = Candidate("model", str(folder.adapter), None, None, eval_args, problems, processes)
                candidate.answer(load_adapter(expert, str(folder.adapter)))
                results = grade_candidates([candidate, baseline], eval_args)
        scores, what = ({}, "") if results is None else deciding(results["benchmarks"], results.get("average"))
        verdict = judge(scores.get("difference"), what)
        state = json.loads((folder.adapter / "trainer_state.json").read_text(encoding="utf-8"))
        result = RunResult(
            *verdict,
            accuracy_before=scores["baseline"]["accuracy"] if scores else None,
            accuracy_after=scores["model"]["accuracy"] if scores else None,
            difference=scores.get("difference"),
            num_held_out=len(problems.get("held_out", ())),
            num_prompts=len(prompts),
            num_steps=num_steps,
            num_kept=num_kept,
            num_updates=state["global_step"],
            pair=check["verdict"],
            seconds=stages.seconds(),
            results=results,
            output_dir=args.output_dir,
            expert=args.expert,
        )
        write_json(folder.verdict, result.to_dict())
    return result


class _Stages:
    """Says which stage begins, and measures how long each takes."""

    def __init__(self):
        self.total = 0
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        print(f"{len(self._seconds) + 1}/{self.total} {what}", flush=True)
        start = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        seconds = {**self._seconds, "total": time.perf_counter() - self._start}
        return {name: round(value, 1) for name, value in seconds.items()}


def _check(sampler: ContrastiveStepSampler, prompts: Dataset, path: Path) -> dict[str, Any]:
    if not path.is_file():
        check = sampler.check(prompts)
        write_json(path, {"headline": check.headline, **check.to_dict()})
    return json.loads(path.read_text(encoding="utf-8"))


def _train(
    expert: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: Dataset,
    training_args: LightReasonerConfig,
    args: RunConfig,
    checkpoint: str | None,
) -> None:
    """Train and save an adapter, and leave the expert as it was."""
    peft_config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=0.05,
        target_modules=target_modules(args.lora_target_modules),
        task_type="CAUSAL_LM",
    )
    trainer = LightReasonerTrainer(
        expert, training_args, train_dataset=steps, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()  # last, with the log, which the report draws
    trainer.accelerator.unwrap_model(trainer.model).unload()
    del trainer  # a cycle that holds the optimizer
    clear_device_cache(garbage_collection=True)
