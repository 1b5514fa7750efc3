"""A training that runs out of memory: the same updates with fewer trajectories at a time."""

import copy
from typing import TypeVar

from transformers import TrainingArguments


Arguments = TypeVar("Arguments", bound=TrainingArguments)


def halve_batches(args: Arguments) -> Arguments | None:
    """
    The settings of the same updates with half of the rows in memory at a time, `None` if that is not possible.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> args = halve_batches(TrainingArguments("adapter", per_device_train_batch_size=8))
    >>> args.per_device_train_batch_size, args.gradient_accumulation_steps
    (4, 2)

    ```
    """
    rows = args.per_device_train_batch_size
    if rows % 2:
        return None
    halved = copy.copy(args)
    halved.per_device_train_batch_size = rows // 2
    halved.per_device_eval_batch_size = max(1, args.per_device_eval_batch_size // 2)
    halved.gradient_accumulation_steps = 2 * args.gradient_accumulation_steps
    return halved


class TrainingMemoryError(ValueError):
    """Memory ran out in a training with the settings `args`. The message says what needs less."""

    def __init__(self, args: TrainingArguments):
        rows = args.per_device_train_batch_size
        remedies = "lower `max_length`, or set `activation_checkpointing`."
        if rows > 1:
            remedies = (
                "lower `per_device_train_batch_size` and raise `gradient_accumulation_steps` by the same factor for "
                f"equal updates, {remedies}"
            )
        count = "1 row" if rows == 1 else f"{rows} rows"
        super().__init__(f"Memory ran out with {count} per batch. {remedies[0].upper()}{remedies[1:]}")
