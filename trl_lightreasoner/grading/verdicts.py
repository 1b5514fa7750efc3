r"""Grades completions: is the answer that a completion gives the reference answer?

`grade` reads the answer out of one completion (`answers`) and compares it; `grade_all` does so for many, each within a
limit of time. Nothing here loads a model.

Numbers that can be written as a fraction are compared exactly: 2^100 is not 2^100 + 1. Text, times, ratios, units,
bases, lists, pairs and intervals are compared by the rules of docs/grading.md. What is left, formulas, is decided by
math-verify, which always gets the reference answer first because its verdict depends on the order. It may take
forever, hence the limit. Everything before it is bounded.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple

from .answer_writing import clean
from .answers import find_answer, find_letter, last_sentence
from .equal_answers import Symbolic, equal_answers, says, words_of
from .formulas import equal_by_math_verify


# Longer ones are no answers but runaway text
MAX_ANSWER_LENGTH = 1000


class Verdict(NamedTuple):
    """What was read out of a completion (`None` if there was no answer), and whether it is right."""

    answer: str | None
    correct: bool


def grade(
    completion: str,
    gold: str | list[str],
    kind: str = "math",
    tolerance: float | None = None,
    unit: str | None = None,
) -> Verdict:
    r"""Read the answer out of a completion and compare it with the reference answer.

    There is no limit of time but that of math-verify, which needs the main thread to have one: see [`grade_all`].

    Args:
        completion (`str`):
            What the model wrote.
        gold (`str` or `list[str]`):
            Reference answer. Of a list, as OlympiadBench has them, all must be given, in any order, and nothing else.
            For multiple choice the letter.
        kind (`str`, *optional*, defaults to `"math"`):
            `"math"` or `"choice"`.
        tolerance (`float`, *optional*):
            How far a number may be from the reference answer, as a share of it: 0.01 allows one percent.
        unit (`str`, *optional*):
            Unit of the reference answer where that does not say it. An answer without a unit is taken to be in it.

    Returns:
        [`Verdict`]: the answer as it is written in the completion, and whether it is right.

    Raises:
        `ImportError`: if math-verify is not installed.
        `ValueError`: if there is no reference answer, or no such kind.

    Example:

    ```python
    >>> grade(r"She has \boxed{1\frac{1}{4}} pies left.", "5/4")
    Verdict(answer='1\\frac{1}{4}', correct=True)
    >>> grade("It takes 90 minutes. #### 90 minutes", "1.5", unit="hours")
    Verdict(answer='90 minutes', correct=True)
    >>> grade("The answer is (B), because it is a base.", "B", kind="choice")
    Verdict(answer='B', correct=True)

    ```
    """
    check_math_verify()
    return _grade(completion, gold, kind, tolerance, unit, symbolic=equal_by_math_verify)


def grade_all(items: Iterable[dict], num_workers: int | None = None, timeout: float = 5.0) -> list[Verdict]:
    """Grade many completions, each within a limit of time.

    What needs no computer algebra, most word problems, is decided at once in this process. The rest goes to processes
    of its own, which are started anew rather than forked, so this may be called from anywhere: a script without
    `if __name__ == "__main__"`, a thread, a process that has used CUDA.

    Args:
        items (`Iterable[dict]`):
            The arguments of [`grade`], one dictionary a completion.
        num_workers (`int`, *optional*):
            How many processes; by default one a CPU core, at most 8.
        timeout (`float`, *optional*, defaults to `5.0`):
            Seconds that one completion may take. One that takes longer is wrong, and its process is replaced.

    Returns:
        `list[Verdict]`: one for each item, in their order.

    Example:

    ```python
    >>> grade_all([{"completion": "#### 18", "gold": "18"}, {"completion": "#### 17", "gold": "18"}])
    [Verdict(answer='18', correct=True), Verdict(answer='17', correct=False)]

    ```
    """
    check_math_verify()
    items = list(items)
    verdicts: list[Verdict | None] = []
    for item in items:
        try:
            verdicts.append(_grade(**item, symbolic=_undecided))
        except _Undecided:
            verdicts.append(None)
    undecided = [index for index, verdict in enumerate(verdicts) if verdict is None]
    if undecided:
        count = min(num_workers or min(os.cpu_count() or 1, 8), len(undecided))
        workers = _Workers(timeout)
        with ThreadPoolExecutor(count) as threads:
            try:
                graded = threads.map(workers.grade, [items[index] for index in undecided])
                for index, verdict in zip(undecided, graded, strict=True):
                    verdicts[index] = verdict
            finally:  # of an interrupted run, too
                threads.shutdown(wait=False, cancel_futures=True)
                workers.close()
    return [verdict for verdict in verdicts if verdict is not None]  # every one is there


# ---- One completion ----


def _grade(
    completion: str,
    gold: str | list[str],
    kind: str = "math",
    tolerance: float | None = None,
    unit: str | None = None,
    *,
    symbolic: Symbolic,
) -> Verdict:
    golds = [gold] if isinstance(gold, str) else list(gold)
    if not golds or not all(golds):
        raise ValueError(f"There is no reference answer to grade by: {gold!r}.")
    if kind == "choice":
        letter = find_letter(completion)
        return Verdict(letter, letter == golds[0].strip("() \n").upper())
    if kind != "math":
        raise ValueError(f'kind is "math" or "choice", not {kind!r}.')

    answer = find_answer(completion)
    if len(golds) == 1 and (words := words_of(clean(golds[0]))) and not (answer and answer.marked):
        sentence = last_sentence(completion)
        return Verdict(sentence or None, says(sentence, words))
    if answer is None:
        return Verdict(None, False)
    if len(answer.text) > MAX_ANSWER_LENGTH:
        return Verdict(answer.text, False)
    return Verdict(answer.text, equal_answers(", ".join(golds), answer.text, tolerance, unit, symbolic))


class _Undecided(Exception):
    """Computer algebra would have to decide."""


def _undecided(gold: str, answer: str, tolerance: float | None) -> bool:
    raise _Undecided


def check_math_verify() -> None:
    """Refuse to grade without math-verify."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("Grading needs math-verify: `pip install 'trl-lightreasoner[eval]'`.")


