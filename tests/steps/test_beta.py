import pytest
from datasets import Dataset

from trl_lightreasoner.steps.beta import choose_beta, has_corrections

from .test_training_rows import ROW, turned, with_divergence


def naive_choice(rows: list[dict]) -> float | None:
    """Largest first: 1.6 where a tenth of the labels prefer another token, 0.8 where a step reaches it."""
    steps = [
        (row["kl_divergence"][t], row["completion_ids"][t] != ids[0])
        for row in rows
        for t, ids in zip(row["step_positions"], row["label_ids"], strict=True)
    ]
    high = [other for kl, other in steps if kl >= 1.6]
    if high and sum(high) / len(high) >= 0.1:
        return 1.6
    return 0.8 if any(kl >= 0.8 for kl, _ in steps) else None


@pytest.mark.parametrize("num_others", [0, 1, 2, 19])
@pytest.mark.parametrize("low", [0.5, 0.9, 2.0])
def test_the_threshold_is_chosen_by_the_share_of_labels_that_prefer_another_token(num_others, low):
    same = with_divergence([2.0, 0.1, low, low])  # three steps, whose labels begin with the token that was taken
    other = {**same, "label_ids": [[9], *ROW["label_ids"][1:]]}
    rows = [other] * num_others + [same] * (19 - num_others)
    assert choose_beta(Dataset.from_list(rows)) == naive_choice(rows)
    assert has_corrections(Dataset.from_list(rows)) == (naive_choice(rows) == 1.6)
    assert choose_beta(Dataset.from_list([turned(row) for row in rows])) == naive_choice(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [with_divergence([0.5, 0.5, 0.5, 0.5])],
        [with_divergence([2.0, 2.0, None, 2.0])],
        [ROW],
        [with_divergence([2.0, 2.0])],
        [with_divergence([2.0] * 4, label_ids=[[4]])],
    ],
    ids=["all are low", "one is not known", "none is known", "too few", "a row that does not add up"],
)
def test_there_is_no_threshold_where_it_cannot_be_told(rows):
    assert choose_beta(Dataset.from_list(rows)) is None
    assert not has_corrections(Dataset.from_list(rows))


def test_streamed_rows_have_no_threshold_of_their_own():
    assert choose_beta(Dataset.from_list([with_divergence([2.0] * 4)]).to_iterable_dataset()) is None
