import dataclasses
import json
import re

import pytest
from transformers import TrainingArguments

from trl_lightreasoner import ContrastiveSamplingConfig, EvaluationConfig, LightReasonerConfig, RunConfig, TuneConfig
from trl_lightreasoner.commands.check import CheckArguments, CheckSamplingConfig
from trl_lightreasoner.commands.eval import EvaluationArguments
from trl_lightreasoner.commands.merge import MergeArguments
from trl_lightreasoner.commands.pair_arguments import PairArguments
from trl_lightreasoner.commands.sample import SampleArguments
from trl_lightreasoner.commands.train import LightReasonerModelConfig, TrainArguments


CONFIGS = [
    LightReasonerConfig,
    ContrastiveSamplingConfig,
    EvaluationConfig,
    PairArguments,
    SampleArguments,
    CheckArguments,
    CheckSamplingConfig,
    LightReasonerModelConfig,
    TrainArguments,
    MergeArguments,
    EvaluationArguments,
    RunConfig,
    TuneConfig,
]
NAN = float("nan")
# What this package declares of each, without what is inherited from transformers and TRL
FIELDS = [
    (config, field)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    if field.name in config.__dict__["__annotations__"]
]
IDS = [f"{config.__name__}.{field.name}" for config, field in FIELDS]


def documented(config) -> dict[str, tuple[str, str]]:
    """`{name: (type and default, description)}` of the parameters of a docstring."""
    entries = re.findall(r"^ {8}(\w+) \((.+)\):\n((?: {12}.+\n)+)", config.__doc__, flags=re.MULTILINE)
    return {name: (signature, " ".join(text.split())) for name, signature, text in entries}


def plain(text: str) -> str:
    """Without what only a docstring (links) or only a terminal (other quotes) has."""
    text = re.sub(r"\[`~?(?:[a-z]\w*\.)*([A-Z][\w.]*)`\]", r"`\1`", text)
    text = re.sub(r"""`["'](.*?)["']`""", r"'\1'", text)
    return " ".join(text.split())


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=IDS)
def test_docstring_and_help_say_the_same(config, field):
    entries = documented(config)
    if field.name in entries:
        assert plain(entries[field.name][1]) == plain(field.metadata["help"])
    else:  # inherited, with another default
        assert config is LightReasonerConfig
        assert field.metadata["help"]


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=IDS)
def test_docstring_names_the_default(config, field):
    signature, _ = documented(config).get(field.name, ("", ""))
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    if signature and default is not None:
        assert f"defaults to `{json.dumps(default) if isinstance(default, str | list) else default}`" in signature
    elif signature:
        assert "defaults to" not in signature


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
    with pytest.raises(ValueError, match="`max_length` must be a whole number, 1 or more, or `None`"):
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
