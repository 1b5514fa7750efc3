"""Check that an adapter is loaded onto the base model that it was trained on.

base_model.json beside the adapter identifies it. Only what can be compared exactly is compared: not quantized weights,
nor those of another dtype than in training, nor sharded ones.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import logging

from .hub_access import find_file, from_cache_if_unreachable
from .provenance import holds_weights, public_name, weights_tell
from .weights import base_fingerprint, describe_model, is_peft_model, leaves_base, lies_beside, weight_fingerprint


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftConfig


logger = logging.get_logger(__name__)

FILE_NAME = "base_model.json"
_KEYS = ("model", "revision", "dtype", "weights")


def describe_base(model: torch.nn.Module, weights: str | None = None) -> dict[str, Any] | None:
    """
    What identifies the base model of an adapter, as JSON-serializable values without a local path.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model with its adapter.
        weights (`str`, *optional*): [`~trl_lightreasoner.models.weights.weight_fingerprint`] of the base model, if it
            is known.

    Returns:
        `None` if there is no adapter, if the base model is quantized or sharded, or if the adapter changes it; and in
        every process but the main one.
    """
    if not is_peft_model(model) or not holds_weights(model):
        return None
    described = describe_model(model.get_base_model())
    if described["quantization"] or not all(map(_leaves_layers, model.peft_config.values())):
        return None
    described |= {"model": public_name(described["model"]), "weights": weights or base_fingerprint(model)}
    return {key: described[key] for key in _KEYS}


def _leaves_layers(config: "PeftConfig") -> bool:
    """Whether the base model's own tensors can be told from those of an adapter, and are as they were."""
    return lies_beside(config) and leaves_base(config)


def save_base(base: dict[str, Any] | None, folder: str) -> None:
    """Write the result of [`describe_base`] beside an adapter. `None` removes that of an earlier adapter."""
    path = Path(folder, FILE_NAME)
    if base is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def is_another_base(before: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    """Whether two results of [`describe_base`] are known to be of different weights."""
    if before is None or now is None:
        return False
    return weights_tell(before, now) and before["weights"] != now["weights"]


def warn_of_another_base(adapter: str, model: torch.nn.Module, **kwargs: Any) -> None:
    """
    Warn if a model is known not to be the one that an adapter was trained on.

    Args:
        adapter (`str`): Id or path of the adapter.
        model ([`~transformers.PreTrainedModel`]): The base model, before the adapter is loaded onto it.
        kwargs: How to find the adapter on the Hub.

    Raises:
        `ValueError`: If base_model.json is damaged.
    """
    trained, now = _load_base(adapter, **kwargs), describe_model(model)
    if trained is None or not weights_tell(trained, now) or not holds_weights(model):
        return
    if trained["weights"] != weight_fingerprint(model):
        logger.warning(
            f"The adapter {adapter!r} was trained on other weights than its base model {now['model']!r} has now, so "
            "the two together are not the model that was trained: restore the former base model, or train the "
            "adapter again."
        )


@from_cache_if_unreachable
def _load_base(adapter: str, **kwargs: Any) -> dict[str, Any] | None:
    if (path := find_file(adapter, FILE_NAME, **kwargs)) is None:
        return None
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: base[key] for key in _KEYS}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"The {FILE_NAME} of {adapter!r} cannot be read: {error}. Save or download the adapter again, or remove "
            "the file."
        ) from error
