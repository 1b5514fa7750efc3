"""The files under `output_dir` while a Dataset of steps or answers is made. No finished batch is ever lost.

    output_dir/run.json           what is being made: models, settings, prompts
    output_dir/shards/            one file per batch, NUMBER-SHA256.parquet, always complete
    output_dir/merging/           temporary files while the shards are merged
    output_dir/data/              the finished Dataset, in the order of the input

Every file is written under a temporary name, flushed to the disk and renamed. So a process may be killed at any time:
a later run with the same models, settings and prompts resumes after the last complete batch. A shard whose content
does not match the checksum in its name is made again. If several processes write, one opens and finishes the run.

Each opening of the folder has a name, which is stored in run.json and in every shard written under it. A process left
over from an earlier opening gets an error before it writes. If it has written a shard nevertheless, it is ignored.
"""

import errno
import glob
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetsError
from filelock import FileLock, Timeout

from .caches import name_the_cache, reason_of
from .dataset import STEP_FEATURES
from .run_file import checksums, finished_files, read_run, run_content


if TYPE_CHECKING:  # slow to import, and one process does without
    from ..processes import Processes


logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 500 * 2**20
_ROW = "_row"  # index of a row in the input, since shards hold rows in the order in which they are made
_OPENING = b"opening"  # key of a shard's opening in the metadata of its schema


