"""`tune`: sample once, search over training settings, and confirm the best one on other questions."""

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import init_empty_weights
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..config_checks import check_args
from ..evaluation.candidate import Candidate
from ..evaluation.evaluation import grade_candidates
from ..evaluation.evaluation_config import EvaluationConfig
from ..evaluation.sets import HELD_OUT
from ..grading.verdicts import check_math_verify
from ..models.loading import load_config
from ..processes import Processes
from ..report.trials import SearchResult, write_setting
from ..report.write_report import write_report
from ..steps.beta import choose_beta, reaches
from ..steps.whole_files import whole_file, write_json
from ..steps.writer import describe_rows
from ..training.adapters import choose_target_modules
from .folder import TuneFolder
from .questions import prepare_questions
from .search import AccuracyReporter, Setting, UnfitSetting, import_optuna, search
from .search_space import FIELDS
from .stages import (
    Stages,
    answer_with_adapter,
    check_pair,
    evaluation_config,
    open_pair,
    sample_steps,
    train_adapter,
    training_config,
    with_layers,
)
from .tune_config import TuneConfig
from .verdict import judge_search


@dataclass
class TuneResult:
    """
    Result of [`tune`]. `result.summary()` gives the text, `result.to_dict()` the numbers of result.json.

    Attributes:
        verdict (`str`):
            `"better"`, `"not significant"` or `"worse"`: the best setting compared with the expert.
        sentence (`str`):
            The same with its numbers, and those of the default setting.
        setting (`dict[str, Any]`):
            The best setting, as stored in best.yaml.
        default_setting (`dict[str, Any]`):
            The default setting.
        accuracy_before (`float`):
            Accuracy of the expert on the held-out questions, between 0 and 1.
        accuracy_default (`float`):
            The same with the adapter of the default setting.
        accuracy_after (`float`):
            The same with the adapter of the best setting.
        difference, default_difference, difference_to_default (`dict[str, float]`):
            The best setting compared with the expert, the default with the expert, and the best with the default, in
            the form of [`PairedDifference`].
        trials (`list[dict[str, Any]]`):
            Every setting, its accuracies on the validation questions, and whether it was stopped early.
        best_trial (`int`):
            Number of the best trial.
        num_validation (`int`):
            Number of validation questions.
        num_held_out (`int`):
            Number of held-out questions.
        num_prompts, num_steps, num_kept (`int`):
            Numbers of sampled questions, of steps in their completions, and of kept steps.
        pair (`str`):
            Verdict of the check of the pair, such as `"promising"`.
        seconds (`dict[str, float]`):
            Duration of each stage of this call, and their `"total"`.
        output_dir (`str`):
            The folder.
        expert (`str`):
            Id or path of the expert.
    """

    verdict: str
    sentence: str
    setting: Setting
    default_setting: Setting
    accuracy_before: float
    accuracy_default: float
    accuracy_after: float
    difference: dict[str, float]
    default_difference: dict[str, float]
    difference_to_default: dict[str, float]
    trials: list[dict[str, Any]]
    best_trial: int
    num_validation: int
    num_held_out: int
    num_prompts: int
    num_steps: int
    num_kept: int
    pair: str
    seconds: dict[str, float]
    output_dir: str
    expert: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-serializable values."""
        return asdict(self)

    def summary(self) -> str:
        """The finding in one sentence, the output paths and the next commands."""
        folder = Path(self.output_dir)
        best, adapter = str(folder / "best.yaml"), str(folder / "trials" / str(self.best_trial))
        lines = [self.sentence, "", f"setting  {best}", f"adapter  {adapter}"]
        lines += [f"report   {folder / 'report' / 'report.html'}", f"numbers  {folder / 'result.json'}", "", "Next:"]
        steps = ["--expert", self.expert, "--dataset_name", str(folder / "steps")]
        commands = [["lightreasoner", "train", "--config", best, *steps, "--output_dir", "ADAPTER"]]
        if self.verdict != "worse":
            commands.append(["lightreasoner", "merge", "--model", adapter, "--output_dir", "MODEL"])
        return "\n".join([*lines, *(f"  {shlex.join(command)}" for command in commands)])


def tune(args: TuneConfig) -> TuneResult:
    """
    Sample a pair once, try training settings on it, and confirm the best one on held-out questions.

    The default setting is tried first, so the best one is never worse on the validation questions. An interrupted
    search resumes: finished trials are kept, and an interrupted trial is repeated.

    Args:
        args ([`TuneConfig`]): Settings.

    Returns:
        [`TuneResult`]

    Raises:
        `ValueError`: If a setting, the search space, a model or the dataset is invalid, there are no answers, no step
            is kept, or `args.output_dir` holds something else.
        `ImportError`: If Optuna or math-verify is not installed.

    Example:

    ```python
    from trl_lightreasoner import TuneConfig, tune

    args = TuneConfig(
        output_dir="tuned",
        expert="Qwen/Qwen2.5-Math-1.5B",
        amateur="Qwen/Qwen2.5-0.5B",
        dataset_name="openai/gsm8k",
        dataset_config="main",
    )
    print(tune(args).setting)
    ```
    """
    check_args(args, TuneConfig)
    args = with_layers(args)
    stages = Stages()
    folder = TuneFolder(args)
    # Everything that can be refused before weights are loaded
    import_optuna()
    check_math_verify()
    for parameter in args.parameters:
        for value in parameter.ends():
            training_config(with_setting(args, {parameter.name: value}), folder.path)
    sampler = open_pair(args, folder.steps, "tune")
    _check_layers(args)
    tokenizer, amateur_tokenizer = sampler.processing_class, sampler.amateur_processing_class
    prompts, problems, validation, prompt_format = prepare_questions(args, tokenizer, args.num_validation)
    if HELD_OUT not in problems or not len(validation):
        raise ValueError(
            "A search needs questions with answers: some to choose a setting, and others to confirm the choice. Name "
            "the column of answers with `--answer_column`, or give more rows."
        )
    eval_args = evaluation_config(args, folder.evaluation, prompt_format)
    baseline = Candidate("baseline", args.expert, tokenizer, None, eval_args, problems, Processes())
    stages.total = 5

    with folder:
        with stages("check", f"Checking the pair on {min(50, len(prompts))} questions"):
            check = check_pair(sampler, prompts, prompt_format, folder.check)
        with stages("sample", f"Expert and amateur read {len(prompts):,} questions"):
            steps, num_steps, num_kept = sample_steps(sampler, prompts, prompt_format, folder.study)
        expert, amateur = sampler.expert, sampler.amateur
        del sampler  # frees its graphs and caches for training
        clear_device_cache(garbage_collection=True)
        default = default_setting(args, steps, expert.config.model_type)

        def train(setting: Setting, path: Path, reporter: AccuracyReporter, answers_before: bool) -> None:
            if setting["beta"] and setting != default and not reaches(steps, setting["beta"]):
                raise UnfitSetting("no step reaches its beta")
            own_args = with_setting(args, setting)
            training_args = training_config(
                own_args,
                path,
                eval_max_new_tokens=args.eval_max_new_tokens,
                eval_on_start=answers_before,
                save_strategy="no",
                disable_tqdm=True,
                report_to="none",
            )
            train_adapter(
                expert, tokenizer, steps, training_args, own_args, eval_questions=validation, callback=reporter
            )

        with stages("search", f"{args.num_trials} settings learn, and answer {len(validation):,} questions"):
            questions = describe_rows(validation)["rows (SHA-256)"]
            result = search(args.parameters, default, train, folder, args.num_trials, args.seed, questions)
        best = result.best
        found_by = f"Best of {result.num_settings} settings on {len(validation):,} questions, by `lightreasoner tune`"
        write_setting_file(folder.best, as_fields(best.setting, args), found_by)
        asked = f"{sum(map(len, problems.values())):,} other questions"
        with stages("confirm", f"The expert, the default setting and the best one answer {asked}"):
            scores = _confirm(result, expert, baseline, folder, eval_args, problems)
        with stages("report", "Writing the report"):
            name = f"{folder.path.name}/steps"
            path = str(folder.trial(best.number))
            write_report(
                {name: steps},
                str(folder.report),
                path,
                expert,
                amateur,
                answer_column=args.answer_column,
                search=result,
                processing_class=tokenizer,
                amateur_processing_class=amateur_tokenizer,
            )
        count = len(problems[HELD_OUT])
        best_scores, default_scores, _ = scores
        words = write_setting(best.setting, result.names)
        to_expert, of_default, to_default = (each["difference"] for each in scores)
        verdict = judge_search(result.num_settings, words, best.is_default, to_expert, of_default, to_default, count)
        found = TuneResult(
            *verdict,
            setting=as_fields(best.setting, args),
            default_setting=as_fields(default, args),
            accuracy_before=best_scores["baseline"]["accuracy"],
            accuracy_default=default_scores["model"]["accuracy"],
            accuracy_after=best_scores["model"]["accuracy"],
            difference=to_expert,
            default_difference=of_default,
            difference_to_default=to_default,
            trials=[asdict(trial) for trial in result.trials],
            best_trial=best.number,
            num_validation=len(validation),
            num_held_out=count,
            num_prompts=len(prompts),
            num_steps=num_steps,
            num_kept=num_kept,
            pair=check["verdict"],
            seconds=stages.seconds(),
            output_dir=args.output_dir,
            expert=args.expert,
        )
        write_json(folder.result, found.to_dict())
    return found


def default_setting(args: TuneConfig, steps: Dataset, model_type: str) -> Setting:
    """
    The training settings of a run with these arguments, threshold and layers filled in. The layers are one string.
    """
    beta = args.beta if args.beta is not None else choose_beta(steps) or 0.0
    values = {name: getattr(args, name) for name in FIELDS}
    layers = args.lora_target_modules or choose_target_modules(steps, model_type)
    return {**values, "beta": beta, "lora_target_modules": " ".join(layers)}


def as_fields(setting: Setting, args: TuneConfig) -> dict[str, Any]:
    """A setting in the form that `lightreasoner run` and `train` accept."""
    fields = {**setting, "seed": args.seed}
    if "lora_target_modules" in fields:
        fields["lora_target_modules"] = fields["lora_target_modules"].split()
    return fields


def with_setting(args: TuneConfig, setting: Setting) -> TuneConfig:
    return replace(args, **as_fields(setting, args))


def write_setting_file(path: Path, fields: dict[str, Any], comment: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(f"# {comment}\n{yaml.safe_dump(fields, sort_keys=False)}", encoding="utf-8")


def _check_layers(args: TuneConfig) -> None:
    """Refuse layer names that the expert does not have, before a trial would."""
    named = [value for each in args.parameters if each.name == "lora_target_modules" for value in each.ends()]
    if not named:
        return
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(load_config(args.expert))
    modules = [name for name, _ in model.named_modules() if name]
    for name in " ".join(named).split():
        if name != "all-linear" and not any(f".{module}".endswith(f".{name}") for module in modules):
            last = {module.rpartition(".")[2] for module in modules}
            raise ValueError(
                f"`lora_target_modules` in the search space names {name!r}, which the expert does not have. It has "
                f"{', '.join(sorted(each for each in last if not each.isdigit()))}."
            )


def _confirm(
    result: SearchResult,
    expert: PreTrainedModel,
    baseline: Candidate,
    folder: TuneFolder,
    args: EvaluationConfig,
    problems: dict[str, Dataset],
) -> list[dict[str, Any]]:
    """
    Scores on the held-out questions, `"model"` compared with `"baseline"`: the best setting with the expert, the
    default with the expert, and the best with the default.
    """
    baseline.answer(expert)
    candidates = {}
    for number in dict.fromkeys([result.best.number, result.trials[0].number]):
        path = str(folder.trial(number))
        # A folder for each, since another trial can be the best when the search is continued
        folder_of_model = (path, baseline.tokenizer, None, args, problems, baseline.processes)
        candidates[number] = Candidate(f"trial_{number}", *folder_of_model, other=baseline)
        answer_with_adapter(candidates[number], expert, path)
    best, default = candidates[result.best.number], candidates[result.trials[0].number]

    def compare(model: Candidate, other: Candidate) -> dict[str, Any]:
        scores = grade_candidates([model, other], args)["benchmarks"][HELD_OUT]
        return {"model": scores[model.role], "baseline": scores[other.role], "difference": scores["difference"]}

    # The last evaluation leaves evaluation/results.json
    pairs = [(best, default), (default, baseline), (best, baseline)]
    return [compare(*pair) for pair in pairs][::-1]
