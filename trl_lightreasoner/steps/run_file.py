"""run.json in the folder of a [`~trl_lightreasoner.steps.writer.StepWriter`]: the state of its run.

| name | holds |
|---|---|
| identity | everything that the rows depend on |
| metadata | what is stored with the rows |
| date | when the run was started, which a chat template may print |
| openings | a name for each time that the folder was opened. The last one is active. Each shard stores its own |
| files | checksums of the finished Dataset, by file name |
| checksum | checksum of all of the above |
"""

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any


_TYPES = {"identity": dict, "metadata": dict, "date": str, "openings": list, "files": dict}


def read_run(folder: Path) -> dict[str, Any]:
    """
    Read run.json in a folder. Of another program's file, only entries with the names above are returned.

    Raises:
        `ValueError`: If it is damaged.
        `OSError`: If it cannot be read.
    """
    path = folder / "run.json"
    text = path.read_bytes()
    try:
        run = json.loads(text.decode())
        if not isinstance(run, dict):
            raise ValueError("it is not a JSON object")
        if run.pop("checksum", None) not in (None, _checksum(run)):  # other programs' files have none
            raise ValueError("it does not match its checksum")
        for name, kind in _TYPES.items():
            if not isinstance(run.get(name, kind()), kind):
                raise ValueError(f"`{name}` is invalid")
        for name in run.get("files", {}):
            if name in ("", ".", "..") or Path(name.replace("\\", "/")).name != name:
                raise ValueError(f"it names a file outside its folder, {name!r}")
    except (ValueError, RecursionError) as error:  # includes errors of the encoding and of JSON
        raise ValueError(
            f"{str(path)!r} is damaged: {str(error).rstrip('.')}. Restore it, or sample again with "
            "`overwrite_output_dir=True`. To read rows without it, name their file."
        ) from None
    return {name: value for name, value in run.items() if name in _TYPES}


def run_content(run: dict[str, Any]) -> bytes:
    """The content of run.json for a run, with its checksum."""
    run = json.loads(json.dumps(run))
    return json.dumps({**run, "checksum": _checksum(run)}, indent=2).encode()


def run_date(folder: str | Path, overwrite: bool = False, new: datetime | None = None) -> datetime:
    """When the run in a folder was started: `new`, or now, if there is none to resume."""
    try:
        date = None if overwrite else read_run(Path(folder)).get("date")
    except (FileNotFoundError, NotADirectoryError):
        date = None
    try:
        return datetime.fromisoformat(date) if date else new or datetime.now()
    except ValueError:
        raise ValueError(f"The date in {str(Path(folder, 'run.json'))!r} is damaged: {date!r}.") from None


def finished_files(folder: Path) -> list[Path]:
    """
    The files of a finished Dataset, without any other files. Empty if the folder holds no finished Dataset.

    Raises:
        `ValueError`: If one of them, or run.json, is damaged or missing.
    """
    if not ((folder / "run.json").is_file() and (folder / "data").is_dir()):
        return []
    files = read_run(folder).get("files", {})
    found = checksums(folder / "data", files)
    for name, checksum in files.items():
        if found.get(name) != checksum:
            path = str(folder / "data" / name)
            raise ValueError(
                f"{path!r} is "
                f"{'damaged: it does not match its checksum in run.json' if name in found else 'missing'}. Rerun the "
                "command that made it to restore it. To read a file that you changed, name it."
            )
    return [folder / "data" / name for name in sorted(files)]


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of those of the named files that exist in a folder."""
    found = {}
    for path in (folder / name for name in sorted(names)):
        if path.is_file():
            with open(path, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _checksum(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
