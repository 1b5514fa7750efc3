"""Benchmarks answered by a model, and optionally by a baseline: zero-shot, greedy, one answer per problem.

    output_dir/model/gsm8k/           the answers while and after they are made, as of `StepWriter`
    output_dir/model/gsm8k.parquet    the same with their verdicts
    output_dir/baseline/...           of the baseline
    output_dir/results.json           accuracies, differences, settings, versions

An interrupted run resumes after the last complete batch. Rerunning a finished run only grades again, or adds
benchmarks. A different model or setting in the same folder is refused by name. Settings, files, columns, tokenizers
and configs are checked before any model is loaded.
"""

import dataclasses
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, Value
from huggingface_hub import EvalResult
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..config_checks import check_args
from ..grading.verdicts import check_math_verify, start_grader
from ..models.loading import hub_kwargs
from ..models.weights import check_bare, get_base_model
from ..processes import Processes
from ..steps.messages import say_unread
from ..steps.prompt_format import load_prompt_format
from ..steps.whole_files import whole_file, write_json
from .answering import grade_answers
from .candidate import ANSWER_SETTINGS, Candidate
from .evaluation_config import EvaluationConfig
from .sets import BENCHMARKS, load_problems, title_of
from .statistics import Z_95, compare, standard_error


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftModel


logger = get_logger(__name__)

# Settings that results.json holds
_SETTINGS = (*ANSWER_SETTINGS, "per_device_batch_size", "data_dir", "max_samples")
_GRADED_BY = ("kind", "tolerance", "unit")


@dataclass
class Evaluation:
    """
    The result of an evaluation.

    Attributes:
        results (`dict[str, Any]`):
            The content of results.json. `"benchmarks"` has an entry per benchmark with `num_problems`, and for
            `"model"` and `"baseline"` their `accuracy`, `standard_error`, `mean_tokens`, `num_cut` and
            `num_undecided`. `"difference"` holds the fields of [`PairedDifference`]. Fractions are between 0 and 1.
    """

    results: dict[str, Any]

    def summary(self) -> dict[str, float]:
        """
        Every number under a flat name, as trackers expect.

        Example:

        ```python
        >>> model = {"accuracy": 0.64, "standard_error": 0.013, "mean_tokens": 301.5, "num_cut": 3}
        >>> evaluation = Evaluation({"benchmarks": {"gsm8k": {"num_problems": 1319, "model": model}}})
        >>> evaluation.summary()["eval/gsm8k/accuracy"]
        0.64

        ```
        """
        flat = {}
        for name, scores in self.results["benchmarks"].items():
            flat[f"eval/{name}/num_problems"] = scores["num_problems"]
            for role, prefix in (("model", ""), ("baseline", "baseline_"), ("difference", "difference_")):
                for key, value in scores.get(role, {}).items():
                    key = f"{prefix}{key}" if key != "difference" else key
                    flat[f"eval/{name}/{key}"] = value
        return flat

    def eval_results(self) -> list[EvalResult]:
        """
        The accuracies of the model, as the `eval_results` of a [`~huggingface_hub.ModelCardData`]. The name of the
        metric tells if only the first problems were answered.
        """
        most = self.results.get("settings", {}).get("max_samples")
        return [
            EvalResult(
                task_type="text-generation",
                dataset_name=BENCHMARKS[name].title,
                dataset_type=BENCHMARKS[name].dataset[0],
                metric_type="accuracy",
                metric_name="accuracy (zero-shot, greedy, pass@1)"
                + (f" on the first {most:,} problems" if scores["num_problems"] == most else ""),
                metric_value=round(100 * scores["model"]["accuracy"], 2),
            )
            for name, scores in self.results["benchmarks"].items()
            if name in BENCHMARKS
        ]

    def table(self) -> str:
        """A table in Markdown, in percent, with standard errors. In a cell with a pair, the baseline comes first."""
        benchmarks = self.results["benchmarks"]
        roles = [role for role in ("baseline", "model") if role in next(iter(benchmarks.values()))]
        both = len(roles) == 2
        rows = [["benchmark", "problems", *roles, *(["difference (95 %)", "p"] if both else []), "tokens", "cut"]]
        for name, scores in benchmarks.items():
            count = scores["num_problems"]
            row = [title_of(name), f"{count:,}", *(_percent(scores[role]) for role in roles)]
            if both:
                row += [_interval(scores["difference"]), f"{scores['difference']['p_value']:.2g}"]
            row.append(" / ".join(f"{scores[role]['mean_tokens']:.0f}" for role in roles))
            row.append(" / ".join(f"{scores[role]['num_cut'] / count:.1%}" for role in roles))
            rows.append(row)
        if average := self.results.get("average"):
            row = ["average", "", *(_percent(average[role]) for role in roles)]
            rows.append(row + ([_interval(average["difference"])] if both else []))
        rows = [row + [""] * (len(rows[0]) - len(row)) for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)


