"""The user's demonstrations as rows of kept steps, so that the same code trains on both.

If a label is a single token, D_KL(v_C || pi_theta) is the cross-entropy of that token. So a demonstration becomes a
row in which every token of the completion is a kept step and its own label.
"""

from datetime import datetime
from typing import Any

from datasets import Dataset, Features
from transformers import PreTrainedTokenizerBase

from ..text import shown_value
from .caches import map_rows
from .dataset import STEP_COLUMNS, STEP_FEATURES
from .prompt_format import has_messages
from .prompts import encode_rows, end_of_turn
from .switches import without_nulls


def encode_sft_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, date: datetime | None = None) -> Dataset:
    """
    Convert demonstrations in TRL's formats to rows of kept steps. Every token of a completion becomes a kept step.

    Args:
        dataset ([`~datasets.Dataset`]): Rows with `prompt` and `completion`, both text or both messages, or with
            `messages`, of which the last, the assistant's, is the completion. An EOS token is appended to text.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's, with the chat template if there are
            messages.
        date ([`~datetime.datetime`], *optional*): Date for chat templates that print today's date, as the prompts of
            the steps show it.

    Returns:
        [`~datasets.Dataset`] with the columns `STEP_COLUMNS`, one row per demonstration. The last step of a
        completion is the token that ends it.

    Raises:
        `TypeError`: If it is not a [`~datasets.Dataset`].
        `ValueError`: If a column is missing or a row is malformed. The message names the row.

    Example:

    ```python
    >>> rows = encode_sft_rows(Dataset.from_dict({"prompt": ["2+2="], "completion": ["4"]}), tokenizer)
    >>> rows[0]["completion_ids"], rows[0]["step_positions"], rows[0]["label_ids"]
    ([19, 297], [0, 1], [[19], [297]])

    ```
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`sft_dataset` must be a `datasets.Dataset`, got `{type(dataset).__name__}`.")
    columns = set(dataset.column_names)
    has_completions = {"prompt", "completion"} <= columns
    if not has_completions and "messages" not in columns:
        raise ValueError(
            "`sft_dataset` must have the columns `prompt` and `completion`, or `messages`; it has "
            f"{', '.join(map(repr, dataset.column_names)) or 'none'}."
        )
    if len(dataset) == 0:
        raise ValueError("`sft_dataset` holds no row.")
    is_text = has_completions and not has_messages(dataset)
    if not is_text and tokenizer.chat_template is None:
        raise ValueError(
            "The rows of `sft_dataset` are messages, but the model's tokenizer has no chat template. Give them as "
            "text, in the prompt format of the train dataset."
        )
    eos_ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None}

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        try:
            demonstrations = [_demonstration(row, n, tokenizer) for n, row in zip(indices, rows, strict=True)]
            ids = encode_rows(demonstrations, tokenizer, eos_ids, first_row=indices[0], date=date)
        except ValueError as error:
            raise ValueError(f"`sft_dataset`: {error}") from None
        completions = ids["completion_ids"]
        return {
            **ids,
            "step_positions": [list(range(len(completion))) for completion in completions],
            "label_ids": [[[token_id] for token_id in completion] for completion in completions],
            "label_probs": [[[1.0]] * len(completion) for completion in completions],
        }

    return map_rows(
        dataset.with_format(None),
        encode,
        with_indices=True,
        batched=True,
        remove_columns=dataset.column_names,
        features=Features({column: STEP_FEATURES[column] for column in STEP_COLUMNS}),
        desc="Tokenizing the SFT dataset",
    )


def _demonstration(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row with `prompt` and `completion`, converted from any of the formats."""
    if "completion" not in row or "prompt" not in row:
        messages = row.pop("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(last, dict) or last.get("role") != "assistant":
            raise ValueError(
                f"Row {number}: `messages` must end with a message of the assistant, got {shown_value(messages)}."
            )
        row = {**row, "prompt": messages[:-1], "completion": [last]}
    if row["prompt"] in ("", []):
        raise ValueError(f"Row {number}: the prompt is empty, so the completion has no context. Filter such rows out.")
    completion, eos = row["completion"], tokenizer.eos_token
    if _is_blank(completion):
        raise ValueError(f"Row {number}: the completion is empty, so it teaches to say nothing. Filter such rows out.")
    if isinstance(completion, str) and eos is not None and not completion.endswith(eos):
        row = {**row, "completion": completion + eos}
    return row


def _is_blank(completion: Any) -> bool:
    """Whether a completion, text or one message, says nothing. A message with other keys than its text does."""
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        message = without_nulls(completion[0])
        completion = message.get("content") if message.keys() <= {"role", "content"} else None
    return isinstance(completion, str) and not completion.strip()
