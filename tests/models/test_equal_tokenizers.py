import json
import shutil

import pytest

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler
from trl_lightreasoner.demo.bundled_pair import PAIR
from trl_lightreasoner.models.equal_tokenizers import have_equal_tokenizers
from trl_lightreasoner.models.loading import load_tokenizer


EXPERT = str(PAIR / "expert")


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(PAIR / "amateur", tmp_path / "amateur")


def change(path, function):
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


def are_equal(folder):
    return have_equal_tokenizers((EXPERT, {}), (str(folder), {}))


def test_equal_files_make_equal_tokenizers(copied):
    assert are_equal(copied)


def test_a_chat_template_of_its_own_leaves_a_tokenizer_equal(copied):
    change(copied / "tokenizer_config.json", lambda settings: settings.update(chat_template="{{ messages }}"))
    assert are_equal(copied)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tokenizer.json", lambda content: content["added_tokens"][0].update(content="<other>")),
        ("tokenizer_config.json", lambda settings: settings.update(add_bos_token=True)),
        ("tokenizer_config.json", lambda settings: settings.update(auto_map={"AutoTokenizer": ["own.Own", None]})),
    ],
)
def test_a_difference_in_the_files_is_found(copied, name, function):
    change(copied / name, function)
    assert not are_equal(copied)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json"])
def test_tokens_in_a_file_of_their_own_are_found(copied, name):
    (copied / name).write_text('{"<added>": 50}')
    assert not are_equal(copied)


def test_an_adapter_tells_nothing(copied):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": EXPERT}
    (copied / "adapter_config.json").write_text(json.dumps(adapter))
    assert not are_equal(copied)


def test_a_damaged_file_is_left_to_the_loading(copied):
    (copied / "tokenizer_config.json").write_text("{")
    assert not are_equal(copied)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_tells_nothing(copied, name):
    (copied / name).unlink()
    assert not have_equal_tokenizers((str(copied), {}), (str(copied), {}))


def test_a_sampler_loads_equal_tokenizers_once(copied, tmp_path):
    sampler = ContrastiveStepSampler(EXPERT, str(copied), ContrastiveSamplingConfig(str(tmp_path / "steps")))
    assert sampler.amateur_processing_class is sampler.processing_class


def test_a_model_of_another_architecture_loads_its_own_tokenizer(copied, tmp_path):
    change(
        copied / "config.json", lambda config: config.update(model_type="llama", architectures=["LlamaForCausalLM"])
    )
    sampler = ContrastiveStepSampler(EXPERT, str(copied), ContrastiveSamplingConfig(str(tmp_path / "steps")))
    assert sampler.amateur_processing_class is not sampler.processing_class


def test_the_users_tokenizer_of_the_amateur_is_kept(copied, tmp_path):
    tokenizer = load_tokenizer(str(copied))
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"))
    sampler = ContrastiveStepSampler(EXPERT, str(copied), args, amateur_processing_class=tokenizer)
    assert sampler.amateur_processing_class is tokenizer


def test_the_users_tokenizer_is_not_taken_for_the_amateurs(copied, tmp_path):
    tokenizer = load_tokenizer(EXPERT)
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"))
    sampler = ContrastiveStepSampler(EXPERT, str(copied), args, processing_class=tokenizer)
    assert sampler.processing_class is tokenizer
    assert sampler.amateur_processing_class is not tokenizer


def test_settings_that_are_no_object_are_left_to_the_loading(copied):
    (copied / "tokenizer_config.json").write_text("[]")
    assert not are_equal(copied)
