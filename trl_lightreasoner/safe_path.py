"""Keep Python from importing modules from the current folder, which may hold an unrelated `queue.py` or `sympy.py`.

`python -m` and `python -c` put that folder first, before the standard library. So this module imports only what is
already loaded when Python has started.
"""

import os
import sys


def safe_path() -> list[str]:
    """
    `sys.path` without the current folder and that of the script, as with `python -P`. If the package itself is in one
    of them, that folder comes last.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    unsafe = {os.path.realpath(""), os.path.realpath(os.path.dirname(script or ""))}
    path = [entry for entry in sys.path if os.path.realpath(entry) not in unsafe]
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return path if package in path else [*path, package]


def start_processes_safely() -> None:
    """Make all processes that this one starts from now on leave out the current folder."""
    os.environ["PYTHONSAFEPATH"] = "1"
