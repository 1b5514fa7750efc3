"""Greedy decoding of many prompts together on a CUDA GPU. Each step replays one captured CUDA graph.

A step of `generate` spends as much time in Python and in launching kernels as a large batch needs to compute. A graph
is captured in a fraction of a second and launches the whole step at once. A graph needs tensors at fixed addresses:
keys and values are stored in buffers of full length, prompts first, and each row writes after its own last token. The
place of a row in the buffers is a slot. When the row has ended, the next prompt is read into its slot, and the same
graph goes on.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..contrast import NonFiniteLogitsError
from ..models.forward import (
    attention_backends,
    has_full_attention,
    head_makes_logits,
    same_logits,
    to_device,
    without_routers,
)
from ..models.weights import get_base_model
from ..vocabulary import Vocabulary
from .greedy import is_broken
from .row_attention import row_attention, row_bounds, why_no_row_attention
from .row_cache import RowLayer


# Prompt tokens in one forward pass: enough to fill a GPU, few enough for its memory
PREFILL_TOKENS = 2**14
# Steps between two checks of which rows have ended. Each check waits for the GPU
STEPS_BETWEEN_CHECKS = 32
# After this number of new tokens, the text of a row is checked for a finished answer
TOKENS_A_LOOK = 64
# Prompts are read when they can take this part of the slots: one pass over many takes less time
_PARTS = 16
# The kernels read columns in groups of this size
_COLUMNS = 16
_NO_TOKEN = -1
# For the test of attention by length: a value that shows in the logits, also in fp16, and rows to compare
_ABSURD = 1e4
_ROWS_COMPARED = 32
# Results of the test
_WHY_BY_MASK: WeakKeyDictionary[torch.nn.Module, str | None] = WeakKeyDictionary()


class Generated(NamedTuple):
    """
    Generated completions.

    Attributes:
        completions (`list[list[int]]`): Completions in the order of the prompts.
        hidden_states (`list[torch.Tensor]`, *optional*): For each completion of T tokens, the inputs of the output
            head at each token, `(T, hidden_size)`. `None` for a model that does more than apply its head.
    """

    completions: list[list[int]]
    hidden_states: list[torch.Tensor] | None


def why_no_graph(model: torch.nn.Module) -> str | None:
    """The reason why a model cannot decode with CUDA graphs, or `None` if it can."""
    base = get_base_model(model)
    devices = {parameter.device for parameter in base.parameters()}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        return "the expert is not on one CUDA GPU"
    if not getattr(base, "_can_compile_fullgraph", False):
        return f"`{type(base).__name__}` has no static form"
    if not has_full_attention(base):
        return "they need full attention under attn_implementation='sdpa'"
    return None


@torch.no_grad()
def generate_greedy_by_graph(
    model: torch.nn.Module,
    prompt_ids: list[list[int]],
    vocabulary: Vocabulary,
    eos_ids: list[int],
    max_new_tokens: int,
) -> Generated:
    """
    The completions of [`~trl_lightreasoner.generation.greedy.generate_greedy`], and their hidden states. Only for
    models for which [`why_no_graph`] returns `None`. In half precision, the choice between tokens of almost equal
    probability may differ.
    """
    base = get_base_model(model)
    order = _longest_first(prompt_ids)
    count = len(order)
    decoder = _Decoder(base, [prompt_ids[i] for i in order], [max_new_tokens] * count, vocabulary, eos_ids, count)
    hook = base.get_output_embeddings().register_forward_pre_hook(decoder.note_head)
    try:
        with attention_backends(decoder.device):
            longest = torch.tensor([prompt_ids[order[0]]], device=decoder.device)
            decoder.keeps_hidden_states = head_makes_logits(base, longest)
            decoder.decode()
    finally:
        hook.remove()
    completions = decoder.completions()
    places = sorted(range(count), key=lambda row: order[row])
    hidden_states = decoder.hidden_states
    if hidden_states is not None:
        hidden_states = [hidden_states[row, : len(completions[row])] for row in places]
    return Generated([completions[row] for row in places], hidden_states)


@torch.no_grad()
def complete_in_slots(
    model: torch.nn.Module,
    prompt_ids: list[list[int]],
    rooms: list[int],
    vocabulary: Vocabulary,
    eos_ids: list[int],
    num_slots: int,
    completions: list[list[int]],
    is_answered: Callable[[int, list[int]], bool] | None = None,
) -> None:
    """
    The completions of [`generate_greedy_by_graph`] for any number of prompts, `num_slots` at a time: when a completion
    ends, the next prompt takes its place.

    Args:
        model, prompt_ids, vocabulary, eos_ids: As for [`generate_greedy_by_graph`].
        rooms (`list[int]`): Maximum number of tokens of each completion.
        num_slots (`int`): Rows together.
        completions (`list[list[int]]`): One list per prompt, to which its tokens are appended. If an error is raised,
            they hold the tokens generated before.
        is_answered (`Callable`, *optional*): Whether the completion of a prompt, given by its index, may end with some
            tokens. It is asked at every multiple of [`TOKENS_A_LOOK`], wherever the prompt's slot is.
    """
    order = _longest_first(prompt_ids)
    rows = ([prompt_ids[i] for i in order], [rooms[i] for i in order])
    decoder = _Decoder(get_base_model(model), *rows, vocabulary, eos_ids, num_slots)
    ask = None if is_answered is None else lambda row, ids: is_answered(order[row], ids)
    try:
        with attention_backends(decoder.device):
            decoder.decode(ask)
    finally:
        for i, ids in zip(order, decoder.completions(), strict=True):
            completions[i] += ids


def why_by_mask(model: torch.nn.Module) -> str | None:
    """The reason why a model that has decoded does not attend by length, or `None` if it does."""
    return _WHY_BY_MASK.get(get_base_model(model), "its keys and values cannot be read by length")


def _longest_first(prompt_ids: list[list[int]]) -> list[int]:
    return sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))


class _Decoder:
    """
    Slots for the rows that are decoded together, and the step that extends all of them by one token.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        prompt_ids (`list[list[int]]`): Prompts, longest first. A row is the index of a prompt.
        rooms (`list[int]`): Maximum number of tokens for each row.
        vocabulary ([`Vocabulary`]): The model's real tokens.
        eos_ids (`list[int]`): Tokens that end a completion.
        num_slots (`int`): Rows together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: list[list[int]],
        rooms: list[int],
        vocabulary: Vocabulary,
        eos_ids: list[int],
        num_slots: int,
    ):
        self.model, self.prompt_ids = model, prompt_ids
        self.device = model.get_input_embeddings().weight.device
        self.vocabulary = vocabulary.to(self.device)
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=self.device)
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.without_routers = without_routers(model)
        longest = max(len(ids) + room for ids, room in zip(prompt_ids, rooms, strict=True))
        self.num_columns = -(-longest // _COLUMNS) * _COLUMNS
        self.by_length = False
        # For all rows: chosen tokens, and the hidden states that they were chosen from. The last column stays free
        shape = (len(prompt_ids), max(rooms) + 1)
        self.tokens = torch.full(shape, _NO_TOKEN, dtype=torch.long, device=self.device)
        self.hidden_states: torch.Tensor | None = None
        self.keeps_hidden_states = False
        self.broken = torch.zeros(len(prompt_ids), dtype=torch.bool, device=self.device)  # chosen from NaN or infinity
        self.rooms = torch.tensor(rooms, device=self.device)
        self.looked_at = [0] * len(prompt_ids)  # tokens
        self.answered: dict[int, int] = {}  # rows, and how many of their tokens count
        # For the slots: keys and values of each layer, rows, and a row's state. A step reads and writes these in place
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        num_slots = min(num_slots, len(prompt_ids))
        self.rows = torch.arange(num_slots, device=self.device)
        self.positions, self.last, self.taken = torch.zeros(3, num_slots, dtype=torch.long, device=self.device)
        self.ended = torch.zeros(num_slots, dtype=torch.bool, device=self.device)

    def note_head(self, head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.head_input = args[0]

    def completions(self) -> list[list[int]]:
        """The tokens of every row so far."""
        return [ids[: self.answered.get(row, ids.index(_NO_TOKEN))] for row, ids in enumerate(self.tokens.tolist())]

    def fill(self, slots: list[int], rows: list[int]) -> None:
        """Read the prompts of `rows` into `slots`, longest first, and choose their first tokens."""
        while rows:
            count = max(1, PREFILL_TOKENS // len(self.prompt_ids[rows[0]]))
            self._read(slots[:count], rows[:count])
            slots, rows = slots[count:], rows[count:]

    def _read(self, some_slots: list[int], some_rows: list[int]) -> None:
        # Padding on the right needs no mask, since no token attends to later ones
        prompts = [self.prompt_ids[row] for row in some_rows]
        length = len(prompts[0])
        padded = [ids + [0] * (length - len(ids)) for ids in prompts]
        input_ids, slots, rows, lengths = (
            to_device(torch.tensor(each), self.device)
            for each in (padded, some_slots, some_rows, [len(ids) for ids in prompts])
        )
        cache = DynamicCache(config=self.model.config)
        logits = self.model(
            input_ids=input_ids,
            use_cache=True,
            logits_to_keep=lengths[:, None] - 1,
            **{self.cache_name: cache, **self.without_routers},
        ).logits
        if not self.buffers:
            for layer in cache.layers:
                shape = (len(self.rows), self.num_columns, layer.keys.shape[1])
                keys, values = (states.new_zeros(*shape, states.shape[-1]) for states in (layer.keys, layer.values))
                self.buffers.append((keys, values))
            if self.keeps_hidden_states:
                self.hidden_states = self.head_input.new_zeros(*self.tokens.shape, self.head_input.shape[-1])
        for layer, (keys, values) in zip(cache.layers, self.buffers, strict=True):
            keys[slots, :length] = layer.keys.transpose(1, 2)
            values[slots, :length] = layer.values.transpose(1, 2)
        first, self.broken[rows] = self._most_probable(logits[:, 0])
        if self.hidden_states is not None:
            self.hidden_states[rows, 0] = self.head_input[:, 0]
        self.tokens[rows, 0] = first
        self.rows[slots], self.positions[slots], self.last[slots], self.taken[slots] = rows, lengths, first, 1
        self.ended[slots] = torch.isin(first, self.eos_ids) | (self.rooms[rows] == 1)

    def _most_probable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The most probable tokens, and whether there is none because a logit is NaN or infinite."""
        logits = self.vocabulary.select(logits)
        columns = logits.argmax(-1, keepdim=True)
        return self.vocabulary.ids_of(columns[:, 0]), is_broken(logits.gather(-1, columns))

    def _logits(self) -> torch.Tensor:
        """Logits after the last token of every slot. Its keys and values are stored."""
        if self.by_length:
            # What has ended is read no more
            self.bounds[0, 0, 0, :-1] = (self.positions + 1).masked_fill_(self.ended, 1)
            mask = self.bounds
        else:
            # Additive, as the kernels need it. Each row sees its own tokens, up to the current input
            ahead, dtype = self._ahead(), self.buffers[0][0].dtype
            mask = torch.zeros(ahead.shape, dtype=dtype, device=self.device)
            mask = mask.masked_fill_(ahead, torch.finfo(dtype).min)[:, None, None]
        with row_attention(self.model.config) if self.by_length else nullcontext():
            outputs = self.model(
                input_ids=self.last[:, None],
                position_ids=self.positions[:, None],
                attention_mask=mask,
                use_cache=True,
                **{self.cache_name: self.cache, **self.without_routers},
            )
        return outputs.logits[:, -1]

    def _ahead(self) -> torch.Tensor:
        return torch.arange(self.num_columns, device=self.device) > self.positions[:, None]

    def _step(self) -> None:
        tokens, broken = self._most_probable(self._logits())
        self.last.copy_(tokens)
        self.broken[self.rows] |= broken & ~self.ended
        if self.hidden_states is not None:
            self.hidden_states[self.rows, self.taken] = self.head_input[:, -1]
        self.tokens[self.rows, self.taken] = self.last.masked_fill(self.ended, _NO_TOKEN)
        going = self.ended.logical_not()
        self.positions += going
        self.taken += going
        self.ended |= torch.isin(self.last, self.eos_ids) | (self.taken == self.rooms[self.rows])

    def decode(self, is_answered: Callable[[int, list[int]], bool] | None = None) -> None:
        """Decode all rows, see [`complete_in_slots`]."""
        held = list(range(len(self.rows)))  # the row in each slot
        waiting = list(range(len(held), len(self.prompt_ids)))
        rooms = self.rooms.tolist()
        self.fill(held, held)
        step: Callable[[], None] | None = None
        while True:
            states = [self.taken, self.ended, self.broken[self.rows]]
            taken, ended, broken = torch.stack(states).tolist()  # waits for the GPU
            if any(broken):
                slot = broken.index(1)
                raise NonFiniteLogitsError("model", held[slot], f"one of the first {taken[slot]} tokens of an answer")
            unread = self._unread(held, taken) if is_answered is not None else []
            free = [slot for slot, has_ended in enumerate(ended) if has_ended]
            if waiting and len(free) >= min(len(waiting), max(1, len(held) // _PARTS)):
                rows, waiting = waiting[: len(free)], waiting[len(free) :]
                self.fill(free[: len(rows)], rows)
                for slot, row in zip(free, rows, strict=False):
                    held[slot] = row
            elif len(free) < len(held):
                alive = [slot for slot, has_ended in enumerate(ended) if not has_ended]
                left = max(rooms[held[slot]] - taken[slot] for slot in alive)
                if len(alive) <= len(held) // 2:  # and so no prompt waits
                    step = None  # its graph keeps the old buffers alive
                    self._keep(alive)
                    held = [held[slot] for slot in alive]
                if step is None:
                    step = self._capture()
                    left -= 1
                for _ in range(min(STEPS_BETWEEN_CHECKS, left)):
                    step()
            else:
                held = []
            if is_answered is not None:
                self._look(unread, held, is_answered)  # while the GPU works
            if not held:
                return

    def _unread(self, held: list[int], taken: list[int]) -> list[tuple[int, torch.Tensor]]:
        """Rows with enough new tokens for another look, and all of their tokens."""
        due = {
            row: count
            for row, count in zip(held, taken, strict=True)
            if count >= self.looked_at[row] + TOKENS_A_LOOK and row not in self.answered
        }
        if not due:
            return []
        tokens = self.tokens[to_device(torch.tensor(list(due)), self.device)].cpu()
        return [(row, ids[: due[row]]) for row, ids in zip(due, tokens, strict=True)]

    def _look(
        self, unread: list[tuple[int, torch.Tensor]], held: list[int], is_answered: Callable[[int, list[int]], bool]
    ) -> None:
        """End the rows that are answered."""
        for row, ids in unread:
            for count in range(self.looked_at[row] + TOKENS_A_LOOK, len(ids) + 1, TOKENS_A_LOOK):
                self.looked_at[row] = count
                if is_answered(row, ids[:count].tolist()):
                    self.answered[row] = count
                    if row in held:
                        self.ended[held.index(row)] = True
                    break

    def _keep(self, slots: list[int]) -> None:
        """Remove all slots but these."""
        index = to_device(torch.tensor(slots), self.device)
        self.rows, self.positions, self.last = self.rows[index], self.positions[index], self.last[index]
        self.taken, self.ended = self.taken[index], self.ended[index]
        self.cache = None  # it keeps the old buffers alive
        for i, (keys, values) in enumerate(self.buffers):
            self.buffers[i] = (keys[index], values[index])

    def _capture(self) -> Callable[[], None]:
        """Run one step, and return a function that runs the next ones."""
        self.cache = Cache(layers=[RowLayer(*buffers, self.positions) for buffers in self.buffers])
        self.bounds = row_bounds(len(self.rows), self.num_columns, self.device)
        self.by_length = self._attends_by_length()
        if self.device.type != "cuda":
            self._step()
            return self._step
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # A plain step first, in which the libraries initialize
            self._step()
            # `torch.cuda.graph` would first collect garbage, which takes longer than the capture
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def _attends_by_length(self) -> bool:
        """Whether the layers can attend by length. It is tested once per model that the logits stay the same."""
        if any(why_no_row_attention(*buffers) is not None for buffers in self.buffers):
            return False
        if self.model not in _WHY_BY_MASK:
            _WHY_BY_MASK[self.model] = self._difference_by_length()
        return _WHY_BY_MASK[self.model] is None

    def _difference_by_length(self) -> str | None:
        """What is wrong with the logits by length, or `None`. Both ways store the same keys and values."""
        # Whatever reads further than a row's tokens comes upon this
        ahead = self._ahead()[:, :, None, None]
        for _, values in self.buffers:
            values.masked_fill_(ahead, _ABSURD)
        alive = self.ended.logical_not().nonzero()[:, 0]
        some = alive[:: max(1, len(alive) // _ROWS_COMPARED)]
        self.by_length = False
        expected = self._logits()[some]
        self.by_length = True
        try:
            logits = self._logits()[some]
        except (RuntimeError, TypeError, ValueError, NotImplementedError, KeyError) as error:
            if should_reduce_batch_size(error):
                raise
            return str(error).splitlines()[0]
        return None if same_logits(self.model, logits, expected) else "the logits differ from those under a mask"
