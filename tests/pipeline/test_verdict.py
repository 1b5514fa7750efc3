import pytest

from trl_lightreasoner.evaluation.statistics import compare
from trl_lightreasoner.pipeline.verdict import deciding, judge


def difference(gained: int, lost: int, count: int) -> dict:
    """Of `count` questions, of which `gained` and `lost` changed."""
    before = [False] * gained + [True] * lost + [True] * (count - gained - lost)
    after = [True] * gained + [False] * lost + [True] * (count - gained - lost)
    return compare(after, before)._asdict()


@pytest.mark.parametrize(
    ("gained", "lost", "count", "verdict", "sentence"),
    [
        (40, 10, 500, "better", "+6.0 points (3.3 to 8.7) on them: keep it for questions like these."),
        (12, 10, 500, "not significant", "+0.4 points (-1.4 to 2.2) on them: not significantly different from 0. Ask"),
        (0, 0, 500, "not significant", "+0.0 points (-0.6 to 0.6) on them: not significantly different from 0."),
        (10, 40, 500, "worse", "-6.0 points (-8.7 to -3.3) on them: worse. Do not use this adapter."),
        # The interval of so few says too much
        (3, 0, 3, "not significant", "+100.0 points (100.0 to 100.0) on them: not significantly different from 0."),
    ],
)
def test_a_difference_is_one_sentence(gained, lost, count, verdict, sentence):
    judged = judge(difference(gained, lost, count), "them")
    assert judged.verdict == verdict
    assert judged.sentence.startswith(sentence)


def test_a_difference_of_averages_has_no_p():
    assert judge({"difference": 0.02, "low": 0.01, "high": 0.03}, "2 benchmarks").verdict == "better"


def test_nothing_answered_is_said():
    judged = judge(None)
    assert judged.verdict == "not answered"
    assert judged.sentence.startswith("The adapter was not evaluated") and "`--answer_column`" in judged.sentence


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["held_out"], "7 held-out questions"),
        (["held_out", "gsm8k"], "7 held-out questions"),
        (["gsm8k"], "7 problems of GSM8K"),
        (["gsm8k", "svamp"], "2 benchmarks, equally weighted"),
    ],
)
def test_held_out_questions_decide_before_benchmarks(names, what):
    benchmarks = {name: {"num_problems": 7} for name in names}
    assert deciding(benchmarks, {"difference": {}} if len(names) > 1 else None)[1] == what
