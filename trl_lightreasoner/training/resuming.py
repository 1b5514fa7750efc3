"""Resuming from a checkpoint, where it differs from `Trainer`.

It names the differences from the run of the checkpoint and keeps its number of updates. It makes no update if training
is complete, and warns if the position in the data is lost.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset
from peft import PeftModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, logging
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, has_length

from ..models.base_model import describe_base, is_another_base
from ..models.weights import describe_model
from ..steps.dataset import SFT_COLUMNS, STEP_COLUMNS
from ..steps.whole_files import whole_file
from .checkpoints import find_checkpoint, one_training, saving, saving_model
from .memory import TrainingMemoryError


logger = logging.get_logger(__name__)

# Settings that the weights depend on. For the first group, the values of the checkpoint are used
_KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_TAKEN = (
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "neftune_noise_alpha",
    "sft_weight",
)
# Settings that change the structure of the optimizer's state, or the meaning of the best metric so far
_BEST = ("metric_for_best_model", "greater_is_better")
_EVALUATED = "evaluated"
_FIXED = ("optim", "optim_args", *_BEST, _EVALUATED)
# Fields of an adapter that do not change what it computes in training
_FREE = ("inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type")
_ROWS = "rows"
_BASE = "base_model"


class RememberTraining(TrainerCallback, ExportableState):
    """
    Records the training's settings and number of epochs in its checkpoints, for a resumed run to compare. `Trainer`
    rounds the number of epochs up, or derives it from `max_steps`.
    """

    num_train_epochs: float | None = None
    training: dict[str, Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.num_train_epochs = args.num_train_epochs if args.max_steps < 0 else None
        # `Trainer` writes it over what it finds in the state, which may come from a checkpoint without it
        state.stateful_callbacks[type(self).__name__] = self.state()

    def state(self) -> dict[str, dict]:
        return {"args": {}, "attributes": {"num_train_epochs": self.num_train_epochs, "training": self.training}}


class ResumableTrainer(Trainer):
    """A [`~transformers.Trainer`] that resumes from a checkpoint exactly, or names the differences."""

    # Id or path that the model was given by, if it was not given as an object
    _source: str | None = None
    # Checksum of the base model's weights, if it is known before training
    _base_weights: str | None = None
    # The base model of the adapter, as it is saved beside it
    _base: dict[str, Any] | None = None
    _resumed: TrainerState | None = None
    # Number of the update whose weights the model has, if it is not the last one
    best_update: int | None = None

    @property
    def _is_split(self) -> bool:
        """Whether no process holds all weights."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _whole_model(self) -> torch.nn.Module:
        """The model without what accelerate and `torch.compile` wrap around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        (memory,) = (each for each in self.callback_handler.callbacks if isinstance(each, RememberTraining))
        model = self._whole_model()
        if self._base is None:
            self._base = describe_base(model, self._base_weights)
        memory.training = describe_training(self.args, model, self._source, self.train_dataset)
        memory.training[_BASE] = self._base
        if self.args.metric_for_best_model is not None:
            memory.training[_EVALUATED] = self._describe_evaluation()
        if self.optimizer_cls_and_kwargs is not None:
            optimizer, settings = self.optimizer_cls_and_kwargs
            memory.training |= {"optim": optimizer.__name__, "optim_args": str(settings)}
        self._resumed = self.best_update = None
        if checkpoint is not None:
            self._resumed = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
            is_named = checkpoint == str(resume_from_checkpoint)
            check_training(_remembered(self._resumed).get("training"), memory.training, checkpoint, is_named)
            self._check_random_state(checkpoint)
        # A resumed run has had its first evaluation
        eval_on_start, self.args.eval_on_start = self.args.eval_on_start, self.args.eval_on_start and not checkpoint
        with one_training(self.args.output_dir) if self.is_world_process_zero() else nullcontext():
            try:
                return super().train(checkpoint, *args, **kwargs)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                raise TrainingMemoryError(self.args) from error
            finally:
                self.args.eval_on_start = eval_on_start

    def _describe_evaluation(self) -> dict[str, Any]:
        """Checksums of what an evaluation reads."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        return {name: _checksum(rows) for name, rows in sets.items() if isinstance(rows, Dataset)}

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        def plan(args: TrainingArguments) -> tuple:
            return super(ResumableTrainer, self).set_initial_training_values(args, dataloader)

        if has_length(dataloader) and len(dataloader) == 0:  # `Trainer` would end without an update
            raise ValueError(
                f"`dataloader_drop_last` leaves nothing to train on: {len(self.train_dataset):,} rows do not fill a "
                f"batch of {args.per_device_train_batch_size} on each of {args.world_size} process(es). Remove it, or "
                "lower `per_device_train_batch_size`."
            )
        return plan(args) if self._resumed is None else plan_training(plan, args, dataloader, self._resumed)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        # `Trainer` would go on with the intervals of the checkpoint, whatever the arguments are now
        self.state.compute_steps(self.args, max_steps)
        return position

    def _check_random_state(self, checkpoint: str) -> None:
        index = self.args.process_index
        name = "rng_state.pth" if self.args.world_size <= 1 else f"rng_state_{index}.pth"
        if not os.path.isfile(os.path.join(checkpoint, name)):
            logger.warning(
                f"The checkpoint {checkpoint!r} is from a different number of processes and holds no {name}: random "
                "numbers, such as those of dropout, will differ from the original run's."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or self.args.output_dir
        with nullcontext() if _internal_call else saving_model(folder, self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            with whole_file(Path(self.args.output_dir, TRAINER_STATE_NAME)) as temporary:
                self.state.save_to_json(str(temporary))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with saving(folder) if self.args.should_save else nullcontext():
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json must be the last file

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        name = self.model.active_adapters[0] if isinstance(self.model, PeftModel) else None
        weights = "model.safetensors*" if name is None else "adapter_model.*"
        folder = Path(resume_from_checkpoint, name if name not in (None, "default") else "")
        if not self._is_split and not any(folder.glob(weights)):
            what = "weights of the whole model" if name is None else f"weights of an adapter named {name!r}"
            raise ValueError(f"Training cannot resume from {resume_from_checkpoint!r}: it holds no {what}.")
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # A model that is not saved cannot be loaded again. With `SaveStrategy.BEST` the result decides whether it is
        is_saved = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        if self.args.load_best_model_at_end and not is_saved:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        best, model = str(self.state.best_model_checkpoint), self.model
        name = model.active_adapters[0] if isinstance(model, PeftModel) else "default"
        # PEFT saves an adapter with another name here, where `Trainer` does not look
        folder = os.path.join(best, name)
        if os.path.isdir(folder) and not self._is_split:
            model.load_adapter(folder, name, is_trainable=True)
        else:
            super()._load_best_model()
        self.best_update = int(best.rpartition("-")[2])
        self._compare_with_unsaved()

    def _compare_with_unsaved(self) -> None:
        """Warn if the model was better before training, or between two checkpoints, than in the best checkpoint."""
        metric = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        best, sign = self.state.best_metric, 1 if self.args.greater_is_better else -1
        if best is None or metric.endswith("kl_to_expert"):  # which is 0 before training
            return
        values = {log["step"]: log[metric] for log in self.state.log_history if metric in log}
        better = {step: value for step, value in values.items() if sign * value > sign * best}
        loaded = f"is {best:.4g} in the best checkpoint, which is loaded."
        if 0 in better:
            logger.warning(
                f"Training made the model worse: `{metric}` was {better.pop(0):.4g} before the first update, and "
                f"{loaded} Use the model that training started from, or lower `learning_rate`."
            )
        if better:
            step = max(better, key=lambda step: sign * better[step])
            logger.warning(
                f"A better model was not saved: `{metric}` was {better[step]:.4g} after update {step}, and {loaded} "
                "Train again with a checkpoint at every evaluation (`save_steps` as `eval_steps`)."
            )


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"The checkpoint {checkpoint!r} is damaged, or holds Python objects, which could run code when loaded. "
            "Resume from another one."
        ) from error
    except (RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
            raise
        raise ValueError(
            f"The checkpoint {checkpoint!r} does not fit the model, or is damaged: "
            f"{' '.join(str(error).split()).rstrip('.')}. Resume from another one."
        ) from error


def describe_training(
    args: TrainingArguments, model: torch.nn.Module, source: str | None, rows: Dataset | IterableDataset
) -> dict[str, Any]:
    """
    Everything that the weights depend on, except the number of updates and their rows, as JSON-serializable values.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings of the run.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): What is trained.
        source (`str`, *optional*): Id or path of the model, if the user gave one.
        rows ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The training rows. Nothing is known of streamed
            rows before they are read.
    """
    settings = args.to_dict()
    described = {name: settings[name] for name in (*_KEPT, *_TAKEN, *_FIXED) if name in settings}
    described = {name: value for name, value in described.items() if name not in _BEST or value is not None}
    described["mixed_precision"] = args.mixed_precision
    described |= describe_model(model)
    del described["adapter"], described["num_parameters"]
    source = source or described["model"]
    described["model"] = os.path.realpath(source) if os.path.isdir(source) else source
    if isinstance(model, PeftModel):
        (name, *_) = model.active_adapters
        described["adapter"] = name
        for key, value in model.peft_config[name].to_dict().items():
            if key not in _FREE:
                described[f"peft_config.{key}"] = sorted(value) if isinstance(value, set | list) else value
    described[_ROWS] = _checksum(rows) if isinstance(rows, Dataset) else None
    return json.loads(json.dumps(described, default=str))


def _checksum(rows: Dataset) -> str:
    digest = hashlib.sha256()
    added = [column for column in ("step_weights", *SFT_COLUMNS) if column in rows.column_names]
    columns = [*STEP_COLUMNS, *added]
    for batch in rows.with_format(None).select_columns(columns).iter(1000):
        digest.update(repr([batch[column] for column in columns]).encode())
    return digest.hexdigest()


def check_training(before: dict[str, Any] | None, now: dict[str, Any], checkpoint: str, is_named: bool) -> None:
    """
    Warn of differences between the run that made a checkpoint and the one that resumes from it, or refuse them.

    Args:
        before, now (`dict`): [`describe_training`] of the two runs, with the [`describe_base`] of their adapters.
        checkpoint (`str`): The folder.
        is_named (`bool`): Whether the user named it, and may therefore want to change something.

    Raises:
        `ValueError`: If something differs and the user did not name the checkpoint, or it does not fit.
    """
    if before is None or before == now:
        return
    differences = {}
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        # Values that are unknown, or have another name in another version or type of adapter
        is_unknown = None in (old, new) if name == _ROWS else not (name in before and name in now or name == "adapter")
        if is_unknown or old == new or (name == _BASE and not is_another_base(old, new)):
            continue
        said = f"{name} was {old!r} and is now {new!r}"
        said = "the rows of the dataset, or their order, have changed" if name == _ROWS else said
        said = "the rows or questions of the evaluation have changed" if name == _EVALUATED else said
        said = f"the weights of the base model {now[name]['model']!r} have changed" if name == _BASE else said
        differences[name] = said + (" (the old value is used)" if name in _KEPT else "")
    free = ("peft_config.lora_dropout",)
    misfits = [
        said
        for name, said in differences.items()
        if name in (*_FIXED, "adapter") or name.startswith("peft_config.") and name not in free
    ]
    if misfits and is_named:
        raise ValueError(
            f"Training cannot resume from {checkpoint!r}: {'; '.join(misfits)}. Restore the old value, or start again "
            "in another `output_dir`."
        )
    if not differences:
        return
    said = f"The checkpoint {checkpoint!r} is from a different training: {'; '.join(differences.values())}."
    if not is_named:
        remedy = "Restore the old value, or choose another `output_dir`"
        remedy += "." if misfits else ". To resume from it anyway, name it in `resume_from_checkpoint`."
        raise ValueError(f"{said} {remedy}")
    logger.warning(f"{said} The weights will differ from those of an uninterrupted run.")


def _remembered(state: TrainerState) -> dict[str, Any]:
    return (state.stateful_callbacks or {}).get(RememberTraining.__name__, RememberTraining().state())["attributes"]


def plan_training(
    plan: Callable[[TrainingArguments], tuple],
    args: TrainingArguments,
    dataloader: DataLoader,
    resumed: TrainerState,
) -> tuple:
    """
    The result of `Trainer.set_initial_training_values` for a resumed run.

    Args:
        plan (`Callable`): That method, as a function of the arguments.
        args ([`~transformers.TrainingArguments`]): Settings of the run.
        dataloader (`torch.utils.data.DataLoader`): Batches of the run.
        resumed ([`~transformers.TrainerState`]): State of the checkpoint.
    """
    values = plan(args)
    planned = values[-1]
    if args.max_steps < 0 and args.num_train_epochs == _remembered(resumed)["num_train_epochs"]:
        # The number of updates stays that of the original epochs, whatever an update holds now
        args = copy.copy(args)
        args.max_steps = resumed.max_steps
        values = plan(args)
    _, updates_per_epoch, *_, batches_per_epoch, max_steps = values
    step = resumed.global_step
    if step >= max_steps:
        logger.warning(
            f"Training is complete: the checkpoint has {step:,} of {max_steps:,} updates. Raise `max_steps` or "
            "`num_train_epochs` to continue."
        )
        # `Trainer` makes at least one update in every epoch that it begins. This leaves no epoch to begin
        return (step // updates_per_epoch, *values[1:])
    # Where `Trainer` goes on: it takes all updates before for such as they are now. The last batch of an epoch, of
    # fewer rows, moves that by less than a batch where nothing else does
    if not has_length(dataloader) and (resumed.epoch or 0) >= 1:
        logger.warning(
            "The rows are streamed, and all of them were read before the checkpoint. Training resumes from the first "
            "row instead of its old position."
        )
    epoch = step // updates_per_epoch
    epoch += step % updates_per_epoch * args.gradient_accumulation_steps / batches_per_epoch
    batches = abs(epoch - (resumed.epoch or 0)) * batches_per_epoch if has_length(dataloader) else 0
    batch = max(1, (resumed.train_batch_size or 1) / args.per_device_train_batch_size)
    if max_steps != planned or round(batches, 6) >= batch:
        logger.warning(
            "An update now uses a different fraction of the dataset than at the checkpoint. Training ends after "
            f"{max_steps:,} updates in total and resumes at epoch {epoch:.2f} of the data instead of "
            f"{resumed.epoch:.2f}, so some rows are read more often than others. Set `max_steps` for another number "
            "of updates."
        )
    return values
