"""Every field of a config is explained in its docstring, with its default, and its flag has this as its help."""

import dataclasses
import inspect
import json
import re

import pytest

from trl_lightreasoner import ContrastiveSamplingConfig, EvaluationConfig, LightReasonerConfig, RunConfig, TuneConfig
from trl_lightreasoner.commands.check import CheckArguments, CheckSamplingConfig
from trl_lightreasoner.commands.demo import DemoArguments
from trl_lightreasoner.commands.eval import EvaluationArguments
from trl_lightreasoner.commands.import_steps import ImportArguments
from trl_lightreasoner.commands.merge import MergeArguments
from trl_lightreasoner.commands.pair_arguments import PairArguments
from trl_lightreasoner.commands.report import ReportArguments
from trl_lightreasoner.commands.sample import SampleArguments
from trl_lightreasoner.commands.train import LightReasonerModelConfig, TrainArguments
from trl_lightreasoner.config_help import help_from_docstring


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
    ReportArguments,
    ImportArguments,
    DemoArguments,
    RunConfig,
    TuneConfig,
]
# What this package declares of each, without what is inherited from transformers and TRL
FIELDS = [
    (config, field)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    if field.name in config.__dict__["__annotations__"]
]
IDS = [f"{config.__name__}.{field.name}" for config, field in FIELDS]


@dataclasses.dataclass
@help_from_docstring
class Config:
    """
    Settings, of which `none` is not described below.

    Parameters:
        > Parameters that control the output

        folder (`str`):
            Where it goes, on two
            lines.
        style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` or `"raw"`, such as `'{"a": 1}'`.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Read by [`~transformers.AutoModelForCausalLM.from_pretrained`] for [`Trainer`].
    """

    folder: str
    none: int = 0
    style: str = dataclasses.field(default="chat", metadata={"choices": ["chat", "raw"]})
    model: str | None = None


HELP = {field.name: field.metadata.get("help") for field in dataclasses.fields(Config)}


def test_the_help_of_a_field_is_its_description_on_one_line():
    assert HELP["folder"] == "Where it goes, on two lines."


def test_quoted_text_and_links_lose_the_marks_that_a_terminal_does_not_show():
    assert HELP["style"] == "'chat' or 'raw', such as '{\"a\": 1}'."
    assert HELP["model"] == "Read by `AutoModelForCausalLM.from_pretrained` for `Trainer`."


def test_a_field_that_is_not_described_has_no_help():
    assert HELP["none"] is None


def test_defaults_and_other_metadata_stay():
    with pytest.raises(TypeError, match="folder"):
        Config()
    assert Config("here") == Config("here", 0, "chat", None)
    assert Config.__dataclass_fields__["style"].metadata["choices"] == ["chat", "raw"]


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=IDS)
def test_every_field_has_help(config, field):
    assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=IDS)
def test_docstring_names_the_default(config, field):
    entry = re.search(rf"^ +{field.name} \((.+)\):$", inspect.cleandoc(config.__doc__), re.MULTILINE)
    if entry is None:  # a default of transformers that is another one here, in the note below
        assert f"> - `{field.name}`: Defaults to" in config.__doc__
    elif field.default in (None, dataclasses.MISSING):
        assert "defaults to" not in entry[1]
    else:
        default = json.dumps(field.default) if isinstance(field.default, str) else field.default
        assert f"defaults to `{default}`" in entry[1]
    assert field.default is not dataclasses.MISSING or "*optional*" not in entry[1]
