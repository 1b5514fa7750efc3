"""Check that the trained model is the expert that the steps were sampled with."""

import json
import os
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import logging

from ..text import printable
from .weights import describe_model, is_peft_model, lies_beside, weight_fingerprint


logger = logging.get_logger(__name__)

_FLOATS = {"float16", "bfloat16", "float32", "float64"}


def warn_of_another_expert(
    dataset: Dataset | IterableDataset, model: torch.nn.Module, name: str | None = None
) -> str | None:
    """
    Warn of every difference between a model and the expert that `sampling_metadata` describes. Returns the model's
    [`weight_fingerprint`], or `None` if the comparison does not need it.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The steps to train on, of one or several
            experts. There is no warning without metadata, or if the dataset is streamed.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model at the start of training, before a
            new adapter is added.
        name (`str`, *optional*): Id or path of the model, if the user gave one.
    """
    if not isinstance(dataset, Dataset) or "sampling_metadata" not in dataset.column_names:
        return None
    trained = describe_model(model, name)
    # A new adapter changes nothing yet, even one that starts with a part of the weights, such as PiSSA and OLoRA. Its
    # weights do not show whether it is still new
    adapts = is_peft_model(model) and any(p.any() for n, p in model.named_parameters() if "lora_B" in n)
    is_told = name is not None or all(map(lies_beside, getattr(model, "peft_config", {}).values()))
    samplings = [_read_sampling(text) for text in dataset.unique("sampling_metadata")]
    experts = [sampling["expert"] for sampling in samplings if sampling]
    # In a later round the labels may come from the expert without the adapter that is trained further
    if any(sampling.get("settings", {}).get("label_expert") == "base" for sampling in samplings):
        trained, *experts = ({**each, "adapter": None, "weights": None} for each in (trained, *experts))
    elif any(weights_tell(expert, trained) for expert in experts) and holds_weights(model):
        trained["weights"] = weight_fingerprint(model)
    pairs = [pair for expert in experts for pair in differences(expert, trained, adapts and is_told)]
    for sampled_as, trained_as in dict.fromkeys(pairs):
        logger.warning(
            f"The expert was sampled {sampled_as} and is trained {trained_as}. The labels come from a different pi_E "
            "than the start of training, so training also learns the difference between the two."
        )
    return trained.get("weights")


def differences(sampled: dict[str, Any], trained: dict[str, Any], adapts: bool = True) -> list[tuple[str, str]]:
    """
    Differences between two experts that can change their outputs.

    Args:
        sampled, trained (`dict[str, Any]`): Results of [`~trl_lightreasoner.models.weights.describe_model`].
        adapts (`bool`): Whether the adapter of `trained`, if there is one, changes its base model's outputs.

    Returns:
        A pair of phrases for every difference. Of a path only the last part is compared, since a folder may have
        moved, and the checksums of the weights, if both are known. A wider dtype is not a difference, since full
        training uses one.

    Example:

    ```python
    >>> differences({"model": "a/expert", "dtype": "float32"}, {"model": "b/expert", "dtype": "bfloat16"})
    [('in float32', 'in bfloat16')]

    ```
    """

    def values(key: str) -> tuple[Any, Any]:
        return sampled.get(key), trained.get(key)

    if _differ(*map(_last_part, values("model"))):
        was, is_now = values("model")
        return [(f"as {was!r}", f"as {is_now!r}")]
    pairs: list[tuple[str, str]] = []
    if _differ(*values("revision")):
        was, is_now = values("revision")
        pairs.append((f"at revision {was}", f"at revision {is_now}"))
    adapters = values("adapter")
    one_is_missing = bool(adapters[0]) != bool(adapters[1]) and bool(adapters[0] or adapts)
    both_have_names = all(isinstance(adapter, str) for adapter in adapters)
    if one_is_missing or (both_have_names and _differ(*map(_last_part, adapters))):
        pairs.append((_adapter(adapters[0]), _adapter(adapters[1])))
    was, is_now = values("quantization")
    quantizations = (describe_quantization(was), describe_quantization(is_now))
    if _differ(*quantizations):
        pairs.append(quantizations)
    dtypes = values("dtype")
    if set(dtypes) <= _FLOATS:
        was, is_now = (getattr(torch, dtype) for dtype in dtypes)
        if torch.promote_types(was, is_now) != is_now:  # the weights lose precision
            pairs.append((f"in {dtypes[0]}", f"in {dtypes[1]}"))
    if not pairs and weights_tell(sampled, trained) and _differ(*values("weights")):
        was, is_now = map(_name, (sampled, trained))
        pairs.append((f"as {was!r}", f"as {is_now!r}, which has other weights"))
    return pairs


