"""Model cards and dataset cards, made without a network.

They contain nothing about this machine: models and datasets are named by their id on the Hub, or by the last part of
a path. A section that is made here stands between two comments, and is replaced when it is made again. Text that
people write outside it is kept.
"""

import json
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from datasets.info import DatasetInfosDict
from datasets.splits import SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from ..models.hub_access import cache_if_unreachable
from ..models.provenance import describe_quantization, hub_id, public_name
from ..models.weights import describe_model, get_base_model, is_peft_model
from ..steps.beta import has_corrections
from ..steps.columns import count_trajectories
from ..steps.dataset import count_steps, read_samplings
from ..steps.prompt_format import PromptFormat
from ..steps.switches import without_nulls
from ..text import printable
from .card_parts import (
    CITATION,
    LINES,
    PAPER_ID,
    TAGS,
    languages_of,
    link,
    replace_part,
    sampling_rows,
    show,
    table,
    versions,
)
from .training_curve import curve_table


if TYPE_CHECKING:  # slow to import, and not needed for a dataset card
    from peft import PeftConfig
    from transformers import Trainer

    from ..evaluation.evaluation import Evaluation


_MEANINGS = {
    "prompt": "the prompt",
    "completion": "the expert's answer",
    "prompt_ids": "tokens of the prompt, as read by the models",
    "completion_ids": "tokens of the completion, including EOS",
    "kl_divergence": "D_KL(pi_E, pi_A) in nats at every completion token, kept or not",
    "step_positions": "position t of each kept step, whose context is `prompt_ids + completion_ids[:t]`",
    "label_ids": "support of v_C at each kept step, most probable first",
    "label_probs": "probabilities of `label_ids` under v_C, which sum to 1",
    "step_weights": "weight of each kept step in the mean of the loss",
    "sampling_metadata": "JSON: models, revisions, settings and versions",
}
_SETTINGS = ("learning_rate", "lr_scheduler_type", "optim", "max_length", "one_step_per_row")
# For the quick start of a model
_LOOKED_THROUGH, _MAX_PROMPT_CHARACTERS = 100, 600
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")  # of datasets, as the Hub calls them
_UNKNOWN = "The rows do not record it."


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
    samplings = read_samplings([trainer.train_dataset]) if isinstance(trainer.train_dataset, Dataset) else []
    data = ModelCardData(
        base_model=base_model,
        **license_of(base_name),
        language=languages_of(samplings),
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
        adapter_type=adapter_type(model.active_peft_config) if is_adapter else None,
        base_model=link(base_name),
        hub_model_id=trainer.hub_model_id or model_name,
        prompt=_example_prompt(trainer),
        switches=show_switches(trainer.prompt_format),
        paper_id=PAPER_ID,
        sft_weight=trainer.args.sft_weight,
        data=table(["", ""], rows),
        settings=table(["", ""], _setting_rows(trainer, model)),
        curve=curve_table(trainer.state),
        has_figure=has_figure,
        versions="\n".join(f"- {name}: {version}" for name, version in versions().items()),
        citation=CITATION,
    )
    card.text = printable(card.text, keep=LINES)
    if evaluation is not None:
        add_evaluation(card, evaluation)
    return card


@cache
def license_of(model: str) -> dict[str, Any]:
    """
    The license of a model, as the card beside it says: `license`, and `license_name` and `license_link` if it is one
    that the Hub does not know. Empty if there is no card, or it does not say.
    """
    path = find_card(model)
    try:
        metadata = (metadata_load(path) if path else None) or {}
    except Exception:  # a card that cannot be read is no reason to lose a training
        return {}
    return {name: metadata[name] for name in ("license", "license_name", "license_link") if metadata.get(name)}


def find_card(model: str, revision: str | None = None) -> str | None:
    """The file of the card beside a model or an adapter, given by its id or path, or `None` if it cannot be had."""
    from transformers.utils import cached_file

    if not os.path.isdir(model) and hub_id(model) is None:
        return None
    names = ("missing_entries", "connection_errors", "gated_repo")
    quietly = {f"_raise_exceptions_for_{name}": False for name in names}
    with cache_if_unreachable(model):
        try:
            return cached_file(model, "README.md", revision=revision, **quietly)
        except OSError:  # there is no such model any more
            return None


def add_evaluation(card: ModelCard, evaluation: "Evaluation") -> None:
    """Put accuracies into a model card: a table in its text, and `model-index` in its metadata."""
    settings = evaluation.results["settings"]
    text = (
        "## Evaluation\n\nMeasured with `lightreasoner eval`: zero-shot, greedy, one answer per problem, percent +- "
        f"one standard error; {settings['prompt_style']} prompts, at most {settings['max_new_tokens']:,} "
        f"tokens.\n\n{evaluation.table()}"
    )
    card.text = replace_part(card.text, "evaluation", text, before="\n## License")
    data: Any = card.data  # of a model
    data.model_name = data.model_name or "model"
    data.eval_results = evaluation.eval_results() or None  # none of a file of questions


