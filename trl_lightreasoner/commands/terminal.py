"""A command's output to its terminal. Text from files cannot control the terminal, warnings begin with "Warning:", and
warnings that no user can act on are hidden. After Ctrl-C, or if the output is closed, there is no traceback.
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


_COLOURS = re.compile(r"(\x1b\[[\d;]*m)")  # of libraries
_LINES = "\n\t"
_PACKAGE = __name__.partition(".")[0]
# Warnings of libraries that no user can act on: the category, the message, and the module that warns
_NOISE: tuple[tuple[type[Warning], str, str], ...] = (
    (FutureWarning, "", r"(transformers|trl|peft|accelerate)\."),  # about each other's interfaces
    (UserWarning, "'pin_memory' argument is set as true but no accelerator", r"torch\.utils\.data\."),
)


class _NobodyReads(BaseException):
    """The output of a command goes to a closed pipe. Not an `Exception`, so that no library handles it."""


def speak(prog: str, function: Callable[[], int]) -> int:
    """
    Run a function that prints a command's output, and return its exit status. The status is 130 after Ctrl-C, and 141
    if the output is closed, as for a program that SIGPIPE ends.
    """
    try:
        with _safe_output(), _plain_warnings():
            return function()
    except _NobodyReads:
        # Otherwise Python would write the rest of the buffer at exit
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except KeyboardInterrupt as interrupt:
        print(" ".join([f"{prog}: interrupted.", *filter(None, interrupt.args)]), file=sys.stderr)
        return 130


class _Output:
    """A stream whose text is made printable and fit for the stream's encoding."""

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
    """A context in which everything printed or logged is made printable."""
    make_record = logging.getLogRecordFactory()

    def make_safe_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        text = record.getMessage()
        if os.environ.get("WORLD_SIZE", "1") == "1":
            text = text.removeprefix("[RANK 0] ")  # not useful with a single process
        if record.levelno == logging.WARNING and not text.startswith(("Warning:", "Resuming:")):
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
def translated_warnings(translate: Callable[[str], str]) -> Iterator[None]:
    """A context in which this package's logged warnings are translated, for example to name flags."""
    make_record = logging.getLogRecordFactory()

    def make_translated_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if record.levelno == logging.WARNING and record.name.startswith(_PACKAGE):
            record.msg, record.args = translate(record.getMessage()), None
        return record

    logging.setLogRecordFactory(make_translated_record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """A context in which Python warnings are single lines on stderr, and noise is hidden."""

    def show(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
        print(f"Warning: {printable(str(message), _LINES)}", file=sys.stderr)

    with warnings.catch_warnings():
        for category, message, module in _NOISE:
            warnings.filterwarnings("ignore", message, category, module)
        warnings.showwarning = show
        yield


def hide_file_bars() -> None:
    """Hide the progress bars of `datasets` over files, which are fast. Those over rows remain."""
    import datasets.builder
    import datasets.io.parquet
    from datasets.utils import tqdm

    class Hidden(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

    datasets.builder.hf_tqdm = datasets.io.parquet.hf_tqdm = Hidden
