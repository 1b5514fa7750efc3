"""One name for one thing in all commands, TRL's beside it, and what a wrong one is answered with."""

from importlib import import_module

import pytest

from trl_lightreasoner.commands.cli import main


MODULES = ("run", "tune", "check", "sample", "train", "merge", "report", "import_steps", "eval")
# Without which a command is not parsed
NEEDED = {
    "run": ["--expert", "e", "--dataset_name", "d", "--output_dir", "o"],
    "tune": ["--expert", "e", "--dataset_name", "d", "--output_dir", "o"],
    "check": ["--expert", "e", "--dataset_name", "d"],
    "sample": ["--expert", "e", "--dataset_name", "d", "--output_dir", "o"],
    "train": ["--output_dir", "o", "--use_cpu"],
    "merge": ["--model", "m", "--output_dir", "o"],
    "report": ["d"],
    "import_steps": ["f", "--expert", "e", "--output_dir", "o"],
    "eval": ["--model", "m", "--output_dir", "o"],
}


def parser_of(module):
    return import_module(f"trl_lightreasoner.commands.{module}").make_parser()


def parsed(module, argv) -> dict:
    return {name: value for args in parser_of(module).parse(argv) for name, value in vars(args).items()}


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (("expert", "model_name_or_path"), ("run", "tune", "check", "sample", "train", "report", "import_steps")),
        (("model", "model_name_or_path"), ("merge", "eval")),
        (("dataset_split", "dataset_train_split"), ("run", "tune", "check", "sample", "train", "report")),
    ],
)
def test_a_thing_has_one_name_in_all_commands_and_trls_beside_it(names, modules, tmp_path):
    for module in modules:
        settings = []
        for name in names:
            settings.append(parsed(module, [*NEEDED[module], f"--{name}", "this"]))
            settings.append(parsed(module, [*NEEDED[module], f"--{name.replace('_', '-')}=this"]))
            (tmp_path / "config.yaml").write_text(f"{name}: this\n")
            others = " ".join(NEEDED[module]).replace(f"--{names[0]} {names[0][0]}", "").split()
            settings.append(parsed(module, [*others, "--config", str(tmp_path / "config.yaml")]))
        values = [{name: value for name, value in each.items() if name in names} for each in settings]
        assert values == [values[0]] * len(values) and list(values[0].values()) == ["this"], module


@pytest.mark.parametrize("module", MODULES)
def test_help_has_the_one_name_alone(module):
    text = parser_of(module).format_help()
    assert " --model_name_or_path" not in text and "--dataset_train_split" not in text
    assert "--output-dir" not in text


@pytest.mark.parametrize(
    ("command", "flag", "meant"),
    [
        ("train", "model", "expert"),
        ("train", "split", "dataset_split"),
        ("train", "batch-size", "per_device_train_batch_size"),
        ("train", "lr", "learning_rate"),
        ("train", "model_name_or_pth", "expert"),
        ("sample", "model", "expert"),
        ("eval", "expert", "model"),
        ("merge", "adapter", "model"),
        ("merge", "base_model", "base_model_name_or_path"),
        ("import", "dataset_name", "file"),
    ],
)
def test_what_was_meant_is_found_by_its_synonyms(command, flag, meant, capsys):
    module = {"import": "import_steps"}.get(command, command)
    assert main([command, *NEEDED[module], f"--{flag}", "x"]) == 2
    assert capsys.readouterr().err.endswith(f"There is no flag `--{flag}`. Did you mean `--{meant}`?\n")


def test_unknown_flags_are_told_beside_missing_ones(capsys):
    assert main(["sample", "--model", "x", "--dataset_name", "d", "--frobnicate", "3"]) == 2
    assert capsys.readouterr().err == (
        "lightreasoner sample: error: There is no flag `--model`. Did you mean `--expert`? There is no flag "
        "`--frobnicate`. `--help` lists them all. The following arguments are required: --expert, --output_dir.\n"
    )


def test_two_names_of_one_key_are_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("expert: a\nmodel_name_or_path: b\n")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    sentence = "`expert` and `model_name_or_path` in the config file are the same. Leave one out.\n"
    assert capsys.readouterr().err.endswith(sentence)


def test_advice_speaks_of_flags(tmp_path, capsys):
    def told(config: str, *flags: str) -> str:
        (tmp_path / "config.yaml").write_text(config)
        assert main(["sample", *NEEDED["sample"], "--config", str(tmp_path / "config.yaml"), *flags]) == 2
        return capsys.readouterr().err.partition(": error: ")[2]

    sentence = told("system_prompt: Think.", "--prompt_style", "raw")
    assert sentence == "`--prompt_style raw` cannot be combined with `--conversational` or `--system_prompt`.\n"
    assert told("alpha: [1]").startswith("`alpha` in the config file must be one value")  # of which it is a key


def test_logged_warnings_speak_of_flags(expert_path, amateur_path, tmp_path, caplog):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2+2="}\n{"prompt": "2+2=4, 3+3=6, 4+4="}\n')
    flags = ["--expert", expert_path, "--amateur", amateur_path, "--dataset_name", str(tmp_path / "prompts.jsonl")]
    main(["sample", *flags, "--output_dir", str(tmp_path / "steps"), "--max_prompt_length=5", "--max_new_tokens=4"])
    assert "Skipped 1 of 2 prompts: 1 longer than `--max_prompt_length 5`" in caplog.text


def test_help_speaks_of_flags_instead_of_python(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "If not set, the amateur is the expert without a tenth of its layers, or as `--amateur_num_skipped_layers`"
        in shown
    )
    assert "(default: false)" in shown and "None" not in shown
