"""The `lightreasoner` program. Only the command that runs is imported, so that `--help` answers at once."""

import errno
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from ..safe_path import start_processes_safely
from ..text import printable
from .terminal import speak


COMMANDS = {
    "demo": "see the method work on the bundled pair: offline, on a CPU, in a minute",
    "run": "all of it: a pair and a dataset to an adapter and a verdict, in one process",
    "tune": "twenty settings from one sampling, and the best of them confirmed on other questions",
    "check": "is this pair of models worth it? fifty prompts, one verdict and its reasons",
    "sample": "prompts to a Dataset of kept steps",
    "train": "a Dataset of kept steps to an adapter",
    "merge": "an adapter to a plain model",
    "report": "kept steps as a page to look at, two datasets side by side",
    "import": "the published scripts' JSON lines to a Dataset of kept steps",
    "eval": "how many problems of seven benchmarks a model solves, and a baseline beside it",
    "env": "versions and devices, to copy into a bug report",
}
_MODULES = {"import": "import_steps"}  # a word that Python keeps to itself
_GOES_ON = ("run", "sample", "eval")  # by the same command, after it was broken off

USAGE = f"""usage: lightreasoner COMMAND [--flag VALUE ...] [--config FILE.yaml]

LightReasoner (arXiv 2510.07962): a small model shows a large one, without labels, which steps to learn from.

commands:
{chr(10).join(f"  {name:<8} {text}" for name, text in COMMANDS.items())}

`lightreasoner COMMAND --help` explains every flag."""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the program. Returns its exit status: 0, 2 for a mistake that the user can mend, 1 if `check` says no, 130
    after Ctrl-C, and 141 if nobody reads what it prints.
    """
    return speak("lightreasoner", lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--version"]:
        from .. import __version__

        print(__version__)
        return 0
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not argv or argv[0] not in COMMANDS:
        given = f"There is no command {printable(repr(argv[0]))}." if argv else "A command is missing."
        print(f"lightreasoner: error: {given} The commands are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command = import_module(f".{_MODULES.get(argv[0], argv[0])}", __package__)
    return _run(f"lightreasoner {argv[0]}", command.make_parser, command.main, argv[1:])


def run(prog: str, make_parser: Callable, command: Callable, argv: Sequence[str]) -> int:
    """Parse `argv` and run one command; a mistake of the user's becomes one sentence on stderr and exit status 2."""
    return speak(prog, lambda: _run(prog, make_parser, command, argv))


def _run(prog: str, make_parser: Callable, command: Callable, argv: Sequence[str]) -> int:
    start_processes_safely()
    # PEFT imports it, used or not, and it would tell at its start that a kernel for 4 bits on CPUs is not installed
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    args: tuple = ()
    explain: Callable[[Exception], str] = str
    try:
        parser = make_parser(prog)
        explain = parser.explain
        args = parser.parse(argv)
        outcome = command(*args)
        _leave_process_group()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sentence = _explain_disk(error) or explain(error)
        print(f"{prog}: error: {printable(' '.join(sentence.split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(prog, args)) from None
    return outcome if isinstance(outcome, int) else 0


def _explain_disk(error: Exception) -> str | None:
    """What to do about a disk that takes no more, where the system has said so in its own words."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    where = "A file" if error.filename is None else repr(str(error.filename))
    reason = os.strerror(error.errno)
    return f"{where} cannot be written ({reason}). Free disk space or fix the permissions, and run it again."


def _how_to_go_on(prog: str, args: tuple) -> str:
    """What to do after Ctrl-C, where there is something to go on with."""
    name = prog.split()[-1].removesuffix(".py")
    for each in args:
        folder = Path(getattr(each, "output_dir", None) or "")
        begun = any(place.is_file() for pattern in ("run.json", "*/*/run.json") for place in folder.glob(pattern))
        if name in _GOES_ON and begun and hasattr(each, "overwrite_output_dir"):
            without = ", without `--overwrite_output_dir`," if each.overwrite_output_dir else ""
            return f"The same command{without} goes on where it stopped."
        if name == "train" and any(folder.glob("checkpoint-*/trainer_state.json")):
            return "The same command with `--resume_from_checkpoint true` goes on from the last checkpoint."
    return ""


def _leave_process_group() -> None:
    """With threads of the group still at work, the end of a process can be an abort."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # The threads end with the last holder of the group. DDP, held by a trainer, which is a cycle, must go before:
        # freed by it, the group would wait for its threads with the GIL held, and they may be waiting for the GIL
        gc.collect()
        distributed.destroy_process_group()
