"""`SkipNonFiniteUpdates`: an update whose gradient is not finite is never applied."""

from typing import TYPE_CHECKING

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, logging


if TYPE_CHECKING:
    from .lightreasoner_trainer import LightReasonerTrainer


logger = logging.get_logger(__name__)


class SkipNonFiniteUpdates(TrainerCallback):
    """
    Leaves out every update whose gradient is NaN or infinite, on all processes alike, and counts them.

    Args:
        trainer ([`LightReasonerTrainer`]): Knows the processes and the gradient scaler.
        patience (`int`, *optional*, defaults to `3`): Updates in a row after which training stops.

    Raises:
        `FloatingPointError`: From the `patience`-th in a row on, with the likely cause. The weights are those before.
    """

    def __init__(self, trainer: "LightReasonerTrainer", patience: int = 3):
        self.trainer = trainer
        self.patience = patience
        self.count = self.in_a_row = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ):
        accelerator = self.trainer.accelerator
        if accelerator.scaler is not None:  # fp16: the scaler skips such updates itself and lowers its scale
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        grads = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
        broken = (~get_total_norm(grads).isfinite()).to(accelerator.device, torch.float32)
        broken = accelerator.reduce(broken, reduction="sum")
        if not broken:
            self.in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self.count += 1
        self.in_a_row += 1
        logger.warning(
            f"The gradient of update {state.global_step + 1} is not finite; the update is left out ({self.count} so "
            "far)."
        )
        if self.in_a_row >= self.patience:
            raise FloatingPointError(
                f"The gradient was not finite {self.patience} times in a row, so training stopped at update "
                f"{state.global_step + 1}; no such update was applied. The likely causes are NaN in the base model's "
                "weights, float16 where bfloat16 or float32 is needed, or a learning rate that is too high "
                f"({args.learning_rate:g})."
            )