class StepWriter:
    """
    Writes rows as they are made, and returns them in the order of the input. Only one batch is held in memory.

    Args:
        output_dir (`str`): The folder, which is created if it does not exist.
        dataset ([`~datasets.Dataset`]): The input, whose columns are copied.
        overwrite (`bool`): Whether to delete existing rows instead of resuming.
        features (`dict`): Types of the new columns, beside `completion`.
        date ([`~datetime.datetime`], *optional*): Result of [`~trl_lightreasoner.steps.run_file.run_date`], if the
            rows depend on the date.

    Raises:
        `ValueError`: If the folder is a file or holds other files, or an input column has the name of a new one.
    """

    def __init__(
        self,
        output_dir: str,
        dataset: Dataset,
        overwrite: bool = False,
        features: dict[str, Any] = STEP_FEATURES,
        date: datetime | None = None,
    ):
        taken = [name for name in (*features, _ROW) if name in dataset.column_names]
        if taken:
            raise ValueError(
                f"The input already has columns named {taken}, which sampling writes. Rename or remove them first."
            )
        self.folder = Path(output_dir)
        self.overwrite = overwrite
        self.date = date or datetime.now()
        self.run = self.folder / "run.json"
        self.shards, self.merging, self.data = (self.folder / name for name in ("shards", "merging", "data"))
        if overwrite or not (self.run.exists() and self.data.exists()):  # finished rows can be read even there
            check_folder(output_dir)
        if "::" in str(self.folder.absolute()):
            raise ValueError(
                f"'::' in {output_dir!r} would be read as a chain of file systems. Choose another `output_dir`."
            )
        if (self.shards.exists() or self.data.exists()) and not self.run.exists() and not overwrite:
            raise ValueError(
                f"{output_dir!r} holds files that are not from a run of this version. Choose another `output_dir`, or "
                "set `overwrite_output_dir=True` to delete them."
            )
        self.input = dataset.with_format("arrow")
        completion = {} if "completion" in dataset.column_names else {"completion": Value("string")}
        self.features = Features({**dataset.features, **completion, **features})
        self.schema = Features({**self.features, _ROW: Value("int64")}).arrow_schema
        self.lock = FileLock(self.folder / ".lock")

    def open(self, identity: dict[str, Any], metadata: dict[str, Any]) -> set[int]:
        """
        Lock the folder for this process, until [`~StepWriter.close`].

        Args:
            identity (`dict`): Names and values of everything that the rows depend on, JSON-serializable.
            metadata (`dict`): What [`sampling_metadata`] returns for the Dataset, JSON-serializable.

        Returns:
            `set[int]`: Rows of the input that exist already.

        Raises:
            `ValueError`: If another process holds the folder, it was started with another identity, or run.json is
                damaged.
            `OSError`: If the folder cannot be written to, and is not finished.
        """
        self.opening = ""
        refusal = self._take_lock()
        if self.overwrite and refusal is None:
            for path in (self.shards, self.merging, self.data):
                shutil.rmtree(path, ignore_errors=True)
            self.run.unlink(missing_ok=True)
        if self.run.exists() and not self.overwrite:
            self.begun = read_run(self.folder)
            self._check_identity(self.begun.get("identity", {}), json.loads(json.dumps(identity)))
            if self.data.exists() and self._is_whole():
                return set(range(len(self.input)))
        else:
            self.begun = {"identity": identity, "metadata": metadata, "date": self.date.isoformat()}
        if refusal is not None:
            raise refusal
        if self.data.exists():
            logger.warning(f"{self.data} is damaged. Everything is sampled again.")
            shutil.rmtree(self.data)
        self.opening = uuid.uuid4().hex
        self.begun["openings"] = [*self.begun.get("openings", []), self.opening]
        self._write(self.run, run_content(self.begun))
        self._set_metadata()
        self.shards.mkdir(exist_ok=True)
        self.earlier = self._take_shards()
        return {row for rows in self.earlier.values() for row in rows}

    def open_on(
        self, processes: "Processes", describe: Callable[[], tuple[dict[str, Any], dict[str, Any]]]
    ) -> set[int]:
        """
        [`~StepWriter.open`] on the main process, with the identity and the metadata that `describe` returns there, and
        [`~StepWriter.join`] on the others.
        """
        done, opening = processes.on_main(lambda: (self.open(*describe()), self.opening))
        if not processes.is_main:
            self.join(opening)
        return done

    def _take_lock(self) -> OSError | None:
        """Lock the folder. If it cannot be written to, return the reason: a finished Dataset can still be read."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another run is writing into {str(self.folder)!r}. Wait for it, or choose another `output_dir`."
            ) from None
        except OSError as error:
            return OSError(
                f"Cannot write to {str(self.folder)!r} ({reason_of(error)}). Choose another `output_dir`, free disk "
                "space, or fix the permissions."
            )
        return None

    def _is_whole(self) -> bool:
        try:
            return bool(finished_files(self.folder))
        except ValueError:
            return False

    def join(self, opening: str) -> None:
        """
        Write to the folder that another process of the same run has opened.

        Args:
            opening (`str`): The `opening` of that process's writer. A process left over from an earlier run has
                another one, and is refused.

        Raises:
            `ValueError`: If the folder does not exist, or a later run has opened it.
        """
        if not self.run.exists():
            raise ValueError(
                f"The file {str(self.run)!r} of the main process is not visible. Choose an `output_dir` that all "
                "processes share."
            )
        self.opening = opening
        if opening:  # empty if everything was finished when the folder was opened
            self._check_opening()
        self.begun = read_run(self.folder)
        self._set_metadata()

    def _check_opening(self) -> None:
        """Refuse to write if a later run has opened the folder: this process can be left over from an earlier one."""
        try:
            openings = read_run(self.folder).get("openings", [])
        except FileNotFoundError:
            openings = []
        if openings[-1:] != [self.opening]:
            raise ValueError(
                f"{str(self.folder)!r} was {'begun again' if openings else 'removed'} while this run was writing into "
                "it. This run ends here. Rerun the same command to resume from the existing files, or choose another "
                "`output_dir`."
            )

    def _set_metadata(self) -> None:
        self.metadata = json.dumps(self.begun["metadata"])  # from the first run, the same in every row

    def close(self) -> None:
        """Unlock the folder. Does nothing if this process has not locked it."""
        self.lock.release()

    def write(self, indices: list[int], columns: dict[str, list]) -> None:
        """Write the rows `indices` of the input with the new `columns`."""
        table = self.input[indices]
        columns = {**columns, _ROW: indices}
        if "sampling_metadata" in self.features:
            columns["sampling_metadata"] = [self.metadata] * len(indices)
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, self.schema.field(name).type))
        buffer = pa.BufferOutputStream()
        schema = self.schema.with_metadata({**(self.schema.metadata or {}), _OPENING: self.opening.encode()})
        pq.write_table(table.select(schema.names).cast(schema), buffer)
        content = buffer.getvalue().to_pybytes()
        self._check_opening()
        self._write(self.shards / _shard_name(indices, content), content)

    def finish(self, rows: set[int]) -> None:
        """
        Merge the shards into the finished Dataset, in the order of the input.

        Args:
            rows (`set[int]`): Rows of the input that must exist.

        Raises:
            `ValueError`: If some of them are missing or duplicated.
            `OSError`: If they cannot be written to the disk.
        """
        if self.opening:  # empty if it was finished when it was opened
            self._merge(rows)
        shutil.rmtree(self.shards, ignore_errors=True)
        shutil.rmtree(self.merging, ignore_errors=True)

    def load(self, cache_dir: str | None = None) -> Dataset:
        """The finished Dataset, memory-mapped in `cache_dir`, or in the cache of `datasets` by default."""
        files = [literal_path(self.data / name) for name in sorted(read_run(self.folder)["files"])]
        with name_the_cache(cache_dir, f"The finished rows are in {str(self.data)!r}."):
            return Dataset.from_parquet(files, cache_dir=cache_dir)

    def _merge(self, rows: set[int]) -> None:
        self._check_opening()
        shutil.rmtree(self.merging, ignore_errors=True)  # left over from an interrupted merge
        shards, num_bytes = self._shards_to_merge(rows)
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            raise OSError(
                f"Merging the rows of {str(self.folder)!r} takes {num_bytes / 1e6:,.2f} MB, but only "
                f"{free / 1e6:,.2f} MB are free. All rows are kept. Free disk space, and rerun the same command."
            )
        try:
            files = self._merge_into(self.merging / "data", shards)
            self._check_opening()
            self.begun["files"] = files
            self._write(self.run, run_content(self.begun))
            os.replace(self.merging / "data", self.data)
            _sync(self.folder)
        except (OSError, DatasetsError) as error:
            shutil.rmtree(self.merging, ignore_errors=True)
            raise OSError(
                f"Cannot finish {str(self.folder)!r} ({reason_of(error)}). All rows are kept. Free disk space or fix "
                "the permissions, and rerun the same command to merge them."
            ) from error

    def _shards_to_merge(self, rows: set[int]) -> tuple[list[Path], int]:
        """The shards that hold `rows`, each of them once, and the maximum number of bytes that merging them takes."""
        shards, num_bytes, there = [], 0, []
        for path in sorted(self.shards.glob("*.parquet")):
            shard = self._read_shard(path)
            if shard is None or not (path in self.earlier or shard.schema.metadata[_OPENING] == self.opening.encode()):
                logger.warning(f"{path} is damaged or from another run. It is skipped.")
                continue
            shards.append(path)
            num_bytes += shard.nbytes + path.stat().st_size
            there += shard[_ROW].to_pylist()
        twice = len(there) - len(set(there))
        if twice:
            raise ValueError(
                f"{twice:,} rows are duplicated in {str(self.shards)!r}. Delete the files that were added there, and "
                "rerun the same command."
            )
        if missing := rows - set(there):
            raise ValueError(
                f"{len(missing):,} of {len(rows):,} rows are missing in {str(self.shards)!r}, first row "
                f"{min(missing)}. Choose an `output_dir` that all processes share. If they do share it, rerun the "
                "same command to sample the missing rows."
            )
        return shards, num_bytes

    def _merge_into(self, data: Path, shards: list[Path]) -> dict[str, str]:
        """Write the rows of `shards` to files in the order of the input, and return the checksums of the files."""
        data.mkdir(parents=True)
        cache = os.path.abspath(self.merging / "cache")
        made = Dataset.from_parquet([literal_path(path) for path in shards], cache_dir=cache)
        made = made.select(np.argsort(made.data[_ROW].to_numpy(), kind="stable")).remove_columns(_ROW)
        num_files = 1 + made.data.nbytes // _MAX_FILE_BYTES
        for i in range(num_files):
            path = data / f"train-{i:05d}-of-{num_files:05d}.parquet"
            made.shard(num_files, i, contiguous=True).to_parquet(path)
            _sync(path)
        return checksums(data, os.listdir(data))

    def _check_identity(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for name in [*new, *(name for name in old if name not in new)]:
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{str(self.folder)!r} was started with {name} = {old.get(name)!r}, but it is now "
                    f"{new.get(name)!r}. Restore that value to resume, choose another `output_dir`, or set "
                    "`overwrite_output_dir=True` to delete the existing files."
                )

    def _take_shards(self) -> dict[Path, list[int]]:
        """Rows of the shards of earlier openings. Damaged shards and those with duplicate rows are deleted."""
        taken: dict[Path, list[int]] = {}
        seen: set[int] = set()
        for path in sorted(self.shards.iterdir()):
            shard = self._read_shard(path)
            rows = [] if shard is None else shard[_ROW].to_pylist()
            if shard is not None and seen.isdisjoint(rows):
                taken[path] = rows
                seen.update(rows)
                continue
            if path.suffix == ".parquet":  # temporary files of an interrupted process end in .tmp
                state = "damaged" if shard is None else "there twice"
                logger.warning(f"{path} is {state}. Its rows are sampled again.")
            path.unlink()
        return taken

    def _read_shard(self, path: Path) -> pa.Table | None:
        """Read a shard of this run. `None` if it belongs to another run or is damaged."""
        content = path.read_bytes()
        if not path.name.endswith(f"-{hashlib.sha256(content).hexdigest()}.parquet"):
            return None
        try:
            shard = pq.read_table(pa.BufferReader(content))
            opening = shard.schema.metadata[_OPENING].decode()
            is_ours = opening in self.begun["openings"]
            return shard if is_ours and path.name == _shard_name(shard[_ROW].to_pylist(), content) else None
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):  # not a shard
            return None

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
                f"Cannot write to {str(path.parent)!r} ({reason_of(error)}). Everything written before is kept. Free "
                "disk space or fix the permissions, and rerun the same command to resume."
            ) from error


def _shard_name(rows: list[int], content: bytes) -> str:
    return f"{min(rows):09d}-{hashlib.sha256(content).hexdigest()}.parquet"


def describe_rows(dataset: Dataset) -> dict[str, Any]:
    """Description of the input, by the user's names, for the `identity` of [`~StepWriter.open`]."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(1000):
        for row in batch.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    types = {name: str(feature) for name, feature in dataset.features.items()}
    return {"columns": types, "rows (SHA-256)": digest.hexdigest()}


def hash_ids(lists: Iterable[list[int]]) -> str:
    """A checksum of lists of token ids."""
    digest = hashlib.sha256()
    for ids in lists:
        digest.update(np.array([len(ids), *ids], dtype=np.int32).tobytes())
    return digest.hexdigest()


def literal_path(path: str | Path) -> str:
    """A path that `datasets` takes literally, whatever `*`, `[` or leading `~` it contains."""
    return glob.escape(os.path.abspath(path))


def check_folder(output_dir: str) -> None:
    """Refuse an `output_dir` that cannot be created or written to, without creating it."""
    folder = Path(output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() and existing == folder:
        raise ValueError(f"{output_dir!r} is a file. Choose another `output_dir`.")
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = os.strerror(errno.EACCES if existing.is_dir() else errno.ENOTDIR)
        raise OSError(
            f"Cannot write to {str(output_dir)!r} ({reason}). Choose another `output_dir`, or fix the permissions."
        )


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
