"""`LightReasonerTrainer`: fine-tunes an expert on the kept steps of a Dataset, `D_KL(v_C || pi_theta)` at each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import AdaLoraModel, PeftConfig, PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    logging,
    set_seed,
)
from transformers.training_args import ParallelMode

from ..contrast import ContrastiveLoss, contrastive_loss
from ..hub.card_parts import TAGS
from ..models.adapter_loading import check_adapter
from ..models.forward import accepts_logits_to_keep, attention_backends, forward_at, rope_switch
from ..models.loading import hub_kwargs, load_model, load_tokenizer
from ..models.provenance import warn_of_another_expert
from ..models.weights import check_bare, get_base_model, settle_4bit_layers
from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
from ..steps.beta import resolve_beta
from ..steps.dataset import SFT_COLUMNS, STEP_COLUMNS, printed_date
from ..steps.messages import prints_date
from ..steps.prompt_format import format_of_steps
from ..vocabulary import model_vocabulary
from .accuracy import EvalQuestions
from .adapters import AllocateRanks, check_forward, is_plain_lora, is_quantized, plan_loading, prepare_adapter
from .averaging import count_items, count_sft_tokens, mean_loss
from .base_trainer import check_destinations
from .combinations import (
    check_answers,
    check_arguments,
    check_functions,
    check_metric,
    check_rope,
    check_trained_weights,
)
from .cuda_graphs import GraphedLayers, can_capture
from .data_collator import DataCollatorForLightReasoner, with_indices
from .dataset import prepare_dataset, prepare_sft_dataset, put_beside, sample_dataset, warn_of_another_template
from .evaluating import EvaluatingTrainer
from .lightreasoner_config import LightReasonerConfig
from .nonfinite_updates import SkipNonFiniteUpdates
from .own_config import own_config
from .packed_attention import can_pack, is_packed, pack, packed_attention
from .resuming import RememberTraining
from .saving import warn_of_left_out
from .timed_checkpoints import TimedCheckpoints, is_timed


logger = logging.get_logger(__name__)


class LightReasonerTrainer(EvaluatingTrainer):
    r"""
    Trainer for LightReasoner (arXiv 2510.07962), which minimises `D_KL(v_C || pi_theta)` at the kept steps of a
    Dataset.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, which must be the expert that the Dataset was sampled with. Can be either:

            - A string, being the id of a model or an adapter on the Hub, or a path. It is loaded with
              `args.model_init_kwargs`. Its `dtype` is by default `"float32"` if all weights are trained, and the
              checkpoint's own if only an adapter is (float32 for a float16 checkpoint on a CPU).
            - A [`~transformers.PreTrainedModel`].
            - A [`~peft.PeftModel`], which is trained as it is.
        args ([`LightReasonerConfig`] or [`~transformers.TrainingArguments`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used. From another trainer's
            configuration, such as [`~trl.SFTConfig`], the trainer takes the values that differ from that class's
            defaults. All other fields have the defaults of [`LightReasonerConfig`]. A warning names these defaults and
            the settings that are ignored.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to form a batch. Defaults to [`DataCollatorForLightReasoner`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows from [`ContrastiveStepSampler`], with one or several kept steps.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict[str, Dataset]`, *optional*):
            Rows of the same kind, for `eval_loss`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's tokenizer, which is saved with it. If `None`, it is loaded from the model's folder or
            repository.
        compute_loss_func (`Callable`, *optional*):
            A function that replaces the mean over kept steps. It is called with the outputs, the labels and
            `num_items_in_batch`. `outputs.logits` holds the logits at the N kept steps of a batch, `(N, W)`, and
            `outputs.steps` the [`ContrastiveLoss`] of each. The labels are the pair of `label_ids` and `label_probs`,
            `(N, K)`, of v_C. Divide a sum by `num_items_in_batch`, the number of kept steps of the whole update. It is
            `None` at evaluation.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            The function that will be used to compute metrics at evaluation. Must take a
            [`~transformers.EvalPrediction`] and return a dictionary of metric names and values. The predictions are
            the logits at the kept steps, `(rows, S, W)`, with minus infinity in columns that are not tokens. The
            labels are the ids of v_C's most probable tokens, `(rows, S)`. If a row has fewer steps than S, both are
            padded with -100.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            A tuple containing the optimizer and the scheduler to use.
        optimizer_cls_and_kwargs (`tuple[Type[torch.optim.Optimizer], Dict[str, Any]]`, *optional*):
            A tuple containing the optimizer class and keyword arguments to use, the learning rate `lr` among them.
            Overrides `optim`, `optim_args` and `learning_rate` in `args`. Incompatible with the `optimizers` argument.
        preprocess_logits_for_metrics (`Callable[[torch.Tensor, torch.Tensor], torch.Tensor]`, *optional*):
            A function that preprocesses the logits right before they are cached at each evaluation step. Must take the
            logits and the labels of a batch, in the form that `compute_metrics` gets, and return the processed logits.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization configuration used when loading the model from a string.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. If `None`, the model is trained as it is.
        eval_questions ([`~datasets.Dataset`], *optional*):
            Questions that the model answers greedily at every evaluation, for `eval_accuracy`. `prompt` has the form
            that [`ContrastiveStepSampler`] accepts. `answer` is the reference: a text, or a list of texts that must
            all be given. In GSM8K's solutions the text after `####` counts, in others the last `\boxed{}`. The first
            evaluation comes before the first update. No `eval_dataset` is needed. Without a column
            `chat_template_kwargs`, messages get that of the prompt format of `train_dataset`.
        sft_dataset ([`~datasets.Dataset`], *optional*):
            Your own demonstrations in TRL's format: `prompt` and `completion`, or `messages` that end with an
            assistant's message. Each row of `train_dataset` is paired with one of them, in order and repeating.
            `args.sft_weight` times the mean cross-entropy of the completions' tokens is added to the loss.
        amateur_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Amateur for sampling before training. `train_dataset` then holds prompts for [`ContrastiveStepSampler`],
            and the model is the expert.
        sampling_args ([`ContrastiveSamplingConfig`], *optional*):
            Configuration of that sampling. If `None`, a default configuration is used, and the steps are saved in
            `_steps` in `args.output_dir`.

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

    _tag_names = TAGS

    # `compute_loss` divides by the kept steps of the whole update, so `Trainer` need not scale the loss
    loss_is_scaled_for_ga = True
    _signature_columns: list[str] | None
    # Batches at the end of a stream, for the first update of its next pass
    _left_over: list[dict[str, torch.Tensor]]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: LightReasonerConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        eval_questions: Dataset | None = None,
        sft_dataset: Dataset | None = None,
        amateur_model: str | PreTrainedModel | PeftModel | None = None,
        sampling_args: ContrastiveSamplingConfig | None = None,
    ):
        # Args
        args = own_config(args, model)
        check_arguments(train_dataset, peft_config, amateur_model, sampling_args)
        check_functions(compute_loss_func, compute_metrics, preprocess_logits_for_metrics, train_dataset, sft_dataset)
        if sft_dataset is not None:
            args.sft_weight = 1.0 if args.sft_weight is None else args.sft_weight
        elif args.sft_weight is not None:
            raise ValueError(
                "`sft_weight` needs an `sft_dataset` (`--sft_dataset_name` on the command line), whose loss it "
                "weights. Remove it, or give the dataset."
            )
        if peft_config is not None:
            check_adapter(peft_config, "`peft_config`")
        # Each process makes its own batches of streamed rows. Dispatching would cut every tensor of a batch to the
        # number of rows, even those with one entry per token
        args.accelerator_config.dispatch_batches = False
        # On a GPU no update has to wait for the previous one: neither for its batch nor for a check of its loss, which
        # `training_step` filters on the device
        args.accelerator_config.non_blocking = args.dataloader_pin_memory
        self._filters_loss, args.logging_nan_inf_filter = args.logging_nan_inf_filter, False

        # Everything that can be refused before weights are loaded
        check_destinations(args)
        if eval_questions is not None:
            check_answers(args, has_rows=eval_dataset is not None)
        if args.eval_on_start is None:
            args.eval_on_start = eval_questions is not None and args.eval_strategy != "no"

        # How the model is loaded, processing class and vocabulary
        model_init_kwargs, config, trains_adapter = plan_loading(model, args, quantization_config, peft_config)
        # A subclass or a function may evaluate more
        if compute_metrics is None and type(self).evaluation_loop is LightReasonerTrainer.evaluation_loop:
            sets = eval_dataset if isinstance(eval_dataset, dict) else () if eval_dataset is None else ("",)
            check_metric(args, sets, eval_questions is not None, trains_adapter)
        config = config.get_text_config()
        if processing_class is None:
            processing_class = load_tokenizer(model, **model_init_kwargs)
        elif not isinstance(processing_class, PreTrainedTokenizerBase):
            raise TypeError("The `processing_class` must be a `PreTrainedTokenizerBase`")
        self.vocabulary = model_vocabulary(processing_class, config.vocab_size)

        # Dataset
        if amateur_model is not None:
            sampled_in = quantization_config if isinstance(model, str) else None
            train_dataset = sample_dataset(
                train_dataset, model, amateur_model, args, sampling_args, processing_class, sampled_in
            )
        self.beta = resolve_beta(train_dataset, args.beta)
        prepare = partial(prepare_dataset, args=args, vocabulary=self.vocabulary, config=config, beta=self.beta)
        self._prepare_rows = prepare
        # All that the model reads shows the same
        date = printed_date(train_dataset) if prints_date(processing_class) else None
        with args.main_process_first():
            train_dataset = prepare(train_dataset, "train")
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: prepare(dataset, name) for name, dataset in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = prepare(eval_dataset, "eval")
            if sft_dataset is not None:
                sft_rows = prepare_sft_dataset(sft_dataset, args, processing_class, self.vocabulary, config, date)
                check_rope(args, rope_switch(config), sft_rows, None)
                train_dataset = put_beside(train_dataset, sft_rows)
        # What every batch must contain
        self._needed = ["step_weights"] if "step_weights" in (train_dataset.column_names or ()) else []
        self._needed += [] if sft_dataset is None else ["sft_mask"]
        check_rope(args, rope_switch(config), train_dataset, eval_dataset)
        if isinstance(train_dataset, Dataset):
            self.prompt_format = format_of_steps(train_dataset)
        if eval_questions is not None:
            longest = args.eval_max_new_tokens
            self._questions = EvalQuestions(
                eval_questions, processing_class, config, longest, date, self.prompt_format
            )
            if isinstance(train_dataset, Dataset):
                self._questions.warn_of_trained(train_dataset)
            eval_dataset = {} if eval_dataset is None else eval_dataset  # without it `Trainer` has no rows for a loss

        # Model
        # PEFT initializes the adapter weights randomly, so set_seed must be done before creating the model to ensure
        # reproducibility.
        set_seed(args.seed)
        name = model if isinstance(model, str) else None
        if isinstance(model, str):
            is_on_cpu = model_init_kwargs.setdefault("device_map", None) is None  # `Trainer` places the model
            model = load_model(model, is_trainable=True, **model_init_kwargs)
            if is_on_cpu and args.parallel_mode == ParallelMode.NOT_PARALLEL and not is_quantized(model):
                model.to(args.device)  # already now: a GPU computes the checksum of its weights faster
        else:
            if args.model_init_kwargs is not None:
                logger.warning(
                    "You passed `model_init_kwargs` to the `LightReasonerConfig`, but your model is already "
                    "instantiated. The `model_init_kwargs` will be ignored."
                )
            check_bare(model, "model")
            settle_4bit_layers(model)
        weights = warn_of_another_expert(train_dataset, model, name)
        if not isinstance(model, PeftModel):
            self._base_weights = weights  # of the base model of a new adapter
        warn_of_another_template(train_dataset, processing_class)
        # The adapter records the revision of its base model
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
            pad_token_id = pad_token_id if pad_token_id in self.vocabulary else 0  # it must have an embedding
            data_collator = DataCollatorForLightReasoner(pad_token_id=pad_token_id)

        self._accepts_logits_to_keep = accepts_logits_to_keep(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not support `nn.DataParallel`, which `Trainer` uses when several GPUs "
                "are visible to a single process. Launch the script with `accelerate launch` or `torchrun`, or make a "
                "single GPU visible with `CUDA_VISIBLE_DEVICES`."
            )
        if not self._is_split:
            row = next(iter(self.train_dataset))
            check_forward(model, [*row["prompt_ids"], *row["completion_ids"]])
        is_half = args.bf16 or args.fp16 or get_base_model(model).dtype in (torch.bfloat16, torch.float16)
        self._model_config = get_base_model(model).config
        self._packs = args.device.type == "cuda" and is_half and can_pack(model)
        recomputes = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
        self._graphs: GraphedLayers | None = None
        if self._packs and args.use_cuda_graphs and not (recomputes or self._is_split or args.torch_compile):
            self._graphs = GraphedLayers(model) if can_capture(model) else None
        if is_quantized(model) and self.accelerator.is_fsdp2:
            # FSDP2 would cast packed 4-bit weights as if they were numbers. Autocast is sufficient
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.skip_nonfinite_updates = SkipNonFiniteUpdates(self)
        self.add_callback(self.skip_nonfinite_updates)
        self.add_callback(RememberTraining())
        if is_timed(args):
            self.add_callback(TimedCheckpoints(self))
        if isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel):
            self.add_callback(AllocateRanks(self))
        self._source = name
        self._begin_measuring()
        self._operations_per_token: int | None = None

        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    def _set_signature_columns_if_needed(self):
        # The columns that `Trainer` keeps under `remove_unused_columns=True`
        if self._signature_columns is None:
            self._signature_columns = [*STEP_COLUMNS, "step_weights", *SFT_COLUMNS, self.args.length_column_name]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device):
        # The items of an update are its kept steps, over all batches and processes
        return self._sum_over_update([count_items(batch) for batch in batch_samples], device)

    def _sum_over_update(self, values: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        total = torch.as_tensor(sum(values), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches = chain(self._left_over, epoch_iterator)
        batch_samples, num_items = super().get_batch_samples(batches, num_batches, device)
        self._left_over = batch_samples if len(batch_samples) < num_batches else []
        if self._left_over:  # at the end of a stream. `Trainer` would add the gradients to those of the next update
            if self.state.global_step == 0:
                raise ValueError(
                    f"All streamed rows fill {len(batch_samples)} of the {num_batches} batches of an update. Lower "
                    "`gradient_accumulation_steps`, or load them without streaming."
                )
            return [], num_items
        for name in self._needed:
            if not all(name in batch for batch in batch_samples):
                raise ValueError(
                    f"The batches of the `data_collator` lack `{name}`. Keep everything that "
                    "`DataCollatorForLightReasoner` returns."
                )
        if "sft_mask" in self._needed:
            num_sft_tokens = self._sum_over_update([count_sft_tokens(batch) for batch in batch_samples], device)
            batch_samples = [{**batch, "num_sft_tokens": num_sft_tokens} for batch in batch_samples]
        return batch_samples, num_items

    def steps_of(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
        inputs = with_indices(inputs)
        # Rows of the SFT dataset come last
        index = torch.cat([inputs[key] for key in ("label_index", "sft_index") if key in inputs])
        label_ids, label_probs = (inputs[key].flatten(0, 1)[index] for key in ("label_ids", "label_probs"))
        attention_mask = inputs["attention_mask"]
        model_inputs, positions = {"input_ids": inputs["input_ids"]}, inputs["step_mask"]
        if is_packed(self._model_config):
            model_inputs = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_index"])
            positions = inputs["step_index"]
        elif (attention_mask.diff(dim=-1) > 0).any():
            # Padding follows the tokens, where no causal model looks, not even a recurrent one. Without a mask the
            # fastest attention is used
            order = attention_mask.argsort(dim=-1, descending=True, stable=True)
            model_inputs = {"input_ids": inputs["input_ids"].gather(-1, order)}
            positions = positions.gather(-1, order)
        outputs = forward_at(model, positions, self._accepts_logits_to_keep, **model_inputs)
        outputs.steps = contrastive_loss(
            self.vocabulary.select(outputs.logits), self.vocabulary.columns_of(label_ids), label_probs
        )
        if "sft_index" in inputs:
            num_steps = len(inputs["label_index"])
            outputs.logits = outputs.logits[:num_steps]
            outputs.sft_steps = ContrastiveLoss(*(each[num_steps:] for each in outputs.steps))
            outputs.steps = ContrastiveLoss(*(each[:num_steps] for each in outputs.steps))
        return outputs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ):
        """
        Mean of `D_KL(v_C || pi_theta)` over kept steps, in nats, weighted if the steps have weights. With SFT rows,
        `sft_weight` times the mean cross-entropy over the tokens of their completions is added.

        Args:
            model (`torch.nn.Module`): The model as `Trainer` wraps it.
            inputs (`dict`): A batch of [`DataCollatorForLightReasoner`].
            return_outputs (`bool`, *optional*, defaults to `False`): Whether to return the model's outputs as well.
            num_items_in_batch (`torch.Tensor`, *optional*): Number of kept steps of the whole update, or the sum of
                their weights. If `None`, the mean is over the batch.

        Returns:
            The loss, or the loss and the outputs: `outputs.logits` holds the logits at the N kept steps, `(N, W)`, and
            `outputs.steps` the [`ContrastiveLoss`] of each, in the order of the rows.
        """
        inputs = with_indices(inputs)
        outputs = self.steps_of(model, inputs)
        if self.compute_loss_func is None:
            loss = mean_loss(outputs.steps.kl_divergence, inputs, num_items_in_batch)
        else:
            labels = tuple(inputs[key].flatten(0, 1)[inputs["label_index"]] for key in ("label_ids", "label_probs"))
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        if "sft_mask" in inputs:
            num_tokens = inputs["num_sft_tokens"] if "num_sft_tokens" in inputs else count_sft_tokens(inputs)
            cross_entropy = outputs.sft_steps.kl_divergence.sum() / num_tokens.clamp_min(1)
            loss = loss + self.args.sft_weight * cross_entropy
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients of the processes
        if model.training:
            self._count(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        # LoRA layers would cast their inputs to float32, and autocast would cast them back
        autocasts = self.accelerator.native_amp and isinstance(self.model, PeftModel)
        self._left_over = []
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
        # Also around the backward pass, in which activation checkpointing calls the layers again
        return packed_attention(self._model_config) if self._packs else nullcontext()

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        # They are as many a token in every batch, and `Trainer` would count the parameters in every one
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) // inputs["input_ids"].numel()
        return self._operations_per_token * inputs["input_ids"].numel()
