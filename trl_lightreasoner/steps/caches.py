"""What `datasets` writes besides what it is asked for, and where that cannot be written."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
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
            f"The cache of `datasets`, {cache!r}, cannot be written ({reason_of(cause)}). Free disk space, fix the "
            f"permissions, or set the environment variable HF_DATASETS_CACHE to another folder. {hint}".rstrip()
        ) from error


def map_rows(dataset: Dataset, function: Callable, **kwargs: Any) -> Dataset:
    """
    `dataset.map`, wherever the Dataset lies: its result goes into a file beside it, or into the memory where that
    cannot be written, as beside one that was saved to a read-only disk.

    Raises:
        `ValueError`: If the disk does not take the file; names the folder.
    """
    folders = [os.path.dirname(file["filename"]) for file in dataset.cache_files]
    if not all(os.access(folder, os.W_OK) for folder in folders):
        kwargs["keep_in_memory"] = True
    with name_the_cache(folders[0] if folders else None):
        return dataset.map(function, **kwargs)


def reason_of(error: BaseException) -> str:
    """Why a file could not be written, in the words of the system if it has any."""
    cause = _os_error(error)
    if cause is not None and cause.errno is not None:  # around which Arrow and this package put words
        return os.strerror(cause.errno)
    return str(error).strip().partition("\n")[0].rstrip(".")


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the system behind an error, whose number tells it from an `OSError` of ours."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__ or error.__context__
    return error
