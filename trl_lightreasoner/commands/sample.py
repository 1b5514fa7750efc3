"""`lightreasoner sample`: prompts to a Dataset of kept steps."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Value

from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
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
        conversational (`bool`, *optional*, defaults to `False`):
            Whether to make each text prompt a user's message, so that the expert's chat template is applied.
        system_prompt (`str`, *optional*):
            System message before each prompt. Implies `conversational`.
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
    conversational: bool = field(
        default=False,
        metadata={
            "help": "Whether to make each text prompt a user's message, so that the expert's chat template is applied."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message before each prompt. Implies `conversational`."},
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
    prompts = as_prompts(prompts, script_args)
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
    dataset = sampler.sample(prompts)
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


def as_prompts(dataset: Dataset, args: SampleArguments) -> Dataset:
    """The dataset with a `prompt` column, as `args` asks for it."""
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
    if not (args.conversational or args.system_prompt is not None):
        return dataset
    if not isinstance(dataset.features["prompt"], Value):
        raise ValueError("The prompts are messages already: put the system prompt into them, or give them as text.")
    system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]

    def converse(row: dict) -> dict:
        return {"prompt": [*system, {"role": "user", "content": row["prompt"]}] if row["prompt"] else []}

    return dataset.map(converse, desc="Making conversations")
