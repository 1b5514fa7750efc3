"""The processes that share one sampling run: one, or as many as `accelerate launch` or `torchrun` started."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


T = TypeVar("T")


class Processes:
    """
    Deals work out and lets processes wait for each other for as long as it takes.

    One prompt's answer can take much longer than another's, and the default process group gives up after minutes. So
    this one has no limit; a process that dies closes its connections, which ends the waiting of the others.

    Attributes:
        index (`int`): This process, from 0.
        count (`int`): How many there are.
    """

    def __init__(self):
        # Of processes without an accelerator it forms a group only if it is told so
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
        self.index, self.count = state.process_index, state.num_processes
        if self.count > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """Every `count`-th of the batches, so that a list sorted by length is dealt out evenly."""
        return batches[self.index :: self.count]

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, called by the main process when all have come here; the same on all."""
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None]
        try:
            torch.distributed.barrier(self.group)
            if self.is_main:
                try:
                    outcome[0] = function()
                except Exception as raised:
                    outcome[1] = raised
            torch.distributed.broadcast_object_list(outcome, src=0, group=self.group)
        except RuntimeError as closed:  # a connection was closed
            raise ConnectionError(
                f"Process {self.index} waited for another one, which has ended. Run the same again to go on."
            ) from closed
        result, error = outcome
        if error is not None:
            raise error
        return result
