"""From prompts to greedy completions, batch by batch: what sampling and evaluation do alike.

`GreedyDecoder` takes the fastest way that a model allows. `run_in_batches` halves a batch that the memory does not
hold, and lets the one in flight come to its end when the process is told to stop. An order of work is a list of
`(row, room)`, longest prompts first, so that a batch that is too large shows at once; room is the number of tokens to
generate at most, one for a batch.
"""

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from ..models.forward import rope_switch
from ..models.weights import get_base_model
from ..processes import Processes
from ..vocabulary import Vocabulary
from .cuda_graphs import MAX_ROWS, Generated, generate_greedy_by_graph, rows_that_fit, why_no_graph
from .greedy import Alike, generate_by_passes, generate_greedy, length_that_shows, rows_alike
from .vllm import VLLMGeneration


logger = get_logger(__name__)

T = TypeVar("T")


class GreedyDecoder:
    """
    Greedy completions by vLLM if it is there, by CUDA graphs where the model allows them, and by `generate` elsewhere.

    Args:
        model (`torch.nn.Module`): A causal language model.
        vocabulary ([`Vocabulary`]): The model's real tokens; nothing else is ever chosen.
        eos_ids (`list[int]`): Tokens that end a completion. The one that did is kept, once.
        vllm ([`VLLMGeneration`], *optional*): What generates instead of the model.
    """

    def __init__(
        self, model: torch.nn.Module, vocabulary: Vocabulary, eos_ids: list[int], vllm: VLLMGeneration | None = None
    ):
        self.model, self.vocabulary, self.eos_ids, self.vllm = model, vocabulary, eos_ids, vllm
        self.rope_switch = rope_switch(get_base_model(model).config)
        self.alike: Alike | None = None
        self._looked_at = 0  # tokens
        reason = why_no_graph(model)
        self.by_graph = reason is None
        if reason is not None and model.device.type == "cuda" and vllm is None:
            self._go_on_plainly(reason)

    def __call__(self, prompt_ids: list[list[int]], max_new_tokens: int) -> Generated:
        if self.vllm is not None:
            return Generated(self.vllm(self.model, prompt_ids, self.vocabulary, self.eos_ids, max_new_tokens), None)
        longest = max(prompt_ids, key=len)
        length = length_that_shows(self.model, len(longest) + max_new_tokens)
        if length > self._looked_at:
            self._looked_at = length
            self._look_at_rows((longest * length)[:length])
        completions: list[list[int]] = [[] for _ in prompt_ids]
        going = set(range(len(prompt_ids)))
        while going:
            contexts = {row: prompt_ids[row] + completions[row] for row in going}
            kinds = {row: (len(completions[row]), *self._kind(row, contexts[row])) for row in going}
            kind = max(kinds.values())
            rows = [row for row in sorted(going) if kinds[row] == kind]
            room = min(self._room([contexts[row] for row in rows]), max_new_tokens - len(completions[rows[0]]))
            made = self._decode([contexts[row] for row in rows], room)
            if len(rows) == len(prompt_ids) and room == max_new_tokens:
                return made
            for row, ids in zip(rows, made.completions, strict=True):
                completions[row] += ids
                if ids[-1] in self.eos_ids or len(completions[row]) == max_new_tokens:
                    going.remove(row)
        return Generated(completions, None)

    def _look_at_rows(self, ids: list[int]) -> None:
        """See by some tokens what goes together; again when contexts become longer than a window of attention."""
        self.alike = rows_alike(self.model, ids, self.vocabulary)
        if self.alike == "any":
            return
        self.by_graph = False
        name = f"`{type(get_base_model(self.model)).__name__}`"
        logger.warning(
            {
                "length": f"Padding changes what {name} says, so that prompts of one length only are completed "
                "together, which is slower.",
                "row": f"Rows of a batch change what {name} says, so that they are completed one by one, which is "
                "slower.",
                None: f"`generate` does not write what {name} says, so that completions are made by a pass over all "
                "of the context for every token, which is slower.",
            }[self.alike]
        )

    def _kind(self, row: int, context: list[int]) -> tuple[bool, int]:
        """What contexts that are continued together have in common."""
        beyond = self.rope_switch is not None and len(context) > self.rope_switch
        return beyond, {"length": len(context), "row": row}.get(self.alike or "", 0)

    def _room(self, contexts: list[list[int]]) -> int:
        """How many tokens are made before the rope changes for one of the contexts."""
        longest = max(map(len, contexts))
        if self.rope_switch is None or longest > self.rope_switch:
            return sys.maxsize
        return self.rope_switch - longest + 1

    def _decode(self, prompt_ids: list[list[int]], max_new_tokens: int) -> Generated:
        arguments = (self.model, prompt_ids, self.vocabulary, self.eos_ids, max_new_tokens)
        if self.alike is None:
            return Generated(generate_by_passes(*arguments), None)
        if self.by_graph:
            try:
                return generate_greedy_by_graph(*arguments)
            except RuntimeError as error:
                if should_reduce_batch_size(error):
                    raise
                self._go_on_plainly(str(error).splitlines()[0])
        return Generated(generate_greedy(*arguments), None)

    @property
    def way(self) -> str:
        """How completions are made, for a progress bar."""
        return "by vLLM" if self.vllm is not None else "by CUDA graphs" if self.by_graph else "by generate"

    def _go_on_plainly(self, reason: str) -> None:
        self.by_graph = False
        logger.warning(f"Completions are made by `generate`, which is slower than CUDA graphs: {reason}.")


