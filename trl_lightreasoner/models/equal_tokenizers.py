"""Whether two models have equal tokenizers, so that one is loaded: with 150,000 tokens this takes a second."""

import json
from pathlib import Path
from typing import Any

from .adapter_loading import load_adapter_config
from .hub_access import cache_if_unreachable, find_file
from .loading import hub_kwargs


_FILES = ("tokenizer.json", "added_tokens.json", "special_tokens_map.json")


def have_equal_tokenizers(*models: tuple[Any, dict[str, Any]]) -> bool:
    """
    Whether the files of all tokenizers are equal, apart from their chat templates.

    Args:
        models: Each with the keyword arguments of [`load_model`]. The models must have one architecture, on which the
            class of a tokenizer can depend.

    Returns:
        `bool`: `False` also where the files do not tell: for a model in memory, an adapter, a tokenizer without a
        tokenizer.json, or one with code of its own.
    """
    if not all(isinstance(model, str) for model, _ in models):
        return False
    with cache_if_unreachable(*(model for model, _ in models)):
        first, *others = (_read_files(model, **hub_kwargs(kwargs)) for model, kwargs in models)
    return first is not None and all(first == other for other in others)


def _read_files(model: str, **kwargs: Any) -> list[Any] | None:
    """What a tokenizer is made of, or `None` if it is not known."""
    if load_adapter_config(model, **kwargs) is not None:
        return None
    config, *paths = (find_file(model, name, **kwargs) for name in ("tokenizer_config.json", *_FILES))
    if config is None or paths[0] is None:
        return None
    try:
        settings = json.loads(Path(config).read_text(encoding="utf-8"))
    except ValueError:  # which loading will explain
        return None
    if not isinstance(settings, dict) or "auto_map" in settings:
        return None
    settings.pop("chat_template", None)
    return [settings, *(path and Path(path).read_bytes() for path in paths)]
