"""Batches that a thread writes while the next ones are computed: in order, all of them, and none behind an error."""

import os
import signal
import threading
import time

import pytest

from trl_lightreasoner.generation.batches import run_in_batches
from trl_lightreasoner.processes import Processes


SECONDS = 20  # until a thread that waits in vain goes on


def run_rows(num_rows, run, write):
    """Run batches of two rows."""
    order = [(row, 8) for row in range(num_rows)]
    run_in_batches(order, 2, lambda indices, _: run(indices), write, lambda row: 3, Processes(), "Sampling")


def as_they_are(indices):
    return indices


class Written(list):
    """Rows, as a `write` that takes its time."""

    def __call__(self, indices, result):
        assert result == indices
        time.sleep(0.1)
        self.extend(indices)
        return ""


def test_a_batch_is_written_while_the_next_one_is_computed():
    next_began = threading.Event()
    overlapped = []

    def run(indices):
        if indices == [2, 3]:
            next_began.set()
        return indices

    def write(indices, result):
        overlapped.append(next_began.wait(SECONDS if indices == [0, 1] else 0))
        return ""

    run_rows(4, run, write)
    assert overlapped == [True, True]


def test_batches_are_written_in_their_order_and_before_the_end():
    written = Written()
    run_rows(7, as_they_are, written)
    assert written == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("num_rows", "computed"), [(2, [0, 1]), (8, [0, 1, 2, 3])], ids=["last", "first"])
def test_an_error_of_writing_ends_the_run_and_nothing_is_written_after_it(num_rows, computed):
    ran, tried = [], []

    def run(indices):
        ran.extend(indices)
        return indices

    def write(indices, result):
        tried.extend(indices)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run_rows(num_rows, run, write)
    assert ran == computed
    assert tried == [0, 1]


def test_a_batch_is_written_even_if_the_next_one_fails():
    written = Written()

    def run(indices):
        if indices == [2, 3]:
            raise ValueError("row 2 is broken")
        return indices

    with pytest.raises(ValueError, match="row 2 is broken"):
        run_rows(6, run, written)
    assert written == [0, 1]


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_after_a_signal_the_current_batch_is_written_and_the_others_are_counted(number, raised, caplog):
    written = Written()

    def run(indices):
        if indices == [2, 3]:
            os.kill(os.getpid(), number)
        return indices

    with pytest.raises(raised):
        run_rows(7, run, written)
    assert written == [0, 1, 2, 3]
    assert "Interrupted with 3 prompts left. Rerun the same command to resume." in caplog.text


def test_a_second_signal_ends_the_current_batch_and_not_the_writing_of_the_one_before():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    written = Written()

    def run(indices):
        if indices == [2, 3]:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("it was not interrupted")
        return indices

    try:
        with pytest.raises(KeyboardInterrupt):
            run_rows(6, run, written)
    finally:
        signal.signal(signal.SIGINT, before)
    assert written == [0, 1]


def test_a_batch_that_cannot_be_written_after_a_signal_is_not_passed_over(caplog):
    def run(indices):
        if indices == [0, 1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return indices

    def write(indices, result):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run_rows(6, run, write)
    assert "Interrupted" not in caplog.text
