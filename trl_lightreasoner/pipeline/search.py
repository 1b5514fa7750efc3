"""The trials of a search: Optuna suggests settings, prunes and remembers; a SQLite file outlives a kill.

`Trainer.hyperparameter_search`, which drives Optuna, cannot serve here: it sets fields of `TrainingArguments` on one
trainer, whose rows were selected by one beta when it was made, sets no field of an adapter, and wants the model made
anew for every trial. So Optuna is driven directly, and the expert is loaded once.
"""

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..contrast import NonFiniteLogitsError
from ..report.trials import SearchResult, Trial, write_setting
from ..steps.whole_files import whole_file
from ..training.memory import TrainingMemoryError
from .folder import TuneFolder
from .search_space import Parameter


if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as OptunaTrial
    from optuna.trial import FrozenTrial

Setting = dict[str, Any]

# How often a trial answers the questions, including at its end
NUM_EVALUATIONS = 3
# Attributes that Optuna stores for a trial besides its values
_IS_DEFAULT, _SETTING, _NOTE, _REPEATS = "is_default", "setting", "note", "repeats"
_QUESTIONS = "questions"  # likewise for the study


def import_optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("A search needs Optuna: `pip install 'trl-lightreasoner[tune]'`.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # this module prints the trials
    return optuna


class UnfitSetting(Exception):
    """A setting with which nothing can be trained."""


class AccuracyReporter(TrainerCallback):
    """
    Evaluates a training at equal intervals and reports to Optuna, which may prune it.

    Args:
        trial ([`~optuna.Trial`]): The trial.
        max_steps (`int`): Number of training updates.
    """

    def __init__(self, trial: "OptunaTrial", max_steps: int):
        self.trial = trial
        self.accuracy: float | None = None
        # Trials of different lengths are compared at the same fraction of their schedules
        parts = range(1, NUM_EVALUATIONS + 1)
        self._parts = {0: 0} | {max(1, round(max_steps * part / NUM_EVALUATIONS)): part for part in parts}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self._parts:
            control.should_evaluate = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        part = self._parts[state.global_step]
        self.accuracy = metrics["eval_accuracy"]
        self.trial.report(self.accuracy, part)
        if part < NUM_EVALUATIONS and self.trial.should_prune():
            raise import_optuna().TrialPruned()


def search(
    parameters: list[Parameter],
    default: Setting,
    train: Callable[[Setting, Path, AccuracyReporter, bool], None],
    folder: TuneFolder,
    num_trials: int,
    seed: int,
    questions: str,
) -> SearchResult:
    """
    Try settings until `num_trials` are finished, including those of an earlier call.

    Args:
        parameters (`list[Parameter]`): The space.
        default (`dict[str, Any]`): The setting to try first. The others differ from it in the parameters.
        train (`Callable`): Trains an adapter with a setting into a folder, with a callback. The fourth argument says
            whether to answer the questions before training as well.
        folder ([`TuneFolder`]): Where trials are kept. Only the default and the best trial keep their weights.
        num_trials (`int`): How many.
        seed (`int`): Of the suggestions.
        questions (`str`): A checksum of the questions that every trial answers.

    Returns:
        [`SearchResult`]

    Raises:
        `ValueError`: If the trials of an earlier call answered other questions.
        `OSError`: If the disk is full.
    """
    with _room_for(folder.study):
        optuna = import_optuna()
        study = _open_study(optuna, folder.study)
        if study.user_attrs.get(_QUESTIONS, questions) != questions:
            raise ValueError(
                f"The validation questions have changed since the search in {str(folder.path)!r} was started, so new "
                "trials could not be compared with the old ones. Restore them, choose another `output_dir`, or set "
                "`overwrite_output_dir=True` to delete the existing files."
            )
        study.set_user_attr(_QUESTIONS, questions)
        _repeat_broken_trials(optuna, study, folder)
        # With the same seed, a resumed search would repeat its first suggestions
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
        if not study.trials:
            study.enqueue_trial({each.name: default[each.name] for each in parameters}, user_attrs={_IS_DEFAULT: True})
        done = len(_finished(study))

        def objective(trial: "OptunaTrial") -> float:
            is_default = trial.user_attrs.get(_IS_DEFAULT, False)
            # Optuna gets only those values of the default setting that are in the space
            names = [each for each in parameters if not is_default or each.holds(default[each.name])]
            suggested = {each.name: each.suggest(trial) for each in names}
            setting = default if is_default else {**default, **suggested}
            trial.set_user_attr(_SETTING, setting)
            for other in _finished(study):
                if other.user_attrs[_SETTING] == setting:
                    trial.set_user_attr(_NOTE, f"the same as trial {other.number}")
                    if other.value is None:
                        raise optuna.TrialPruned()
                    return other.value
            reporter = AccuracyReporter(trial, setting["max_steps"])
            try:
                train(setting, folder.trial(trial.number), reporter, is_default)
            except (TrainingMemoryError, FloatingPointError, NonFiniteLogitsError, UnfitSetting) as error:
                if is_default:  # otherwise it concerns only this setting
                    raise
                notes = {
                    TrainingMemoryError: "out of memory",
                    FloatingPointError: "gradients were not finite",
                    NonFiniteLogitsError: "logits were not finite",
                }
                trial.set_user_attr(_NOTE, notes.get(type(error), str(error)))
                raise optuna.TrialPruned() from error
            assert reporter.accuracy is not None  # the last update is one of the parts
            return reporter.accuracy

        def look_back(study: "Study", trial: "FrozenTrial") -> None:
            result = _read(study, parameters)
            kept = {str(each.number) for each in (result.trials[0], result.best)}
            for path in folder.trials.iterdir() if folder.trials.is_dir() else ():
                if path.name not in kept:
                    shutil.rmtree(path)
            (last,) = (each for each in result.trials if each.number == trial.number)
            accuracy = "" if last.last_accuracy is None else f"{last.last_accuracy:.1%}"
            remarks = ", ".join(filter(None, [accuracy, last.remark()]))
            print(
                f"  {len(result.trials)}/{num_trials} {write_setting(last.setting, result.names)}: {remarks}",
                flush=True,
            )

        if done:
            print(f"  {done} are already done", flush=True)
        study.optimize(objective, n_trials=max(0, num_trials - done), callbacks=[look_back])
        return _read(study, parameters)


@contextmanager
def _room_for(study: Path) -> Iterator[None]:
    """Report a full disk, which SQLite reports and Optuna hides behind an assertion."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise OSError(
            f"Cannot write {str(study)!r} ({os.strerror(errno.ENOSPC)}). Finished trials are kept. Free disk space, "
            "and rerun the same command."
        ) from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, sqlite3.OperationalError) and ("disk is full" in str(error) or "I/O" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _open_study(optuna: ModuleType, path: Path) -> "Study":
    if not path.is_file():  # with half of its tables, Optuna would take it for complete
        with whole_file(path) as temporary:
            _connect(optuna, temporary)
    try:
        return _connect(optuna, path)
    except Exception as error:
        if _is_full(error):
            raise
        raise ValueError(
            f"{str(path)!r} cannot be read as the trials of a search ({type(error).__name__}). Choose another "
            "`output_dir`, or set `overwrite_output_dir=True`."
        ) from error


def _connect(optuna: ModuleType, path: Path) -> "Study":
    # A connection instead of a URL, in which some characters of paths have a special meaning
    connect = {"creator": lambda: sqlite3.connect(path, check_same_thread=False)}
    storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs=connect)
    return optuna.create_study(storage=storage, study_name="tune", direction="maximize", load_if_exists=True)


def _repeat_broken_trials(optuna: ModuleType, study: "Study", folder: TuneFolder) -> None:
    """Repeat the trials that were interrupted by a kill or an error, after deleting their files."""
    states = optuna.trial.TrialState
    repeated = {trial.user_attrs.get(_REPEATS) for trial in study.trials}
    for trial in study.get_trials(states=(states.RUNNING, states.FAIL)):
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
        if trial.number not in repeated:
            params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            attrs = {_REPEATS: trial.number}
            if trial.user_attrs.get(_IS_DEFAULT):
                attrs[_IS_DEFAULT] = True
            study.enqueue_trial(params, user_attrs=attrs)
        shutil.rmtree(folder.trial(trial.number), ignore_errors=True)


def _finished(study: "Study") -> list["FrozenTrial"]:
    states = import_optuna().trial.TrialState
    return study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))


def _read(study: "Study", parameters: list[Parameter]) -> SearchResult:
    trials = [
        Trial(
            number=trial.number,
            setting=trial.user_attrs[_SETTING],
            accuracies=dict(sorted(trial.intermediate_values.items())),
            accuracy=trial.value if trial.state.name == "COMPLETE" else None,
            is_default=trial.user_attrs.get(_IS_DEFAULT, False),
            note=trial.user_attrs.get(_NOTE, ""),
        )
        for trial in _finished(study)
    ]
    return SearchResult(sorted(trials, key=lambda trial: not trial.is_default), [each.name for each in parameters])
