import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_lightreasoner.models.forward import accepts_logits_to_keep, forward_at
from trl_lightreasoner.models.loading import load_config, load_model, load_tokenizer
from trl_lightreasoner.models.weights import get_base_model, weight_fingerprint

from ..conftest import make_model


TINY_BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TINY_T5 = {"vocab_size": 40, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}


def add_lora(model):
    """A LoRA adapter that changes the model: PEFT's own starts at zero."""
    torch.manual_seed(3)
    return get_peft_model(
        model,
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()


@pytest.fixture(scope="module")
def adapter_path(tmp_path_factory, expert_path):
    folder = str(tmp_path_factory.mktemp("adapter"))
    add_lora(Qwen2ForCausalLM.from_pretrained(expert_path)).save_pretrained(folder)
    return folder


@pytest.fixture
def in_cache(tmp_path, monkeypatch):
    """Puts a folder into a cache as a download leaves it; returns the id."""

    def put(folder, name) -> str:
        repository = tmp_path / f"models--someone--{name}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "snapshots" / ("a" * 40)).symlink_to(folder, target_is_directory=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        return f"someone/{name}"

    return put


@pytest.fixture
def hub_id(in_cache, expert_path):
    return in_cache(expert_path, "expert")


@pytest.fixture(scope="module")
def ids(tokenizer):
    torch.manual_seed(0)
    return torch.randint(len(tokenizer), (2, 7))


def test_a_path_is_loaded(expert_path, expert, ids):
    model = load_model(expert_path)
    assert isinstance(model, Qwen2ForCausalLM) and not model.training
    assert torch.equal(model(ids).logits, expert(ids).logits)


def test_an_id_is_loaded(hub_id, expert, ids):
    assert load_config(hub_id).vocab_size == expert.config.vocab_size
    assert torch.equal(load_model(hub_id)(ids).logits, expert(ids).logits)
    assert load_tokenizer(hub_id).eos_token == "<|im_end|>"


@pytest.mark.parametrize("peft", [False, True])
def test_an_object_stays_the_same_object(expert, peft):
    model = add_lora(expert) if peft else expert
    assert load_model(model) is model
    assert load_config(model) is expert.config


def test_an_adapter_is_loaded_on_its_base_model(adapter_path, expert, ids):
    model = load_model(adapter_path)
    assert isinstance(model, PeftModel) and isinstance(get_base_model(model), Qwen2ForCausalLM)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, expert(ids).logits)
        torch.testing.assert_close(model(ids).logits, add_lora(expert)(ids).logits)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_is_trainable_if_asked_for(adapter_path, is_trainable):
    model = load_model(adapter_path, is_trainable=is_trainable)
    assert any(parameter.requires_grad for parameter in model.parameters()) == is_trainable


@pytest.mark.parametrize("recorded", ["v1", None])
def test_an_adapter_gets_the_revision_of_its_base_model_that_it_names(recorded, adapter_path, tmp_path, monkeypatch):
    shutil.copytree(adapter_path, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "revision": recorded}))
    asked = []
    for auto in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        load = auto.from_pretrained
        monkeypatch.setattr(
            auto,
            "from_pretrained",
            lambda path, *args, load=load, **kwargs: asked.append(kwargs["revision"]) or load(path, *args, **kwargs),
        )
    for load in (load_config, load_model, load_tokenizer):
        load(str(tmp_path / "adapter"), revision="the adapter's")
    assert len(asked) >= 3 and set(asked) == {recorded or "main"}


def test_an_adapter_has_the_config_of_its_base_model(adapter_path, expert):
    assert load_config(adapter_path).to_dict() == expert.config.to_dict()


def test_the_tokenizer_of_an_adapter_is_that_of_its_base_model(adapter_path, expert_path, tokenizer):
    for model in (adapter_path, load_model(adapter_path)):
        assert load_tokenizer(model).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("from_hub", [False, True])
def test_a_tokenizer_beside_an_adapter_comes_before_that_of_its_base_model(
    from_hub, adapter_path, expert_path, tmp_path, in_cache
):
    shutil.copytree(adapter_path, tmp_path / "adapter")
    own = AutoTokenizer.from_pretrained(expert_path)
    own.chat_template = "{{ messages[0]['content'] }} of my own"
    own.save_pretrained(tmp_path / "adapter")
    name = str(tmp_path / "adapter")
    if from_hub:
        name = in_cache(tmp_path / "adapter", "adapter")
    assert load_tokenizer(name).chat_template == own.chat_template


