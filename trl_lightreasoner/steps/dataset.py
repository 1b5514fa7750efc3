"""The Dataset of kept steps: its columns and what it remembers of its making. One row is one trajectory.

| column | type | meaning | |---|---|---| | prompt, completion | as given; text | for people | | prompt_ids,
completion_ids | list of int32 | what the models saw; EOS kept | | kl_divergence | list of float32 | D_KL(pi_E, pi_A)
at every completion token, null where it is not known | | step_positions | list of int32, ascending | t of each kept
step: its context is prompt_ids + completion_ids[:t] | | label_ids | list of list of int32 | support of v_C at each
kept step, most probable first | | label_probs | list of list of float32 | v_C there, sums to 1 | | step_weights | list
of float32, optional | weight of each kept step in the mean of the loss; 1 without it | | sampling_metadata | text |
JSON: models, revisions, settings and versions; the same in every row |

`sampling_metadata` is a column because that is what survives everything: Parquet, the Hub, streaming, concatenation.
"""

import json
from collections.abc import Iterable
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, List, Value

from .caches import map_rows


STEP_FEATURES = {
    "prompt_ids": List(Value("int32")),
    "completion_ids": List(Value("int32")),
    "kl_divergence": List(Value("float32")),
    "step_positions": List(Value("int32")),
    "label_ids": List(List(Value("int32"))),
    "label_probs": List(List(Value("float32"))),
    "sampling_metadata": Value("string"),
}
# What training needs of a row
STEP_COLUMNS = ("prompt_ids", "completion_ids", "step_positions", "label_ids", "label_probs")
# The same of the row of an SFT dataset that stands beside a row
SFT_COLUMNS = tuple(f"sft_{column}" for column in STEP_COLUMNS)
# What has an entry for each kept step, the last only if somebody has added it
PER_STEP_COLUMNS = ("step_positions", "label_ids", "label_probs", "step_weights")


def sampling_metadata(dataset: Dataset) -> dict[str, Any] | None:
    """
    Models, revisions, settings and versions that a Dataset of steps was made with, or `None` if it does not say.

    Example:

    ```python
    >>> sampling_metadata(dataset)["settings"]["beta"]
    0.4

    ```
    """
    if "sampling_metadata" not in dataset.column_names or len(dataset) == 0:
        return None
    return _parse_metadata(dataset[0]["sampling_metadata"])


def _parse_metadata(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The `sampling_metadata` of the dataset is not JSON ({error}). Remove the column, or sample again."
        ) from error


def read_samplings(datasets: Iterable[Dataset]) -> list[dict[str, Any]]:
    """Every `sampling_metadata` of some Datasets, without those that are somebody else's."""
    datasets = [each for each in datasets if "sampling_metadata" in each.column_names]
    texts = [text for each in datasets for text in each.unique("sampling_metadata")]
    samplings = []
    for text in dict.fromkeys(texts):
        try:
            sampling = json.loads(text)
        except (TypeError, json.JSONDecodeError):
            continue
        samplings += [sampling] if isinstance(sampling, dict) else []
    return samplings


def check_dataset(dataset: Any) -> None:
    """Refuse what is not a [`~datasets.Dataset`], such as all the splits of one."""
    if not isinstance(dataset, Dataset):
        hint = " Choose a split, such as `dataset['train']`." if hasattr(dataset, "keys") else ""
        raise TypeError(f"`dataset` must be a `datasets.Dataset`, got `{type(dataset).__name__}`.{hint}")


def count_steps(dataset: Dataset) -> int:
    """Number of kept steps of a Dataset."""
    return sum(map(len, dataset["step_positions"]))


def kl_quantiles(dataset: Dataset, quantiles: list[float]) -> list[float]:
    """Quantiles of D_KL(pi_E || pi_A) in nats over every step of a Dataset, kept or not."""
    divergence = pc.list_flatten(dataset.data["kl_divergence"])
    return pc.quantile(divergence, q=quantiles).to_pylist()


def raise_beta(dataset: Dataset, beta: float) -> Dataset:
    """
    The Dataset that a higher `beta` would have given, without sampling again.

    Args:
        dataset ([`~datasets.Dataset`]): Rows from [`ContrastiveStepSampler`].
        beta (`float`): Threshold in nats, at least the one that the dataset was sampled with.

    Raises:
        `ValueError`: If a row was sampled with a higher threshold, so that labels would be missing, or the divergence
            of a kept step is not known.
        `TypeError`: If it is not a [`~datasets.Dataset`].

    Example:

    ```python
    >>> raise_beta(dataset, 0.6)["step_positions"][0]
    [1, 4]

    ```
    """
    check_dataset(dataset)
    metadata = sampling_metadata(dataset)
    # Rows of several samplings can stand in one Dataset
    made_with = [] if metadata is None else map(_parse_metadata, dataset.unique("sampling_metadata"))
    betas = [each["settings"]["beta"] for each in made_with]
    sampled_with = max((each for each in betas if each is not None), default=beta)
    if beta < sampled_with:
        raise ValueError(
            f"The dataset was sampled with beta = {sampled_with}; steps below it have no label. Sample again to lower "
            "it."
        )

    def keep(row: dict[str, Any], index: int) -> dict[str, Any]:
        if None in [row["kl_divergence"][t] for t in row["step_positions"]]:
            raise ValueError(
                f"Row {index} has a kept step of unknown divergence, as from the published scripts. You can train on "
                "the dataset without filtering it."
            )
        kept = [k for k, t in enumerate(row["step_positions"]) if row["kl_divergence"][t] >= beta]
        row.update({name: [row[name][k] for k in kept] for name in PER_STEP_COLUMNS if name in row})
        if metadata is not None:
            made = json.loads(row["sampling_metadata"])
            made["settings"]["beta"] = beta
            row["sampling_metadata"] = json.dumps(made)
        return row

    desc = f"Keeping steps of {beta} nats or more"
    return map_rows(dataset.with_format(None), keep, with_indices=True, desc=desc)
