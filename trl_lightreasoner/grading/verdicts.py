r"""Grades completions against reference answers.

`grade` extracts the answer of one completion (`answers`) and compares it, within a time limit. `grade_all` does so for
many. Nothing here loads a model.

Numbers that can be written as a fraction are compared exactly: 2^100 is not 2^100 + 1. Text, times, ratios, units,
bases, lists, pairs and intervals are compared by the rules of docs/grading.md. math-verify decides the rest, formulas.
It always gets the reference answer first, because its verdict depends on the order. It may take forever, so it works
in separate processes (`graders`), which are ended at the limit. Long answers and references are handled there, too.
"""

import atexit
import importlib.util
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from .answer_writing import clean
from .answers import find_answer, find_letter, last_sentence
from .equal_answers import Symbolic, equal_answers, says, words_of
from .formulas import check_computer_algebra, equal_by_math_verify
from .graders import Graders, serve


# Seconds that one completion may take
TIMEOUT = 5.0
# About what a grading process takes to start
_SECONDS_TO_START = 1.0
# Longer texts are not answers but runaway output
MAX_ANSWER_LENGTH = 1000
# What is longer is graded where it can be stopped: a completion, and an answer times its reference, each part of which
# can be compared with each
_MAX_LENGTH_HERE = 50_000
_MAX_PRODUCT_HERE = 10_000

# For all calls, so that each finds those of the one before
_graders = Graders()
atexit.register(_graders.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_graders.forget)


class Verdict(NamedTuple):
    """
    The answer of a completion (`None` if there is none), and whether it is correct. Without a verdict it counts as
    wrong, and `failure` gives the reason: "over 5 seconds", or the error of computer algebra.
    """

    answer: str | None
    correct: bool
    failure: str | None = None


def grade(
    completion: str,
    gold: str | list[str],
    kind: str = "math",
    tolerance: float | None = None,
    unit: str | None = None,
) -> Verdict:
    r"""Extract the answer of a completion and compare it with the reference answer.

    Grading takes at most five seconds. If it would take longer, the result has a `failure` instead of a verdict.
    Formulas go to a separate process, which takes a second or two to start.

    Args:
        completion (`str`):
            Text of the model.
        gold (`str` or `list[str]`):
            Reference answer, or the letter for multiple choice. For a list, as in OlympiadBench, the completion must
            give all answers, in any order, and nothing else.
        kind (`str`, *optional*, defaults to `"math"`):
            `"math"` or `"choice"`.
        tolerance (`float`, *optional*):
            Relative tolerance of numbers: 0.01 allows a deviation of one percent of the reference answer.
        unit (`str`, *optional*):
            Unit of the reference answer, if its text has none. An answer without a unit is read in this unit.

    Returns:
        [`Verdict`]: the answer as written in the completion, whether it is correct, and why it could not be graded, if
        so.

    Raises:
        `ImportError`: if math-verify is not installed, or does not work.
        `ValueError`: if there is no reference answer, or `kind` is unknown.

    Example:

    ```python
    >>> grade(r"She has \boxed{1\frac{1}{4}} pies left.", "5/4")
    Verdict(answer='1\\frac{1}{4}', correct=True, failure=None)
    >>> grade("It takes 90 minutes. #### 90 minutes", "1.5", unit="hours")
    Verdict(answer='90 minutes', correct=True, failure=None)
    >>> grade("The answer is (B), because it is a base.", "B", kind="choice")
    Verdict(answer='B', correct=True, failure=None)

    ```
    """
    _find_math_verify()
    item = {"completion": completion, "gold": gold, "kind": kind, "tolerance": tolerance, "unit": unit}
    return _grade_here(item) or _grade_there(item, _graders, TIMEOUT)


