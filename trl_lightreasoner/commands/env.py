"""`lightreasoner env`: print versions and devices for a bug report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from .arguments import ArgumentParser
from .running_on import device_names


EXAMPLE = r"""example:
  lightreasoner env"""

# Required packages, then optional ones
_PACKAGES = (
    *("trl-lightreasoner", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub"),
    *("bitsandbytes", "vllm", "liger-kernel", "deepspeed", "math-verify", "matplotlib", "optuna"),
)
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WORLD_SIZE")


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([], prog=prog, usage="%(prog)s", description=__doc__, epilog=EXAMPLE)


def main() -> None:
    import torch

    lines = {"platform": platform.platform(), "Python": platform.python_version(), **dict.fromkeys(_PACKAGES, "")}
    for package in _PACKAGES:
        try:
            lines[package] = version(package)
        except PackageNotFoundError:
            lines[package] = "not installed"
    lines["torch"] = torch.__version__  # names its build, which a wheel's own version may not
    lines["device"] = ", ".join(device_names())
    lines |= {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    print("\n".join(f"- {name}: {value}" for name, value in lines.items()))
