"""What merging an adapter into its base model needs, and which adapters no plain model can replace."""

import re
from typing import Any

import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.peft_utils import find_adapter_config_file

from .adapter_loading import check_adapter, load_adapter
from .loading import load_config


# PEFT cannot merge these. What most of them add depends on the input
_UNMERGEABLE_TYPES = ("ADAPTION_PROMPT", "LILY")


def find_adapter(name: str, revision: str | None = None) -> PeftConfig:
    """
    The configuration of the adapter with this id or path.

    Raises:
        `ValueError`: If there is none, or its type cannot be merged.
    """
    try:
        found = find_adapter_config_file(name, revision=revision)
    except OSError:  # neither a folder nor an id
        found = None
    if found is None:
        raise ValueError(
            f"{name!r} is not an adapter: there is no adapter_config.json. Name the folder of `lightreasoner train`, "
            "or the Hub id of an adapter. A model without an adapter needs no merging."
        )
    adapter = PeftConfig.from_pretrained(name, revision=revision)
    check_adapter(adapter, "model")
    if adapter.peft_type in _UNMERGEABLE_TYPES:
        reason = adapter.peft_type.value
    elif getattr(adapter, "layer_replication", None):
        reason = "LoRA with `layer_replication`"
    else:
        return adapter
    raise ValueError(
        f"An adapter of this type ({reason}) cannot be merged into the weights of its base model. Load it with PEFT "
        "instead, or train an adapter of another type, such as LoRA."
    )


def check_base(base: str, adapter: PeftConfig, **kwargs: Any) -> None:
    """
    Refuse a base model into whose weights an adapter cannot be merged, without loading it.

    Args:
        base (`str`): Id or path.
        adapter ([`~peft.PeftConfig`]): Configuration of the adapter.
        kwargs: As for [`~trl_lightreasoner.models.loading.load_model`].

    Raises:
        `ValueError`: If it cannot be found, is an adapter itself, is quantized, or ties embeddings that the adapter
            changes.
    """
    try:
        config = load_config(base, "base model", **kwargs)
    except ValueError as error:
        if base != adapter.base_model_name_or_path:
            raise
        raise ValueError(
            f"{error} The adapter's config names this base model. If it has moved, give its path with "
            "`base_model_name_or_path`."
        ) from error
    if find_adapter_config_file(base, revision=kwargs.get("revision")) is not None:
        raise ValueError(
            f"The base model {base!r} is itself an adapter. Merge it first, and name the result with "
            "`base_model_name_or_path`."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The base model {base!r} is quantized, so merging into its weights would round the adapter away. Name "
            "the same model in full precision with `base_model_name_or_path`."
        )
    names = _find_tied(config, adapter, kwargs.get("trust_remote_code", False))
    if names:
        raise ValueError(
            f"The adapter changes {' and '.join(names)}, and the base model ties its input and output embeddings. "
            "Merging would change both, or untie them. Load the adapter with PEFT instead, or train one without them "
            "in `target_modules` and `modules_to_save`."
        )


def _find_tied(config: PretrainedConfig, adapter: PeftConfig, trust_remote_code: bool) -> list[str]:
    """Names of the tied embeddings that the adapter changes as modules."""
    if not getattr(config, "tie_word_embeddings", False):
        return []
    with torch.device("meta"):  # names only, no weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is each for each in embeddings)]
    saved = getattr(adapter, "modules_to_save", None) or []
    has_targets = getattr(adapter, "target_modules", None) is not None
    return [
        name
        for name in names
        if any(f".{name}".endswith(f".{each}") for each in saved)
        or (has_targets and check_target_module_exists(adapter, name))
    ]


def find_tokenizer(name: str, revision: str | None, base: str, base_kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """
    The tokenizer of an adapter, or else that of its base model.

    Args:
        name, revision (`str`): Where to find the adapter.
        base (`str`): Id or path of its base model.
        base_kwargs (`dict[str, Any]`): Where to find the base model, as for
            [`~trl_lightreasoner.models.loading.load_model`].

    Raises:
        `ValueError`: If there is none.
    """
    source, kwargs = name, {**base_kwargs, "revision": revision}
    try:
        if not get_tokenizer_config(source, revision=revision):
            source, kwargs = base, base_kwargs
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # without files transformers makes an empty one
            return tokenizer
        reason = "there is none"
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
    raise ValueError(
        f"No tokenizer can be loaded from {source!r} ({reason}). Save the model's tokenizer in the adapter's folder."
    )


def check_weights(name: str, revision: str | None = None) -> None:
    """
    Refuse an adapter whose weights cannot be merged, before the base model is loaded.

    Raises:
        `ValueError`: If they are missing, damaged or not finite.
    """
    try:
        weights = load_peft_weights(name, device="cpu", revision=revision)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"The weights of the adapter {name!r}, adapter_model.safetensors, are missing or damaged. Merge "
            "another checkpoint, or download or save the file again."
        ) from error
    broken = [tensor for tensor, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"The adapter's weights contain NaN or infinity, first in {broken[0]!r}. Merge an earlier checkpoint, or "
            "train it again."
        )


def load_fitting(model: PreTrainedModel, name: str, revision: str | None = None) -> PeftModel:
    """
    Load an adapter onto its base model.

    Raises:
        `ValueError`: If it does not fit, or changes a weight that the model uses in several places.
    """
    try:
        adapted = load_adapter(model, name, revision=revision)
    except ValueError as error:
        raise ValueError(f"{error} Name it with `base_model_name_or_path`.") from error
    parameters = dict(adapted.get_base_model().named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for place, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(place)
    for shared in names.values():
        is_adapted = any(".base_layer." in each for each in shared)
        if len(shared) > 1 and is_adapted and not _tokens_stay_tied(shared, parameters):
            where = " and ".join(re.sub(r"\.(token_adapter\.)?base_layer\.", ".", each) for each in shared[:2])
            raise ValueError(
                f"The adapter changes a weight that the base model uses in several places ({where}). Merging it into "
                "one would change the others. Load the adapter with PEFT instead."
            )
    return adapted


def _tokens_stay_tied(places: list[str], parameters: dict[str, torch.nn.Parameter]) -> bool:
    """Whether the same trained tokens, and nothing else, change a weight at all of its places."""
    trained = [parameters.get(each.replace("base_layer.weight", "trainable_tokens_delta.default")) for each in places]
    return all(".token_adapter." in each for each in places) and len({id(each) for each in trained}) == 1


def merge(adapted: PeftModel) -> PreTrainedModel:
    """
    Merge an adapter into the weights of its model.

    Raises:
        `ValueError`: If PEFT cannot merge it, or a weight is NaN or infinite, as of a base model that overflows in
            float16.
    """
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        if not isinstance(error, NotImplementedError | ValueError) and "lora_bias" not in str(error):
            raise  # such as memory that has run out
        reason = str(error).rstrip(".")
        raise ValueError(f"PEFT cannot merge the adapter: {reason}. Load it with PEFT instead.") from error
    broken = next((name for name, weight in merged.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        raise ValueError(
            f"The merged weights contain NaN or infinity, first in {broken!r}. Merge in another `dtype`, such as "
            "bfloat16 or float32, or check the base model's weights."
        )
    return merged
