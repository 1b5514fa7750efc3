"""What a search space may hold, and what a mistake in it is answered with."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from trl_lightreasoner import RunConfig, TuneConfig
from trl_lightreasoner.pipeline.search_space import DEFAULT_SPACE, FIELDS, read_space


def test_the_default_space_is_that_of_the_example():
    path = Path(__file__).parents[2] / "examples" / "space.yaml"
    assert yaml.safe_load(path.read_text()) == DEFAULT_SPACE
    assert read_space(str(path)) == read_space(None)


def test_the_default_setting_lies_in_the_default_space():
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)} | {"beta": 0.8}
    assert all(parameter.holds(defaults[parameter.name]) for parameter in read_space(None))


def test_numbers_are_read_as_people_write_them():
    values = yaml.safe_load(
        "learning_rate: {low: 1e-5, high: 1.0e-3, log: true}\nmax_steps: [60, 125.0]\nbeta: [0, 1]"
    )
    rate, updates, beta = read_space(values)
    assert (rate.low, rate.high, rate.log) == (1e-5, 1e-3, True)
    assert updates.choices == [60, 125] and beta.choices == [0.0, 1.0]


def test_layers_are_lists_or_names():
    (layers,) = read_space({"lora_target_modules": ["all-linear", ["q_proj", "v_proj"]]})
    assert layers.choices == ["all-linear", "q_proj v_proj"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "must name a field and its values"),
        (["beta"], "must name a field and its values"),
        ("no-such.yaml", "The search space 'no-such.yaml' does not exist. It must be a YAML file"),
        (".", "The search space '.' is a folder"),
        ({"learning_rte": [1e-4]}, "`learning_rte` cannot be searched. Did you mean `learning_rate`?"),
        ({"seed": [0, 1]}, "`seed` cannot be searched. Choose from beta, learning_rate"),
        ({"beta": []}, "`beta` in the search space must be a list of values, or have `low`, `high`"),
        ({"beta": 0.8}, "must be a list of values, or have `low`, `high`"),
        ({"beta": {"low": 0.4}}, "must be a list of values, or have `low`, `high`"),
        ({"beta": {"low": 0.4, "high": 1, "step": 0.1}}, "must be a list of values, or have `low`, `high`"),
        (
            {"beta": {"low": 1, "high": 0.5}},
            "`low` of `beta` in the search space must be less than `high`",
        ),
        ({"beta": {"low": 0.1, "high": 0.5}}, "`beta` in the search space must be 0 or at least 0.4 nats"),
        ({"beta": {"low": 0, "high": 1, "log": True}}, "`low` of `beta` in the search space must be above 0"),
        ({"beta": {"low": 0.4, "high": 1, "log": "yes"}}, "`log` of `beta` in the search space must be true or false"),
        ({"beta": {"low": 0.4, "high": float("inf")}}, "`beta` in the search space must hold numbers, got inf"),
        ({"learning_rate": ["fast"]}, "`learning_rate` in the search space must hold numbers, got 'fast'"),
        ({"max_steps": [60.5]}, "`max_steps` in the search space must hold whole numbers, got 60.5"),
        ({"max_steps": [True]}, "`max_steps` in the search space must hold whole numbers, got True"),
        ({"max_steps": [60, 60]}, "`max_steps` in the search space names a value twice"),
        ({"lora_target_modules": [[]]}, "`lora_target_modules` in the search space must hold names of layers"),
        (
            {"lora_target_modules": {"low": "a", "high": "b"}},
            "`lora_target_modules` in the search space must be",
        ),
    ],
)
def test_a_bad_space_is_refused_in_one_sentence(space, message):
    with pytest.raises(ValueError) as error:
        TuneConfig("out", "e", "a", "d", space=space)
    assert message in str(error.value)


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "space.yaml").write_text("beta: [0.4")
    with pytest.raises(ValueError, match="space.yaml' is not valid YAML"):
        read_space(str(tmp_path / "space.yaml"))


@pytest.mark.parametrize("name", ["num_trials", "num_validation", "num_held_out"])
def test_a_search_needs_trials_and_questions(name):
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number, 1 or more, got 0"):
        TuneConfig("out", "e", "a", "d", **{name: 0})


def test_every_field_of_a_space_is_one_of_run_and_of_train():
    from trl_lightreasoner.commands import run, train

    for module in (run, train):
        assert set(FIELDS) <= {action.dest for action in module.make_parser()._actions}


def test_a_config_file_can_hold_the_space_itself(tmp_path):
    from trl_lightreasoner.commands.tune import make_parser

    (tmp_path / "config.yaml").write_text("expert: e\namateur: a\ndataset_name: d\nspace:\n  max_steps: [60, 125]\n")
    (args,) = make_parser().parse(["--config", str(tmp_path / "config.yaml"), "--output_dir", "out"])
    assert args.parameters == read_space({"max_steps": [60, 125]})
