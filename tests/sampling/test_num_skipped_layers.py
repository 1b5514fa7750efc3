"""How many layers the amateur skips, instead of which: the same as the list of those in the middle, everywhere."""

import json

import pytest
from accelerate import PartialState
from transformers import GPT2Config

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    RunConfig,
    TuneConfig,
    run_pipeline,
    sampling_metadata,
    tune,
)
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.demo.bundled_pair import PAIR
from trl_lightreasoner.hub.cards import dataset_card
from trl_lightreasoner.pipeline import run
from trl_lightreasoner.pipeline import tune as search
from trl_lightreasoner.sampling import model_pair
from trl_lightreasoner.sampling.model_pair import name_skipped_layers


EXPERT, AMATEUR = str(PAIR / "expert"), str(PAIR / "amateur")  # of 6 and 3 layers
COMMANDS = {"run": (run, RunConfig, run_pipeline), "tune": (search, TuneConfig, tune)}


def middle(count, number):
    """Layers are taken away at the ends, by turns, until `number` are left in the middle."""
    layers = list(range(count))
    while len(layers) > number:
        layers.pop(-1 if len(layers) % 2 == count % 2 else 0)
    return layers


@pytest.mark.parametrize(("count", "number"), [(n, k) for n in (2, 3, 6, 7) for k in range(1, n)] + [(28, 3), (28, 4)])
def test_the_layers_are_those_in_the_middle(count, number):
    args = ContrastiveSamplingConfig("steps", amateur_num_skipped_layers=number, alpha=0.3)
    named = name_skipped_layers(args, GPT2Config(n_layer=count))
    layers = middle(count, number)
    assert named == ContrastiveSamplingConfig("steps", amateur_skipped_layers=layers, alpha=0.3)
    assert args.amateur_num_skipped_layers == number  # what the user has is left alone


def test_3_of_28_layers_are_those_that_the_help_names():
    named = name_skipped_layers(RunConfig("run", "e", "d", amateur_num_skipped_layers=3), GPT2Config(n_layer=28))
    assert named.amateur_skipped_layers == [12, 13, 14]


@pytest.mark.parametrize(
    ("count", "layers"), [(2, [0]), (4, [1]), (10, [4]), (11, [4, 5]), (24, [10, 11, 12]), (28, [12, 13, 14])]
)
def test_an_expert_alone_is_its_own_amateur_without_a_tenth_of_its_layers(count, layers):
    config, args = GPT2Config(n_layer=count), ContrastiveSamplingConfig("steps", alpha=0.3)
    PartialState()  # of whose main process the message is
    named = name_skipped_layers(args, config, is_own=True)
    assert named == ContrastiveSamplingConfig("steps", amateur_skipped_layers=layers, alpha=0.3)
    assert name_skipped_layers(args, config) == args


def test_an_expert_of_one_layer_needs_an_amateur():
    with pytest.raises(ValueError, match="the expert has a single layer. Name a weaker model as `amateur`"):
        name_skipped_layers(ContrastiveSamplingConfig("steps"), GPT2Config(n_layer=1), is_own=True)


@pytest.mark.parametrize(
    "settings",
    [{"amateur_skipped_layers": [1]}, {"amateur_system_prompt": ""}, {"amateur_prompt_template": "{question}!"}],
)
def test_whoever_says_how_the_amateur_differs_keeps_all_other_layers(settings):
    args = ContrastiveSamplingConfig("steps", **settings)
    assert name_skipped_layers(args, GPT2Config(n_layer=28), is_own=True) == args


def test_without_an_amateur_a_tenth_is_left_out_and_said(prompts, tmp_path, caplog):
    def sample(folder, **skipped):
        args = ContrastiveSamplingConfig(str(tmp_path / folder), max_new_tokens=8, beta=0.0, **skipped)
        return ContrastiveStepSampler(EXPERT, None, args).sample(prompts)

    model_pair.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        made = sample("made")
    assert "it is the expert without 1 of its 6 layers (from 0: 2)." in caplog.text
    assert made.to_list() == sample("listed", amateur_skipped_layers=[2]).to_list()


