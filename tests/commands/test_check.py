"""`lightreasoner check` as a user runs it."""

import dataclasses
import json
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_lightreasoner import ContrastiveSamplingConfig, PairCheck
from trl_lightreasoner.commands.check import CheckSamplingConfig, make_parser
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.commands.sample import make_parser as make_sample_parser
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR
from trl_lightreasoner.demo.task import make_problems

from ..conftest import QUESTIONS, make_model


@pytest.fixture(scope="module")
def problems_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    problems = make_problems(60, seed=0, split="train", kind_shares=KIND_SHARES)
    path.write_text("".join(json.dumps({"question": problem["question"]}) + "\n" for problem in problems))
    return str(path)


@pytest.fixture
def prompts_file(tmp_path) -> str:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in QUESTIONS))
    return str(tmp_path / "prompts.jsonl")


@pytest.fixture
def bundled(problems_file) -> list[str]:
    """The bundled pair and its problems, of which the gain is known."""
    pair = ["--expert", str(PAIR / "expert"), "--amateur", str(PAIR / "amateur")]
    prompts = ["--dataset_name", problems_file, "--prompt_column", "question"]
    return ["check", *pair, *prompts, "--beta", "0.4", "--include_first_step", "false"]


@pytest.fixture
def tiny(expert_path, amateur_path, prompts_file) -> list[str]:
    pair = ["--expert", expert_path, "--amateur", amateur_path]
    return ["check", *pair, "--dataset_name", prompts_file, "--max_new_tokens", "6"]


def test_a_promising_pair_is_status_0_and_the_text_says_why(bundled, capsys):
    assert main([*bundled, "--conversational"]) == 0
    stdout = capsys.readouterr().out
    assert stdout.startswith("50 prompts, 955 steps, 80 of them kept\n")
    assert "This pair is promising." in stdout and "␣#### -> ␣" in stdout
    assert stdout.count("\n  amateur  OK, ") == 3


def test_before_the_work_it_is_said_that_plain_prompts_are_not_in_the_chat_template(bundled, tmp_path, capsys):
    main([*bundled, "--num_prompts", "1"])
    hint = r"prompts as plain text \(`--conversational` puts them in the chat template\)\."
    assert re.search(rf"^Running on: .*, {hint}$", capsys.readouterr().err, re.MULTILINE)
    expert = shutil.copytree(PAIR / "expert", tmp_path / "expert")
    (expert / "chat_template.jinja").unlink()
    main([each.replace(str(PAIR / "expert"), str(expert)) for each in bundled] + ["--num_prompts", "1"])
    assert re.search(r"^Running on: .*, prompts as plain text\.$", capsys.readouterr().err, re.MULTILINE)


def test_the_command_that_comes_next_samples_what_was_checked(bundled, tmp_path, capsys):
    assert main([*bundled, "--conversational", "--max_new_tokens", "64", "--include_first_step", "true"]) == 0
    stdout, stderr = capsys.readouterr()
    batch = "as many prompts at a time as fit in memory" if torch.cuda.is_available() else "16 to 64 prompts at a time"
    dtype = "float16" if torch.cuda.is_available() else r"float32 \(float16 is slow on a CPU\)"
    assert re.search(rf"^Running on: .*, expert in {dtype}, {batch}, prompts in the expert's chat", stderr)
    program, command, *flags = shlex.split(stdout.partition("\nNext: ")[2])
    assert (program, command, flags[-2:]) == ("lightreasoner", "sample", ["--output_dir", "STEPS"])
    args, sampling_args = make_sample_parser().parse(flags)
    assert (args.expert, args.dataset_name, args.prompt_column) == (bundled[2], bundled[6], "question")
    assert (args.prompt_style, sampling_args.max_new_tokens, sampling_args.include_first_step) == ("chat", 64, True)


def test_the_command_that_comes_next_names_the_layers(tiny, monkeypatch, capsys):
    monkeypatch.setattr(PairCheck, "promising", True)
    assert main([*tiny, "--amateur_num_skipped_layers", "1"]) == 0
    assert " --amateur_skipped_layers 0 " in capsys.readouterr().out.partition("\nNext: ")[2]


def test_a_pair_that_is_not_is_status_1(bundled, capsys):
    assert main([*bundled, "--num_prompts", "20"]) == 1
    stdout = capsys.readouterr().out
    assert "This pair is not promising: the prompts lack the chat template." in stdout
    assert "`--conversational`" in stdout


