"""`run_pipeline` and `lightreasoner run` on the bundled pair, with few questions."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import load_dataset
from filelock import FileLock
from transformers import AutoModelForCausalLM

from trl_lightreasoner import RunConfig, RunResult, evaluate, run_pipeline
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.evaluation.answering import Answering
from trl_lightreasoner.evaluation.evaluation_config import EvaluationConfig
from trl_lightreasoner.evaluation.statistics import compare
from trl_lightreasoner.generation import batches
from trl_lightreasoner.models import loading
from trl_lightreasoner.pipeline import rounds, stages
from trl_lightreasoner.pipeline import run as pipeline
from trl_lightreasoner.sampling import contrastive_step_sampler, family_amateur
from trl_lightreasoner.training.lightreasoner_trainer import LightReasonerTrainer

from ..evaluation.test_sets import FILES, write


pytest.importorskip("math_verify")
NUM_PROMPTS, NUM_HELD_OUT = 24, 20


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    problems = make_problems(60, seed=0, kind_shares=KIND_SHARES)
    rows = [{"question": problem["question"], "answer": problem["answer"]} for problem in problems]
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write(path, rows)
    return str(path)


@pytest.fixture(scope="module")
def settings(questions) -> dict:
    return {
        **{"expert": str(PAIR / "expert"), "amateur": str(PAIR / "amateur"), "dataset_name": questions},
        **{"num_prompts": NUM_PROMPTS, "num_held_out": NUM_HELD_OUT, "system_prompt": ""},
        **{"max_new_tokens": 64, "eval_max_new_tokens": 64, "max_steps": 12, "learning_rate": 5e-4},
    }


def flags(settings: dict) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings) -> tuple[Path, str, str]:
    """The folder of a run by the command as users start it, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, "-m", "trl_lightreasoner", "run", *flags(settings), "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process, so that the numbers are the same
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They take most of the time of a short run; `finished` has them."""
    monkeypatch.setattr("trl_lightreasoner.report.write_report.save_pictures", lambda *args: [])


@pytest.fixture
def args(settings, tmp_path) -> RunConfig:
    return RunConfig(output_dir=str(tmp_path / "run"), **settings)


def read_answers(folder: Path, role: str, name: str = "held_out") -> list[dict]:
    path = str(folder / "evaluation" / role / f"{name}.parquet")
    return load_dataset("parquet", data_files=path, split="train").to_list()


def test_everything_is_where_the_single_commands_would_leave_it(finished):
    folder, _, _ = finished
    for name in (
        *("run.json", "check.json", "verdict.json", "steps/run.json", "steps/data", "report/report.html"),
        *("adapter/adapter_model.safetensors", "adapter/trainer_state.json", "adapter/prompt_format.json"),
        *("evaluation/model/held_out.parquet", "evaluation/baseline/held_out.parquet", "evaluation/results.json"),
    ):
        assert (folder / name).exists(), name
    assert not list(folder.rglob("*.tmp"))


def test_it_says_which_stage_it_is_at_and_ends_with_a_verdict(finished):
    folder, stdout, _ = finished
    stages = re.findall(r"^(\d)/6 (.+)$", stdout, flags=re.MULTILINE)
    assert [number for number, _ in stages] == list("123456")
    assert stages[0][1] == f"Checking the pair on {NUM_PROMPTS} questions"
    verdict = json.loads((folder / "verdict.json").read_text())
    before, _, after = stdout.partition(f"\n{verdict['sentence']}\n")
    assert "| Held out" in before and f"on {NUM_HELD_OUT} held-out questions" in verdict["sentence"]
    for name in ("adapter", "report/report.html", "evaluation/results.json", "verdict.json"):
        assert str(folder / name) in after
    assert "lightreasoner merge --model" in after and "lightreasoner eval --model" in after


def test_the_next_commands_are_commands(finished):
    _, stdout, _ = finished
    for line in re.findall(r"^  lightreasoner (.+)$", stdout, flags=re.MULTILINE):
        command, *argv = line.split()
        module = __import__(f"trl_lightreasoner.commands.{command}", fromlist=["make_parser"])
        assert module.make_parser().parse(argv)


def test_nothing_is_said_of_another_expert_or_of_a_second_adapter(finished):
    stderr = finished[2]
    assert "The expert was sampled" not in stderr and "peft_config" not in stderr


def test_held_out_questions_are_not_sampled(finished, questions):
    folder, _, _ = finished
    rows = [json.loads(line)["question"] for line in Path(questions).read_text().splitlines()]
    steps = load_dataset("parquet", data_dir=str(folder / "steps" / "data"), split="train")
    sampled = [row["prompt"][-1]["content"] for row in steps]
    answered = [row["question"] for row in read_answers(folder, "model")]
    assert sampled == rows[:NUM_PROMPTS]
    assert answered == rows[-NUM_HELD_OUT:]
    assert not set(sampled) & set(answered)


def test_the_numbers_of_the_verdict_are_those_of_the_answers(finished):
    folder, _, _ = finished
    after, before = ([row["correct"] for row in read_answers(folder, role)] for role in ("model", "baseline"))
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["difference"] == compare(after, before)._asdict()
    assert verdict["accuracy_before"] == sum(before) / NUM_HELD_OUT
    assert verdict["accuracy_after"] == sum(after) / NUM_HELD_OUT
    assert (verdict["num_prompts"], verdict["num_held_out"], verdict["num_updates"]) == (NUM_PROMPTS, NUM_HELD_OUT, 12)
    stages = {"check", "sample", "answer_before", "train", "report", "answer_after"}
    assert set(verdict["seconds"]) == {*stages, "total"}


def test_the_answers_are_those_of_the_models_on_the_disk(finished, questions, tmp_path):
    folder, _, _ = finished
    rows = Path(questions).read_text().splitlines(keepends=True)
    (tmp_path / "last.jsonl").write_text("".join(rows[60 - NUM_HELD_OUT : 60]))
    args = EvaluationConfig(
        str(tmp_path),
        benchmarks=[str(tmp_path / "last.jsonl")],
        dtype="float32",
        max_new_tokens=64,
        num_workers=1,
    )
    evaluate(str(folder / "adapter"), args, baseline=str(PAIR / "expert"))  # in the form of the training
    for role in ("model", "baseline"):
        loaded = load_dataset("parquet", data_files=str(tmp_path / role / "last.parquet"), split="train").to_list()
        assert read_answers(folder, role) == loaded


def test_the_function_does_what_the_command_does(finished, args):
    folder, _, _ = finished
    result = run_pipeline(args)
    assert isinstance(result, RunResult)
    of_command = json.loads((folder / "verdict.json").read_text())
    apart = {"seconds": None, "output_dir": None}
    assert {**result.to_dict(), **apart} == {**of_command, **apart}
    for role in ("model", "baseline"):
        assert read_answers(Path(args.output_dir), role) == read_answers(folder, role)
    assert result.summary().count(result.sentence) == 1


def never(*_, **__):
    raise AssertionError("a finished stage is done again")


def test_a_finished_run_does_nothing_again(finished, settings, monkeypatch):
    folder, _, _ = finished
    for owner, name in (
        *((family_amateur, "score_trajectories"), (rounds, "train_adapter"), (pipeline, "write_report")),
        *((Answering, "complete"), (contrastive_step_sampler.ContrastiveStepSampler, "check")),
    ):
        monkeypatch.setattr(owner, name, never)
    sentence = json.loads((folder / "verdict.json").read_text())["sentence"]
    assert run_pipeline(RunConfig(output_dir=str(folder), **settings)).sentence == sentence


def test_a_tokenizer_that_both_models_have_is_loaded_once(finished, settings, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "report")
    shutil.rmtree(folder / "evaluation" / "model")
    loaded, load = [], loading._load_tokenizer
    monkeypatch.setattr(loading, "_load_tokenizer", lambda source, *args: loaded.append(source) or load(source, *args))
    run_pipeline(RunConfig(output_dir=str(folder), **settings))
    assert loaded == [settings["expert"]]
    assert read_answers(folder, "model") == read_answers(finished[0], "model")


def interrupt_at(number: int, function):
    """The function, of which a call is Ctrl-C instead."""
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


@pytest.fixture(scope="module")
def short(settings) -> dict:
    """Settings of a run of short answers and few updates."""
    return {**settings, "eval_max_new_tokens": 32, "max_new_tokens": 32, "max_steps": 4}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, short) -> RunResult:
    """What is made of them by a run that nothing breaks off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_lightreasoner.report.write_report.save_pictures", lambda *args: [])
        patch.setattr(batches, "CPU_ROWS", (16, 16))
        return run_pipeline(RunConfig(output_dir=str(tmp_path_factory.mktemp("left alone") / "run"), **short))


