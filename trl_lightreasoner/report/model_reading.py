"""Probabilities of expert, amateur and trained model at the kept steps that a report shows.

A Dataset holds v_C, but not pi_E and pi_A. If the models are available, they are computed again, with one forward pass
per trajectory and model. They are shown only if they reproduce v_C.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.adapter_loading import count_saved_embeddings, load_adapter, load_adapter_config
from ..models.forward import accepts_logits_to_keep, attention_backends, context_length, forward_at
from ..models.loading import load_config, load_model, load_tokenizer
from ..models.weights import comes_off, get_base_model
from ..sampling.model_pair import AMATEUR_SETTINGS
from ..vocabulary import Vocabulary, model_vocabulary, shared_vocabulary
from .shown_steps import ShownTrajectory


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftModel


# How users give a model: an id, a path, or the model
NamedModel: TypeAlias = "str | PreTrainedModel | PeftModel"

# Largest mean over the steps of the total variation between the stored v_C and the recomputed one. Rounding in half
# precision causes less, and another model or revision causes more
_MAX_VARIATION = 0.1


def find_tokenizer(metadata: dict[str, Any], expert: "NamedModel | None") -> PreTrainedTokenizerBase | str:
    """
    The tokenizer of the expert, or why there is none.

    Raises:
        `ValueError`: If the user named the expert, and it has no tokenizer.
    """
    name, kwargs = _source(metadata, "expert", expert)
    if name is None:
        return "the dataset does not name its expert"
    try:
        return load_tokenizer(name, "expert", **kwargs)
    except (ValueError, OSError) as error:
        if expert is not None:
            raise
        return _reason(error)


def add_probabilities(
    trajectories: list[ShownTrajectory],
    metadata: dict[str, Any],
    expert: "NamedModel | None",
    amateur: "NamedModel | None",
    expert_tokenizer: PreTrainedTokenizerBase | None = None,
    amateur_tokenizer: PreTrainedTokenizerBase | None = None,
) -> str | None:
    """
    Add the probabilities of expert and amateur at the kept steps of the trajectories.

    Args:
        trajectories (`list[ShownTrajectory]`): Trajectories, whose steps are replaced.
        metadata (`dict`): Result of [`made_with`].
        expert, amateur (`str` or model, *optional*): Ids or paths, or the models. By default they are those that
            `metadata` names, if they are on this machine.
        expert_tokenizer, amateur_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Their tokenizers,
            if they are loaded.

    Returns:
        `str` or `None`: The reason if nothing was added.

    Raises:
        `ValueError`: If a model named by the user cannot be used.
    """
    if not any(trajectory.steps for trajectory in trajectories):
        return None
    if "amateur_reading" in metadata:
        return "the amateur's tokenizer differs from the expert's"
    settings = metadata.get("settings") or {}
    if any(settings.get(name) is not None for name in AMATEUR_SETTINGS):
        return "the amateur was read with skipped layers, or with a different prompt"
    roles, named = ("expert", "amateur"), (expert, amateur)
    sources = [_source(metadata, role, name) for role, name in zip(roles, named, strict=True)]
    for role, name, (source, kwargs) in zip(roles, named, sources, strict=True):
        if source is None:
            return f"the dataset does not name its {role}"
        if name is None:
            kwargs["local_files_only"] = True
    try:
        tokenizers = [
            load_tokenizer(name, role, **kwargs) if tokenizer is None else tokenizer
            for role, tokenizer, (name, kwargs) in zip(
                roles, (expert_tokenizer, amateur_tokenizer), sources, strict=True
            )
        ]
        configs = [load_config(name, role, **kwargs) for role, (name, kwargs) in zip(roles, sources, strict=True)]
        vocabulary = shared_vocabulary(*tokenizers, *(config.get_text_config().vocab_size for config in configs))
        probabilities = [
            _read(load_model(name, **kwargs).eval(), role, trajectories, vocabulary)
            for role, (name, kwargs) in zip(roles, sources, strict=True)
        ]
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: out of memory
        if expert is not None or amateur is not None:
            raise ValueError(f"The models cannot be read: {_reason(error)}.") from error
        return _reason(error)
    experts, amateurs = probabilities
    variation = _variation(trajectories, experts, amateurs, settings)
    if not variation <= _MAX_VARIATION:
        reason = (
            "expert and amateur, as loaded here, give a v_C that differs from the dataset's (total variation "
            f"{variation:.2f})"
        )
        if expert is not None or amateur is not None:
            raise ValueError(f"These cannot be the sampled models: {reason}. Name the sampled models.")
        return reason
    for trajectory, experts, amateurs in zip(trajectories, *probabilities, strict=True):
        trajectory.steps = [
            step._replace(expert_probs=expert_probs, amateur_probs=amateur_probs)
            for step, expert_probs, amateur_probs in zip(trajectory.steps, experts, amateurs, strict=True)
        ]
    return None


def add_trained(
    trajectories: list[ShownTrajectory],
    metadata: dict[str, Any],
    trained: "NamedModel",
    expert: "NamedModel | None",
    tokenizer: PreTrainedTokenizerBase,
    own_tokenizer: PreTrainedTokenizerBase | None = None,
    local_files_only: bool = False,
) -> None:
    """
    Add the probabilities of the trained model at the kept steps of the trajectories.

    Args:
        trajectories (`list[ShownTrajectory]`): Trajectories, whose steps are replaced.
        metadata (`dict`): Result of [`made_with`].
        trained (`str` or model): Id or path of a model or an adapter, or the model.
        expert (`str` or model, *optional*): The expert as the user gave it. If it is a loaded model, an adapter is
            loaded onto it temporarily.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The expert's.
        own_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The trained model's, if it is loaded.
        local_files_only (`bool`): Whether to use only files on this machine.

    Raises:
        `ValueError`: If the model cannot be found or read, or its tokens differ from the expert's.
    """
    if not any(trajectory.steps for trajectory in trajectories):
        return
    kwargs: dict[str, Any] = {"dtype": _dtype(metadata.get("expert") or {})}
    kwargs |= {"local_files_only": True} if local_files_only else {}
    if own_tokenizer is None:
        own_tokenizer = load_tokenizer(trained, "trained model", **kwargs)
    try:
        if own_tokenizer is not tokenizer and own_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError("its tokens differ from the expert's")
        if isinstance(trained, str) and isinstance(expert, PreTrainedModel) and _lies_on(trained, expert):
            generation_config = expert.generation_config
            adapted = load_adapter(expert, trained).eval()
            try:
                probabilities = _read_with(adapted, trajectories, tokenizer)
            finally:
                adapted.unload()
                expert.generation_config = generation_config
        else:
            probabilities = _read_with(load_model(trained, **kwargs).eval(), trajectories, tokenizer)
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: out of memory
        raise ValueError(f"The trained model cannot be read: {_reason(error)}.") from error
    for trajectory, of_steps in zip(trajectories, probabilities, strict=True):
        trajectory.steps = [
            step._replace(trained_probs=probs) for step, probs in zip(trajectory.steps, of_steps, strict=True)
        ]


def _lies_on(trained: str, expert: PreTrainedModel) -> bool:
    """Whether a model is an adapter that a loaded expert can take on and off, with as many embeddings as it has."""
    rows = (None, expert.get_input_embeddings().weight.shape[0])
    config = load_adapter_config(trained)
    return config is not None and comes_off(config) and count_saved_embeddings(trained) in rows


def _read_with(
    model: torch.nn.Module, trajectories: list[ShownTrajectory], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[float]]]:
    width = get_base_model(model).config.get_text_config().vocab_size
    return _read(model, "trained model", trajectories, model_vocabulary(tokenizer, width, "trained model"))


def _dtype(made: dict[str, Any]) -> str:
    """The data type in which a model was sampled, or float32 for float16 on a CPU, where float16 is slow."""
    dtype = made.get("dtype") or "auto"
    return "float32" if dtype == "float16" and PartialState().device.type == "cpu" else dtype


def _source(
    metadata: dict[str, Any], role: str, name: "NamedModel | None"
) -> "tuple[NamedModel | None, dict[str, Any]]":
    """Id or path of a model, or the model, and the arguments to load it as it was loaded for sampling."""
    made = metadata.get(role) or {}
    kwargs = {"dtype": _dtype(made)}
    if name is not None:
        return name, kwargs
    labels_are_of_base = (metadata.get("settings") or {}).get("label_expert") == "base"
    # An adapter given by name, or as an object, of which only the adapters' names are known
    if made.get("adapter") and not (role == "expert" and labels_are_of_base):
        return (made["adapter"] if isinstance(made["adapter"], str) else None), kwargs
    return made.get("model"), kwargs | ({"revision": made["revision"]} if made.get("revision") else {})


@torch.no_grad()
def _read(
    model: torch.nn.Module, role: str, trajectories: list[ShownTrajectory], vocabulary: Vocabulary
) -> list[list[list[float]]]:
    """Probabilities of the tokens at each step of each trajectory."""
    device = get_base_model(model).get_input_embeddings().weight.device
    to_keep = accepts_logits_to_keep(model)
    width = get_base_model(model).config.get_text_config().vocab_size
    if any(token_id >= width for each in trajectories for token_id in each.prompt_ids + each.completion_ids[:-1]):
        raise ValueError(f"the dataset holds tokens beyond the {width} that the {role} has embeddings for")
    context = context_length(get_base_model(model).config)
    longest = max((len(each.prompt_ids) + each.steps[-1].position for each in trajectories if each.steps), default=0)
    if context is not None and longest > context:
        raise ValueError(f"the dataset holds steps beyond the {role}'s maximum of {context} tokens")
    probabilities: list[list[list[float]]] = []
    for trajectory in tqdm(trajectories, f"Reading the {role}", leave=False, disable=None):
        if not trajectory.steps:
            probabilities.append([])
            continue
        positions = [len(trajectory.prompt_ids) + step.position - 1 for step in trajectory.steps]
        ids = torch.tensor([(trajectory.prompt_ids + trajectory.completion_ids)[: positions[-1] + 1]], device=device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[0, positions] = True
        with attention_backends(device):
            logits = forward_at(model, mask, to_keep, input_ids=ids).logits
        logps = vocabulary.select(logits).float().log_softmax(-1).cpu()
        of_steps = []
        for step, step_logps in zip(trajectory.steps, logps, strict=True):
            step_ids = torch.tensor(step.token_ids)
            if not vocabulary.contains(step_ids).all():
                raise ValueError(f"a label of the dataset holds a token that the {role} lacks")
            of_steps.append(step_logps[vocabulary.columns_of(step_ids)].exp().tolist())
        probabilities.append(of_steps)
    return probabilities


def _variation(trajectories: list[ShownTrajectory], experts: list, amateurs: list, settings: dict[str, Any]) -> float:
    """Mean total variation between the stored v_C and the one from the two models' probabilities."""
    strength, anchor = settings.get("contrast_strength", 1.0), settings.get("expert_anchor", 0.0)
    variations = []
    for trajectory, *probabilities in zip(trajectories, experts, amateurs, strict=True):
        for step, expert, amateur in zip(trajectory.steps, *probabilities, strict=True):
            label = np.array(step.label_probs)
            with np.errstate(divide="ignore", invalid="ignore"):
                logs = (strength + anchor) * np.log(expert) - strength * np.log(amateur)
                ratios = np.where(label > 0, np.exp(logs - np.where(label > 0, logs, -np.inf).max()), 0)
                variations.append(np.abs(ratios / ratios.sum() - label).sum() / 2)
    return float(np.mean(variations))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
