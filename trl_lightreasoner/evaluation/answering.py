"""From questions to graded answers, for the evaluation on benchmarks and the accuracy during training.

A model that decodes by CUDA graphs answers in slots: the next prompt takes the place of a finished answer. Any other
answers in pieces, between which finished rows leave the batch. An answer to a plain text prompt, as for base
models, is graded up to its first finished answer, because a base model would continue with its own questions. An
answer to messages ends with an EOS token and is graded as a whole.
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedTokenizerBase, logging

from ..contrast import NonFiniteLogitsError
from ..generation.batches import find_batch_size
from ..generation.completions import GreedyDecoder
from ..generation.cuda_graphs import Generated
from ..grading.answers import first_answer, has_first_answer
from ..grading.verdicts import Verdict, grade_all


logger = logging.get_logger(__name__)

# After this number of tokens, ended rows leave the batch, and plain text is checked for a finished answer
TOKENS_A_PIECE = 256
# Slots have room for the longest answer. Where the memory holds fewer, more rows together in pieces take less time
_FEWEST_SLOTS = 256


def plan_answers(prompt_ids: list[list[int]], max_new_tokens: int, context: int | None) -> list[tuple[int, int]]:
    """
    Rows and the maximum lengths of their answers in tokens, longest prompts first, without rows that have no prompt or
    no room in the model's context.

    Example:

    ```python
    >>> plan_answers([[5], [], [5, 6], [5] * 9], max_new_tokens=8, context=9)
    [(2, 7), (0, 8)]
    >>> plan_answers([[5]], max_new_tokens=8, context=None)
    [(0, 8)]

    ```
    """
    most = sys.maxsize if context is None else context
    rooms = [(row, min(max_new_tokens, most - len(ids))) for row, ids in enumerate(prompt_ids) if ids]
    plan = [(row, room) for row, room in rooms if room > 0]
    return sorted(plan, key=lambda item: (-len(prompt_ids[item[0]]), item[0]))


class Answering:
    """
    Greedy answers of one model.

    Args:
        model (`torch.nn.Module`): The model.
        decode (`Callable`): Its greedy completions, such as a [`GreedyDecoder`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        eos_ids (`list[int]`): Tokens that end an answer.
        is_raw (`bool`): Whether prompts are plain text.
        batch_size (`int`, *optional*): Rows together. If `None`, as many as the memory holds.
        in_pieces (`bool`, *optional*, defaults to `True`): Whether to remove finished rows from the batch, which vLLM
            and slots do by themselves.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        decode: Callable[[list[list[int]], int], Generated],
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: list[int],
        is_raw: bool,
        batch_size: int | None = None,
        in_pieces: bool = True,
    ):
        self.model, self.decode, self.tokenizer, self.eos_ids = model, decode, tokenizer, eos_ids
        self.is_raw, self.batch_size, self.in_pieces = is_raw, batch_size, in_pieces
        self._most = sys.maxsize  # rows together, once the memory has run out

    def rows_together(self, num_tokens: int, room: int, num_rows: int, num_processes: int = 1) -> int:
        """Batch size for `num_rows` rows whose longest prompt has `num_tokens` tokens."""
        longest = num_tokens + self._piece(room)
        return self.batch_size or find_batch_size(self.model, longest, num_rows, num_processes)

    def complete(self, prompt_ids: list[list[int]], rooms: list[int]) -> tuple[list[list[int]], list[bool]]:
        """
        The completion of each prompt, of at most as many tokens as its room, and whether it is finished. When the
        memory does not hold the rows together, half as many are from there on.

        Raises:
            [`NonFiniteLogitsError`]: If logits are NaN or infinite. Its row is that of the prompt.
        """
        if isinstance(self.decode, GreedyDecoder) and self.decode.has_slots:
            answers = self._complete_in_slots(self.decode, prompt_ids, rooms)
            if answers is not None:
                return answers
        completions: list[list[int]] = [[] for _ in prompt_ids]
        ended = [False] * len(prompt_ids)
        start = 0
        # The prompt of a later piece includes everything generated before it, as in greedy decoding
        while contexts := {
            i: prompt_ids[i] + completions[i] for i, room in enumerate(rooms) if not ended[i] and start < room
        }:
            length = self._piece(min(rooms[i] for i in contexts) - start)
            start += length
            going = sorted(contexts, key=lambda i: -len(contexts[i]))
            while going:
                size = min(self._most, self.rows_together(len(contexts[going[0]]), length, len(going)))
                rows = going[:size]
                try:
                    made = self.decode([contexts[i] for i in rows], length).completions
                except NonFiniteLogitsError as error:
                    raise _of_row(error, rows[error.row], completions) from None
                except RuntimeError as error:
                    # What is written so far is kept: only these rows and those that follow are fewer together
                    self._reduce(len(rows), error)
                    continue
                going = going[size:]
                for i, ids in zip(rows, made, strict=True):
                    completions[i] += ids
                    ended[i] = self._has_ended(completions[i])
        return completions, ended

    def _num_slots(self, prompt_ids: list[list[int]], rooms: list[int]) -> int:
        """Number of slots to answer in, or 0 if the memory holds too few."""
        if self.batch_size is not None:
            return self.batch_size
        longest = max(len(ids) + room for ids, room in zip(prompt_ids, rooms, strict=True))
        size = find_batch_size(self.model, longest, len(prompt_ids), 1)
        return size if size >= min(_FEWEST_SLOTS, len(prompt_ids)) else 0

    def _complete_in_slots(
        self, decode: GreedyDecoder, prompt_ids: list[list[int]], rooms: list[int]
    ) -> tuple[list[list[int]], list[bool]] | None:
        """The result of [`complete`], or `None` if the memory or the model does not allow slots."""
        num_slots = self._num_slots(prompt_ids, rooms)
        if num_slots == 0:
            return None
        completions: list[list[int]] = [[] for _ in prompt_ids]
        ended = [False] * len(prompt_ids)
        while going := [i for i, room in enumerate(rooms) if not ended[i] and len(completions[i]) < room]:
            before = [completions[i] for i in going]
            contexts = [prompt_ids[i] + completions[i] for i in going]
            left = [rooms[i] - len(completions[i]) for i in going]
            made: list[list[int]] = [[] for _ in going]
            ask = partial(self._is_answered_with, before) if self.is_raw else None
            size = min(num_slots, self._most, len(going))
            is_all = True
            try:
                if not decode.in_slots(contexts, left, size, made, ask):
                    return None
            except NonFiniteLogitsError as error:
                raise _of_row(error, going[error.row], completions) from None
            except RuntimeError as error:
                self._reduce(size, error)
                is_all = False
            for i, ids in zip(going, made, strict=True):
                completions[i] = completions[i] + ids
                if is_all and len(completions[i]) < rooms[i]:
                    ended[i] = True  # so its text need not be read again
                elif ids:
                    ended[i] = self._has_ended(completions[i])
        return completions, ended

    def _reduce(self, size: int, error: RuntimeError) -> None:
        """Put fewer rows together after `error`, if they ran out of memory and are not a single one."""
        if size == 1 or not should_reduce_batch_size(error):
            raise error
        self._most = (size + 1) // 2
        clear_device_cache(garbage_collection=True)
        logger.warning(f"Memory ran out with {size} answers together; going on with {self._most}.")

    def _has_ended(self, completion_ids: list[int]) -> bool:
        return completion_ids[-1] in self.eos_ids or self._is_answered(completion_ids)

    def _is_answered_with(self, before: list[list[int]], row: int, completion_ids: list[int]) -> bool:
        return self._is_answered(before[row] + completion_ids)

    def texts(self, completion_ids: list[list[int]]) -> list[str]:
        """The generated texts."""
        return self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)

    def _piece(self, room: int) -> int:
        return min(room, TOKENS_A_PIECE) if self.in_pieces else room

    def _is_answered(self, completion_ids: list[int]) -> bool:
        if not self.is_raw:
            return False
        (text,) = self.texts([completion_ids])
        return has_first_answer(text)


