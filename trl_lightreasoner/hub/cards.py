"""The cards of what is shared: a model card and a dataset card, made of what is known, without a network.

Nothing of this machine is in them: models and datasets are named by their id on the Hub, or by the last part of a
path. A part that is made here stands between two comments and is replaced when it is made again; what people write
beside it stays.
"""

import importlib.metadata
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from datasets.info import DatasetInfosDict
from datasets.splits import SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from .. import __version__
from ..models.provenance import describe_quantization, hub_id, public_name
from ..models.weights import describe_model, get_base_model, is_peft_model
from ..steps.dataset import count_steps, read_samplings
from ..steps.prompt_format import PromptFormat
from ..steps.training_rows import has_corrections
from ..text import printable


if TYPE_CHECKING:  # slow to import, and a Dataset's card does without
    from peft import PeftModel
    from transformers import Trainer, TrainerState

    from ..evaluation.evaluation import Evaluation


PAPER_ID = "2510.07962"
CITATION = """@inproceedings{wang-etal-2026-lightreasoner,
  title     = {{L}ight{R}easoner: Can Small Language Models Teach Large Language Models Reasoning?},
  author    = {Wang, Jingyuan and Chen, Yankai and Li, Zhonghang and Huang, Chao},
  booktitle = {Proceedings of the 64th Annual Meeting of the Association for Computational Linguistics
               (Volume 1: Long Papers)},
  year      = {2026},
  pages     = {2635--2663},
  url       = {https://aclanthology.org/2026.acl-long.122/}
}"""
TAGS = ["trl", "light-reasoner"]

_MEANINGS = {
    "prompt": "what was asked",
    "completion": "the expert's answer",
    "prompt_ids": "tokens of the prompt, as read by the models",
    "completion_ids": "tokens of the completion, EOS kept",
    "kl_divergence": "D_KL(pi_E, pi_A) in nats at every completion token, kept or not",
    "step_positions": "t of each kept step: its context is `prompt_ids + completion_ids[:t]`",
    "label_ids": "support of v_C at each kept step, most probable first",
    "label_probs": "v_C there, sums to 1",
    "step_weights": "weight of each kept step in the mean of the loss",
    "sampling_metadata": "JSON: models, revisions, settings and versions",
}
# Of the label; they are told where they are others than the paper's
_PAPERS_LABEL = {"contrast_strength": 1.0, "expert_anchor": 0.0}
_SETTINGS = ("learning_rate", "lr_scheduler_type", "optim", "max_length", "one_step_per_row", "seed")
_ACCURACY, _ACCURACY_ERROR = "eval_accuracy", "eval_accuracy_standard_error"
_CURVE = (
    *("loss", "entropy", "mean_token_accuracy"),
    *(_ACCURACY, _ACCURACY_ERROR, "eval_loss", "eval_entropy", "eval_kl_to_expert"),
)
_MAX_CURVE_ROWS = 20
_LINES = "\n\t"
_UNKNOWN = "The rows do not say."


