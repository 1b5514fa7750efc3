"""One line that says what a command runs on: device, data type, batch size and prompt format."""

import json
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


def dtype_of(model: str, dtype: str | None, name: str = "model", is_quantized: bool = False, **kwargs: Any) -> str:
    """The data type in which a model's weights are loaded, and why if it is not the checkpoint's own."""
    import torch

    from ..models.loading import load_config, resolve_dtype

    if dtype in (None, "auto"):
        config = load_config(model, name, **kwargs)
        device = "cuda" if torch.accelerator.is_available() else "cpu"
        is_resolved = "device_map" not in kwargs and not is_quantized  # as in `load_model`
        if is_resolved and resolve_dtype("auto", config, device) == "float32":
            return "float32 (float16 is slow on a CPU)"
        dtype = config.dtype or "float32"
    return str(dtype).removeprefix("torch.")


def in_bits(args: Any) -> str:
    """The quantization set by TRL's flags, as words to put behind a data type, or nothing."""
    return next((f" in {bits} bits" for bits in (4, 8) if getattr(args, f"load_in_{bits}bit")), "")


def prompts_at_a_time(batch_size: int | None) -> str:
    import torch

    from ..generation.batches import CPU_ROWS

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
    from ..steps.prompt_format import SYSTEM_PROMPT

    system_prompt = SYSTEM_PROMPT if args.system_prompt is None else args.system_prompt
    chat = "questions in the expert's chat template"
    chat += f" with {json.dumps(args.chat_template_kwargs)}" if args.chat_template_kwargs else ""
    chat += (
        f" (those that are text after the system prompt '{' '.join(system_prompt.split())}')" if system_prompt else ""
    )
    styles = {"chat": chat, "raw": "questions as plain text"}
    either = f"{chat}, or as plain text if it has none"
    dtype = dtype_of(args.expert, choose_dtype(args), "expert")
    announce(f"models in {dtype}", prompts_at_a_time(None), styles.get(args.prompt_style or "", either))


def tell(what: str) -> None:
    """Print progress to stderr."""
    print(what, file=sys.stderr, flush=True)
