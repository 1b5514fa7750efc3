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
import json
import math
import platform
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, Value
from huggingface_hub import EvalResult
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..config_checks import check_args
from ..contrast import NonFiniteLogitsError
from ..generation.completions import GreedyDecoder, evaluating, run_in_batches, share_batches
from ..generation.greedy import find_eos_ids
from ..generation.vllm import check_vllm, connect_vllm
from ..grading.verdicts import check_math_verify, start_grader
from ..models.forward import context_length
from ..models.loading import hub_kwargs, init_kwargs, load_config, load_model, load_tokenizer
from ..models.weights import describe_loading, describe_model, weight_fingerprint
from ..processes import Processes
from ..steps.messages import say_unread
from ..steps.prompt_format import load_prompt_format
from ..steps.prompt_sources import beside_messages
from ..steps.prompts import encode_rows
from ..steps.run_file import run_date
from ..steps.whole_files import whole_file
from ..steps.writer import StepWriter, describe_rows, hash_ids
from ..vocabulary import check_embedded, model_vocabulary
from .answering import Answering, grade_answers, plan_answers
from .evaluation_config import EvaluationConfig
from .sets import BENCHMARKS, load_problems, title_of
from .statistics import Z_95, compare, standard_error


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftModel


logger = get_logger(__name__)

_ANSWER_FEATURES = {"num_tokens": Value("int32"), "ended": Value("bool")}
# What the answers depend on besides weights and problems
_PROMPT_SETTINGS = ("prompt_style", "prompt_template", "system_prompt", "chat_template_kwargs")
_SETTINGS = (*_PROMPT_SETTINGS, "max_new_tokens", "use_vllm")
# What is said of the others
_SAID = ("per_device_batch_size", "data_dir", "max_samples")
_GRADED_BY = ("kind", "tolerance", "unit")
# A few long answers would occupy a GPU with room for hundreds, so those of several batches are continued together
_BATCHES_TOGETHER = 4


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
        `ValueError`: If a benchmark, a tokenizer or a setting is invalid, or `args.output_dir` holds another run.
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
    start_grader()  # ready when the tokenizers are
    processes = Processes()  # which the warnings need
    args = _in_the_form_of_training(args, model)
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


