"""How a command speaks to its terminal: nothing that comes from a file steers it, warnings begin with "Warning:", what
nobody can act on is left out, and where nobody reads on, or after Ctrl-C, it ends without a traceback.
"""

import contextlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from ..text import printable


_COLOURS = re.compile(r"(\x1b\[[\d;]*m)")  # with which libraries set off what they say
_LINES = "\n\t"
# What libraries warn of that is none of a user's business: the category, the message, and the module that warns
_NOISE: tuple[tuple[type[Warning], str, str], ...] = (
    (FutureWarning, "", r"(transformers|trl|peft|accelerate)\."),  # of each other's names
    (UserWarning, "'pin_memory' argument is set as true but no accelerator", r"torch\.utils\.data\."),
)


class _NobodyReads(BaseException):
    """What a command prints goes into a pipe that was closed. No library may take it for an error of its own."""


def speak(prog: str, function: Callable[[], int]) -> int:
    """
    The exit status that a function returns, which prints what a command has to say; 141, as of a program that such a
    signal ends, if its output is closed, and 130 after Ctrl-C.
    """
    try:
        with _safe_output(), _plain_warnings():
            return function()
    except _NobodyReads:
        # What is left in the buffer would be written when Python ends
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except KeyboardInterrupt as interrupt:
        print(" ".join([f"{prog}: interrupted.", *filter(None, interrupt.args)]), file=sys.stderr)
        return 130


class _Output:
    """A stream whose text is made printable on its way, in whatever encoding it has."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        safe = printable(text, _LINES).encode(encoding, "backslashreplace").decode(encoding)
        with _reader(self._stream):
            self._stream.write(safe)
        return len(text)

    def flush(self) -> None:
        with _reader(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _reader(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _NobodyReads from None


@contextlib.contextmanager
def _safe_output() -> Iterator[None]:
    """What is printed, and what is logged, in here is printable."""
    make_record = logging.getLogRecordFactory()

    def make_safe_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        text = record.getMessage()
        if os.environ.get("WORLD_SIZE", "1") == "1":
            text = text.removeprefix("[RANK 0] ")  # of one process alone
        if record.levelno == logging.WARNING and not text.startswith("Warning:"):
            text = f"Warning: {text}"
        parts = _COLOURS.split(text)
        record.msg = "".join(part if i % 2 else printable(part, _LINES) for i, part in enumerate(parts))
        record.args = None
        return record

    output = _Output(sys.stdout)
    logging.setLogRecordFactory(make_safe_record)
    try:
        with contextlib.redirect_stdout(output):
            try:
                yield
            finally:
                output.flush()
    finally:
        logging.setLogRecordFactory(make_record)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """What is warned of in here, in Python's way, is a line on stderr, or nothing if it is noise."""

    def show(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
        print(f"Warning: {printable(str(message), _LINES)}", file=sys.stderr)

    with warnings.catch_warnings():
        for category, message, module in _NOISE:
            warnings.filterwarnings("ignore", message, category, module)
        warnings.showwarning = show
        yield


def hide_file_bars() -> None:
    """Hide the bars of `datasets` over files, which are read and written at once; those over rows stay."""
    import datasets.builder
    import datasets.io.parquet
    from datasets.utils import tqdm

    class Hidden(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

    datasets.builder.hf_tqdm = datasets.io.parquet.hf_tqdm = Hidden
