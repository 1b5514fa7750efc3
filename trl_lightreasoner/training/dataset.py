"""The rows of a trainer: kept steps, checked against its settings, and rows of an SFT dataset."""

import os
from datetime import datetime
from typing import Any

from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftModel
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, logging

from ..models.forward import context_length
from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
from ..sampling.contrastive_step_sampler import ContrastiveStepSampler
from ..sampling.metadata import hash_template
from ..steps.beta import check_beta, reaches
from ..steps.dataset import SFT_COLUMNS, STEP_COLUMNS, read_samplings, sampled_beta
from ..steps.prompt_format import has_messages
from ..steps.sft_rows import encode_sft_rows
from ..steps.training_rows import prepare_rows
from ..vocabulary import Vocabulary
from .lightreasoner_config import LightReasonerConfig


logger = logging.get_logger(__name__)

# `Trainer` uploads everything in the model's folder except names that begin like this
_STEPS_FOLDER = "_steps"
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
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows from [`ContrastiveStepSampler`].
        name (`str`): Its name in messages: "train", "eval".
        args ([`LightReasonerConfig`]): Settings of the training.
        vocabulary ([`Vocabulary`]): The model's tokens.
        config ([`~transformers.PretrainedConfig`]): The text config of the model.
        beta (`float`, *optional*): Steps whose divergence is below it are excluded, unless it is a default and no step
            reaches it.

    Raises:
        `ValueError`: If it cannot be used for training. The message says what to do.
    """
    if isinstance(dataset, IterableDataset) and 1 < args.world_size <= dataset.num_shards:
        raise ValueError(
            f"The {name} dataset is streamed from {dataset.num_shards} files, so {args.world_size} processes would "
            "get different numbers of rows and wait for each other forever. Load it without streaming."
        )
    if SFT_COLUMNS[0] in (dataset.column_names or ()):  # it was prepared by another trainer
        dataset = dataset.remove_columns(list(SFT_COLUMNS))
    if beta and beta < (sampled := sampled_beta(dataset)):  # of rows to evaluate: others are refused
        logger.warning(
            f"The {name} dataset was sampled with `beta` = {sampled:g}, and training uses the steps of {beta:g} nats "
            "or more. Its loss is a mean over the steps of higher divergence alone, and cannot be compared with that "
            "of the training."
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


def warn_of_another_template(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Warn if the messages of a Dataset of steps were rendered with another chat template than that of the tokenizer,
    which is saved with the trained model. Streamed rows are not compared.
    """
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names or not has_messages(dataset):
        return
    templates = {sampling.get("chat_template_sha256") for sampling in read_samplings([dataset])}
    if templates - {None, hash_template(tokenizer)}:
        logger.warning(
            "The prompts were sampled with another chat template than that of the model's tokenizer, so the trained "
            "model will be asked in a form that it was not trained on. Pass the tokenizer of the sampling as "
            "`processing_class`, or save it with the model."
        )


def sample_dataset(
    prompts: Dataset,
    model: str | PreTrainedModel | PeftModel,
    amateur_model: str | PreTrainedModel | PeftModel,
    args: LightReasonerConfig,
    sampling_args: ContrastiveSamplingConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> Dataset:
    """
    Sample the kept steps of prompts, each of them once. The steps are saved in the folder of `sampling_args`, by
    default `_steps` in `args.output_dir`.

    Args:
        prompts ([`~datasets.Dataset`]): Prompts for [`~ContrastiveStepSampler.sample`]. model, amateur_model,
            sampling_args, processing_class, quantization_config: Arguments of [`ContrastiveStepSampler`]: expert,
            amateur, args, processing_class and quantization_config.
        args ([`LightReasonerConfig`]): Settings of the training, which control how to load the model unless
            `sampling_args` do.

    Raises:
        `ValueError`: If the rows are kept steps already, or cannot be sampled.
    """
    if "step_positions" in (prompts.column_names or ()):
        raise ValueError(
            "`amateur_model` needs a `train_dataset` of prompts, but this one holds kept steps. Remove it to train on "
            "them."
        )
    if sampling_args is None:
        sampling_args = ContrastiveSamplingConfig(
            os.path.join(args.output_dir, _STEPS_FOLDER),
            model_init_kwargs=args.model_init_kwargs,
            trust_remote_code=args.trust_remote_code,
        )
    check_beta(args.beta, sampling_args.beta)
    sampler = ContrastiveStepSampler(
        model, amateur_model, sampling_args, processing_class, quantization_config=quantization_config
    )
    steps = sampler.sample(prompts)
    del sampler  # frees the models that it has loaded
    clear_device_cache(garbage_collection=True)
    return steps


def prepare_sft_dataset(
    dataset: Dataset,
    args: LightReasonerConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    config: PretrainedConfig,
    date: datetime | None = None,
) -> Dataset:
    """
    Rows of a dataset of demonstrations, encoded by [`encode_sft_rows`], within `args.max_length`.

    Raises:
        `ValueError`: If it cannot be used for training. The message says what to do.
    """
    rows = encode_sft_rows(dataset, tokenizer, date)
    limits = (args.max_length, False, None, context_length(config))
    return prepare_rows(rows, "SFT", vocabulary, config.vocab_size, *limits)


def put_beside(dataset: Dataset | IterableDataset, sft_rows: Dataset) -> Dataset:
    """
    Pair each row with a row of an SFT dataset, in order and repeating.

    Args:
        dataset ([`~datasets.Dataset`]): Result of [`prepare_dataset`].
        sft_rows ([`~datasets.Dataset`]): Result of [`prepare_sft_dataset`].

    Returns:
        [`~datasets.Dataset`] with the additional columns `SFT_COLUMNS`.

    Raises:
        `ValueError`: If the rows are streamed.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "`sft_dataset` cannot be combined with a streamed `train_dataset`. Load it without streaming."
        )
    if len(sft_rows) > len(dataset):
        logger.warning(
            f"Only the first {len(dataset):,} of the {len(sft_rows):,} rows of `sft_dataset` are used, one for each "
            "row of the train dataset."
        )
    beside = sft_rows.select([i % len(sft_rows) for i in range(len(dataset))]).select_columns(list(STEP_COLUMNS))
    beside = beside.rename_columns(dict(zip(STEP_COLUMNS, SFT_COLUMNS, strict=True)))
    return concatenate_datasets([dataset, beside], axis=1)


def _add_length(row: dict[str, Any], column: str) -> dict[str, int]:
    return {column: len(row["prompt_ids"]) + row["step_positions"][-1]}  # a row is cut after its last kept step
