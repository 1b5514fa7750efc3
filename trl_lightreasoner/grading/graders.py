"""Grading processes, one completion at a time, which allows stopping computer algebra.

They are started by a command, because multiprocessing would import the caller's script again. They import nothing from
the current folder. They end with the process that started them, and each limits its own processor time in case that
process was killed. All but one end when none has been asked for ten minutes, because each holds some 50 MB.
"""

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from ..safe_path import safe_path


# What a grader is asked for: the arguments of `grade`, in JSON. What it replies: a verdict, in JSON
Serve = Callable[[dict[str, Any]], Any]

_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; from trl_lightreasoner.grading import verdicts; verdicts.serve_verdicts()"
)
_READY = "ready"
# Seconds without a question after which all graders but one end
_SECONDS_IDLE = 600.0


class Graders:
    """
    A pool of grading processes that grows with demand. Each is kept for the next completion, and only one for longer
    than ten minutes.

    A process that exceeds the time limit, or has died, is replaced. Its completion gets no reply.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._launched: list[subprocess.Popen] = []  # not known to work yet
        self._idle: list[subprocess.Popen] = []
        self._all: list[subprocess.Popen] = []
        self._last_asked = 0.0
        self._timer: threading.Timer | None = None  # runs while several are idle

    def ask(self, item: dict[str, Any], timeout: float) -> tuple[Any, str | None]:
        """
        The reply of a grader, or the reason why there is none.

        Args:
            item (`dict`): What to grade. JSON.
            timeout (`float`): Time limit in seconds, without the start of a process.

        Raises:
            `ImportError`: If no grader can work here. The message gives the reason.
        """
        grader = self._take()
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            grader.kill()  # ends the read on every platform

        timer = threading.Timer(timeout, kill)
        timer.start()
        try:
            requests, replies = _pipes(grader)
            requests.write(json.dumps({"timeout": timeout, "item": item}) + "\n")
            requests.flush()
            line = replies.readline()
        except OSError:  # it died
            line = ""
        finally:
            timer.cancel()
            timer.join()
        finished = line.endswith("\n")
        if finished and not expired.is_set():
            self._rest([grader])
        else:
            self._end(grader)
        if finished:
            return json.loads(line), None
        return None, f"over {timeout:g} seconds" if expired.is_set() else "the grading process died"

    def launch(self) -> None:
        """Start a grader ahead of its first use, without waiting until it is ready."""
        if not self._all:
            grader = self._open()
            with self._lock:
                self._launched.append(grader)

    def start(self) -> None:
        """Start a grader if there is none, with the same errors as [`~Graders.ask`]."""
        self._rest([self._take()])

    def has_idle(self) -> bool:
        """Whether a grader is ready."""
        with self._lock:
            return bool(self._idle)

    def hand_to(self, other: "Graders", count: int) -> None:
        """Move up to `count` idle graders to another pool, which need not start them."""
        with self._lock:
            moved, self._idle = self._idle[:count], self._idle[count:]
            self._all = [grader for grader in self._all if grader not in moved]
        with other._lock:
            other._all += moved
        other._rest(moved)

    def close(self) -> None:
        """End all graders, even at work."""
        with self._lock:
            graders, self._all, self._idle, self._launched = self._all, [], [], []
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
        for grader in graders:
            _end(grader)

    def forget(self) -> None:
        """Forget the graders in a forked process: they belong to its parent."""
        self.__init__()  # type: ignore[misc]

    def _take(self) -> subprocess.Popen:
        with self._lock:
            while self._idle:
                grader = self._idle.pop()
                if grader.poll() is None:
                    return grader
        return self._start()

    def _rest(self, graders: list[subprocess.Popen]) -> None:
        """Keep graders, each of which has nothing to do, for the next completion."""
        with self._lock:
            self._idle += graders
            self._last_asked = time.monotonic()
            if len(self._idle) > 1 and self._timer is None:
                self._wait(_SECONDS_IDLE)

    def _wait(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._end_surplus)
        self._timer.daemon = True
        self._timer.start()

    def _end_surplus(self) -> None:
        """End all idle graders but one, or wait on if one has been asked meanwhile."""
        with self._lock:
            left = self._last_asked + _SECONDS_IDLE - time.monotonic()
            if left > 0:
                return self._wait(left)
            self._timer = None
            surplus, self._idle = self._idle[1:], self._idle[:1]
        for grader in surplus:
            self._end(grader)

    def _end(self, grader: subprocess.Popen) -> None:
        with self._lock:
            if grader in self._all:
                self._all.remove(grader)
        _end(grader)

    def _open(self) -> subprocess.Popen:
        # The path is passed as arguments: PYTHONPATH would also apply to Python's own start
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        grader = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, *safe_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        with self._lock:
            self._all.append(grader)
        return grader

    def _start(self) -> subprocess.Popen:
        with self._lock:
            launched = self._launched.pop() if self._launched else None
        grader = launched or self._open()
        line = _pipes(grader)[1].readline()
        if line != json.dumps(_READY) + "\n":
            self._end(grader)
            reason = json.loads(line) if line.endswith("\n") else "the grading process ended at its start"
            raise ImportError(
                f"math-verify does not work here: {str(reason).rstrip('.')}. Reinstall it with its dependencies: `pip "
                "install --force-reinstall 'trl-lightreasoner[eval]'`."
            )
        return grader


def _pipes(grader: subprocess.Popen) -> tuple[IO[str], IO[str]]:
    assert grader.stdin is not None and grader.stdout is not None
    return grader.stdin, grader.stdout


def _end(grader: subprocess.Popen) -> None:
    grader.kill()
    grader.wait()
    requests, replies = _pipes(grader)
    replies.close()
    with contextlib.suppress(OSError):  # unread data
        requests.close()


def serve(check: Callable[[], None], reply: Serve) -> None:
    """
    What a grader does: a line of JSON in, a line of JSON out, until the process that asks is gone.

    Args:
        check (`Callable`): Raises what makes grading impossible.
        reply (`Callable`): From what was asked to what is replied.
    """
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # other output must not mix with the replies
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in requests:
            asked.put(line)
        os._exit(0)  # even in the middle of a formula

    threading.Thread(target=read, daemon=True).start()
    try:
        check()
        outcome: str = _READY
    except Exception as error:
        outcome = str(error) or type(error).__name__
    print(json.dumps(outcome), file=replies, flush=True)
    while outcome == _READY:
        request = json.loads(asked.get())
        _limit_processor_time(request["timeout"])
        print(json.dumps(reply(request["item"])), file=replies, flush=True)


def _limit_processor_time(seconds: float) -> None:
    """Let the operating system end this process after the limit, even within one long operation on integers."""
    try:
        import resource
    except ImportError:  # Windows
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
