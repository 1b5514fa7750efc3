"""`lightreasoner train`: train an adapter on a Dataset of kept steps."""

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl import ModelConfig, ScriptArguments

from ..config_checks import check_whole_numbers
from ..config_help import help_from_docstring
from .arguments import ArgumentParser, quantization_of
from .late_compiling import compiling_late
from .next_command import next_command
from .running_on import announce, in_bits
from .terminal import hide_file_bars


if TYPE_CHECKING:  # slow to import, and `--help` needs neither
    from datasets import Dataset

    from ..training.lightreasoner_config import LightReasonerConfig
    from ..training.lightreasoner_trainer import LightReasonerTrainer


# A fifth of the updates
_EVAL_STEPS = 0.2
# What `--help` shows besides the sections LoRA, quantization and Hub
_COMMON = (
    *("model_name_or_path", "dataset_name", "output_dir", "dataset_config", "dataset_train_split"),
    *("dataset_test_split", "beta", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_length", "one_step_per_row", "dtype", "use_cpu", "seed"),
    *("eval_strategy", "eval_steps", "eval_questions", "sft_dataset_name", "sft_weight"),
    *("logging_steps", "report_to", "save_steps", "resume_from_checkpoint"),
)
# Files of the weights that a training saves
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


EXAMPLE = r"""example:
  lightreasoner train --expert Qwen/Qwen2.5-Math-1.5B --dataset_name steps --output_dir adapter"""
_RESUMING = "To resume an interrupted training, run the same command with `--resume_from_checkpoint true`."


@dataclass
@help_from_docstring
class TrainArguments(ScriptArguments):
    """
    [`~trl.ScriptArguments`] with questions to answer during training, and an SFT dataset.

    Parameters:
        dataset_name (`str`):
            Dataset of kept steps: on the Hub, a folder, or a file (JSON lines, Parquet).
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to use, such as `"train[:1000]"`.
        dataset_test_split (`str`, *optional*):
            Split with held-out kept steps, for `eval_loss`. If not set, it is `"test"` if `eval_strategy` is set and
            there are no `eval_questions`.
        eval_questions (`str`, *optional*):
            Questions that the model answers at every evaluation, for `eval_accuracy`: a file, a folder or a dataset on
            the Hub. The columns `question` or `prompt`, and `answer`, of its split `"train"` are read. Text is put
            into the prompt format that the dataset was sampled with. If `eval_strategy` is not set, they are answered
            before training and five times during it.
        sft_dataset_name (`str`, *optional*):
            Demonstrations whose cross-entropy is added to the loss, with the weight `sft_weight`: a file, a folder or
            a dataset on the Hub. The columns `prompt` and `completion`, or `messages`, of its split `"train"` are
            read. They are used as they are.
    """

    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    eval_questions: str | None = None
    sft_dataset_name: str | None = None


@dataclass
@help_from_docstring
class LightReasonerModelConfig(ModelConfig):
    """
    [`~trl.ModelConfig`] that trains an adapter by default: LoRA of rank 8.

    Parameters:
        model_name_or_path (`str`):
            Hub id or path of the expert that the dataset was sampled with, or of its adapter, which is trained
            further.
        dtype (`str`, *optional*):
            Data type of the model's weights: `"auto"` (the checkpoint's own), `"bfloat16"`, `"float16"` or
            `"float32"`. If not set, it is the checkpoint's own for an adapter, as in sampling, and `"float32"` for
            training all weights. The checkpoint's own is float32 if it is float16 and the device is a CPU.
        use_peft (`bool`, *optional*, defaults to `True`):
            Whether to train an adapter instead of all weights. An adapter given as the model is trained further.
        lora_r (`int`, *optional*, defaults to `8`):
            LoRA R value.
        lora_alpha (`int`, *optional*, defaults to `16`):
            LoRA alpha.
        lora_target_modules (`list[str]`, *optional*):
            LoRA target modules. If not set, they depend on the steps of 1.6 nats or more. If v_C prefers a token other
            than the expert's at a tenth or more of them, PEFT's defaults for the architecture are used, such as q_proj
            and v_proj. Otherwise all linear layers are used.
    """

    model_name_or_path: str | None = None
    dtype: str | None = field(default=None, metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    use_peft: bool = True
    lora_r: int = 8
    lora_alpha: int = 16
    lora_target_modules: list[str] | None = None

    def __post_init__(self):
        check_whole_numbers(self, ("lora_r",))
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        from ..training.adapters import target_modules

        targets = self.lora_target_modules
        super().__post_init__()
        self.lora_target_modules = target_modules(targets)  # type: ignore[assignment]  # as TRL leaves it

    def changed_settings(self) -> list[str]:
        """Names of the settings for a new adapter that differ from the defaults."""
        names = [name for name in self.__dataclass_fields__ if name.startswith("lora_")]
        unset = type(self)()
        return [name for name in (*names, "use_rslora", "use_dora") if getattr(self, name) != getattr(unset, name)]


def make_parser(prog: str | None = None) -> ArgumentParser:
    with compiling_late():
        from ..training.lightreasoner_config import LightReasonerConfig

    types: list[type] = [TrainArguments, LightReasonerConfig, LightReasonerModelConfig]
    refused = ("auto_find_batch_size", "dataset_streaming", "ignore_bias_buffers", "label_smoothing_factor")
    epilog = f"{EXAMPLE}\n\n{_RESUMING}"
    return ArgumentParser(types, common=_COMMON, refused=refused, prog=prog, description=__doc__, epilog=epilog)


def main(
    script_args: TrainArguments, training_args: "LightReasonerConfig", model_args: LightReasonerModelConfig
) -> "LightReasonerTrainer":
    from transformers.trainer_utils import IntervalStrategy
    from trl import get_peft_config

    from ..models.adapter_loading import load_adapter_config
    from ..models.loading import load_config
    from ..models.provenance import hub_id
    from ..steps.dataset import count_steps
    from ..steps.splits import load_split
    from ..training.adapters import choose_target_modules, target_modules
    from ..training.checkpoints import find_checkpoint
    from ..training.lightreasoner_trainer import LightReasonerTrainer
    from ..training.log_lines import log_in_lines

    gc.freeze()  # the libraries' objects stay, and training would begin with looking for garbage among them
    hide_file_bars()
    if model_args.model_name_or_path is None:
        raise ValueError("`--expert` is required: the expert that the dataset was sampled with.")
    if script_args.dataset_name is None:
        raise ValueError(
            "`--dataset_name` is required: a dataset on the Hub, or the folder of `lightreasoner sample`."
        )
    if script_args.dataset_streaming or script_args.ignore_bias_buffers:
        raise ValueError(
            "`--dataset_streaming` and `--ignore_bias_buffers` belong to TRL's other trainers and have no effect "
            "here. Leave them out."
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        **({} if model_args.dtype is None else {"dtype": model_args.dtype}),
        **(training_args.model_init_kwargs or {}),  # type: ignore[dict-item]  # already parsed
    }
    if find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir) is None:
        check_is_new(training_args.output_dir)
    hub_kwargs = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    model_config = load_config(model_args.model_name_or_path, **hub_kwargs)  # refuses unusable models
    is_adapter = load_adapter_config(model_args.model_name_or_path, **hub_kwargs) is not None
    if (is_adapter or not model_args.use_peft) and (changed := model_args.changed_settings()):
        reason = f"{model_args.model_name_or_path!r} is an existing adapter, which is trained further"
        remedy = "or first merge the adapter into a plain model with `lightreasoner merge`"
        if not model_args.use_peft:
            reason, remedy = "`--use_peft false` trains all weights", "or remove `--use_peft false`"
        raise ValueError(f"`--{changed[0]}` applies only to a new adapter, but {reason}. Leave it out, {remedy}.")
    train_dataset = load_split(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
    if model_args.lora_target_modules is None:
        chosen = choose_target_modules(train_dataset, model_config.model_type)
        model_args.lora_target_modules = target_modules(chosen)  # type: ignore[assignment]  # as TRL leaves it
    eval_questions = eval_dataset = None
    if script_args.eval_questions is not None:
        eval_questions = load_questions(script_args.eval_questions, train_dataset)
        if training_args.eval_strategy == "no":
            training_args.eval_strategy = IntervalStrategy.STEPS
            training_args.eval_steps = training_args.eval_steps or _EVAL_STEPS
    test_split = script_args.dataset_test_split or ("test" if eval_questions is None else None)
    if test_split is not None and training_args.eval_strategy != "no":
        eval_dataset = load_split(script_args.dataset_name, script_args.dataset_config, test_split)
    sft_dataset = None
    if script_args.sft_dataset_name is not None:
        sft_dataset = load_split(script_args.sft_dataset_name, None, "train")
    trainer = LightReasonerTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_of(model_args, model_args.dtype),
        peft_config=None if is_adapter else get_peft_config(model_args),
        eval_questions=eval_questions,
        sft_dataset=sft_dataset,
    )
    rows = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    announce(
        f"expert in {str(trainer.model.dtype).removeprefix('torch.')}{in_bits(model_args)}",
        f"updates of {rows * training_args.world_size} rows",
        cpu=trainer.args.device.type == "cpu",
    )
    log_in_lines(trainer)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if training_args.push_to_hub:  # which saves it first
        trainer.push_to_hub(dataset_name=hub_id(script_args.dataset_name))
        trainer.accelerator.print(f"The model is at {trainer.hub_model_id} on the Hub.")
    else:
        trainer.save_model(training_args.output_dir)
    threshold = f" of {trainer.beta} nats or more" if trainer.beta else ""
    num_steps = f"{count_steps(trainer.train_dataset):,} steps{threshold}"
    updates = f"{trainer.state.global_step:,} updates ({trainer.state.epoch:.3g} epochs)"
    trainer.accelerator.print(f"Trained on {num_steps} for {updates}.")
    trainer.save_state()  # includes the log that `lightreasoner report` plots
    trainer.accelerator.print(f"The model is in {training_args.output_dir}.")
    flags = ["--model", training_args.output_dir, "--baseline", model_args.model_name_or_path]
    trainer.accelerator.print(next_command("eval", *flags, "--output_dir", "EVALUATION"))
    return trainer


def load_questions(name: str, steps: "Dataset") -> "Dataset":
    """
    Load questions for a trainer, in the prompt format that its Dataset was sampled with.

    Args:
        name (`str`): File, folder or id on the Hub.
        steps ([`~datasets.Dataset`]): The Dataset. If its format is not known, text is used as it is.
    """
    from ..steps.prompt_format import PromptFormat, format_of_prompts, format_of_steps
    from ..steps.splits import load_split
    from ..training.accuracy import as_questions

    form = format_of_steps(steps)
    if form is None and "prompt" in steps.column_names and len(steps) > 0:
        form = format_of_prompts(steps)
    form = form or PromptFormat("raw", "{question}")
    try:
        return as_questions(load_split(name, None, "train"), form.make_prompt)
    except ValueError as error:
        raise ValueError(f"`--eval_questions {name}` cannot be used: {error}") from error


def check_is_new(output_dir: str) -> None:
    """Refuse a folder in which a finished or resumable training would be overwritten."""
    from ..training.checkpoints import last_checkpoint

    folder = Path(output_dir)
    if (folder / "trainer_state.json").is_file() and any((folder / name).is_file() for name in _WEIGHTS):
        raise ValueError(f"{output_dir!r} holds a trained model. Choose another `output_dir`.")
    if last_checkpoint(output_dir) is not None:
        raise ValueError(
            f"{output_dir!r} holds checkpoints of a training. Set `resume_from_checkpoint=True` to resume it, or "
            "choose another `output_dir`."
        )
