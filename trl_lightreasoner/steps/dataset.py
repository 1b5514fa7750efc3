"""The Dataset of kept steps: its columns, and how it was made. Each row is one trajectory.

- `prompt`, `completion` (as given; text): for people.
- `prompt_ids`, `completion_ids` (list of int32): what the models saw, including EOS.
- `kl_divergence` (list of float32): D_KL(pi_E || pi_A) at every completion token, null if it is not known.
- `step_positions` (list of int32, ascending): t of each kept step. Its context is prompt_ids + completion_ids[:t].
- `label_ids` (list of list of int32): support of v_C at each kept step, most probable first.
- `label_probs` (list of list of float32): v_C there. Sums to 1.
- `step_weights` (list of float32, optional): weight of each kept step in the mean of the loss. 1 without the column.
- `sampling_metadata` (text): models, revisions, settings and versions as JSON, the same in every row.

`sampling_metadata` is a column because a column survives Parquet, the Hub, streaming and concatenation.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, List, Value

from ..text import name_columns
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
# What to do about rows that are no kept steps
MAKE_STEPS = "Make it with `ContrastiveStepSampler` or `lightreasoner sample`."
# The columns that training needs
STEP_COLUMNS = ("prompt_ids", "completion_ids", "step_positions", "label_ids", "label_probs")
# The same columns of the SFT row that is batched with a row
SFT_COLUMNS = tuple(f"sft_{column}" for column in STEP_COLUMNS)
# Columns with one entry per kept step. `step_weights` exists only if a user has added it
PER_STEP_COLUMNS = ("step_positions", "label_ids", "label_probs", "step_weights")


def sampling_metadata(dataset: Dataset) -> dict[str, Any] | None:
    """
    Models, revisions, settings and versions that a Dataset of steps was made with, or `None` if it has no metadata.

    Example:

    ```python
    >>> sampling_metadata(dataset)["settings"]["beta"]
    0.4

    ```
    """
    if "sampling_metadata" not in dataset.column_names or len(dataset) == 0:
        return None
    return parse_metadata(dataset[0]["sampling_metadata"])


def parse_metadata(text: str) -> Any:
    """The `sampling_metadata` of a row. Raises a `ValueError` if it is not JSON."""
    try:
        return json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The `sampling_metadata` of the dataset is not JSON ({error}). Remove the column, or sample again."
        ) from error


def read_samplings(datasets: Iterable[Dataset]) -> list[dict[str, Any]]:
    """Every distinct `sampling_metadata` of some Datasets. Columns of that name that are not ours are ignored."""
    datasets = [each for each in datasets if "sampling_metadata" in each.column_names]
    return _parse_samplings([text for each in datasets for text in each.unique("sampling_metadata")])


def _parse_samplings(texts: list[Any]) -> list[dict[str, Any]]:
    samplings = []
    for text in dict.fromkeys(texts):
        try:
            sampling = json.loads(text)
        except (TypeError, json.JSONDecodeError):
            continue
        samplings += [sampling] if isinstance(sampling, dict) else []
    return samplings


def name_samplings(dataset: Dataset) -> list[str]:
    """
    If the rows of a Dataset were sampled with several pairs or settings, a description of each: the number of rows,
    the amateur, and whatever differs between them. Otherwise an empty list.

    Example:

    ```python
    >>> two = concatenate_datasets([dataset, dataset_of_another_amateur])  # doctest: +SKIP
    >>> name_samplings(two)  # doctest: +SKIP
    ['60 rows with amateur Qwen/Qwen2.5-0.5B', '40 rows with amateur Qwen/Qwen2.5-Coder-0.5B']

    ```
    """
    if "sampling_metadata" not in dataset.column_names or len(dataset.unique("sampling_metadata")) < 2:
        return []
    counts: Counter[str] = Counter()
    facts: dict[str, dict[str, Any]] = {}
    for text, count in Counter(dataset["sampling_metadata"][:]).items():
        sampling = _parse_samplings([text])
        found = _facts_of(sampling[0]) if sampling else {}
        key = json.dumps(found, sort_keys=True)
        counts[key] += count
        facts[key] = found
    if len(facts) < 2:
        return []
    names = dict.fromkeys(name for each in facts.values() for name in each)
    shown = [name for name in names if name == "amateur" or len({json.dumps(f.get(name)) for f in facts.values()}) > 1]
    described = []
    for key, found in facts.items():
        values = {"amateur": "not known", **{name: found[name] for name in shown if found.get(name) is not None}}
        parts = (f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items())
        described.append(f"{counts[key]:,} row{'s' if counts[key] > 1 else ''} with {', '.join(parts)}")
    return described


def _facts_of(sampling: dict[str, Any]) -> dict[str, Any]:
    """The models and settings of a sampling, by the names that [`name_samplings`] uses."""
    facts: dict[str, Any] = {}
    for role in ("amateur", "expert"):
        model = sampling.get(role)
        if not isinstance(model, dict):
            continue
        for name in ("model", "adapter", "revision", "dtype", "quantization"):
            value = model.get(name)
            if name in ("model", "adapter") and isinstance(value, str):
                value = last_parts(value)
            facts[role if name == "model" else f"{role} {name}"] = value
    settings = sampling.get("settings")
    return facts | (settings if isinstance(settings, dict) else {})


def last_parts(name: str) -> str:
    """An id unchanged, or the last two parts of a path. The rest of a path is private."""
    return "/".join(name.replace("\\", "/").rstrip("/").split("/")[-2:])


def printed_date(dataset: Dataset | IterableDataset) -> datetime | None:
    """
    The date that the prompts of a Dataset of steps show, if their chat template prints today's date. Of several dates
    it is the last. Of streamed rows only the first is read.
    """
    if isinstance(dataset, Dataset):
        samplings = read_samplings([dataset])
    else:
        samplings = _parse_samplings([row.get("sampling_metadata") for row in dataset.take(1)])
    return max((datetime.fromisoformat(each["date"]) for each in samplings if each.get("date")), default=None)


def check_dataset(dataset: Any) -> None:
    """Refuse anything other than a [`~datasets.Dataset`], such as a dict of splits."""
    if not isinstance(dataset, Dataset):
        hint = " Choose a split, such as `dataset['train']`." if hasattr(dataset, "keys") else ""
        raise TypeError(f"`dataset` must be a `datasets.Dataset`, got `{type(dataset).__name__}`.{hint}")


def check_columns(columns: Collection[str], name: str, needed: Iterable[str] = STEP_COLUMNS) -> None:
    """
    Refuse rows without a column of kept steps.

    Args:
        columns (`Collection[str]`): The columns that there are.
        name (`str`): What to call the rows in a message.
        needed (`Iterable[str]`, *optional*): The columns that there must be, by default those of training.

    Raises:
        `ValueError`: If one is missing. The message names it.
    """
    if missing := [column for column in needed if column not in columns]:
        raise ValueError(f"The {name} has no column {missing[0]!r}; it has {name_columns(columns)}. {MAKE_STEPS}")


def count_steps(dataset: Dataset) -> int:
    """Number of kept steps in a Dataset."""
    return sum(map(len, dataset["step_positions"]))


def sampled_beta(dataset: Dataset | IterableDataset) -> float:
    """
    The threshold in nats that a Dataset of steps was sampled with: steps below it have no label. Of several samplings
    it is the highest, and 0 if it is not known, as for streamed rows.
    """
    samplings = read_samplings([dataset]) if isinstance(dataset, Dataset) else []
    settings = [sampling.get("settings") for sampling in samplings]
    betas = [each.get("beta") for each in settings if isinstance(each, dict)]
    return max((beta for beta in betas if isinstance(beta, int | float)), default=0.0)


def kl_quantiles(dataset: Dataset, quantiles: list[float]) -> list[float]:
    """Quantiles of D_KL(pi_E || pi_A) in nats over every step of a Dataset, kept or not."""
    # The format applies a selection or an order of rows, which the stored table knows nothing of
    divergence = pc.list_flatten(dataset.select_columns("kl_divergence").with_format("arrow")[:]["kl_divergence"])
    return pc.quantile(divergence, q=quantiles).to_pylist()


def raise_beta(dataset: Dataset, beta: float) -> Dataset:
    """
    Keep only the steps that a higher `beta` would have kept, without sampling again.

    Args:
        dataset ([`~datasets.Dataset`]): Rows from [`ContrastiveStepSampler`].
        beta (`float`): Threshold in nats, at least the one that the dataset was sampled with.

    Returns:
        [`~datasets.Dataset`]

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
    for text in dataset.unique("sampling_metadata") if "sampling_metadata" in dataset.column_names else []:
        parse_metadata(text)  # whose threshold is not known if it is damaged
    sampled_with = sampled_beta(dataset)
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
        for made in _parse_samplings([row["sampling_metadata"]] if "sampling_metadata" in row else []):
            if isinstance(made.get("settings"), dict):  # otherwise it is somebody else's column
                made["settings"]["beta"] = beta
                row["sampling_metadata"] = json.dumps(made)
        return row

    desc = f"Keeping steps of {beta} nats or more"
    return map_rows(dataset.with_format(None), keep, with_indices=True, desc=desc)