def dataset_card(splits: dict[str, Dataset], repo_id: str, existing: DatasetCard | None = None) -> DatasetCard:
    """
    The card of a Dataset of steps.

    Args:
        splits (`dict[str, Dataset]`): Rows from [`ContrastiveStepSampler`], with the same columns.
        repo_id (`str`): Where they are, as owner/name.
        existing ([`~huggingface_hub.DatasetCard`], *optional*):
            The card that is there. Its metadata, of which `datasets` takes care, and what people wrote are kept.
    """
    card = existing or DatasetCard("---\n{}\n---\n")
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
        columns=table(["column", "type", "meaning"], _column_rows(first.features)),
        sampling=_makings({name: told.get(name, _Told()).making for name in others} | _makings_of(splits)),
        counts=table(
            ["split", "rows", "trajectories", "steps", "kept steps"],
            _count_rows(splits) + [told.get(name, _Told()).counts(name, each) for name, each in others.items()],
        ),
        citation=CITATION,
    ).text
    if info is not None:  # in which `datasets` leaves the columns of a split that was there before
        info.features = first.features
        infos.to_dataset_card_data(card.data)
    card.text = replace_part(card.text, "steps", text.strip())
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    num_rows = sum(map(len, splits.values())) + sum(split.num_examples for split in others.values())
    card.data["size_categories"] = [_size_category(num_rows)]
    if languages := card.data.get("language") or languages_of(samplings):
        card.data["language"] = languages
    sources = [(each.get("prompt_source") or {}).get("dataset") for each in samplings]
    if sources := list(dict.fromkeys(name for name in sources if hub_id(name))):
        card.data["source_datasets"] = card.data.get("source_datasets") or sources
    card.data["task_categories"] = card.data.get("task_categories") or ["text-generation"]
    return card


def _size_category(num_rows: int) -> str:
    """The Hub's name for a number of rows."""
    index = len(str(num_rows)) - len("1000") + 1  # of the first limit that is above it
    if index <= 0:
        return f"n<{_SIZES[0]}"
    return f"{_SIZES[index - 1]}<n<{_SIZES[index]}" if index < len(_SIZES) else f"n>{_SIZES[-1]}"


class _Told(NamedTuple):
    """What a card says about a split, whose rows are not at hand when another split is pushed."""

    making: str = _UNKNOWN
    cells: tuple[str, ...] = ("", "", "", "")

    def counts(self, name: str, split: SplitInfo) -> tuple[str, ...]:
        num_rows = f"{split.num_examples:,}"
        # With another number of rows, the split has been changed since
        return (name, *self.cells) if self.cells[0] == num_rows else (name, num_rows, "", "", "")


def _told(text: str) -> dict[str, _Told]:
    def section(title: str) -> str:
        return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]

    row = r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$"
    _, *rows = re.findall(row, section("Size"), re.MULTILINE) or [()]
    cells = {name.strip(): tuple(cell.strip() for cell in cells) for name, *cells in rows}
    makings: dict[str, str] = {}
    for part in section("How it was made").split("\n### ")[1:]:
        names, _, making = part.partition("\n")
        makings |= dict.fromkeys(names.split(", "), making.strip())
    if not makings and len(cells) == 1:  # of a card with one split
        makings = dict.fromkeys(cells, section("How it was made").strip())
    return {name: _Told(makings.get(name, _UNKNOWN), row) for name, row in cells.items()}


def _makings_of(splits: dict[str, Dataset]) -> dict[str, str]:
    """For each split, a table of every sampling that its rows come from."""
    tables = {
        name: [table(["", ""], sampling_rows(sampling)) for sampling in read_samplings([split])]
        for name, split in splits.items()
    }
    return {name: "\n\n".join(each) or _UNKNOWN for name, each in tables.items()}


def _makings(makings: dict[str, str]) -> str:
    """One section for all splits that were made in the same way."""
    alike: dict[str, list[str]] = {}
    for name, making in makings.items():
        alike.setdefault(making, []).append(name)
    return "\n\n".join(f"### {', '.join(names)}\n\n{making}" for making, names in alike.items())


def _example_prompt(trainer: "Trainer") -> str:
    """A training prompt, or an example in the same format, as a Python literal."""
    prompt_format = trainer.prompt_format
    known = _short_prompt(trainer.train_dataset, (prompt_format and prompt_format.chat_template_kwargs) or {})
    if known is None:
        return make_example(prompt_format, trainer.processing_class)
    return json.dumps(known, ensure_ascii=False)