def _of_row(error: NonFiniteLogitsError, row: int, completions: list[list[int]]) -> NonFiniteLogitsError:
    """The error of a piece of an answer, as that of the row whose answer it continues."""
    written = len(completions[row])
    place = f"a token after the first {written} of an answer" if written else error.place
    return NonFiniteLogitsError(error.model, row, place)


def grade_answers(
    answers: list[str], references: list[dict[str, Any]], is_raw: bool, num_workers: int | None = None
) -> list[Verdict]:
    """
    Verdicts on answers, with a warning for answers that could not be graded.

    Args:
        answers (`list[str]`): Text of the model.
        references (`list[dict]`): The other arguments of [`grade`], one dictionary per answer.
        is_raw (`bool`): Whether the prompts were plain text.
        num_workers (`int`, *optional*): Number of grading processes.

    Example:

    ```python
    >>> run_on = "It is 4.\\nThe answer is 4.\\n\\nQuestion: What is 3+3?\\nAnswer: The answer is 6."
    >>> [grade_answers([run_on], [{"gold": ["4"]}], is_raw)[0].correct for is_raw in (True, False)]
    [True, False]

    ```
    """
    texts = [first_answer(answer) if is_raw else answer for answer in answers]
    items = [{"completion": text, **reference} for text, reference in zip(texts, references, strict=True)]
    verdicts = grade_all(items, num_workers=num_workers)
    failures = Counter(verdict.failure for verdict in verdicts if verdict.failure is not None)
    if failures:
        reasons = ", ".join(f"{failure} ({count:,})" for failure, count in failures.most_common())
        logger.warning(
            f"{failures.total():,} of {len(verdicts):,} answers could not be graded: {reasons}. They count as wrong."
        )
    return verdicts
