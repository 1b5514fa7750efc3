"""The processes that share one run: a single one, or all that `accelerate launch` or `torchrun` has started."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


T = TypeVar("T")


class Processes:
    """
    Distributes work, and lets processes wait for each other without a time limit.

    One prompt can take much longer to answer than another, and the default process group times out after minutes. So
    this group has no timeout. If a process dies, its connections close, and the others stop waiting.

    Attributes:
        index (`int`): Index of this process, from 0.
        count (`int`): Number of processes.
    """

    def __init__(self):
        # Without an accelerator it forms a group only if it is told to
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
        self.index, self.count = state.process_index, state.num_processes
        if self.count > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """Every `count`-th batch, so that a list sorted by length is distributed evenly."""
        return batches[self.index :: self.count]

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on the main process when all have arrived. All processes get its result or its error."""
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
        except RuntimeError as closed:  # another process has closed its connection
            raise ConnectionError(
                f"Process {self.index} waited for another process, which has ended. Rerun the same command to resume."
            ) from closed
        result, error = outcome
        if error is not None:
            raise error
        return result
