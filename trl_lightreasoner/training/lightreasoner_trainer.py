"""`LightReasonerTrainer`: fine-tunes an expert on the kept steps of a Dataset, `D_KL(v_C || pi_theta)` at each."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset
from peft import AdaLoraModel, PeftConfig, PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
    logging,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from ..contrast import contrastive_loss
from ..evaluation.answering import context_length
from ..generation.completions import evaluating
from ..models.adapter_loading import check_adapter, load_adapter_config
from ..models.forward import accepts_logits_to_keep, attention_backends, check_causal, forward_at, rope_switch
from ..models.loading import add_quantization, hub_kwargs, load_config, load_model, load_tokenizer
from ..models.provenance import warn_of_another_expert
from ..models.weights import get_base_model, settle_4bit_layers
from ..steps.dataset import STEP_COLUMNS
from ..steps.prompt_format import format_of_steps
from ..steps.training_rows import choose_beta, prepare_rows, reaches
from ..vocabulary import model_vocabulary
from .accuracy import EvalQuestions
from .adapters import AllocateRanks, is_plain_lora, is_quantized, prepare_adapter
from .base_trainer import _BaseTrainer, check_destinations
from .combinations import (
    check_answers,
    check_arguments,
    check_combinations,
    check_metric,
    check_rope,
    check_trained_weights,
)
from .cuda_graphs import GraphedLayers, can_capture
from .data_collator import DataCollatorForLightReasoner, find_indices
from .lightreasoner_config import LightReasonerConfig, own_config
from .nonfinite_updates import SkipNonFiniteUpdates
from .packed_attention import can_pack, is_packed, pack, packed_attention
from .resuming import RememberTraining
from .saving import warn_of_left_out
from .watching import DriftWarnings, adapter_off, divergence_at, starts_as_expert


logger = logging.get_logger(__name__)

# Values of `train_sampling_strategy` for which `Trainer` reads the lengths of the rows
_BY_LENGTH = ("group_by_length", "batch_rebalance")


class LightReasonerTrainer(_BaseTrainer):
    r"""
    Trainer for LightReasoner (arXiv 2510.07962): minimises `D_KL(v_C || pi_theta)` at the kept steps of a Dataset.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, which must be the expert that the Dataset was sampled with. Can be either:

            - A string, being the id of a model or an adapter on the Hub, or a path. It is loaded with
              `args.model_init_kwargs`. Its `dtype` is by default `"float32"` if all weights are trained, and the
              checkpoint's own if only an adapter is.
            - A [`~transformers.PreTrainedModel`].
            - A [`~peft.PeftModel`], which is trained as it is.
        args ([`LightReasonerConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to form a batch. Defaults to [`DataCollatorForLightReasoner`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows as [`ContrastiveStepSampler`] makes them, with one kept step or several.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict[str, Dataset]`, *optional*):
            Rows of the same kind, for `eval_loss`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's tokenizer, which is saved with it. If `None`, it is loaded from beside the model.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            A tuple containing the optimizer and the scheduler to use.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization configuration used when loading the model from a string.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. If `None`, the model is trained as it is.
        eval_questions ([`~datasets.Dataset`], *optional*):
            Questions that the model answers greedily at every evaluation, for `eval_accuracy`: `prompt`, as
            [`ContrastiveStepSampler`] takes it, and `answer`, the reference as text or a list of texts, all of which
            must be given. Of GSM8K's solutions what follows `####` counts, of others the last `\boxed{}`. The first
            evaluation comes before the first update. No `eval_dataset` is needed beside them.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer

    >>> trainer = LightReasonerTrainer(
    ...     model="Qwen/Qwen2.5-Math-1.5B",
    ...     args=LightReasonerConfig(output_dir="adapter"),
    ...     train_dataset=load_dataset("steps", split="train"),
    ...     peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    ... )
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    _tag_names = ["trl", "light-reasoner"]
    _name = "LightReasoner"
    _paper = {
        "title": "LightReasoner: Can Small Language Models Teach Large Language Models Reasoning?",
        "id": "2510.07962",
    }

    # `compute_loss` divides by the kept steps of the whole update, so that nothing is left for `Trainer` to scale
    loss_is_scaled_for_ga = True
    _signature_columns: list[str] | None
    control: TrainerControl

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: LightReasonerConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        eval_questions: Dataset | None = None,
    ):
        # Args
        args = own_config(args, model)
        check_arguments(train_dataset, peft_config)
        if peft_config is not None:
            check_adapter(peft_config, "`peft_config`")
        # Batches of streamed rows are made where they are used: dispatching would cut every tensor of a batch to the
        # number of its rows, those with an entry a token as well
        args.accelerator_config.dispatch_batches = False
        # On a GPU no update has to wait for the one before: not for its batch, nor for a look at its loss, which
        # `training_step` filters where it is
        args.accelerator_config.non_blocking = args.dataloader_pin_memory
        self._filters_loss, args.logging_nan_inf_filter = args.logging_nan_inf_filter, False

        # What can be refused before any weights are loaded
        check_destinations(args)
        if eval_questions is not None:
            check_answers(args, has_rows=eval_dataset is not None)
        if args.eval_on_start is None:
            args.eval_on_start = eval_questions is not None and args.eval_strategy != "no"

        # Processing class and vocabulary
        model_init_kwargs = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # no text by now
        model_init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        model_init_kwargs = add_quantization(model_init_kwargs, model, quantization_config, "trainer")
        config = load_config(model, **model_init_kwargs)
        trains_adapter = (
            peft_config is not None
            or not isinstance(model, str)  # it may hold one
            or load_adapter_config(model, **hub_kwargs(model_init_kwargs)) is not None
        )
        if isinstance(model, str):
            # All weights are trained in fp32; frozen ones stay as they were when the expert was sampled
            model_init_kwargs.setdefault("dtype", "auto" if trains_adapter else "float32")
        quantization = model_init_kwargs.get("quantization_config") if isinstance(model, str) else None
        quantization = quantization or getattr(config, "quantization_config", None)
        dtype = model_init_kwargs.get("dtype")
        check_combinations(args, quantization, config.dtype if dtype == "auto" else dtype, trains_adapter)
        # A subclass may evaluate more
        if type(self).evaluation_loop is LightReasonerTrainer.evaluation_loop:
            sets = eval_dataset if isinstance(eval_dataset, dict) else () if eval_dataset is None else ("",)
            check_metric(args, sets, eval_questions is not None, trains_adapter)
        config = config.get_text_config()
        if processing_class is None:
            processing_class = load_tokenizer(model, **model_init_kwargs)
        elif not isinstance(processing_class, PreTrainedTokenizerBase):
            raise TypeError("The `processing_class` must be a `PreTrainedTokenizerBase`")
        self.vocabulary = model_vocabulary(processing_class, config.vocab_size)

        # Dataset
        def prepare(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
            if isinstance(dataset, IterableDataset) and 1 < args.world_size <= dataset.num_shards:
                raise ValueError(
                    f"The {name} dataset is streamed from {dataset.num_shards} files, of which {args.world_size} "
                    "processes would take different numbers of rows, and wait for each other without end. Load it "
                    "without streaming."
                )
            rows = prepare_rows(
                dataset,
                name,
                self.vocabulary,
                config.vocab_size,
                args.max_length,
                args.one_step_per_row,
                self.beta if args.beta is not None or reaches(dataset, self.beta) else None,
                context_length(config),
            )
            if args.train_sampling_strategy in _BY_LENGTH and isinstance(rows, Dataset):
                rows = rows.map(_add_length, fn_kwargs={"column": args.length_column_name})
            return rows

        self.beta = choose_beta(train_dataset) if args.beta is None else args.beta
        self._prepare_rows = prepare
        with args.main_process_first():
            train_dataset = prepare(train_dataset, "train")
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: prepare(dataset, name) for name, dataset in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = prepare(eval_dataset, "eval")
        check_rope(args, rope_switch(config), train_dataset, eval_dataset)
        if isinstance(train_dataset, Dataset):
            self.prompt_format = format_of_steps(train_dataset)
        self._questions: EvalQuestions | None = None
        if eval_questions is not None:
            self._questions = EvalQuestions(eval_questions, processing_class, config, args.eval_max_new_tokens)
            eval_dataset = {} if eval_dataset is None else eval_dataset  # `Trainer` has nothing to compute a loss on
        self._scores: dict[str, float] = {}  # of the answers at the evaluation that is going on

        # Model
        # PEFT initializes the adapter weights randomly, so set_seed must be done before creating the model to ensure
        # reproducibility.
        set_seed(args.seed)
        name = model if isinstance(model, str) else None
        if isinstance(model, str):
            model_init_kwargs.setdefault("device_map", None)  # `Trainer` places the model
            model = load_model(model, is_trainable=True, **model_init_kwargs)
        else:
            if args.model_init_kwargs is not None:
                logger.warning(
                    "You passed `model_init_kwargs` to the `LightReasonerConfig`, but your model is already "
                    "instantiated. The `model_init_kwargs` will be ignored."
                )
            settle_4bit_layers(model)
        warn_of_another_expert(train_dataset, model, name)
        # The adapter remembers which revision of its base model it belongs to
        revision = None if name is None else model_init_kwargs.get("revision")
        model = prepare_adapter(model, peft_config, revision)
        if name is not None and not isinstance(model, PeftModel):
            warn_of_left_out(model, name, **hub_kwargs(model_init_kwargs))
        check_trained_weights(args, model)

        if args.use_liger_kernel:
            # Its forward for cross entropy takes no mask of positions
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}

        # Data collator
        if data_collator is None:
            pad_token_id = processing_class.pad_token_id
            pad_token_id = pad_token_id if pad_token_id in self.vocabulary else 0  # it needs an embedding
            data_collator = DataCollatorForLightReasoner(pad_token_id=pad_token_id)

        self._accepts_logits_to_keep = accepts_logits_to_keep(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not support `nn.DataParallel`, which `Trainer` uses when several GPUs "
                "are visible to a single process. Launch the script with `accelerate launch` or `torchrun`, or make a "
                "single GPU visible with `CUDA_VISIBLE_DEVICES`."
            )
        if not self._is_split:
            row = next(iter(self.train_dataset))
            try:
                with evaluating(model):
                    check_causal(model, "model", [*row["prompt_ids"], *row["completion_ids"]])
            except (RuntimeError, AttributeError, TypeError) as error:
                if not isinstance(model, PeftModel) or should_reduce_batch_size(error):
                    raise
                reason = " ".join(str(error).split()).rstrip(".")
                raise ValueError(
                    f"The model does not run with its adapter: {reason}. Choose other `target_modules`."
                ) from error
        is_half = args.bf16 or args.fp16 or get_base_model(model).dtype in (torch.bfloat16, torch.float16)
        self._model_config = get_base_model(model).config
        self._packs = args.device.type == "cuda" and is_half and can_pack(model)
        recomputes = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._graphs: GraphedLayers | None = None
        if self._packs and args.use_cuda_graphs and not (recomputes or is_sharded or args.torch_compile):
            self._graphs = GraphedLayers(model) if can_capture(model) else None
        if is_quantized(model) and self.accelerator.is_fsdp2:
            # FSDP2 would cast packed 4-bit weights as if they were numbers; autocast does what is needed
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.skip_nonfinite_updates = SkipNonFiniteUpdates(self)
        self.add_callback(self.skip_nonfinite_updates)
        self.add_callback(RememberTraining())
        if isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel):
            self.add_callback(AllocateRanks(self))
        self._source = name

        # Sums over the kept steps since the last log: entropy, agreement, steps. Seen: steps, tokens, since the start.
        self._sums = torch.zeros(3, dtype=_sum_dtype(args.device), device=args.device)
        self._seen = torch.zeros(2, dtype=_sum_dtype(args.device), device=args.device)
        self._eval_sums: torch.Tensor | None = None
        self._starts_as_expert = starts_as_expert(model, self.accelerator)
        self.drift_warnings = DriftWarnings()
        self._operations_per_token: int | None = None

        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    def _set_signature_columns_if_needed(self):
        # What `Trainer` keeps of a dataset under `remove_unused_columns=True`
        if self._signature_columns is None:
            self._signature_columns = [*STEP_COLUMNS, self.args.length_column_name]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device):
        # The items of an update are its kept steps, of every batch and process
        num_steps = torch.as_tensor(sum(batch["step_mask"].sum() for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_steps = self.accelerator.gather(num_steps).sum()
        return num_steps

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ):
        """
        Mean of `D_KL(v_C || pi_theta)` over kept steps, in nats.

        Args:
            model (`torch.nn.Module`): The model as `Trainer` wraps it.
            inputs (`dict`): A batch of [`DataCollatorForLightReasoner`].
            return_outputs (`bool`, *optional*, defaults to `False`): Whether to return the model's outputs as well.
            num_items_in_batch (`torch.Tensor`, *optional*): Kept steps of the whole update. If `None`, the mean is
                over the batch.

        Returns:
            The loss, or the loss and the outputs: `outputs.logits` holds the logits at the N kept steps, `(N, W)`, and
            `outputs.steps` the [`ContrastiveLoss`] of each, in the order of the rows.
        """
        if "token_index" not in inputs:  # as a collator of the user's own may leave it
            inputs = {**inputs, **find_indices(inputs)}
        label_ids, label_probs = (
            inputs[key].flatten(0, 1)[inputs["label_index"]] for key in ("label_ids", "label_probs")
        )
        attention_mask = inputs["attention_mask"]
        model_inputs, positions = {"input_ids": inputs["input_ids"]}, inputs["step_mask"]
        if is_packed(self._model_config):
            model_inputs = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_index"])
            positions = inputs["step_index"]
        elif (attention_mask.diff(dim=-1) > 0).any():
            # Padding goes behind the tokens, where no causal model looks, recurrent ones included: without a mask
            # the fastest attention applies
            order = attention_mask.argsort(dim=-1, descending=True, stable=True)
            model_inputs = {"input_ids": inputs["input_ids"].gather(-1, order)}
            positions = positions.gather(-1, order)
        outputs = forward_at(model, positions, self._accepts_logits_to_keep, **model_inputs)
        outputs.steps = contrastive_loss(
            self.vocabulary.select(outputs.logits), self.vocabulary.columns_of(label_ids), label_probs
        )
        divergence = outputs.steps.kl_divergence
        if num_items_in_batch is None:
            loss = divergence.sum() / max(len(divergence), 1)
        else:
            loss = divergence.sum() / num_items_in_batch.clamp_min(1)
            if self.args.average_tokens_across_devices:  # DDP takes the mean of the processes' gradients
                loss = loss * self.accelerator.num_processes
        if model.training:
            entropy, agreement = outputs.steps.entropy.sum(), outputs.steps.agreement.sum()
            num_steps = inputs["step_mask"].sum()
            sums = torch.stack([entropy, agreement, num_steps]).to(_sum_dtype(loss.device))
            self._sums = self._sums + sums
            seen = torch.stack([num_steps, inputs["attention_mask"].sum()]).to(sums.dtype)
            self._seen = self._seen + seen
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        # LoRA layers cast what they get to their own float32, only for autocast to cast it back
        autocasts = self.accelerator.native_amp and isinstance(self.model, PeftModel)
        with disable_input_dtype_casting(self.model, active=autocasts and is_plain_lora(self.model)):
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                if self._graphs is not None:
                    self._graphs.clear()

    def training_step(self, *args, **kwargs):
        graphs = nullcontext() if self._graphs is None else self._graphs.once()
        with attention_backends(self.accelerator.device), self._attention(), graphs:
            loss = super().training_step(*args, **kwargs)
        if self.is_in_train and self._filters_loss:
            usual = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
            loss = torch.where(loss.isfinite(), loss, usual)
        return loss

    def _attention(self) -> AbstractContextManager:
        # Around the backward pass as well, in which activation checkpointing calls the layers again
        return packed_attention(self._model_config) if self._packs else nullcontext()

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        # They are as many a token in every batch, and `Trainer` would count the parameters in every one
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) // inputs["input_ids"].numel()
        return self._operations_per_token * inputs["input_ids"].numel()

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ):
        inputs = self._prepare_inputs(inputs)
        label_probs = inputs["label_probs"]
        with torch.no_grad(), self._attention(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if not hasattr(outputs, "steps"):  # a subclass has a loss all of its own
                _, outputs = LightReasonerTrainer.compute_loss(self, model, inputs, return_outputs=True)
            steps = outputs.steps
            row, step = (label_probs.sum(-1) > 0).nonzero(as_tuple=True)
            # A subclass may add to the loss; what it adds counts for every step of the batch alike
            added = loss - steps.kl_divergence.mean()
            label_entropy = -torch.special.xlogy(label_probs, label_probs).sum(-1)[row, step]
            ones = torch.ones_like(label_entropy)
            values = [ones, steps.kl_divergence + added, steps.entropy, steps.agreement, label_entropy]
            if self._starts_as_expert:
                with adapter_off(self.accelerator.unwrap_model(model, keep_torch_compile=False)):
                    _, expert = LightReasonerTrainer.compute_loss(self, model, inputs, return_outputs=True)
                logits = [self.vocabulary.select(each.logits) for each in (outputs, expert)]
                values += [divergence_at(*logits), expert.steps.kl_divergence]
        sums = torch.zeros(len(inputs["input_ids"]), len(values), dtype=_sum_dtype(loss.device), device=loss.device)
        sums.index_add_(0, row, torch.stack(values, dim=1).to(sums.dtype))
        # Row by row, since the last batches of several processes hold rows twice, which `gather_for_metrics` takes out
        self._eval_sums = self._eval_sums + self.accelerator.gather_for_metrics(sums).sum(0)
        return loss.detach(), None, None

    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        # A dataset that comes only now is as the sampler made it; the trainer's own come by name or not at all
        if isinstance(eval_dataset, Dataset | IterableDataset):
            with self.args.main_process_first():
                eval_dataset = self._prepare_rows(eval_dataset, metric_key_prefix)
        if self._questions is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        scores = self._questions.measure(self.model, self.vocabulary, self.accelerator)
        scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        if isinstance(self.eval_dataset, dict):  # each is logged by itself, and there may be none
            metrics = super().evaluate(None, ignore_keys, metric_key_prefix)
            self.log(scores)
            metrics |= scores
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics
        self._scores = scores
        try:
            return super().evaluate(None, ignore_keys, metric_key_prefix)
        finally:
            self._scores = {}

    def predict(self, test_dataset: Dataset | IterableDataset, *args, **kwargs) -> PredictionOutput:
        if isinstance(test_dataset, Dataset | IterableDataset):
            with self.args.main_process_first():
                test_dataset = self._prepare_rows(test_dataset, "test")
        return super().predict(test_dataset, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        device = self.accelerator.device
        names = ["loss", "entropy", "mean_token_accuracy", "label_entropy"]
        names += ["kl_to_expert", "expert_loss"] if self._starts_as_expert else []
        self._eval_sums = torch.zeros(1 + len(names), dtype=_sum_dtype(device), device=device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        num_steps, *sums = self._eval_sums.tolist()
        means = {name: value / max(num_steps, 1) for name, value in zip(names, sums, strict=True)}
        # `Trainer` takes the mean of the batches' means, which is not the mean over the steps
        for name in ("loss", "entropy", "mean_token_accuracy", "kl_to_expert"):
            if name in means:
                output.metrics[f"{metric_key_prefix}_{name}"] = means[name]
        if self.is_world_process_zero():
            self.drift_warnings.look_at(means, metric_key_prefix)
        output.metrics.update(self._scores)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(torch.cat([self._sums, self._seen]), "sum")
            entropy, agreement, num_steps, seen_steps, seen_tokens = sums.tolist()
            logs["entropy"] = entropy / max(num_steps, 1)
            logs["mean_token_accuracy"] = agreement / max(num_steps, 1)
            logs["num_kept_steps"] = seen_steps
            logs["num_tokens"] = seen_tokens
            logs["num_nonfinite_updates"] = self.skip_nonfinite_updates.count
            self._sums = torch.zeros_like(self._sums)
        super().log(logs, start_time)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs do not have


def _add_length(row: dict[str, Any], column: str) -> dict[str, int]:
    return {column: len(row["prompt_ids"]) + row["step_positions"][-1]}  # behind the last kept step a row is cut
