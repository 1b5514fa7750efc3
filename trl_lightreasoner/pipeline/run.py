"""`run_pipeline`: check, sample, train, answer and report with each model loaded once, then a verdict."""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config_checks import check_args
from ..evaluation.evaluation import Evaluation
from ..grading.verdicts import check_math_verify, start_grader
from ..report.write_report import write_report
from ..steps.whole_files import write_json
from .folder import RunFolder
from .questions import prepare_questions
from .rounds import Rounds, choose_round, split_prompts, why_stop
from .run_config import RunConfig
from .stages import Stages, check_pair, open_pair, training_config, with_layers
from .verdict import deciding, judge


# An expert that answers less may be asked with a prompt that it does not know
_LOW_ACCURACY = 0.05


@dataclass
class RunResult:
    """
    Result of [`run_pipeline`]. `result.summary()` gives the text, `result.to_dict()` the numbers of verdict.json.

    Attributes:
        verdict (`str`):
            `"better"`, `"not significant"`, `"worse"`, or `"not answered"` if no question had an answer.
        sentence (`str`):
            The same with its numbers.
        accuracy_before (`float`, *optional*):
            Accuracy of the expert, between 0 and 1: on the held-out questions, or without them the mean over the
            benchmarks.
        accuracy_after (`float`, *optional*):
            The same with the adapter.
        difference (`dict[str, float]`, *optional*):
            Difference between the two, in the form of [`PairedDifference`].
        num_held_out (`int`):
            Number of held-out questions.
        num_prompts (`int`):
            Number of sampled questions.
        num_steps (`int`):
            Number of steps in their completions.
        num_kept (`int`):
            Kept steps.
        num_updates (`int`):
            Number of training updates, in all rounds, as are the three numbers above.
        pair (`str`):
            Verdict of the check of the pair, such as `"promising"`.
        best_round (`int`):
            The round whose adapter is kept, from 1.
        seconds (`dict[str, float]`):
            Duration of each stage of this call, and their `"total"`.
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
    best_round: int
    seconds: dict[str, float]
    results: dict[str, Any] | None
    output_dir: str
    expert: str

    def to_dict(self) -> dict[str, Any]:
        """Everything except `results`, which has its own file, as JSON-serializable values."""
        return {name: value for name, value in asdict(self).items() if name != "results"}

    def summary(self) -> str:
        """The accuracies, the verdict in one sentence, the output paths and the next commands."""
        folder = Path(self.output_dir)
        adapter = str(folder / "adapter")
        lines = [] if self.results is None else [Evaluation(self.results).table(), ""]
        lines += [self.sentence]
        if self.accuracy_before is not None and self.accuracy_before < _LOW_ACCURACY and self.verdict != "better":
            lines += [
                f"The expert answers only {100 * self.accuracy_before:.1f} % of the questions correctly. If it can do "
                "better, ask it with the prompt that it knows: `--system_prompt`, `--prompt_style`, "
                "`--prompt_template`."
            ]
        lines += ["", f"adapter  {adapter}", f"report   {folder / 'report' / 'report.html'}"]
        lines += [] if self.results is None else [f"answers  {folder / 'evaluation' / 'results.json'}"]
        lines += [f"numbers  {folder / 'verdict.json'}", "", "Next:"]
        compare = ["--model", adapter, "--baseline", self.expert, "--output_dir", "BENCHMARKS"]
        commands = [["lightreasoner", "eval", *compare]]
        if self.verdict != "worse":
            commands.append(
                ["lightreasoner", "merge", "--model", adapter, "--output_dir", "MODEL"],
            )
            commands.append(["hf", "upload", "OWNER/NAME", adapter])
        return "\n".join([*lines, *(f"  {shlex.join(command)}" for command in commands)])


def run_pipeline(args: RunConfig) -> RunResult:
    """
    Check a pair, sample it, train an adapter, evaluate before and after training, and say whether to keep the adapter.

    Each stage writes the output of its single command to a folder in `args.output_dir`: steps, adapter, evaluation,
    report. An interrupted run resumes. One line per stage is printed.

    Args:
        args ([`RunConfig`]): Settings.

    Returns:
        [`RunResult`]

    Raises:
        `ValueError`: If a setting, a model or the dataset is invalid, the two models have equal weights, no step is
            kept, or `args.output_dir` holds another run.
        `ImportError`: If there are questions to answer and math-verify is not installed.

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
    check_args(args, RunConfig)
    args = with_layers(args)
    stages, folder = Stages(), RunFolder(args)
    if args.num_held_out or args.benchmarks:
        start_grader()  # ready when the tokenizers are
    # Everything that can be refused before weights are loaded
    sampler = open_pair(args, folder.round(1).steps, "run")
    training_config(args, folder.adapter)
    prompts, problems, _, prompt_format = prepare_questions(args, sampler.processing_class)
    if problems:
        check_math_verify()
    play = Rounds(args, folder, stages, sampler, prompt_format, problems)
    num_answers = 1 if problems else 0
    stages.total = 2 + num_answers + args.num_rounds * (2 + num_answers)

    with folder:
        with stages("check", f"Checking the pair on {min(50, len(prompts))} questions"):
            check = check_pair(sampler, prompts, prompt_format, folder.check)
        del sampler
        rounds = []
        for number, part in enumerate(split_prompts(prompts, args), 1):
            rounds.append(play.play(number, part))
            if number < args.num_rounds and (reason := why_stop(rounds[-1])) is not None:
                print(f"Round {number} is the last: {reason}.")
                break
        best = choose_round(rounds)
        folder.keep(best.number)
        with stages("report", "Writing the report"):
            if not (folder.report / "report.html").is_file():
                _report(args, folder, play)
        results = best.results
        scores, what = ({}, "") if results is None else deciding(results["benchmarks"], results.get("average"))
        if len(rounds) > 1 and results is not None:
            what += f", which also chose round {best.number} of {len(rounds)}"
        verdict = judge(scores.get("difference"), what)
        states = [folder.round(each.number).adapter / "trainer_state.json" for each in rounds]
        result = RunResult(
            *verdict,
            accuracy_before=scores["baseline"]["accuracy"] if scores else None,
            accuracy_after=scores["model"]["accuracy"] if scores else None,
            difference=scores.get("difference"),
            num_held_out=len(problems.get("held_out", ())),
            num_prompts=sum(each.num_prompts for each in rounds),
            num_steps=sum(each.num_steps for each in rounds),
            num_kept=sum(each.num_kept for each in rounds),
            num_updates=sum(json.loads(path.read_text(encoding="utf-8"))["global_step"] for path in states),
            pair=check["verdict"],
            best_round=best.number,
            seconds=stages.seconds(),
            results=results,
            output_dir=args.output_dir,
            expert=args.expert,
        )
        write_json(folder.verdict, result.to_dict())
    return result


def _report(args: RunConfig, folder: RunFolder, play: Rounds) -> None:
    steps = {f"{folder.path.name}/steps": play.sampled[0]}
    if len(play.sampled) > 1:
        steps = {"round 1": play.sampled[0], f"round {len(play.sampled)}": play.sampled[-1]}
    # With several rounds each has its own expert, loaded by its path
    is_one_expert = len(steps) == 1 or args.label_expert == "base"
    write_report(
        steps,
        str(folder.report),
        str(folder.adapter),
        play.expert if is_one_expert else None,
        play.amateur if is_one_expert else None,
        answer_column=args.answer_column,
        processing_class=play.tokenizer,
        amateur_processing_class=play.amateur_tokenizer,
    )
