"""The card of a merged model, made from the results of the merge and from the adapter's card."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from ..models.provenance import hub_id
from ..text import printable
from .card_parts import LINES, PAPER_ID, TAGS, link, show, table
from .cards import adapter_rows, adapter_type, find_card, license_of, make_example, show_switches


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..steps.prompt_format import PromptFormat

# Metadata of an adapter's card that does not hold for the merged model
_OF_THE_ADAPTER = (
    *("base_model", "base_model_relation", "library_name", "model_name"),
    *("model-index", "pipeline_tag", "tags"),
)
_TAGS = ("peft", "lora")
_LICENSE = "## License\n\nThe license of the base model applies."


def merged_card(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    base: str,
    adapter_name: str,
    adapter: "PeftConfig",
    adapter_card: ModelCard | None,
    prompt_format: "PromptFormat | None",
    change: float,
    difference: float,
    num_tokens: int,
) -> ModelCard:
    """
    The card of a merged model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The merged model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        folder (`Path`): Its folder, whose name is the title of the card.
        base (`str`): Id or path of the base model.
        adapter_name (`str`): Id or path of the adapter.
        adapter ([`~peft.PeftConfig`]): Config of the adapter.
        adapter_card ([`~huggingface_hub.ModelCard`], *optional*): Card of the adapter, from [`load_card`].
        prompt_format ([`PromptFormat`], *optional*): Format of the prompts that the adapter was trained on.
        change (`float`): Divergence of base model and adapter from the base model, in nats per token.
        difference (`float`): Divergence of the merged model from base model and adapter, in nats per token.
        num_tokens (`int`): Number of tokens on which both divergences were measured.
    """
    known: dict[str, Any] = adapter_card.data.to_dict() if adapter_card is not None else {}
    tags = [tag for tag in known.get("tags") or [] if tag not in _TAGS and not str(tag).startswith("base_model:")]
    is_ours = TAGS[-1] in tags
    base_model = hub_id(base)
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        model_name=folder.name,
        pipeline_tag="text-generation",
        tags=tags or None,
        **(license_of(base) | {name: value for name, value in known.items() if name not in _OF_THE_ADAPTER}),
    )
    making = [
        ("base model", link(base)),
        ("adapter", link(adapter_name)),
        *((name, show(value)) for name, value in adapter_rows(adapter)),
        ("parameters", show(model.num_parameters())),
        ("dtype of the weights", str(model.dtype).removeprefix("torch.")),
        ("divergence from the base model", f"{change:.2g} nats per token"),
        ("divergence from base model and adapter", f"{difference:.2g} nats per token"),
    ]
    text = adapter_card.text if adapter_card is not None and is_ours else ""
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("merged_card_template.md")),
        model_name=folder.name,
        base_model=link(base),
        adapter=link(adapter_name),
        adapter_type=adapter_type(adapter),
        is_ours=is_ours,
        paper_id=PAPER_ID,
        prompt=_example_of(text) or make_example(prompt_format, tokenizer),
        switches=show_switches(prompt_format),
        making=table(["", ""], making),
        num_tokens=num_tokens,
        rest=_rest_of(text) or _LICENSE,
    )
    card.text = printable(card.text, keep=LINES)
    return card


def load_card(model: str, revision: str | None = None) -> ModelCard | None:
    """The card of an adapter, or `None` if it has none that can be read."""
    path = find_card(model, revision)
    try:
        return None if path is None else ModelCard.load(path)
    except Exception:  # a card that cannot be read is no reason to lose a model
        return None


def _example_of(text: str) -> str | None:
    """The prompt in the quick start of one of our cards, if it has not been edited."""
    found = re.search("^prompt = (.+)$", text, re.MULTILINE)
    try:
        return json.dumps(json.loads(found[1]), ensure_ascii=False) if found else None
    except ValueError:
        return None


def _rest_of(text: str) -> str:
    """What one of our cards says about the training, without the figure, which is in the adapter's folder."""
    _, title, rest = text.partition("\n## Training data\n")
    return re.sub(r"^!\[.*\]\(training_curve\.png\)\n\n?", "", f"{title}{rest}".strip(), flags=re.MULTILINE)
