"""Greedy decoding of many prompts together on a CUDA GPU. Each step replays one captured CUDA graph.

A step of `generate` spends as much time in Python and in launching kernels as a large batch needs to compute. A graph
is captured in a fraction of a second and launches the whole step at once. A graph needs tensors at fixed addresses:
keys and values are stored in buffers of full length, prompts first, and each row writes after its own last token.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from ..models.forward import attention_backends, has_full_attention, head_makes_logits, to_device, without_routers
from ..models.weights import get_base_model
from ..vocabulary import Vocabulary
from .greedy import cut_after_eos


# Prompt tokens in one forward pass: enough to fill a GPU, few enough for its memory
PREFILL_TOKENS = 2**14
# Steps between two checks of which rows have ended. Each check waits for the GPU
STEPS_BETWEEN_CHECKS = 32
# Beyond this number of rows, the time of a step grows in proportion to them
MAX_ROWS = 1024
# The kernels read columns in groups of this size
_COLUMNS = 16


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


class RowLayer(StaticLayer):
    """
    Keys and values of one layer, `(B, H, L, D)`, for rows at different positions.

    Args:
        keys (`torch.Tensor` of shape `(B, H, L, D)`): Buffer.
        values (`torch.Tensor` of shape `(B, H, L, D)`): Buffer.
        positions (`torch.Tensor` of shape `(B,)`, int64): Index of each row's next token. Read at every update.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.positions = keys, values, positions
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.positions[:, None, None, None]
        self.keys.scatter_(2, index.expand_as(key_states), key_states)
        self.values.scatter_(2, index.expand_as(value_states), value_states)
        return self.keys, self.values


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