class Candidate:
    """
    A model, its prompts and the files with its answers. Invalid input is refused before any weights are loaded.

    Args:
        role (`str`): `"model"` or `"baseline"`.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Its tokenizer, if it is not in the model's
            folder.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): Quantization configuration used when
            loading it.
        args ([`EvaluationConfig`]): Settings, with the prompt format filled in.
        problems (`dict[str, Dataset]`): By name, rows of `ROW_FEATURES`, whose `question` can be messages as well.
        processes ([`~trl_lightreasoner.processes.Processes`]): The processes that share the problems.
        other ([`Candidate`], *optional*): The one that it is compared with. A chat template that prints the date
            prints the same day for both, whenever their answers are started.
    """

    def __init__(
        self,
        role: str,
        model: "str | PreTrainedModel | PeftModel",
        tokenizer: PreTrainedTokenizerBase | None,
        quantization_config: BitsAndBytesConfig | None,
        args: EvaluationConfig,
        problems: dict[str, Dataset],
        processes: Processes,
        other: "Candidate | None" = None,
    ):
        self.role, self.args, self.processes = role, args, processes
        self.model: Any = model  # a name or a path until `answer` loads it
        self.answering: Any = None
        self.name = model if isinstance(model, str) else None
        prefix = "" if role == "model" else "baseline_"
        self.kwargs = init_kwargs(args, model, quantization_config, "evaluation", prefix)
        config = load_config(model, role, **self.kwargs).get_text_config()
        if args.use_vllm:
            check_vllm(args, model, processes.count, role, **self.kwargs)
        if tokenizer is None:
            tokenizer = load_tokenizer(model, role, f"{prefix}processing_class", **self.kwargs)
        if args.prompt_style == "chat" and tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of the {role} has no chat template. Set `prompt_style='raw'`, as for a base model, or "
                f"give a tokenizer with a chat template: saved with the {role}, or in Python as "
                f"`{prefix}processing_class`."
            )
        self.tokenizer = tokenizer
        self.vocabulary = model_vocabulary(tokenizer, config.vocab_size, role)
        self.eos_ids = find_eos_ids(model, tokenizer, **self.kwargs)
        context = context_length(config)
        self.prompt_ids: dict[str, list[list[int]]] = {}
        self.prompts: dict[str, list[str]] = {}
        self.plans: dict[str, list[tuple[int, int]]] = {}  # rows and the room for their answers
        self.writers: dict[str, StepWriter] = {}
        self.dates: dict[str, datetime] = {}
        for name, dataset in problems.items():
            prompt_format = args.prompt_format()
            beside = beside_messages(dataset).to_list() or [{}] * len(dataset)
            rows = [
                {
                    "chat_template_kwargs": prompt_format.chat_template_kwargs,
                    **row,
                    "prompt": each if isinstance(each, list) else prompt_format.make_prompt(each),
                }
                for each, row in zip(dataset["question"], beside, strict=True)
            ]
            folder = str(Path(args.output_dir, role, name))
            begun = other.dates.get(name) if other is not None else None
            date = processes.on_main(partial(run_date, folder, args.overwrite_output_dir, begun))
            self.dates[name] = date
            ids = self.prompt_ids[name] = encode_rows(rows, tokenizer, set(self.eos_ids), date=date)["prompt_ids"]
            for row, prompt in enumerate(ids):
                check_embedded(prompt, tokenizer, config.vocab_size, row, role)
            plan = self.plans[name] = plan_answers(ids, args.max_new_tokens, context)
            if len(plan) < len(ids):
                logger.warning(
                    f"{len(ids) - len(plan):,} of {len(ids):,} prompts of {title_of(name)} leave no room in the "
                    f"{role}'s context of {context} tokens. They count as wrong."
                )
            prompts = self.prompts[name] = tokenizer.batch_decode(ids)
            if other is not None and prompts != other.prompts[name]:
                logger.warning(
                    f"The model and the baseline read other prompts ({title_of(name)}), because their chat templates "
                    "or tokenizers differ. The difference between their answers is also that between the prompts."
                )
            prompted = dataset.add_column("prompt", prompts)
            self.writers[name] = StepWriter(folder, prompted, args.overwrite_output_dir, _ANSWER_FEATURES, date)

    def answer(self, loaded: "PreTrainedModel | PeftModel | None" = None) -> None:
        """Generate and save the missing answers, with a model that may be `loaded` already, and release it."""
        lengths = [len(self.prompt_ids[name][row]) + room for name, plan in self.plans.items() for row, room in plan]
        vllm = None
        if self.args.use_vllm and lengths:
            vllm = connect_vllm(self.args, self.model, max(lengths), self.role, **self.kwargs)
        try:
            self.model = load_model(self.model if loaded is None else loaded, **self.kwargs)
            self.description = describe_model(self.model, self.name)
            self.weights = weight_fingerprint(self.model)
            self.loading = describe_loading(self.model, self.role, self.kwargs)
            decode = GreedyDecoder(self.model, self.vocabulary, self.eos_ids, vllm)
            self.answering = Answering(
                self.model,
                decode,
                self.tokenizer,
                self.eos_ids,
                is_raw=self.args.prompt_style == "raw",
                batch_size=self.args.per_device_batch_size,
                in_pieces=not self.args.use_vllm or self.args.prompt_style == "raw",
            )
            with evaluating(self.model):
                for name, writer in self.writers.items():
                    self._answer(name, writer)
        finally:
            if vllm is not None:
                vllm.close()
        self.model = self.answering = None  # the baseline may need its memory
        clear_device_cache(garbage_collection=True)

    def _answer(self, name: str, writer: StepWriter) -> None:
        all_prompt_ids, plan = self.prompt_ids[name], self.plans[name]
        rooms = dict(plan)

        def run(indices: list[int], _: int) -> tuple[list[list[int]], list[bool]]:
            prompt_ids = [all_prompt_ids[index] for index in indices]
            try:
                return self.answering.complete(prompt_ids, [rooms[index] for index in indices])
            except NonFiniteLogitsError as error:
                raise NonFiniteLogitsError(self.role, error.row, error.place) from None

        def write(indices: list[int], result: tuple[list[list[int]], list[bool]]) -> str:
            completion_ids, ended = result
            num_tokens.extend(map(len, completion_ids))
            texts = self.answering.texts(completion_ids)
            columns = {"completion": texts, "num_tokens": num_tokens[-len(indices) :], "ended": ended}
            writer.write(indices, columns)
            return f"{sum(num_tokens) / len(num_tokens):.0f} tokens per answer"

        num_tokens: list[int] = []
        try:
            done = writer.open_on(self.processes, lambda: (self._identity(name), {"model": self.description}))
            without_room = sorted(set(range(len(all_prompt_ids))) - {row for row, _ in plan} - done)
            if without_room and self.processes.is_main:
                write(without_room, ([[] for _ in without_room], [False] * len(without_room)))
                num_tokens.clear()  # they do not describe the model
            # Answers are made in pieces, so those of a batch need not have the same room
            order = [(row, self.args.max_new_tokens) for row in rooms if row not in done]
            if len(order) < len(plan):
                share = f"{len(plan) - len(order):,} of" if order else "all"
                logger.warning(
                    f"Resuming: the {self.role} has already answered {share} {len(plan):,} problems "
                    f"({title_of(name)}). These answers are reused."
                )
            batch_size = self.processes.on_main(lambda: self._find_batch_size(name, order))
            run_in_batches(
                share_batches(order, batch_size, self.processes),
                batch_size,
                run,
                write,
                lambda index: len(all_prompt_ids[index]),
                self.processes,
                desc=f"{title_of(name)}, {self.role}, {self.answering.decode.way}",
            )
            self.processes.on_main(lambda: writer.finish(set(range(len(all_prompt_ids)))))
        finally:
            writer.close()

    def _find_batch_size(self, name: str, order: list[tuple[int, int]]) -> int:
        if not order:
            return 1
        row, room = order[0]  # the longest
        count = self.processes.count
        size = self.answering.rows_together(len(self.prompt_ids[name][row]), room, len(order), count)
        if self.args.per_device_batch_size is not None or self.args.use_vllm:
            return size
        return min(_BATCHES_TOGETHER * size, math.ceil(len(order) / count))

    def describe_form(self) -> dict[str, Any]:
        """The tokens that end an answer, and the chat template of the prompts, if any."""
        is_raw = self.args.prompt_style == "raw"
        return {
            "eos_tokens": self.tokenizer.convert_ids_to_tokens(self.eos_ids),
            "chat_template": None if is_raw else self.tokenizer.get_chat_template(),
        }

    def _identity(self, name: str) -> dict[str, Any]:
        """Everything that the answers depend on, by the user's names."""
        return {
            **{setting: getattr(self.args, setting) for setting in _SETTINGS},
            f"{self.role} dtype": self.description["dtype"],
            f"{self.role} weights": self.weights,
            **self.loading,
            "EOS tokens": self.eos_ids,
            "number of problems": len(self.prompt_ids[name]),
            "prompts (tokens)": hash_ids(self.prompt_ids[name]),
            **describe_rows(self.writers[name].input),
        }


def grade_candidates(candidates: list[Candidate], args: EvaluationConfig) -> dict[str, Any]:
    """Grade the answers and write results.json."""
    benchmarks: dict[str, dict[str, Any]] = {}
    for name in candidates[0].writers:
        scores = benchmarks[name] = {}
        verdicts = []
        for candidate in candidates:
            answers = _grade_answers(candidate.writers[name].load(), args)
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
        "settings": {setting: getattr(args, setting) for setting in (*_SETTINGS, *_SAID)},
        "benchmarks": benchmarks,
        **({"average": _average(benchmarks)} if len(benchmarks) > 1 else {}),
        "versions": {
            "python": platform.python_version(),
            "trl-lightreasoner": __version__,
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }
    with whole_file(Path(args.output_dir, "results.json")) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
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
