"""`SkipNonFiniteUpdates`: updates with NaN or Inf gradients are skipped.

PyTorch's fused optimizers skip such an update themselves, on the GPU. The processor then learns of it one update
later, because asking at once would stall the GPU in every update. With fp16 the gradient scaler skips it, and lowers
its scale, which begins too high.
"""

from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, logging


logger = logging.get_logger(__name__)

# Consecutive skipped updates after which training stops. With fp16, those count for which the scale of the gradients
# is not to blame, because it is 1 or less
_MAX_IN_A_ROW = 3


class SkipNonFiniteUpdates(TrainerCallback):
    """
    Skips every update whose gradient is NaN or infinite, on all processes, and counts the skipped updates.

    Args:
        trainer ([`~transformers.Trainer`]): Provides the processes and the gradient scaler.

    Raises:
        `FloatingPointError`: At the third consecutive skipped update, with the likely causes. The weights are those
            before the first of them.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._count = self._in_a_row = 0
        # Pending facts about the last update: its number, whether it is skipped, and when that is known
        self._unread: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None
        self._scale = 0.0  # of the last gradients

    @property
    def count(self) -> int:
        """Number of updates skipped so far."""
        self._read()
        return self._count

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ):
        accelerator = self.trainer.accelerator
        if accelerator.scaler is not None:
            self._scale = accelerator.scaler.get_scale()
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        is_sharded = any(hasattr(grad, "to_local") for grad in grads)
        grads = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
        broken = (~get_total_norm(grads).isfinite()).to(accelerator.device, torch.float32)
        broken = accelerator.reduce(broken, reduction="sum").clamp_max(1)
        self._read()
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not is_sharded:
            optimizer.found_inf = broken
            copy = broken.to("cpu", non_blocking=broken.is_cuda)
            event = torch.cuda.current_stream(broken.device).record_event() if broken.is_cuda else None
            self._unread = (state.global_step + 1, copy, event)
        else:
            if broken:
                for parameter in parameters:
                    parameter.grad = None
            self._unread = (state.global_step + 1, broken, None)
            self._read()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        optimizer: Any = self.trainer.optimizer
        vars(getattr(optimizer, "optimizer", optimizer)).pop("found_inf", None)
        scaler = self.trainer.accelerator.scaler
        if scaler is None:
            return
        is_skipped = scaler.get_scale() < self._scale  # a fused optimizer would not tell
        if is_skipped and self._scale > 1:
            self._count += 1
        else:
            self._note(state.global_step + 1, is_skipped)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._read()

    def _read(self) -> None:
        if self._unread is None:
            return
        (update, broken, event), self._unread = self._unread, None
        if event is not None:
            event.synchronize()
        self._note(update, bool(broken))

    def _note(self, update: int, is_skipped: bool) -> None:
        if not is_skipped:
            self._in_a_row = 0
            return
        self._count += 1
        self._in_a_row += 1
        logger.warning(f"The gradient of update {update} is not finite. The update is skipped ({self._count} so far).")
        if self._in_a_row >= _MAX_IN_A_ROW:
            raise FloatingPointError(
                f"The gradient was not finite {_MAX_IN_A_ROW} times in a row, so training stopped at update {update}. "
                "None of these updates was applied. The likely causes are NaN in the base model's weights, float16 "
                "where bfloat16 or float32 is needed, or a learning rate that is too high "
                f"({self.trainer.args.learning_rate:g})."
            )
