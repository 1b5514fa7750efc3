"""The numbers of a report against loops written out here."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset

from trl_lightreasoner.report.statistics import StepStatistics
from trl_lightreasoner.steps.dataset import STEP_FEATURES


BETA = 0.4


def make_rows(num_rows: int = 30, seed: int = 0, longest: int = 90) -> list[dict]:
    """Rows of random trajectories of unequal lengths, with supports of one to twelve tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        length = int(rng.integers(1, longest))
        divergences = np.exp(rng.normal(-3, 2.5, length)).astype(np.float32)
        positions = np.nonzero(divergences >= np.float32(BETA))[0].tolist()
        row = {
            "prompt_ids": [i + 1, 2, 3],
            "completion_ids": rng.integers(0, 30, length).tolist(),
            "kl_divergence": divergences.tolist(),
            "step_positions": positions,
            "label_ids": [],
            "label_probs": [],
            "sampling_metadata": json.dumps({"settings": {"alpha": 0.2, "beta": BETA}}),
        }
        for _ in positions:
            size = int(rng.integers(1, 13))
            row["label_ids"].append(rng.choice(30, size, replace=False).tolist())
            row["label_probs"].append(sorted(rng.dirichlet(np.ones(size)).tolist(), reverse=True))
        rows.append(row)
    return rows


def as_dataset(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=Features(STEP_FEATURES))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return make_rows()


@pytest.fixture(scope="module")
def statistics(rows) -> StepStatistics:
    return StepStatistics(as_dataset(rows))


@pytest.fixture(scope="module")
def divergences(rows) -> np.ndarray:
    return np.array([value for row in rows for value in row["kl_divergence"]])


@pytest.mark.parametrize(
    ("others", "alpha", "beta", "label_power"),
    [
        ({"alpha": 0.2, "beta": BETA}, 0.2, BETA, (1.0, 0.0)),
        ({"alpha": 0.2, "beta": BETA, "contrast_strength": 1.0, "expert_anchor": 0.0}, 0.2, BETA, (1.0, 0.0)),
        ({"alpha": 0.1, "beta": 0.6}, None, None, (1.0, 0.0)),
        ({"alpha": 0.2, "beta": BETA, "contrast_strength": 0.5}, 0.2, BETA, None),
    ],
)
def test_settings_are_told_if_all_rows_have_them(others, alpha, beta, label_power, rows):
    mixed = [*rows[:3], {**rows[3], "sampling_metadata": json.dumps({"settings": others})}]
    statistics = StepStatistics(as_dataset(mixed))
    assert (statistics.alpha, statistics.beta, statistics.label_power) == (alpha, beta, label_power)


def test_rows_steps_and_kept_steps_are_counted(statistics, rows, divergences):
    assert statistics.num_rows == statistics.num_trajectories == len(rows)
    assert statistics.num_steps == len(divergences)
    assert statistics.num_kept == sum(len(row["step_positions"]) for row in rows)
    assert statistics.kept_per_row.tolist() == [len(row["step_positions"]) for row in rows]
    assert (statistics.alpha, statistics.beta) == (0.2, BETA)


def test_the_share_kept_is_exact_at_the_datasets_own_beta(statistics, divergences):
    assert statistics.share_kept(BETA) == (divergences >= np.float32(BETA)).mean()


@pytest.mark.parametrize("beta", [1e-3, 0.05, 0.7, 2.0])
def test_the_share_kept_at_another_beta_is_right_to_a_bin(beta, statistics, divergences):
    low, high = (divergences >= beta * 1.0024).mean(), (divergences >= beta / 1.0024).mean()
    assert low <= statistics.share_kept(beta) <= high
    assert statistics.shares(np.array([beta]))[0] == statistics.share_kept(beta)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.5])
def test_the_beta_for_a_share_keeps_that_share(share, statistics, divergences):
    beta = statistics.beta_for(share)
    assert (divergences >= beta).mean() <= share
    assert (divergences >= beta / 1.0024).mean() >= share - 1 / len(divergences)


def test_the_histogram_holds_every_step(statistics, divergences):
    edges, counts = statistics.histogram()
    assert counts.sum() == len(divergences)
    naive = [
        sum(left <= value < right for value in divergences) for left, right in zip(edges, edges[1:], strict=False)
    ]
    assert np.abs(np.array(naive) - counts).max() <= 1  # at an edge, by rounding
    assert counts[0] > 0 and counts[-1] > 0


