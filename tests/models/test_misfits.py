"""Weights that fit a config or a base model only in part are refused by name; merely another layout is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BitsAndBytesConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from trl_lightreasoner.commands.merge import MergeArguments
from trl_lightreasoner.commands.merge import main as merge
from trl_lightreasoner.models.adapter_loading import load_adapter
from trl_lightreasoner.models.loading import load_model
from trl_lightreasoner.training.saving import warn_of_left_out

from ..conftest import make_model


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path, expert_path) -> Path:
    return Path(shutil.copytree(expert_path, tmp_path / "copy"))


def without(name: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize(
    ("change", "misfit"),
    [
        (lambda tensors: {f"net.{name}": each for name, each in tensors.items()}, "missing: lm_head.weight, .*; unex"),
        (without(Q_PROJ), f"missing: {Q_PROJ}\\."),
        (without("lm_head.weight"), r"missing: lm_head\.weight\."),
        (lambda tensors: {**tensors, "score.weight": torch.ones(2, 2)}, r"unexpected: score\.weight\."),
        (lambda tensors: {**tensors, Q_PROJ: torch.ones(3, 32)}, f"of another shape: {Q_PROJ}\\."),
    ],
    ids=["prefix", "one missing", "untied head", "one more", "shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, misfit, bits, folder):
    change_tensors(folder / "model.safetensors", change)
    kwargs = {} if bits is None else {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}
    with pytest.raises(ValueError, match=f"^The weights of the model '{folder}' do not fit its config.json: {misfit}"):
        load_model(str(folder), **kwargs)


@pytest.mark.parametrize(
    ("changes", "misfit"),
    [
        ({"model_type": "llama"}, r"unexpected: model\.layers\.0\.self_attn\.k_proj\.bias, .* and 3 more\."),
        ({"num_hidden_layers": 1, "layer_types": None}, r"unexpected: model\.layers\.1\..* and 9 more\."),
        ({"intermediate_size": 48}, r"of another shape: model\.layers\.0\.mlp\.down_proj\.weight, .* and 3 more\."),
    ],
    ids=["model_type", "layers", "shapes"],
)
def test_a_config_that_its_weights_do_not_fit_is_refused(changes, misfit, folder):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=f"do not fit its config.json: {misfit}"):
        load_model(str(folder))


def test_tied_heads_and_buffers_of_old_checkpoints_are_no_misfit(tmp_path, tokenizer):
    tied = make_model(tokenizer, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    change_tensors(tmp_path / "model.safetensors", lambda tensors: {**tensors, **buffers})
    ids = torch.arange(9)[None]
    assert torch.equal(load_model(str(tmp_path))(ids).logits, tied(ids).logits)


@pytest.fixture
def vision_model() -> PreTrainedModel:
    text = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "layer_types": ["full_attention"],
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    torch.manual_seed(0)
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).eval()


def test_the_text_part_of_a_model_that_sees_is_no_misfit(vision_model, tmp_path):
    vision_model.save_pretrained(tmp_path)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(load_model(str(tmp_path))(ids).logits, vision_model(ids).logits)


def test_a_merge_says_that_vision_is_left_out(vision_model, tokenizer, tmp_path, capsys):
    vision_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    merge(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "model")))
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    lost = [name for name in names if "visual" in name]
    said = capsys.readouterr().out
    left_out = f"{len(lost)} tensors of '{tmp_path}/base': model.visual ({len(lost)})."
    assert f"Warning: it is only the language model, without {left_out}" in said


def test_parts_that_transformers_does_not_pass_over_by_name_are_told_too(
    tokenizer, tmp_path, capsys, caplog, propagated_logs
):
    text = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size_mlp": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "moe_layers": [],
    }
    vision = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "vision_output_dim"), 16),
        **dict.fromkeys(("projector_input_dim", "projector_output_dim"), 16),
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    lost = [sum(name.startswith(part) for name in names) for part in ("vision_model", "multi_modal_projector")]
    parts = f"vision_model ({lost[0]}), multi_modal_projector ({lost[1]})."
    base = load_model(str(tmp_path / "base"))
    warn_of_left_out(base, str(tmp_path / "base"))
    assert f"{sum(lost)} tensors of '{tmp_path}/base' are not part of the trained language model" in caplog.text
    assert parts in caplog.text
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    merge(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "model")))
    assert f"without {sum(lost)} tensors of '{tmp_path}/base': {parts}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "misfit"),
    [
        (lambda tensors: {f"net.{name}": each for name, each in tensors.items()}, r"missing: .* more\."),
        (without(LORA_A), r"missing: .*\.0\.self_attn\.q_proj\.lora_A\.default\.weight\."),
        (
            lambda tensors: {**tensors, LORA_A.replace("0", "7"): torch.ones(8, 32)},
            r"unexpected: .*\.7\.self_attn\.q_proj\.lora_A\..*weight\.",
        ),
        (lambda tensors: {**tensors, LORA_A: torch.ones(8, 3)}, r"of another shape: .*\.q_proj\.lora_A\..*weight\."),
    ],
    ids=["prefix", "one missing", "one more", "shape"],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(change, misfit, expert, expert_path, tmp_path):
    get_peft_model(expert, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    change_tensors(tmp_path / "adapter_model.safetensors", change)
    sentence = f"^The adapter '{tmp_path}' does not fit its base model '{expert_path}': {misfit} It must be the model"
    with pytest.raises(ValueError, match=sentence):
        load_model(str(tmp_path))


def test_weights_that_an_adapter_keeps_in_one_place_are_no_misfit(expert, expert_path, tmp_path):
    config = VBLoRAConfig(target_modules=["q_proj"], vector_length=8, num_vectors=16)
    get_peft_model(expert, config).save_pretrained(tmp_path)
    assert load_adapter(load_model(expert_path), str(tmp_path)).peft_config["default"].num_vectors == 16


def change_embeddings(model: PreTrainedModel, config: LoraConfig, rows: int, folder: Path) -> PeftModel:
    """Give a model another number of embeddings and an adapter that changes what it says, and save the adapter."""
    model.resize_token_embeddings(rows)
    torch.manual_seed(3)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("rows", [305, 350])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "trained",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 304]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=lambda trained: next(iter(trained)),
)
def test_an_adapter_of_embeddings_is_loaded_onto_as_many_as_it_was_trained_on(
    trained, is_tied, rows, tokenizer, tmp_path
):
    make_model(tokenizer, tie_word_embeddings=is_tied).save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    config = LoraConfig(**{"target_modules": ["q_proj"], **trained})
    expected = change_embeddings(base, config, rows, tmp_path / "adapter")
    ids = torch.arange(270, 300)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(tmp_path / "adapter"))(ids).logits, expected(ids).logits)


def test_an_adapter_that_lacks_added_embeddings_is_refused(expert, expert_path, tmp_path):
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"])
    change_embeddings(expert, config, 305, tmp_path / "fewer")
    assert load_model(str(tmp_path / "fewer")).get_output_embeddings().weight.shape[0] == 305
    change_embeddings(load_model(expert_path), config, 350, tmp_path / "more")
    sentence = (
        f"holds 350 embeddings of 'embed_tokens' alone, and its base model '{expert_path}' has 312, so the others"
    )
    with pytest.raises(ValueError, match=sentence):
        load_model(str(tmp_path / "more"))


def test_tokens_that_the_base_model_lacks_are_refused(expert, expert_path, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5])
    get_peft_model(expert, config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": [900]}))
    with pytest.raises(ValueError, match="does not fit .*: beyond the vocabulary: trainable_token_indices. It must"):
        load_model(str(tmp_path))
