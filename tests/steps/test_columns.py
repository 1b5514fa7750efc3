"""Flat columns of kept steps against loops over rows."""

import numpy as np
import pytest
from datasets import Dataset, Features

from trl_lightreasoner.steps.columns import count_trajectories, longest_completion, read_columns
from trl_lightreasoner.steps.dataset import STEP_FEATURES


def make_rows(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        length = int(rng.integers(1, 9))
        positions = np.flatnonzero(rng.random(length) < 0.4).tolist()
        sizes = rng.integers(1, 4, len(positions)).tolist()
        rows.append(
            {
                "prompt_ids": rng.integers(0, 9, rng.integers(1, 4)).tolist(),
                "completion_ids": rng.integers(0, 9, length).tolist(),
                "kl_divergence": [float(nats) if nats < 2 else None for nats in rng.exponential(1, length)],
                "step_positions": positions,
                "label_ids": [rng.choice(9, size, replace=False).tolist() for size in sizes],
                "label_probs": [rng.choice([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).tolist() if size == 3
                                else [1 / size] * size for size in sizes],
                "sampling_metadata": "{}",
            }
        )  # fmt: skip
    return rows


def as_dataset(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=Features(STEP_FEATURES))


@pytest.mark.parametrize("selected", [range(450), range(7, 451, 3)])
def test_every_column_is_that_of_a_loop_over_rows(selected):
    dataset = as_dataset(make_rows(451)).select(selected)
    rows, seen = dataset.to_list(), 0
    keys = []
    for columns in read_columns(dataset):
        part = rows[seen : seen + len(columns.prompts) - 1]
        seen += len(part)
        keys += columns.keys()
        for i, row in enumerate(part):
            assert columns.prompt_ids[slice(*columns.prompts[i : i + 2])].tolist() == row["prompt_ids"]
            tokens, steps = slice(*columns.completions[i : i + 2]), slice(*columns.steps[i : i + 2])
            assert columns.completion_ids[tokens].tolist() == row["completion_ids"]
            nats = [np.nan if value is None else value for value in row["kl_divergence"]]
            np.testing.assert_array_equal(columns.divergences[tokens], nats)
            assert columns.positions[steps].tolist() == row["step_positions"]
            assert columns.rows[steps].tolist() == [i] * len(row["step_positions"])
            taken = [row["completion_ids"][t] for t in row["step_positions"]]
            assert columns.completion_ids[columns.places][steps].tolist() == taken
            labels = [slice(*columns.labels[s : s + 2]) for s in range(steps.start, steps.stop)]
            assert [columns.label_ids[label].tolist() for label in labels] == row["label_ids"]
            assert [columns.label_probs[label].tolist() for label in labels] == row["label_probs"]
            favourites = [
                ids[probs.index(max(probs))] for ids, probs in zip(row["label_ids"], row["label_probs"], strict=True)
            ]
            assert columns.label_ids[columns.favourites][steps].tolist() == favourites
    assert seen == len(rows)
    prompts = {tuple(row["prompt_ids"]) for row in rows}
    names = ("prompt_ids", "completion_ids", "kl_divergence")
    trajectories = {tuple(tuple(row[name]) for name in names) for row in rows}
    assert [len(set(each)) for each in zip(*keys, strict=True)] == [len(prompts), len(trajectories)]


def one_step_each(rows: list[dict]) -> list[dict]:
    names = ("step_positions", "label_ids", "label_probs")
    return [
        {**row, **{name: [row[name][k]] for name in names}} for row in rows for k in range(len(row["step_positions"]))
    ]


@pytest.mark.parametrize("with_divergences", [True, False])
@pytest.mark.parametrize("change", [list, one_step_each])
def test_trajectories_are_counted_as_often_as_their_steps_come(change, with_divergences):
    rows = [row for row in make_rows(30) if row["step_positions"]]
    dataset = as_dataset(change(rows + rows[:7])).shuffle(seed=0)
    dataset = dataset if with_divergences else dataset.remove_columns("kl_divergence")
    lengths = [len(row["completion_ids"]) for row in rows + rows[:7]]
    assert count_trajectories(dataset) == (len(lengths), sum(lengths))


def test_one_answer_read_by_two_amateurs_is_two_trajectories():
    rows = [row for row in make_rows(9) if row["step_positions"]]
    others = [{**row, "kl_divergence": [0.5] * len(row["completion_ids"])} for row in rows]
    assert count_trajectories(as_dataset(one_step_each(rows + others)))[0] == 2 * len(rows)


STEP = {"completion_ids": [1, 2], "kl_divergence": [0.1, 0.2], "step_positions": [1], "label_ids": [[3, 4]]}
STEP |= {"label_probs": [[0.5, 0.5]]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_ids": [-1]}, "token id -1 is outside"),
        ({"prompt_ids": None}, "prompt_ids is missing"),
        ({"completion_ids": [1, None]}, "completion_ids has a gap"),
        ({"kl_divergence": [0.1]}, "there are 1 divergences for 2 completion tokens"),
        ({"kl_divergence": None}, "kl_divergence is missing"),
        ({"kl_divergence": [0.1, -0.1]}, "negative or not finite"),
        ({"kl_divergence": [0.1, float("nan")]}, "negative or not finite"),
        ({"kl_divergence": [0.1, float("inf")]}, "negative or not finite"),
        ({"step_positions": [2]}, "step position 2 is outside the completion"),
        ({"step_positions": [-1]}, "step position -1 is outside the completion"),
        ({"step_positions": [0], "prompt_ids": []}, "step position 0 has no context"),
        ({"step_positions": [0, 1]}, "there are 2 step positions, 1 lists of label ids"),
        ({"step_positions": [1, 1], "label_ids": [[3], [4]], "label_probs": [[1.0], [1.0]]}, "not ascending"),
        ({"label_ids": [[3, 3]]}, "names a token twice"),
        ({"label_ids": [[3]]}, "has 1 ids and 2 probabilities"),
        ({"label_ids": [[]], "label_probs": [[]]}, "has 0 ids and 0 probabilities"),
        ({"label_ids": [[3, None]]}, "label_ids has a gap"),
        ({"label_ids": [None]}, "label_ids has a gap"),
        ({"label_probs": [[0.5, float("nan")]]}, "negative or not finite"),
        ({"label_probs": [[1.5, -0.5]]}, "negative or not finite"),
        ({"label_probs": [[0.5, 0.4]]}, "sums to 0.9, not to 1"),
    ],
)
def test_a_row_that_does_not_add_up_is_named_with_the_reason(change, reason):
    rows = make_rows(300)
    rows[203] |= STEP | change
    with pytest.raises(ValueError, match=rf"^Row 203 of the steps cannot be used: .*{reason}"):
        list(read_columns(as_dataset(rows), "steps"))


def test_a_label_may_sum_to_nearly_one():
    rows = [make_rows(1)[0] | STEP | {"label_probs": [[0.5, 0.500995]]}]
    assert [len(columns.positions) for columns in read_columns(as_dataset(rows))] == [1]


def test_a_gap_before_the_selected_rows_does_not_count():
    rows = make_rows(3)
    rows[0] |= STEP | {"label_ids": [[3, None]], "prompt_ids": [None]}
    (columns,) = read_columns(as_dataset(rows).select(range(1, 3)))
    assert len(columns.steps) == 3


def test_a_divergence_per_row_is_refused():
    dataset = Dataset.from_list([row | {"kl_divergence": 0.5} for row in make_rows(3)])
    with pytest.raises(ValueError, match="The column 'kl_divergence' of the dataset must hold lists of numbers, got"):
        longest_completion(dataset)


def test_a_dataset_without_any_step_is_refused():
    rows = make_rows(20)
    assert longest_completion(as_dataset(rows)) == max(len(row["completion_ids"]) for row in rows)
    with pytest.raises(ValueError, match="The dataset has no step: every `kl_divergence` is empty"):
        longest_completion(as_dataset([row | {"kl_divergence": []} for row in rows]))
