"""The `lightreasoner` program. It imports only the command that runs, so that `--help` answers at once."""

import atexit
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
from .early_gpu import start_gpu
from .terminal import speak, translated_warnings


COMMANDS = {
    "demo": "try the method on a bundled pair: offline, on a CPU, in a minute",
    "run": "do everything in one process: train an adapter from a pair and a dataset, and judge it",
    "tune": "try twenty settings on one sampling, and confirm the best one on other questions",
    "check": "judge a pair of models on fifty prompts: one verdict with its reasons",
    "sample": "turn prompts into a Dataset of kept steps",
    "train": "train an adapter on a Dataset of kept steps",
    "merge": "merge an adapter into a plain model",
    "report": "show kept steps as an HTML page, one dataset or two side by side",
    "import": "convert the published scripts' JSON lines to a Dataset of kept steps",
    "eval": "measure a model on benchmarks or your own questions, and compare it with a baseline",
    "env": "print versions and devices for a bug report",
}
_MODULES = {"import": "import_steps"}  # a keyword of Python
_RESUMABLE = ("run", "sample", "eval")  # by the same command

USAGE = f"""usage: lightreasoner COMMAND [--flag VALUE ...] [--config FILE.yaml]

LightReasoner (arXiv 2510.07962): a weaker model shows a stronger one, without labels, which steps to learn from.

commands:
{chr(10).join(f"  {name:<8} {text}" for name, text in COMMANDS.items())}

`lightreasoner COMMAND --help` explains every flag."""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the program and return its exit status: 0 for success, 1 if `check` says no, 2 for an error that the user can
    fix, 130 after Ctrl-C, and 141 if its output is closed.
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
    # PyTorch and its kin make a million objects that stay. Python would look among them for garbage a thousand times
    # during the imports, and again at exit, which takes a third of the time of a short command
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)
    start_gpu(argv)
    command = import_module(f".{_MODULES.get(argv[0], argv[0])}", __package__)
    return _run(f"lightreasoner {argv[0]}", command.make_parser, command.main, argv[1:])


def run(prog: str, make_parser: Callable, command: Callable, argv: Sequence[str]) -> int:
    """Parse `argv` and run one command. A user's mistake becomes one sentence on stderr and exit status 2."""
    return speak(prog, lambda: _run(prog, make_parser, command, argv))


def _run(prog: str, make_parser: Callable, command: Callable, argv: Sequence[str]) -> int:
    start_processes_safely()
    # PEFT imports bitsandbytes even if unused, which would then warn of a missing kernel for 4 bits on CPUs
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    args: tuple = ()
    explain: Callable[[Exception], str] = str
    try:
        parser = make_parser(prog)
        explain = parser.explain
        args = parser.parse(argv)
        with translated_warnings(parser.with_flags):
            outcome = command(*args)
        _leave_process_group()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sentence = _explain_disk(error) or explain(error)
        print(f"{prog}: error: {printable(' '.join(sentence.split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(prog, args)) from None
    return outcome if isinstance(outcome, int) else 0


def _explain_disk(error: Exception) -> str | None:
    """The remedy for a full or read-only disk, if the error is the system's own."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    where = "A file" if error.filename is None else repr(str(error.filename))
    reason = os.strerror(error.errno)
    return f"{where} cannot be written ({reason}). Free disk space or fix the permissions, and run it again."


def _how_to_resume(prog: str, args: tuple) -> str:
    """How to resume after Ctrl-C, empty if there is nothing to resume."""
    name = prog.split()[-1].removesuffix(".py")
    for each in args:
        folder = Path(getattr(each, "output_dir", None) or "")
        begun = any(place.is_file() for pattern in ("run.json", "*/*/run.json") for place in folder.glob(pattern))
        if name in _RESUMABLE and begun and hasattr(each, "overwrite_output_dir"):
            without = " without `--overwrite_output_dir`" if each.overwrite_output_dir else ""
            return f"Rerun the same command{without} to resume."
        is_whole = not getattr(each, "save_only_model", False)
        if name == "train" and is_whole and any(folder.glob("checkpoint-*/trainer_state.json")):
            return "Rerun the same command with `--resume_from_checkpoint true` to resume from the last checkpoint."
    return ""


def _leave_process_group() -> None:
    """Destroy the process group. If its threads are still at work, the process can abort at exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # The threads end when the last reference to the group is gone. DDP holds one, and is itself held by a trainer,
        # which is a reference cycle. So it must be collected first: if DDP freed the group, the group would wait for
        # its threads while holding the GIL, which they may be waiting for
        gc.collect()
        distributed.destroy_process_group()
