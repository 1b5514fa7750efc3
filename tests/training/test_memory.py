import pytest
from transformers import TrainingArguments

from trl_lightreasoner.training.memory import halve_batches


@pytest.fixture
def args(tmp_path):
    def make(rows: int, accumulated: int = 1, evaluated: int = 8) -> TrainingArguments:
        return TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulated,
            per_device_eval_batch_size=evaluated,
        )

    return make


@pytest.mark.parametrize(("rows", "accumulated"), [(2, 1), (6, 3), (8, 4)])
def test_an_update_of_halved_batches_has_as_many_rows(args, rows, accumulated):
    halved = halve_batches(args(rows, accumulated))
    assert halved.per_device_train_batch_size == rows // 2
    assert halved.gradient_accumulation_steps == 2 * accumulated


@pytest.mark.parametrize("rows", [1, 3])
def test_an_odd_batch_has_no_half(args, rows):
    assert halve_batches(args(rows)) is None


@pytest.mark.parametrize(("evaluated", "expected"), [(8, 4), (1, 1)])
def test_evaluation_takes_half_of_its_rows_too(args, evaluated, expected):
    assert halve_batches(args(2, evaluated=evaluated)).per_device_eval_batch_size == expected


def test_the_settings_of_the_first_attempt_stay(args):
    first = args(4)
    halve_batches(first)
    assert (first.per_device_train_batch_size, first.gradient_accumulation_steps) == (4, 1)
