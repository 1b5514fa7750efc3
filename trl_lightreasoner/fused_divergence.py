"""D_KL(pi_E || pi_A) from logits in one pass over the vocabulary: a Triton kernel for CUDA GPUs.

With PyTorch alone (`step_divergence` of two log-softmaxes) the same computation takes about fifteen passes over fp32
copies of the logits, the largest tensors of the whole method. A program of the kernel reads the two rows of a step
once, block by block, and keeps five numbers in fp32: both maxima and normalisers, and the sum of p_E (e - a).
"""

import contextlib
import functools
import shutil
import sysconfig
import threading
from pathlib import Path

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_BLOCK = 4096
_compiling: threading.Thread | None = None


def can_fuse(expert_logits: torch.Tensor, amateur_logits: torch.Tensor) -> bool:
    """Whether [`fused_divergence`] can read these logits."""
    return _compiles() and all(each.is_cuda and each.stride(-1) == 1 for each in (expert_logits, amateur_logits))


@functools.cache
def _compiles() -> bool:
    # Triton builds the kernel's launcher with a C compiler
    compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return triton is not None and compiler and Path(sysconfig.get_path("include"), "Python.h").exists()


def compile_ahead(expert_logits: torch.Tensor, amateur_logits: torch.Tensor, device: torch.device) -> None:
    """
    Compile the kernel of [`fused_divergence`] in a thread, which takes more than a second, while the GPU generates.

    Args:
        expert_logits (`torch.Tensor` of shape `(1, V)`): Example with the later dtype and strides, on any device.
        amateur_logits (`torch.Tensor` of shape `(1, V)`): Likewise.
        device (`torch.device`): Where the logits will be.
    """
    global _compiling
    if device.type != "cuda" or not _compiles():
        return

    def work() -> None:
        # A failure here will occur again when the kernel is needed
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)), contextlib.suppress(Exception):
            examples = (
                torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=device)
                for each in (expert_logits, amateur_logits)
            )
            _launch(*examples)

    _compiling = threading.Thread(target=work, daemon=True)
    _compiling.start()


def fused_divergence(expert_logits: torch.Tensor, amateur_logits: torch.Tensor) -> torch.Tensor:
    """
    [`~trl_lightreasoner.contrast.step_divergence`] of the log-softmax of two models' logits.

    Args:
        expert_logits (`torch.Tensor` of shape `(N, V)`): Raw logits of the expert, any floating dtype.
        amateur_logits (`torch.Tensor` of shape `(N, V)`): Raw logits of the amateur.

    Returns:
        `torch.Tensor` of shape `(N,)`, fp32: Nats. NaN or infinite if a logit of the row is.
    """
    global _compiling
    if _compiling is not None:
        _compiling.join()
        _compiling = None
    return _launch(expert_logits, amateur_logits)


def _launch(expert_logits: torch.Tensor, amateur_logits: torch.Tensor) -> torch.Tensor:
    divergence = torch.empty(len(expert_logits), dtype=torch.float32, device=expert_logits.device)
    if len(divergence):
        sizes = expert_logits.stride(0), amateur_logits.stride(0), expert_logits.shape[1]
        _kernel[(len(divergence),)](expert_logits, amateur_logits, divergence, *sizes, BLOCK=_BLOCK)
    return divergence


if triton is not None:

    @triton.jit
    def _kernel(expert, amateur, divergence, expert_stride, amateur_stride, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        expert += row * expert_stride
        amateur += row * amateur_stride
        infinity = float("inf")
        e_max, a_max = -infinity, -infinity
        e_sum, a_sum, difference = 0.0, 0.0, 0.0
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            e = tl.load(expert + columns, mask=inside, other=-infinity).to(tl.float32)
            a = tl.load(amateur + columns, mask=inside, other=-infinity).to(tl.float32)
            new_max = tl.maximum(e_max, tl.max(e, 0))
            p = tl.exp(e - new_max)
            scale = tl.exp(e_max - new_max)
            e_sum = e_sum * scale + tl.sum(p, 0)
            difference = difference * scale + tl.sum(p * tl.where(inside, e - a, 0.0), 0)
            e_max = new_max
            new_max = tl.maximum(a_max, tl.max(a, 0))
            a_sum = a_sum * tl.exp(a_max - new_max) + tl.sum(tl.exp(a - new_max), 0)
            a_max = new_max
        kl = difference / e_sum - (e_max - a_max) - (tl.log(e_sum) - tl.log(a_sum))
        # Rounding can make it negative. The comparison keeps NaN
        tl.store(divergence + row, tl.where(kl < 0.0, 0.0, kl))