def grade_all(items: Iterable[dict], num_workers: int | None = None, timeout: float = TIMEOUT) -> list[Verdict]:
    """Grade many completions, each within a time limit.

    Short answers without computer algebra, such as most word problems, are graded in this process. The rest goes to
    separate processes, which are started afresh instead of forked. So you can call this from anywhere: a script
    without `if __name__ == "__main__"`, a thread, or a process that has used CUDA.

    Args:
        items (`Iterable[dict]`):
            The arguments of [`grade`], one dictionary per completion.
        num_workers (`int`, *optional*):
            Number of processes. If `None`, one per CPU core, at most 8.
        timeout (`float`, *optional*, defaults to `5.0`):
            Time limit per completion in seconds. A completion that exceeds it has a `failure`, and its process is
            replaced.

    Returns:
        `list[Verdict]`: one per item, in order.

    Raises:
        `ImportError`: if math-verify is not installed, or does not work.

    Example:

    ```python
    >>> grade_all([{"completion": "#### 18", "gold": "18"}, {"completion": "#### 17", "gold": "18"}])
    [Verdict(answer='18', correct=True, failure=None), Verdict(answer='17', correct=False, failure=None)]

    ```
    """
    _find_math_verify()
    items = list(items)
    verdicts = [_grade_here(item) for item in items]
    undecided = [index for index, verdict in enumerate(verdicts) if verdict is None]
    # A process that is ready decides a few before others have started
    soon = time.monotonic() + _SECONDS_TO_START
    while undecided and _graders.has_idle() and time.monotonic() < soon:
        index = undecided.pop()
        verdicts[index] = _grade_there(items[index], _graders, timeout)
    if undecided:
        count = min(num_workers or min(os.cpu_count() or 1, 8), len(undecided))
        graders = Graders()
        _graders.hand_to(graders, count)
        with ThreadPoolExecutor(count) as threads:
            try:
                graded = threads.map(lambda index: _grade_there(items[index], graders, timeout), undecided)
                for index, verdict in zip(undecided, graded, strict=True):
                    verdicts[index] = verdict
                graders.hand_to(_graders, count)
            finally:  # also after an interruption
                threads.shutdown(wait=False, cancel_futures=True)
                graders.close()
    return [verdict for verdict in verdicts if verdict is not None]  # all are there by now


def start_grader() -> None:
    """Start what [`check_math_verify`] waits for, if math-verify is installed, so that it gets ready meanwhile."""
    if importlib.util.find_spec("math_verify") is not None:
        _graders.launch()


def check_math_verify() -> None:
    """
    Check that grading works, before hours are spent on answers.

    Raises:
        `ImportError`: if math-verify is not installed, or does not work.
    """
    _find_math_verify()
    _graders.start()


def _find_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("Grading needs math-verify: `pip install 'trl-lightreasoner[eval]'`.")


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
        raise ValueError(f"There is no reference answer: {gold!r}.")
    if kind not in ("math", "choice"):
        raise ValueError(f'`kind` must be "math" or "choice", got {kind!r}.')
    if symbolic is _undecided and len(completion) > _MAX_LENGTH_HERE:
        raise _Undecided
    if kind == "choice":
        letter = find_letter(completion)
        return Verdict(letter, letter == golds[0].strip("() \n").upper())

    answer = find_answer(completion)
    if len(golds) == 1 and (words := words_of(clean(golds[0]))) and not (answer and answer.marked):
        sentence = last_sentence(completion)
        return Verdict(sentence or None, says(sentence, words))
    if answer is None:
        return Verdict(None, False)
    if len(answer.text) > MAX_ANSWER_LENGTH:
        return Verdict(answer.text, False)
    gold = ", ".join(golds)
    if symbolic is _undecided and len(gold) * len(answer.text) > _MAX_PRODUCT_HERE:
        raise _Undecided
    return Verdict(answer.text, equal_answers(gold, answer.text, tolerance, unit, symbolic))


class _Undecided(Exception):
    """This is not the process to decide it in."""


def _undecided(gold: str, answer: str, tolerance: float | None) -> bool:
    raise _Undecided


def _grade_here(item: dict) -> Verdict | None:
    """The verdict on short answers that need no computer algebra."""
    try:
        return _grade(**item, symbolic=_undecided)
    except _Undecided:
        return None


def _grade_there(item: dict, graders: Graders, timeout: float) -> Verdict:
    """The verdict from a process that can be stopped."""
    reply, failure = graders.ask(item, timeout)
    return Verdict(*reply) if failure is None else Verdict(_answer_text(item), False, failure)


def _answer_text(item: dict) -> str | None:
    answer = find_answer(item["completion"])
    return answer.text if answer else None


def serve_verdicts() -> None:
    """The main loop of a grader."""
    serve(check_computer_algebra, _reply)


def _reply(item: dict) -> Verdict:
    try:
        return _grade(**item, symbolic=equal_by_math_verify)
    except Exception as error:
        return Verdict(_answer_text(item), False, type(error).__name__)
