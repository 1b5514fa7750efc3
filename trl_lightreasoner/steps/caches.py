"""What `datasets` writes besides what it is asked for, and where that cannot be written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError


_CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


@contextmanager
def name_the_cache(cache_dir: str | None = None, hint: str = "") -> Iterator[None]:
    """
    Let what cannot be written into the cache of `datasets` be told by its name.

    Args:
        cache_dir (`str`, *optional*): The cache, if it is not that of the environment.
        hint (`str`): What there is to say besides.

    Raises:
        `ValueError`: If that is so. What else goes wrong is raised as it is.
    """
    try:
        yield
    except (OSError, DatasetsError) as error:
        cause = _os_error(error)
        cache = str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser())
        # Arrow does not tell of a file, and a file elsewhere is somebody's data
        is_elsewhere = cause is not None and cause.filename and not str(cause.filename).startswith(cache)
        if cause is None or cause.errno not in _CANNOT_WRITE or is_elsewhere:
            raise
        raise ValueError(
            f"The cache of `datasets`, {cache!r}, cannot be written ({reason_of(cause)}). Make room, see to the "
            f"permissions, or name another folder by the environment variable HF_DATASETS_CACHE. {hint}".rstrip()
        ) from error


def map_options(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """
    How to `map` a Dataset wherever it lies: beside one that was saved to a read-only disk, `datasets` cannot write.
    """
    if isinstance(dataset, IterableDataset):
        return {}
    folders = {os.path.dirname(file["filename"]) for file in dataset.cache_files}
    return {} if all(os.access(folder, os.W_OK) for folder in folders) else {"keep_in_memory": True}


def reason_of(error: BaseException) -> str:
    """Why a file could not be written, in the words of the system if it has any."""
    cause = _os_error(error)
    if cause is not None and cause.errno is not None:  # around which Arrow puts words of its own
        return os.strerror(cause.errno)
    return str(error).strip().partition("\n")[0].rstrip(".")


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
