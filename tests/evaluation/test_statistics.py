import math
import random
import statistics
from itertools import product

import pytest

from trl_lightreasoner.evaluation.statistics import compare, mcnemar, standard_error


def answers(seed: int, count: int = 200) -> tuple[list[bool], list[bool]]:
    rng = random.Random(seed)
    baseline = [rng.random() < 0.5 for _ in range(count)]
    return [rng.random() < (0.8 if right else 0.3) for right in baseline], baseline


@pytest.mark.parametrize("seed", range(3))
def test_the_standard_error_is_that_of_the_mean(seed):
    correct, _ = answers(seed)
    naive = statistics.pstdev(map(float, correct)) / math.sqrt(len(correct))
    assert standard_error(sum(correct) / len(correct), len(correct)) == pytest.approx(naive, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_difference_is_that_of_the_pairs(seed):
    correct, baseline = answers(seed)
    differences = [float(one) - float(other) for one, other in zip(correct, baseline, strict=True)]
    made = compare(correct, baseline)
    error = statistics.pstdev(differences) / math.sqrt(len(differences))
    assert made.difference == pytest.approx(statistics.mean(differences), abs=1e-12)
    assert made.standard_error == pytest.approx(error, rel=1e-12)
    half = statistics.NormalDist().inv_cdf(0.975) * error
    assert (made.low, made.high) == pytest.approx((made.difference - half, made.difference + half))
    assert made.gained == differences.count(1.0) and made.lost == differences.count(-1.0)
    assert made.p_value == mcnemar(made.gained, made.lost)


def test_pairs_tell_more_than_two_separate_accuracies():
    # Nine problems in ten are answered alike
    baseline = [i % 2 == 0 for i in range(1000)]
    correct = [right or i % 20 == 1 for i, right in enumerate(baseline)]
    made = compare(correct, baseline)
    assert made.difference == 0.05
    separate = math.hypot(standard_error(0.5, 1000), standard_error(0.55, 1000))
    assert made.standard_error < separate / 3


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),  # the two tails overlap
        (0, 1, 1.0),
        (0, 5, 0.0625),
        (0, 6, 0.03125),
        (1, 9, 0.021484375),
        (150, 86, 3.716e-05),  # Agresti's ratings of a prime minister, as R's mcnemar.exact gives them
        (86, 150, 3.716e-05),
    ],
)
def test_mcnemar_against_known_values(gained, lost, expected):
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_mcnemar_against_every_throw_of_the_coins(count):
    for gained in range(count + 1):
        off = abs(gained - count / 2)
        as_uneven = sum(abs(sum(throw) - count / 2) >= off for throw in product((0, 1), repeat=count))
        assert mcnemar(gained, count - gained) == as_uneven / 2**count


def test_mcnemar_of_thousands():
    # Python's integers hold what a float would not
    assert 0 < mcnemar(900, 1100) < 1e-5
    assert mcnemar(2500, 2500) == 1.0


def test_pairs_are_of_the_same_problems():
    with pytest.raises(ValueError):
        compare([True], [True, False])


@pytest.mark.parametrize("count", [1, 40, 500])
def test_equal_verdicts_leave_the_difference_that_they_would_hardly_hide(count):
    made = compare([True] * count, [True] * count)
    assert made.difference == 0 and made.low == -made.high and made.p_value == 1
    # The chance that as many problems show no disagreement, if the two disagree on this share
    assert (1 - made.high) ** count == pytest.approx(0.05)
    assert made.standard_error == pytest.approx(made.high / 1.96, rel=1e-3)
