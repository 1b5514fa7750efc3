"""One line that says what a command runs on: device, data type, batch size and prompt format."""

import os
import sys
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..pipeline.run_config import RunConfig


_LAUNCHED = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}


def device_names(cpu: bool = False) -> list[str]:
    """Names of the accelerators of this machine, or its CPU."""
    import torch

    if cpu or not torch.accelerator.is_available():
        return [f"CPU (threads: {torch.get_num_threads()})"]
    kind = torch.accelerator.current_accelerator().type
    indices = range(torch.accelerator.device_count())
    return [torch.cuda.get_device_name(i) if kind == "cuda" else f"{kind}:{i}" for i in indices]


def dtype_of(model: str, dtype: str | None, name: str = "model", **kwargs: Any) -> str:
    """The data type in which a model's weights are loaded: the requested one, or the checkpoint's own."""
    from ..models.loading import load_config

    if dtype in (None, "auto"):
        dtype = getattr(load_config(model, name, **kwargs), "dtype", None) or "float32"
    return str(dtype).removeprefix("torch.")


def prompts_at_a_time(batch_size: int | None) -> str:
    import torch

    from ..generation.completions import CPU_ROWS

    if batch_size is None and torch.cuda.is_available():
        return "as many prompts at a time as fit in memory"
    return f"{batch_size or ' to '.join(map(str, CPU_ROWS))} prompts at a time"


def announce(*parts: str, cpu: bool = False) -> None:
    """
    Print what a command runs on, to stderr, which holds no results.

    Args:
        parts (`str`): What to print besides the device.
        cpu (`bool`, *optional*, defaults to `False`): Whether the command runs on the CPU even if there is an
            accelerator.
    """
    # From the launchers' variables: asking accelerate would form the process group already now
    rank, local_rank, count = (int(os.environ.get(name, least)) for name, least in _LAUNCHED.items())
    if rank != 0:
        return
    names = device_names(cpu)
    processes = [] if count == 1 else [f"{count} processes"]
    tell(f"Running on: {', '.join([names[local_rank % len(names)], *processes, *parts])}.")


def announce_stages(args: "RunConfig") -> None:
    """Print what the stages of `run` and `tune` run on."""
    from ..pipeline.stages import choose_dtype

    styles = {"chat": "questions in the chat template", "raw": "questions as plain text"}
    either = "questions in the expert's chat template, or as plain text if it has none"
    dtype = dtype_of(args.expert, choose_dtype(args), "expert")
    announce(f"models in {dtype}", prompts_at_a_time(None), styles.get(args.prompt_style or "", either))


def tell(what: str) -> None:
    """Print progress to stderr."""
    print(what, file=sys.stderr, flush=True)
