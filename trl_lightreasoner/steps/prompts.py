"""From a row of a prompt-only or prompt-completion dataset to the token ids that both models see.

TRL's conventions hold: `prompt` is text, taken verbatim, or a list of messages, to which the expert's chat template is
applied once. BOS comes once, wherever it comes from. A `completion` is the answer to score instead of one generated.
"""

import json
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational

from .dataset import check_dataset
from .prompt_format import has_messages


# Stands for an answer; no template holds it
_ANSWER = "the very answer"


def check_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuse a dataset that is not a prompt-only or prompt-completion dataset, before a model is loaded.

    Raises:
        `ValueError`: If the `prompt` column is missing, or messages come without a chat template.
        `TypeError`: If it is not a [`~datasets.Dataset`].
    """
    check_dataset(dataset)
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"The dataset has no `prompt` column; it has {dataset.column_names}. Map your rows to "
            '`{"prompt": text}` or `{"prompt": [{"role": "user", "content": text}]}`.'
        )
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is no prompt to sample.")
    if has_messages(dataset) and tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are conversational, but the expert's tokenizer has no chat template. Set "
            "`tokenizer.chat_template` and pass it as `processing_class`, or give the prompts as text."
        )


def encode_rows(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, eos_ids: set[int], first_row: int = 0
) -> dict[str, list[list[int]]]:
    """
    Token ids of rows of one dataset.

    Args:
        rows (`list[dict]`): Rows with `prompt` and, if there is one to score, `completion`; text or messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The expert's.
        eos_ids (`set[int]`): Tokens that end a completion. What a chat template puts behind the last of them is no
            part of the answer and is left out.
        first_row (`int`): Number of the first row, for error messages.

    Returns:
        `dict` with `prompt_ids` of each row, empty for an empty prompt, and `completion_ids` if there are completions.

    Raises:
        `ValueError`: If a row is not as TRL's conventions say; names the row.

    Example:

    ```python
    >>> encode_rows([{"prompt": "2+2=", "completion": "4"}], tokenizer, eos_ids={0})
    {'prompt_ids': [[17, 10, 17, 28]], 'completion_ids': [[19]]}

    ```
    """
    texts = []
    for number, row in enumerate(rows, first_row):
        try:
            texts.append(_as_text(row, tokenizer))
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from None
    # All prompts in one call, which a tokenizer spreads over the processor's cores
    prompt_ids = tokenizer([text["prompt"] for text in texts], add_special_tokens=False)["input_ids"]
    has_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    encoded: dict[str, list[list[int]]] = {"prompt_ids": []}
    if "completion" in rows[0]:
        encoded["completion_ids"] = []
    for row, text, ids in zip(rows, texts, prompt_ids, strict=True):
        conversational = not isinstance(row["prompt"], str)
        # A template brings its own BOS, so that only plain text needs one
        with_bos = has_bos and not conversational and ids[:1] != [tokenizer.bos_token_id]
        encoded["prompt_ids"].append([tokenizer.bos_token_id] * with_bos + ids if text["prompt"] else [])
        if "completion" in row:
            completion_ids = []
            if text["prompt"]:
                completion_ids = encode_continuation(text["prompt"], ids, text["completion"], tokenizer)
            if conversational:
                last_eos = max((i for i, token_id in enumerate(completion_ids) if token_id in eos_ids), default=None)
                completion_ids = completion_ids[: None if last_eos is None else last_eos + 1]
            encoded["completion_ids"].append(completion_ids)
    return encoded


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """
    The token with which the chat template ends an assistant's message, if it is a special one.

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
    except (TemplateError, TypeError, ValueError):  # it wants other messages, or there are several and no default
        return None
    ids = tokenizer(text.rpartition(_ANSWER)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return ids[0] if ids and ids[0] in special else None


def _as_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """`prompt`, and `completion` if there is one, of a row that was checked, the chat template applied."""
    prompt, completion = row["prompt"], row.get("completion")
    if not isinstance(prompt, str | list):
        raise ValueError(
            f"`prompt` must be text or a list of messages, got {prompt!r}. Filter such rows out, or convert them."
        )
    if "completion" in row and not isinstance(completion, str | list):
        raise ValueError(
            f"`completion` must be text or a list of one message, got {completion!r}. Filter such rows out, or remove "
            "the column to let the expert answer."
        )
    if len(prompt) == 0:
        return {"prompt": ""}
    keys = [key for key in ("prompt", "completion", "chat_template_kwargs") if row.get(key) is not None]
    text = {key: row[key] for key in keys}
    conversational = is_conversational({"prompt": prompt}) and isinstance(completion, list | None)
    if not conversational and not (isinstance(prompt, str) and isinstance(completion, str | None)):
        raise ValueError(
            "`prompt` and `completion` must both be text or both be lists of messages with `role` and `content`, got "
            f"{prompt!r}" + (f" and {completion!r}." if "completion" in row else ".")
        )
    if not conversational:
        return text
    if completion is not None and len(completion) != 1:
        raise ValueError(f"`completion` must be one assistant message, got {len(completion)} of them.")
    for column, messages in {"prompt": prompt, "completion": completion or []}.items():
        for message in messages:
            _check_message(message, column)
    try:
        tools = row.get("tools")
        return apply_chat_template(text, tokenizer, tools=json.loads(tools) if isinstance(tools, str) else tools)
    except TemplateError as error:
        raise ValueError(f"The chat template refuses the messages {prompt!r}: {error}.") from None


def _check_message(message: Any, column: str) -> None:
    # A template prints whatever it is given, None and numbers as well
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"A message of `{column}` has no role: {message!r}. Filter such rows out.")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"A message of `{column}` has no content: {message!r}. Filter such rows out.")
    if not isinstance(content, str | list | None):
        raise ValueError(f"The content of a message of `{column}` must be text, got {content!r}. Convert it.")


def encode_continuation(
    prompt: str, prompt_ids: list[int], continuation: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """
    Token ids of a text that follows a prompt.

    Both texts are tokenized together, since a text alone can get a leading space (SentencePiece). Where that would
    merge the last token of the prompt with the first of the continuation, the continuation is tokenized alone: the
    prompt's tokens are those that a generation would have started from.
    """
    together = tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]
    if together[: len(prompt_ids)] == prompt_ids:
        return together[len(prompt_ids) :]
    return tokenizer(continuation, add_special_tokens=False)["input_ids"]
