import dataclasses
import re

import pytest
from transformers import TrainingArguments

from trl_lightreasoner import LightReasonerConfig


NAN = float("nan")


def test_docstring_names_every_default_that_differs_from_training_arguments():
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name: field.default for field in dataclasses.fields(LightReasonerConfig)}
    different = {name: (ours[name], default) for name, default in theirs.items() if ours[name] != default}
    noted = re.findall(r"> - `(\w+)`: Defaults to `(\S+)` instead of `(\S+?)`", LightReasonerConfig.__doc__)
    assert {name: (str(our), str(their)) for name, (our, their) in different.items()} == {
        name: (our, their) for name, our, their in noted
    }


@pytest.mark.parametrize(
    ("kwargs", "max_steps"),
    [({}, 125), ({"max_steps": 7}, 7), ({"num_train_epochs": 2}, -1), ({"num_train_epochs": 2, "max_steps": 7}, 7)],
)
def test_training_takes_125_updates_unless_its_length_is_set(kwargs, max_steps, tmp_path):
    args = LightReasonerConfig(str(tmp_path), **kwargs)
    assert args.max_steps == max_steps
    assert args.num_train_epochs == kwargs.get("num_train_epochs", 3.0)


@pytest.mark.parametrize("beta", [-0.1, NAN, float("inf"), "high", True])
def test_a_bad_beta_is_refused(beta, tmp_path):
    with pytest.raises(ValueError, match="`beta` must be a"):
        LightReasonerConfig(str(tmp_path), beta=beta)


@pytest.mark.parametrize("value", [0, -1, 3.5, "many", True])
def test_a_bad_max_length_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match="`max_length` must be a whole number, 1 or more, got"):
        LightReasonerConfig(str(tmp_path), max_length=value)


@pytest.mark.parametrize("value", [1, 4096, None])
def test_a_good_max_length_is_accepted(value, tmp_path):
    assert LightReasonerConfig(str(tmp_path), max_length=value).max_length == value


def test_bf16_is_off_on_a_cpu_by_default(tmp_path):
    assert LightReasonerConfig(str(tmp_path), use_cpu=True).bf16 is False


@pytest.mark.parametrize(("kwargs", "expected"), [({}, True), ({"fp16": True}, False), ({"bf16": False}, False)])
def test_bf16_is_on_where_an_accelerator_has_it(kwargs, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_lightreasoner.training.lightreasoner_config.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # looks for the accelerator itself
    assert LightReasonerConfig(str(tmp_path), **kwargs).bf16 is expected


def test_model_init_kwargs_can_be_json(tmp_path):
    args = LightReasonerConfig(str(tmp_path), model_init_kwargs='{"attn_implementation": "eager"}')
    assert args.model_init_kwargs == {"attn_implementation": "eager"}


def test_a_config_made_of_its_own_dict_is_the_same(tmp_path):
    args = LightReasonerConfig(str(tmp_path), use_cpu=True, max_length=7, max_steps=3, model_init_kwargs={"a": 1})
    assert LightReasonerConfig(**args.to_dict()).to_dict() == args.to_dict()


@pytest.mark.parametrize(
    ("metric", "given", "greater"),
    [
        ("accuracy", None, True),
        ("eval_loss", None, False),
        ("kl_to_expert", None, False),
        ("eval_held_out_kl_to_expert", None, False),
        ("accuracy_num_cut", None, False),
        ("kl_to_expert", True, True),
        (None, None, None),
    ],
)
def test_the_best_model_has_the_lowest_divergence_and_the_highest_accuracy(metric, given, greater, tmp_path):
    args = LightReasonerConfig(str(tmp_path), metric_for_best_model=metric, greater_is_better=given, use_cpu=True)
    assert args.greater_is_better is greater
