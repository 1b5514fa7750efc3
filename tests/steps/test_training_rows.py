import logging
import math

import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, LargeList, List, Value

from trl_lightreasoner.steps.training_rows import check_row, prepare_rows
from trl_lightreasoner.vocabulary import Vocabulary


# Ten tokens and two padded columns
VOCABULARY, WIDTH = Vocabulary(list(range(10))), 12
ROW = {
    "prompt_ids": [1, 2, 3],
    "completion_ids": [4, 5, 6, 7],
    "step_positions": [0, 2, 3],
    "label_ids": [[4], [6, 5], [7, 8, 9]],
    "label_probs": [[1.0], [0.75, 0.25], [0.5, 0.25, 0.25]],
}
ONE_STEP = {**ROW, "step_positions": [1], "label_ids": [[5, 0]], "label_probs": [[0.5, 0.5]]}
FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(Value("int32")),
        "step_positions": List(Value("int32")),
        "label_ids": List(List(Value("int32"))),
        "label_probs": List(List(Value("float32"))),
    }
)


def dataset_of(*rows) -> Dataset:
    return Dataset.from_list(list(rows), features=FEATURES)


def prepare(dataset, max_length=None, one_step_per_row=False, beta=None, context=None):
    return prepare_rows(dataset, "train", VOCABULARY, WIDTH, max_length, one_step_per_row, beta, context)


def test_a_good_dataset_is_left_as_it_is():
    assert prepare(dataset_of(ROW, ONE_STEP)).to_list() == [ROW, ONE_STEP]


def turned(row: dict) -> dict:
    """The row with its labels in another order, as another program may write them."""
    return {**row, **{column: [part[::-1] for part in row[column]] for column in ("label_ids", "label_probs")}}


@pytest.mark.parametrize("iterable", [False, True])
def test_the_most_probable_token_of_a_label_comes_first(iterable):
    dataset = dataset_of(turned(ROW))
    (row,) = list(prepare(dataset.to_iterable_dataset() if iterable else dataset))
    expected = {"label_ids": [[4], [6, 5], [7, 9, 8]], "label_probs": ROW["label_probs"]}
    assert row == {**ROW, **expected}


MALFORMED = {
    "position outside the completion": (
        {"step_positions": [0, 2, 4]},
        "step position 4 is outside the completion of 4 tokens",
    ),
    "negative position": ({"step_positions": [-1, 2, 3]}, "step position -1 is outside the completion"),
    "positions not ascending": ({"step_positions": [0, 3, 2]}, r"not ascending: \[0, 3, 2\]"),
    "a position twice": ({"step_positions": [0, 2, 2]}, r"not ascending: \[0, 2, 2\]"),
    "more positions than labels": (
        {"step_positions": [0, 1, 2, 3]},
        "4 step positions, 3 lists of label ids and 3 lists of label probabilities",
    ),
    "fewer probabilities than labels": (
        {"label_probs": ROW["label_probs"][:2]},
        "3 step positions, 3 lists of label ids and 2 lists of label probabilities",
    ),
    "a label of unequal lengths": ({"label_ids": [[4], [6], [7, 8, 9]]}, "label at step 2 has 1 ids and 2 prob"),
    "empty label": (
        {"label_ids": [[], *ROW["label_ids"][1:]], "label_probs": [[], *ROW["label_probs"][1:]]},
        "label at step 0 has 0 ids",
    ),
    "negative probability": (
        {"label_probs": [[1.0], [1.25, -0.25], [0.5, 0.25, 0.25]]},
        r"label at step 2 has a probability that is negative or not finite: \[1.25, -0.25\]",
    ),
    "NaN": ({"label_probs": [[math.nan], *ROW["label_probs"][1:]]}, "label at step 0 .* not finite"),
    "infinity": ({"label_probs": [[math.inf], *ROW["label_probs"][1:]]}, "label at step 0 .* not finite"),
    "probabilities that do not sum to 1": (
        {"label_probs": [[1.0], [0.75, 0.25], [0.5, 0.25, 0.125]]},
        "label at step 3 sums to 0.875, not to 1",
    ),
    "a token twice": ({"label_ids": [[4], [6, 6], [7, 8, 9]]}, r"label at step 2 names a token twice: \[6, 6\]"),
    "a label in a padded column": ({"label_ids": [[10], [6, 5], [7, 8, 9]]}, "label id 10 at step 0 is outside"),
    "a label outside the logits": ({"label_ids": [[4], [6, 99], [7, 8, 9]]}, "label id 99 at step 2 is outside"),
    "a negative label": ({"label_ids": [[4], [6, -1], [7, 8, 9]]}, "label id -1 at step 2 is outside"),
    "a prompt outside the embeddings": ({"prompt_ids": [1, 12, 3]}, "token id 12 is outside the model's 12 embedd"),
    "a completion outside the embeddings": ({"completion_ids": [4, 5, 6, 99]}, "token id 99 is outside"),
    "a negative token": ({"completion_ids": [4, 5, 6, -1]}, "token id -1 is outside"),
    "step 0 without a prompt": ({"prompt_ids": []}, "step position 0 has no context, because the prompt is empty"),
    **{f"no {column}": ({column: None}, f"{column} is missing") for column in ROW},
    "a token missing": ({"prompt_ids": [1, None, 3]}, "prompt_ids has a gap"),
    "a position missing": ({"step_positions": [0, None, 3]}, "step_positions has a gap"),
    "a label missing": ({"label_ids": [[4], None, [7, 8, 9]]}, "label_ids has a gap"),
    "a label id missing": ({"label_ids": [[4], [6, None], [7, 8, 9]]}, "label_ids has a gap"),
    "a probability missing": ({"label_probs": [[None], *ROW["label_probs"][1:]]}, "label_probs has a gap"),
}