def make_example(prompt_format: PromptFormat | None, tokenizer: Any) -> str:
    """An example prompt in a format, or else in the tokenizer's, as a Python literal."""
    prompt: Any = "What is 17 * 3?"
    if prompt_format is not None:
        prompt = prompt_format.make_prompt(prompt)
    elif getattr(tokenizer, "chat_template", None) is not None:
        prompt = [{"role": "user", "content": prompt}]
    return json.dumps(prompt, ensure_ascii=False)


def show_switches(prompt_format: PromptFormat | None) -> str:
    """The switches of the chat template, as a further argument of `apply_chat_template`, or nothing."""
    switches = {} if prompt_format is None else prompt_format.chat_template_kwargs
    return f", **{switches!r}" if switches else ""


def _short_prompt(dataset: Any, switches: dict[str, Any]) -> Any:
    """The first short prompt that needs no other column, such as tools, and has these switches."""
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return None
    for row in dataset.with_format(None).select(range(min(_LOOKED_THROUGH, len(dataset)))):
        prompt = row["prompt"]
        if isinstance(prompt, list):  # where rows have different keys, Arrow fills in nulls
            prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
            if prompt[-1].get("role") == "assistant":
                continue
        beside = row.get("tools") or without_nulls(row.get("chat_template_kwargs") or {}) != switches
        if prompt and not beside and len(json.dumps(prompt)) <= _MAX_PROMPT_CHARACTERS:
            return prompt
    return None


def _data_rows(dataset: Any, dataset_name: str | None) -> list[tuple[str, str]]:
    rows = [("dataset", link(dataset_name, "datasets/"))] if dataset_name else []
    if isinstance(dataset, Dataset):
        rows.append(("trajectories with a kept step", f"{count_trajectories(dataset)[0]:,}"))
        rows.append(("kept steps", f"{count_steps(dataset):,}"))
        for sampling in read_samplings([dataset]):
            rows += sampling_rows(sampling)
    return rows or [("dataset", "streamed")]


def _setting_rows(trainer: "Trainer", model: Any) -> list[tuple[str, Any]]:
    args = trainer.args
    rows: list[tuple[str, Any]] = [("beta", f"{show(trainer.beta)} nats" if trainer.beta else "all kept steps")]
    settings = {name: getattr(args, name) for name in _SETTINGS} | {"seed": str(args.seed)}
    if trainer.optimizer_cls_and_kwargs is not None:
        optimizer, kwargs = trainer.optimizer_cls_and_kwargs
        settings |= {"optim": optimizer.__name__, "learning_rate": kwargs.get("lr", "the optimizer's own")}
    rows += settings.items()
    if args.sft_weight is not None:
        rows.append(("sft_weight", args.sft_weight))
    if "step_weights" in (trainer.train_dataset.column_names or ()):
        rows.append(("weights of the kept steps", "a column of the dataset"))
    rows_per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows.append(("rows per update", rows_per_update))
    rows.append(("updates", trainer.state.global_step))
    if trainer.best_update is not None:
        rows.append((f"update of the best {args.metric_for_best_model}, whose weights these are", trainer.best_update))
    if isinstance(trainer.train_dataset, Dataset):  # how often a stream was read is not known
        rows.append(("epochs", round(trainer.state.epoch or 0.0, 2)))
    is_full = args.mixed_precision == "no" or args.mixed_precision == "fp16" and args.device.type == "cpu"
    rows.append(("mixed precision", "none" if is_full else args.mixed_precision))
    described = describe_model(model)
    rows.append(("dtype of the base model" if is_peft_model(model) else "dtype", described["dtype"]))
    rows += [(name, described[name]) for name in ("attention", "device")]
    if described["quantization"]:
        rows.append(("quantization", describe_quantization(described["quantization"])))
    if is_peft_model(model):
        rows += adapter_rows(model.active_peft_config)
    return [(name, show(value)) for name, value in rows]


def adapter_rows(config: "PeftConfig") -> list[tuple[str, Any]]:
    """Size and target modules of an adapter, if it is LoRA."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        return []
    targets = config.target_modules or "PEFT's choice"
    if not isinstance(targets, str):  # "all-linear" becomes the name of every layer
        targets = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
    return [
        ("LoRA r", config.r),
        ("LoRA alpha", config.lora_alpha),
        ("LoRA dropout", config.lora_dropout),
        ("LoRA target modules", targets),
    ]


def adapter_type(config: "PeftConfig") -> str:
    """The display name of an adapter's type."""
    from peft import LoraConfig

    return "LoRA" if isinstance(config, LoraConfig) else config.peft_type.value


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
        (num_trajectories, num_steps), num_kept = count_trajectories(dataset), count_steps(dataset)
        share = f" ({num_kept / num_steps:.1%})" if num_steps else ""
        counts = (f"{count:,}" for count in (len(dataset), num_trajectories, num_steps))
        rows.append((name, *counts, f"{num_kept:,}{share}"))
    return rows
