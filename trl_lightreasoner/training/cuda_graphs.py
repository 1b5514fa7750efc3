"""Training an adapter with CUDA graphs: both passes through the layers are captured once and replayed for every batch.

An update consists of thousands of small kernels. Launching them one by one takes a processor longer than a GPU needs
to run them, many times as long in small updates. A graph launches them all at once. It has fixed shapes: a packed
batch is copied into buffers of a round number of tokens, and the rest of a buffer is a row of unused padding.
Everything after the layers, from the output head to the optimizer, is not captured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.func import functional_call
from transformers import PreTrainedModel, logging
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..models.weights import get_base_model


logger = logging.get_logger(__name__)

# The smallest number that a batch's number of tokens is rounded up to
_TOKENS = 256
# Arguments of a packed batch
_PACKED = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def can_capture(model: torch.nn.Module) -> bool:
    """Whether both passes through the layers of a model with packed attention can be captured."""
    return isinstance(model, PeftModel) and _adapter(model) is not None


def _adapter(model: PeftModel) -> BaseTunerLayer | None:
    layers = get_base_model(model).get_decoder()
    if not isinstance(layers, PreTrainedModel):
        return None
    return next((module for module in layers.modules() if isinstance(module, BaseTunerLayer)), None)


class GraphedLayers:
    """
    The layers of a model with an adapter, run with CUDA graphs if batches are packed and the adapter is trained.

    Args:
        model ([`~peft.PeftModel`]): A model for which [`can_capture`] is true.
    """

    def __init__(self, model: PeftModel):
        self.layers = get_base_model(model).get_decoder()
        self.adapter: Any = _adapter(model)
        self.failed = False
        self._captured: dict[tuple, _CapturedLayers] = {}
        # What the graphs depend on: the adapter, the addresses of the weights, and which of them are trained
        self._state: tuple = ()
        self._parameters: list[torch.nn.Parameter] = []
        self._plain: Callable = self.layers.forward
        self._left = 0
        self._memory: _Memory | None = None

    def clear(self) -> None:
        """Release all graphs and their memory."""
        self._captured.clear()
        self._state, self._memory = (), None

    @contextmanager
    def once(self) -> Iterator[None]:
        """Replay the first forward pass through the layers. A second replay would overwrite its activations."""
        before = vars(self.layers).get("forward")
        self._plain, self._left = self.layers.forward, 1
        self.layers.forward = self._forward
        try:
            yield
        finally:
            if before is None:
                del self.layers.forward
            else:
                self.layers.forward = before

    def _forward(self, input_ids: torch.Tensor, cu_seq_lens_q: torch.Tensor | None = None, **kwargs: Any) -> Any:
        is_trained = torch.is_grad_enabled() and self.layers.training and not self.adapter.disable_adapters
        others = {name: value for name, value in kwargs.items() if name not in _PACKED}
        is_plain = cu_seq_lens_q is None or any(value is not None and value is not False for value in others.values())
        if self.failed or not self._left or not is_trained or is_plain:
            return self._plain(input_ids=input_ids, cu_seq_lens_q=cu_seq_lens_q, **kwargs)
        self._left = 0
        try:
            captured = self._capture(input_ids, kwargs["position_ids"], cu_seq_lens_q, kwargs["max_length_q"])
        except RuntimeError as error:
            self.clear()
            # If it does not fit in memory without graphs either, the error is the usual one
            outputs = self._plain(input_ids=input_ids, cu_seq_lens_q=cu_seq_lens_q, **kwargs)
            self.failed = True
            logger.warning(
                f"Training continues without CUDA graphs, which is slower ({str(error).splitlines()[0]}). "
                "`use_cuda_graphs=False` turns them off from the start."
            )
            return outputs
        captured.fill(input_ids, kwargs["position_ids"], cu_seq_lens_q)
        hidden_states = _Replay.apply(captured, *captured.parameters)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states[:, : input_ids.shape[1]])

    def _capture(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, begins: torch.Tensor, longest: int
    ) -> "_CapturedLayers":
        if self._find_state() != self._state:
            self.clear()
            self._parameters = list(self.layers.parameters())
            self._state = self._find_state()
        num_tokens, step = round_up(input_ids.shape[1])
        longest = 2 ** (max(longest, step) - 1).bit_length()
        key = num_tokens, longest, len(begins)
        if key not in self._captured:
            if self._memory is None and input_ids.is_cuda:
                self._memory = _Memory(input_ids.device)
            layers, batch = _Layers(self.layers, self._plain), (input_ids, position_ids, begins)
            self._captured[key] = _CapturedLayers(layers, num_tokens, longest, batch, self._memory)
        return self._captured[key]

    def _find_state(self) -> tuple:
        weights = tuple((each.data_ptr(), each.requires_grad) for each in self._parameters)
        return *self.adapter.active_adapters, *weights


def round_up(num_tokens: int) -> tuple[int, int]:
    """
    The number of tokens of the graph for a batch of `num_tokens`, and the multiple to which it is rounded. For large
    batches it is at most an eighth more.

    Example:

    ```python
    >>> round_up(300), round_up(14_000)
    ((512, 256), (14336, 1024))

    ```
    """
    step = max(_TOKENS, 2 ** (num_tokens.bit_length() - 4))
    return -(-num_tokens // step) * step, step


class _Memory:
    """
    Memory that all graphs share, because no two are between their passes at the same time. It must not outlive them.
    """

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.is_new = True


class _Layers(torch.nn.Module):
    """Context in which the layers use the given forward pass and none of their hooks."""

    def __init__(self, layers: torch.nn.Module, forward: Callable):
        super().__init__()
        self.layers, self.plain_forward = layers, forward

    def forward(self, **kwargs: Any) -> Any:
        return self.plain_forward(**kwargs)


class _CapturedLayers:
    """Both passes through the layers for packed batches of one size. Batches are copied into its buffers."""

    def __init__(
        self,
        layers: _Layers,
        num_tokens: int,
        longest: int,
        batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        memory: _Memory | None,
    ):
        self.layers, self.longest = layers, longest
        trained = {name: parameter for name, parameter in layers.named_parameters() if parameter.requires_grad}
        self.parameters = list(trained.values())
        # The same memory under another name. What autograd keeps of a parameter itself belongs to the stream on which
        # it was first used, which DDP does, and a capture must not wait for that
        self.aliases = {name: parameter.detach().requires_grad_() for name, parameter in trained.items()}
        input_ids, position_ids, begins = batch
        self.input_ids, self.position_ids = input_ids.new_zeros(1, num_tokens), position_ids.new_zeros(1, num_tokens)
        # One additional row for the padding
        self.begins = begins.new_full((len(begins) + 1,), num_tokens)
        self.fill(*batch)
        self.output: torch.Tensor
        self.output_gradient: torch.Tensor
        self.gradients: tuple[torch.Tensor | None, ...]
        self.replay_forward, self.replay_backward = self._capture(input_ids.device, memory)

    def fill(self, input_ids: torch.Tensor, position_ids: torch.Tensor, begins: torch.Tensor) -> None:
        """Copy a batch that fits into the buffers."""
        num_tokens = input_ids.shape[1]
        self.input_ids[:, :num_tokens] = input_ids
        self.position_ids[:, :num_tokens] = position_ids
        self.begins[:-1] = begins

    def _run_forward(self) -> None:
        device = self.input_ids.device.type
        # A cached cast would belong to another graph
        with torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        ):
            batch = {
                "input_ids": self.input_ids,
                "position_ids": self.position_ids,
                "cu_seq_lens_q": self.begins,
                "cu_seq_lens_k": self.begins,
                "max_length_q": self.longest,
                "max_length_k": self.longest,
                "use_cache": False,
            }
            self.output = functional_call(self.layers, self.aliases, kwargs=batch).last_hidden_state

    def _run_backward(self) -> None:
        with torch.autocast(self.input_ids.device.type, enabled=False):
            aliases = list(self.aliases.values())
            self.gradients = torch.autograd.grad(self.output, aliases, self.output_gradient, allow_unused=True)

    def _capture(self, device: torch.device, memory: _Memory | None) -> tuple[Callable[[], None], Callable[[], None]]:
        if memory is None:  # without a GPU the layers run again
            with torch.no_grad():
                self._run_forward()
            self.output_gradient = torch.zeros_like(self.output)
            return self._with_gradients, self._run_backward
        random_state = torch.cuda.get_rng_state(device)
        memory.stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(memory.stream):
                if memory.is_new:
                    # Plain passes first, in which the libraries initialize
                    self._with_gradients()
                    self.output_gradient = torch.zeros_like(self.output)
                    self._run_backward()
                    del self.output, self.output_gradient, self.gradients
                    torch.cuda.synchronize(device)
                    torch.cuda.empty_cache()  # the graphs have a separate pool
                    memory.is_new = False
                graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
                with _capturing(graphs[0], memory):
                    self._with_gradients()
                self.output_gradient = torch.zeros_like(self.output)
                with _capturing(graphs[1], memory):
                    self._run_backward()
            torch.cuda.current_stream(device).wait_stream(memory.stream)
        finally:
            torch.cuda.set_rng_state(random_state, device)
        return graphs[0].replay, graphs[1].replay

    def _with_gradients(self) -> None:
        with torch.enable_grad():  # it is off within an autograd function
            self._run_forward()


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, memory: _Memory) -> Iterator[None]:
    # `torch.cuda.graph` would first collect garbage. Relaxed, since a library may load a kernel for the first time
    graph.capture_begin(pool=memory.pool, capture_error_mode="relaxed")
    try:
        yield
        graph.capture_end()
    except BaseException:
        _break_off(graph, memory)
        raise


def _break_off(graph: torch.cuda.CUDAGraph, memory: _Memory) -> None:
    """End a failed capture."""
    try:
        graph.capture_end()
    except RuntimeError:
        # CUDA gave it up before, and PyTorch does not tell those that take part: neither the allocator, which frees
        # little as long as a graph is captured, nor the random generator, which draws for the graph alone
        index = memory.stream.device_index
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, memory.pool)
        torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(memory.stream.device))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _CapturedLayers, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.captured = captured
        captured.replay_forward()
        return captured.output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        captured = ctx.captured
        captured.output_gradient.copy_(gradients[0])
        captured.replay_backward()
        # The next replay overwrites them, and they may be the accumulated gradients
        return None, *(None if each is None else each.clone() for each in captured.gradients)
