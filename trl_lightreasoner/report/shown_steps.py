"""The trajectories of a Dataset that a report shows, and what expert and amateur say at their kept steps.

A Dataset holds v_C, but not pi_E and pi_A, which are read again, in one forward pass a trajectory and model, where the
models are at hand. What they say is shown only if it gives v_C again.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.answering import context_length
from ..models.forward import accepts_logits_to_keep, attention_backends, forward_at
from ..models.loading import load_config, load_model, load_tokenizer
from ..models.token_text import TokenTexts
from ..models.weights import get_base_model
from ..sampling.model_pair import AMATEUR_SETTINGS
from ..sampling.pair_check import PairCheck
from ..vocabulary import Vocabulary, shared_vocabulary
from .statistics import StepStatistics


if TYPE_CHECKING:  # slow to import, and a run without an adapter does without
    from peft import PeftModel


# As users name a model: id, path, or the model
NamedModel: TypeAlias = "str | PreTrainedModel | PeftModel"

MAX_TOKENS = 512  # of a completion that are shown
# Mean over the steps of the total variation between v_C as it was stored and as the models give it now. Rounding in
# half precision leaves less, another model or revision more
_MAX_VARIATION = 0.1


class ShownStep(NamedTuple):
    """
    A kept step.

    Attributes:
        position (`int`): t.
        token_ids (`list[int]`): Support of v_C, most probable first, and the token that was taken, if it is outside.
        label_probs (`list[float]`): v_C there.
        expert_probs, amateur_probs (`list[float]`, *optional*): pi_E and pi_A there.
    """

    position: int
    token_ids: list[int]
    label_probs: list[float]
    expert_probs: list[float] | None = None
    amateur_probs: list[float] | None = None


@dataclass
class ShownTrajectory:
    """A row of the Dataset, cut to `MAX_TOKENS` tokens of its completion."""

    row: int
    prompt: Any  # the column, if there is one: text or messages
    prompt_ids: list[int]
    completion_ids: list[int]
    kl_divergence: list[float | None]
    num_tokens: int
    steps: list[ShownStep] = field(default_factory=list)


@dataclass
class ReportedDataset:
    """
    All that a report says of one Dataset.

    Attributes:
        name (`str`): What it is called.
        metadata (`dict`): What [`made_with`] says.
        statistics ([`StepStatistics`]): Over every row.
        texts ([`TokenTexts`]): Of its tokens.
        trajectories (`list[ShownTrajectory]`): Those that are shown.
        notes (`list[str]`): Sentences on what could not be shown, and why.
        check ([`PairCheck`], *optional*): Judgement of the pair; None where a divergence is not known.
    """

    name: str
    metadata: dict[str, Any]
    statistics: StepStatistics
    texts: TokenTexts
    trajectories: list[ShownTrajectory]
    notes: list[str]
    check: PairCheck | None = None


def choose_rows(statistics: list[StepStatistics], count: int, seed: int) -> tuple[list[list[int]], bool]:
    """
    Rows to show of each of several Datasets: drawn at random from those with a kept step, in the Dataset's order.

    Args:
        statistics (`list[StepStatistics]`): Of each Dataset.
        count (`int`): How many of each, at most.
        seed (`int`): Of the draw.

    Returns:
        The rows of each, and whether they are of the same prompts, one by one, as they are where all hold enough of
        them.
    """
    candidates = []
    for each in statistics:
        _, firsts = np.unique(each.trajectory_keys, return_index=True)
        kept = firsts[each.kept_per_row[firsts] > 0]
        candidates.append(np.sort(kept if len(kept) else firsts))
    draw = np.random.default_rng(seed)
    if len(statistics) > 1:
        # One row a prompt, whether it has a kept step in the others or not
        places = [
            dict(zip(each.prompt_keys[::-1].tolist(), range(each.num_rows)[::-1], strict=True)) for each in statistics
        ]
        first = [row for row in candidates[0].tolist() if row == places[0][statistics[0].prompt_keys[row].item()]]
        keys = [statistics[0].prompt_keys[row].item() for row in first]
        shared = [key for key in keys if all(key in place for place in places)]
        if len(shared) >= min(count, len(first)):
            chosen = np.sort(draw.choice(len(shared), min(count, len(shared)), replace=False))
            return [[place[shared[i]] for i in chosen] for place in places], True
    return [np.sort(draw.choice(rows, min(count, len(rows)), replace=False)).tolist() for rows in candidates], False


def load_trajectories(dataset: Dataset, rows: list[int]) -> list[ShownTrajectory]:
    """The rows as a report shows them, without what the models say."""
    shown = []
    for index, row in zip(rows, dataset.with_format(None).select(rows), strict=True):
        trajectory = ShownTrajectory(
            index,
            row.get("prompt"),
            row["prompt_ids"],
            row["completion_ids"][:MAX_TOKENS],
            row["kl_divergence"][:MAX_TOKENS],
            len(row["completion_ids"]),
        )
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            if t < MAX_TOKENS:
                taken = row["completion_ids"][t]
                outside = [] if taken in ids else [taken]
                trajectory.steps.append(ShownStep(t, ids + outside, probs + [0.0] * len(outside)))
        shown.append(trajectory)
    return shown


def find_tokenizer(metadata: dict[str, Any], expert: "NamedModel | None") -> PreTrainedTokenizerBase | str:
    """
    The tokenizer of the expert, or why there is none.

    Raises:
        `ValueError`: If the user named the expert, and there is none beside it.
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
) -> str | None:
    """
    Let expert and amateur read the trajectories, for their probabilities at the kept steps.

    Args:
        trajectories (`list[ShownTrajectory]`): Whose steps are replaced.
        metadata (`dict`): What [`made_with`] says.
        expert, amateur (`str` or model, *optional*): Ids or paths, or the models. By default they are those that
            `metadata` names, if they are on this machine.

    Returns:
        `str`: Why nothing was added, or `None`.

    Raises:
        `ValueError`: If a model that the user named cannot be used.
    """
    if not any(trajectory.steps for trajectory in trajectories):
        return None
    if "amateur_reading" in metadata:
        return "the amateur has another tokenizer than the expert"
    settings = metadata.get("settings") or {}
    if any(settings.get(name) is not None for name in AMATEUR_SETTINGS):
        return "the amateur was read without some of its layers, or behind another prompt"
    roles, named = ("expert", "amateur"), (expert, amateur)
    sources = [_source(metadata, role, name) for role, name in zip(roles, named, strict=True)]
    for role, name, (source, kwargs) in zip(roles, named, sources, strict=True):
        if source is None:
            return f"the dataset does not name its {role}"
        if name is None:
            kwargs["local_files_only"] = True
    try:
        tokenizers = [
            load_tokenizer(name, role, **kwargs) for role, (name, kwargs) in zip(roles, sources, strict=True)
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
            f"expert and amateur, as they are here, give another v_C than the dataset holds (total variation "
            f"{variation:.2f})"
        )
        if expert is not None or amateur is not None:
            raise ValueError(f"The models cannot be the ones that were sampled: {reason}. Name those.")
        return reason
    for trajectory, experts, amateurs in zip(trajectories, *probabilities, strict=True):
        trajectory.steps = [
            step._replace(expert_probs=expert_probs, amateur_probs=amateur_probs)
            for step, expert_probs, amateur_probs in zip(trajectory.steps, experts, amateurs, strict=True)
        ]
    return None


