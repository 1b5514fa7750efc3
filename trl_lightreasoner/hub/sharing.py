"""Upload a Dataset of steps with its card, and write accuracies into a model card. The trainer uploads its model.

Paths on this machine are not uploaded, and tokens are not stored.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard, HfApi, ModelCard, RepoCard
from huggingface_hub.errors import EntryNotFoundError

from ..models.provenance import public_name
from ..steps.caches import map_rows
from ..steps.dataset import check_columns
from .cards import add_evaluation, dataset_card


if TYPE_CHECKING:
    from ..evaluation.evaluation import Evaluation


def push_dataset_to_hub(
    dataset: Dataset | DatasetDict,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """
    Upload a Dataset of steps as Parquet, with a card that documents its columns, its sampling and its size.

    Pushing again replaces the rows of the same split, or of all given splits, and updates the card. Text that people
    wrote into the card is kept. In `sampling_metadata`, folders are named by their last part only.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]):
            Rows from [`ContrastiveStepSampler`], or splits of such rows.
        repo_id (`str`): Repository, as owner/name, or a name alone for the user's own. It is created if missing.
        private (`bool`, *optional*): Whether to make a new repository private.
        token (`str`, *optional*): Token with write permission. If `None`, the one of `hf auth login`.

    Returns:
        `str`: The full id of the repository.

    Raises:
        `ValueError`: If the rows are not steps, or the Hub refuses.

    Example:

    ```python
    from datasets import load_dataset
    from trl_lightreasoner import push_dataset_to_hub

    push_dataset_to_hub(dataset, "me/gsm8k-steps", private=True)
    load_dataset("me/gsm8k-steps", split="train")
    ```
    """
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {str(dataset.split or "train"): dataset}
    for name, split in splits.items():
        check_columns(split.column_names, f"{name} split")
    repo_id = open_repo(repo_id, "dataset", private, token)
    splits = {name.partition("[")[0]: _without_paths(split.with_format(None)) for name, split in splits.items()}
    with hub_errors("Nothing is lost. Push it again, all splits as a `DatasetDict` if their columns have changed."):
        if isinstance(dataset, DatasetDict):
            DatasetDict(splits).push_to_hub(repo_id, token=token)
        else:  # other splits are kept
            ((name, split),) = splits.items()
            split.push_to_hub(repo_id, split=name, token=token)
        card = dataset_card(splits, repo_id, existing=DatasetCard.load(repo_id, token=token))
        _upload_card(card, repo_id, "dataset", token, "Update the dataset card")
    return repo_id


def push_evaluation_to_hub(evaluation: "Evaluation", repo_id: str, token: str | None = None) -> None:
    """
    Write accuracies into a model card on the Hub: a table, and the metadata that the Hub shows with the model.

    Args:
        evaluation ([`~trl_lightreasoner.evaluation.evaluation.Evaluation`]):
            Result of [`~trl_lightreasoner.evaluate`].
        repo_id (`str`): Repository of the model, as owner/name.
        token (`str`, *optional*): Token with write permission. If `None`, the one of `hf auth login`.

    Raises:
        `ValueError`: If the Hub refuses.
    """
    with hub_errors("The accuracies are in results.json. Rerun the same command to push them."):
        try:
            card = ModelCard.load(repo_id, token=token)
        except EntryNotFoundError:
            card = ModelCard("---\n{}\n---\n")
        card.data.model_name = card.data.model_name or repo_id.split("/")[-1]
        add_evaluation(card, evaluation)
        _upload_card(card, repo_id, "model", token, "Add accuracies")


def open_repo(repo_id: str, repo_type: str = "model", private: bool | None = None, token: str | None = None) -> str:
    """
    The full id of a repository, which is created if it is missing. Called before the work, it finds missing write
    access early.

    Raises:
        `ValueError`: If the Hub refuses, or cannot be reached.
    """
    with hub_errors(
        f"Check the id {repo_id!r} and the network, log in with `hf auth login` or pass a token with write "
        "permission, or remove `push_to_hub`."
    ):
        return HfApi(token=token).create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id


def _upload_card(card: RepoCard, repo_id: str, repo_type: str, token: str | None, message: str) -> None:
    # `RepoCard.push_to_hub` first has huggingface.co validate the card, in huggingface_hub 1 even if HF_ENDPOINT names
    # another Hub. A Hub also validates the metadata on upload
    HfApi(token=token).upload_file(
        path_or_fileobj=str(card).encode(),
        path_in_repo="README.md",
        repo_id=repo_id,
        repo_type=repo_type,
        commit_message=message,
    )


@contextmanager
def hub_errors(remedy: str) -> Iterator[None]:
    """A context that turns an error of the Hub into one sentence."""
    try:
        yield
    except (
        Exception
    ) as error:  # huggingface_hub also raises errors of its HTTP client, whose types differ between versions
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"The Hub could not be used: {reason}. {remedy}") from error


def _without_paths(dataset: Dataset) -> Dataset:
    if "sampling_metadata" not in dataset.column_names:
        return dataset
    texts = {text: _public(text) for text in dataset.unique("sampling_metadata")}
    if all(text == public for text, public in texts.items()):
        return dataset

    def rename(batch: dict[str, list]) -> dict[str, list]:
        return {"sampling_metadata": [texts[text] for text in batch["sampling_metadata"]]}

    return map_rows(dataset, rename, batched=True, desc="Leaving out local paths")


def _public(text: str | None) -> str | None:
    try:
        sampling: dict[str, Any] = json.loads(text or "")
        models = [sampling[role] for role in ("expert", "amateur") if sampling[role]]
        for model in models:
            for key in ("model", "adapter"):
                if isinstance(model.get(key), str):
                    model[key] = public_name(model[key])
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError):  # not written by this package
        return text
    return json.dumps(sampling)
