"""`lightreasoner sample`: turn prompts into a Dataset of kept steps."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config_help import help_from_docstring
from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
from .arguments import ArgumentParser
from .next_command import next_command
from .pair_arguments import PairArguments, announce_pair, load_prompts, make_sampler


EXAMPLE = r"""example:
  lightreasoner sample --expert Qwen/Qwen2.5-Math-1.5B --amateur Qwen/Qwen2.5-0.5B \
      --dataset_name openai/gsm8k --dataset_config main --dataset_split 'train[:1000]' \
      --prompt_column question --conversational --output_dir steps"""


@dataclass
@help_from_docstring
class SampleArguments(PairArguments):
    """
    [`PairArguments`], and the upload of the Dataset of `lightreasoner sample`.

    Parameters:
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to upload the Dataset to the Hub, with a card, when it is complete.
        hub_dataset_id (`str`, *optional*):
            Repository of the Dataset, as owner/name. If not set, it is the name of `output_dir`.
        hub_private_repo (`bool`, *optional*):
            Whether to make the repository private. If not set, it is public unless the organization's default is
            private. It has no effect on an existing repository.
        hub_token (`str`, *optional*):
            Token for the upload. If not set, it is the one from `hf auth login`.
    """

    push_to_hub: bool = False
    hub_dataset_id: str | None = None
    # So that a bare `--hub_private_repo` means True
    hub_private_repo: bool | None = field(default=None, metadata={"nargs": "?", "const": True})
    hub_token: str | None = None


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([SampleArguments, ContrastiveSamplingConfig], prog=prog, description=__doc__, epilog=EXAMPLE)


def main(script_args: SampleArguments, sampling_args: ContrastiveSamplingConfig) -> None:
    from ..processes import Processes
    from ..sampling.pair_check import check_steps
    from ..steps.dataset import count_steps

    prompts, prompt_format = load_prompts(script_args)
    hub: dict[str, Any] = {"private": script_args.hub_private_repo, "token": script_args.hub_token}
    if script_args.push_to_hub and Processes().is_main:  # fail now if the user may not write
        from ..hub.sharing import open_repo

        name = script_args.hub_dataset_id or Path(sampling_args.output_dir).absolute().name
        repo_id = open_repo(name, "dataset", **hub)
    sampler = make_sampler(script_args, sampling_args)
    announce_pair(script_args, sampler, prompts)
    dataset = sampler.sample(prompts, prompt_format)
    if not sampler.processes.is_main:
        return
    if script_args.push_to_hub:
        from ..hub.sharing import push_dataset_to_hub

        push_dataset_to_hub(dataset, repo_id, **hub)
        print(f"The Dataset is at {repo_id} on the Hub.")
    num_steps, num_kept = sum(map(len, dataset["completion_ids"])), count_steps(dataset)
    check = check_steps(dataset, sampler.processing_class)
    advice = "There is nothing to train on. Choose a weaker amateur or a lower `--beta`."
    if num_kept:
        flags = ["--expert", script_args.expert, "--dataset_name", sampling_args.output_dir]
        flags += [*_quantization_flags(script_args), "--output_dir", "ADAPTER"]
        advice = next_command("train", *flags, label="Next" if check.promising else "To train anyway")
    print(
        f"{len(dataset):,} trajectories with {num_kept:,} of {num_steps:,} steps kept ({num_kept / num_steps:.1%}) "
        f"are in {sampling_args.output_dir}."
    )
    print(check.summary())
    print(advice)


def _quantization_flags(args: SampleArguments) -> list[str]:
    """The flags of `lightreasoner train` that load the expert as it was loaded for sampling."""
    if args.load_in_8bit:
        return ["--load_in_8bit"]
    if not args.load_in_4bit:
        return []
    quant_type = [] if args.bnb_4bit_quant_type == "nf4" else ["--bnb_4bit_quant_type", args.bnb_4bit_quant_type]
    return ["--load_in_4bit", *quant_type, *(["--use_bnb_nested_quant"] if args.use_bnb_nested_quant else [])]