# ---- Worker processes ----


class _Workers:
    """Processes that grade, one for each thread that asks.

    They are started by a command rather than by multiprocessing, which would import the caller's script again.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._of_thread = threading.local()
        self._all: list[subprocess.Popen] = []

    def grade(self, item: dict) -> Verdict:
        worker = getattr(self._of_thread, "worker", None)
        if worker is None:
            worker = self._of_thread.worker = self._start()
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            worker.kill()  # which ends the reading, on every platform

        timer = threading.Timer(self.timeout, kill)
        timer.start()
        try:
            requests, replies = _pipes(worker)
            requests.write(json.dumps(item) + "\n")
            requests.flush()
            line = replies.readline()
        except OSError:  # it died
            line = ""
        timer.cancel()
        timer.join()
        finished = line.endswith("\n")
        if expired.is_set() or not finished:
            worker.kill()
            self._of_thread.worker = None
        return Verdict(*json.loads(line)) if finished else Verdict(_answer_text(item), False)

    def close(self) -> None:
        for worker in self._all:
            worker.kill()
            worker.wait()
            requests, replies = _pipes(worker)
            replies.close()
            with contextlib.suppress(OSError):  # what it did not read
                requests.close()

    def _start(self) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        worker = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _serve; _serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self._all.append(worker)
        # Its start is not counted against the first completion
        if _pipes(worker)[1].readline() != "ready\n":
            raise RuntimeError("A grading process did not start; `python -c 'import math_verify'` may tell why.")
        return worker


def _pipes(worker: subprocess.Popen) -> tuple[IO[str], IO[str]]:
    assert worker.stdin is not None and worker.stdout is not None
    return worker.stdin, worker.stdout


def _answer_text(item: dict) -> str | None:
    answer = find_answer(item["completion"])
    return answer.text if answer else None


def _serve() -> None:
    """What a worker does: a line of JSON in, a line of JSON out."""
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    import math_verify  # noqa: F401

    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed must not come between
    print("ready", file=output, flush=True)
    for line in sys.stdin:
        try:
            verdict = grade(**json.loads(line))
        except BaseException:  # the limit of math-verify, memory
            verdict = Verdict(_answer_text(json.loads(line)), False)
        print(json.dumps(verdict), file=output, flush=True)
