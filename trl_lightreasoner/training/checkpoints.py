"""The checkpoints in an `output_dir`: which ones are complete, and a lock that allows one training at a time.

`Trainer` writes trainer_state.json last, so a checkpoint without it was not saved completely.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import logging


logger = logging.get_logger(__name__)

_STATE = "trainer_state.json"
# Messages of PyTorch and of the libraries in Rust when they cannot write. Other failures are an `OSError`
_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "basic_ios", "os error")


def find_checkpoint(asked: str | bool | None, output_dir: str) -> str | None:
    """
    The folder to resume from.

    Args:
        asked (`str` or `bool`, *optional*): A folder, or `True` or `"true"` for the newest complete checkpoint in
            `output_dir`. `False` and `"false"` are none.
        output_dir (`str`): Folder of the training.

    Raises:
        `ValueError`: If training cannot resume exactly from the folder, or there is none.
    """
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        _check(Path(str(asked)), output_dir)
        return str(asked)
    last = last_checkpoint(output_dir)
    if last is None:
        # A checkpoint that was saved completely, but from which training cannot resume exactly, gets its reason
        for folder in reversed(_checkpoints(output_dir)):
            if (folder / _STATE).is_file():
                _check(folder, output_dir)
        raise ValueError(
            f"There is no complete checkpoint in {output_dir!r} to resume from. Remove `resume_from_checkpoint` to "
            "start from the beginning."
        )
    return last


def last_checkpoint(output_dir: str) -> str | None:
    """The newest complete checkpoint in a folder, or `None`. A warning names every newer one that is skipped."""
    left_out = []
    for folder in reversed(_checkpoints(output_dir)):
        try:
            _check(folder, output_dir)
        except ValueError as error:
            left_out.append(str(error))
            continue
        for reason in left_out:
            logger.warning(f"Resuming from {str(folder)!r}, because a newer checkpoint is skipped. {reason}")
        return str(folder)
    return None


def _checkpoints(output_dir: str) -> list[Path]:
    """All checkpoints in a folder, complete or not, ordered by their updates."""
    matches = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    numbers = {path: int(match[1]) for path, match in matches.items() if match and path.is_dir()}
    return sorted(numbers, key=numbers.__getitem__)


def _check(folder: Path, output_dir: str) -> None:
    """Refuse a folder from which training cannot resume exactly. Only the ends of large files are checked."""
    if not (folder / _STATE).is_file():
        raise ValueError(
            f"{str(folder)!r} is not a checkpoint: it has no {_STATE}. Name a folder such as "
            f"{os.path.join(output_dir, 'checkpoint-500')!r}."
        )
    names = {path.name for path in folder.iterdir()}
    damaged = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_whole(path)]
    if damaged:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is damaged: {damaged[0].name} is truncated. Resume from another one."
        )
    # DeepSpeed has its own files, and FSDP a folder or a file
    needed = {"rng_state": any(name.startswith("rng_state") for name in names)}
    if "latest" not in names:
        needed |= {name: any(each.startswith(name) for each in names) for name in ("optimizer", "scheduler.pt")}
        index = folder / "model.safetensors.index.json"
        shards = (
            set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
        )
        weights = [*folder.glob("*.safetensors"), *folder.glob("*/adapter_model.safetensors")]
        weights += [*folder.glob("*.bin"), *folder.glob("*model_fsdp*")]
        needed |= {"model.safetensors": any(path.name != "training_args.bin" for path in weights) and shards <= names}
    missing = [name for name, is_there in needed.items() if not is_there]
    if missing:
        name = {"rng_state": "rng_state.pth", "optimizer": "optimizer.pt"}.get(missing[0], missing[0])
        raise ValueError(
            f"Training cannot resume exactly from {str(folder)!r}: there is no {name}, for example because of "
            "`save_only_model`. Resume from another checkpoint, or start a new training with that folder as the model."
        )


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError):
        return False
    # `torch.save` writes an archive with a list of its contents at the end
    return path.suffix not in (".pt", ".pth", ".bin") or is_zipfile(path)


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """
    Context for saving a checkpoint: an incomplete one never counts as complete, and is deleted to free the disk.

    Raises:
        `OSError`: If it cannot be written.
    """
    try:
        # Left over from an earlier training, whose checkpoint is overwritten
        (folder / _STATE).unlink(missing_ok=True)
        # `Trainer` finds the oldest checkpoint by date, so the new one must not be dated earlier than now
        now = time.time()
        for age, path in enumerate(reversed(_checkpoints(str(folder.parent)))):
            if path.stat().st_mtime > now:
                os.utime(path, (now - 1 - age, now - 1 - age))
        yield
    except Exception as error:
        if (folder / _STATE).is_file() and _is_whole(folder / _STATE):  # something after it failed
            raise
        if (reason := why_not_written(error)) is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        remedy = "Free disk space or fix the permissions, and train again."
        if _checkpoints(str(folder.parent)):
            remedy = (
                "Earlier checkpoints are kept. Free disk space or fix the permissions, and resume from the last one."
            )
        raise OSError(f"Cannot write the checkpoint {str(folder)!r} ({reason}). {remedy}") from error


@contextmanager
def saving_model(folder: str, output_dir: str) -> Iterator[None]:
    """
    Context for saving the trained model in a folder.

    Raises:
        `OSError`: If it cannot be written. The message says how to avoid training again.
    """
    try:
        yield
    except Exception as error:
        if (reason := why_not_written(error)) is None:
            raise
        remedy = "train again."
        if last_checkpoint(output_dir) is not None:
            remedy = "resume from the last checkpoint."
        raise OSError(
            f"Cannot write the model to {folder!r} ({reason}). Free disk space or fix the permissions, and {remedy}"
        ) from error


def why_not_written(error: Exception) -> str | None:
    """Why a file could not be written, or `None` for another error."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return error.strerror
    if isinstance(error, SafetensorError) or any(words in str(error) for words in _CANNOT_WRITE):
        return "a file could not be written completely, as on a full disk"
    return None


@contextmanager
def one_training(output_dir: str) -> Iterator[None]:
    """
    Lock a folder for a training.

    Raises:
        `ValueError`: If another process holds the lock.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    # `Trainer` does not upload a file of this name. A command and its trainer, in one process, share the lock
    lock = FileLock(Path(output_dir) / "_lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another training is writing into {output_dir!r}. Wait for it, or choose another `output_dir`."
        ) from None
    try:
        yield
    finally:
        lock.release()