@pytest.mark.parametrize(("changes", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_refused_by_number_and_reason(changes, reason):
    with pytest.raises(ValueError, match=f"^Row 1 of the train dataset cannot be used for training: .*{reason}"):
        prepare(dataset_of(ROW, {**ROW, **changes}, ROW))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1.0, 2.0], "there are 3 step positions and 2 step weights"),
        ([1.0, math.nan, 2.0], "the weight of step 2 must be 0, or between 1e-30 and 1e.30, and is nan"),
        ([1.0, 2.0, math.inf], "the weight of step 3 must be 0, or between 1e-30 and 1e.30, and is inf"),
        # In single precision their mean would be 0, or not a number
        ([1.0, 2.0, 1e-50], "the weight of step 3 must be 0, or between 1e-30 and 1e.30, and is 1e-50"),
        ([1.0, 2.0, 3e38], "the weight of step 3 must be 0, or between 1e-30 and 1e.30, and is 3e.38"),
        ([-0.5, 1.0, 2.0], "the weight of step 0 must be 0, or between 1e-30 and 1e.30, and is -0.5"),
        ([1.0, None, 2.0], "step_weights has a gap"),
        (None, "step_weights is missing"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused_by_row(weights, reason):
    rows = [{**ROW, "step_weights": [1.0, 0.0, 2.5]}, {**ROW, "step_weights": weights}]
    features = Features({**FEATURES, "step_weights": List(Value("float64"))})
    with pytest.raises(ValueError, match=f"^Row 1 of the train dataset cannot be used for training: {reason}"):
        prepare(Dataset.from_list(rows, features=features))


@pytest.mark.parametrize("weights", [["1", "2", "3"], [True, False, True], 1.0])
def test_weights_that_are_no_numbers_are_refused(weights):
    rows = dataset_of(ROW).add_column("step_weights", [weights])
    with pytest.raises(ValueError, match="'step_weights' of the train dataset must hold lists of numbers, .* remove"):
        prepare(rows)


def test_weights_that_are_all_0_are_refused():
    with pytest.raises(ValueError, match="has no step to train on: all of its `step_weights` are 0"):
        prepare(dataset_of(ROW).add_column("step_weights", [[0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("one_step_per_row", [False, True])
def test_weights_stay_with_their_steps(one_step_per_row):
    # The contexts of the three steps have 3, 5 and 6 tokens
    rows = dataset_of(ROW).add_column("step_weights", [[0.5, 1.0, 2.0]])
    prepared = prepare(rows, max_length=5, one_step_per_row=one_step_per_row)
    assert prepared["step_weights"][:] == ([[0.5], [1.0]] if one_step_per_row else [[0.5, 1.0]])


def test_a_malformed_row_of_an_iterable_dataset_is_refused_when_it_is_read():
    rows = prepare(dataset_of(*[ROW] * 1000, {**ROW, "step_positions": [0, 2, 4]}).to_iterable_dataset())
    with pytest.raises(
        ValueError, match="^Row 1000 of the train dataset cannot be used for training: step position 4"
    ):
        list(rows)


@pytest.mark.parametrize("beta", [None, 9.0])
def test_streamed_rows_without_a_step_to_train_on_are_refused(beta):
    row = with_divergence([0.1, 2.0, 2.0, 2.0])
    unkept = {**row, "step_positions": [], "label_ids": [], "label_probs": []}
    rows = IterableDataset.from_generator(lambda: iter([row if beta else unkept] * 3))
    with pytest.raises(ValueError, match="^The train dataset has no step to train on: none of its streamed rows has"):
        prepare(rows, beta=beta)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_ids": [1.5, 2, 3]}, "prompt_ids does not hold whole numbers, but float"),
        ({"completion_ids": [4, 5.0, 6, 7]}, "completion_ids does not hold whole numbers, but float"),
        ({"completion_ids": [True, 5, 6, 7]}, "completion_ids does not hold whole numbers, but bool"),
        ({"prompt_ids": np.array([1, 2, 3])}, "prompt_ids does not hold lists of whole numbers"),
        ({"prompt_ids": "text"}, "prompt_ids does not hold lists of whole numbers"),
        ({"step_positions": 3}, "step_positions does not hold lists of whole numbers"),
        ({"step_positions": [0, "2", 3]}, "step_positions does not hold whole numbers, but str"),
        ({"label_ids": [4, 6, 7]}, "label_ids does not hold lists of whole numbers"),
        ({"label_ids": [[4], [6.5, 5], [7, 8, 9]]}, "label_ids does not hold whole numbers, but float"),
        ({"label_probs": [[True], [0.75, 0.25], [0.5, 0.25, 0.25]]}, "label_probs does not hold numbers, but bool"),
        ({"label_probs": [[1], [0.75, "0"], [0.5, 0.25, 0.25]]}, "label_probs does not hold numbers, but str"),
        ({"kl_divergence": 0.5}, "kl_divergence does not hold lists of numbers, but 0.5"),
        ({"kl_divergence": ["high"] * 4}, "kl_divergence does not hold numbers, but 'high'"),
        ({"kl_divergence": [math.nan] * 4}, "kl_divergence does not hold numbers, but nan"),
    ],
)
def test_streamed_rows_without_types_are_checked_by_their_values(changes, reason):
    rows = IterableDataset.from_generator(lambda: iter([{**with_divergence([2.0] * 4), **changes}]))
    with pytest.raises(ValueError, match=f"^Row 0 of the train dataset cannot be used for training: {reason}"):
        prepare(rows, beta=0.5)


def test_steps_beyond_the_models_context_are_dropped_as_those_beyond_max_length(caplog):
    for max_length in (None, 6):
        assert prepare(dataset_of(ROW), max_length, context=5)[0]["step_positions"] == [0, 2]
    assert (
        caplog.text.count("Dropped 1 of 3 steps of the train dataset, which are beyond the model's context of 5") == 2
    )
    with pytest.raises(ValueError, match="all 3 of its steps are beyond the model's context of 2 tokens; sample with"):
        prepare(dataset_of(ROW), context=2)


def test_the_row_number_is_that_of_the_whole_dataset():
    bad = {**ROW, "step_positions": [0, 3, 2]}
    with pytest.raises(ValueError, match="^Row 1500 of the train dataset"):
        prepare(dataset_of(*[ONE_STEP] * 1500, bad))


def test_context_tokens_may_lie_in_padded_columns():
    # The amateur's and the expert's added tokens have embeddings whether or not the tokenizer names them
    check_row({**ROW, "prompt_ids": [1, 2, 11]}, set(range(10)), WIDTH)


def test_a_label_rounded_to_half_precision_is_accepted():
    check_row({**ROW, "label_probs": [[1.0], [0.7505, 0.2497], [0.5, 0.25, 0.25]]}, set(range(10)), WIDTH)


def test_an_empty_prompt_is_accepted_where_every_step_has_a_context():
    check_row({**ONE_STEP, "prompt_ids": []}, set(range(10)), WIDTH)


def test_a_context_of_max_length_is_kept_and_a_longer_one_dropped(caplog):
    # The contexts of the three steps have 3, 5 and 6 tokens
    prepared = prepare(dataset_of(ROW), max_length=5)
    assert prepared.to_list() == [
        {**ROW, "step_positions": [0, 2], "label_ids": ROW["label_ids"][:2], "label_probs": ROW["label_probs"][:2]}
    ]


def test_dropped_steps_are_counted_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="trl_lightreasoner.steps.training_rows"):
        prepare(dataset_of(ROW, ONE_STEP, ROW), max_length=5)
    assert [record.message for record in caplog.records] == [
        "Dropped 2 of 7 steps of the train dataset, which are beyond `max_length=5`."
    ]


@pytest.mark.parametrize("max_length", [6, None])
def test_nothing_is_dropped_or_said_where_every_step_fits(max_length, caplog):
    assert prepare(dataset_of(ROW), max_length=max_length).to_list() == [ROW]
    assert not caplog.records


def test_a_row_whose_steps_are_all_too_long_is_left_out():
    prepared = prepare(dataset_of({**ROW, "prompt_ids": [1] * 9}, ROW), max_length=6)
    assert prepared.to_list() == [ROW]


def test_a_row_without_a_kept_step_is_left_out():
    none = {**ROW, "step_positions": [], "label_ids": [], "label_probs": []}
    assert prepare(dataset_of(none, ROW)).to_list() == [ROW]


def test_a_dataset_without_a_kept_step_is_refused_with_the_remedy():
    none = {**ROW, "step_positions": [], "label_ids": [], "label_probs": []}
    with pytest.raises(ValueError, match="train dataset has no step to train on: .* lower `beta` or a weaker amateur"):
        prepare(dataset_of(none, none))


def test_a_dataset_whose_steps_are_all_too_long_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="all 3 of its steps are beyond `max_length=2`; raise it"):
        prepare(dataset_of(ROW), max_length=2)


@pytest.mark.parametrize("column", ROW)
@pytest.mark.parametrize("iterable", [False, True])
def test_a_missing_column_is_refused(column, iterable):
    dataset = dataset_of(ROW).remove_columns(column)
    with pytest.raises(ValueError, match=f"train dataset has no column '{column}'.*`lightreasoner sample`"):
        prepare(dataset.to_iterable_dataset() if iterable else dataset)


def test_a_missing_column_of_an_iterable_dataset_that_does_not_name_its_columns_is_refused_when_it_is_read():
    rows = IterableDataset.from_generator(lambda: iter([{"prompt_ids": [1]}]))
    with pytest.raises(
        ValueError, match="Row 0 of the train dataset cannot be used for training: completion_ids is missing"
    ):
        list(prepare(rows))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("prompt_ids", "text"),
        ("completion_ids", 3),
        ("step_positions", ["0", "2", "3"]),
        ("step_positions", [0.5, 2.0, 3.0]),
        ("prompt_ids", [1.5, 2.0, 3.0]),
        ("label_ids", [4, 6, 7]),
        ("label_ids", [[4.0], [6.0, 5.0], [7.0, 8.0, 9.0]]),
        ("label_probs", [1.0, 0.75, 0.5]),
        ("label_probs", [["1.0"], ["0.75", "0.25"], ["0.5"]]),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(column, values):
    with pytest.raises(ValueError, match=f"column '{column}' of the train dataset must hold lists of"):
        prepare(Dataset.from_list([{**ROW, column: values}]))


def test_types_widened_by_a_file_format_are_accepted(tmp_path):
    dataset = dataset_of(ROW, ONE_STEP)
    dataset.to_json(tmp_path / "rows.jsonl")
    widened = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert widened.features["prompt_ids"] == List(Value("int64"))
    assert widened.features["label_probs"] == List(List(Value("float64")))
    assert prepare(widened).to_list() == [ROW, ONE_STEP]


def test_large_lists_are_accepted():
    large = Features(
        {**FEATURES, "prompt_ids": LargeList(Value("int32")), "label_ids": LargeList(List(Value("int32")))}
    )
    assert prepare(dataset_of(ROW).cast(large)).to_list() == [ROW]


@pytest.mark.parametrize("format_type", ["torch", "numpy"])
def test_a_dataset_with_a_format_gives_the_same_rows(format_type):
    assert prepare(dataset_of(ROW, ONE_STEP).with_format(format_type))[:] == prepare(dataset_of(ROW, ONE_STEP))[:]


@pytest.mark.parametrize("iterable", [False, True])
def test_extra_columns_are_carried(iterable):
    dataset = dataset_of(ROW, ONE_STEP, ROW).add_column("id", ["a", "b", "c"])
    prepared = prepare(dataset.to_iterable_dataset() if iterable else dataset, one_step_per_row=True)
    assert [row["id"] for row in prepared] == ["a", "a", "a", "b", "c", "c", "c"]


@pytest.mark.parametrize("iterable", [False, True])
def test_one_step_per_row_makes_a_row_of_every_step(iterable):
    dataset = dataset_of(ROW, ONE_STEP)
    prepared = prepare(dataset.to_iterable_dataset() if iterable else dataset, one_step_per_row=True)
    assert list(prepared) == [
        {**ROW, "step_positions": [0], "label_ids": [[4]], "label_probs": [[1.0]]},
        {**ROW, "step_positions": [2], "label_ids": [[6, 5]], "label_probs": [[0.75, 0.25]]},
        {**ROW, "step_positions": [3], "label_ids": [[7, 8, 9]], "label_probs": [[0.5, 0.25, 0.25]]},
        ONE_STEP,
    ]


def test_one_step_per_row_drops_only_the_steps_beyond_max_length():
    prepared = prepare(dataset_of(ROW), max_length=5, one_step_per_row=True)
    assert prepared["step_positions"][:] == [[0], [2]]


# The threshold


def with_divergence(divergence: list[float | None], **columns) -> dict:
    return {**ROW, **columns, "kl_divergence": divergence}


@pytest.mark.parametrize("iterable", [False, True])
def test_steps_below_beta_are_left_out(iterable):
    dataset = Dataset.from_list([with_divergence([0.7, 9.0, 0.8, 1.9]), with_divergence([0.1] * 4)])
    rows = prepare(dataset.to_iterable_dataset() if iterable else dataset, beta=0.8)
    (row,) = list(rows)
    assert (row["step_positions"], row["label_ids"]) == ([2, 3], ROW["label_ids"][1:])
    assert row["label_probs"] == ROW["label_probs"][1:]


def test_beta_needs_the_divergence_of_every_step():
    message = "Row 0 .* unknown divergence; set `beta` to 0 to train on all steps"
    with pytest.raises(ValueError, match=message):
        prepare(Dataset.from_list([with_divergence([2.0, 2.0, None, 2.0])]), beta=0.8)


def test_a_dataset_below_beta_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="none of its 3 steps reaches `beta=3.0`; lower it"):
        prepare(Dataset.from_list([with_divergence([2.0] * 4)]), beta=3.0)


def test_too_long_steps_are_counted_whatever_the_threshold(caplog):
    prepare(Dataset.from_list([with_divergence([0.1, 2.0, 2.0, 2.0])]), max_length=5, beta=0.8)
    assert "Dropped 1 of 3 steps of the train dataset, which are beyond `max_length=5`." in caplog.text