def model_card(
    trainer: "Trainer",
    model_name: str,
    dataset_name: str | None = None,
    tags: Iterable[str] = (),
    evaluation: "Evaluation | None" = None,
    has_figure: bool = False,
) -> ModelCard:
    """
    The model card of a trainer.

    Args:
        trainer ([`~transformers.Trainer`]): One of this package, before, while or after it trains.
        model_name (`str`): The title.
        dataset_name (`str`, *optional*): Id on the Hub of the rows that were trained on.
        tags (`Iterable[str]`): Tags to add to the method's own.
        evaluation ([`~trl_lightreasoner.evaluation.evaluation.Evaluation`], *optional*): What the model scores.
        has_figure (`bool`): Whether training_curve.png is next to the card.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    is_adapter = is_peft_model(model)
    base_name = get_base_model(model).config._name_or_path
    base_model = hub_id(base_name)
    data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name,
        library_name="peft" if is_adapter else "transformers",
        model_name=model_name,
        pipeline_tag="text-generation",
        tags=list(
            dict.fromkeys(["generated_from_trainer", *trainer._tag_names, *(["peft"] if is_adapter else []), *tags])
        ),
    )
    if is_adapter and base_model:
        data["base_model_relation"] = "adapter"
    rows = _data_rows(trainer.train_dataset, dataset_name)
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        is_adapter=is_adapter,
        adapter_type=_adapter_type(model) if is_adapter else None,
        base_model=_link(base_name),
        hub_model_id=trainer.hub_model_id or model_name,
        prompt=_example_prompt(trainer),
        paper_id=trainer._paper["id"],
        sft_weight=trainer.args.sft_weight,
        data=_table(["", ""], rows),
        settings=_table(["", ""], _setting_rows(trainer, model)),
        curve=_curve_table(trainer.state),
        has_figure=has_figure,
        versions="\n".join(f"- {name}: {version}" for name, version in _versions().items()),
        citation=CITATION,
    )
    card.text = printable(card.text, keep=_LINES)
    if evaluation is not None:
        add_evaluation(card, evaluation)
    return card


def add_evaluation(card: ModelCard, evaluation: "Evaluation") -> None:
    """Put accuracies into a model card: a table in its text, and `model-index` in its metadata."""
    settings = evaluation.results["settings"]
    text = (
        "## Evaluation\n\nMeasured with `lightreasoner eval`: zero-shot, greedy, one answer per problem, percent +- "
        f"one standard error; {settings['prompt_style']} prompts, at most {settings['max_new_tokens']:,} "
        f"tokens.\n\n{evaluation.table()}"
    )
    card.text = _replace_part(card.text, "evaluation", text, before="\n## Licence")
    data: Any = card.data  # of a model
    data.model_name = data.model_name or "model"
    data.eval_results = evaluation.eval_results()


def dataset_card(splits: dict[str, Dataset], repo_id: str, existing: DatasetCard | None = None) -> DatasetCard:
    """
    The card of a Dataset of steps.

    Args:
        splits (`dict[str, Dataset]`): Rows from [`ContrastiveStepSampler`], with the same columns.
        repo_id (`str`): Where they are, as owner/name.
        existing ([`~huggingface_hub.DatasetCard`], *optional*):
            The card that is there. Its metadata, of which `datasets` takes care, and what people wrote are kept.
    """
    card = existing or DatasetCard("---\n---\n")
    infos = DatasetInfosDict.from_dataset_card_data(card.data)
    info = infos.get("default")
    others = {name: split for name, split in ((info and info.splits) or {}).items() if name not in splits}
    told = _told(card.text)
    first = next(iter(splits.values()))
    names = [*splits, *others]
    samplings = read_samplings(splits.values())
    expert = public_name(((samplings or [{}])[0].get("expert") or {}).get("model")) or "EXPERT"
    template = Path(__file__).with_name("dataset_card_template.md").read_text(encoding="utf-8")
    text = DatasetCard.from_template(
        DatasetCardData(),
        template_str="---\n{{ card_data }}\n---\n" + template,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        split="train" if "train" in names else names[0],
        expert=expert,
        # As `lightreasoner train` chooses
        layers='["q_proj", "v_proj"]' if has_corrections(first) else '"all-linear"',
        paper_id=PAPER_ID,
        columns=_table(["column", "type", "meaning"], _column_rows(first.features)),
        sampling=_makings({name: told.get(name, _Told()).making for name in others} | _makings_of(splits)),
        counts=_table(
            ["split", "trajectories", "steps", "kept steps"],
            _count_rows(splits) + [told.get(name, _Told()).counts(name, each) for name, each in others.items()],
        ),
        citation=CITATION,
    ).text
    if info is not None:  # in which `datasets` leaves the columns of a split that was there before
        info.features = first.features
        infos.to_dataset_card_data(card.data)
    card.text = _replace_part(card.text, "steps", text.strip())
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    card.data["task_categories"] = card.data.get("task_categories") or ["text-generation"]
    return card


class _Told(NamedTuple):
    """What a card tells of a split, which is not at hand when another one is pushed."""

    making: str = _UNKNOWN
    cells: tuple[str, ...] = ("", "", "")

    def counts(self, name: str, split: SplitInfo) -> tuple[str, ...]:
        num_rows = f"{split.num_examples:,}"
        # A split that somebody has changed since is another one
        return (name, *self.cells) if self.cells[0] == num_rows else (name, num_rows, "", "")


def _told(text: str) -> dict[str, _Told]:
    def section(title: str) -> str:
        return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]

    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \| ([^|]*) \|$", section("Size"), re.MULTILINE)[1:]
    cells = {name.strip(): tuple(cell.strip() for cell in row) for name, *row in rows}
    makings: dict[str, str] = {}
    for part in section("How it was made").split("\n### ")[1:]:
        names, _, making = part.partition("\n")
        makings |= dict.fromkeys(names.split(", "), making.strip())
    if not makings and len(cells) == 1:  # of a card that tells of one split
        makings = dict.fromkeys(cells, section("How it was made").strip())
    return {name: _Told(makings.get(name, _UNKNOWN), row) for name, row in cells.items()}


def _makings_of(splits: dict[str, Dataset]) -> dict[str, str]:
    """Of each split, a table of every sampling that its rows come from."""
    tables = {
        name: [_table(["", ""], _sampling_rows(sampling)) for sampling in read_samplings([split])]
        for name, split in splits.items()
    }
    return {name: "\n\n".join(each) or _UNKNOWN for name, each in tables.items()}


def _makings(makings: dict[str, str]) -> str:
    """A part for the splits of each making."""
    alike: dict[str, list[str]] = {}
    for name, making in makings.items():
        alike.setdefault(making, []).append(name)
    return "\n\n".join(f"### {', '.join(names)}\n\n{making}" for making, names in alike.items())


def draw_curve(state: "TrainerState", path: str) -> bool:
    """
    Draw loss, entropy and accuracy over the updates, and say whether it was done: matplotlib must be installed and
    something have been logged.
    """
    logs = _merged_logs(state)
    if importlib.util.find_spec("matplotlib") is None or len(logs) < 2:
        return False
    from matplotlib.figure import Figure

    answered = [(step, log[_ACCURACY], log[_ACCURACY_ERROR]) for step, log in logs.items() if _ACCURACY in log]
    panels = [("loss", "eval_loss", "eval_kl_to_expert"), ("entropy", "eval_entropy")]
    count = len(panels) + bool(answered)
    figure = Figure(figsize=(4 * count, 3), layout="constrained")
    every = list(figure.subplots(1, count))
    if answered:
        axes = every.pop(0)
        steps, accuracies, errors = zip(*answered, strict=True)
        axes.errorbar(steps, accuracies, yerr=errors, fmt="o-", markersize=3, capsize=3, label=_ACCURACY)
        axes.legend()
        axes.set(xlabel="update", ylabel="share, +- standard error")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes, names in zip(every, panels, strict=True):
        highest = 0.0
        for name in names:
            points = [(step, log[name]) for step, log in logs.items() if name in log]
            if points:
                axes.plot(*zip(*points, strict=True), "o-" if len(points) < 30 else "-", markersize=3, label=name)
                highest = max(highest, *(value for _, value in points if math.isfinite(value)), 1e-6)
        if axes.lines:
            axes.legend()
            axes.set_ylim(0, 1.1 * highest)
        axes.set(xlabel="update", ylabel="nats, at kept steps")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)
    return True


def _example_prompt(trainer: "Trainer") -> str:
    """A prompt in the form of those that were trained on, as a literal of Python."""
    question = "What is 17 * 3?"
    if trainer.prompt_format is not None:
        prompt = trainer.prompt_format.make_prompt(question)
    elif getattr(trainer.processing_class, "chat_template", None) is not None:
        prompt = [{"role": "user", "content": question}]
    else:
        prompt = question
    return json.dumps(prompt, ensure_ascii=False)


def _data_rows(dataset: Any, dataset_name: str | None) -> list[tuple[str, str]]:
    rows = [("dataset", _link(dataset_name, "datasets/"))] if dataset_name else []
    if isinstance(dataset, Dataset):
        rows.append(("trajectories with a kept step", f"{len(dataset):,}"))
        rows.append(("kept steps", f"{count_steps(dataset):,}"))
        for sampling in read_samplings([dataset]):
            rows += _sampling_rows(sampling)
    return rows or [("dataset", "streamed")]


def _sampling_rows(sampling: dict[str, Any]) -> list[tuple[str, str]]:
    settings = sampling.get("settings") or {}
    rows = [(f"{role} (pi_{role[0].upper()})", _describe(sampling.get(role))) for role in ("expert", "amateur")]
    if reading := sampling.get("amateur_reading"):
        rows.append(("how the amateur was read", reading["description"]))
    for name, value in settings.items():
        if name in _PAPERS_LABEL and value == _PAPERS_LABEL[name]:
            continue
        if value is not None or name in ("alpha", "beta"):
            rows.append((name, "not known" if value is None else f"{value} nats" if name == "beta" else value))
    if sampling.get("per_device_batch_size"):
        rows.append(("rows together", str(sampling["per_device_batch_size"])))
    if prompt_format := sampling.get("prompt_format"):
        rows.append(("prompts", f"by {PromptFormat(**prompt_format)}"))
    version = (sampling.get("versions") or {}).get("trl-lightreasoner")
    return rows + ([("trl-lightreasoner", version)] if version else [])


def _describe(model: dict[str, Any] | None) -> str:
    if not model:
        return "not known"
    parts = [_link(model.get("model"))]
    if isinstance(model.get("adapter"), str):
        parts.append(f"adapter {_link(model['adapter'])}")
    if model.get("revision"):
        parts.append(f"revision {model['revision']}")
    parts += [model["dtype"]] if model.get("dtype") else []
    parts += [describe_quantization(model["quantization"])] if model.get("quantization") else []
    parts += [f"{model['attention']} attention"] if model.get("attention") else []
    parts += [f"on {model['device']}"] if model.get("device") else []
    return ", ".join(parts)


def _setting_rows(trainer: "Trainer", model: Any) -> list[tuple[str, Any]]:
    args = trainer.args
    rows: list[tuple[str, Any]] = [("beta", f"{trainer.beta} nats" if trainer.beta else "all kept steps")]
    settings = {name: getattr(args, name) for name in _SETTINGS}
    if trainer.optimizer_cls_and_kwargs is not None:
        optimizer, kwargs = trainer.optimizer_cls_and_kwargs
        settings |= {"optim": optimizer.__name__, "learning_rate": kwargs.get("lr", "the optimizer's own")}
    rows += settings.items()
    if args.sft_weight is not None:
        rows.append(("sft_weight", args.sft_weight))
    if "step_weights" in (trainer.train_dataset.column_names or ()):
        rows.append(("weights of the kept steps", "a column of the dataset"))
    rows_per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows.append(("rows an update", rows_per_update))
    rows.append(("updates", f"{trainer.state.global_step:,}"))
    rows.append(("epochs", f"{trainer.state.epoch or 0:.2f}"))
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "none"
    rows.append(("mixed precision", precision))
    described = describe_model(model)
    rows.append(("dtype of the base model" if is_peft_model(model) else "dtype", described["dtype"]))
    rows += [(name, described[name]) for name in ("attention", "device")]
    if described["quantization"]:
        rows.append(("quantization", describe_quantization(described["quantization"])))
    if is_peft_model(model) and _adapter_type(model) == "LoRA":
        lora = model.active_peft_config
        targets = lora.target_modules
        if not isinstance(targets, str | None):  # "all-linear" becomes the name of every layer
            targets = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
        rows += [("LoRA r", lora.r), ("LoRA alpha", lora.lora_alpha), ("LoRA dropout", lora.lora_dropout)]
        rows.append(("LoRA target modules", targets))
    return [(name, getattr(value, "value", value)) for name, value in rows]


def _adapter_type(model: "PeftModel") -> str:
    from peft import LoraConfig

    config = model.active_peft_config
    return "LoRA" if isinstance(config, LoraConfig) else config.peft_type.value


def _merged_logs(state: "TrainerState") -> dict[int, dict[str, float]]:
    """What was logged at each update, of training and evaluation together."""
    logs: dict[int, dict[str, float]] = {}
    for log in state.log_history:
        values = {name: log[name] for name in _CURVE if name in log}
        if values:
            logs.setdefault(log["step"], {}).update(values)
    return dict(sorted(logs.items()))


def _curve_table(state: "TrainerState") -> str:
    logs = list(_merged_logs(state).items())
    if len(logs) > _MAX_CURVE_ROWS:  # the first, the last, others at equal distances, and those with an accuracy
        last = len(logs) - 1
        shown = {round(i * last / (_MAX_CURVE_ROWS - 1)) for i in range(_MAX_CURVE_ROWS)}
        answered = [i for i, (_, log) in enumerate(logs) if _ACCURACY in log]
        shown |= set(answered[:: 1 + len(answered) // _MAX_CURVE_ROWS])
        logs = [logs[i] for i in sorted(shown)]
    names = [name for name in _CURVE if name != _ACCURACY_ERROR and any(name in log for _, log in logs)]

    def cell(log: dict[str, float], name: str) -> str:
        error = f" +- {log[_ACCURACY_ERROR]:.2g}" if name == _ACCURACY and name in log else ""
        return f"{log[name]:.4g}{error}" if name in log else ""

    rows = [[step, *(cell(log, name) for name in names)] for step, log in logs]
    return _table(["update", *names], rows) if rows else ""


def _column_rows(features: Features) -> list[tuple[str, str, str]]:
    return [
        (f"`{name}`", _type_name(feature), _MEANINGS.get(name, "as in the dataset of the prompts"))
        for name, feature in features.items()
    ]


def _type_name(feature: Any) -> str:
    if isinstance(feature, List | LargeList):
        return f"list of {_type_name(feature.feature)}"
    if isinstance(feature, dict):
        return "{" + ", ".join(f"{name}: {_type_name(part)}" for name, part in feature.items()) + "}"
    if isinstance(feature, Value):
        return "text" if feature.dtype.endswith("string") else feature.dtype
    return f"class ({', '.join(feature.names)})" if isinstance(feature, ClassLabel) else type(feature).__name__


def _count_rows(splits: dict[str, Dataset]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, dataset in splits.items():
        num_steps, num_kept = sum(map(len, dataset["completion_ids"])), count_steps(dataset)
        share = f" ({num_kept / num_steps:.1%})" if num_steps else ""
        rows.append((name, f"{len(dataset):,}", f"{num_steps:,}", f"{num_kept:,}{share}"))
    return rows


def _versions() -> dict[str, str]:
    packages = ("trl", "transformers", "peft", "torch", "datasets", "tokenizers")
    return {"trl-lightreasoner": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def _link(name: str | None, kind: str = "") -> str:
    found = hub_id(name)
    return f"[{found}](https://huggingface.co/{kind}{found})" if found else f"`{public_name(name) or 'not named'}`"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _replace_part(text: str, name: str, part: str, before: str | None = None) -> str:
    """`text` with the part of that name replaced, or put in front of `before`, or else at the end."""
    start, end = f"<!-- lightreasoner: {name} -->", f"<!-- lightreasoner: end of {name} -->"
    part = f"{start}\n{printable(part, keep=_LINES)}\n{end}"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: part, text, count=1)
    at = text.find(before) if before else -1
    if at >= 0:
        return f"{text[:at].rstrip()}\n\n{part}\n{text[at:]}"
    return f"{text.rstrip()}\n\n{part}\n".lstrip() if text.strip() else f"{part}\n"
