"""Which rows of a Dataset of kept steps end in the right answer, where they hold the right one."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..evaluation.answering import grade_answers
from ..grading.answers import read_references
from ..steps.prompt_format import has_messages
from .row_texts import completion_text


WRONG, RIGHT, UNKNOWN = range(3)


def grade_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, answer_column: str | None = None
) -> np.ndarray | None:
    """
    Whether the completion of each row gives its reference answer, as `lightreasoner eval` would judge it.

    Args:
        dataset ([`~datasets.Dataset`]): Rows from [`ContrastiveStepSampler`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The expert's. Without it the column
            `completion` is graded.
        answer_column (`str`, *optional*): Where the answers are. If not set, `answer`, if there is such a column.

    Returns:
        `np.ndarray` of shape `(len(dataset),)`: `RIGHT`, `WRONG`, or `UNKNOWN` where there is no reference answer, no
        text, or no verdict within the limit of time; `None` if there is no row of which it is known.

    Raises:
        `ValueError`: If there is no column of that name.
        `ImportError`: If math-verify is not installed.
    """
    if answer_column is not None and answer_column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {answer_column!r}; it has {dataset.column_names}. Name the one that holds the "
            "answers as `answer_column`."
        )
    column = answer_column or "answer"
    if column not in dataset.column_names:
        return None
    columns = [column, "completion_ids", *(["completion"] if "completion" in dataset.column_names else [])]
    # A trajectory whose steps are spread over several rows is graded once
    rows_of: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for index, row in enumerate(dataset.with_format(None).select_columns(columns)):
        references = read_references(row[column])
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
