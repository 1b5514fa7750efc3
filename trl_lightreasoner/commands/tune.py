"""`lightreasoner tune`: try twenty settings on one sampling, and confirm the best one, in one process."""

import gc

from ..pipeline.tune_config import TuneConfig
from .arguments import ArgumentParser
from .late_compiling import compiling_late
from .running_on import announce_stages


EXAMPLE = r"""example:
  lightreasoner tune --expert Qwen/Qwen2.5-Math-1.5B --amateur Qwen/Qwen2.5-0.5B \
      --dataset_name openai/gsm8k --dataset_config main --output_dir tuned"""


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([TuneConfig], prog=prog, description=__doc__, epilog=EXAMPLE)


def main(args: TuneConfig) -> None:
    import datasets

    with compiling_late():
        from ..pipeline.tune import tune

    gc.freeze()  # the libraries' objects stay, and each training would look for garbage among them
    announce_stages(args)
    datasets.disable_progress_bars()  # those of files. The bars of the stages remain
    print(f"\n{tune(args).summary()}")
