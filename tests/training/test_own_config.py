"""Another trainer's config keeps what the user set in it, and undoes none of our defaults."""

from dataclasses import dataclass, field, fields

import pytest
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from trl_lightreasoner import LightReasonerConfig
from trl_lightreasoner.training.own_config import own_config


@dataclass
class _ColouredConfig(TrainingArguments):
    colour: str = "red"
    tones: list[str] = field(default_factory=list)


@dataclass
class _NamedConfig(TrainingArguments):
    name: str = field(kw_only=True)


def converted(args):
    """The fields in which the converted config differs from the default one."""
    made, default = own_config(args, "expert"), LightReasonerConfig(args.output_dir, use_cpu=True)
    assert type(made) is LightReasonerConfig
    names = [field.name for field in fields(made)]
    return {name: getattr(made, name) for name in names if getattr(made, name) != getattr(default, name)}


@pytest.mark.parametrize("config", [TrainingArguments, SFTConfig, DPOConfig])
def test_defaults_of_another_config_undo_none_of_ours(config):
    assert converted(config("out", use_cpu=True)) == {}


@pytest.mark.parametrize("config", [TrainingArguments, SFTConfig, DPOConfig])
def test_what_the_user_set_survives(config):
    settings = {
        **{"learning_rate": 3e-3, "num_train_epochs": 2, "per_device_train_batch_size": 4, "seed": 7},
        **{"lr_scheduler_type": "cosine", "optim": "adafactor", "weight_decay": 0.1, "hub_token": "secret"},
        **{"gradient_accumulation_steps": 3, "logging_steps": 2, "save_strategy": "no", "warmup_steps": 5},
    }
    made = converted(config("out", use_cpu=True, **settings))
    assert made == {**settings, "max_steps": -1}


def test_activation_checkpointing_can_be_switched_on():
    args = own_config(TrainingArguments("out", use_cpu=True, gradient_checkpointing=True), "expert")
    assert args.gradient_checkpointing is True


def test_what_means_the_same_in_trl_is_kept():
    args = SFTConfig("out", use_cpu=True, max_length=77, model_init_kwargs={"revision": "v1"}, bf16=False, max_steps=5)
    assert converted(args) == {"max_length": 77, "model_init_kwargs": {"revision": "v1"}, "max_steps": 5}


def test_the_beta_of_dpo_is_no_threshold(caplog, propagated_logs):
    assert own_config(DPOConfig("out", use_cpu=True, beta=0.3), "expert").beta is None
    assert "`LightReasonerTrainer` ignores its `beta`." in caplog.text


def test_one_warning_says_what_is_ignored_and_what_is_used(caplog, propagated_logs):
    own_config(SFTConfig("out", use_cpu=True, packing=True, eos_token="</s>", weight_decay=0.1), "expert")
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("`args` is a config of another trainer, `SFTConfig`. ")
    assert "ignores its `packing`, `eos_token`." in said or "ignores its `eos_token`, `packing`." in said
    assert "`learning_rate` = 0.0001 (not 2e-05)" in said and "`max_steps` = 125 (not 3 epochs)" in said
    assert "weight_decay" not in said and "padding" not in said


def test_fields_of_a_class_of_the_users_are_named_without_their_values(caplog, propagated_logs):
    own_config(_ColouredConfig("out", use_cpu=True, colour="secret"), "expert")
    assert "ignores its `colour`." in caplog.text and "secret" not in caplog.text


def test_a_class_that_needs_more_than_a_folder_is_converted():
    args = _NamedConfig("out", use_cpu=True, name="one", learning_rate=3e-3)
    assert converted(args) == {"learning_rate": 3e-3}


def test_our_own_config_is_no_reason_to_warn(caplog, propagated_logs):
    args = LightReasonerConfig("out", use_cpu=True, learning_rate=5e-5)
    assert own_config(args, "expert").learning_rate == 5e-5 and own_config(args, "expert") is not args
    assert not caplog.records


def test_what_is_no_config_is_refused():
    with pytest.raises(TypeError, match="^`args` must be a `LightReasonerConfig` or `TrainingArguments`, got `dict`"):
        own_config({"output_dir": "out"}, "expert")