def _percent(score: dict[str, float]) -> str:
    return f"{100 * score['accuracy']:.1f} +- {100 * score['standard_error']:.1f}"


def _interval(difference: dict[str, float]) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * difference[name] for name in ("difference", "low", "high")))


def evaluate(
    model: "str | PreTrainedModel | PeftModel",
    args: EvaluationConfig,
    baseline: "str | PreTrainedModel | PeftModel | None" = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    baseline_processing_class: PreTrainedTokenizerBase | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> Evaluation:
    r"""
    Evaluate a model on benchmarks. Under `accelerate launch` or `torchrun` the processes share the problems, and each
    returns the complete result.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A model id on the Hub, a path, or a model. PEFT adapters are loaded on their base model.
        args ([`EvaluationConfig`]):
            Settings.
        baseline (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Model to compare with, problem by problem.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's tokenizer. If `None`, it is loaded from the model's folder or repository.
        baseline_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The baseline's tokenizer, likewise.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization configuration used when loading both from strings.

    Returns:
        [`Evaluation`]

    Raises:
        `ValueError`: If a benchmark, a tokenizer or a setting is invalid, `args.output_dir` holds another run, the two
            are one model in memory, or one has an adapter on its layers that it does not name.
        `ImportError`: If math-verify, or a requested bitsandbytes or vLLM, is not installed or does not work.

    Example:

    ```python
    from trl_lightreasoner import EvaluationConfig, evaluate

    args = EvaluationConfig("evaluation", benchmarks=["gsm8k", "math500"])
    evaluation = evaluate("adapter", args, baseline="Qwen/Qwen2.5-Math-1.5B")
    print(evaluation.table())
    ```
    """
    check_args(args, EvaluationConfig)
    both = [get_base_model(each) for each in (model, baseline) if isinstance(each, torch.nn.Module)]
    if len(both) == 2 and both[0] is both[1]:
        raise ValueError(
            "The model and the baseline are one model in memory, so both would answer alike, with the adapter that is "
            "on it. Name the base model by its id or path as the baseline."
        )
    for name, each in (("model", model), ("baseline", baseline)):
        check_bare(each, name)
    start_grader()  # ready when the tokenizers are
    processes = Processes()  # which the warnings need
    args = _in_the_form_of_training(args, model)
    _warn_of_another_form(args, baseline)
    problems = load_problems(args.benchmarks or [], args.data_dir, args.max_samples)
    candidates = [Candidate("model", model, processing_class, quantization_config, args, problems, processes)]
    if baseline is not None:
        of_baseline = (baseline, baseline_processing_class, quantization_config)
        candidates.append(Candidate("baseline", *of_baseline, args, problems, processes, other=candidates[0]))
    for said in {say_unread(each.tokenizer, args.chat_template_kwargs or ()) for each in candidates} - {""}:
        logger.warning(said)
    check_math_verify()
    for candidate in candidates:
        candidate.answer()
    return Evaluation(processes.on_main(lambda: grade_candidates(candidates, args)))


def _in_the_form_of_training(args: EvaluationConfig, model: "str | PreTrainedModel | PeftModel") -> EvaluationConfig:
    """The settings with the prompt format filled in, with a warning if the model was trained in a different one."""
    trained = None
    if isinstance(model, str):
        trained = load_prompt_format(model, **hub_kwargs(args.model_init_kwargs or {}))  # type: ignore[arg-type]
    chosen = args.prompt_format(trained)
    if trained is not None and trained.chat_template_kwargs is None:
        trained = dataclasses.replace(trained, chat_template_kwargs=chosen.chat_template_kwargs)
        if args.chat_template_kwargs is None and chosen.prompt_style == "chat":
            logger.warning(
                "The model was trained on rows that differ in 'chat_template_kwargs', but is evaluated without any. "
                "Choose some with `chat_template_kwargs`."
            )
    if trained is not None and chosen != trained:
        logger.warning(
            f"The model was trained on prompts with {trained}, but is evaluated with {chosen}. Answers to a different "
            "prompt format say little about the training. Remove the prompt settings to evaluate in the trained "
            "format."
        )
    return dataclasses.replace(args, **chosen.to_dict())


def _warn_of_another_form(args: EvaluationConfig, baseline: "str | PreTrainedModel | PeftModel | None") -> None:
    """Warn if the baseline was trained in a different prompt format. Both get the prompts of the model."""
    kwargs: Any = args.baseline_model_init_kwargs or {}
    trained = load_prompt_format(baseline, **hub_kwargs(kwargs)) if isinstance(baseline, str) else None
    asked = args.prompt_format()
    if trained is not None and trained.chat_template_kwargs is None:
        trained = dataclasses.replace(trained, chat_template_kwargs=asked.chat_template_kwargs)
    if trained is not None and trained != asked:
        logger.warning(
            f"The baseline was trained on prompts with {trained}, but is evaluated with {asked}, as the model is. A "
            "part of the difference can be due to that. Evaluate each in its own format to compare the two."
        )


def grade_candidates(candidates: list[Candidate], args: EvaluationConfig) -> dict[str, Any]:
    """Grade the answers and write results.json."""
    benchmarks: dict[str, dict[str, Any]] = {}
    for name in candidates[0].asked:
        scores = benchmarks[name] = {}
        verdicts = []
        for candidate in candidates:
            answers = _grade_answers(candidate.asked[name].writer.load(), args)
            path = Path(args.output_dir, candidate.role, f"{name}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)  # it can differ from the folder of the answers
            with whole_file(path) as temporary:
                answers.to_parquet(temporary)
            verdicts.append(answers["correct"][:])
            count, accuracy = len(answers), sum(answers["correct"]) / len(answers)
            scores["num_problems"] = count
            scores[candidate.role] = {
                "accuracy": accuracy,
                "standard_error": standard_error(accuracy, count),
                "mean_tokens": sum(answers["num_tokens"]) / count,
                "num_cut": count - sum(answers["ended"]),
                "num_undecided": sum(failure is not None for failure in answers["failure"]),
            }
        if len(candidates) == 2:
            scores["difference"] = compare(*verdicts)._asdict()
    packages = ("math-verify", "torch", "transformers", "peft")
    results = {
        **{candidate.role: {**candidate.description, **candidate.describe_form()} for candidate in candidates},
        "settings": {setting: getattr(args, setting) for setting in _SETTINGS},
        "benchmarks": benchmarks,
        **({"average": _average(benchmarks)} if len(benchmarks) > 1 else {}),
        "versions": {
            "python": platform.python_version(),
            "trl-lightreasoner": __version__,
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }
    write_json(Path(args.output_dir, "results.json"), results)
    return results


def _grade_answers(answers: Dataset, args: EvaluationConfig) -> Dataset:
    references = [{key: row[key] for key in ("gold", *_GRADED_BY)} for row in answers]
    is_raw = args.prompt_style == "raw"
    verdicts = grade_answers(answers["completion"][:], references, is_raw, args.num_workers)
    answers = answers.add_column("extracted", [verdict.answer for verdict in verdicts], feature=Value("string"))
    answers = answers.add_column("correct", [verdict.correct for verdict in verdicts])
    return answers.add_column("failure", [verdict.failure for verdict in verdicts], feature=Value("string"))


def _average(benchmarks: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The unweighted mean over the benchmarks, as papers report it."""
    count = len(benchmarks)
    average = {}
    for key in ("model", "baseline", "difference"):
        scores = [scores[key] for scores in benchmarks.values() if key in scores]
        if not scores:
            continue
        name = "difference" if key == "difference" else "accuracy"
        mean = sum(score[name] for score in scores) / count
        error = sum(score["standard_error"] ** 2 for score in scores) ** 0.5 / count
        average[key] = {name: mean, "standard_error": error}
        if key == "difference":
            average[key] |= {"low": mean - Z_95 * error, "high": mean + Z_95 * error}
    return average
