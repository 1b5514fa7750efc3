"""What a run that goes on from a checkpoint does otherwise than `Trainer` would.

It keeps its number of updates, makes none when it is complete, and says where its place in the data was not kept.
"""

import copy
import os
from collections.abc import Callable

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, logging
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint, has_length


logger = logging.get_logger(__name__)


class RememberEpochs(TrainerCallback, ExportableState):
    """
    Lets a checkpoint say how many epochs were asked for, which a run that is resumed compares with its own. What
    `Trainer` writes there is rounded up, or follows from `max_steps`.
    """

    num_train_epochs: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.num_train_epochs = args.num_train_epochs if args.max_steps < 0 else None
        # `Trainer` writes it over what it finds in the state, which may come from a checkpoint without it
        state.stateful_callbacks[type(self).__name__] = self.state()

    def state(self) -> dict[str, dict]:
        return {"args": {}, "attributes": {"num_train_epochs": self.num_train_epochs}}


def load_state(checkpoint: str | bool | None, output_dir: str) -> TrainerState | None:
    """State of the checkpoint that `Trainer.train` is to resume from, or `None` if there is none."""
    folder = get_last_checkpoint(output_dir) if checkpoint is True else checkpoint
    file = os.path.join(folder or "", "trainer_state.json")
    return TrainerState.load_from_json(file) if folder and os.path.isfile(file) else None


def plan_training(
    plan: Callable[[TrainingArguments], tuple],
    args: TrainingArguments,
    dataloader: DataLoader,
    resumed: TrainerState,
) -> tuple:
    """
    What `Trainer.set_initial_training_values` returns, for a run that is resumed.

    Args:
        plan (`Callable`): That method, as a function of the arguments.
        args ([`~transformers.TrainingArguments`]): Settings of the run.
        dataloader (`torch.utils.data.DataLoader`): Batches of the run.
        resumed ([`~transformers.TrainerState`]): State of the checkpoint.
    """
    values = plan(args)
    planned = values[-1]
    remembered = (resumed.stateful_callbacks or {}).get(RememberEpochs.__name__, RememberEpochs().state())
    if args.max_steps < 0 and args.num_train_epochs == remembered["attributes"]["num_train_epochs"]:
        # The same epochs stay the same updates, whatever an update holds by now
        args = copy.copy(args)
        args.max_steps = resumed.max_steps
        values = plan(args)
    _, updates_per_epoch, *_, batches_per_epoch, max_steps = values
    step = resumed.global_step
    if step >= max_steps:
        logger.warning(
            f"Training is complete: the checkpoint has {step:,} of {max_steps:,} updates; raise `max_steps` or "
            "`num_train_epochs` to go on."
        )
        # `Trainer` makes one more update in every epoch that it begins; this is how none is left to begin
        return (step // updates_per_epoch, *values[1:])
    # Where `Trainer` goes on: it takes all updates before for such as they are now. The last batch of an epoch, of
    # fewer rows, moves that by less than a batch where nothing else does
    if not has_length(dataloader) and (resumed.epoch or 0) >= 1:
        logger.warning(
            "The rows are streamed and had all been read before the checkpoint: training goes on from the first row "
            "instead of where it was."
        )
    epoch = step // updates_per_epoch
    epoch += step % updates_per_epoch * args.gradient_accumulation_steps / batches_per_epoch
    batches = abs(epoch - (resumed.epoch or 0)) * batches_per_epoch if has_length(dataloader) else 0
    batch = max(1, (resumed.train_batch_size or 1) / args.per_device_train_batch_size)
    if max_steps != planned or round(batches, 6) >= batch:
        logger.warning(
            "An update holds another share of the dataset than at the checkpoint: training ends after "
            f"{max_steps:,} updates in all, and goes on at epoch {epoch:.2f} of the data instead of "
            f"{resumed.epoch:.2f}, so that some rows are read more often than others; set `max_steps` for another "
            "number of updates."
        )
    return values
