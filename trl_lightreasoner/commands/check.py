"""`lightreasoner check`: judge a pair of models on fifty prompts: one verdict with its reasons. Nothing is saved."""

import json
from dataclasses import dataclass

from ..config_help import help_from_docstring
from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
from .arguments import ArgumentParser
from .next_command import flags_of, next_command
from .pair_arguments import PairArguments, announce_pair, load_prompts, make_sampler


EXAMPLE = r"""example:
  lightreasoner check --expert Qwen/Qwen2.5-Math-1.5B --amateur Qwen/Qwen2.5-0.5B \
      --dataset_name openai/gsm8k --dataset_config main --prompt_column question --conversational"""


@dataclass
@help_from_docstring
class CheckArguments(PairArguments):
    """
    [`PairArguments`], and the settings of `lightreasoner check`.

    Parameters:
        json (`bool`, *optional*, defaults to `False`):
            Whether to print one JSON object instead of text.
    """

    json: bool = False


@dataclass
@help_from_docstring
class CheckSamplingConfig(ContrastiveSamplingConfig):
    """
    [`ContrastiveSamplingConfig`] for a few prompts, which needs no folder.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"steps"`):
            Not used, since nothing is saved. Allowed so that `lightreasoner sample` can share the config file.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Not used, like `output_dir`.
        num_prompts (`int`, *optional*, defaults to `50`):
            Number of prompts to check, from the start of the dataset.
    """

    output_dir: str = "steps"
    overwrite_output_dir: bool = False
    num_prompts: int = 50


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([CheckArguments, CheckSamplingConfig], prog=prog, description=__doc__, epilog=EXAMPLE)


def main(args: CheckArguments, sampling_args: CheckSamplingConfig) -> int:
    """Print the check, and return the exit status: 0 if the pair is promising, 1 if not."""
    sampler = make_sampler(args, sampling_args)
    prompts, prompt_format = load_prompts(args)
    announce_pair(args, sampler, prompts)
    check = sampler.check(prompts, sampling_args.num_prompts, prompt_format)
    if not sampler.processes.is_main:
        pass
    elif args.json:
        print(json.dumps(check.to_dict(), indent=2))
    else:
        print(check.report())
        if check.promising:
            flags = flags_of(args, ("json",)) + flags_of(sampler.args, ("output_dir", "num_prompts"))
            print(next_command("sample", *flags, "--output_dir", "STEPS"))
    return 0 if check.promising else 1
