"""The checkpoints in an `output_dir`: which one is complete, and that one training at a time writes them.

`Trainer` writes trainer_state.json last, so that a checkpoint without it is one whose saving was broken off.
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
# What PyTorch and the libraries in Rust say when they cannot write; an `OSError` says it by its type
_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "basic_ios", "os error")


def find_checkpoint(asked: str | bool | None, output_dir: str) -> str | None:
    """
    The folder to resume from.

    Args:
        asked (`str` or `bool`, *optional*): A folder, or `True` or `"true"` for the newest complete checkpoint in
            `output_dir`. `False` and `"false"` are none.
        output_dir (`str`): Folder of the training.

    Raises:
        `ValueError`: If the folder is no checkpoint that training can go on from as it was, or there is none.
    """
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        _check(Path(str(asked)), output_dir)
        return str(asked)
    last = last_checkpoint(output_dir)
    if last is None:
        # Those that are saved to the end, but not such that training could go on as it was, say why
        for folder in reversed(_checkpoints(output_dir)):
            if (folder / _STATE).is_file():
                _check(folder, output_dir)
        raise ValueError(
            f"There is no complete checkpoint in {output_dir!r} to resume from. Leave `resume_from_checkpoint` out to "
            "begin anew."
        )
    return last


def last_checkpoint(output_dir: str) -> str | None:
    """The newest complete checkpoint in a folder, or `None`. A warning names every newer one that is left out."""
    left_out = []
    for folder in reversed(_checkpoints(output_dir)):
        try:
            _check(folder, output_dir)
        except ValueError as error:
            left_out.append(str(error))
            continue
        for reason in left_out:
            logger.warning(f"Resuming from {str(folder)!r}, since a newer checkpoint is left out. {reason}")
        return str(folder)
    return None


def _checkpoints(output_dir: str) -> list[Path]:
    """All checkpoints in a folder, complete or not, in the order of their updates."""
    matches = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    numbers = {path: int(match[1]) for path, match in matches.items() if match and path.is_dir()}
    return sorted(numbers, key=numbers.__getitem__)


def _check(folder: Path, output_dir: str) -> None:
    """Refuse a folder that training cannot go on from as it was. Of large files the ends are looked at."""
    if not (folder / _STATE).is_file():
        raise ValueError(
            f"{str(folder)!r} is no checkpoint: it has no {_STATE}. Name a folder such as "
            f"{os.path.join(output_dir, 'checkpoint-500')!r}."
        )
    names = {path.name for path in folder.iterdir()}
    damaged = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_whole(path)]
    if damaged:
        raise ValueError(f"The checkpoint {str(folder)!r} is damaged: {damaged[0].name} is cut. Resume from another.")
    # DeepSpeed has files of its own, FSDP a folder or a file
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
            f"Training cannot go on from {str(folder)!r} as it was: there is no {name}, as where `save_only_model` is "
            "set. Resume from another checkpoint, or begin anew with that folder as the model."
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
    # As `torch.save` writes them, with a list of the contents at the end
    return path.suffix not in (".pt", ".pth", ".bin") or is_zipfile(path)


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """
    While a checkpoint is saved: what is half written is never taken for complete, nor left where it fills the disk.

    Raises:
        `OSError`: If it cannot be written.
    """
    try:
        # Of a training before, whose checkpoint is written over
        (folder / _STATE).unlink(missing_ok=True)
        # By date `Trainer` tells which checkpoint is the oldest, and no date before now can be that of the new one
        now = time.time()
        for age, path in enumerate(reversed(_checkpoints(str(folder.parent)))):
            if path.stat().st_mtime > now:
                os.utime(path, (now - 1 - age, now - 1 - age))
        yield
    except Exception as error:
        if (folder / _STATE).is_file() and _is_whole(folder / _STATE):  # what came later went wrong
            raise
        if (reason := _cannot_write(error)) is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        remedy = "Make room, or see to the permissions, and train again."
        if _checkpoints(str(folder.parent)):
            remedy = (
                "The checkpoints before it are kept: make room, or see to the permissions, and go on with "
                "`resume_from_checkpoint`."
            )
        raise OSError(f"Cannot write the checkpoint {str(folder)!r} ({reason}). {remedy}") from error


@contextmanager
def saving_model(folder: str, output_dir: str) -> Iterator[None]:
    """
    While what was trained is saved in a folder.

    Raises:
        `OSError`: If it cannot be written, with what to do so that it need not be trained again.
    """
    try:
        yield
    except Exception as error:
        if (reason := _cannot_write(error)) is None:
            raise
        remedy = "train again."
        if last_checkpoint(output_dir) is not None:
            remedy = "set `resume_from_checkpoint`, which goes on from the last checkpoint."
        raise OSError(
            f"Cannot write the model to {folder!r} ({reason}). Make room, or see to the permissions, and {remedy}"
        ) from error


def _cannot_write(error: Exception) -> str | None:
    """Why a file could not be written, or `None` if something else went wrong."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return error.strerror
    if isinstance(error, SafetensorError) or any(words in str(error) for words in _CANNOT_WRITE):
        return "a file could not be written to its end, as on a full disk"
    return None


@contextmanager
def one_training(output_dir: str) -> Iterator[None]:
    """
    Take a folder for a training.

    Raises:
        `ValueError`: If another process has it.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    # A name that `Trainer` does not upload; a command and its trainer, in one process, share the lock
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
