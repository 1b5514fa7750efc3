"""How sampled rows were made: their metadata, and everything that decides whether a run can be resumed."""

import hashlib
import importlib.metadata
import json
import platform
from datetime import datetime
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..models.weights import describe_loading, describe_model, weight_fingerprint
from ..steps.messages import prints_date
from ..steps.prompt_format import PromptFormat
from ..steps.writer import hash_ids
from ..vocabulary import Vocabulary


_PACKAGES = ("trl", "transformers", "peft", "datasets", "torch")


def make_metadata(
    models: dict[str, tuple[torch.nn.Module, str | None]],
    identity: dict[str, Any],
    settings: dict[str, Any],
    batch_size: int,
    shared: dict[str, Any],
    eos_ids: list[int],
    prompt_format: PromptFormat | None,
    tokenizer: PreTrainedTokenizerBase,
    vllm_version: str | None,
    prompt_source: dict[str, Any] | None = None,
    date: datetime | None = None,
) -> dict[str, Any]:
    """
    The metadata that [`sampling_metadata`] returns, as JSON-serializable values.

    Args:
        models (`dict[str, tuple]`): By role, the model, and its id or path if the user named one.
        identity (`dict[str, Any]`): Results of [`identify_model`] for these models.
        settings (`dict[str, Any]`): Those that the rows depend on.
        batch_size (`int`): Number of prompts processed together.
        shared (`dict[str, Any]`): Facts about the tokens that the two models share.
        eos_ids (`list[int]`): Tokens that end an answer.
        prompt_format ([`PromptFormat`], *optional*): How the prompts were made from questions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The expert's.
        vllm_version (`str`, *optional*): Version of the vLLM that generated the completions.
        prompt_source (`dict[str, Any]`, *optional*): Where the prompts were loaded from, as of [`source_of`].
        date ([`~datetime.datetime`], *optional*): When the run was started. It is stored if the chat template prints
            it.
    """
    return {
        "method": "LightReasoner (arXiv 2510.07962)",
        **{
            role: {**describe_model(model, name), "weights": identity[f"{role} weights"]}
            for role, (model, name) in models.items()
        },
        "settings": settings,
        "per_device_batch_size": batch_size,
        **shared,
        "eos_token_ids": eos_ids,
        **({} if prompt_source is None else {"prompt_source": prompt_source}),
        "prompt_format": prompt_format and prompt_format.to_dict(),
        "chat_template_sha256": hash_template(tokenizer),
        **({"date": date.isoformat()} if date is not None and prints_date(tokenizer) else {}),
        "versions": {
            "python": platform.python_version(),
            "trl-lightreasoner": __version__,
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
            **({} if vllm_version is None else {"vllm": vllm_version}),
        },
    }


def identify_model(role: str, model: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    What the rows depend on of a model, by the user's names.

    Args:
        role (`str`): `"expert"` or `"amateur"`.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        kwargs (`dict[str, Any]`): As for [`~trl_lightreasoner.models.loading.load_model`].
    """
    return {
        f"{role} dtype": str(model.dtype),
        **describe_loading(model, role, kwargs),
        f"{role} weights": weight_fingerprint(model),
    }


def identify_tokens(vocabulary: Vocabulary, eos_ids: list[int], encoded: Dataset) -> dict[str, Any]:
    """
    What the rows depend on of the tokens, by the user's names.

    Args:
        vocabulary ([`Vocabulary`]): The tokens that the two models share.
        eos_ids (`list[int]`): Tokens that end an answer.
        encoded ([`~datasets.Dataset`]): The prompts as token ids.
    """
    return {
        "shared vocabulary": hashlib.sha256(vocabulary.ids.numpy().tobytes()).hexdigest(),
        "EOS tokens": eos_ids,
        "number of prompts": len(encoded),
        "prompts (tokens)": hash_ids(ids for row in encoded for ids in row.values()),
    }


def hash_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum of a tokenizer's chat template, that of an empty text if there is none."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)  # several by name
    return hashlib.sha256(text.encode()).hexdigest()
