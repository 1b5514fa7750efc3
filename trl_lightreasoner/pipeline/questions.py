"""From the rows of a dataset to prompts to sample and held-out problems."""

import json
import logging
import unicodedata
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..evaluation.sets import HELD_OUT, load_problems, read_problems
from ..steps.prompt_format import (
    SYSTEM_PROMPT,
    PromptFormat,
    agree_on_switches,
    format_of_prompts,
    has_messages,
    make_prompts,
    name_prompts,
)
from ..steps.splits import load_split
from ..steps.switches import put_switches
from ..text import name_columns
from ..training.accuracy import as_questions
from .run_config import RunConfig


logger = logging.getLogger(__name__)


class Questions(NamedTuple):
    """
    The questions of a run and their uses.

    Attributes:
        prompts ([`~datasets.Dataset`]): The rows to be sampled, with a column `prompt`.
        problems (`dict[str, Dataset]`): By name, the problems to answer before and after training: rows of
            `ROW_FEATURES`.
        validation ([`~datasets.Dataset`]): Rows with `prompt` and `answer` that choose a setting, in the form of a
            trainer's `eval_questions`.
        prompt_format ([`PromptFormat`]): The format of the prompts. For questions that are messages, the format of the
            benchmarks.
    """

    prompts: Dataset
    problems: dict[str, Dataset]
    validation: Dataset
    prompt_format: PromptFormat


def prepare_questions(args: RunConfig, tokenizer: PreTrainedTokenizerBase, num_validation: int = 0) -> Questions:
    """
    Load the questions. No question has two uses, even if several rows hold it, with other spaces or in another Unicode
    form: a held-out question is neither sampled nor used for validation, a validation question is not sampled, and no
    question is in two rounds. Each is held out, or used for validation, once, with the answer of its last row.

    Args:
        args ([`RunConfig`]): Settings.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The expert's.
        num_validation (`int`, *optional*, defaults to `0`): Number of validation questions, taken before the held-out
            ones. With them, each of these two uses takes at most a third of the questions.

    Raises:
        `ValueError`: If a column is missing, the prompt format does not fit, or an answer cannot be read.
    """
    dataset = load_split(args.dataset_name, args.dataset_config, args.dataset_split)
    if args.answer_column is not None and args.answer_column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {args.answer_column!r}; it has {name_columns(dataset.column_names)}. Name "
            "the column of answers with `--answer_column`."
        )
    answer_column = args.answer_column or "answer"
    names = dataset.column_names
    has_answers = answer_column in names
    usual = [name for name in ("prompt", "question", "messages") if name in names]
    dataset = name_prompts(dataset, args.prompt_column or next(iter(usual), "question"))
    if args.num_held_out and not has_answers and not args.benchmarks:
        logger.warning(
            f"There is no column {answer_column!r}, so no question is held out, and nothing will say whether the "
            f"adapter is better. The columns are {name_columns(names)}. Name that of the answers with "
            "`--answer_column`."
        )
    is_text = not has_messages(dataset)
    prompt_format = choose_format(args, tokenizer, is_text)
    dataset = put_switches(dataset, prompt_format.chat_template_kwargs)
    texts = [json.dumps(_without_spacing(prompt), sort_keys=True) for prompt in dataset["prompt"]]
    # Each question once, in its last row: answers to the same question twice would make the interval too narrow
    distinct = sorted({text: row for row, text in enumerate(texts)}.values())
    most = len(distinct) // (3 if num_validation else 2) if has_answers else 0
    first = len(distinct) - min(args.num_held_out, most)
    start = first - min(num_validation, most)
    choosing, held_out = distinct[start:first], distinct[first:]
    taken = {texts[row] for row in distinct[start:]}
    rows = [row for row, text in enumerate(texts) if text not in taken]
    if args.num_rounds > 1:  # which sample other questions each
        rows = sorted({texts[row]: row for row in reversed(rows)}.values())
    if not rows:
        raise ValueError("The dataset has no question left to sample after the held-out ones.")
    rows = rows[: args.num_prompts + (args.num_rounds - 1) * args.num_prompts_later]
    if len(rows) <= args.num_prompts + (args.num_rounds - 2) * args.num_prompts_later and args.num_rounds > 1:
        raise ValueError(
            f"The first of {args.num_rounds} rounds samples {args.num_prompts:,} questions and each later one "
            f"{args.num_prompts_later:,} others, but there are only {len(rows):,}. Lower `num_prompts` or "
            "`prompts_per_round`, or give more rows."
        )
    prompts = dataset.select(rows)
    if is_text:
        prompts = make_prompts(prompts, prompt_format)
    else:
        prompt_format = format_of_prompts(prompts) or prompt_format
    prompts, prompt_format = agree_on_switches(prompts, prompt_format)

    def read(rows: list[int]) -> Dataset:
        return read_problems(dataset.select(rows), "prompt", answer_column, rows)

    problems = {HELD_OUT: read(held_out)} if held_out else {}
    validation = Dataset.from_dict({"prompt": [], "answer": []})
    if choosing:
        validation = as_questions(read(choosing).rename_column("gold", "answer"), prompt_format.make_prompt)
    if args.benchmarks and prompt_format.chat_template_kwargs is None:
        logger.warning(
            "The rows differ in 'chat_template_kwargs', but the benchmarks are asked without any. To choose some, "
            "leave out `benchmarks` and use `lightreasoner eval` with `--chat_template_kwargs`."
        )
    problems |= load_problems(args.benchmarks or [], args.data_dir)
    return Questions(prompts, problems, validation, prompt_format)


def _without_spacing(value: Any) -> Any:
    """A prompt in the form in which it is compared: other spaces and another Unicode form make no other question."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, list):
        return [_without_spacing(part) for part in value]
    return {key: _without_spacing(part) for key, part in value.items()} if isinstance(value, dict) else value


def choose_format(args: RunConfig, tokenizer: PreTrainedTokenizerBase, is_text: bool) -> PromptFormat:
    """The format that the settings ask for, or the one that fits the expert."""
    asked_for = (args.prompt_style, args.system_prompt, args.prompt_template)
    if not is_text and any(each is not None for each in asked_for):
        raise ValueError("The questions are already messages. Put the system prompt into them, or give them as text.")
    has_template = tokenizer.chat_template is not None
    style = args.prompt_style or ("chat" if has_template or args.system_prompt or not is_text else "raw")
    if style == "chat" and not has_template:
        raise ValueError(
            "The tokenizer of the expert has no chat template. Set `prompt_style='raw'`, as for a base model, without "
            "`system_prompt`, and give the questions as text."
        )
    system = SYSTEM_PROMPT if args.system_prompt is None and style == "chat" else args.system_prompt or ""
    switches: Any = args.chat_template_kwargs or {}
    return PromptFormat(style, args.prompt_template, system, switches)