def test_a_mistake_is_status_2_and_one_sentence(tiny, capsys):
    assert main([*tiny, "--prompt_column", "question"]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.splitlines()[-1].startswith(
        "lightreasoner check: error: The dataset has no column 'question'"
    )


def test_equal_weights_are_status_2(tiny, expert_path, capsys):
    assert main([*tiny, "--amateur", expert_path]) == 2
    stderr = capsys.readouterr().err.splitlines()[-1]
    assert stderr.startswith("lightreasoner check: error: Expert and amateur have equal weights")
    assert stderr.endswith("Choose a weaker model as the amateur.")


def test_a_copy_under_another_name_is_refused_as_well(tiny, expert_path, tokenizer, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(expert_path).save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    assert main([*tiny, "--amateur", str(tmp_path / "copy"), "--json"]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and "Expert and amateur have equal weights" in stderr


@pytest.mark.parametrize("number", ["0", "-1"])
def test_a_wrong_number_of_prompts_is_refused(number, tiny, capsys):
    assert main([*tiny, "--num_prompts", number]) == 2
    assert f"`--num_prompts` must be a whole number, 1 or more, got {number}." in capsys.readouterr().err


def test_json_is_one_object_and_nothing_else(tiny, capsys):
    assert main([*tiny, "--json"]) == 1
    check = json.loads(capsys.readouterr().out)
    assert {field.name for field in dataclasses.fields(PairCheck)} < set(check)
    assert (check["verdict"], check["promising"], check["num_prompts"]) == ("doubtful", False, len(QUESTIONS))
    assert len(check["amateur_answers"]) == 3


def test_no_folder_is_needed_and_none_is_left(tiny, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    assert main([*tiny, "--num_prompts", "2"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_config_file_of_sample_can_be_used(tmp_path):
    (tmp_path / "both.yaml").write_text("expert: e\namateur: a\ndataset_name: d\noutput_dir: o\nbeta: 0.1\n")
    args, sampling_args = make_parser().parse(["--config", str(tmp_path / "both.yaml"), "--num_prompts", "7"])
    assert (args.expert, sampling_args.num_prompts, sampling_args.beta) == ("e", 7, 0.1)
    assert make_sample_parser().parse(["--config", str(tmp_path / "both.yaml")])[1].output_dir == "o"


def test_its_settings_are_those_of_sampling():
    fields = {field.name: field.default for field in dataclasses.fields(ContrastiveSamplingConfig)}
    own = {field.name: field.default for field in dataclasses.fields(CheckSamplingConfig)}
    assert fields | {"output_dir": own["output_dir"], "num_prompts": 50} == own


def test_what_a_model_says_does_not_steer_the_terminal(tokenizer, tmp_path, prompts_file, expert_path, capsys):
    amateur = make_model(tokenizer, 3, 16, 4)
    with torch.no_grad():  # which then says one token, an escape, for ever
        amateur.lm_head.weight.zero_()
        amateur.lm_head.weight[tokenizer.convert_tokens_to_ids("ě")] = 1.0
    amateur.save_pretrained(tmp_path / "amateur")
    tokenizer.save_pretrained(tmp_path / "amateur")
    argv = ["--expert", expert_path, "--amateur", str(tmp_path / "amateur"), "--dataset_name", prompts_file]
    assert main(["check", *argv, "--max_new_tokens", "4"]) in (0, 1)
    assert all(char.isprintable() or char == "\n" for char in capsys.readouterr().out)


def run_in_group(rank: int, argv: list[str], folder: Path) -> None:
    sys.stdout = open(folder / f"stdout-{rank}", "w")
    torch.set_num_threads(1)
    assert main(argv) == 0
    sys.stdout.close()


def test_one_of_several_processes_prints(bundled, in_group, tmp_path):
    in_group(2, run_in_group, [*bundled, "--conversational", "--json"], tmp_path)
    check = json.loads((tmp_path / "stdout-0").read_text())
    assert (check["num_steps"], check["num_kept"], check["verdict"]) == (955, 80, "promising")
    assert (tmp_path / "stdout-1").read_text() == ""


def test_a_required_key_without_a_value_is_missing(bundled, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("dataset_name:\n")
    assert main(["check", "--expert", bundled[2], "--config", str(tmp_path / "config.yaml")]) == 2
    assert "arguments are required: --dataset_name." in capsys.readouterr().err
