"""Grading processes: they import nothing from where they are started, end with their parent, and stop in time."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from trl_lightreasoner.grading import graders, verdicts
from trl_lightreasoner.grading.verdicts import check_math_verify, grade, grade_all, start_grader


ROOT = {"completion": r"\boxed{\sqrt{20}}", "gold": r"2\sqrt{5}"}


def test_a_grader_imports_nothing_from_where_it_is_started(tmp_path, monkeypatch):
    verdicts._graders.close()
    for name in ("sympy", "math_verify", "queue", "json", "trl_lightreasoner", "sitecustomize", "antlr4"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")  # which is that folder
    monkeypatch.setattr(sys, "path", ["", *sys.path, str(tmp_path)])
    assert grade_all([ROOT])[0].correct
    assert not (tmp_path / "imported").exists()


ENDLESS = [r"\sum_{n=1}^{10^9} 1/n", r"\pi^{10^{50}}"]


@pytest.mark.parametrize("formula", ENDLESS)
def test_grade_stops_in_time_and_says_so(formula, monkeypatch):
    monkeypatch.setattr(verdicts, "TIMEOUT", 0.5)
    found = []
    thread = threading.Thread(target=lambda: found.append(grade(rf"\boxed{{{formula}}}", r"\sqrt{2}")))
    start = time.monotonic()
    thread.start()
    found.append(grade(rf"\boxed{{{formula}}}", r"\sqrt{2}"))
    thread.join()
    assert time.monotonic() - start < 10
    assert found == [verdicts.Verdict(formula, False, "over 0.5 seconds")] * 2


KILLED = r"""
import os, threading
from trl_lightreasoner.grading import graders
found = graders.Graders()
found.start()
print(found._idle[0].pid, flush=True)
found.ask({"completion": r"\boxed{\sum_{n=1}^{10^9} 1/n}", "gold": r"\sqrt{2}"}, timeout=600)
"""


def test_a_grader_ends_with_the_process_that_started_it():
    parent = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    grader = int(parent.stdout.readline())
    time.sleep(1)  # it is at work
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while is_running(grader) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(grader)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:  # who waits for it may take its time
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no such limit")
def test_a_grader_limits_its_processor_time():
    program = "from trl_lightreasoner.grading.graders import _limit_processor_time as limit; limit(-1); 7 ** 10 ** 9"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -signal.SIGXCPU


def test_an_error_of_computer_algebra_is_no_verdict(monkeypatch):
    def fail(gold, answer, tolerance):
        raise RecursionError

    monkeypatch.setattr(verdicts, "equal_by_math_verify", fail)
    assert verdicts._reply(ROOT) == verdicts.Verdict(r"\sqrt{20}", False, "RecursionError")
    assert verdicts._reply({"completion": "#### 18", "gold": "18"}).correct  # needs none


def test_a_grader_that_works_grades_what_comes_next(monkeypatch):
    check_math_verify()  # starts it
    monkeypatch.setattr(verdicts.Graders, "_start", lambda self: pytest.fail("another one was started"))
    for _ in range(2):
        assert grade_all([ROOT])[0].correct and grade(**ROOT).correct


def test_a_grader_that_is_ready_decides_a_few_alone(monkeypatch):
    check_math_verify()
    monkeypatch.setattr(verdicts.Graders, "_start", lambda self: pytest.fail("another one was started"))
    items = [{**ROOT, "gold": gold} for gold in (r"\sqrt{20}", r"\sqrt{21}", r"2\sqrt{5}")]
    assert [verdict.correct for verdict in grade_all(items, num_workers=3)] == [True, False, True]


def test_graders_that_graded_many_grade_what_comes_next(monkeypatch):
    monkeypatch.setattr(verdicts, "_SECONDS_TO_START", 0)
    grade_all([ROOT] * 8, num_workers=2)
    monkeypatch.setattr(verdicts.Graders, "_start", lambda self: pytest.fail("another one was started"))
    assert len(verdicts._graders._idle) >= 2
    assert all(verdict.correct for verdict in grade_all([ROOT] * 8, num_workers=2))


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen]:
    """The graders that a test starts, of which several grade together from the first formula on."""
    verdicts._graders.close()
    made, open_ = [], verdicts.Graders._open
    monkeypatch.setattr(verdicts.Graders, "_open", lambda self: made.append(open_(self)) or made[-1])
    monkeypatch.setattr(verdicts, "_SECONDS_TO_START", 0)
    return made


def test_all_graders_but_one_end_when_none_is_asked_for_long(started, monkeypatch):
    monkeypatch.setattr(graders, "_SECONDS_IDLE", 0.5)
    grade_all([ROOT] * 8, num_workers=3)
    assert len(started) > 1
    deadline = time.monotonic() + 20
    while sum(is_running(each.pid) for each in started) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [is_running(each.pid) for each in started].count(True) == 1
    number = len(started)
    assert grade(**ROOT).correct
    assert len(started) == number


def test_graders_that_were_asked_meanwhile_stay(started):
    grade_all([ROOT] * 8, num_workers=3)
    verdicts._graders._end_surplus()
    assert len(started) > 1 and all(is_running(each.pid) for each in started)


def test_graders_at_work_do_not_end(started, monkeypatch):
    monkeypatch.setattr(graders, "_SECONDS_IDLE", 0)
    assert grade_all([ROOT] * 40, num_workers=4) == [verdicts.Verdict(r"\sqrt{20}", True)] * 40


def test_a_grader_started_ahead_is_the_one_that_is_checked(monkeypatch):
    verdicts._graders.close()
    start_grader()
    start_grader()
    assert len(verdicts._graders._all) == 1
    monkeypatch.setattr(verdicts.Graders, "_open", lambda self: pytest.fail("another one was started"))
    check_math_verify()
    assert grade(**ROOT).correct


def test_a_grader_started_ahead_that_cannot_work_is_an_error(monkeypatch):
    verdicts._graders.close()
    start_grader()
    verdicts._graders._launched[0].kill()
    with pytest.raises(ImportError, match="the grading process ended at its start. Reinstall it"):
        check_math_verify()


def test_no_grader_is_started_ahead_without_math_verify(monkeypatch):
    verdicts._graders.close()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    start_grader()
    assert not verdicts._graders._all


@pytest.mark.parametrize("call", [check_math_verify, lambda: grade(**ROOT), lambda: grade_all([ROOT])])
def test_a_grader_that_cannot_work_is_an_error(call, tmp_path, monkeypatch):
    (tmp_path / "antlr4.py").write_text("raise ModuleNotFoundError(\"No module named 'antlr4'\")")
    monkeypatch.syspath_prepend(tmp_path)
    verdicts._graders.close()
    with pytest.raises(ImportError, match="math-verify does not work here: No module named 'antlr4'. Reinstall it"):
        call()