@pytest.mark.parametrize("from_hub", [False, True])
@pytest.mark.parametrize("vocabulary", ["larger than the logits", "none"])
def test_a_tokenizer_beside_an_adapter_that_does_not_fit_gives_way(
    vocabulary, from_hub, adapter_path, expert_path, tmp_path, in_cache, caplog
):
    shutil.copytree(adapter_path, tmp_path / "adapter")
    own = AutoTokenizer.from_pretrained(expert_path)
    own.add_tokens([f"<{i}>" for i in range(200)])
    own.save_pretrained(tmp_path / "adapter")
    if vocabulary == "none":
        (tmp_path / "adapter" / "tokenizer.json").unlink()
    name = in_cache(tmp_path / "adapter", "adapter") if from_hub else str(tmp_path / "adapter")
    assert load_tokenizer(name).get_vocab() == AutoTokenizer.from_pretrained(expert_path).get_vocab()
    assert ("has more tokens than the base model has logits" in caplog.text) == (vocabulary != "none")


def test_a_model_without_a_name_asks_for_a_tokenizer(tokenizer):
    with pytest.raises(
        ValueError,
        match="The tokenizer of the amateur cannot be located. Pass the tokenizer as `amateur_processing_class`",
    ):
        load_tokenizer(make_model(tokenizer), "amateur", "amateur_processing_class")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_checkpoints_own_unless_given(tmp_path, expert, stored):
    expert.to(stored).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == stored
    assert load_model(str(tmp_path), dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("name", ["missing", "someone/missing", "no/such/folder", "/no/such/folder"])
def test_a_model_that_is_nowhere_gives_one_clear_sentence(name):
    with pytest.raises(ValueError, match=f"^The expert '{name}' cannot be found. It must be a folder with"):
        load_config(name, "expert")
    with pytest.raises(ValueError, match=f"^The expert '{name}' cannot be found. It must be a folder with"):
        load_tokenizer(name, "expert")


def test_an_adapter_whose_base_model_is_nowhere_names_the_base_model(tmp_path, expert):
    adapted = add_lora(expert)
    adapted.peft_config["default"].base_model_name_or_path = "someone/base"
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The amateur 'someone/base' cannot be found"):
        load_config(str(tmp_path), "amateur")


@pytest.mark.parametrize("model", [7, None, torch.nn.Linear(2, 2)], ids=["int", "None", "Linear"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="The expert must be a model id, a path, .* got `"):
        load_config(model, "expert")


@pytest.mark.parametrize("as_path", [True, False])
def test_an_encoder_decoder_model_is_refused(tmp_path, as_path):
    config = T5Config(**TINY_T5)
    config.save_pretrained(tmp_path)
    model = str(tmp_path) if as_path else T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="The expert is an encoder-decoder model .`t5`.*needs a causal"):
        load_config(model, "expert")


@pytest.mark.parametrize("as_path", [True, False])
def test_an_encoder_is_refused(tmp_path, as_path):
    config = BertConfig(**TINY_BERT)
    config.save_pretrained(tmp_path)
    model = str(tmp_path) if as_path else BertForMaskedLM(config)
    with pytest.raises(ValueError, match="The expert .`bert`. has no next-token distribution"):
        load_config(model, "expert")


@pytest.mark.parametrize("as_path", [True, False])
def test_an_encoder_architecture_that_is_set_to_decode_is_accepted(tmp_path, as_path):
    model = BertLMHeadModel(BertConfig(**TINY_BERT, is_decoder=True))
    model.save_pretrained(tmp_path)
    assert load_config(str(tmp_path) if as_path else model).is_decoder


def test_a_model_object_without_a_head_is_refused(expert_path):
    with pytest.raises(ValueError, match="The expert .`qwen2`. has no next-token distribution"):
        load_config(Qwen2Model.from_pretrained(expert_path), "expert")


def test_a_causal_model_with_code_of_its_own_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "configuration_own.py").write_text(
        "from transformers import PretrainedConfig\n\n\nclass OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    assert load_config(str(tmp_path), **{"trust_remote_code": True}).model_type == "own"


@pytest.mark.parametrize("as_path", [True, False])
@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_an_adapter_of_virtual_tokens_is_refused(tmp_path, expert, config, as_path):
    model = get_peft_model(expert, config(task_type="CAUSAL_LM", num_virtual_tokens=2))
    if as_path:
        model.save_pretrained(tmp_path)
        model = str(tmp_path)
    with pytest.raises(ValueError, match="The expert is an adapter of virtual tokens .* such as LoRA"):
        load_config(model, "expert")


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("to_keep", [False, True])
def test_forward_at_gives_the_logits_at_the_positions(expert, ids, to_keep, peft):
    model = add_lora(expert) if peft else expert
    assert accepts_logits_to_keep(model)
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[0, [0, 3, 6]] = positions[1, [2]] = True
    with torch.no_grad():
        logits = forward_at(model, positions, to_keep, input_ids=ids).logits
        full = model(ids).logits
    expected = torch.stack([full[0, 0], full[0, 3], full[0, 6], full[1, 2]])
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("to_keep", [False, True])
def test_forward_at_takes_the_indices_of_one_row(expert, ids, to_keep):
    with torch.no_grad():
        logits = forward_at(expert, torch.tensor([0, 3, 6]), to_keep, input_ids=ids[:1]).logits
        expected = expert(ids[:1]).logits[0, [0, 3, 6]]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("to_keep", [False, True])
def test_forward_at_no_position_gives_no_logits(expert, ids, to_keep):
    logits = forward_at(expert, torch.zeros_like(ids, dtype=torch.bool), to_keep, input_ids=ids).logits
    assert logits.shape == (0, expert.config.vocab_size)


def test_a_forward_without_logits_to_keep_is_noticed(expert_path):
    assert not accepts_logits_to_keep(Qwen2Model.from_pretrained(expert_path))


def test_the_fingerprint_is_the_same_after_loading_again(expert, expert_path):
    assert weight_fingerprint(expert) == weight_fingerprint(load_model(expert_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [0, 1, 4, -1])
def test_the_fingerprint_sees_one_changed_value(dtype, index):
    model = torch.nn.Linear(1, 13, bias=False, dtype=dtype)  # 13 values, not a whole number of words
    before = weight_fingerprint(model)
    with torch.no_grad():
        model.weight[index] += 1
    assert weight_fingerprint(model) != before


def test_the_fingerprint_sees_the_end_of_a_tensor_of_several_blocks():
    model = torch.nn.Linear(2**20, 5, bias=False)  # 2.5 of them
    before = weight_fingerprint(model)
    with torch.no_grad():
        model.weight[-1, -1] += 1
    assert weight_fingerprint(model) != before


def test_the_fingerprint_sees_two_values_that_change_places():
    model = torch.nn.Linear(1, 8, bias=False)
    before = weight_fingerprint(model)
    with torch.no_grad():
        model.weight.copy_(model.weight[[2, 3, 0, 1, 4, 5, 6, 7]])
    assert weight_fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "places", [(5, 777), (3, 3 + 2**17), (3, 3 + 2**18), (3, 3 + 2**20), (0, 2**21 - 1), (8, 9)], ids=str
)
def test_the_fingerprint_sees_two_values_anywhere_that_are_exchanged(places, dtype):
    model = torch.nn.Linear(2**21, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.zero_()  # so that a change of place is all there is to see
        model.weight[0, list(places)] = torch.tensor([1.5, -1.5], dtype=dtype)
        before = weight_fingerprint(model)
        model.weight[0, list(places)] = torch.tensor([-1.5, 1.5], dtype=dtype)
    assert weight_fingerprint(model) != before


def test_the_fingerprint_sees_the_dtype(expert):
    before = weight_fingerprint(expert)
    assert weight_fingerprint(expert.to(torch.bfloat16)) != before


@pytest.mark.parametrize(
    ("stored", "kwargs", "expected"),
    [
        (torch.float16, {}, torch.float32),
        (torch.float16, {"dtype": "float16"}, torch.float16),
        (torch.float16, {"device_map": None}, torch.float16),  # the caller places the model
        (torch.bfloat16, {}, torch.bfloat16),
    ],
)
def test_a_float16_checkpoint_is_loaded_in_float32_on_a_cpu(expert, tmp_path, monkeypatch, stored, kwargs, expected):
    monkeypatch.setattr("accelerate.PartialState.device", torch.device("cpu"), raising=False)
    expert.to(stored).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), **kwargs).dtype == expected
