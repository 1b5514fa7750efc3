"""Checkpoints by the clock, so that an interrupted training loses minutes and a short one saves only its end.

transformers' `enable_jit_checkpoint` saves at SIGTERM alone: a killed process cannot save anything, and Ctrl-C is
another signal.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


_SECONDS = 300.0
# Where saving is slow, it takes no more than a twentieth of the time
_TIMES_SAVING = 20
# Asking another process would stall the GPU in every update. At these, the default logs, and waits for the GPU anyway
_UPDATES = 10
# The newest ones
_KEPT = 2


def is_timed(args: TrainingArguments) -> bool:
    """Whether checkpoints are saved by the clock, because the user has chosen no other time."""
    return args.save_strategy == SaveStrategy.STEPS and args.save_steps == 0


class TimedCheckpoints(TrainerCallback):
    """
    Saves a checkpoint after the first update that ends five minutes or more after the last one. Several processes go
    by the clock of the first, and look at it after every tenth update. Of those that it saved, the two newest and the
    best are kept if there is no `save_total_limit`, and those that the trainer is uploading.

    Args:
        trainer ([`~transformers.Trainer`]): Knows of the uploads.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._due = time.monotonic() + _SECONDS
        self._saved: list[Path] = []
        self._push: Any = None
        self._first_pushed = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._began = time.monotonic()
        is_due = self._began >= self._due
        if args.world_size > 1:
            if state.global_step % _UPDATES:
                return
            is_due = bool(broadcast(torch.tensor(float(is_due), device=args.device)))
        control.should_save = control.should_save or is_due

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._began = time.monotonic()  # an evaluation comes before the saving

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        now = time.monotonic()
        self._due = now + max(_SECONDS, _TIMES_SAVING * (now - self._began))
        # `save_total_limit` would also delete those of an earlier training
        self._saved.append(Path(args.output_dir, f"checkpoint-{state.global_step}"))
        push = getattr(self.trainer, "push_in_progress", None)
        if push is not self._push:  # an upload began with this checkpoint
            self._push, self._first_pushed = push, len(self._saved) - 1
        num_old = max(0, len(self._saved) - _KEPT)
        if push is not None and not push.is_done():
            num_old = min(num_old, self._first_pushed)
        if args.save_total_limit is None and args.should_save:
            best = Path(state.best_model_checkpoint or args.output_dir)
            for path in self._saved[:num_old]:
                if path != best:
                    shutil.rmtree(path, ignore_errors=True)
