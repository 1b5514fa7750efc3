"""From a row of a prompt-only or prompt-completion dataset to the token ids that both models see.

TRL's conventions apply: `prompt` is text, used verbatim, or a list of messages, to which the expert's chat template is
applied once. There is exactly one BOS, from the tokenizer or the template. A `completion` is scored instead of a
generated one.
"""

from datetime import datetime
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..text import name_columns
from .dataset import check_dataset
from .messages import render_row
from .prompt_format import has_messages


# Placeholder for an answer. No template contains it
_ANSWER = "the very answer"


def check_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuse a dataset that is neither prompt-only nor prompt-completion, before a model is loaded.

    Raises:
        `ValueError`: If it has no `prompt` column or no rows, or it has messages and the tokenizer has no chat
            template.
        `TypeError`: If it is not a [`~datasets.Dataset`].
    """
    check_dataset(dataset)
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"The dataset has no `prompt` column; it has {name_columns(dataset.column_names)}. Map your rows to "
            '`{"prompt": text}` or `{"prompt": [{"role": "user", "content": text}]}`.'
        )
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is no prompt to sample.")
    if has_messages(dataset) and tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are conversational, but the expert's tokenizer has no chat template. Give "
            "the prompts as text, or a tokenizer with a chat template: saved with the expert, or in Python as "
            "`processing_class`."
        )


def encode_rows(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: set[int],
    first_row: int = 0,
    date: datetime | None = None,
) -> dict[str, list[list[int]]]:
    """
    Token ids of rows of a dataset.

    Args:
        rows (`list[dict]`): Rows with `prompt` and, if there is one to score, `completion`; text or messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The expert's.
        eos_ids (`set[int]`): Tokens that end a completion. The first of them becomes its last token. A line break or
            padding after it is removed.
        first_row (`int`): Number of the first row, for error messages.
        date ([`~datetime.datetime`], *optional*): Date for chat templates that print today's date.

    Returns:
        `dict` with `prompt_ids` of each row, empty for an empty prompt, and `completion_ids` if there are completions.

    Raises:
        `ValueError`: If a row breaks TRL's conventions. The message names the row.

    Example:

    ```python
    >>> encode_rows([{"prompt": "2+2=", "completion": "4"}], tokenizer, eos_ids={0})
    {'prompt_ids': [[17, 10, 17, 28]], 'completion_ids': [[19]]}

    ```
    """
    texts = []
    for number, row in enumerate(rows, first_row):
        try:
            texts.append(render_row(row, tokenizer, date))
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from None
    # A single call for all prompts, which a fast tokenizer spreads over the CPU's cores
    prompt_ids = tokenizer([text["prompt"] for text in texts], add_special_tokens=False)["input_ids"]
    has_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    encoded: dict[str, list[list[int]]] = {"prompt_ids": []}
    if "completion" in rows[0]:
        encoded["completion_ids"] = []
    for number, (row, text, ids) in enumerate(zip(rows, texts, prompt_ids, strict=True), first_row):
        conversational = not isinstance(row["prompt"], str)
        # A template adds its own BOS, so only plain text needs one
        with_bos = has_bos and not conversational and ids[:1] != [tokenizer.bos_token_id]
        encoded["prompt_ids"].append([tokenizer.bos_token_id] * with_bos + ids if text["prompt"] else [])
        if "completion" in row:
            completion_ids = []
            if text["prompt"]:
                completion_ids = encode_continuation(text["prompt"], ids, text["completion"], tokenizer)
            end = next((i for i, token_id in enumerate(completion_ids, 1) if token_id in eos_ids), len(completion_ids))
            behind = tokenizer.decode(completion_ids[end:], skip_special_tokens=True).strip()
            if behind:
                raise ValueError(
                    f"Row {number}: `completion` continues after the token "
                    f"{tokenizer.convert_ids_to_tokens(completion_ids[end - 1])!r}, which ends an answer: {behind!r}. "
                    "The expert would have stopped there. Remove the rest, or the token."
                )
            encoded["completion_ids"].append(completion_ids[:end])
    return encoded


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """
    The token with which the chat template ends an assistant's message, if it is a special token.

    Example:

    ```python
    >>> tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
    '<|im_end|>'

    ```
    """
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # it needs other messages, or there is no default template
        return None
    ids = tokenizer(text.rpartition(_ANSWER)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return ids[0] if ids and ids[0] in special else None


def encode_continuation(
    prompt: str, prompt_ids: list[int], continuation: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """
    Token ids of a text that follows a prompt.

    Both texts are tokenized together, since a text alone can get a leading space (SentencePiece). If this would merge
    the last token of the prompt with the first of the continuation, the continuation is tokenized alone. So the
    prompt keeps the tokens that generation would have started from.
    """
    together = tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]
    if together[: len(prompt_ids)] == prompt_ids:
        return together[len(prompt_ids) :]
    return tokenizer(continuation, add_special_tokens=False)["input_ids"]
