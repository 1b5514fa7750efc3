"""The trials of a search: which settings are tried, which are kept, and what a search that goes on does again."""

import os
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest


optuna = pytest.importorskip("optuna")

# ruff: noqa: E402

from transformers import TrainerControl

from trl_lightreasoner import TuneConfig
from trl_lightreasoner.contrast import NonFiniteLogitsError
from trl_lightreasoner.pipeline.folder import TuneFolder
from trl_lightreasoner.pipeline.search import AccuracyReporter, UnfitSetting, search
from trl_lightreasoner.pipeline.search_space import read_space
from trl_lightreasoner.report.trials import trial_figures
from trl_lightreasoner.training.memory import TrainingMemoryError


DEFAULT = {"beta": 0.8, "learning_rate": 1e-4, "max_steps": 9, "lora_target_modules": "all-linear"}
SPACE = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "beta": {"low": 0.4, "high": 3.0}}


class FakeTraining:
    """Answers as a function of the setting says, and remembers every setting that it was called with."""

    def __init__(self, accuracy=lambda setting, share: 0.5):
        self.accuracy, self.settings = accuracy, []

    def __call__(self, setting: dict, path: Path, reporter: AccuracyReporter, answers_before: bool) -> None:
        self.settings.append(setting)
        path.mkdir(parents=True)
        max_steps = setting["max_steps"]
        updates = [0] if answers_before else []
        for update in range(1, max_steps + 1):
            control = TrainerControl()
            reporter.on_step_end(None, SimpleNamespace(global_step=update), control)
            updates += [update] if control.should_evaluate else []
        for update in updates:
            metrics = {"eval_accuracy": self.accuracy(setting, update / max_steps)}
            reporter.on_evaluate(None, SimpleNamespace(global_step=update), TrainerControl(), metrics)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A search in the same folder, by a training."""

    def run(train, num_trials: int, space=SPACE, default=DEFAULT, questions="a checksum"):
        with TuneFolder(TuneConfig(str(tmp_path / "a?b#c%20"), "e", "a", "d")) as folder:
            return search(read_space(space), default, train, folder, num_trials, seed=0, questions=questions)

    # Without waiting for the disk
    def connect(*args, **kwargs):
        connection = sqlite3.connect(*args, **kwargs)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    fast = SimpleNamespace(connect=connect, OperationalError=sqlite3.OperationalError)
    monkeypatch.setattr("trl_lightreasoner.pipeline.search.sqlite3", fast)
    return run


def test_the_default_setting_is_the_first_trial(run):
    train = FakeTraining()
    result = run(train, 3)
    assert train.settings[0] == DEFAULT and result.trials[0].is_default
    assert not any(trial.is_default for trial in result.trials[1:])
    assert result.trials[0].accuracies == {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5}
    assert result.trials[1].accuracies == {1: 0.5, 2: 0.5, 3: 0.5}


def test_a_default_outside_the_space_is_the_first_trial_all_the_same(run):
    train = FakeTraining()
    run(
        train,
        3,
        {"learning_rate": {"low": 1e-3, "high": 1e-2}, "lora_target_modules": ["q_proj"], "max_steps": [9, 8]},
    )
    assert train.settings[0] == DEFAULT
    for setting in train.settings[1:]:
        assert 1e-3 <= setting["learning_rate"] <= 1e-2 and setting["lora_target_modules"] == "q_proj"


def test_the_best_is_that_of_the_highest_accuracy_and_of_equal_ones_the_default(run):
    result = run(FakeTraining(lambda setting, _: setting["learning_rate"]), 5)
    assert result.best.setting["learning_rate"] == max(trial.setting["learning_rate"] for trial in result.trials)
    assert run(FakeTraining(), 5).best.number == result.best.number  # nothing is left to do


def test_an_equal_setting_does_not_replace_the_default(run):
    assert run(FakeTraining(), 4).best.is_default


def test_only_the_weights_of_the_default_and_the_best_are_kept(run, tmp_path):
    result = run(FakeTraining(lambda setting, _: 1 - setting["learning_rate"]), 5)
    kept = {str(result.trials[0].number), str(result.best.number)}
    assert {path.name for path in (tmp_path / "a?b#c%20" / "trials").iterdir()} == kept


def test_a_search_that_was_broken_off_repeats_the_broken_trial_alone(run):
    train = FakeTraining(lambda setting, _: setting["learning_rate"])

    def break_off(setting, *args):
        train(setting, *args)
        if len(train.settings) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(break_off, 6)
    result = run(train, 6)
    assert train.settings[3] == train.settings[2]
    assert len(train.settings) == 7 and len(result.trials) == 6
    assert len({setting["learning_rate"] for setting in train.settings}) == 6  # no suggestion came twice


def test_a_search_that_was_killed_goes_on(run, tmp_path):
    def die(setting, path, *args):
        if path.name == "2":
            (tmp_path / "killed").write_text(repr(setting))
            os._exit(0)
        FakeTraining()(setting, path, *args)

    if (child := os.fork()) == 0:
        try:
            run(die, 5)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    train = FakeTraining()
    result = run(train, 5)
    assert repr(train.settings[0]) == (tmp_path / "killed").read_text()
    assert len(train.settings) == 3 and len(result.trials) == result.num_settings == 5


def test_a_default_that_was_broken_off_is_still_the_first(run):
    def break_off(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(break_off, 3)
    train = FakeTraining()
    result = run(train, 3)
    assert train.settings[0] == DEFAULT and result.trials[0].is_default and len(result.trials) == 3


def test_trials_that_are_worse_than_the_others_are_broken_off_and_reported(run):
    asked = []

    def accuracy(setting, share):
        asked.append((setting["learning_rate"], share))
        return share * (0.9 if len(asked) < 20 else 0.1)

    result = run(FakeTraining(accuracy), 8)
    pruned = [trial for trial in result.trials if trial.is_pruned]
    assert pruned and all(list(trial.accuracies) == [1] and trial.last_accuracy < 0.1 for trial in pruned)
    html = trial_figures(result)
    assert f"{len(pruned)} of them" in html and html.count("<td>broken off</td>") == len(pruned)


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (TrainingMemoryError(SimpleNamespace(per_device_train_batch_size=1)), "out of memory"),
        (FloatingPointError("NaN"), "gradients were not finite"),
        (NonFiniteLogitsError("model", 0), "logits were not finite"),
        (UnfitSetting("no step reaches its beta"), "no step reaches its beta"),
    ],
)
def test_a_setting_that_cannot_be_trained_does_not_end_the_search(error, note, run):
    train = FakeTraining()

    def fail(setting, *args):
        if len(train.settings) == 1:
            train.settings.append(setting)
            raise error
        train(setting, *args)

    result = run(fail, 4)
    assert [trial.note for trial in result.trials] == ["", note, "", ""]
    assert result.trials[1].last_accuracy is None and note in trial_figures(result)
    assert len(run(fail, 4).trials) == 4 and len(train.settings) == 4  # it is not tried again


def test_a_default_that_cannot_be_trained_ends_the_search(run):
    def fail(*_):
        raise FloatingPointError("NaN")

    with pytest.raises(FloatingPointError):
        run(fail, 4)


def test_no_setting_is_trained_twice(run):
    train = FakeTraining(lambda setting, _: setting["max_steps"] / 10)
    result = run(train, 10, {"max_steps": [9, 6]})
    assert [setting["max_steps"] for setting in train.settings] == [9, 6]
    assert len(result.trials) == 10 and result.num_settings == 2
    assert result.trials[-1].note.startswith("the same as trial")


def test_a_study_that_was_killed_as_it_was_made_is_made_anew(run, tmp_path):
    folder = tmp_path / "a?b#c%20"
    folder.mkdir()
    with sqlite3.connect(folder / "study.db.tmp") as half:  # a table without its index
        half.execute("CREATE TABLE studies (study_id INTEGER PRIMARY KEY, study_name VARCHAR(512) NOT NULL)")
    half.close()
    assert len(run(FakeTraining(), 1).trials) == 1
    assert len(run(FakeTraining(), 2).trials) == 2


def test_what_is_no_study_is_refused(run, tmp_path):
    with TuneFolder(TuneConfig(str(tmp_path / "a?b#c%20"), "e", "a", "d")):
        pass
    (tmp_path / "a?b#c%20" / "study.db").write_text("no database" * 100)
    with pytest.raises(ValueError, match="cannot be read as the trials of a search"):
        run(FakeTraining(), 1)


@pytest.mark.parametrize(("max_steps", "updates"), [(1, [1]), (2, [1, 2]), (125, [42, 83, 125])])
def test_questions_are_answered_at_thirds_of_a_training(max_steps, updates):
    reporter = AccuracyReporter(SimpleNamespace(), max_steps)
    answered = []
    for update in range(1, max_steps + 1):
        control = TrainerControl()
        reporter.on_step_end(None, SimpleNamespace(global_step=update), control)
        answered += [update] if control.should_evaluate else []
    assert answered == updates
