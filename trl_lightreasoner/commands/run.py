"""`lightreasoner run`: train an adapter from a pair and a dataset, and judge whether to keep it, in one process."""

import gc

from ..pipeline.run_config import RunConfig
from .arguments import ArgumentParser
from .late_compiling import compiling_late
from .running_on import announce_stages


EXAMPLE = r"""example:
  lightreasoner run --expert Qwen/Qwen2.5-Math-1.5B --amateur Qwen/Qwen2.5-0.5B \
      --dataset_name openai/gsm8k --dataset_config main --output_dir run"""


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([RunConfig], prog=prog, description=__doc__, epilog=EXAMPLE)


def main(args: RunConfig) -> None:
    import datasets

    with compiling_late():
        from ..pipeline.run import run_pipeline

    gc.freeze()  # the libraries' objects stay, and each stage would look for garbage among them
    announce_stages(args)
    datasets.disable_progress_bars()  # those of files. The bars of the stages remain
    print(f"\n{run_pipeline(args).summary()}")
