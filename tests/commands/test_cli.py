import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import weakref
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    EvaluationConfig,
    LightReasonerConfig,
    RunConfig,
    TuneConfig,
    __version__,
    sampling_metadata,
)
from trl_lightreasoner.commands.check import CheckArguments, CheckSamplingConfig
from trl_lightreasoner.commands.cli import COMMANDS, main, run
from trl_lightreasoner.commands.eval import EvaluationArguments
from trl_lightreasoner.commands.import_steps import ImportArguments
from trl_lightreasoner.commands.merge import MergeArguments
from trl_lightreasoner.commands.report import ReportArguments
from trl_lightreasoner.commands.running_on import announce
from trl_lightreasoner.commands.sample import SampleArguments
from trl_lightreasoner.commands.sample import make_parser as make_sample_parser
from trl_lightreasoner.commands.train import LightReasonerModelConfig, TrainArguments, load_questions
from trl_lightreasoner.commands.train import make_parser as make_train_parser
from trl_lightreasoner.sampling.pair_check import CAVEAT
from trl_lightreasoner.steps import splits
from trl_lightreasoner.steps.beta import choose_beta
from trl_lightreasoner.steps.prompt_format import PromptFormat
from trl_lightreasoner.steps.splits import load_split
from trl_lightreasoner.training.adapters import choose_target_modules

from ..conftest import QUESTIONS, make_model


@pytest.fixture
def refused(capsys):
    """The one sentence with which the program refuses its arguments."""

    def run(*argv) -> str:
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as error:
            status = error.code
        stderr = capsys.readouterr().err
        assert status == 2
        assert "Traceback" not in stderr
        *_, line = stderr.rstrip("\n").split("\n")
        assert line.startswith("lightreasoner") and ": error: " in line
        return line.partition(": error: ")[2]

    return run


@pytest.fixture
def write_config(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text)
        return str(tmp_path / "config.yaml")

    return write


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": question}) + "\n" for question in QUESTIONS))
    return str(path)


@pytest.fixture(scope="session")
def steps_file(tmp_path_factory, steps) -> str:
    path = tmp_path_factory.mktemp("steps_file") / "steps.parquet"
    steps.to_parquet(path)
    return str(path)


@pytest.fixture
def train(expert_path, steps_file, tmp_path):
    """`train` with what it needs, and more flags."""
    return (
        "train",
        *("--model_name_or_path", expert_path, "--dataset_name", steps_file, "--output_dir", tmp_path / "out"),
        *("--use_cpu", "--max_steps", "1", "--report_to", "none", "--disable_tqdm", "true"),
    )


def run_train(*argv) -> None:
    assert main([str(arg) for arg in argv]) == 0


# The program