SAMPLING = [
    (family_amateur, "score_trajectories"),
    (contrastive_step_sampler.ContrastiveStepSampler, "check"),
]


@pytest.mark.parametrize(
    ("owner", "name", "call", "finished_stages"),
    [
        (family_amateur, "score_trajectories", 4, []),  # two batches are of the check
        (rounds, "train_adapter", 1, SAMPLING),
        (LightReasonerTrainer, "save_model", 2, SAMPLING),  # behind the checkpoint of the last update
        (Answering, "complete", 1, SAMPLING),
        (Answering, "complete", 2, [*SAMPLING, (rounds, "train_adapter")]),
        (pipeline, "write_report", 1, [*SAMPLING, (rounds, "train_adapter"), (Answering, "complete")]),
    ],
    ids=["sampling", "before training", "behind training", "answers before", "answers after", "report"],
)
def test_a_run_that_was_broken_off_goes_on(
    owner, name, call, finished_stages, short, left_alone, tmp_path, monkeypatch
):
    args = RunConfig(output_dir=str(tmp_path / "run"), **short)
    monkeypatch.setattr(batches, "CPU_ROWS", (16, 16))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt_at(call, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(args)
    assert not (Path(args.output_dir) / "verdict.json").exists()
    for place, stage in finished_stages:
        monkeypatch.setattr(place, stage, never)
    result = run_pipeline(args)
    apart = {"seconds": None, "output_dir": None}
    assert {**result.to_dict(), **apart} == {**left_alone.to_dict(), **apart}
    for role in ("model", "baseline"):
        assert read_answers(Path(args.output_dir), role) == read_answers(Path(left_alone.output_dir), role)


def test_an_adapter_whose_steps_were_deleted_is_not_taken_for_that_of_others(finished, settings, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    shutil.rmtree(folder / "steps")
    with pytest.raises(ValueError, match=f"'{folder / 'adapter'}' was trained on steps that are no longer"):
        run_pipeline(RunConfig(output_dir=str(folder), **settings))
    assert (folder / "adapter").exists() and not (folder / "steps").exists()


def test_a_check_is_not_reused_before_the_sampling_knows_its_models(short, tmp_path, monkeypatch):
    args = RunConfig(output_dir=str(tmp_path / "run"), **short)
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "sample_steps", interrupt_at(1, rounds.sample_steps))
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(args)
    check = tmp_path / "run" / "check.json"
    other = {**json.loads(check.read_text()), "verdict": "swapped"}  # as of an amateur that has been replaced since
    check.write_text(json.dumps(other))
    assert run_pipeline(args).pair == json.loads(check.read_text())["verdict"] != "swapped"


def test_another_setting_in_the_same_folder_is_refused_by_name(finished, settings, capsys):
    folder, _, _ = finished
    assert main(["run", *flags({**settings, "num_prompts": 30}), "--output_dir", str(folder)]) == 2
    stderr = capsys.readouterr().err.splitlines()[-1]
    assert "was started with num_prompts = 24, but it is now 30. Restore that value to resume" in stderr


def test_what_no_run_left_is_refused(args):
    (Path(args.output_dir) / "adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds files that are not from a run"):
        run_pipeline(args)


def test_overwriting_deletes_what_a_run_left_and_nothing_else(args, monkeypatch):
    folder = Path(args.output_dir)
    (folder / "adapter").mkdir(parents=True)
    for name in ("run.json", "adapter/old", "notes.txt"):
        (folder / name).write_text("{}")
    monkeypatch.setattr(pipeline, "check_pair", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_pipeline(dataclasses.replace(args, overwrite_output_dir=True))
    assert (folder / "notes.txt").exists() and not (folder / "adapter").exists()
    assert json.loads((folder / "run.json").read_text())["settings"]["num_prompts"] == NUM_PROMPTS


def test_two_runs_do_not_share_a_folder(args):
    Path(args.output_dir).mkdir()
    with FileLock(Path(args.output_dir) / ".lock"), pytest.raises(ValueError, match="Another run is writing into"):
        run_pipeline(args)


def test_without_answers_it_trains_and_says_that_nothing_was_answered(args, questions, tmp_path, capsys):
    rows = [{"question": json.loads(line)["question"]} for line in Path(questions).read_text().splitlines()]
    write(tmp_path / "plain.jsonl", rows)
    result = run_pipeline(dataclasses.replace(args, dataset_name=str(tmp_path / "plain.jsonl"), max_steps=2))
    assert result.verdict == "not answered" and result.sentence.startswith("The adapter was not evaluated")
    assert (Path(args.output_dir) / "adapter" / "adapter_model.safetensors").is_file()
    assert not (Path(args.output_dir) / "evaluation").exists()
    assert re.findall(r"^\d/4 ", capsys.readouterr().out, flags=re.MULTILINE) == ["1/4 ", "2/4 ", "3/4 ", "4/4 "]
    assert json.loads((Path(args.output_dir) / "verdict.json").read_text())["accuracy_after"] is None


def test_benchmarks_are_answered_as_well(args, tmp_path):
    write(tmp_path / "files" / "gsm8k.jsonl", FILES["gsm8k"])
    files = {"benchmarks": ["gsm8k"], "data_dir": str(tmp_path / "files")}
    result = run_pipeline(dataclasses.replace(args, max_steps=1, num_held_out=4, eval_max_new_tokens=8, **files))
    assert list(result.results["benchmarks"]) == ["held_out", "gsm8k"]
    assert "held-out questions" in result.sentence and "| GSM8K" in result.summary()


def test_a_pair_that_does_not_look_promising_is_a_warning(args, capsys):
    assert run_pipeline(dataclasses.replace(args, num_prompts=4, num_held_out=0, max_steps=1)).pair == "doubtful"
    assert "Warning: This pair is doubtful. There are only " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"amateur": str(PAIR / "expert")}, "Expert and amateur have equal weights"),
        ({"expert": "no-such/model"}, "The expert 'no-such/model' cannot be found"),
        ({"expert": "./no/such/folder"}, "The expert './no/such/folder' cannot be found"),
        ({"dataset_name": "nothing.jsonl"}, "There is no file or folder 'nothing.jsonl'"),
        ({"prompt_column": "problem"}, "The dataset has no column 'problem'"),
        ({"answer_column": "gold"}, "it has 'question', 'answer'. Name the column of answers with"),
        ({"alpha": 2.0}, "`--alpha` must be in (0, 1]"),
        ({"beta": -1.0}, "`--beta` must be a finite number, 0 or more"),
        ({"beta": 1e6}, "lower it"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(changed, message, settings, tmp_path, capsys):
    assert main(["run", *flags({**settings, **changed}), "--output_dir", str(tmp_path / "run")]) == 2
    stderr = capsys.readouterr().err.splitlines()[-1]
    assert stderr.startswith("lightreasoner run: error: ") and message in stderr


def test_a_refused_pair_leaves_the_folder_to_another(args):
    with pytest.raises(ValueError, match="equal weights"):
        run_pipeline(dataclasses.replace(args, amateur=args.expert))
    assert run_pipeline(dataclasses.replace(args, num_prompts=4, num_held_out=0, max_steps=1)).num_updates == 1


def test_an_adapter_is_no_expert(finished, args):
    with pytest.raises(ValueError, match="is an adapter. Merge it into a full model with `lightreasoner merge`"):
        run_pipeline(dataclasses.replace(args, expert=str(finished[0] / "adapter")))


def test_several_processes_are_refused(args, monkeypatch):
    monkeypatch.setattr(stages, "Processes", lambda: SimpleNamespace(count=2))
    with pytest.raises(ValueError, match="`lightreasoner run` runs in a single process"):
        run_pipeline(args)


def test_several_gpus_are_refused(args, monkeypatch):
    monkeypatch.setattr(stages.LightReasonerConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="uses a single GPU, but several are visible.*`CUDA_VISIBLE_DEVICES=0`"):
        run_pipeline(args)


def test_each_model_is_loaded_once(args, monkeypatch):
    loaded = []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: loaded.append(name) or original(name, **kwargs)
    )
    run_pipeline(dataclasses.replace(args, num_held_out=4, max_steps=1))
    assert sorted(loaded) == [str(PAIR / "amateur"), str(PAIR / "expert")]


@pytest.mark.parametrize(
    ("accuracy", "verdict", "is_told"),
    [(0.016, "not significant", True), (0.016, "better", False), (0.3, "worse", False), (None, "not answered", False)],
)
def test_an_expert_that_hardly_answers_may_need_another_prompt(accuracy, verdict, is_told):
    values = {each.name: None for each in dataclasses.fields(RunResult)} | {"output_dir": "run", "expert": "e"}
    result = RunResult(**values | {"sentence": "So.", "accuracy_before": accuracy, "verdict": verdict})
    assert (
        "The expert answers only 1.6 % of the questions correctly. If it can do better" in result.summary()
    ) == is_told
