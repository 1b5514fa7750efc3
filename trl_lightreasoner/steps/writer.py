"""The files under `output_dir` while a Dataset is made, of steps or of answers, so that nothing of it can be lost.

    output_dir/run.json           what is being made: models, settings, prompts
    output_dir/shards/            a batch a file, NUMBER-SHA256.parquet, complete or not there at all
    output_dir/merging/           the shards on their way to the finished Dataset
    output_dir/data/              the finished Dataset, in the order of the input

A file is written under another name, flushed to the disk and renamed, so that a process may be killed at any moment: a
later run with the same models, settings and prompts goes on behind the last complete batch. A shard whose content does
not match the checksum in its name is made again. Where several processes write, one opens and finishes the run.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from filelock import FileLock, Timeout
from transformers import logging

from .dataset import STEP_FEATURES


logger = logging.get_logger(__name__)

_MAX_FILE_BYTES = 500 * 2**20
_ROW = "_row"  # place of a row in the input, while rows are written in the order they are made


class StepWriter:
    """
    Writes rows as they are made and gives them back in the order of the input. Memory holds one batch.

    Args:
        output_dir (`str`): The folder; made if it is missing.
        dataset ([`~datasets.Dataset`]): The input, whose columns are carried along.
        overwrite (`bool`): Whether rows that are there already are deleted instead of continued.
        features (`dict`): Types of the columns that are made, beside `completion`.

    Raises:
        `ValueError`: If the folder is a file or holds something else, or an input column has the name of one of ours.
    """

    def __init__(
        self, output_dir: str, dataset: Dataset, overwrite: bool = False, features: dict[str, Any] = STEP_FEATURES
    ):
        taken = [name for name in (*features, _ROW) if name in dataset.column_names]
        if taken:
            raise ValueError(
                f"The input already has columns named {taken}, which sampling writes. Rename or remove them first."
            )
        self.folder = Path(output_dir)
        check_folder(output_dir)
        if "::" in str(self.folder.absolute()):
            raise ValueError(
                f"'::' in {output_dir!r} is taken for a chain of file systems. Choose another `output_dir`."
            )
        self.overwrite = overwrite
        self.run = self.folder / "run.json"
        self.shards, self.merging, self.data = (self.folder / name for name in ("shards", "merging", "data"))
        if (self.shards.exists() or self.data.exists()) and not self.run.exists() and not overwrite:
            raise ValueError(
                f"{output_dir!r} holds files that no run of this version left there. Choose another `output_dir`, or "
                "set `overwrite_output_dir=True` to delete them."
            )
        self.input = dataset.with_format("arrow")
        completion = {} if "completion" in dataset.column_names else {"completion": Value("string")}
        self.features = Features({**dataset.features, **completion, **features})
        self.schema = Features({**self.features, _ROW: Value("int64")}).arrow_schema
        self.lock = FileLock(self.folder / ".lock")

    def open(self, identity: dict[str, Any], metadata: dict[str, Any]) -> set[int]:
        """
        Take the folder for this process, until [`~StepWriter.close`].

        Args:
            identity (`dict`): Names and values of everything that the rows depend on. JSON.
            metadata (`dict`): What [`sampling_metadata`] is to return. JSON.

        Returns:
            `set[int]`: Rows of the input that are there already.

        Raises:
            `ValueError`: If another process has the folder, or it was begun with another identity.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another run is writing into {str(self.folder)!r}. Wait for it, or choose another `output_dir`."
            ) from None
        except OSError as error:
            raise OSError(
                f"Cannot write to {str(self.folder)!r} ({error.strerror}). Choose another `output_dir`, or see to the "
                "permissions."
            ) from error
        if self.overwrite:
            for path in (self.shards, self.merging, self.data):
                shutil.rmtree(path, ignore_errors=True)
            self.run.unlink(missing_ok=True)
        if self.run.exists():
            self.begun = json.loads(self.run.read_text(encoding="utf-8"))
            self._check_identity(self.begun["identity"], json.loads(json.dumps(identity)))
        else:
            self.begun = {"identity": identity, "metadata": metadata}
            self._write(self.run, json.dumps(self.begun, indent=2).encode())
        self._set_metadata()
        if self.data.exists():
            files = self.begun.get("files", {})
            if files and self._checksums(self.data, files) == files:
                return set(range(len(self.input)))
            logger.warning(f"{self.data} is damaged; everything is made again.")
            shutil.rmtree(self.data)
        self.shards.mkdir(exist_ok=True)
        done = set()
        for path in self._sound_shards():
            done.update(pq.read_table(path, columns=[_ROW])[_ROW].to_pylist())
        return done

    def join(self) -> None:
        """
        Write into the folder that another process of the same run has opened.

        Raises:
            `ValueError`: If the folder is not there.
        """
        if not self.run.exists():
            raise ValueError(
                f"There is no {str(self.run)!r}, which the main process has made. Choose an `output_dir` that all "
                "processes share."
            )
        self.begun = json.loads(self.run.read_text(encoding="utf-8"))
        self._set_metadata()

    def _set_metadata(self) -> None:
        self.metadata = json.dumps(self.begun["metadata"])  # of the first run, the same in every row

    def close(self) -> None:
        """Leave the folder to others. Does nothing if this process does not have it."""
        self.lock.release()

    def write(self, indices: list[int], columns: dict[str, list]) -> None:
        """Write the rows `indices` of the input, with the new `columns` beside their own."""
        table = self.input[indices]
        columns = {**columns, _ROW: indices}
        if "sampling_metadata" in self.features:
            columns["sampling_metadata"] = [self.metadata] * len(indices)
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, self.schema.field(name).type))
        buffer = pa.BufferOutputStream()
        pq.write_table(table.select(self.schema.names).cast(self.schema), buffer)
        content = buffer.getvalue().to_pybytes()
        self._write(self.shards / f"{min(indices):09d}-{hashlib.sha256(content).hexdigest()}.parquet", content)

    def finish(self, rows: set[int]) -> None:
        """
        Put the rows in the order of the input.

        Args:
            rows (`set[int]`): Rows of the input that must be there.

        Raises:
            `ValueError`: If some are not.
        """
        if not self.data.exists():
            self._merge(rows)
        shutil.rmtree(self.shards, ignore_errors=True)
        shutil.rmtree(self.merging, ignore_errors=True)

    def load(self, cache_dir: str | None = None) -> Dataset:
        """The finished Dataset, memory-mapped; `cache_dir` is where, if not in the cache of `datasets`."""
        files = json.loads(self.run.read_text(encoding="utf-8"))["files"]
        return Dataset.from_parquet([literal_path(self.data / name) for name in sorted(files)], cache_dir=cache_dir)

    def _merge(self, rows: set[int]) -> None:
        shutil.rmtree(self.merging, ignore_errors=True)  # of a run that was killed here
        data = self.merging / "data"
        data.mkdir(parents=True)
        shards = [str(path) for path in sorted(self.shards.glob("*.parquet"))]
        missing = rows - {row for shard in shards for row in pq.read_table(shard, columns=[_ROW])[_ROW].to_pylist()}
        if missing:
            raise ValueError(
                f"{len(missing):,} of {len(rows):,} rows are missing in {str(self.shards)!r}, first row "
                f"{min(missing)}. Choose an `output_dir` that all processes share."
            )
        cache = os.path.abspath(self.merging / "cache")
        made = Dataset.from_parquet([literal_path(path) for path in shards], cache_dir=cache)
        made = made.select(np.argsort(made.data[_ROW].to_numpy(), kind="stable")).remove_columns(_ROW)
        num_files = 1 + made.data.nbytes // _MAX_FILE_BYTES
        for i in range(num_files):
            path = data / f"train-{i:05d}-of-{num_files:05d}.parquet"
            made.shard(num_files, i, contiguous=True).to_parquet(path)
            _sync(path)
        self.begun["files"] = self._checksums(data, os.listdir(data))
        self._write(self.run, json.dumps(self.begun, indent=2).encode())
        os.replace(data, self.data)
        _sync(self.folder)

    def _check_identity(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for name in [*new, *(name for name in old if name not in new)]:
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{str(self.folder)!r} was begun with {name} = {old.get(name)!r}, but it is now "
                    f"{new.get(name)!r}. Set it back to go on, choose another `output_dir`, or set "
                    "`overwrite_output_dir=True` to delete what is there."
                )

    def _checksums(self, folder: Path, names: Iterable[str]) -> dict[str, str]:
        checksums = {}
        for path in (folder / name for name in sorted(names)):
            if path.is_file():
                with open(path, "rb") as file:
                    checksums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return checksums

    def _sound_shards(self) -> list[Path]:
        sound = []
        for path in sorted(self.shards.iterdir()):
            content = path.read_bytes()
            if path.suffix == ".parquet" and path.stem.endswith(hashlib.sha256(content).hexdigest()):
                sound.append(path)
                continue
            if path.suffix == ".parquet":  # not what a killed process leaves behind, which has another ending
                logger.warning(f"{path} is damaged; its rows are made again.")
            path.unlink()
        return sound

    def _write(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync(path.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"Cannot write to {str(path.parent)!r} ({error.strerror}). What was written before is kept: make "
                "room, or see to the permissions, and run the same again to go on."
            ) from error


def describe_rows(dataset: Dataset) -> dict[str, Any]:
    """What the input is, by the names that a user knows, for the `identity` of [`~StepWriter.open`]."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(1000):
        for row in batch.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    types = {name: str(feature) for name, feature in dataset.features.items()}
    return {"columns": types, "rows (SHA-256)": digest.hexdigest()}


def hash_ids(lists: Iterable[list[int]]) -> str:
    """A checksum over lists of token ids."""
    digest = hashlib.sha256()
    for ids in lists:
        digest.update(np.array([len(ids), *ids], dtype=np.int32).tobytes())
    return digest.hexdigest()


def literal_path(path: str | Path) -> str:
    """A path as `datasets` takes it literally: a `*` or `[` in it is no pattern, a leading `~` no home."""
    return glob.escape(os.path.abspath(path))


def check_folder(output_dir: str) -> None:
    """Refuse an `output_dir` that cannot be made or written to, without making it."""
    folder = Path(output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() and existing == folder:
        raise ValueError(f"{output_dir!r} is a file. Choose another `output_dir`.")
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = os.strerror(errno.EACCES if existing.is_dir() else errno.ENOTDIR)
        raise OSError(
            f"Cannot write to {str(output_dir)!r} ({reason}). Choose another `output_dir`, or see to the permissions."
        )


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
