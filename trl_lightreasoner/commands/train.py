"""`lightreasoner train`: a Dataset of kept steps to an adapter."""

import os
from dataclasses import dataclass, field
from pickle import UnpicklingError

from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint
from trl import ModelConfig, ScriptArguments, get_peft_config

from ..models.loading import load_adapter_config, load_config
from ..models.provenance import hub_id
from ..steps.dataset import count_steps
from ..steps.prompt_format import PromptFormat, format_of_prompts, format_of_steps
from ..steps.splits import load_split
from ..training.accuracy import as_questions
from ..training.adapters import as_target_modules
from ..training.lightreasoner_config import LightReasonerConfig
from ..training.lightreasoner_trainer import LightReasonerTrainer
from .arguments import ArgumentParser, quantization_of


# A fifth of the updates
_EVAL_STEPS = 0.2


@dataclass
class TrainArguments(ScriptArguments):
    """
    [`~trl.ScriptArguments`] with questions that are answered while training.

    Parameters:
        dataset_test_split (`str`, *optional*):
            Dataset split with kept steps that are held out, for `eval_loss`. If not set, it is `"test"` where
            `eval_strategy` is set and there are no `eval_questions`.
        eval_questions (`str`, *optional*):
            Questions that the model answers at every evaluation, for `eval_accuracy`: a file, a folder or a dataset on
            the Hub, of whose split `"train"` the columns `question` or `prompt`, and `answer`, are read. Text is put
            into the form of the prompts that the dataset was sampled with. If `eval_strategy` is not set, they are
            answered before training and at five places of it.
    """

    dataset_test_split: str | None = field(
        default=None,
        metadata={
            "help": "Dataset split with kept steps that are held out, for `eval_loss`. If not set, it is 'test' where "
            "`eval_strategy` is set and there are no `eval_questions`."
        },
    )
    eval_questions: str | None = field(
        default=None,
        metadata={
            "help": "Questions that the model answers at every evaluation, for `eval_accuracy`: a file, a folder or a "
            "dataset on the Hub, of whose split 'train' the columns `question` or `prompt`, and `answer`, are read. "
            "Text is put into the form of the prompts that the dataset was sampled with. If `eval_strategy` is not "
            "set, they are answered before training and at five places of it."
        },
    )


