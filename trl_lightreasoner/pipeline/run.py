"""`run_pipeline`: check, sample, train, answer and report, each model loaded once, and a verdict at the end."""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from ..evaluation.evaluation import Candidate, Evaluation, grade_candidates
from ..grading.verdicts import check_math_verify
from ..models.adapter_loading import load_adapter
from ..processes import Processes
from ..report.write_report import write_report
from .folder import RunFolder, write_json
from .questions import prepare_questions
from .run_config import RunConfig
from .stages import Stages, check_pair, evaluation_config, open_pair, sample_steps, train_adapter, training_config
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
    stages = Stages()
    folder = RunFolder(args)
    # What can be refused before weights are loaded
    sampler = open_pair(args, folder.round(1).steps, "run")
    training_args = training_config(args, folder.adapter)
    tokenizer = sampler.processing_class
    prompts, problems, _, prompt_format = prepare_questions(args, tokenizer)
    eval_args = evaluation_config(args, folder.evaluation, prompt_format)
    baseline = None
    if problems:
        check_math_verify()
        baseline = Candidate("baseline", args.expert, tokenizer, None, eval_args, problems, Processes())
    stages.total = 6 if problems else 4
    asked = f"{sum(map(len, problems.values())):,} questions"

    with folder:
        with stages("check", f"Checking the pair on {min(50, len(prompts))} questions"):
            check = check_pair(sampler, prompts, prompt_format, folder.check)
        with stages("sample", f"Expert and amateur read {len(prompts):,} questions"):
            steps, num_steps, num_kept = sample_steps(sampler, prompts, prompt_format)
        expert, amateur = sampler.expert, sampler.amateur
        del sampler  # and its graphs and caches: training needs the memory
        clear_device_cache(garbage_collection=True)
        if baseline is not None:
            with stages("answer_before", f"The expert answers {asked}"):
                baseline.answer(expert)
        with stages("train", f"The expert learns: {num_kept:,} of {num_steps:,} steps are kept"):
            if not folder.is_trained:
                train_adapter(expert, tokenizer, steps, training_args, args, folder.find_checkpoint())
        with stages("report", "Writing the report"):
            if not (folder.report / "report.html").is_file():
                name = f"{folder.path.name}/steps"
                write_report({name: steps}, str(folder.report), str(folder.adapter), expert, amateur)
        del amateur
        results = None
        if baseline is not None:
            with stages("answer_after", f"The trained expert answers {asked}"):
                candidate = Candidate("model", str(folder.adapter), None, None, eval_args, problems, Processes())
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
