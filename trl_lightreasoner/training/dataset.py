"""What a trainer reads: rows of kept steps, checked and cut by its settings."""

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PretrainedConfig

from ..evaluation.answering import context_length
from ..steps.training_rows import prepare_rows, reaches
from ..vocabulary import Vocabulary
from .lightreasoner_config import LightReasonerConfig


# Values of `train_sampling_strategy` for which `Trainer` reads the lengths of the rows
_BY_LENGTH = ("group_by_length", "batch_rebalance")


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    name: str,
    args: LightReasonerConfig,
    vocabulary: Vocabulary,
    config: PretrainedConfig,
    beta: float | None,
) -> Dataset | IterableDataset:
    """
    Rows that can be trained on or evaluated.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows as [`ContrastiveStepSampler`] makes
            them.
        name (`str`): What to call it in messages: "train", "eval".
        args ([`LightReasonerConfig`]): Settings of the training.
        vocabulary ([`Vocabulary`]): The model's tokens.
        config ([`~transformers.PretrainedConfig`]): The model's, of its text.
        beta (`float`, *optional*): Steps whose divergence is below it are left out, unless nobody named it and no step
            reaches it.

    Raises:
        `ValueError`: If it cannot be trained on; says what to do.
    """
    if isinstance(dataset, IterableDataset) and 1 < args.world_size <= dataset.num_shards:
        raise ValueError(
            f"The {name} dataset is streamed from {dataset.num_shards} files, of which {args.world_size} processes "
            "would take different numbers of rows, and wait for each other without end. Load it without streaming."
        )
    rows = prepare_rows(
        dataset,
        name,
        vocabulary,
        config.vocab_size,
        args.max_length,
        args.one_step_per_row,
        beta if args.beta is not None or reaches(dataset, beta) else None,
        context_length(config),
    )
    if args.train_sampling_strategy in _BY_LENGTH and isinstance(rows, Dataset):
        rows = rows.map(_add_length, fn_kwargs={"column": args.length_column_name})
    return rows


def _add_length(row: dict[str, Any], column: str) -> dict[str, int]:
    return {column: len(row["prompt_ids"]) + row["step_positions"][-1]}  # behind the last kept step a row is cut
