"""Settings of `LightReasonerTrainer`."""

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import is_deepspeed_available
from transformers.utils import is_torch_bf16_gpu_available

from ..config_checks import check_finite, check_flags, check_init_kwargs, check_json_files, check_whole_numbers
from ..config_help import help_from_docstring


# Of 8 rows each: 1,000 trajectories. More cost accuracy on true weights, however many prompts there were
_DEFAULT_UPDATES = 125
# Metrics of which less is better. `TrainingArguments` takes this of losses alone
_LESS_IS_BETTER = ("kl_to_expert", "accuracy_num_cut", "accuracy_standard_error", "runtime")


@dataclass
@help_from_docstring
class LightReasonerConfig(TrainingArguments):
    r"""
    Configuration class for the [`LightReasonerTrainer`].

    This class includes only the parameters that are specific to LightReasoner training. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this
    class may differ from those in [`~transformers.TrainingArguments`]: these gained accuracy on every measured pair.
    The paper's values (arXiv 2510.07962) are in examples/paper.yaml.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when the `model`
            argument of the [`LightReasonerTrainer`] is provided as a string. The `revision` value is also used when
            loading the processing class.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow loading models and tokenizers that ship custom Python code from the Hub.

        > Parameters that control the data preprocessing

        max_length (`int` or `None`, *optional*, defaults to `1024`):
            Maximum number of tokens before a step. Steps beyond it are dropped and counted, and nothing is truncated.
            If `None`, training uses every step.
        beta (`float`, *optional*):
            Divergence threshold in nats: steps of the dataset below it are excluded. `0` excludes none. If `None`, it
            is 1.6 if v_C prefers a token other than the expert's at a tenth or more of the steps of 1.6 nats or more,
            and otherwise 0.8. If no step of the evaluation rows reaches this default, all of their steps are
            evaluated.
        one_step_per_row (`bool`, *optional*, defaults to `False`):
            Whether to train on rows of a single kept step, as in the paper. By default a row is a whole trajectory,
            whose steps share one forward pass.

        > Parameters that control the training

        sft_weight (`float`, *optional*):
            Weight of the mean cross-entropy over the tokens of the `sft_dataset` of the [`LightReasonerTrainer`],
            which is added to the mean over kept steps. If `None`, it is 1.0 if there is such a dataset.
        use_cuda_graphs (`bool`, *optional*, defaults to `True`):
            Whether to train an adapter with CUDA graphs if possible: on a GPU in half precision, without activation
            checkpointing, `torch_compile`, FSDP or DeepSpeed. Forward hooks of the layers do not run with CUDA graphs.

        > Parameters that control the evaluation

        eval_max_new_tokens (`int`, *optional*, defaults to `512`):
            Maximum number of tokens to generate per answer to the `eval_questions` of the [`LightReasonerTrainer`].
            Longer answers are cut off, counted, and graded as they stand.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `0.0001` instead of `5e-05`.
    > - `num_train_epochs`: Defaults to `None` instead of `3.0`. If neither it nor `max_steps` is set, training takes
    >   125 updates, however many rows there are.
    > - `bf16`: Defaults to `None` instead of `False`: `True` on an accelerator that has it, unless `fp16` is set.
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `save_steps`: Defaults to `0` instead of `500`: a checkpoint is saved when five minutes have passed since the
    >   last one, and at the end of training. The two newest are kept, or `save_total_limit`. With
    >   `load_best_model_at_end`, it defaults to `eval_steps`.
    > - `ddp_find_unused_parameters`: Defaults to `False` instead of `None`: every trained weight of a causal model is
    >   used in every pass.
    > - `eval_on_start`: Defaults to `None` instead of `False`: `True` where `eval_questions` are evaluated while
    >   training, so that the expert is the first point of the curve.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(
        default=1e-4,
        metadata={"help": "The initial learning rate for AdamW."},
    )
    num_train_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Total number of training epochs. If neither it nor `max_steps` is set, training takes 125 "
            "updates, whatever the number of rows."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to use bf16 (mixed) precision instead of 32-bit. If not set, it is `True` on an "
            "accelerator that has it, unless `fp16` is set.",
            # So that a bare `--bf16` means True
            "nargs": "?",
            "const": True,
        },
    )
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps."
        },
    )
    save_steps: float = field(
        default=0,
        metadata={
            "help": "Save a checkpoint every X updates, or after this ratio of all updates if smaller than 1. If 0, "
            "one is saved when five minutes have passed since the last one, and at the end of training. The two "
            "newest are then kept, unless `save_total_limit` is set. With `load_best_model_at_end`, 0 stands for "
            "`eval_steps`."
        },
    )
    eval_on_start: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to evaluate before the first update as well. If not set, it is `True` if "
            "`eval_questions` are evaluated during training, which makes the expert the first point of the curve.",
            "nargs": "?",
            "const": True,
        },
    )

    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "When using distributed training, the value of the flag `find_unused_parameters` passed to "
            "`DistributedDataParallel`. Every trained weight of a causal model is used in every pass, and searching "
            "for unused ones does not work with reentrant activation checkpointing.",
            "nargs": "?",
            "const": True,
        },
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False

    # Parameters that control the data preprocessing
    max_length: int | None = 1024
    beta: float | None = None
    one_step_per_row: bool = False

    # Parameters that control the training
    sft_weight: float | None = None
    use_cuda_graphs: bool = True

    # Parameters that control the evaluation
    eval_max_new_tokens: int = 512

    def __post_init__(self):
        self._check_numbers()
        self._check_support()
        check_json_files(self, ("accelerator_config", "fsdp_config"))
        check_flags(self, ("one_step_per_row", "use_cuda_graphs", "trust_remote_code"))
        if self.output_dir == "":
            raise ValueError(f"`output_dir` must name a folder, got {self.output_dir!r}.")
        check_init_kwargs(self, ("model_init_kwargs",))
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0  # of which nothing is heard where the number of updates is given
            if self.max_steps < 0:  # type: ignore[has-type]  # of `TrainingArguments`
                self.max_steps = _DEFAULT_UPDATES
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        greater: Any = self.greater_is_better  # type: ignore[has-type]
        if greater is None and str(self.metric_for_best_model).endswith(_LESS_IS_BETTER):
            self.greater_is_better = False
        try:
            super().__post_init__()
        except TypeError as error:
            if not isinstance(self.accelerator_config, dict):
                raise
            raise ValueError(f"`accelerator_config` cannot be used: {error}.") from error
        if self.load_best_model_at_end and self.save_strategy == "steps" and self.save_steps == 0:
            self.save_steps = self.eval_steps  # the best one must not depend on the clock
        check_optimizer(self)
        # `checkpoint` takes any, and gives those that it does not know to the layer
        known = {*inspect.signature(checkpoint).parameters, "preserve_rng_state", "every_n_layers", "offload"}
        if unknown := sorted({*(self.activation_checkpointing_kwargs or {})} - known):
            raise ValueError(
                f"`activation_checkpointing_kwargs` does not support {unknown[0]!r}, only `use_reentrant`."
            )

    def _check_numbers(self) -> None:
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "eval_max_new_tokens")
        check_whole_numbers(self, counts, optional=("max_length",))
        names = ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps")
        check_finite(self, names, optional=("beta", "sft_weight", "neftune_noise_alpha"))
        epochs = self.num_train_epochs
        if epochs is not None and not (isinstance(epochs, int | float) and 0 < epochs < float("inf")):
            raise ValueError(f"`num_train_epochs` must be a finite number above 0, got {epochs!r}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not isinstance(value := getattr(self, name), int | float) or not 0 <= value < 1:
                raise ValueError(f"`{name}` must be a number in [0, 1), got {value!r}.")
        max_steps: Any = self.max_steps
        if not isinstance(max_steps, int) or max_steps < 1 and max_steps != -1:
            raise ValueError(f"`max_steps` must be a whole number, 1 or more, or -1, got {max_steps!r}.")
        for name, unset in (("logging", ()), ("save", (0,)), ("eval", (None,))):
            strategy, steps = getattr(self, f"{name}_strategy"), getattr(self, f"{name}_steps")
            if strategy != "steps" or steps in unset:
                continue
            if not (isinstance(steps, int | float) and 0 < steps < float("inf")):
                least = ", 0 or more" if 0 in unset else " above 0"
                raise ValueError(f"`{name}_steps` must be a finite number{least}, got {steps!r}.")

    def _check_support(self) -> None:
        """Refuse settings of `Trainer` that would be wrong here, and those that something is missing for."""
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` cannot be used with labels that are distributions. Remove it.")
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` cannot be used: when memory runs out, training would begin again with fewer "
                "rows per update, but with the weights that it has changed. Lower `per_device_train_batch_size` and "
                "raise `gradient_accumulation_steps` by the same factor for equal updates."
            )
        if self.deepspeed:
            if str(self.deepspeed).endswith(".json"):
                check_json_files(self, ("deepspeed",))
            if not is_deepspeed_available():
                raise ImportError("`deepspeed` needs DeepSpeed: `pip install deepspeed`.")

    def __getstate__(self) -> dict[str, Any]:
        # `Trainer` leaves its arguments beside the model, as training_args.bin, and uploads them with it
        kwargs: Any = self.model_init_kwargs  # a dict since `__post_init__`
        return {**self.__dict__, "hub_token": None, "model_init_kwargs": _without_token(kwargs)}

    def to_dict(self) -> dict[str, Any]:
        # What trackers are given
        settings = super().to_dict()
        return {**settings, "model_init_kwargs": _without_token(settings["model_init_kwargs"])}

    def __copy__(self) -> "LightReasonerConfig":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied


def check_optimizer(args: TrainingArguments) -> None:
    """
    Refuse `optim_args` and `lr_scheduler_kwargs` that the optimizer or the schedule does not accept.

    Raises:
        `ValueError`: Naming the setting.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_kwargs` cannot be {args.lr_scheduler_kwargs!r} with `lr_scheduler_type` "
            f"{args.lr_scheduler_type.value!r}: {str(error).rstrip('.')}."
        ) from error
    if not args.optim_args or args.optim_target_modules:  # which needs the model
        return

    from transformers import Trainer  # as long to import as the rest, and few settings need it

    def make(pairs: dict[str, str]) -> tuple[Any, dict[str, Any]]:
        changed = copy.copy(args)
        changed.optim_args = ",".join(f"{name}={value}" for name, value in pairs.items())
        return Trainer.get_optimizer_cls_and_kwargs(changed)

    def is_read(name: str) -> bool:
        others = {key: value for key, value in pairs.items() if key != name}
        try:
            return any(make(others) != make({**others, name: value}) for value in ("true", "nothing"))
        except (TypeError, ValueError, AttributeError):
            return True

    try:
        if any(pair.count("=") != 1 for pair in args.optim_args.split(",")):
            raise ValueError("it must be pairs, such as 'momentum=0.9'")
        pairs = dict(pair.split("=") for pair in args.optim_args.replace(" ", "").split(","))
        kind, kwargs = make(pairs)
        kind([torch.zeros(1, requires_grad=True)], **kwargs)
        if unread := [name for name in pairs if not is_read(name)]:
            raise ValueError(f"it does not know {unread[0]!r}")
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`optim_args` cannot be {args.optim_args!r} with `optim` {args.optim.value!r}: {str(error).rstrip('.')}."
        ) from error


def _without_token(kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    return kwargs and {name: value for name, value in kwargs.items() if name != "token"}
