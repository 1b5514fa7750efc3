"""Where Python looks for modules: not in the folder that a program was started in, where a `queue.py` or a `sympy.py`
of somebody else's may lie.

`python -m` and `python -c` put that folder first, before the standard library. So this imports nothing that is not
there already when Python has started.
"""

import os
import sys


def safe_path() -> list[str]:
    """
    `sys.path` without the current folder and without that of the script, as `python -P` has it. Where the package
    itself lies in one of them, that folder comes last.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    unsafe = {os.path.realpath(""), os.path.realpath(os.path.dirname(script or ""))}
    path = [entry for entry in sys.path if os.path.realpath(entry) not in unsafe]
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return path if package in path else [*path, package]


def start_processes_safely() -> None:
    """Have the processes that this one starts from now on, whoever starts them, leave out the current folder."""
    os.environ["PYTHONSAFEPATH"] = "1"