def _source(
    metadata: dict[str, Any], role: str, name: "NamedModel | None"
) -> "tuple[NamedModel | None, dict[str, Any]]":
    """Id or path of a model, or the model, and the arguments with which it is loaded as it was sampled."""
    made = metadata.get(role) or {}
    kwargs = {"dtype": made.get("dtype") or "auto"}
    if name is not None:
        return name, kwargs
    if made.get("adapter"):  # by name, or as an object of which only its adapters' names are known
        return (made["adapter"] if isinstance(made["adapter"], str) else None), kwargs
    return made.get("model"), kwargs | ({"revision": made["revision"]} if made.get("revision") else {})


@torch.no_grad()
def _read(
    model: torch.nn.Module, role: str, trajectories: list[ShownTrajectory], vocabulary: Vocabulary
) -> list[list[list[float]]]:
    """Probabilities of the tokens of each step of each trajectory."""
    device = get_base_model(model).get_input_embeddings().weight.device
    to_keep = accepts_logits_to_keep(model)
    width = get_base_model(model).config.get_text_config().vocab_size
    if any(token_id >= width for each in trajectories for token_id in each.prompt_ids + each.completion_ids[:-1]):
        raise ValueError(f"the dataset holds tokens beyond the {width} that the {role} has embeddings for")
    context = context_length(get_base_model(model).config.get_text_config())
    if any(len(each.prompt_ids) + each.steps[-1].position > context for each in trajectories if each.steps):
        raise ValueError(f"the dataset holds steps beyond the {context} tokens that the {role} reads at most")
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
                raise ValueError("a label of the dataset holds a token that the two models do not share")
            of_steps.append(step_logps[vocabulary.columns_of(step_ids)].exp().tolist())
        probabilities.append(of_steps)
    return probabilities


def _variation(trajectories: list[ShownTrajectory], experts: list, amateurs: list, settings: dict[str, Any]) -> float:
    """Mean total variation between v_C as it is stored and as the two models' probabilities give it."""
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
