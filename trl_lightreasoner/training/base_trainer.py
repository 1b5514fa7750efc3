"""The output of a trainer: a card in every saved folder, and its pushes to the Hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainingArguments, logging
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import TRAINING_ARGS_NAME

from ..generation.greedy import save_generation_config, without_generation_config
from ..hub.cards import model_card
from ..hub.sharing import hub_errors, open_repo
from ..hub.training_curve import draw_curve
from ..models.base_model import save_base
from ..models.loading import hub_kwargs
from ..models.provenance import hub_id
from ..models.weights import get_base_model
from ..steps.prompt_format import PromptFormat
from ..steps.writer import check_folder
from .checkpoints import one_training
from .resuming import ResumableTrainer
from .saving import check_gathered, check_saved, keep_weights, rehearse


if TYPE_CHECKING:
    from ..evaluation.evaluation import Evaluation


logger = logging.get_logger(__name__)

_FEW_TOKENS = 128  # number of tokens to compare two models with


def check_destinations(args: TrainingArguments) -> None:
    """
    Refuse settings with which a training could not save its output.

    Raises:
        `ValueError`: If `output_dir` is not a folder or is in use, a tracker is not installed, or the repository is
            not the user's.
    """
    check_folder(args.output_dir)
    if args.process_index == 0 and os.path.isdir(args.output_dir):
        with one_training(args.output_dir):
            pass
    for report in get_reporting_integration_callbacks(args.report_to):
        try:
            report()
        except RuntimeError as error:  # it is not installed
            raise ValueError(f"`report_to` cannot be {args.report_to}: {error}") from error
    if args.push_to_hub and args.process_index == 0:
        repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
        open_repo(repo_id, private=args.hub_private_repo, token=args.hub_token)


class _BaseTrainer(ResumableTrainer):
    """A [`~transformers.Trainer`] whose model cards show the method, the data, the settings and the training curve."""

    _tag_names: list[str] = []
    # The prompt format of the dataset, which is saved with the model
    prompt_format: PromptFormat | None = None
    _saves_checkpoint = False
    # What the processes gathered for the last saving, where none of them holds all weights
    _gathered: dict[str, torch.Tensor] | None = None

    def train(self, *args, **kwargs):
        def save(folder: str) -> None:
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))
            self._save_beside(folder)

        if self.is_world_process_zero() and not self._is_split:
            rehearse(self._whole_model(), save)
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir
        model = self._whole_model()
        if self._is_split and not self._saves_checkpoint:
            self._gathered = state_dict
        try:
            with without_generation_config(get_base_model(model)):
                super()._save(output_dir, state_dict)
            if self.is_world_process_zero():
                self._save_beside(folder)
        except Exception as error:
            if isinstance(error, OSError) and self._saves_checkpoint:  # the previous checkpoint is kept
                raise
            try:
                path = keep_weights(model, state_dict, folder)
            except Exception:  # the disk is full
                raise error from None
            raise ValueError(
                f"The model could not be saved in {folder!r}: {' '.join(str(error).split()).rstrip('.')}. The trained "
                f"weights are in {path!r}. Read them with `safetensors.torch.load_file`."
            ) from error

    def _save_beside(self, folder: str) -> None:
        save_generation_config(self._whole_model(), self.processing_class, folder)
        # PEFT's card of the folder contains the local path of the base model
        model_card(self, self._model_name()).save(os.path.join(folder, "README.md"))
        if self.prompt_format is not None:
            self.prompt_format.save(folder)
        save_base(self._base, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._saves_whole():
            super().save_model(output_dir, _internal_call)
        gathered, self._gathered = self._gathered, None
        if self._saves_checkpoint or not self.is_world_process_zero():
            return
        if self._is_split:
            check_gathered(self._whole_model(), gathered or {}, output_dir or self.args.output_dir)
            return
        kwargs = hub_kwargs({"trust_remote_code": self.args.trust_remote_code, **(self.args.model_init_kwargs or {})})
        kwargs.pop("revision", None)  # recorded in the adapter already
        ids = list(range(_FEW_TOKENS))
        if isinstance(self.train_dataset, Dataset):
            row = self.train_dataset[0]
            ids = [*row["prompt_ids"], *row["completion_ids"]][:_FEW_TOKENS]
        check_saved(self._whole_model(), output_dir or self.args.output_dir, ids, **kwargs)

    @contextmanager
    def _saves_whole(self) -> Iterator[None]:
        """Context in which `Trainer` saves a model that FSDP splits. With `SHARDED_STATE_DICT` it would save none."""
        if not self.is_fsdp_enabled or self._saves_checkpoint:
            yield
            return
        from torch.distributed.fsdp import StateDictType  # loaded by FSDP itself

        plugin = self.accelerator.state.fsdp_plugin
        chosen, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            plugin.state_dict_type = chosen

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Uploads during training also have a card, which must not change during an upload
        if self.args.push_to_hub and self.is_world_process_zero():
            if self.push_in_progress is None or self.push_in_progress.is_done():
                self.create_model_card()
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saves_checkpoint = False

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        evaluation: "Evaluation | None" = None,
    ) -> None:
        """
        Write the model card in `args.output_dir`, with TRL's arguments, and the training curve as a picture if
        matplotlib is installed. [`~transformers.Trainer.push_to_hub`] calls it with these arguments.

        Args:
            model_name (`str`, *optional*): Name of the model.
            dataset_name (`str`, *optional*): Id on the Hub of the dataset used for training.
            tags (`str` or `list[str]`, *optional*): Tags to add to the method's own.
            evaluation ([`~trl_lightreasoner.evaluation.evaluation.Evaluation`], *optional*):
                Result of [`~trl_lightreasoner.evaluate`] for the model.
        """
        if not self.is_world_process_zero():
            return
        folder = self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        has_figure = draw_curve(self.state, os.path.join(folder, "training_curve.png"))
        tags = [tags] if isinstance(tags, str) else tags or []
        card = model_card(self, model_name or self._model_name(), dataset_name, tags, evaluation, has_figure)
        card.save(os.path.join(folder, "README.md"))

    def push_to_hub(self, *args, **kwargs):
        base = get_base_model(self.model).config._name_or_path
        if isinstance(self.model, PeftModel) and hub_id(base) is None and self.is_world_process_zero():
            logger.warning(
                f"The adapter_config.json of the adapter names {base!r} as the base model, a folder of this machine. "
                "Push the base model as well and name it there. Otherwise nobody else can load the adapter."
            )
        with hub_errors(f"The trained model is in {self.args.output_dir!r}. You can upload it with `hf upload`."):
            return super().push_to_hub(*args, **kwargs)

    def _model_name(self) -> str:
        return (self.args.hub_model_id or Path(self.args.output_dir).absolute().name).split("/")[-1]