def find_batch_size(model: torch.nn.Module, longest: int | None, num_rows: int, num_processes: int) -> int:
    """
    How many of `num_rows` rows are worked on together: as many of `longest` tokens as a GPU's memory can generate, or
    if `longest` is `None`, and nothing is generated, as many as are ever together.
    """
    if model.device.type != "cuda":
        return 16
    most = MAX_ROWS if longest is None else rows_that_fit(model, longest)
    return even_batch_size(num_rows, most, num_processes)


def even_batch_size(num_rows: int, most: int, num_processes: int) -> int:
    """The size of even batches, at most `most`, as many for every process as can be."""
    return math.ceil(num_rows / (num_processes * math.ceil(num_rows / (num_processes * most))))


def share_batches(order: list[tuple[int, int]], batch_size: int, processes: Processes) -> list[tuple[int, int]]:
    """What this process does: every batch as a single process would form it, dealt out one by one."""
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
    The rows of each batch, and what was made of them. When the memory does not hold a batch, batches are halved from
    there on.

    Args:
        order (`list[tuple[int, int]]`): `(row, room)`.
        batch_size (`int`): Rows of a batch at most.
        run (`Callable`): What makes of rows and their room a result. May run out of memory.
        lengths (`Callable`): From a row to the number of its prompt's tokens, for an error message.
        remedy (`str`): What is to be done if the memory does not hold one row, for the same.

    Raises:
        `ValueError`: If the memory does not hold one row.
    """
    start = 0
    while start < len(order):
        # One call generates up to one length, so that a batch holds prompts with the same room
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
                f"Memory ran out with {len(indices)} prompts together; going on with {batch_size}.",
                main_process_only=False,  # each process says it for itself
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
    Do the work of one process.

    Args:
        order, batch_size, run, lengths: As of [`batches_that_fit`].
        write (`Callable`): Writes down the result of rows, and returns what the progress bar is to say.
        processes ([`Processes`]): Which share the work.
        desc (`str`): Name of the progress bar.

    Raises:
        `ValueError`: If the memory does not hold one row.
        `KeyboardInterrupt` or `SystemExit`: When a signal has come, after the batch in flight.
    """
    remedy = "Lower `max_new_tokens` or `max_prompt_length`, or load the models in a smaller `dtype`."
    to_go = len(order)
    with (
        _stop_between_batches() as received,
        tqdm(total=len(order), desc=desc, unit="prompt", disable=not processes.is_main) as progress,
    ):
        for indices, result in batches_that_fit(order, batch_size, run, lengths, remedy):
            progress.set_postfix_str(write(indices, result), refresh=False)
            progress.update(len(indices))
            to_go -= len(indices)
            if received and to_go:
                logger.warning(
                    f"Stopped with {to_go:,} prompts to go. Run the same again to go on.",
                    main_process_only=False,
                )
                raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Dropout off, as long as it lasts."""
    was_training = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@contextmanager
def _stop_between_batches() -> Iterator[list[int]]:
    """
    Collects the first SIGINT or SIGTERM, to be answered when the batch in flight is on the disk; a second one acts at
    once, as it would without.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
        for interrupt in (signal.SIGINT, signal.SIGTERM):
            before[interrupt] = signal.signal(interrupt, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
