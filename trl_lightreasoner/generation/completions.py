"""From prompts to greedy completions, batch by batch, for sampling and evaluation.

`GreedyDecoder` uses the fastest method that a model allows. `run_in_batches` halves a batch that does not fit in
memory, and finishes the current batch when the process is told to stop. A work order is a list of `(row, room)` with
the longest prompts first, so that a too large batch fails at once. Room is the maximum number of tokens to generate,
the same for all rows of a batch.
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

from ..contrast import NonFiniteLogitsError
from ..models.forward import logits_of_row, rope_switch
from ..models.weights import get_base_model
from ..processes import Processes
from ..vocabulary import Vocabulary
from .cuda_graphs import Generated, complete_in_slots, generate_greedy_by_graph, why_no_graph
from .greedy import Alike, generate_by_passes, generate_greedy, is_broken, length_that_shows, rows_alike
from .row_cache import MAX_ROWS, bytes_of_row, rows_that_fit
from .vllm import VLLMGeneration


logger = get_logger(__name__)

T = TypeVar("T")

# On a CPU: bytes for the rows of a batch, and rows that even a large or a tiny model gets. More gain nothing, because
# `generate` goes on with those that have ended
_CPU_MEMORY = 2**30
CPU_ROWS = (16, 64)


class GreedyDecoder:
    """
    Greedy completions with vLLM if requested, else with CUDA graphs if the model allows them, else with `generate`.

    Args:
        model (`torch.nn.Module`): A causal language model.
        vocabulary ([`Vocabulary`]): The model's real tokens. No other token is ever chosen.
        eos_ids (`list[int]`): Tokens that end a completion. The one that ended it is kept, once.
        vllm ([`VLLMGeneration`], *optional*): vLLM, to generate instead of the model.
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
            self._look_at_logits(prompt_ids[0])
            return Generated(self.vllm(self.model, prompt_ids, self.vocabulary, self.eos_ids, max_new_tokens), None)
        self._look_at_rows(max(prompt_ids, key=len), max_new_tokens)
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

    def in_slots(
        self,
        prompt_ids: list[list[int]],
        rooms: list[int],
        num_slots: int,
        completions: list[list[int]],
        is_answered: Callable[[int, list[int]], bool] | None = None,
    ) -> bool:
        """
        Whether the model allows [`~trl_lightreasoner.generation.cuda_graphs.complete_in_slots`], which has then been
        called with these arguments.
        """
        self._look_at_rows(max(prompt_ids, key=len), max(rooms))
        if not self.has_slots:
            return False
        arguments = (self.model, prompt_ids, rooms, self.vocabulary, self.eos_ids, num_slots, completions, is_answered)
        try:
            complete_in_slots(*arguments)
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise
            self._go_on_plainly(str(error).splitlines()[0])
            return False
        return True

    def _look_at_logits(self, prompt: list[int]) -> None:
        """Refuse a model that overflows. vLLM, which does not tell, would choose tokens all the same."""
        if not self._looked_at and is_broken(self.vocabulary.select(logits_of_row(self.model, prompt, 1))):
            raise NonFiniteLogitsError("model", 0, "the first token of an answer")
        self._looked_at = len(prompt)

    def _look_at_rows(self, longest: list[int], max_new_tokens: int) -> None:
        """Test which rows can be batched, on some tokens, and again when contexts exceed a window of attention."""
        length = length_that_shows(self.model, len(longest) + max_new_tokens)
        if length <= self._looked_at:
            return
        self._looked_at = length
        self.alike = rows_alike(self.model, (longest * length)[:length], self.vocabulary)
        if self.alike == "any":
            return
        self.by_graph = False
        name = f"`{type(get_base_model(self.model)).__name__}`"
        logger.warning(
            {
                "length": f"Padding changes the predictions of {name}. Only prompts of equal length are completed "
                "together, which is slower.",
                "row": f"The predictions of {name} depend on other rows of a batch. Prompts are completed one by one, "
                "which is slower.",
                None: f"`generate` does not reproduce the predictions of {name}. Every token is generated by a pass "
                "over the whole context, which is slower.",
            }[self.alike]
        )

    def _kind(self, row: int, context: list[int]) -> tuple[bool, int]:
        """The property that contexts of one batch must share."""
        beyond = self.rope_switch is not None and len(context) > self.rope_switch
        return beyond, {"length": len(context), "row": row}.get(self.alike or "", 0)

    def _room(self, contexts: list[list[int]]) -> int:
        """Number of tokens to generate before the rope changes for one of the contexts."""
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
    def has_slots(self) -> bool:
        """Whether [`in_slots`] can be tried. With a rope that changes with the length, rows must not mix."""
        return self.vllm is None and self.by_graph and self.rope_switch is None

    @property
    def way(self) -> str:
        """The generation method, for a progress bar."""
        return "by vLLM" if self.vllm is not None else "by CUDA graphs" if self.by_graph else "by generate"

    def _go_on_plainly(self, reason: str) -> None:
        self.by_graph = False
        logger.warning(f"Completions are generated without CUDA graphs, which is slower: {reason}.")


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
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """A context without dropout."""
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
