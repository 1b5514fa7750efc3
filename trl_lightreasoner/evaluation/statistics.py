"""Standard errors of accuracies, and differences of two accuracies on the same problems."""

import math
from typing import NamedTuple


# Two-sided 95 % quantile of the normal distribution
Z_95 = 1.959963984540054


class PairedDifference(NamedTuple):
    """
    A model compared with its baseline on the same problems.

    Attributes:
        difference (`float`): Accuracy of the model minus that of the baseline.
        standard_error (`float`): Standard error of the difference, or what the interval would make of it.
        low, high (`float`): Its 95 % interval, by the normal approximation. It is exact if both solve the same
            problems.
        gained (`int`): Number of problems that only the model solves.
        lost (`int`): Number of problems that only the baseline solves.
        p_value (`float`): McNemar's, see [`mcnemar`].
    """

    difference: float
    standard_error: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float


def standard_error(accuracy: float, count: int) -> float:
    """
    Standard error of an accuracy on `count` problems, as a sample of similar problems.

    Example:

    ```python
    >>> standard_error(0.5, 100)
    0.05

    ```
    """
    return math.sqrt(accuracy * (1 - accuracy) / count)


def mcnemar(gained: int, lost: int) -> float:
    """
    McNemar's exact two-sided p: the probability that a fair coin, thrown once for every problem on which the two
    disagree, falls at least as unevenly.

    Example:

    ```python
    >>> mcnemar(1, 5)
    0.21875

    ```
    """
    count, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(count, i) for i in range(fewer + 1)) / 2**count)


def compare(correct: list[bool], baseline_correct: list[bool]) -> PairedDifference:
    """
    The difference of two accuracies, from the correctness of the same problems in the same order.

    Example:

    ```python
    >>> compare([True, True, True, False], [True, False, False, False]).difference
    0.5

    ```
    """
    pairs = list(zip(correct, baseline_correct, strict=True))
    gained = sum(right and not baseline_right for right, baseline_right in pairs)
    lost = sum(baseline_right and not right for right, baseline_right in pairs)
    difference = (gained - lost) / len(pairs)
    # A pair counts 1, 0 or -1, so the mean of the squares is the fraction of pairs that disagree
    error = math.sqrt(((gained + lost) / len(pairs) - difference**2) / len(pairs))
    if gained + lost == 0:  # exact: if they disagreed on more, that they agree on all of these had a chance below 5 %
        error = (1 - 0.05 ** (1 / len(pairs))) / Z_95
    interval = (difference - Z_95 * error, difference + Z_95 * error)
    return PairedDifference(difference, error, *interval, gained, lost, mcnemar(gained, lost))