def weights_tell(sampled: dict[str, Any], trained: dict[str, Any]) -> bool:
    """
    Whether the checksums of two models of one name are equal if the models are. A commit on the Hub tells as much, and
    takes no time. Quantized weights can differ between devices.
    """
    is_one_commit = bool(sampled.get("revision")) and sampled.get("revision") == trained.get("revision")
    is_one_kind = all(bool(sampled.get(key)) == bool(trained.get(key)) for key in ("adapter", "quantization"))
    is_one_dtype = sampled.get("dtype") == trained.get("dtype")
    is_known = bool(sampled.get("weights")) and not sampled.get("quantization")
    return is_known and is_one_kind and is_one_dtype and (bool(sampled.get("adapter")) or not is_one_commit)


def holds_weights(model: torch.nn.Module) -> bool:
    """Whether this process holds all weights of a model, and says what it thinks of them."""
    is_whole = all(
        not parameter.is_meta and parameter.numel() and not hasattr(parameter, "full_tensor")
        for parameter in model.parameters()
    )
    return is_whole and PartialState().is_main_process


def hub_id(name: str | None) -> str | None:
    """
    The id on the Hub (owner/name) of a model or dataset, or `None` if it is a local path.

    Example:

    ```python
    >>> hub_id("Qwen/Qwen2.5-0.5B"), hub_id("/data/expert")
    ('Qwen/Qwen2.5-0.5B', None)

    ```
    """
    name = name or ""
    if (cached := _id_in_cache(name)) is not None:
        return cached
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    # A name without an owner is the last part of a path
    return name if "/" in name and not os.path.exists(name) else None


def public_name(name: str | None) -> str | None:
    """A name that reveals nothing about this machine: the id on the Hub, or the last part of a path."""
    return hub_id(name) or (name or "").replace("\\", "/").rstrip("/").rpartition("/")[2] or None


def _id_in_cache(name: str) -> str | None:
    """The id of a model whose folder is in the Hub's cache, models--owner--name/snapshots/commit."""
    parts = name.replace("\\", "/").rstrip("/").split("/")
    return "/".join(parts[-3].split("--")[1:]) if len(parts) > 2 and parts[-2] == "snapshots" else None


def _read_sampling(text: str | None) -> dict[str, Any]:
    try:
        sampling = json.loads(text or "")
        is_ours = isinstance(sampling["expert"], dict)
    except (TypeError, KeyError, ValueError):  # a column that is not ours
        return {}
    return sampling if is_ours else {}


def _differ(one: Any, other: Any) -> bool:
    return bool(one) and bool(other) and one != other


def _last_part(name: str | None) -> str | None:
    name = _id_in_cache(name or "") or name or ""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return parts[-1].lower() if parts else None


def _name(model: dict[str, Any]) -> str | None:
    adapter = model.get("adapter")
    return adapter if isinstance(adapter, str) else model.get("model")


def _adapter(adapter: str | list[str] | None) -> str:
    if isinstance(adapter, str):
        return f"with the adapter {adapter!r}"
    return "with an adapter" if adapter else "without an adapter"


def describe_quantization(settings: dict[str, Any] | None) -> str:
    """A phrase for the `quantization` of [`~trl_lightreasoner.models.weights.describe_model`]."""
    if not settings:
        return "without quantization"
    settings = {key: str(value) for key, value in settings.items()}  # as the metadata holds them
    if settings.get("load_in_8bit") == "True":
        return "in 8 bits"
    if settings.get("load_in_4bit") == "True":
        nested = ", nested" if settings.get("bnb_4bit_use_double_quant") == "True" else ""
        return f"in 4 bits ({settings.get('bnb_4bit_quant_type', 'fp4')}{nested})"
    return printable(f"with quantization {settings.get('quant_method', '').rpartition('.')[2].lower()}".rstrip())
