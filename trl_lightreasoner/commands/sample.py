"""`lightreasoner sample`: prompts to a Dataset of kept steps."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Value

from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
from ..steps.prompt_format import PromptFormat, read_template
from ..steps.splits import load_split
from .arguments import ArgumentParser, quantization_of


@dataclass
class SampleArguments:
    """
    Models and prompts of `lightreasoner sample`.

    Parameters:
        expert (`str`):
            Id or path of the stronger model, which is to be fine-tuned afterwards.
        amateur (`str`):
            Id or path of the weaker model of the same vocabulary.
        dataset_name (`str`):
            Prompts: a dataset on the Hub, a folder, or a file (JSON lines, Parquet, CSV).
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to use, such as `"train[:1000]"`.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompts, as text or as lists of messages.
        prompt_style (`str`, *optional*):
            What is made of text in `prompt_column`: `"chat"`: a user's message, so that the expert's chat template is
            applied. `"raw"`: plain text, in `prompt_template`. If `None`, text is taken as it is.
        conversational (`bool`, *optional*, defaults to `False`):
            The same as `prompt_style="chat"`.
        system_prompt (`str`, *optional*):
            System message before each prompt. Implies `conversational`.
        prompt_template (`str`, *optional*):
            Text with {question} in it, or a file with such text, in which each text prompt is put. If `None`, the
            prompt alone for `"chat"`, and for `"raw"` `"Question: {question}"` with a line `"Answer:"` below.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to load the expert in 4 bits.
        load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether to load the expert in 8 bits.
        amateur_load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to load the amateur in 4 bits.
        amateur_load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether to load the amateur in 8 bits.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`):
            Quantization type of models in 4 bits: `"nf4"` or `"fp4"`.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`):
            Whether to use nested quantization for models in 4 bits.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to upload the Dataset to the Hub, with a card, when it is complete.
        hub_dataset_id (`str`, *optional*):
            The repository of the Dataset, as owner/name. If not set, the name of `output_dir`.
        hub_private_repo (`bool`, *optional*):
            Whether to make the repository private. If not set, it is public unless the organization's default is
            private. Has no effect if it exists.
        hub_token (`str`, *optional*):
            Token for the upload. If not set, the one of `hf auth login`.
    """

    expert: str = field(
        metadata={"help": "Id or path of the stronger model, which is to be fine-tuned afterwards."},
    )
    amateur: str = field(
        metadata={"help": "Id or path of the weaker model of the same vocabulary."},
    )
    dataset_name: str = field(
        metadata={"help": "Prompts: a dataset on the Hub, a folder, or a file (JSON lines, Parquet, CSV)."},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of the dataset."},
    )
    dataset_split: str = field(
        default="train",
        metadata={"help": "Split to use, such as 'train[:1000]'."},
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column that holds the prompts, as text or as lists of messages."},
    )
    prompt_style: str | None = field(
        default=None,
        metadata={
            "help": "What is made of text in `prompt_column`: 'chat': a user's message, so that the expert's chat "
            "template is applied. 'raw': plain text, in `prompt_template`. If `None`, text is taken as it is.",
            "choices": ["chat", "raw"],
        },
    )
    conversational: bool = field(
        default=False,
        metadata={"help": "The same as `prompt_style='chat'`."},
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message before each prompt. Implies `conversational`."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text with {question} in it, or a file with such text, in which each text prompt is put. If "
            "`None`, the prompt alone for 'chat', and for 'raw' 'Question: {question}' with a line 'Answer:' below."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Whether to load the expert in 4 bits."},
    )
    load_in_8bit: bool = field(
        default=False,
        metadata={"help": "Whether to load the expert in 8 bits."},
    )
    amateur_load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Whether to load the amateur in 4 bits."},
    )
    amateur_load_in_8bit: bool = field(
        default=False,
        metadata={"help": "Whether to load the amateur in 8 bits."},
    )
    bnb_4bit_quant_type: str = field(
        default="nf4",
        metadata={"help": "Quantization type of models in 4 bits: 'nf4' or 'fp4'.", "choices": ["nf4", "fp4"]},
    )
    use_bnb_nested_quant: bool = field(
        default=False,
        metadata={"help": "Whether to use nested quantization for models in 4 bits."},
    )
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Whether to upload the Dataset to the Hub, with a card, when it is complete."},
    )
    hub_dataset_id: str | None = field(
        default=None,
        metadata={"help": "The repository of the Dataset, as owner/name. If not set, the name of `output_dir`."},
    )
    hub_private_repo: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to make the repository private. If not set, it is public unless the organization's "
            "default is private. Has no effect if it exists.",
            # So that a bare `--hub_private_repo` means True
            "nargs": "?",
            "const": True,
        },
    )
    hub_token: str | None = field(
        default=None,
        metadata={"help": "Token for the upload. If not set, the one of `hf auth login`."},
    )

    def __post_init__(self):
        for prefix in ("", "amateur_"):
            if getattr(self, f"{prefix}load_in_4bit") and getattr(self, f"{prefix}load_in_8bit"):
                raise ValueError(f"`{prefix}load_in_4bit` and `{prefix}load_in_8bit` exclude each other.")
        if self.prompt_style == "raw" and (self.conversational or self.system_prompt):
            raise ValueError("`prompt_style='raw'` goes with neither `conversational` nor `system_prompt`.")
        if self.conversational or self.system_prompt is not None:
            self.prompt_style = "chat"
        if self.prompt_template is not None:
            self.prompt_template = read_template(self.prompt_template)


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([SampleArguments, ContrastiveSamplingConfig], prog=prog, description=__doc__)


def main(script_args: SampleArguments, sampling_args: ContrastiveSamplingConfig) -> None:
    from trl import ModelConfig

    from ..hub.sharing import open_repo, push_dataset_to_hub
    from ..processes import Processes
    from ..sampling.contrastive_step_sampler import ContrastiveStepSampler
    from ..steps.dataset import count_steps

    def quantization(prefix: str):
        bits = {name: getattr(script_args, prefix + name) for name in ("load_in_4bit", "load_in_8bit")}
        bnb = {name: getattr(script_args, name) for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant")}
        return quantization_of(ModelConfig(dtype=sampling_args.dtype, **bits, **bnb))

    prompts = load_split(script_args.dataset_name, script_args.dataset_config, script_args.dataset_split)
    prompts, prompt_format = as_prompts(prompts, script_args)
    hub: dict[str, Any] = {"private": script_args.hub_private_repo, "token": script_args.hub_token}
    if script_args.push_to_hub and Processes().is_main:  # who may not write shall know it now
        name = script_args.hub_dataset_id or Path(sampling_args.output_dir).absolute().name
        repo_id = open_repo(name, "dataset", **hub)
    sampler = ContrastiveStepSampler(
        script_args.expert,
        script_args.amateur,
        sampling_args,
        quantization_config=quantization(""),
        amateur_quantization_config=quantization("amateur_"),
    )
    dataset = sampler.sample(prompts, prompt_format)
    if not sampler.processes.is_main:
        return
    if script_args.push_to_hub:
        push_dataset_to_hub(dataset, repo_id, **hub)
        print(f"The Dataset is at {repo_id} on the Hub.")
    num_steps, num_kept = sum(map(len, dataset["completion_ids"])), count_steps(dataset)
    advice = "There is nothing to train on: choose a weaker amateur, or a lower `beta`."
    if num_kept:
        command = ["lightreasoner", "train", "--model_name_or_path", script_args.expert]
        command += ["--dataset_name", sampling_args.output_dir, *_quantization_flags(script_args)]
        advice = f"Next: {shlex.join([*command, '--output_dir', 'ADAPTER'])}"
    print(
        f"{len(dataset):,} trajectories with {num_kept:,} of {num_steps:,} steps kept ({num_kept / num_steps:.1%}) "
        f"are in {sampling_args.output_dir}. {advice}"
    )


def _quantization_flags(args: SampleArguments) -> list[str]:
    """The flags of `lightreasoner train` that load the expert as it was sampled."""
    if args.load_in_8bit:
        return ["--load_in_8bit"]
    if not args.load_in_4bit:
        return []
    quant_type = [] if args.bnb_4bit_quant_type == "nf4" else ["--bnb_4bit_quant_type", args.bnb_4bit_quant_type]
    return ["--load_in_4bit", *quant_type, *(["--use_bnb_nested_quant"] if args.use_bnb_nested_quant else [])]


def as_prompts(dataset: Dataset, args: SampleArguments) -> tuple[Dataset, PromptFormat | None]:
    """The dataset with a `prompt` column, as `args` asks for it, and the form of its prompts, if they were text."""
    if args.prompt_column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {args.prompt_column!r}; it has {dataset.column_names}. Name the one that "
            "holds the prompts with `--prompt_column`."
        )
    if args.prompt_column != "prompt":
        if "prompt" in dataset.column_names:
            raise ValueError(
                f"The dataset has a column 'prompt' beside {args.prompt_column!r}. Rename or remove one of them."
            )
        dataset = dataset.rename_column(args.prompt_column, "prompt")
    style, template = args.prompt_style, args.prompt_template
    if not isinstance(dataset.features["prompt"], Value):
        if style is None and template is None:
            return dataset, None
        raise ValueError("The prompts are messages already: put the system prompt into them, or give them as text.")
    if style is None:
        prompt_format = PromptFormat("raw", template or "{question}")
    else:
        prompt_format = PromptFormat(style, template, args.system_prompt or "")
    if prompt_format == PromptFormat("raw", "{question}"):
        return dataset, prompt_format

    def put(row: dict) -> dict:
        empty = [] if style == "chat" else ""
        return {"prompt": prompt_format.make_prompt(row["prompt"]) if row["prompt"] else empty}

    return dataset.map(put, desc="Making prompts"), prompt_format