def rows_that_fit(model: torch.nn.Module, num_tokens: int) -> int:
    """Estimated number of rows of `num_tokens` tokens that fit in the free memory of the model's GPU."""
    device = get_base_model(model).get_input_embeddings().weight.device
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Half is left for passes over prompts or trajectories, and for copies when ended rows are removed
    return max(1, min(MAX_ROWS, int(free / 2) // bytes_of_row(model, num_tokens)))


def bytes_of_row(model: torch.nn.Module, num_tokens: int) -> int:
    """Estimated memory of a row of `num_tokens` tokens in decoding: its keys and values, hidden states and logits."""
    base = get_base_model(model)
    config = base.config.get_text_config()
    # In some families, such as Gemma 4, the heads differ from layer to layer
    differ = getattr(config, "is_heterogeneous", False)
    layers = config.per_layer_config if differ else [config] * config.num_hidden_layers
    hidden_size = getattr(config, "hidden_size", 0)
    keys_and_values = 2 * num_tokens * sum(_width_of_heads(layer, hidden_size) for layer in layers)
    return (keys_and_values + hidden_size * num_tokens + 2 * config.vocab_size) * base.dtype.itemsize


def _width_of_heads(config: PretrainedConfig, hidden_size: int) -> int:
    """Numbers that a layer keeps of a token as its keys, and as many as its values: 0 without attention."""
    num_heads = getattr(config, "num_attention_heads", None) or 0
    head_dim = getattr(config, "head_dim", None) or hidden_size // max(1, num_heads)
    return (getattr(config, "num_key_value_heads", None) or num_heads) * head_dim


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
    longest_first = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    decoder = _Decoder(base, [prompt_ids[i] for i in longest_first], vocabulary, eos_ids, max_new_tokens)
    hook = base.get_output_embeddings().register_forward_pre_hook(decoder.note_head)
    try:
        with attention_backends(decoder.device):
            decoder.prefill()
            decoder.decode()
    finally:
        hook.remove()
    completions = [cut_after_eos(ids, set(eos_ids)) for ids in decoder.tokens[:, : decoder.num_taken].tolist()]
    order = sorted(range(len(prompt_ids)), key=lambda row: longest_first[row])
    hidden_states = decoder.hidden_states
    if hidden_states is not None:
        hidden_states = [hidden_states[row, : len(completions[row])] for row in order]
    return Generated([completions[row] for row in order], hidden_states)


class _Decoder:
    """Buffers for decoding a batch of prompts, longest first, and the step that extends all rows by one token."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: list[list[int]],
        vocabulary: Vocabulary,
        eos_ids: list[int],
        max_new_tokens: int,
    ):
        self.model = model
        self.prompt_ids = prompt_ids
        self.device = model.get_input_embeddings().weight.device
        self.vocabulary = vocabulary.to(self.device)
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=self.device)
        self.max_new_tokens = max_new_tokens
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.without_routers = without_routers(model)
        count = len(prompt_ids)
        self.num_columns = -(-(len(prompt_ids[0]) + max_new_tokens) // _COLUMNS) * _COLUMNS
        # For all rows: keys and values of each layer, chosen tokens, and the hidden states that they were chosen from
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.tokens = torch.zeros(count, max_new_tokens, dtype=torch.long, device=self.device)
        self.hidden_states: torch.Tensor | None = None
        self.num_taken = 0
        # For the rows still being decoded, whose indices are `rows`. A step reads and writes these in place
        self.rows = torch.arange(count, device=self.device)
        self.positions = torch.tensor([len(ids) for ids in prompt_ids], device=self.device)
        self.last = torch.empty(count, dtype=torch.long, device=self.device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=self.device)
        self.step_index = torch.zeros(1, dtype=torch.long, device=self.device)

    def note_head(self, head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.head_input = args[0]

    def prefill(self) -> None:
        """Read the prompts, and choose the first token of every row."""
        start, count = 0, len(self.prompt_ids)
        longest = torch.tensor([self.prompt_ids[0]], device=self.device)
        self.keeps_hidden_states = head_makes_logits(self.model, longest)
        while start < count:
            # Padding on the right needs no mask, since no token attends to later ones
            length = len(self.prompt_ids[start])
            prompts = self.prompt_ids[start : start + max(1, PREFILL_TOKENS // length)]
            rows = slice(start, start + len(prompts))
            input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in prompts])
            at_last = torch.tensor([[len(ids) - 1] for ids in prompts])
            cache = DynamicCache(config=self.model.config)
            logits = self.model(
                input_ids=to_device(input_ids, self.device),
                use_cache=True,
                logits_to_keep=to_device(at_last, self.device),
                **{self.cache_name: cache, **self.without_routers},
            ).logits
            if start == 0:
                for layer in cache.layers:
                    shape = (count, layer.keys.shape[1], self.num_columns)
                    keys, values = (
                        states.new_zeros(*shape, states.shape[-1]) for states in (layer.keys, layer.values)
                    )
                    self.buffers.append((keys, values))
                if self.keeps_hidden_states:
                    self.hidden_states = self.head_input.new_zeros(*self.tokens.shape, self.head_input.shape[-1])
            for layer, (keys, values) in zip(cache.layers, self.buffers, strict=True):
                keys[rows, :, :length] = layer.keys
                values[rows, :, :length] = layer.values
            self.last[rows] = self._most_probable(logits[:, 0])
            if self.hidden_states is not None:
                self.hidden_states[rows, 0] = self.head_input[:, 0]
            start = rows.stop
        self._take()
        self.num_taken = 1

    def _most_probable(self, logits: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.ids_of(self.vocabulary.select(logits).argmax(-1))

    def _take(self) -> None:
        """Store the last token of every row."""
        self.tokens[self.rows, self.step_index] = self.last
        self.ended |= torch.isin(self.last, self.eos_ids)
        self.step_index += 1

    def _step(self) -> None:
        # Additive, as the kernels need it. Each row sees its own tokens, up to the current input
        ahead = torch.arange(self.num_columns, device=self.device) > self.positions[:, None]
        dtype = self.buffers[0][0].dtype
        mask = torch.zeros(ahead.shape, dtype=dtype, device=self.device).masked_fill_(ahead, torch.finfo(dtype).min)
        logits = self.model(
            input_ids=self.last[:, None],
            position_ids=self.positions[:, None],
            attention_mask=mask[:, None, None],
            use_cache=True,
            **{self.cache_name: self.cache, **self.without_routers},
        ).logits
        self.last.copy_(self._most_probable(logits[:, -1]))
        if self.hidden_states is not None:
            self.hidden_states[self.rows, self.step_index] = self.head_input[:, -1]
        self.positions += 1
        self._take()

    def decode(self) -> None:
        """Decode until every row has ended. Some rows may get a few more tokens."""
        step: Callable[[], None] | None = None
        while self.num_taken < self.max_new_tokens:
            alive = self.ended.logical_not().nonzero()[:, 0]  # waits for the GPU
            if len(alive) == 0:
                break
            if len(alive) <= len(self.rows) // 2:
                step = None  # its graph keeps the old buffers alive
                self._keep(alive)
            if step is None:
                step = self._capture()
                self.num_taken += 1
            replays = min(STEPS_BETWEEN_CHECKS, self.max_new_tokens - self.num_taken)
            for _ in range(replays):
                step()
            self.num_taken += replays

    def _keep(self, alive: torch.Tensor) -> None:
        """Remove the rows that have ended."""
        self.rows, self.positions = self.rows[alive], self.positions[alive]
        self.last, self.ended = self.last[alive], self.ended[alive]
        for i, (keys, values) in enumerate(self.buffers):
            self.buffers[i] = (keys[alive], values[alive])

    def _capture(self) -> Callable[[], None]:
        """Run one step, and return a function that runs the next ones."""
        self.cache = Cache(layers=[RowLayer(*buffers, self.positions) for buffers in self.buffers])
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