def test_help_and_version_import_neither_torch_nor_transformers():
    code = """
import sys
from trl_lightreasoner.commands.cli import main
assert [main([argument]) for argument in ("--help", "--version", "-h")] == [0, 0, 0]
assert not {"torch", "transformers", "trl", "datasets"} & set(sys.modules), "imported too much"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert __version__ in result.stdout.splitlines() and result.stdout.count("commands:") == 2


def test_the_module_is_the_program_and_its_status_is_the_exit_status():
    result = subprocess.run([sys.executable, "-m", "trl_lightreasoner", "frobnicate"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("lightreasoner: error: There is no command 'frobnicate'. The commands are ")
    assert result.stdout == ""


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    stdout = capsys.readouterr().out
    assert all(f"  {command} " in stdout for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_a_missing_command_is_refused(refused):
    assert refused().startswith("A command is missing. The commands are ")


@pytest.mark.parametrize(
    ("command", "configs"),
    [
        ("run", [RunConfig]),
        ("tune", [TuneConfig]),
        ("check", [CheckArguments, CheckSamplingConfig]),
        ("sample", [SampleArguments, ContrastiveSamplingConfig]),
        ("train", [TrainArguments, LightReasonerConfig, LightReasonerModelConfig]),
        ("merge", [MergeArguments]),
        ("report", [ReportArguments]),
        ("import", [ImportArguments]),
        ("eval", [EvaluationArguments, EvaluationConfig]),
    ],
)
def test_help_explains_every_field(command, configs, capsys):
    module = {"import": "import_steps"}.get(command, command)
    parser = import_module(f"trl_lightreasoner.commands.{module}").make_parser()
    with pytest.raises(SystemExit) as error:
        main([command, "--help-all" if command == "train" else "--help"])
    assert error.value.code == 0
    stdout = capsys.readouterr().out
    assert f"usage: lightreasoner {command}" in stdout
    actions = {action.dest: action for action in reversed(parser._actions)}
    for field in (field for config in configs for field in dataclasses.fields(config)):
        assert (actions[field.name].help or "").strip(), f"--{field.name} has no help"
        shown = f"  {actions[field.name].option_strings[0]} " in stdout
        assert shown != (field.name in parser._refused), field.name


def test_help_of_train_is_what_most_need_and_its_groups(capsys):
    text = make_train_parser("lightreasoner train").format_help()
    assert len(text.splitlines()) < 220
    for section in ("settings:", "LoRA:", "quantization:", "Hub:", "`--help-all` shows ", "example:"):
        assert f"\n{section}" in text
    assert text.endswith("with `--resume_from_checkpoint true`.\n")
    assert "  --expert TEXT" in text and "  --use_peft [true|false]" in text and "(default: None)" not in text
    assert "--adam_beta1" not in text and "--dataset_streaming" not in text and "--no_use_peft" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_one(command):
    module = import_module(f"trl_lightreasoner.commands.{ {'import': 'import_steps'}.get(command, command) }")
    program, name, *argv = shlex.split(module.EXAMPLE.removeprefix("example:").replace("\\\n", " "))
    parser = module.make_parser()
    assert (program, name) == ("lightreasoner", command)
    parser.parse(argv)
    assert module.EXAMPLE in parser.format_help()


def test_a_command_without_settings_takes_no_config_file(capsys):
    with pytest.raises(SystemExit):
        main(["env", "--help"])
    assert "--config" not in capsys.readouterr().out


# Flags


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sample", "--output_dir", "x"], "The following arguments are required: --expert, --dataset_name"),
        (["train", "--output_dir", "x", "--mx_length", "5"], "There is no flag `--mx_length`. Did you mean `--max_le"),
        (["train", "--max_lengths=5"], "There is no flag `--max_lengths`. Did you mean `--max_length`?"),
        (["train", "--frobnicate", "5"], "There is no flag `--frobnicate`. `--help` lists them all."),
        (["train", "somewhere"], "Unexpected argument 'somewhere'. Settings are given as flags"),
        (["train", "--max_steps", "3.5"], "Argument --max_steps: invalid int value: '3.5'."),
        (["train", "--dtype", "int8"], "Argument --dtype: invalid choice: 'int8' (choose from 'auto'"),
        (["train", "--max_length", "0"], "`--max_length` must be a whole number, 1 or more"),
        (["train", "--model_init_kwargs", "{oops"], "`--model_init_kwargs` must be a dict or a JSON object, such as"),
        (["train", "--model_init_kwargs", "[1]"], "`--model_init_kwargs` must be a dict or a JSON object, such as"),
        (["train", "--output_dir", "x"], "`--expert` is required"),
        (["train", "--expert", "x"], "`--dataset_name` is required"),
        (["train", "--config"], "`--config` needs the path of a YAML file."),
        (["train", "--config", "--max_steps", "3"], "`--config` needs the path of a YAML file."),
        (["train", "--config", "nowhere.yaml"], "The config file 'nowhere.yaml' does not exist."),
        (["train", "--config=nowhere.yaml"], "The config file 'nowhere.yaml' does not exist."),
        (["train", "--config", "a.yaml", "--config", "b.yaml"], "`--config` can be given once."),
    ],
)
def test_wrong_flags_are_refused(argv, message, refused):
    assert refused(*argv).startswith(message)


def test_a_bare_boolean_flag_means_true(tmp_path):
    _, args, model_args = make_train_parser().parse(
        ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "--no_use_peft"]
    )
    assert args.bf16 is True
    assert model_args.use_peft is False


@pytest.mark.parametrize("values", [["q_proj,v_proj"], ["q_proj, ", "v_proj"], ["q_proj", "v_proj"]])
def test_lists_take_commas_as_blanks(values, tmp_path):
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--lora_target_modules", *values]
    assert make_train_parser().parse(argv)[2].lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(("given", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("float32", "float32")])
def test_a_dtype_has_a_short_name(given, dtype, write_config, tmp_path):
    argv = ["--output_dir", str(tmp_path), "--use_cpu"]
    assert make_train_parser().parse([*argv, "--dtype", given])[2].dtype == dtype
    assert make_train_parser().parse([*argv, "--config", write_config(f"dtype: {given}")])[2].dtype == dtype


# Config files


@pytest.mark.parametrize("argv", [["--config", "{}"], ["--config={}"]])
def test_a_config_file_sets_what_flags_set(argv, write_config, tmp_path):
    path = write_config(
        f"""
        output_dir: {tmp_path}
        learning_rate: 5e-5
        max_length: null
        max_steps: 7
        num_train_epochs: 2
        one_step_per_row: true
        eval_strategy: no
        use_peft: false
        lora_target_modules: [q_proj, k_proj]
        report_to: [none]
        model_init_kwargs: {{attn_implementation: eager}}
        """
    )
    _, args, model_args = make_train_parser().parse([part.format(path) for part in argv])
    assert args.output_dir == str(tmp_path)
    assert args.learning_rate == 5e-5
    assert (args.max_length, args.max_steps, args.num_train_epochs) == (None, 7, 2.0)
    assert args.one_step_per_row is True and model_args.use_peft is False
    assert args.eval_strategy == "no"
    assert model_args.lora_target_modules == ["q_proj", "k_proj"]
    assert args.model_init_kwargs == {"attn_implementation": "eager"}


def test_flags_override_the_config_file(write_config, tmp_path):
    path = write_config("max_steps: 7\nmax_length: 5\n")
    _, args, _ = make_train_parser().parse(["--max_steps", "8", "--config", path, "--output_dir", str(tmp_path)])
    assert (args.max_steps, args.max_length) == (8, 5)


def test_the_recipe_of_the_paper_is_the_papers_whatever_the_defaults_are(tmp_path):
    path = Path(__file__).parents[2] / "examples" / "paper.yaml"
    flags = ["--dataset_name", "steps", "--output_dir", str(tmp_path), "--use_cpu"]
    _, args, model_args = make_train_parser().parse(["--config", str(path), *flags])
    assert (args.max_steps, args.one_step_per_row, args.learning_rate, args.beta) == (1000, True, 5e-5, 0)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 2)
    assert (model_args.use_peft, model_args.lora_r, model_args.lora_alpha) == (True, 8, 16)
    assert (model_args.lora_dropout, model_args.lora_target_modules) == (0.05, ["q_proj", "v_proj"])


def test_required_fields_can_come_from_the_config_file(write_config):
    path = write_config("expert: e\namateur: a\ndataset_name: d\noutput_dir: o\nbeta: 1e-1\n")
    script_args, sampling_args = make_sample_parser().parse(["--config", path])
    assert (script_args.expert, script_args.amateur, sampling_args.beta) == ("e", "a", 0.1)


def test_a_config_file_can_set_environment_variables(write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTREASONER_TEST", "before")
    make_train_parser().parse(
        ["--output_dir", str(tmp_path), "--config", write_config("env:\n  LIGHTREASONER_TEST: 3\n")]
    )
    assert os.environ["LIGHTREASONER_TEST"] == "3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_lenght: 5", "There is no key `max_lenght`. Did you mean `max_length`?"),
        ("output-dir: x", "There is no key `output-dir`. Did you mean `output_dir`?"),
        ("frobnicate: 5", "There is no key `frobnicate`. `--help` lists them all."),
        ("help: 5", "There is no key `help`. `--help` lists them all."),
        ("max_steps: 3.5", "`max_steps` in the config file: invalid int value: '3.5'."),
        ("max_steps: true", "`max_steps` in the config file: invalid int value: 'True'."),
        ("max_steps:", "`max_steps` in the config file has no value. Give it one, or remove it."),
        ("max_steps: [3]", "`max_steps` in the config file must be one value, got [3]."),
        ("max_steps: {a: 3}", "`max_steps` in the config file must be one value, got {'a': 3}."),
        ("model_name_or_path: {a: 3}", "`model_name_or_path` in the config file must be one value"),
        ("lora_target_modules: q_proj", "`lora_target_modules` in the config file must be a list, got 'q_proj'."),
        ("learning_rate: fast", "`learning_rate` in the config file: invalid float value: 'fast'."),
        ("use_peft: maybe", "`use_peft` in the config file: Truthy value expected: got maybe"),
        ("dtype: int8", "`dtype` in the config file: invalid choice: 'int8' (choose from 'auto', 'bfloat16'"),
        ("eval_strategy: never", "`eval_strategy` in the config file: invalid choice: 'never' (choose from 'no', "),
        ("model_init_kwargs: 3", "`--model_init_kwargs` must be a dict or a JSON object"),
        ("max_steps: [1, 2", "The config file is not valid YAML: "),
        ("\tmax_steps: 1", "The config file is not valid YAML: "),
        ("- max_steps", "The config file "),
        ("", "The config file "),
        ("1: 2", "The config file "),
    ],
)
def test_wrong_config_files_are_refused(text, message, refused, write_config):
    assert refused("train", "--config", write_config(text)).startswith(message)


def test_a_binary_config_file_is_refused(refused, tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    sentence = refused("train", "--config", tmp_path / "config.yaml")
    assert sentence == f"The config file {str(tmp_path / 'config.yaml')!r} is not in UTF-8 (line 1). Save it as UTF-8."


def test_an_empty_config_file_is_told_what_to_hold(refused, write_config):
    assert refused("train", "--config", write_config("")).endswith("must hold lines of the form `name: value`.")


# Datasets and models


def test_a_dataset_without_steps_is_refused(refused, train, prompts_file):
    message = refused(*train, "--dataset_name", prompts_file)
    assert message.startswith("The train dataset has no column 'prompt_ids'; it has 'question'.")
    assert message.endswith("Make it with `ContrastiveStepSampler` or `lightreasoner sample`.")


@pytest.mark.parametrize("name", ["{tmp_path}/nowhere", "./nowhere", "nowhere.jsonl"])
def test_a_file_that_does_not_exist_is_refused_without_asking_the_hub(name, refused, train, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "load_dataset", None)
    name = name.format(tmp_path=tmp_path)
    assert refused(*train, "--dataset_name", name) == f"There is no file or folder '{name}'."


@pytest.mark.parametrize("name", ["nowhere", "no/where"])
def test_a_dataset_that_does_not_exist_is_refused(name, refused, train):
    message = refused(*train, "--dataset_name", name)
    assert message.startswith(f"The dataset '{name}' cannot be loaded: ")
    assert "It must be a file (.json, .jsonl, .parquet, .csv, .txt), a folder, or the id of a dataset" in message


def test_an_empty_folder_is_no_dataset(refused, train, tmp_path):
    assert "cannot be loaded: " in refused(*train, "--dataset_name", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "broken.jsonl",
            '{"prompt": "a"}\n{"prompt": \n',
            "cannot be read: line 2 is not JSON (Expecting value). Fix or remove it.",
        ),
        ("empty.jsonl", "", "cannot be read: it is empty. Repair or replace the file."),
        ("notes.docx", "text", "is not a dataset file. Known endings are .json, .jsonl, .parquet, .csv, .txt."),
    ],
)
def test_a_file_that_is_no_dataset_is_refused(name, content, reason, refused, train, tmp_path):
    (tmp_path / name).write_text(content)
    assert reason in refused(*train, "--dataset_name", tmp_path / name)


def test_a_split_that_does_not_exist_is_refused(refused, train):
    said = refused(*train, "--dataset_train_split", "dev")
    assert "has no split 'dev': Unknown split" in said and "Rows of another split can be held out" in said


@pytest.mark.parametrize("flag", ["--dataset_streaming", "--ignore_bias_buffers"])
def test_a_flag_that_does_nothing_is_refused(flag, refused, train):
    assert "have no effect here. Leave them out." in refused(*train, flag, "true")


@pytest.mark.parametrize("model", ["nowhere", "no/where", "{tmp_path}/nowhere"])
def test_a_model_that_does_not_exist_is_refused(model, refused, train, tmp_path):
    model = model.format(tmp_path=tmp_path)
    message = refused(*train, "--model_name_or_path", model)
    assert message.startswith(
        f"The model '{model}' cannot be found. It must be a folder with a config.json, or the id"
    )


def test_two_columns_that_could_be_the_prompt_are_refused(refused, expert_path, amateur_path, tmp_path):
    (tmp_path / "both.jsonl").write_text('{"prompt": "a", "question": "b"}\n')
    argv = ("--expert", expert_path, "--amateur", amateur_path, "--dataset_name", tmp_path / "both.jsonl")
    message = refused("sample", *argv, "--output_dir", tmp_path / "out", "--prompt_column", "question")
    assert message == "The dataset has a column 'prompt' as well as 'question'. Rename or remove one of them."


def test_a_system_prompt_for_messages_is_refused(refused, expert_path, amateur_path, tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "a"}]}\n')
    argv = ("--expert", expert_path, "--amateur", amateur_path, "--dataset_name", tmp_path / "chat.jsonl")
    message = refused("sample", *argv, "--output_dir", tmp_path / "out", "--system_prompt", "Think.")
    assert message.startswith("The prompts are messages already")


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_dataset_saved_to_disk_is_a_dataset(as_dict, steps, tmp_path):
    (DatasetDict({"train": steps}) if as_dict else steps).save_to_disk(tmp_path / "saved")
    assert load_split(str(tmp_path / "saved"), None, "train")["id"][:] == steps["id"][:]
    with pytest.raises(ValueError, match="There is no split 'dev' in .* It has 'train'"):
        load_split(str(tmp_path / "saved"), None, "dev")


def test_a_name_with_brackets_is_no_pattern(tmp_path):
    for name in ("p[1]", "p1"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
        (tmp_path / name / "data").mkdir(parents=True)
        Dataset.from_dict({"prompt": [name]}).to_parquet(tmp_path / name / "data" / "train-00000-of-00001.parquet")
    for path in ("p[1].jsonl", "p[1]"):
        assert load_split(str(tmp_path / path), None, "train")["prompt"][:] == ["p[1]"]
    shutil.rmtree(tmp_path / "p[1]" / "data")
    (tmp_path / "p[1]" / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="would be read as a glob pattern. Rename the folder"):
        load_split(str(tmp_path / "p[1]"), None, "train")


def test_a_file_beside_the_rows_of_a_sampling_is_not_read(steps, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00001.parquet", "train-00000-of-00001-Copy1.parquet"):
        steps.to_parquet(tmp_path / "data" / name)
    assert len(load_split(str(tmp_path), None, "train")) == 2 * len(steps)
    name = "train-00000-of-00001.parquet"
    checksum = hashlib.sha256((tmp_path / "data" / name).read_bytes()).hexdigest()
    (tmp_path / "run.json").write_text(json.dumps({"files": {name: checksum}}))
    assert load_split(str(tmp_path), None, "train").to_list() == steps.to_list()


def test_a_configuration_of_a_folder_is_read_alone(tmp_path):
    configs = [{"config_name": name, "data_files": f"data/{name}.parquet"} for name in ("en", "fr")]
    (tmp_path / "data").mkdir()
    for name in ("en", "fr"):
        Dataset.from_dict({"prompt": [name]}).to_parquet(tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert load_split(str(tmp_path), "fr", "train")["prompt"][:] == ["fr"]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_file_is_a_dataset(ending, steps, tmp_path):
    path = tmp_path / f"steps.{ending}"
    steps.to_parquet(path) if ending == "parquet" else steps.to_json(path)
    loaded = load_split(str(path), None, "train[:2]")
    assert loaded["completion_ids"][:] == steps["completion_ids"][:2]


# From prompts to an adapter


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, expert_path, amateur_path, prompts_file) -> str:
    folder = str(tmp_path_factory.mktemp("cli") / "steps")
    status = main(
        [
            "sample",
            *("--expert", expert_path, "--amateur", amateur_path, "--output_dir", folder, "--max_new_tokens", "8"),
            *("--dataset_name", prompts_file, "--prompt_column", "question", "--system_prompt", "Think."),
        ]
    )
    assert status == 0
    return folder


def test_sample_writes_a_dataset_of_steps(sampled, tokenizer):
    dataset = load_dataset(sampled, split="train")
    assert [row["prompt"] for row in dataset] == [
        [{"role": "system", "content": "Think."}, {"role": "user", "content": question}] for question in QUESTIONS
    ]
    first = tokenizer.decode(dataset[0]["prompt_ids"])
    assert first == (
        f"<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert sum(map(len, dataset["step_positions"])) > 0
    assert sampling_metadata(dataset)["settings"]["max_new_tokens"] == 8


def test_train_makes_an_adapter_of_what_sample_wrote(sampled, expert_path, tokenizer, tmp_path, capsys):
    run_train(
        "train",
        *("--model_name_or_path", expert_path, "--dataset_name", sampled, "--output_dir", tmp_path / "adapter"),
        *("--use_cpu", "--max_steps", 2, "--learning_rate", "1e-2", "--report_to", "none"),
        *("--per_device_train_batch_size", 2),
    )
    printed = capsys.readouterr().out
    assert f"The model is in {tmp_path / 'adapter'}." in printed
    rows = load_dataset(sampled, split="train")
    beta = choose_beta(rows)
    num_steps = sum(row["kl_divergence"][t] >= (beta or 0) for row in rows for t in row["step_positions"])
    threshold = f" of {beta} nats or more" if beta else ""
    num_rows = sum(any(row["kl_divergence"][t] >= (beta or 0) for t in row["step_positions"]) for row in rows)
    epochs = 2 / math.ceil(num_rows / 2)  # not all of the steps were read
    assert f"Trained on {num_steps} steps{threshold} for 2 updates ({epochs:.3g} epochs)." in printed and epochs < 1
    base = AutoModelForCausalLM.from_pretrained(expert_path)
    ids = torch.tensor([load_dataset(sampled, split="train")[0]["prompt_ids"]])
    with torch.no_grad():
        before = base(ids).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        after = loaded.eval()(ids).logits
    assert not torch.allclose(before, after)
    lora = loaded.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.05)
    assert {name.rpartition(".")[2] for name in lora.target_modules} == set(
        choose_target_modules(rows, base.config.model_type)
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == tokenizer.get_vocab()


def test_sample_tells_how_to_resume(expert_path, amateur_path, prompts_file, tmp_path, capsys):
    argv = ["--expert", expert_path, "--amateur", amateur_path, "--dataset_name", prompts_file, "--beta", "0"]
    folder = str(tmp_path / "steps")
    argv += ["--prompt_column", "question", "--max_new_tokens", "3", "--output_dir", folder]
    assert main(["sample", *argv]) == 0
    stdout = capsys.readouterr().out
    assert "6 trajectories with 12 of 18 steps kept (66.7%)" in stdout
    assert f"lightreasoner train --expert {expert_path} --dataset_name {folder}" in stdout


def test_sample_ends_with_a_judgement_of_the_pair(expert_path, amateur_path, prompts_file, tmp_path, capsys):
    argv = ["--expert", expert_path, "--amateur", amateur_path, "--dataset_name", prompts_file]
    argv += ["--prompt_column", "question", "--max_new_tokens", "60", "--output_dir", str(tmp_path / "steps")]
    assert main(["sample", *argv]) == 0
    *_, verdict, caveat, _ = capsys.readouterr().out.splitlines()
    assert verdict.startswith("This pair is ") and caveat.endswith(CAVEAT)


def test_train_in_full_writes_a_model_in_float32(train, expert, tokenizer, tmp_path):
    expert.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    run_train(*train, "--model_name_or_path", tmp_path / "bf16", "--no_use_peft")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["q_proj"], {"q_proj"}),
        (["q_proj", "k_proj"], {"q_proj", "k_proj"}),
        ([r".*\.[ko]_proj"], {"k_proj", "o_proj"}),
    ],
    ids=["one name", "names", "pattern"],
)
def test_train_adapts_the_modules_that_are_named(targets, names, train, tmp_path):
    run_train(*train, "--lora_target_modules", *targets)
    adapted = {name.split(".")[-3] for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    assert adapted == names


def test_train_adapts_the_modules_of_a_model_that_names_them_otherwise(train, tokenizer, tmp_path):
    config = GPT2Config(vocab_size=len(tokenizer) + 5, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    run_train(*train, "--model_name_or_path", tmp_path / "gpt2")  # as `lightreasoner sample` says
    adapted = {name.split(".")[-3] for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    assert adapted == {"c_attn"}


def test_train_says_what_it_runs_on_and_what_comes_next(train, expert_path, tmp_path, capsys):
    run_train(*train, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3")
    stdout, stderr = capsys.readouterr()
    assert re.search(
        r"^Running on: CPU \(threads: \d+\), expert in float32, updates of 6 rows\.$", stderr, re.MULTILINE
    )
    folder = tmp_path / "out"
    following = f"Next: lightreasoner eval --model {folder} --baseline {expert_path} --output_dir EVALUATION"
    assert stdout.splitlines()[-1] == following


def test_one_process_of_several_says_what_they_run_on(monkeypatch, capsys):
    monkeypatch.setattr("trl_lightreasoner.commands.running_on.device_names", lambda cpu: ["A", "B"])
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        announce("float32")
    assert capsys.readouterr().err == "Running on: A, 2 processes, float32.\n"


def test_env_tells_versions_and_devices(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")  # the wheel of this build says 2.13.0
    assert main(["env"]) == 0
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["trl-lightreasoner"] == __version__ and lines["torch"] == torch.__version__
    assert lines["device"] and lines["WORLD_SIZE"] == "1"


@pytest.mark.parametrize("disable_tqdm", ["true", "false"])
def test_train_tells_its_log_in_lines(disable_tqdm, train, capsys):
    run_train(*train, "--logging_steps", "1", "--disable_tqdm", disable_tqdm)
    stdout = capsys.readouterr().out
    assert re.search(r"^update 1: loss [\d.]+, .*entropy [\d.]+", stdout, re.MULTILINE)
    assert "{" not in stdout and "runtime" not in stdout and "nonfinite" not in stdout


def test_train_continues_an_adapter(train, expert, expert_path, tmp_path):
    adapter = get_peft_model(expert, LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    run_train(*train, "--model_name_or_path", tmp_path / "adapter")
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(expert_path), str(tmp_path / "out"))
    assert trained.peft_config["default"].r == 3
    before, after = adapter.state_dict(), trained.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_train_evaluates_another_split(train, steps, tmp_path, capsys):
    DatasetDict({"train": steps, "test": steps.select([0, 1])}).save_to_disk(tmp_path / "steps")
    run_train(*train, "--dataset_name", tmp_path / "steps", "--eval_strategy", "steps", "--eval_steps", "1")
    assert "eval_loss" in capsys.readouterr().out


@pytest.fixture
def questions_file(tmp_path) -> str:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": each, "answer": "#### 7"}) + "\n" for each in QUESTIONS[:2]))
    return str(path)


def logged_accuracies(folder) -> list[int]:
    log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return [each["step"] for each in log if "eval_accuracy" in each]


@pytest.mark.parametrize(
    ("flags", "updates"),
    [
        ([], [0, 2, 4, 6, 8, 10]),
        (["--eval_steps", "5"], [0, 5, 10]),
        (["--eval_strategy", "steps", "--eval_steps", "10", "--eval_on_start", "false"], [10]),
    ],
)
def test_train_answers_questions_on_the_way(flags, updates, train, questions_file, tmp_path):
    pytest.importorskip("math_verify")
    flags = ["--max_steps", "10", "--eval_max_new_tokens", "2", *flags]
    run_train(*train, "--eval_questions", questions_file, *flags)
    assert logged_accuracies(tmp_path) == updates


def test_train_answers_questions_beside_rows(train, steps, questions_file, tmp_path, capsys):
    pytest.importorskip("math_verify")
    DatasetDict({"train": steps, "held_out": steps.select([0, 1])}).save_to_disk(tmp_path / "steps")
    flags = ["--dataset_name", tmp_path / "steps", "--dataset_test_split", "held_out", "--eval_max_new_tokens", "2"]
    run_train(*train, "--eval_questions", questions_file, *flags)
    assert "eval_loss" in capsys.readouterr().out and logged_accuracies(tmp_path) == [0, 1]


def test_questions_are_put_into_the_form_of_the_dataset(steps, questions_file):
    def prompts(rows: Dataset) -> list:
        return load_questions(questions_file, rows)["prompt"][:]

    metadata = json.dumps({"prompt_format": PromptFormat("raw", "Q: {question}").to_dict()})
    columns = {"sampling_metadata": [metadata], "prompt": ["Q: 2+2?"]}
    assert prompts(Dataset.from_dict(columns)) == [f"Q: {each}" for each in QUESTIONS[:2]]
    # Which does not say, but show it
    system, user = {"role": "system", "content": "Think."}, {"role": "user", "content": "2+2?"}
    asked = [[system, {"role": "user", "content": each}] for each in QUESTIONS[:2]]
    assert prompts(Dataset.from_dict({"prompt": [[system, user]]})) == asked
    # Neither
    assert prompts(steps.remove_columns("sampling_metadata")) == QUESTIONS[:2]
    assert prompts(steps.select_columns("prompt_ids")) == QUESTIONS[:2]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"question": "2+2?"}', "Questions need the columns `question` or `prompt`, and `answer`. The columns are"),
        (None, "There is no file or folder"),
    ],
)
def test_questions_that_cannot_be_read_are_refused(content, sentence, refused, train, tmp_path):
    path = tmp_path / "questions.jsonl"
    if content is not None:
        path.write_text(content + "\n")
    assert f"`--eval_questions {path}` cannot be used: {sentence}" in refused(*train, "--eval_questions", path)


def test_train_adds_demonstrations(train, tmp_path):
    path = tmp_path / "demonstrations.jsonl"
    path.write_text('{"prompt": "2+2=", "completion": "4"}\n')
    run_train(*train, "--sft_dataset_name", path, "--sft_weight", "0.5", "--logging_steps", "1")
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["sft_loss"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| sft_weight | 0.5 |" in card and "cross-entropy, times 0.5, was added to the loss" in card
    assert "No reference answers" not in card


def test_a_weight_of_demonstrations_needs_some(train, refused):
    sentence = "`--sft_weight` needs an `sft_dataset` (`--sft_dataset_name` on the command line)"
    assert refused(*train, "--sft_weight", "0.5").startswith(sentence)


def test_train_resumes(train, tmp_path):
    run_train(*train, "--save_steps", "1")
    run_train(*train, "--save_steps", "1", "--max_steps", "2", "--resume_from_checkpoint", "true")
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


def test_train_resumes_a_finished_run_with_one_sentence(train, tmp_path, propagated_logs, caplog):
    argv = [*train, "--save_steps", "1", "--max_steps", "2"]
    run_train(*argv)
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    caplog.clear()
    run_train(*argv, "--resume_from_checkpoint", "true")
    sentence = "Training is complete: the checkpoint has 2 of 2 updates. Raise `--max_steps`"
    assert [sentence in message for message in caplog.messages].count(True) == 1
    assert "Traceback" not in caplog.text
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)


@pytest.mark.parametrize("dtype", [[], ["--dtype", "auto"], ["--dtype", "float32"]])
def test_train_in_4_bits(dtype, train, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model(tokenizer, hidden_size=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_train(*train, "--model_name_or_path", tmp_path / "model", "--load_in_4bit", *dtype)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_conversation_is_made_of_text_prompts_on_request(expert_path, amateur_path, prompts_file, tmp_path):
    argv = ["--expert", expert_path, "--amateur", amateur_path, "--dataset_name", prompts_file, "--conversational"]
    argv += ["--prompt_column", "question", "--max_new_tokens", "2", "--output_dir", str(tmp_path / "steps")]
    assert main(["sample", *argv]) == 0
    dataset = Dataset.from_parquet(str(tmp_path / "steps" / "data" / "*.parquet"))
    assert dataset[1]["prompt"] == [{"role": "user", "content": QUESTIONS[1]}]


def test_the_command_that_comes_next_can_be_run_as_it_is(expert_path, amateur_path, prompts_file, tmp_path, capsys):
    argv = ["--expert", expert_path, "--amateur", amateur_path, "--dataset_name", prompts_file]
    argv += ["--prompt_column", "question", "--max_new_tokens", "8", "--beta", "0.1"]
    assert main(["sample", *argv, "--output_dir", str(tmp_path / "my steps")]) == 0
    program, *command = shlex.split(capsys.readouterr().out.partition("To train anyway: ")[2])  # a random pair
    assert (program, command[-1]) == ("lightreasoner", "ADAPTER")
    assert main([*command[:-1], str(tmp_path / "adapter"), "--use_cpu", "--max_steps", "1"]) == 0


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the threads of a process are listed by Linux")
def test_a_command_leaves_its_process_group_and_the_threads_of_it_end():
    def threads():
        return set(os.listdir("/proc/self/task"))

    def train():
        before = threads()
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        begun.update(threads() - before)
        trainer = SimpleNamespace(model=DistributedDataParallel(torch.nn.Linear(2, 2)))
        trainer.callback = SimpleNamespace(trainer=trainer)
        weakref.finalize(trainer.model, lambda: initialized.append(torch.distributed.is_initialized()))

    begun, initialized = set(), []
    parser = SimpleNamespace(parse=lambda argv: (), explain=str, with_flags=str)
    assert run("lightreasoner nothing", lambda prog: parser, train, []) == 0
    assert not torch.distributed.is_initialized()
    assert begun and not begun & threads()
    # Were DDP the last to hold the group, it would wait for the threads with the GIL held: a deadlock now and then
    assert initialized == [True]
