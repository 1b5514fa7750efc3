"""Start the GPU while a command still imports libraries and loads tokenizers."""

import contextlib
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path


_COMMANDS = ("check", "eval", "run", "sample", "train", "tune")
# vLLM starts processes of its own, best before this one has used the GPU
_NOT_WITH = ("-h", "--help", "--help-all", "--use_cpu", "--use-cpu", "--use_vllm", "--use-vllm")
# The same in the file of `--config`, and its `env`, which may choose the GPU. Only a hint: YAML has more ways to write
# it, which are slow to read
_IN_FILE = re.compile(r"^(env|use_(cpu|vllm)) *:", re.MULTILINE)
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # the second under Windows


def start_gpu(argv: Sequence[str]) -> threading.Thread | None:
    """
    Import PyTorch in a thread, and load the kernels of a first forward pass on this process's GPU.

    This takes seconds in which Python is mostly free. Python waits for the thread at exit, because a process cannot
    end cleanly while CUDA starts.

    Args:
        argv (`Sequence[str]`): Name of a command and its flags.

    Returns:
        [`threading.Thread`], or `None` if the command needs no GPU, must not use it yet, or there is none.
    """
    flags = {each.partition("=")[0] for each in argv}
    if argv[0] not in _COMMANDS or not flags.isdisjoint(_NOT_WITH) or not any(map(os.path.exists, _DRIVERS)):
        return None
    if _IN_FILE.search(_read_config(argv)):
        return None
    thread = threading.Thread(target=_run_first_kernels)
    thread.start()
    return thread


def _read_config(argv: Sequence[str]) -> str:
    """The text of the file of `--config`, empty without one. Whatever is wrong with it, the command will say."""
    parts = [part for each in argv for part in each.split("=", 1)]
    with contextlib.suppress(OSError, ValueError, IndexError):
        path = Path(parts[parts.index("--config") + 1])
        return path.read_text(encoding="utf-8-sig") if path.is_file() else ""  # a pipe can be read once
    return ""


def _run_first_kernels() -> None:
    with contextlib.suppress(Exception):  # an error will occur again where the GPU is used, and be reported there
        import torch

        index = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        with torch.inference_mode():
            hidden = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
            weight = hidden[0, 0]
            torch.nn.functional.linear(hidden, weight, weight[:, 0])
            torch.nn.functional.linear(hidden, weight)
            torch.nn.functional.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True)
            torch.cuda.synchronize(index)
