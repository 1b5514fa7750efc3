"""Import libraries without PyTorch's compiler.

PEFT imports bitsandbytes, which compiles functions at its import that few runs call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any


@contextmanager
def compiling_late() -> Iterator[None]:
    """
    Context of imports. What they give to `torch.compile` is compiled at its first call, with the same result.

    Example:

    ```python
    with compiling_late():
        import peft
    ```
    """
    import torch

    compile_now = torch.compile

    def compile_late(function: Callable | None = None, **kwargs: Any) -> Callable:
        if function is None:
            return partial(compile_late, **kwargs)
        compiled = cache(partial(compile_now, function, **kwargs))

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = compile_late
    try:
        yield
    finally:
        torch.compile = compile_now
