"""Greedy decoding of many prompts together on a CUDA GPU, each step a replay of one captured CUDA graph.

A step of `generate` costs as much time in Python and in launching kernels as a large batch needs to compute. A graph
is captured in a fraction of a second and launches the whole step at once. What it needs is that nothing moves: keys
and values lie in buffers of full length, prompts at their beginning, and each row writes behind its own last token.
"""

import inspect

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from .generation import cut_after_eos
from .models import attention_backends, get_base_model, has_full_attention
from .vocabulary import Vocabulary


# Tokens of prompts in one forward pass: enough to fill a GPU, little enough for its memory
PREFILL_TOKENS = 2**14
# Steps between two looks at which rows have ended, each of which waits for the GPU
STEPS_BETWEEN_CHECKS = 32
# Beyond this many rows a step takes as much longer as it does more
MAX_ROWS = 512
# The kernels read whole groups of columns
_COLUMNS = 16


class RowLayer(StaticLayer):
    """
    Keys and values of one layer, `(B, H, L, D)`, of rows that are at different positions.

    Args:
        keys (`torch.Tensor` of shape `(B, H, L, D)`): Buffer.
        values (`torch.Tensor` of shape `(B, H, L, D)`): Buffer.
        positions (`torch.Tensor` of shape `(B,)`, int64): Where the next token of each row goes. Read at every update.
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
    """The reason why a model cannot decode by CUDA graphs, or `None` if it can."""
    base = get_base_model(model)
    devices = {parameter.device for parameter in base.parameters()}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        return "the expert is not on one CUDA GPU"
    if not getattr(base, "_can_compile_fullgraph", False):
        return f"`{type(base).__name__}` has no static form"
    if not has_full_attention(base):
        return "it is made for full attention under attn_implementation='sdpa'"
    return None


@torch.no_grad()
def generate_greedy_by_graph(
    model: torch.nn.Module,
    prompt_ids: list[list[int]],
    vocabulary: Vocabulary,
    eos_ids: list[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """
    What [`~trl_lightreasoner.generation.generate_greedy`] returns, from a model for which [`why_no_graph`] finds no
    reason. In half precision, tokens that are as good as equally probable may be chosen otherwise.
    """
    base = get_base_model(model)
    device = base.get_input_embeddings().weight.device
    longest_first = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    with attention_backends(device):
        decoder = _Decoder(base, [prompt_ids[i] for i in longest_first], vocabulary, eos_ids, max_new_tokens)
        decoded = decoder.run()
    completions = [[]] * len(prompt_ids)
    for i, ids in zip(longest_first, decoded, strict=True):
        completions[i] = cut_after_eos(ids, set(eos_ids))
    return completions


def rows_that_fit(model: torch.nn.Module, num_tokens: int) -> int:
    """How many rows of `num_tokens` tokens the free memory of the model's GPU holds, by estimate."""
    base = get_base_model(model)
    config, device = base.config.get_text_config(), base.get_input_embeddings().weight.device
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys_and_values = 2 * config.num_hidden_layers * heads * head_dim * num_tokens
    row = (keys_and_values + 2 * config.vocab_size) * base.dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Half is left to what comes with a pass over prompts or trajectories, and to rows that make room for others
    return max(1, min(MAX_ROWS, int(free / 2) // row))


class _Decoder:
    """Buffers of B rows, `rows` of which are still being continued, and the step that moves them on by a token."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: list[list[int]],
        vocabulary: Vocabulary,
        eos_ids: list[int],
        max_new_tokens: int,
    ):
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.vocabulary = vocabulary.to(self.device)
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=self.device)
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        lengths = [len(ids) for ids in prompt_ids]
        self.max_new_tokens = max_new_tokens
        self.num_columns = -(-(lengths[0] + max_new_tokens) // _COLUMNS) * _COLUMNS
        # What a step reads and writes, always in the same place
        self.positions = torch.tensor(lengths, device=self.device)
        self.tokens = torch.empty(len(lengths), max_new_tokens, dtype=torch.long, device=self.device)
        self.last = torch.empty(len(lengths), dtype=torch.long, device=self.device)
        self.ended = torch.zeros(len(lengths), dtype=torch.bool, device=self.device)
        self.step_index = torch.zeros(1, dtype=torch.long, device=self.device)
        self._prefill(prompt_ids)

    def _prefill(self, prompt_ids: list[list[int]]) -> None:
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        start = 0
        while start < len(prompt_ids):
            # Padding on the right needs no mask, since no token looks ahead
            length = len(prompt_ids[start])
            rows = prompt_ids[start : start + max(1, PREFILL_TOKENS // length)]
            stop = start + len(rows)
            input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in rows])
            at_last = torch.tensor([[len(ids) - 1] for ids in rows])
            cache = DynamicCache(config=self.model.config)
            logits = self.model(
                input_ids=input_ids.to(self.device),
                use_cache=True,
                logits_to_keep=at_last.to(self.device),
                **{self.cache_name: cache},
            ).logits[:, 0]
            if not self.buffers:
                for layer in cache.layers:
                    _, heads, _, width = layer.keys.shape
                    shape = len(prompt_ids), heads, self.num_columns, width
                    self.buffers.append((layer.keys.new_zeros(shape), layer.values.new_zeros(shape)))
            for layer, (keys, values) in zip(cache.layers, self.buffers, strict=True):
                keys[start:stop, :, :length] = layer.keys
                values[start:stop, :, :length] = layer.values
            self.last[start:stop] = self._most_probable(logits)
            start = stop
        self._take()

    def _most_probable(self, logits: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.ids_of(self.vocabulary.select(logits).argmax(-1))

    def _take(self) -> None:
        """Write down the last token of every row."""
        self.tokens.index_copy_(1, self.step_index, self.last[:, None])
        self.ended |= torch.isin(self.last, self.eos_ids)
        self.step_index += 1

    def _step(self) -> None:
        # Additive, as the kernels want it: each row sees its own tokens, up to the one that is fed now
        ahead = torch.arange(self.num_columns, device=self.device) > self.positions[:, None]
        dtype = self.buffers[0][0].dtype
        mask = torch.zeros(ahead.shape, dtype=dtype, device=self.device).masked_fill_(ahead, torch.finfo(dtype).min)
        logits = self.model(
            input_ids=self.last[:, None],
            position_ids=self.positions[:, None],
            attention_mask=mask[:, None, None],
            use_cache=True,
            **{self.cache_name: self.cache},
        ).logits[:, -1]
        self.last.copy_(self._most_probable(logits))
        self.positions += 1
        self._take()

    def run(self) -> list[list[int]]:
        """Tokens of every row, each to its end and perhaps beyond it."""
        completions = [[]] * len(self.tokens)
        rows = torch.arange(len(self.tokens))  # which of the prompts each row is
        done, step = 1, None
        while done < self.max_new_tokens:
            alive = self.ended.logical_not().nonzero()[:, 0]  # waits for the GPU
            if len(alive) == 0:
                break
            if len(alive) <= len(rows) // 2:
                for row, ids in zip(rows.tolist(), self.tokens[:, :done].tolist(), strict=True):
                    completions[row] = ids
                rows = rows[alive.cpu()]
                step = None  # its graph holds the buffers
                self._keep(alive)
            if step is None:
                self.cache = Cache(layers=[RowLayer(*buffers, self.positions) for buffers in self.buffers])
                step = self._capture()
                done += 1
            replays = min(STEPS_BETWEEN_CHECKS, self.max_new_tokens - done)
            for _ in range(replays):
                step()
            done += replays
        for row, ids in zip(rows.tolist(), self.tokens[:, :done].tolist(), strict=True):
            completions[row] = ids
        return completions

    def _capture(self):
        """Make one step, and return what makes the next ones."""
        if self.device.type != "cuda":
            self._step()
            return self._step
        # A plain step first, in which the libraries set themselves up, on a stream of its own as PyTorch asks
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def _keep(self, alive: torch.Tensor) -> None:
        """Let the rows that have ended go."""
        self.positions, self.last, self.ended = self.positions[alive], self.last[alive], self.ended[alive]
        self.tokens = self.tokens[alive]
        for i, (keys, values) in enumerate(self.buffers):
            self.buffers[i] = (keys[alive], values[alive])
