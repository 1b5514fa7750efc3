"""Convert prompts in a list, a Dataset or a stream to a Dataset with a column `prompt`."""

import logging
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset, IterableDataset, List
from huggingface_hub import constants
from huggingface_hub.repocard import metadata_load

from .caches import map_rows
from .dataset import check_dataset


if TYPE_CHECKING:  # slow to import, and not needed for a command's flags
    from ..processes import Processes


logger = logging.getLogger(__name__)

# Columns that the chat template reads beside the messages
BESIDE_MESSAGES = ("chat_template_kwargs", "tools")


def read_prompts(
    prompts: Dataset | IterableDataset | list[Any], num_prompts: int | None, processes: "Processes"
) -> Dataset:
    """
    Convert prompts to a Dataset.

    Args:
        prompts ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `list`): Rows, or a list of texts or
            conversations.
        num_prompts (`int`, *optional*): Number of prompts to take, from the start. If `None`, all of them.
        processes ([`Processes`]): The processes. The main one reads a stream, so that all have the same rows.

    Returns:
        [`~datasets.Dataset`]. Without `prompt` and `completion`, the conversations in `messages` are the prompts.

    Raises:
        `ValueError`: If rows are streamed without a limit, or the entries of a list have different types.
        `TypeError`: If `prompts` is something else.
    """
    if isinstance(prompts, IterableDataset):
        if num_prompts is None:
            raise ValueError(
                "The prompts are streamed, and a stream need not end. Set `num_prompts` of "
                "`ContrastiveSamplingConfig` to the number of prompts to sample."
            )
        prompts = processes.on_main(lambda: _read_stream(prompts, num_prompts))
    elif isinstance(prompts, list):
        prompts = _as_dataset(prompts[:num_prompts])
    elif isinstance(prompts, str):
        raise TypeError("`dataset` must be a `datasets.Dataset` or a list, got `str`. Put the prompt into a list.")
    check_dataset(prompts)
    if num_prompts is not None and num_prompts < len(prompts):
        prompts = prompts.select(range(num_prompts))
    columns = {"prompt", "completion"} & set(prompts.column_names)
    if columns or prompts.format["type"] == "custom" or not isinstance(prompts.features.get("messages"), List):
        return prompts
    return take_messages(prompts, "messages")


def take_messages(dataset: Dataset, column: str) -> Dataset:
    """
    Make the conversations in a column the prompts of a dataset.

    An answer at the end of a conversation is left out, with a warning, because the expert answers instead.

    Example:

    ```python
    >>> question, answer = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    >>> take_messages(Dataset.from_dict({"messages": [[question, answer]]}), "messages")["prompt"][0]
    [{'role': 'user', 'content': '2+2?'}]

    ```
    """
    dataset = dataset.rename_column(column, "prompt")
    num_answered = sum(map(_ends_with_answer, dataset.with_format(None)["prompt"]))
    if num_answered == 0:
        return dataset
    logger.warning(
        f"The conversations in {column!r} end with an answer in {num_answered:,} of {len(dataset):,} rows. It is left "
        "out, and the expert answers instead. To score the given answers, split the rows into `prompt` and "
        "`completion`."
    )
    return map_rows(dataset.with_format(None), _leave_answer_out, desc="Leaving answers out")


def source_of(dataset: Dataset) -> dict[str, Any] | None:
    """
    The repository on the Hub that a dataset was loaded from, or `None` if it is not known.

    Returns:
        `dict` with the id, `dataset`, the `revision`, and `language` if the dataset's card says so.
    """
    # `load_dataset` names the folder of the rows after the commit. So does the cache of the Hub, whose folder also has
    # the id with its upper-case letters
    commits = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    if len(commits) != 1 or not re.fullmatch("[0-9a-f]{40}", commit := commits.pop()):
        return None
    snapshots = list(Path(constants.HF_HUB_CACHE).glob(f"datasets--*--*/snapshots/{commit}"))
    if len(snapshots) != 1:
        return None
    name = snapshots[0].parents[1].name.removeprefix("datasets--").replace("--", "/", 1)
    card = snapshots[0] / "README.md"
    language = (metadata_load(card) or {}).get("language") if card.is_file() else None
    return {"dataset": name, "revision": commit, **({} if language is None else {"language": language})}


def _read_stream(dataset: IterableDataset, num_prompts: int) -> Dataset:
    rows = [dict(row) for row in islice(dataset.with_format(None), num_prompts)]
    if not rows and not dataset.features:
        raise ValueError("The stream is empty: there is no prompt to sample.")
    # Without features, the first rows may lack a column
    names = dataset.features or dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    try:
        return Dataset.from_dict(columns, features=dataset.features)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"A column of the streamed rows holds values of several types: {reason}. Convert it."
        ) from error


def _as_dataset(prompts: list[Any]) -> Dataset:
    kinds = {type(prompt) for prompt in prompts}
    if len(kinds) > 1 or not kinds <= {str, list}:
        raise ValueError(
            "A list of prompts must hold texts, or conversations, each a list of messages; it holds "
            f"{' and '.join(sorted(kind.__name__ for kind in kinds))}. Give rows as a `datasets.Dataset`."
        )
    try:
        return Dataset.from_dict({"prompt": prompts})
    except pa.ArrowInvalid as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"The messages of the prompts are not of one form: {reason}. Convert them.") from error


def _ends_with_answer(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def _leave_answer_out(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["prompt"]
    while _ends_with_answer(messages):
        messages = messages[:-1]
    return {"prompt": messages}


def beside_messages(dataset: Dataset) -> Dataset:
    """The columns of a dataset that the chat template reads beside the messages. There may be none."""
    return dataset.select_columns([name for name in BESIDE_MESSAGES if name in dataset.column_names])
