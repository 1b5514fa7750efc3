"""The cache files of `datasets`, and clear errors if they cannot be written."""

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
    Raise an error that names the cache of `datasets` if it cannot be written to.

    Args:
        cache_dir (`str`, *optional*): The cache. If `None`, it is that of the environment.
        hint (`str`): Additional sentence for the message.

    Raises:
        `ValueError`: If the cache cannot be written to. Other errors are raised unchanged.
    """
    try:
        yield
    except (OSError, DatasetsError) as error:
        cause = _os_error(error)
        cache = str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser())
        # Errors of Arrow name no file. A file elsewhere is the user's data, not the cache
        is_elsewhere = cause is not None and cause.filename and not str(cause.filename).startswith(cache)
        if cause is None or cause.errno not in _CANNOT_WRITE or is_elsewhere:
            raise
        raise ValueError(
            f"The cache of `datasets`, {cache!r}, cannot be written ({reason_of(cause)}). Free disk space, fix the "
            f"permissions, or set the environment variable HF_DATASETS_CACHE to another folder. {hint}".rstrip()
        ) from error


def map_rows(dataset: Dataset, function: Callable, **kwargs: Any) -> Dataset:
    """
    `dataset.map` that also works on read-only disks. The result is written to a file beside the Dataset, or kept in
    memory if that folder cannot be written to.

    Raises:
        `ValueError`: If the file cannot be written. The message names the folder.
    """
    folders = [os.path.dirname(file["filename"]) for file in dataset.cache_files]
    if not all(os.access(folder, os.W_OK) for folder in folders):
        kwargs["keep_in_memory"] = True
    with name_the_cache(folders[0] if folders else None):
        return dataset.map(function, **kwargs)


def reason_of(error: BaseException) -> str:
    """Why a file could not be written, in the operating system's words if it gives any."""
    cause = _os_error(error)
    if cause is not None and cause.errno is not None:  # without the words that Arrow and this package add
        return os.strerror(cause.errno)
    return str(error).strip().partition("\n")[0].rstrip(".")


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the system behind an error, whose number tells it from an `OSError` of ours."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__ or error.__context__
    return error
