"""Load a split of a dataset by the name that the user gives: a file, a folder, or an id on the Hub."""

import glob
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ..models.hub_access import cache_if_unreachable
from ..text import name_columns
from .caches import name_the_cache
from .dataset_files import check_encoding, find_fault
from .run_file import finished_files
from .writer import literal_path


_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def load_split(name: str, config: str | None, split: str) -> Dataset:
    """
    Load one split of a dataset.

    Args:
        name (`str`): Id on the Hub, a folder, or a file (JSON lines, Parquet, CSV, text).
        config (`str`, *optional*): Configuration of the dataset.
        split (`str`): Such as `"train"` or `"train[:1000]"`.

    Raises:
        `ValueError`: If there is no such dataset or split, the file has an unknown format or is damaged, or sampling
            into the folder is not finished.
    """
    path = Path(name)
    if not name or not path.exists() and (path.suffix in _BUILDERS or path.is_absolute() or name.startswith(".")):
        raise ValueError(f"There is no file or folder {name!r}.")  # such a name cannot be an id on the Hub
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ValueError(f"{name!r} is not a dataset file. Known endings are {', '.join(_BUILDERS)}.")
    if list(path.glob("*config.json")) and list(path.glob("*.safetensors")):
        raise ValueError(f"{name!r} is a model, not a dataset. Name a file, or the folder of `lightreasoner sample`.")
    if (path / "run.json").is_file() and (path / "shards").is_dir() and not (path / "data").is_dir():
        raise ValueError(
            f"Sampling into {name!r} is not finished. Rerun the same `lightreasoner sample` command to resume it."
        )
    if path.exists():  # otherwise `datasets` reports to its server that a local file was read
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        if not (path / "run.json").is_file():  # damage to our own folders is found by checksum
            check_encoding(name)
    try:
        with name_the_cache(), cache_if_unreachable(name):
            return _load_split(name, config, split)
    except _FAULTS as error:
        is_content = isinstance(error, DatasetsError | UnicodeDecodeError) or path.is_file()
        is_cast = any(part in str(error.__cause__) for part in _OF_A_CAST)
        if is_content and not _is_about_split(error) and (fault := find_fault(path, is_cast)):
            raise ValueError(f"The dataset {name!r} cannot be read: {fault}") from error
        if (explained := _explained(error, name, split)) is None:
            raise
        raise explained from error


# What `datasets` raises: StopIteration for an empty JSON file, and ValueError for errors of pandas and Arrow
_FAULTS = (OSError, DatasetsError, StopIteration, ValueError, TypeError)
_NO_ROW, _NO_SPLIT = "corresponds to no data", "Unknown split"
_OF_A_CAST = ("Couldn't cast", "as a scalar of type", "converting to")


def _is_about_split(error: Exception) -> bool:
    return isinstance(error, ValueError) and any(part in str(error) for part in (_NO_ROW, _NO_SPLIT))


def _explained(error: Exception, name: str, split: str) -> ValueError | None:
    """An error of `datasets`, reworded to say what to do. `None` for errors that already say it."""
    if isinstance(error, OSError):
        return ValueError(
            f"The dataset {name!r} cannot be loaded: {_first_line(error)}. It must be a file "
            f"({', '.join(_BUILDERS)}), a folder, or the id of a dataset on the Hub. Private and gated ones need `hf "
            "auth login`, offline ones must be in the cache."
        )
    if isinstance(error, DatasetsError | StopIteration | pa.ArrowInvalid | TypeError):
        reason = _first_line(error.__cause__ or error) or "it is empty"
        return ValueError(f"The dataset {name!r} cannot be read: {reason}. Repair or replace the file.")
    if _NO_ROW in str(error):
        return ValueError(f"The dataset {name!r} has no row in its split {split!r}.")
    if _NO_SPLIT in str(error):
        return ValueError(
            f"The dataset {name!r} has no split {split!r}: {_first_line(error)}. Rows of another split can be held "
            "out, such as 'train[:95%]' and 'train[95%:]'."
        )
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _load_split(name: str, config: str | None, split: str) -> Dataset:
    path = Path(name)
    if path.is_file():
        return load_dataset(_BUILDERS[path.suffix], data_files=literal_path(name), split=split)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # written by save_to_disk
        dataset = load_from_disk(name)
        dataset = dataset if isinstance(dataset, DatasetDict) else DatasetDict({"train": dataset})
        if split not in dataset:
            raise ValueError(f"There is no split {split!r} in {name!r}. It has {name_columns(dataset)}.")
        return dataset[split]
    # A bare name could match another folder in the cache of `datasets`, hence builders and absolute paths
    if config is None and (files := finished_files(path)):
        return load_dataset("parquet", data_files={"train": [*map(literal_path, files)]}, split=split)
    if config is None and list((path / "data").glob("*.parquet")):
        return load_dataset("parquet", data_dir=literal_path(path / "data"), split=split)
    if not path.is_dir():
        return load_dataset(name, name=config, split=split)
    folder = str(path.resolve())
    if glob.has_magic(folder):
        raise ValueError(f"{folder!r} would be read as a glob pattern. Rename the folder, or name a file in it.")
    return load_dataset(folder, name=config, split=split)
