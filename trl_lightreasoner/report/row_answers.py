"""Find the rows of a Dataset of kept steps that end in the right answer, if reference answers are given."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..evaluation.answering import grade_answers
from ..evaluation.sets import read_answers
from ..grading.references import read_references
from ..steps.prompt_format import has_messages
from ..text import name_columns
from .row_texts import completion_text


WRONG, RIGHT, UNKNOWN = range(3)


def grade_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, answer_column: str | None = None
) -> np.ndarray | None:
    """
    Grade the completion of each row against its reference answer, as `lightreasoner eval` does.

    Args:
        dataset ([`~datasets.Dataset`]): Rows from [`ContrastiveStepSampler`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The expert's. Without it the column
            `completion` is graded.
        answer_column (`str`, *optional*): Column with the answers. By default it is `answer`, if there is one.

    Returns:
        `np.ndarray` of shape `(len(dataset),)`: `RIGHT`, `WRONG`, or `UNKNOWN` without a reference answer, a text, or
        a verdict within the time limit. `None` if all rows are unknown.

    Raises:
        `ValueError`: If there is no column of that name.
        `ImportError`: If math-verify is not installed.
    """
    if answer_column is not None and answer_column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {answer_column!r}; it has {name_columns(dataset.column_names)}. Name the one "
            "that holds the answers as `answer_column`."
        )
    column = answer_column or "answer"
    if column not in dataset.column_names:
        return None
    columns = [column, "completion_ids", *(["completion"] if "completion" in dataset.column_names else [])]
    # A trajectory spread over several rows is graded once
    rows_of: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    rows = dataset.with_format(None).select_columns(columns)
    for index, (row, answer) in enumerate(zip(rows, read_answers(dataset, column), strict=True)):
        references = read_references(answer)
        text = completion_text(row, tokenizer)
        if references is not None and text is not None:
            rows_of.setdefault((text, tuple(references)), []).append(index)
    if not rows_of:
        return None
    is_raw = "prompt" in dataset.column_names and not has_messages(dataset)
    verdicts = grade_answers(
        [text for text, _ in rows_of], [{"gold": list(references)} for _, references in rows_of], is_raw
    )
    graded = np.full(len(dataset), UNKNOWN, dtype=np.uint8)
    for rows, verdict in zip(rows_of.values(), verdicts, strict=True):
        if verdict.failure is None:
            graded[rows] = RIGHT if verdict.correct else WRONG
    return graded
