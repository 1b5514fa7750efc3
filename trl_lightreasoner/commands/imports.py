"""Imports of a command without the garbage collector, whose looking takes a fifth of their time."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports() -> Iterator[None]:
    """
    Import large libraries: they make hundreds of thousands of objects that all stay, and Python would look among them
    for garbage again and again, then and later.

    Example:

    ```python
    >>> with fast_imports():
    ...     import torch

    ```
    """
    num_modules, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