@dataclass
class LightReasonerModelConfig(ModelConfig):
    """
    [`~trl.ModelConfig`] with an adapter as the default: LoRA of rank 8 on all linear layers.

    Parameters:
        dtype (`str`, *optional*):
            Data type of the model's weights: `"auto"` (the checkpoint's own), `"bfloat16"`, `"float16"` or
            `"float32"`. If not set, it is the checkpoint's own, as when the expert was sampled, if an adapter is
            trained, and `"float32"` if all weights are.
        use_peft (`bool`, *optional*, defaults to `True`):
            Whether to train an adapter instead of all weights. A model that is an adapter already is trained further.
        lora_r (`int`, *optional*, defaults to `8`):
            LoRA R value.
        lora_alpha (`int`, *optional*, defaults to `16`):
            LoRA alpha.
        lora_target_modules (`list[str]`, *optional*, defaults to `["all-linear"]`):
            LoRA target modules.
    """

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of the model's weights: 'auto' (the checkpoint's own), 'bfloat16', 'float16' or "
            "'float32'. If not set, it is the checkpoint's own, as when the expert was sampled, if an adapter is "
            "trained, and 'float32' if all weights are.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(
        default=True,
        metadata={
            "help": "Whether to train an adapter instead of all weights. A model that is an adapter already is "
            "trained further."
        },
    )
    lora_r: int = field(
        default=8,
        metadata={"help": "LoRA R value."},
    )
    lora_alpha: int = field(
        default=16,
        metadata={"help": "LoRA alpha."},
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "LoRA target modules."},
    )

    def __post_init__(self):
        if self.lora_r < 1:
            raise ValueError(f"`lora_r` must be a whole number, 1 or more, got {self.lora_r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        super().__post_init__()
        if isinstance(self.lora_target_modules, str):  # what `ModelConfig` makes of one name
            self.lora_target_modules = as_target_modules([self.lora_target_modules])


def make_parser(prog: str | None = None) -> ArgumentParser:
    types = [TrainArguments, LightReasonerConfig, LightReasonerModelConfig]
    return ArgumentParser(types, prog=prog, description=__doc__)


def main(
    script_args: TrainArguments, training_args: LightReasonerConfig, model_args: LightReasonerModelConfig
) -> LightReasonerTrainer:
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is required: the expert that the dataset was sampled with.")
    if script_args.dataset_name is None:
        raise ValueError(
            "`--dataset_name` is required: a dataset on the Hub, or the folder of `lightreasoner sample`."
        )
    if script_args.dataset_streaming or script_args.ignore_bias_buffers:
        raise ValueError(
            "`--dataset_streaming` and `--ignore_bias_buffers` are of TRL's other trainers and do nothing here. Leave "
            "them out."
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        **({} if model_args.dtype is None else {"dtype": model_args.dtype}),
        **(training_args.model_init_kwargs or {}),  # type: ignore[dict-item]  # no text by now
    }
    checkpoint = find_checkpoint(training_args)
    hub_kwargs = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    load_config(model_args.model_name_or_path, **hub_kwargs)  # refuses what is no model
    is_adapter = load_adapter_config(model_args.model_name_or_path, **hub_kwargs) is not None
    train_dataset = load_split(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
    eval_questions = eval_dataset = None
    if script_args.eval_questions is not None:
        eval_questions = load_questions(script_args.eval_questions, train_dataset)
        if training_args.eval_strategy == "no":
            training_args.eval_strategy = IntervalStrategy.STEPS
            training_args.eval_steps = training_args.eval_steps or _EVAL_STEPS
    test_split = script_args.dataset_test_split or ("test" if eval_questions is None else None)
    if test_split is not None and training_args.eval_strategy != "no":
        eval_dataset = load_split(script_args.dataset_name, script_args.dataset_config, test_split)
    trainer = LightReasonerTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_of(model_args),
        peft_config=None if is_adapter else get_peft_config(model_args),
        eval_questions=eval_questions,
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except UnpicklingError as error:
        raise ValueError(
            f"The checkpoint {checkpoint!r} is damaged, or holds Python objects, which could run code when they are "
            "read. Resume from another one."
        ) from error
    if training_args.push_to_hub:  # which saves it first
        trainer.push_to_hub(dataset_name=hub_id(script_args.dataset_name))
        trainer.accelerator.print(f"The model is at {trainer.hub_model_id} on the Hub.")
    else:
        trainer.save_model(training_args.output_dir)
    threshold = f" of {trainer.beta} nats or more" if trainer.beta else ""
    num_steps = f"{count_steps(trainer.train_dataset):,} steps{threshold}"
    trainer.accelerator.print(f"It was trained on {num_steps}, for {trainer.state.global_step:,} updates.")
    trainer.save_state()  # with the log, which `lightreasoner report` draws
    trainer.accelerator.print(f"The model is in {training_args.output_dir}.")
    return trainer


def load_questions(name: str, steps: Dataset) -> Dataset:
    """
    Questions for a trainer, in the form of the prompts that its Dataset was sampled with.

    Args:
        name (`str`): File, folder or id on the Hub.
        steps ([`~datasets.Dataset`]): The Dataset. Where it does not say or show the form, text is taken as it is.
    """
    form = format_of_steps(steps)
    if form is None and "prompt" in steps.column_names and len(steps) > 0:
        form = format_of_prompts(steps)
    form = form or PromptFormat("raw", "{question}")
    try:
        return as_questions(load_split(name, None, "train"), form.make_prompt)
    except ValueError as error:
        raise ValueError(f"`--eval_questions {name}` cannot be used: {error}") from error


def find_checkpoint(args: LightReasonerConfig) -> str | None:
    """The folder to resume from, if `args` ask for one: "true" stands for the last checkpoint in `output_dir`."""
    folder = args.resume_from_checkpoint
    if folder is None or str(folder).lower() == "false":
        return None
    if str(folder).lower() == "true":
        last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
        if last is None:
            raise ValueError(
                f"There is no checkpoint in {args.output_dir!r} to resume from. Leave `resume_from_checkpoint` out to "
                "begin anew."
            )
        folder = last
    if not os.path.isfile(os.path.join(folder, "trainer_state.json")):
        raise ValueError(
            f"{folder!r} is no checkpoint: it has no trainer_state.json. Name a folder such as "
            f"{os.path.join(args.output_dir, 'checkpoint-500')!r}."
        )
    return folder
