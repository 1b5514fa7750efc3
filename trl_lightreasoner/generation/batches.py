"""Work that is done batch by batch, for sampling and evaluation.

A batch that does not fit in memory is halved, and the current batch is finished when the process is told to stop. A
work order is a list of `(row, room)` with the longest prompts first, so that a too large batch fails at once. Room is
the maximum number of tokens to generate, the same for all rows of a batch.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from ..processes import Processes
from .row_cache import MAX_ROWS, bytes_of_row, rows_that_fit


logger = get_logger(__name__)

T = TypeVar("T")

# On a CPU: bytes for the rows of a batch, and rows that even a large or a tiny model gets. More gain nothing, because
# `generate` goes on with those that have ended
_CPU_MEMORY = 2**30
CPU_ROWS = (16, 64)


def find_batch_size(model: torch.nn.Module, longest: int | None, num_rows: int, num_processes: int) -> int:
    """
    How many of `num_rows` rows to process together: as many rows of `longest` tokens as a GPU's memory can generate,
    or on a CPU as many as 1 GiB holds, between 16 and 64. If `longest` is `None`, nothing is generated, and the
    maximum batch size is used, or 16 on a CPU.
    """
    if model.device.type != "cuda":
        # Not by the free memory, so that a machine gives the same numbers whatever else runs on it
        least, most = CPU_ROWS
        fitting = least if longest is None else _CPU_MEMORY // bytes_of_row(model, longest)
        return even_batch_size(num_rows, max(least, min(most, fitting)), num_processes)
    most = MAX_ROWS if longest is None else rows_that_fit(model, longest)
    return even_batch_size(num_rows, most, num_processes)


def even_batch_size(num_rows: int, most: int, num_processes: int) -> int:
    """The size of even batches, at most `most`, such that the processes get equal numbers of batches if possible."""
    return math.ceil(num_rows / (num_processes * math.ceil(num_rows / (num_processes * most))))


def share_batches(order: list[tuple[int, int]], batch_size: int, processes: Processes) -> list[tuple[int, int]]:
    """The batches of this process: batches are formed as by a single process, and dealt out one by one."""
    batches: list[list[tuple[int, int]]] = []
    for item in order:
        if not batches or batches[-1][0][1] != item[1] or len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1].append(item)
    return [item for batch in processes.share(batches) for item in batch]


def batches_that_fit(
    order: list[tuple[int, int]],
    batch_size: int,
    run: Callable[[list[int], int], T],
    lengths: Callable[[int], int],
    remedy: str,
) -> Iterator[tuple[list[int], T]]:
    """
    The rows of each batch and their result. If a batch does not fit in memory, it and all later ones are halved.

    Args:
        order (`list[tuple[int, int]]`): `(row, room)`.
        batch_size (`int`): Maximum number of rows in a batch.
        run (`Callable`): Computes the result of rows and their room. May run out of memory.
        lengths (`Callable`): From a row to the number of its prompt's tokens, for an error message.
        remedy (`str`): What to do if a single row does not fit in memory, for an error message.

    Raises:
        `ValueError`: If a single row does not fit in memory.
    """
    start = 0
    while start < len(order):
        # One call generates up to one length, so all prompts in a batch have the same room
        room = order[start][1]
        batch = order[start : start + batch_size]
        indices = [index for index, other_room in batch if other_room == room]
        try:
            result = run(indices, room)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(indices) == 1:
                raise ValueError(
                    f"Memory ran out for row {indices[0]} alone ({lengths(indices[0])} prompt tokens). {remedy}"
                ) from error
            clear_device_cache(garbage_collection=True)
            batch_size = (len(indices) + 1) // 2
            logger.warning(
                f"Memory ran out with a batch of {len(indices)} prompts. Continuing with {batch_size}.",
                main_process_only=False,  # each process logs its own
            )
            continue
        yield indices, result
        start += len(indices)


def run_in_batches(
    order: list[tuple[int, int]],
    batch_size: int,
    run: Callable[[list[int], int], T],
    write: Callable[[list[int], T], str],
    lengths: Callable[[int], int],
    processes: Processes,
    desc: str,
) -> None:
    """
    Run all batches of this process.

    Args:
        order, batch_size, run, lengths: As for [`batches_that_fit`].
        write (`Callable`): Saves the result of rows, and returns the text for the progress bar.
        processes ([`Processes`]): The processes that share the work.
        desc (`str`): Name of the progress bar.

    Raises:
        `ValueError`: If a single row does not fit in memory.
        `KeyboardInterrupt` or `SystemExit`: After a signal, when the current batch is finished.
    """
    remedy = "Lower `max_new_tokens` or `max_prompt_length`, or load the models in a smaller `dtype`."
    if processes.count > 1:
        remedy += " If processes share this device, start fewer."
    to_go = len(order)
    with (
        _stop_between_batches() as received,
        tqdm(total=len(order), desc=desc, unit="prompt", disable=not processes.is_main or not order) as progress,
    ):
        for indices, result in batches_that_fit(order, batch_size, run, lengths, remedy):
            progress.set_postfix_str(write(indices, result), refresh=False)
            progress.update(len(indices))
            to_go -= len(indices)
            if received:  # also in the last batch: what would follow is not wanted either
                if to_go:
                    logger.warning(
                        f"Interrupted with {to_go:,} prompts left. Rerun the same command to resume.",
                        main_process_only=False,
                    )
                raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])


@contextmanager
def _stop_between_batches() -> Iterator[list[int]]:
    """
    Delays the first SIGINT or SIGTERM until the current batch is on the disk. A second one acts at once, as usual.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
        for interrupt in (signal.SIGINT, signal.SIGTERM):
            before[interrupt] = signal.signal(interrupt, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