@pytest.mark.parametrize(("amateur", "layers"), [(None, [2, 3]), (AMATEUR, [0, 1])], ids=["the expert", "a second"])
def test_a_number_samples_what_the_list_samples(amateur, layers, prompts, tmp_path):
    def sample(folder, **skipped):
        args = ContrastiveSamplingConfig(str(tmp_path / folder), max_new_tokens=8, beta=0.0, **skipped)
        return ContrastiveStepSampler(EXPERT, amateur, args).sample(prompts)

    made, listed = sample("made", amateur_num_skipped_layers=2), sample("listed", amateur_skipped_layers=layers)
    assert made.to_list() == listed.to_list() and max(map(max, made["kl_divergence"])) > 0.01
    settings = sampling_metadata(made)["settings"]
    assert settings == sampling_metadata(listed)["settings"] and settings["amateur_skipped_layers"] == layers
    assert f"| amateur_skipped_layers | {layers} |" in str(dataset_card({"train": made}, "own/steps"))
    # The same run, so that either resumes the other
    assert sample("made", amateur_skipped_layers=layers).to_list() == made.to_list()
    with pytest.raises(ValueError, match=r"was started with amateur_skipped_layers = \[.*\], but it is now \["):
        sample("made", amateur_num_skipped_layers=1)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("amateur", "same", "layers"),
    [
        (None, ({"amateur_num_skipped_layers": 2}, {"amateur_skipped_layers": [3, 2]}), [2, 3]),
        (AMATEUR, ({"amateur_num_skipped_layers": 2}, {"amateur_skipped_layers": [1, 0]}), [0, 1]),
        (None, ({}, {"amateur_skipped_layers": [2]}), [2]),
    ],
    ids=["the expert", "a second", "by default"],
)
def test_a_folder_knows_the_layers_and_takes_either(command, amateur, same, layers, prompts, tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    pytest.importorskip("optuna")
    module, config, start = COMMANDS[command]
    prompts.add_column("answer", ["7"] * len(prompts)).to_json(tmp_path / "questions.jsonl")
    monkeypatch.setattr(module, "check_pair", lambda *_: 1 / 0)  # everything up to the first weights

    def begin(**skipped):
        questions = {"dataset_name": str(tmp_path / "questions.jsonl"), "num_held_out": 1, "num_prompts": 2}
        start(config(str(tmp_path / command), EXPERT, amateur=amateur, **questions, **skipped))

    for skipped in same:
        with pytest.raises(ZeroDivisionError):
            begin(**skipped)
        settings = json.loads((tmp_path / command / f"{command}.json").read_text(encoding="utf-8"))["settings"]
        assert (settings["amateur_skipped_layers"], settings["amateur_num_skipped_layers"]) == (layers, None)
    with pytest.raises(ValueError, match="was started with amateur_skipped_layers = "):
        begin(amateur_skipped_layers=[0])


@pytest.mark.parametrize("number", [2, 9])
def test_a_number_that_leaves_no_layer_is_refused(number, expert_path):
    args = ContrastiveSamplingConfig("steps", amateur_num_skipped_layers=number)
    sentence = rf"^`amateur_num_skipped_layers` must be less than the amateur's 2 layers, got {number}\.$"
    with pytest.raises(ValueError, match=sentence):
        ContrastiveStepSampler(expert_path, None, args)


@pytest.mark.parametrize(
    ("config", "names"), [(ContrastiveSamplingConfig, ["steps"]), (RunConfig, ["run", "expert", "questions"])]
)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amateur_num_skipped_layers": 0}, "must be a whole number, 1 or more, got 0"),
        ({"amateur_num_skipped_layers": -1}, "must be a whole number, 1 or more, got -1"),
        ({"amateur_num_skipped_layers": 1.5}, "must be a whole number, 1 or more, got 1.5"),
        (
            {"amateur_num_skipped_layers": 1, "amateur_skipped_layers": [1]},
            "`amateur_skipped_layers` and `amateur_num_skipped_layers` cannot be combined. Name the layers, or say",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(config, names, settings, message):
    with pytest.raises(ValueError, match=message):
        config(*names, **settings)


@pytest.mark.parametrize("in_file", [False, True], ids=["flag", "config file"])
def test_the_commands_take_a_number(in_file, prompts, tmp_path, capsys):
    prompts.to_json(tmp_path / "prompts.jsonl")
    (tmp_path / "config.yaml").write_text("amateur_num_skipped_layers: 3\n")
    number = ["--config", str(tmp_path / "config.yaml")] if in_file else ["--amateur_num_skipped_layers", "3"]
    pair = ["--expert", EXPERT, "--dataset_name", str(tmp_path / "prompts.jsonl"), "--max_new_tokens", "8", *number]
    assert main(["sample", *pair, "--output_dir", str(tmp_path / "steps")]) in (0, None)
    identity = json.loads((tmp_path / "steps" / "run.json").read_text(encoding="utf-8"))
    assert '"amateur_skipped_layers": [1, 2, 3]' in json.dumps(identity)
    assert main(["check", *pair]) == 1
    assert "6 prompts, 48 steps" in capsys.readouterr().out
    assert main(["check", *pair, "--amateur_skipped_layers", "1"]) == 2
    assert "`--amateur_skipped_layers` and `--amateur_num_skipped_layers` cannot be" in capsys.readouterr().err
