"""How a command ends where nobody reads on or after Ctrl-C, and that nothing from a file steers the terminal."""

import builtins
import io
import json
import logging
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from trl_lightreasoner import LightReasonerConfig
from trl_lightreasoner.commands import cli
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.commands.terminal import hide_file_bars
from trl_lightreasoner.hub.cards import dataset_card
from trl_lightreasoner.models.provenance import describe_quantization


HOSTILE = "\x1b[2J\x1b]0;title\x07\r\x9b31m"
ESCAPED = r"\x1b[2J\x1b]0;title\x07\r\x9b31m"


# The end of a command


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["merge", "--help"]])
def test_a_command_ends_quietly_where_nobody_reads_on(argv):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "trl_lightreasoner", *argv]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_connection_that_broke_is_an_error_like_any_other(capsys):
    def command():
        raise BrokenPipeError(32, "Broken pipe")

    assert cli.run("lightreasoner train", lambda prog: Parser(), command, []) == 2
    assert capsys.readouterr().err == "lightreasoner train: error: [Errno 32] Broken pipe\n"


def test_ctrl_c_in_the_first_seconds_is_one_line(tmp_path):
    (tmp_path / "trl.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "trl_lightreasoner", "sample", "--help"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def heed_ctrl_c():  # which what a shell has started in the background does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, **pipes, text=True, env=environment, preexec_fn=heed_ctrl_c)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, "lightreasoner: interrupted.\n")


class Parser:
    explain = with_flags = str

    def __init__(self, *args):
        self.args = args

    def parse(self, argv):
        return self.args


class Settings:
    def __init__(self, output_dir, overwrite_output_dir=False):
        self.output_dir, self.overwrite_output_dir = str(output_dir), overwrite_output_dir


@pytest.mark.parametrize(
    ("prog", "file", "overwrite", "sentence"),
    [
        ("lightreasoner sample", "run.json", False, " Rerun the same command to resume."),
        ("sample.py", "run.json", False, " Rerun the same command to resume."),
        (
            "lightreasoner run",
            "run.json",
            True,
            " Rerun the same command without `--overwrite_output_dir` to resume.",
        ),
        ("lightreasoner eval", "model/gsm8k/run.json", False, " Rerun the same command to resume."),
        ("lightreasoner sample", "other.json", False, ""),
        ("lightreasoner check", "run.json", False, ""),
        (
            "lightreasoner train",
            "checkpoint-5/trainer_state.json",
            False,
            " Rerun the same command with `--resume_from_checkpoint true` to resume from the last checkpoint.",
        ),
        ("lightreasoner train", "run.json", False, ""),
    ],
)
def test_ctrl_c_says_how_to_resume(prog, file, overwrite, sentence, tmp_path, capsys):
    def command(settings):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        raise KeyboardInterrupt

    assert cli.run(prog, lambda prog: Parser(Settings(tmp_path, overwrite)), command, []) == 130
    assert capsys.readouterr().err == f"{prog}: interrupted.{sentence}\n"


def test_ctrl_c_does_not_advise_to_resume_from_a_model_alone(tmp_path, capsys):
    def command(settings):
        (tmp_path / "checkpoint-5").mkdir()
        (tmp_path / "checkpoint-5" / "trainer_state.json").touch()
        raise KeyboardInterrupt

    settings = LightReasonerConfig(str(tmp_path), save_only_model=True, use_cpu=True)
    assert cli.run("lightreasoner train", lambda prog: Parser(settings), command, []) == 130
    assert capsys.readouterr().err == "lightreasoner train: interrupted.\n"


# What leaves for the terminal and for cards


def test_what_a_command_says_is_printable(capsys, caplog):
    def command():
        print(f"1\u00a0000 \u2260 {HOSTILE}\n\tdone")
        logging.getLogger("of.any.library").warning("%s \x1b[31mred\x1b[0m\nline", HOSTILE)

    assert cli.run("lightreasoner sample", lambda prog: Parser(), command, []) == 0
    assert capsys.readouterr().out == f"1\u00a0000 \u2260 {ESCAPED}\n\tdone\n"
    assert caplog.messages == [f"Warning: {ESCAPED} \x1b[31mred\x1b[0m\nline"]  # colours do no harm


@pytest.mark.parametrize(("count", "rank"), [("1", ""), ("2", "[RANK 0] ")])
def test_a_warning_begins_with_the_word(count, rank, monkeypatch, capsys, caplog):
    def command():
        logging.getLogger("of.any.library").warning("[RANK 0] That is odd.")
        logging.getLogger("of.any.library").error("That is wrong.")
        warnings.warn(f"That too{HOSTILE}.", stacklevel=1)

    monkeypatch.setenv("WORLD_SIZE", count)
    assert cli.run("lightreasoner sample", lambda prog: Parser(), command, []) == 0
    assert caplog.messages == [f"Warning: {rank}That is odd.", "That is wrong."]
    assert capsys.readouterr().err == f"Warning: That too{ESCAPED}.\n"


def test_what_nobody_can_act_on_is_left_out(capsys):
    pinned = (
        "'pin_memory' argument is set as true but no accelerator is found, then device pinned memory won't be used."
    )

    def command():
        for category, text, module in [
            (FutureWarning, "`is_gradient_checkpointing` is deprecated", "transformers.modeling_utils"),
            (UserWarning, pinned, "torch.utils.data.dataloader"),
            (FutureWarning, "Yours.", "users.module"),
            (UserWarning, "Theirs.", "transformers.modeling_utils"),
        ]:
            warnings.warn_explicit(text, category, "file.py", 1, module)

    before = warnings.filters[:], warnings.showwarning
    assert cli.run("lightreasoner train", lambda prog: Parser(), command, []) == 0
    assert capsys.readouterr().err == "Warning: Yours.\nWarning: Theirs.\n"
    assert (warnings.filters[:], warnings.showwarning) == before  # of the host


def test_bars_over_files_are_hidden_and_those_over_rows_are_not(tmp_path, capsys, monkeypatch):
    import datasets.io.parquet

    for module in (datasets.builder, datasets.io.parquet):
        monkeypatch.setattr(module, "hf_tqdm", module.hf_tqdm)
    datasets.enable_progress_bars()  # which other commands, run before, have disabled
    hide_file_bars()
    rows = datasets.Dataset.from_dict({"a": [1, 2]})
    rows.to_parquet(tmp_path / "rows.parquet")
    datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert capsys.readouterr().err == ""
    rows.map(lambda row: {"b": row["a"]}, desc="Doing rows")
    assert "Doing rows" in capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.run("lightreasoner sample", lambda prog: Parser(), lambda: print("1 \u2260 \udc802"), []) == 0
    assert stdout.buffer.getvalue() == b"1 \\u2260 \\udc802\n"


def test_the_name_of_a_tensor_does_not_steer_the_terminal(
    expert, tokenizer, steps, tmp_path, propagated_logs, caplog, capsys
):
    expert.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors") | {f"lm_head.{HOSTILE}": torch.zeros(1)}
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    steps.to_parquet(tmp_path / "steps.parquet")
    argv = ["train", "--model_name_or_path", "model", "--dataset_name", "steps.parquet", "--output_dir", "out"]
    argv = [str(tmp_path / arg) if arg in ("model", "steps.parquet", "out") else arg for arg in argv]
    assert main([*argv, "--use_cpu", "--max_steps", "1", "--disable_tqdm", "true"]) == 2
    told = capsys.readouterr().err
    assert "lm_head." + ESCAPED.replace("\\r", " ") in told  # an error is one line
    assert HOSTILE not in caplog.text + told


def test_metadata_does_not_hide_in_a_card(steps):
    made = json.loads(steps[0]["sampling_metadata"])
    made["expert"] |= {"model": f"models/{HOSTILE}", "quantization": {"quant_method": HOSTILE}, "dtype": HOSTILE}
    made["settings"]["dtype"] = HOSTILE
    hostile = steps.map(lambda row: {"sampling_metadata": json.dumps(made)})
    text = dataset_card({"train": hostile}, "me/steps").content
    assert all(line.isprintable() for line in text.split("\n"))
    assert ESCAPED in text
    assert describe_quantization({"quant_method": HOSTILE}).isprintable()


# What is read is UTF-8, whatever the locale


@pytest.fixture
def windows_locale(monkeypatch):
    """Files that are opened as text without an encoding are read as CP1252."""
    open_as_named = builtins.open

    def open_as_cp1252(file, mode="r", buffering=-1, encoding=None, *args, **kwargs):
        return open_as_named(file, mode, buffering, encoding or (None if "b" in mode else "cp1252"), *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_as_cp1252)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_config_file_is_utf8_whatever_the_locale(encoding, windows_locale, tmp_path):
    from trl_lightreasoner.commands.sample import make_parser

    config = tmp_path / "config.yaml"
    config.write_text("system_prompt: Löse Schritt für Schritt ∑\n", encoding=encoding)
    argv = ["--config", str(config), "--expert", "a", "--amateur", "b", "--dataset_name", "c", "--output_dir", "d"]
    assert make_parser().parse(argv)[0].system_prompt == "Löse Schritt für Schritt ∑"


@pytest.mark.parametrize("flag", ["--config", "--prompt_template"])
def test_a_file_in_latin_1_is_refused_by_name_and_line(flag, tmp_path, capsys):
    file = tmp_path / "file.txt"
    file.write_text("# one\n# für {question}\n", encoding="latin-1")
    argv = ["--expert", "a", "--amateur", "b", "--dataset_name", "c", "--output_dir", "d"]
    assert main(["sample", *argv, flag, str(file)]) == 2
    assert f" {str(file)!r} is not in UTF-8 (line 2). Save it as UTF-8.\n" in capsys.readouterr().err
