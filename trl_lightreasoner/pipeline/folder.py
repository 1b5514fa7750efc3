"""The folder of a run: what lies where, and that no two runs share it.

output_dir/run.json           the settings
output_dir/check.json         what the check said of the pair
output_dir/steps/             as of `lightreasoner sample`
output_dir/adapter/           as of `lightreasoner train`
output_dir/report/            as of `lightreasoner report`
output_dir/evaluation/        as of `lightreasoner eval`
output_dir/verdict.json       what came out
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..steps.writer import check_folder
from ..training.checkpoints import last_checkpoint
from .run_config import RunConfig


class RunFolder:
    """
    Takes a folder for one run, by `with`.

    Args:
        args ([`RunConfig`]): Settings, of which `output_dir` names the folder.

    Raises:
        `ValueError`: If it holds another run, or something else; names the setting that differs.
    """

    def __init__(self, args: RunConfig):
        self.path = Path(args.output_dir)
        check_folder(args.output_dir)
        self.run, self.check, self.verdict = (self.path / f"{name}.json" for name in ("run", "check", "verdict"))
        names = ("steps", "adapter", "report", "evaluation")
        self.steps, self.adapter, self.report, self.evaluation = (self.path / name for name in names)
        self._made = (self.check, self.verdict, self.steps, self.adapter, self.report, self.evaluation)
        settings = dataclasses.asdict(args)
        self._overwrite = settings.pop("overwrite_output_dir")
        settings.pop("output_dir")  # it may have moved
        self._settings = settings
        if not self._overwrite:
            self._compare()

    def __enter__(self) -> "RunFolder":
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another run is writing into {str(self.path)!r}. Wait for it, or choose another `output_dir`."
            ) from None
        if self._overwrite:
            for path in (self.run, *self._made):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_json(self.run, {"settings": self._settings})
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Refused before anything was made, it does not keep the folder from other settings
        is_refused = kind is not None and issubclass(kind, ValueError)
        if is_refused and not any(path.exists() for path in self._made):
            self.run.unlink(missing_ok=True)
        self._lock.release()

    @property
    def is_trained(self) -> bool:
        """Whether the adapter is complete: the log is written last."""
        return all((self.adapter / name).is_file() for name in ("adapter_model.safetensors", "trainer_state.json"))

    def find_checkpoint(self) -> str | None:
        """The last complete checkpoint of a training that was broken off, or `None`."""
        return last_checkpoint(str(self.adapter))

    def _compare(self) -> None:
        if not self.run.is_file():
            if any(path.exists() for path in self._made):
                raise ValueError(
                    f"{str(self.path)!r} holds files that no run left there. Choose another `output_dir`, or set "
                    "`overwrite_output_dir=True` to delete them."
                )
            return
        try:
            begun = json.loads(self.run.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{str(self.run)!r} is not of a run. Choose another `output_dir`, or set `overwrite_output_dir=True`."
            ) from None
        for name, value in json.loads(json.dumps(self._settings)).items():
            if begun.get(name) != value:
                raise ValueError(
                    f"{str(self.path)!r} was begun with {name} = {begun.get(name)!r}, but it is now {value!r}. Set it "
                    "back to go on, choose another `output_dir`, or set `overwrite_output_dir=True` to delete what is "
                    "there."
                )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is complete or not there at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
