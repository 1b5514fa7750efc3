"""From a dataset of prompts to the token ids of the two models."""

import uuid
from datetime import datetime

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..steps.prompts import encode_rows
from ..text import name_columns
from .amateur_prompts import AmateurPrompts


def encode_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: list[int],
    date: datetime,
    amateur_prompts: AmateurPrompts | None,
) -> Dataset:
    """
    Token ids of every row: `prompt_ids`, `completion_ids` if there are completions to score, and `amateur_prompt_ids`
    if the amateur's prompts differ.

    Args:
        dataset ([`~datasets.Dataset`]): Of prompts, and of completions if there are any to score.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The expert's.
        eos_ids (`list[int]`): Tokens that end a completion.
        date ([`~datetime.datetime`]): Of the run.
        amateur_prompts ([`AmateurPrompts`], *optional*): If `None`, the amateur reads the expert's prompts.

    Raises:
        `ValueError`: If a row breaks TRL's conventions, or a transform of the user changes the columns.
    """
    columns = ["prompt_ids"] + (["completion_ids"] if "completion" in dataset.column_names else [])
    # A transform of the user's is applied; any other format only costs time
    prompts = dataset if dataset.format["type"] == "custom" else dataset.with_format(None)
    has_switches = "chat_template_kwargs" in dataset.column_names
    is_same = set(columns) == {f"{name}_ids" for name in prompts[0] if name in ("prompt", "completion")}
    if not is_same or has_switches and "chat_template_kwargs" not in prompts[0]:
        raise ValueError(
            f"The transform of the dataset turns the columns {name_columns(dataset.column_names)} into "
            f"{name_columns(prompts[0])}. Apply it with `dataset.map` first."
        )
    columns += [] if amateur_prompts is None else ["amateur_prompt_ids"]
    # With a fingerprint of ours `map` need not hash what it is given, which for a tokenizer takes seconds
    return prompts.map(
        _encode,
        with_indices=True,
        batched=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "eos_ids": set(eos_ids),
            "date": date,
            "amateur_prompts": amateur_prompts,
        },
        remove_columns=dataset.column_names,
        features=Features({column: List(Value("int32")) for column in columns}),
        keep_in_memory=True,
        new_fingerprint=uuid.uuid4().hex,
        desc="Tokenizing prompts",
    ).with_format(None)


def _encode(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: set[int],
    date: datetime,
    amateur_prompts: AmateurPrompts | None,
) -> dict[str, list[list[int]]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    encoded = encode_rows(rows, tokenizer, eos_ids, first_row=indices[0], date=date)
    if amateur_prompts is not None:
        encoded["amateur_prompt_ids"] = amateur_prompts.encode(rows, indices[0], date)
    return encoded
