"""`tune` and `lightreasoner tune` on the bundled pair, with few questions, updates and settings."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset


pytest.importorskip("math_verify")
pytest.importorskip("optuna")

# ruff: noqa: E402

from trl_lightreasoner import TuneConfig, tune
from trl_lightreasoner.commands import run as run_command
from trl_lightreasoner.commands import train as train_command
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.evaluation.answering import Answering
from trl_lightreasoner.evaluation.statistics import compare
from trl_lightreasoner.pipeline import tune as pipeline
from trl_lightreasoner.steps.beta import choose_beta
from trl_lightreasoner.training.accuracy import EvalQuestions

from ..evaluation.test_sets import write
from .test_run import flags, never


NUM_PROMPTS, NUM_VALIDATION, NUM_HELD_OUT = 16, 8, 12


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[str]:
    return [problem["question"] for problem in make_problems(40, seed=0, kind_shares=KIND_SHARES)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    problems = make_problems(40, seed=0, kind_shares=KIND_SHARES)
    folder = tmp_path_factory.mktemp("questions")
    write(folder / "q.jsonl", [{"question": each["question"], "answer": each["answer"]} for each in problems])
    (folder / "space.yaml").write_text("learning_rate: {low: 1e-3, high: 5e-3}\nlora_target_modules: [q_proj]")
    return {
        **{"expert": str(PAIR / "expert"), "amateur": str(PAIR / "amateur"), "dataset_name": str(folder / "q.jsonl")},
        **{"num_prompts": NUM_PROMPTS, "num_held_out": NUM_HELD_OUT, "num_validation": NUM_VALIDATION},
        **{"system_prompt": "", "max_new_tokens": 48, "eval_max_new_tokens": 48, "max_steps": 6, "num_trials": 2},
        **{"learning_rate": 1e-5, "space": str(folder / "space.yaml")},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings):
    """The folder of a search and its result, and the prompts of the questions that chose."""
    folder = tmp_path_factory.mktemp("finished") / "tuned"
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        original = EvalQuestions.__init__

        def remember(self, dataset, *args):
            asked.append(dataset)
            original(self, dataset, *args)

        patch.setattr(EvalQuestions, "__init__", remember)
        result = tune(TuneConfig(output_dir=str(folder), **settings))
    return folder, result, asked


def read_answers(folder: Path, role: str) -> list[dict]:
    path = str(folder / "evaluation" / role / "held_out.parquet")
    return load_dataset("parquet", data_files=path, split="train").to_list()


def read_steps(folder: Path):
    return load_dataset("parquet", data_dir=str(folder / "steps" / "data"), split="train")


def test_questions_that_choose_confirm_or_are_sampled_are_different_ones(finished, questions):
    folder, _, asked = finished
    sampled = [row["prompt"][-1]["content"] for row in read_steps(folder)]
    chose = [[prompt[-1]["content"] for prompt in dataset["prompt"]] for dataset in asked]
    confirmed = [row["question"] for row in read_answers(folder, "baseline")]
    assert sampled == questions[:NUM_PROMPTS]
    assert chose == 2 * [questions[-NUM_HELD_OUT - NUM_VALIDATION : -NUM_HELD_OUT]]
    assert confirmed == questions[-NUM_HELD_OUT:]


def test_the_default_setting_is_the_first_and_the_best_is_at_least_as_good(finished, settings):
    folder, result, _ = finished
    first, *others = result.trials
    assert first["is_default"] and len(others) == settings["num_trials"] - 1
    default = result.default_setting
    assert default["learning_rate"] == 1e-5 and default["lora_target_modules"] == ["all-linear"]
    assert default["beta"] == choose_beta(read_steps(folder))  # what a run would have chosen
    assert others[0]["setting"]["lora_target_modules"] == "q_proj"
    best = max(trial["accuracy"] for trial in result.trials)
    assert [trial["accuracy"] for trial in result.trials if trial["number"] == result.best_trial] == [best]
    assert best >= first["accuracy"]


def test_the_numbers_are_those_of_questions_that_chose_nothing(finished):
    folder, result, _ = finished
    expert = [row["correct"] for row in read_answers(folder, "baseline")]
    default = [row["correct"] for row in read_answers(folder, "trial_0")]
    best = [row["correct"] for row in read_answers(folder, f"trial_{result.best_trial}")]
    assert result.accuracy_before == sum(expert) / NUM_HELD_OUT
    assert result.accuracy_after == sum(best) / NUM_HELD_OUT
    assert result.difference == compare(best, expert)._asdict()
    assert result.default_difference == compare(default, expert)._asdict()
    assert result.difference_to_default == compare(best, default)._asdict()
    assert f"on {NUM_HELD_OUT} held-out questions" in result.sentence
    assert json.loads((folder / "result.json").read_text())["sentence"] == result.sentence


def test_the_best_setting_is_taken_by_run_and_by_train(finished):
    folder, result, _ = finished
    path = str(folder / "best.yaml")
    assert yaml.safe_load(Path(path).read_text()) == result.setting
    needed = ["--expert", "E", "--amateur", "A", "--dataset_name", "D", "--output_dir", "O"]
    (run_args,) = run_command.make_parser().parse(["--config", path, *needed])
    needed = ["--model_name_or_path", "E", "--dataset_name", "D", "--output_dir", "O"]
    _, training_args, model_args = train_command.make_parser().parse(["--config", path, *needed])
    for name, value in result.setting.items():
        assert getattr(run_args, name) == value
        # TRL takes a list of one name for the name
        taken = getattr(training_args if hasattr(training_args, name) else model_args, name)
        assert taken == value or [taken] == value


def test_the_next_commands_are_commands(finished):
    _, result, _ = finished
    commands = [line.split()[1:] for line in result.summary().splitlines() if line.startswith("  lightreasoner ")]
    assert commands
    for command, *argv in commands:
        module = __import__(f"trl_lightreasoner.commands.{command}", fromlist=["make_parser"])
        assert module.make_parser().parse(argv)


def test_the_report_shows_every_trial(finished):
    folder, result, _ = finished
    page = (folder / "report" / "report.html").read_text()
    section = page[page.index('<section id="settings"') :].partition("</section>")[0]
    for trial in result.trials:
        assert f'<th scope="row">{trial["number"]}</th>' in section
    assert "best" in section and "q_proj" in section
    assert {path.name for path in folder.glob("report/trials*.png")} == {
        *("trials.png", "trials_learning_rate.png", "trials_lora_target_modules.png")
    }


def test_a_finished_search_does_nothing_again(finished, settings, monkeypatch, capsys):
    folder, result, _ = finished
    for owner, name in ((pipeline, "train_adapter"), (Answering, "complete")):
        monkeypatch.setattr(owner, name, never)
    # The report is written anew; its pictures take most of the time
    monkeypatch.setattr("trl_lightreasoner.report.write_report.save_pictures", lambda *args: [])
    assert main(["tune", *flags(settings), "--output_dir", str(folder)]) == 0
    stdout = capsys.readouterr().out
    assert "2 are already done" in stdout and result.sentence in stdout


def test_trials_on_other_questions_are_not_compared(finished, settings, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / "tuned"))
    rows = [json.loads(line) for line in Path(settings["dataset_name"]).read_text().splitlines()]
    rows[-NUM_HELD_OUT - 1]["answer"] += 1  # of a question that chooses
    write(tmp_path / "q.jsonl", rows)
    begun = json.loads((folder / "tune.json").read_text())
    begun["settings"]["dataset_name"] = str(tmp_path / "q.jsonl")  # as if the file had been changed in its place
    (folder / "tune.json").write_text(json.dumps(begun))
    args = {**settings, "dataset_name": str(tmp_path / "q.jsonl"), "num_trials": 3}
    with pytest.raises(ValueError, match="^The validation questions have changed since the search in"):
        tune(TuneConfig(output_dir=str(folder), **args))


def test_trials_whose_steps_were_deleted_are_not_taken_for_those_of_others(finished, settings, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / "tuned"))
    shutil.rmtree(folder / "steps")
    with pytest.raises(ValueError, match=f"'{folder / 'study.db'}' was trained on steps that are no longer in"):
        tune(TuneConfig(output_dir=str(folder), **settings))


def test_another_setting_in_the_same_folder_is_refused_by_name_but_more_trials_are_not(finished, settings):
    folder, _, _ = finished
    pipeline.TuneFolder(TuneConfig(output_dir=str(folder), **{**settings, "num_trials": 30}))
    for name, value in (("max_steps", 7), ("space", {"beta": [0.4, 0.8]})):
        with pytest.raises(ValueError, match=f"was started with {name} = "):
            pipeline.TuneFolder(TuneConfig(output_dir=str(folder), **{**settings, name: value}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"space": "none.yaml"}, "The search space 'none.yaml' does not exist"),
        ({"space": '{"learning_rate": [-1, 1]}'}, "`--learning_rate` must be a finite number, 0 or more, got -1"),
        ({"space": '{"lora_r": [0, 1]}'}, "`--lora_r` must be a whole number, 1 or more, got 0"),
        ({"space": '{"lora_target_modules": ["c_attn"]}'}, "names 'c_attn', which the expert does not have. It has"),
        ({"answer_column": "gold"}, "The dataset has no column 'gold'"),
        ({"num_trials": 0}, "`--num_trials` must be a whole number, 1 or more, got 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(changed, message, settings, tmp_path, capsys):
    assert main(["tune", *flags({**settings, **changed}), "--output_dir", str(tmp_path / "out")]) == 2
    stderr = capsys.readouterr().err.splitlines()[-1]
    assert stderr.startswith("lightreasoner tune: error: ") and message in stderr
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_without_answers_nothing_can_be_chosen(settings, tmp_path, questions, capsys):
    write(tmp_path / "plain.jsonl", [{"question": question} for question in questions])
    argv = flags({**settings, "dataset_name": str(tmp_path / "plain.jsonl")})
    assert main(["tune", *argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert "A search needs questions with answers" in capsys.readouterr().err.splitlines()[-1]


def test_without_optuna_one_sentence_says_what_to_install(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", *flags(settings), "--output_dir", str(tmp_path / "out")]) == 2
    stderr = capsys.readouterr().err.splitlines()[-1]
    assert stderr == "lightreasoner tune: error: A search needs Optuna: `pip install 'trl-lightreasoner[tune]'`."