@pytest.mark.parametrize("beta", [0.4, 0.7, 1.3, 0.05])
def test_no_bin_of_the_histogram_straddles_beta(beta, rows, divergences):
    metadata = json.dumps({"settings": {"beta": beta}})
    found = StepStatistics(as_dataset([{**row, "sampling_metadata": metadata} for row in rows]))
    edges, counts = found.histogram()
    place = int(np.abs(np.log(edges / beta)).argmin())
    assert edges[place] == pytest.approx(beta, rel=1e-6)
    assert counts[place:].sum() == (divergences >= np.float32(beta)).sum()
    assert edges[1:] / edges[:-1] == pytest.approx(10**0.1)


def test_a_step_exactly_at_beta_is_counted_as_kept():
    beta = float(np.float32(0.7))  # below 0.7
    row = {**make_rows(1)[0], "completion_ids": [1, 2], "kl_divergence": [beta, np.nextafter(np.float32(0.7), 0)]}
    row.update(step_positions=[], label_ids=[], label_probs=[])
    row["sampling_metadata"] = json.dumps({"settings": {"beta": 0.7}})
    assert StepStatistics(as_dataset([row])).share_kept(0.7) == 0.5


def test_steps_are_grouped_by_position(statistics, rows):
    edges = statistics.position_edges
    assert edges[0] == 0 and edges[-1] >= max(len(row["completion_ids"]) for row in rows)
    for i, (left, right) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = range(left, right)
        assert statistics.steps_by_position[i] == sum(
            t in inside for row in rows for t in range(len(row["completion_ids"]))
        )
        assert statistics.kept_by_position[i] == sum(t in inside for row in rows for t in row["step_positions"])


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_quantiles_by_position_are_those_of_the_group(quantile, statistics, rows):
    found = statistics.quantiles_by_position(quantile)
    for value, left, right in zip(found, statistics.position_edges, statistics.position_edges[1:], strict=False):
        group = [value for row in rows for value in row["kl_divergence"][left:right]]
        assert np.mean(np.array(group) >= value) <= 1 - quantile + 1e-9
        assert np.mean(np.array(group) >= value / 1.0024) >= 1 - quantile - 1 / len(group)


def test_supports_and_masses_are_counted(statistics, rows):
    labels = [probs for row in rows for probs in row["label_probs"]]
    for i, count in enumerate(statistics.support_counts):
        assert count == sum(len(probs) == i + 1 or (i == 9 and len(probs) > 10) for probs in labels)
    for i, count in enumerate(statistics.mass_counts):
        assert count == sum(i <= 10 * max(probs) < i + 1 or (i == 9 and max(probs) == 1) for probs in labels)


def test_gains_are_what_the_label_moves_against_an_even_split(statistics, rows):
    gains, counts = {}, {}
    for row in rows:
        for ids, probs in zip(row["label_ids"], row["label_probs"], strict=True):
            for token, prob in zip(ids, probs, strict=True):
                gains[token] = gains.get(token, 0) + prob - 1 / len(ids)
                counts[token] = counts.get(token, 0) + 1
    found = statistics.gains()
    assert {token.token_id: token.num_steps for token in found} == counts
    for token in found:
        assert token.gain == pytest.approx(gains[token.token_id], abs=1e-5)
    assert [token.gain for token in found] == sorted((token.gain for token in found), reverse=True)


def test_changes_are_the_steps_whose_favourite_was_not_taken(statistics, rows):
    changes = [
        (row["completion_ids"][t], ids[0])
        for row in rows
        for t, ids in zip(row["step_positions"], row["label_ids"], strict=True)
        if row["completion_ids"][t] != ids[0]
    ]
    assert statistics.num_changed == len(changes)
    assert sorted(statistics.changes.elements()) == sorted(changes)


def test_a_dataset_of_one_step_a_row_gives_the_same_numbers(statistics, rows):
    per_step = ("step_positions", "label_ids", "label_probs")
    exploded = [
        {**row, **{name: row[name][k : k + 1] for name in per_step}}
        for row in rows
        for k in range(len(row["step_positions"]))
    ]
    exploded += [row for row in rows if not row["step_positions"]]
    found = StepStatistics(as_dataset(exploded).shuffle(seed=0))
    assert found.num_rows == len(exploded)
    for name in ("num_trajectories", "num_steps", "num_kept", "num_changed"):
        assert getattr(found, name) == getattr(statistics, name)
    assert found.beta_for(0.1) == statistics.beta_for(0.1)
    assert found.support_counts.tolist() == statistics.support_counts.tolist()


def test_kept_steps_are_a_share_of_the_steps_if_rows_come_twice(rows, statistics):
    others = [{**row, "kl_divergence": [2 * value for value in row["kl_divergence"]]} for row in rows]
    for more, shares in ((rows, True), (others, False)):
        found = StepStatistics(as_dataset(rows + more))
        assert (found.num_steps, found.num_kept) == (2 * statistics.num_steps, 2 * statistics.num_kept)
        assert found.steps_by_position.tolist() == (2 * statistics.steps_by_position).tolist()
        assert (found.share_kept(1.0) == statistics.share_kept(1.0)) is shares


