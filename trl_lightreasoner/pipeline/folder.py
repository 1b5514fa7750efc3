"""The folders of `run` and `tune`: what each file is, and a check that no two runs share a folder.

output_dir/check.json         the check of the pair
output_dir/steps/             as of `lightreasoner sample`
output_dir/report/            as of `lightreasoner report`
output_dir/evaluation/        as of `lightreasoner eval`

output_dir/run.json           of a run: the settings
output_dir/adapter/           as of `lightreasoner train`
output_dir/verdict.json       what came out
output_dir/round.json         what the round brought
output_dir/rounds/NUMBER/     steps, adapter, evaluation and round.json of each of several rounds; output_dir/adapter/
                              is then a copy of the best one

output_dir/tune.json          of a search: the settings
output_dir/study.db           every trial, as Optuna keeps it
output_dir/trials/NUMBER/     as of `lightreasoner train`; the weights of the first trial and the best one alone
output_dir/best.yaml          the best setting, for `lightreasoner run` and `train`
output_dir/result.json        what came out
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from ..steps.whole_files import write_json
from ..steps.writer import check_folder
from .run_config import RunConfig


class Folder:
    """
    Reserves a folder for one command with one set of settings. Use it in a `with` statement.

    Args:
        args ([`RunConfig`]): Settings. `output_dir` names the folder.

    Raises:
        `ValueError`: If the folder holds another run or something else. The message names the setting that differs.
    """

    # Its description, its file of settings, and its other files
    _noun: str
    _settings_name: str
    _made_names: tuple[str, ...]
    # Settings that may differ when a run is resumed
    _free: tuple[str, ...] = ()

    def __init__(self, args: RunConfig):
        self.path = Path(args.output_dir)
        check_folder(args.output_dir)
        self._settings_path = self.path / self._settings_name
        self._made = [self.path / name for name in self._made_names]
        self.check, self.steps, self.report, self.evaluation = (
            self.path / name for name in ("check.json", "steps", "report", "evaluation")
        )
        settings = dataclasses.asdict(args)
        self._overwrite = settings.pop("overwrite_output_dir")
        settings.pop("output_dir")  # it may have moved
        self._settings = settings
        if not self._overwrite:
            self._compare()

    def __enter__(self):
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another {self._noun} is writing into {str(self.path)!r}. Wait for it, or choose another "
                "`output_dir`."
            ) from None
        if self._overwrite:
            for path in (self._settings_path, *self._made):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_json(self._settings_path, {"settings": self._settings})
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A run refused before it made anything does not block the folder for other settings
        is_refused = kind is not None and issubclass(kind, ValueError)
        if is_refused and not any(path.exists() for path in self._made):
            self._settings_path.unlink(missing_ok=True)
        self._lock.release()

    def _compare(self) -> None:
        if not self._settings_path.is_file():
            if any(path.exists() for path in self._made):
                raise ValueError(
                    f"{str(self.path)!r} holds files that are not from a {self._noun}. Choose another `output_dir`, "
                    "or set `overwrite_output_dir=True` to delete them."
                )
            return
        try:
            begun = json.loads(self._settings_path.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{str(self._settings_path)!r} is not from a {self._noun}. Choose another `output_dir`, or set "
                "`overwrite_output_dir=True`."
            ) from None
        for name, value in json.loads(json.dumps(self._settings)).items():
            if name not in self._free and begun.get(name) != value:
                raise ValueError(
                    f"{str(self.path)!r} was started with {name} = {begun.get(name)!r}, but it is now {value!r}. "
                    "Restore that value to resume, choose another `output_dir`, or set `overwrite_output_dir=True` to "
                    "delete the existing files."
                )


class RoundFolder:
    """
    The files of one round.

    Args:
        path (`Path`): The folder of the run if it has a single round, and otherwise the round's own folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self.steps, self.adapter, self.evaluation = (path / name for name in ("steps", "adapter", "evaluation"))
        self.warnings, self.outcome = self.adapter / "warnings.json", path / "round.json"

    @property
    def is_trained(self) -> bool:
        """Whether the adapter is complete. The log is written last."""
        return all((self.adapter / name).is_file() for name in ("adapter_model.safetensors", "trainer_state.json"))


class RunFolder(Folder):
    """The folder of `lightreasoner run`."""

    _noun = "run"
    _settings_name = "run.json"
    _made_names = ("check.json", "verdict.json", "steps", "adapter", "report", "evaluation", "rounds", "round.json")

    def __init__(self, args: RunConfig):
        super().__init__(args)
        self.verdict, self.adapter = self.path / "verdict.json", self.path / "adapter"
        self._has_rounds = args.num_rounds > 1

    def round(self, number: int) -> RoundFolder:
        """The folder of a round, from 1."""
        return RoundFolder(self.path / "rounds" / str(number) if self._has_rounds else self.path)

    def keep(self, number: int) -> None:
        """Make the adapter of a round the adapter of the run."""
        if not self._has_rounds or self.adapter.is_dir():
            return
        kept, temporary = self.round(number), self.path / "adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(kept.adapter, temporary, ignore=shutil.ignore_patterns("checkpoint-*"))
        if (kept.evaluation / "results.json").is_file():
            shutil.copy(kept.evaluation / "results.json", self.evaluation)
        os.replace(temporary, self.adapter)  # last, as the mark


class TuneFolder(Folder):
    """The folder of `lightreasoner tune`."""

    _noun = "search"
    _settings_name = "tune.json"
    _made_names = (
        *("check.json", "result.json", "best.yaml", "study.db", "steps", "trials", "report", "evaluation"),
        "study.db-journal",
    )
    _free = ("num_trials",)

    def __init__(self, args: RunConfig):
        super().__init__(args)
        self.result, self.best, self.study, self.trials = (
            self.path / name for name in ("result.json", "best.yaml", "study.db", "trials")
        )

    def trial(self, number: int) -> Path:
        """The folder of a trial."""
        return self.trials / str(number)
