"""The threshold beta of a training: its default by the steps of a Dataset, and whether their sampling allows it."""

from datasets import Dataset, IterableDataset

from .dataset import sampled_beta
from .training_rows import divergences_of


# The evidence for `choose_beta` and `has_corrections` (docs/evidence.md). A real pair gained most from the steps of
# 1.6 nats or more, at which 22 % of the labels preferred another token. Three tiny pairs, whose labels preferred no
# other token at such steps, gained most from the steps of 0.8 nats or more
_HIGH_BETA, _BETA = 1.6, 0.8
_MIN_CORRECTIONS = 0.1


def choose_beta(dataset: Dataset | IterableDataset) -> float | None:
    """
    Choose the threshold for a Dataset of steps if the user gives none: 1.6 nats if [`has_corrections`], otherwise 0.8.

    Steps of larger divergence teach more, as long as some labels there differ from what the expert would say.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows from [`ContrastiveStepSampler`].

    Returns:
        `float` in nats, at least the threshold of the sampling, or `None` to use all kept steps, if none reaches 0.8
        nats or the divergences are not known before the rows are read.
    """
    steps = _read_steps(dataset)
    if _has_corrections(steps):
        return max(_HIGH_BETA, sampled_beta(dataset))
    return max(_BETA, sampled_beta(dataset)) if any(divergence >= _BETA for divergence, _ in steps) else None


def resolve_beta(dataset: Dataset | IterableDataset, beta: float | None) -> float | None:
    """
    The threshold of a training: `beta`, or [`choose_beta`] if it is `None`.

    Raises:
        `ValueError`: If steps that reach `beta` have no label, because the rows were sampled with a higher threshold.
    """
    if beta is None:
        return choose_beta(dataset)
    check_beta(beta, sampled_beta(dataset))
    return beta


def check_beta(beta: float | None, sampled: float) -> None:
    """Refuse a threshold of a training, if one is given, that is below that of the sampling."""
    if beta is not None and 0 < beta < sampled:
        raise ValueError(
            f"`beta={beta:g}` is below {sampled:g}, the `beta` of the sampling, so steps between the two have no "
            "label. Sample with the lower one, raise it, or set it to 0 for all kept steps."
        )


def has_corrections(dataset: Dataset | IterableDataset) -> bool:
    """
    Whether v_C prefers a token other than the expert's at a tenth or more of the steps of 1.6 nats or more. False if
    this is not known before the rows are read. Some defaults of the training depend on it.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows from [`ContrastiveStepSampler`].
    """
    return _has_corrections(_read_steps(dataset))


def _has_corrections(steps: list[tuple[float, bool]]) -> bool:
    others = [other for divergence, other in steps if divergence >= _HIGH_BETA]
    return bool(others) and sum(others) >= _MIN_CORRECTIONS * len(others)


def _read_steps(dataset: Dataset | IterableDataset) -> list[tuple[float, bool]]:
    """For each kept step, its divergence and whether v_C prefers another token. Empty if any of them is not known."""
    names = ["completion_ids", "kl_divergence", "step_positions", "label_ids", "label_probs"]
    if not isinstance(dataset, Dataset) or not set(names) <= set(dataset.column_names):
        return []
    steps: list[tuple[float, bool]] = []
    for row in dataset.with_format(None).select_columns(names):
        try:
            labels = zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True)
            others = [row["completion_ids"][t] != ids[probs.index(max(probs))] for t, ids, probs in labels]
            divergences = divergences_of(row)
            if None in divergences:
                return []
            steps += zip(divergences, others, strict=True)  # type: ignore[arg-type]  # no `None` here
        except (TypeError, IndexError, ValueError):  # an inconsistent row, which `prepare_rows` reports
            return []
    return steps


def reaches(dataset: Dataset | IterableDataset, beta: float | None) -> bool:
    """Whether a kept step of a Dataset diverges by `beta` or more. False if this is not known before it is read."""
    if not beta or not isinstance(dataset, Dataset) or "kl_divergence" not in dataset.column_names:
        return False
    rows = dataset.with_format(None).select_columns(["kl_divergence", "step_positions"])
    return any((divergence or 0) >= beta for row in rows for divergence in divergences_of(row))