def test_selected_rows_alone_count(rows):
    found = StepStatistics(as_dataset(rows).select([3, 5]))
    assert found.num_steps == len(rows[3]["completion_ids"]) + len(rows[5]["completion_ids"])


def test_a_dataset_need_not_say_how_it_was_made(rows):
    found = StepStatistics(as_dataset(rows).remove_columns("sampling_metadata"))
    assert (found.alpha, found.beta) == (None, None)


@pytest.mark.parametrize("metadata", ["[]", "null", '{"settings": 1}', '{"settings": {"beta": "high"}}'])
def test_metadata_of_another_making_says_nothing(metadata, rows):
    found = StepStatistics(as_dataset([{**row, "sampling_metadata": metadata} for row in rows]))
    assert (found.alpha, found.beta) == (None, None)


def test_steps_of_an_unknown_divergence_are_counted_apart(rows):
    known = [{**row, "kl_divergence": list(row["kl_divergence"])} for row in rows]
    for row in known:
        kept = set(row["step_positions"])
        row["kl_divergence"] = [value if t in kept else None for t, value in enumerate(row["kl_divergence"])]
    found, whole = StepStatistics(as_dataset(known)), StepStatistics(as_dataset(rows))
    assert (found.num_steps, found.num_kept) == (whole.num_steps, whole.num_kept)
    assert found.num_known == whole.num_kept < whole.num_steps
    assert found.share_kept(BETA) == 1
    assert found.histogram()[1].sum() == whole.num_kept
    assert found.changes == whole.changes


def test_divergences_of_zero_have_a_place():
    row = {**make_rows(1)[0], "completion_ids": [1, 2], "kl_divergence": [0.0, 0.0]}
    row.update(step_positions=[], label_ids=[], label_probs=[])
    found = StepStatistics(as_dataset([row]))
    assert found.share_kept(BETA) == 0
    assert found.beta_for(0.1) < 1e-9
    assert found.quantiles_by_position(0.5).tolist() == pytest.approx([0, 0], abs=1e-9)
    assert found.gains() == []


# Bad input


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids", "kl_divergence", "step_positions", "label_probs"])
def test_a_missing_column_is_named(column, rows):
    with pytest.raises(ValueError, match=f"The dataset has no column '{column}'; .* `lightreasoner sample`"):
        StepStatistics(as_dataset(rows).remove_columns(column))


def test_no_row_and_no_step_are_refused(rows):
    with pytest.raises(ValueError, match=r"The dataset has no row\. Make it with"):
        StepStatistics(Dataset.from_dict({name: [] for name in STEP_FEATURES}, features=Features(STEP_FEATURES)))
    row = {**rows[0], **{name: [] for name in STEP_FEATURES if name not in ("prompt_ids", "sampling_metadata")}}
    with pytest.raises(ValueError, match="The dataset has no step: every `kl_divergence` is empty"):
        StepStatistics(as_dataset([row]))


def test_what_is_no_dataset_is_refused(rows):
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="must be a `datasets.Dataset`, got `IterableDataset`. Choose one split"):
        StepStatistics(stream)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kl_divergence": [0.1]}, r"there are 1 divergences for \d+ completion tokens"),
        ({"kl_divergence": None}, "kl_divergence is missing"),
        ({"kl_divergence": [float("nan"), 1.0], "completion_ids": [1, 2]}, "negative or not finite"),
        ({"kl_divergence": [-1.0, 1.0], "completion_ids": [1, 2]}, "negative or not finite"),
        ({"step_positions": [10**6]}, "step position 1000000 is outside the completion"),
        ({"label_probs": [[0.5]]}, "sums to 0.5, not to 1"),
        ({"label_ids": [[1, 2]]}, "has 2 ids and 1 probabilities"),
    ],
)
def test_a_row_that_does_not_add_up_is_named(change, reason, rows):
    row = {**rows[1], "step_positions": [0], "label_ids": [[1]], "label_probs": [[1.0]], **change}
    with pytest.raises(ValueError, match=rf"^Row 1 of the dataset cannot be used: .*{reason}"):
        StepStatistics(as_dataset([rows[0], row]))


def test_a_column_of_text_is_refused(rows):
    dataset = Dataset.from_list([{**row, "kl_divergence": ["high"]} for row in rows])
    with pytest.raises(ValueError, match="The column 'kl_divergence' of the dataset must hold lists of numbers, got"):
        StepStatistics(dataset)
