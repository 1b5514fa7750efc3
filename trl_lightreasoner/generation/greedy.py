"""Greedy decoding on raw logits.

A checkpoint's generation_config may contain temperatures, penalties, and suppressed or forced tokens. None of them is
part of pi_E, so all of it is ignored while `generate` runs. Only its EOS tokens are used, through `find_eos_ids`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from ..contrast import NonFiniteLogitsError
from ..models.forward import logits_of_row, room_to_look, same_logits, without_routers
from ..models.loading import load_eos_ids
from ..models.weights import get_base_model
from ..steps.prompts import end_of_turn
from ..vocabulary import Vocabulary


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftModel

Alike = Literal["any", "length", "row"]

_PROBED_TOKENS = 3
_LOOKED_AT = 32


class OnlyTokens(LogitsProcessor):
    """
    Keeps the logits of real tokens, and excludes the columns that belong to no token. It notes the length of each
    row's first context without a most probable token.
    """

    broken_at: torch.Tensor | None = None  # on the device, so that no token waits for it

    def __init__(self, vocabulary: Vocabulary, width: int):
        self.padding = ~vocabulary.contains(torch.arange(width))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.masked_fill(self.padding.to(scores.device), float("-inf"))
        broken_at = torch.where(is_broken(scores), input_ids.shape[1], torch.iinfo(torch.long).max)
        self.broken_at = broken_at if self.broken_at is None else torch.minimum(self.broken_at, broken_at)
        return scores


def is_broken(logits: torch.Tensor) -> torch.Tensor:
    """Whether no token is the most probable one of logits `(..., V)`, because one is NaN or infinite, `(...)`."""
    return ~logits.amax(-1).isfinite()


def find_eos_ids(
    model: "str | PreTrainedModel | PeftModel", tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> list[int]:
    """
    Every id that ends an answer, in sampling, in evaluation and in saved models.

    These are the tokenizer's EOS, those in the model's generation_config or else its config, and the token with which
    the chat template ends the assistant's turn. A base model that is prompted with a chat template ends its answer
    with that token, and continues with a question of its own. The model is not loaded. `kwargs` are as for
    [`load_model`].
    """
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *load_eos_ids(model, **kwargs)} - {None})


def save_generation_config(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """
    Save the generation_config of a model, or of an adapter's base model, with every token that ends an answer. So a
    model loaded from the folder stops where it stopped in sampling and evaluation.
    """
    config = copy.deepcopy(get_base_model(model).generation_config) or GenerationConfig()
    ids = find_eos_ids(model, tokenizer)
    config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    # `save_pretrained` refuses settings of many checkpoints, such as a temperature without sampling
    config.to_json_file(str(Path(folder, GENERATION_CONFIG_NAME)), use_diff=True)


@torch.no_grad()
def generate_greedy(
    model: torch.nn.Module,
    prompt_ids: list[list[int]],
    vocabulary: Vocabulary,
    eos_ids: list[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """
    The most probable continuation of each prompt, token by token.

    Args:
        model (`torch.nn.Module`): A causal language model, in eval mode.
        prompt_ids (`list[list[int]]`): Prompts of any lengths, none empty.
        vocabulary ([`Vocabulary`]): The model's real tokens. No other token is ever chosen.
        eos_ids (`list[int]`): Tokens that end a continuation. The one that ended it is kept, once.
        max_new_tokens (`int`): Maximum length of a continuation.

    Returns:
        `list[list[int]]`: Continuations in the order of the prompts.

    Raises:
        [`NonFiniteLogitsError`]: If a token would be chosen from logits that are NaN or infinite.
    """
    output, broken_at = _generate(model, prompt_ids, vocabulary, eos_ids, max_new_tokens)
    length = max(map(len, prompt_ids))
    completions = [cut_after_eos(ids, set(eos_ids)) for ids in output.sequences[:, length:].tolist()]
    for row, at in enumerate(broken_at.tolist()):
        if at - length < len(completions[row]):
            raise NonFiniteLogitsError("model", row, f"token {at - length} of an answer")
    return completions


@torch.no_grad()
def generate_by_passes(
    model: torch.nn.Module,
    prompt_ids: list[list[int]],
    vocabulary: Vocabulary,
    eos_ids: list[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Like [`generate_greedy`], but with a full pass for every token, for a model whose cache cannot be trusted."""
    completions: list[list[int]] = []
    for prompt in prompt_ids:
        ids = list(prompt)
        while len(ids) < len(prompt) + max_new_tokens and (len(ids) == len(prompt) or ids[-1] not in eos_ids):
            logits = vocabulary.select(logits_of_row(model, ids, 1))
            if is_broken(logits):
                raise NonFiniteLogitsError("model", len(completions), f"token {len(ids) - len(prompt)} of an answer")
            ids.append(int(vocabulary.ids_of(logits.argmax(-1).cpu())))
        completions.append(ids[len(prompt) :])
    return completions


