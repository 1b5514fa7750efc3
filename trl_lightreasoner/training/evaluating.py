"""Metrics of training and evaluation: means over the kept steps, exact for any batch size."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import TrainerControl, logging
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from ..contrast import ContrastiveLoss
from ..vocabulary import Vocabulary
from .accuracy import EvalQuestions
from .averaging import count_items, count_sft_tokens, count_steps, mean_loss, weighted
from .base_trainer import _BaseTrainer
from .data_collator import with_indices
from .nonfinite_updates import SkipNonFiniteUpdates
from .watching import DriftWarnings, adapter_off, divergence_at, is_expert_without_adapter


logger = logging.get_logger(__name__)


class EvaluatingTrainer(_BaseTrainer):
    """
    A trainer that logs and evaluates means over the kept steps of rows, and answers its `eval_questions`.

    A subclass computes the kept steps of a batch ([`~EvaluatingTrainer.steps_of`]), checks the rows of a dataset and
    defines the attention of the layers.
    """

    control: TrainerControl
    vocabulary: Vocabulary
    skip_nonfinite_updates: SkipNonFiniteUpdates
    _prepare_rows: Callable[[Dataset | IterableDataset, str], Dataset | IterableDataset]
    _attention: Callable[[], AbstractContextManager]
    _questions: EvalQuestions | None = None

    def _describe_evaluation(self) -> dict[str, Any]:
        questions = {} if self._questions is None else {"questions": self._questions.checksum()}
        return {**super()._describe_evaluation(), **questions}

    def _begin_measuring(self) -> None:
        """Call it once the model is on its training device."""
        device = self.args.device
        # Sums over the kept steps since the last log, by their weights: entropy, agreement, 1. Seen since the start:
        # steps, tokens.
        self._sums = torch.zeros(3, dtype=_sum_dtype(device), device=device)
        self._seen = torch.zeros(2, dtype=_sum_dtype(device), device=device)
        # Likewise over the tokens of SFT rows: cross-entropy, tokens
        self._sft_sums = torch.zeros(2, dtype=_sum_dtype(device), device=device)
        self._eval_sums: torch.Tensor | None = None
        self._scores: dict[str, float] = {}  # of the answers at the current evaluation
        self._is_expert_without_adapter = is_expert_without_adapter(self.model, self.train_dataset, self.accelerator)
        self.drift_warnings = DriftWarnings()

    @abstractmethod
    def steps_of(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
        """
        The model at the N kept steps of a batch.

        Args:
            model (`torch.nn.Module`): The model as `Trainer` wraps it.
            inputs (`dict`): A batch of [`DataCollatorForLightReasoner`].

        Returns:
            The model's outputs: `outputs.logits` holds the logits at the kept steps, `(N, W)`, and `outputs.steps` the
            [`ContrastiveLoss`] of each, in the order of the rows; where there are SFT rows, `outputs.sft_steps` holds
            that of their tokens, whose divergence is the cross-entropy.
        """

    def _count(self, outputs: Any, inputs: dict[str, torch.Tensor]) -> None:
        steps: ContrastiveLoss = outputs.steps
        num_steps = count_steps(inputs)
        values = [weighted(each, inputs).sum() for each in (steps.entropy, steps.agreement)]
        sums = torch.stack([*values, count_items(inputs)]).to(self._sums.dtype)
        self._sums = self._sums + sums
        seen = torch.stack([num_steps, inputs["attention_mask"].sum()]).to(sums.dtype)
        self._seen = self._seen + seen
        if "sft_mask" in inputs:
            loss = outputs.sft_steps.kl_divergence.detach().sum()
            self._sft_sums = self._sft_sums + torch.stack([loss, count_sft_tokens(inputs)]).to(sums.dtype)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ):
        inputs = with_indices(self._prepare_inputs(inputs))
        label_probs = inputs["label_probs"]
        with torch.no_grad(), self._attention(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if not hasattr(outputs, "steps"):  # a subclass has its own loss
                outputs = self.steps_of(model, inputs)
            steps = outputs.steps
            row, step = (label_probs.sum(-1) > 0).nonzero(as_tuple=True)
            # A subclass may add to the loss. The addition counts equally for every step of the batch
            added = loss - mean_loss(steps.kl_divergence, inputs)
            label_entropy = -torch.special.xlogy(label_probs, label_probs).sum(-1)[row, step]
            ones = torch.ones_like(label_entropy)
            values = [ones, steps.kl_divergence + added, steps.entropy, steps.agreement, label_entropy]
            if self._is_expert_without_adapter:
                with adapter_off(self.accelerator.unwrap_model(model, keep_torch_compile=False)):
                    expert = self.steps_of(model, inputs)
                logits = [self.vocabulary.select(each.logits) for each in (outputs, expert)]
                values += [divergence_at(*logits), expert.steps.kl_divergence]
        sums = torch.zeros(len(inputs["input_ids"]), len(values), dtype=_sum_dtype(loss.device), device=loss.device)
        values = [weighted(each, inputs) for each in values]
        sums.index_add_(0, row, torch.stack(values, dim=1).to(sums.dtype))
        # Row by row, since the last batches of several processes hold duplicates, which `gather_for_metrics` removes
        self._eval_sums = self._eval_sums + self.accelerator.gather_for_metrics(sums).sum(0)
        if prediction_loss_only or self.compute_metrics is None:
            return loss.detach(), None, None
        logits, labels = self._at_steps(outputs.logits, row, step, inputs["label_ids"])
        return loss.detach(), logits, labels

    def _at_steps(
        self, logits: torch.Tensor, row: torch.Tensor, step: torch.Tensor, label_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(B, S, W)` and v_C's most probable tokens `(B, S)` at the kept steps of B rows, padded with -100."""
        is_token = self.vocabulary.contains(torch.arange(logits.shape[-1], device=logits.device))
        padded = logits.new_full((*label_ids.shape[:2], logits.shape[-1]), -100)
        padded[row, step] = logits.masked_fill(~is_token, -torch.inf)
        labels = torch.full_like(label_ids[..., 0], -100)
        labels[row, step] = label_ids[row, step, 0]
        return padded, labels

    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        # A dataset passed here is not yet prepared. The trainer's own datasets are passed by name or not at all
        if isinstance(eval_dataset, Dataset | IterableDataset):
            with self.args.main_process_first():
                eval_dataset = self._prepare_rows(eval_dataset, metric_key_prefix)
        if self._questions is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        scores = self._questions.measure(self.model, self.vocabulary, self.accelerator)
        scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        if isinstance(self.eval_dataset, dict):  # each is logged separately, and there may be none
            metrics = super().evaluate(None, ignore_keys, metric_key_prefix)
            self.log(scores)
            # The sets have had their calls, and a callback may count them
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
            return metrics | scores
        self._scores = scores
        try:
            return super().evaluate(None, ignore_keys, metric_key_prefix)
        finally:
            self._scores = {}

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        with self._all_rows():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs) -> DataLoader:
        with self._all_rows():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _all_rows(self) -> Iterator[None]:
        """Context in which `dataloader_drop_last`, which is for equal updates, drops no row from a mean."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def predict(self, test_dataset: Dataset | IterableDataset, *args, **kwargs) -> PredictionOutput:
        if isinstance(test_dataset, Dataset | IterableDataset):
            with self.args.main_process_first():
                test_dataset = self._prepare_rows(test_dataset, "test")
        return super().predict(test_dataset, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        device = self.accelerator.device
        names = ["loss", "entropy", "mean_token_accuracy", "label_entropy"]
        names += ["kl_to_expert", "expert_loss"] if self._is_expert_without_adapter else []
        self._eval_sums = torch.zeros(1 + len(names), dtype=_sum_dtype(device), device=device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        weight, *sums = self._eval_sums.tolist()
        means = {name: value / (weight or 1) for name, value in zip(names, sums, strict=True)}
        # `Trainer` averages the means of the batches, which is not the mean over the steps
        own = {
            f"{metric_key_prefix}_{name}": means[name]
            for name in ("loss", "entropy", "mean_token_accuracy", "kl_to_expert")
            if name in means
        }
        own |= self._scores
        if taken := own.keys() & output.metrics.keys() - {f"{metric_key_prefix}_loss"}:
            name = min(taken).removeprefix(f"{metric_key_prefix}_")
            raise ValueError(
                f"`compute_metrics` returns {name!r}, a name that is already logged. Choose another name."
            )
        output.metrics.update(own)
        if self.is_world_process_zero():
            self.drift_warnings.look_at(means, metric_key_prefix)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(torch.cat([self._sums, self._seen, self._sft_sums]), "sum")
            entropy, agreement, weight, seen_steps, seen_tokens, sft_loss, sft_tokens = sums.tolist()
            if not weight and seen_steps and isinstance(self.train_dataset, IterableDataset):  # not read before
                logger.warning_once(
                    "All kept steps of the stream since the last log have weight 0 in `step_weights`, so nothing was "
                    "learned from them."
                )
            logs["entropy"] = entropy / (weight or 1)
            logs["mean_token_accuracy"] = agreement / (weight or 1)
            logs["num_kept_steps"] = seen_steps
            logs["num_tokens"] = seen_tokens
            logs["num_nonfinite_updates"] = self.skip_nonfinite_updates.count
            if sft_tokens:
                logs["sft_loss"] = sft_loss / sft_tokens
            self._sums, self._sft_sums = torch.zeros_like(self._sums), torch.zeros_like(self._sft_sums)
        super().log(logs, start_time)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
