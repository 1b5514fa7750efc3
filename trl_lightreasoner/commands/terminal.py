"""How a command speaks to its terminal: nothing that comes from a file steers it, and where nobody reads on, or after
Ctrl-C, it ends without a traceback.
"""

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from ..text import printable


_COLOURS = re.compile(r"(\x1b\[[\d;]*m)")  # with which libraries set off what they say
_LINES = "\n\t"


class _NobodyReads(BaseException):
    """What a command prints goes into a pipe that was closed. No library may take it for an error of its own."""


def speak(prog: str, function: Callable[[], int]) -> int:
    """
    The exit status that a function returns, which prints what a command has to say; 141, as of a program that such a
    signal ends, if its output is closed, and 130 after Ctrl-C.
    """
    try:
        with _safe_output():
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
        parts = _COLOURS.split(record.getMessage())
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