def rows_alike(model: torch.nn.Module, ids: list[int], vocabulary: Vocabulary) -> Alike | None:
    """
    Which prompts `generate` can complete together with the same results as full passes over each context. It is tested
    on some tokens of `ids`. `"any"`: all prompts. `"length"`: prompts of equal length, if padding changes the model's
    positions or recurrent states. `"row"`: each prompt alone. `None`: not even that. Logits that are NaN or infinite
    are refused.
    """
    first, turned = ids[: max(1, len(ids) // 4)], [*ids[1:], ids[0]]
    ways: list[tuple[Alike, list[list[int]]]] = [("any", [first, ids]), ("length", [ids, turned]), ("row", [ids])]
    return next((way for way, rows in ways if _generates_rightly(model, rows, vocabulary)), None)


def length_that_shows(model: torch.nn.Module, longest: int) -> int:
    """Number of tokens that [`rows_alike`] needs for contexts of at most `longest` tokens."""
    config = get_base_model(model).config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_window_size")]
    passed = [window for window in windows if isinstance(window, int) and 0 < window < longest]
    return max(
        1, room_to_look(model, max([_LOOKED_AT, *(window + _PROBED_TOKENS for window in passed)])) - _PROBED_TOKENS
    )


@torch.no_grad()
def _generates_rightly(model: torch.nn.Module, rows: list[list[int]], vocabulary: Vocabulary) -> bool:
    try:
        output, _ = _generate(model, rows, vocabulary, [], _PROBED_TOKENS, output_logits=True)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if should_reduce_batch_size(error):
            raise
        return False
    for i, ids in enumerate(rows):
        made = output.sequences[i, -_PROBED_TOKENS:].tolist()
        expected = vocabulary.select(logits_of_row(model, ids + made[:-1], _PROBED_TOKENS))
        if is_broken(expected).any():
            raise NonFiniteLogitsError("model", 0, "the first tokens of an answer")
        logits = vocabulary.select(torch.stack([step[i] for step in output.logits]))
        if not same_logits(model, logits, expected):
            return False
    return True


def _generate(
    model: torch.nn.Module,
    prompt_ids: list[list[int]],
    vocabulary: Vocabulary,
    eos_ids: list[int],
    max_new_tokens: int,
    **kwargs: Any,
) -> tuple[Any, torch.Tensor]:
    """What `generate` returns, and for each row the length of its first context whose logits are broken."""
    base = get_base_model(model)
    device = base.get_input_embeddings().weight.device
    length = max(map(len, prompt_ids))
    # The mask says which tokens are real, so the padding's id does not matter
    input_ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in prompt_ids], device=device)
    attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=0,  # written after an EOS, where it is cut off
        return_dict_in_generate=True,
        **kwargs,
    )
    only_tokens = OnlyTokens(vocabulary, base.config.get_text_config().vocab_size)
    with without_generation_config(base):
        output = base.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            **without_routers(base),
            logits_processor=LogitsProcessorList([only_tokens]),
        )
    assert only_tokens.broken_at is not None  # at least one token is generated
    return output, only_tokens.broken_at


def cut_after_eos(ids: list[int], eos_ids: set[int]) -> list[int]:
    """The ids up to and including the first EOS."""
    for position, token_id in enumerate(ids):
        if token_id in eos_ids:
            return ids[: position + 1]
    return ids


@contextmanager
def without_generation_config(model: torch.nn.Module) -> Iterator[None]:
    """A context in which the model has an empty generation_config."""
    # `generate` takes whatever a given config does not set from the model's own
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
