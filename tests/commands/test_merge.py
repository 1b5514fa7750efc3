import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.commands.merge import MergeArguments
from trl_lightreasoner.commands.merge import main as merge

from ..conftest import make_model


TARGETS = ["q_proj", "v_proj"]


def save_adapter(base: str, folder, config=None) -> str:
    """An adapter of the model in the folder `base` that changes what the model says."""
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(base), config or LoraConfig(target_modules=TARGETS))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def change_config(folder, **changes) -> None:
    """Set keys of the adapter's config, and take out those that are `None`."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def base_path(tmp_path, expert_path) -> str:
    return shutil.copytree(expert_path, str(tmp_path / "base"))


@pytest.fixture
def adapter_path(base_path, tmp_path) -> str:
    return save_adapter(base_path, tmp_path / "adapter")


@pytest.fixture(scope="module")
def ids(tokenizer) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(len(tokenizer), (2, 9))


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids).logits.float()


def adapted(base: str, adapter: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def run_merge(*argv) -> None:
    assert main(["merge", *map(str, argv)]) == 0


# What comes out


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=TARGETS),
        LoraConfig(target_modules=["q_proj"], use_dora=True),
        LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"]),
        LoHaConfig(target_modules=TARGETS),
        LNTuningConfig(),
    ],
    ids=["LoRA", "DoRA", "LoRA of embeddings", "LoHa", "LayerNorm"],
)
def test_the_model_says_what_base_and_adapter_said(config, base_path, ids, tmp_path):
    adapter = save_adapter(base_path, tmp_path / "adapter", config)
    expected = logits(adapted(base_path, adapter), ids)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(base_path), ids), atol=0.1)
    merge(MergeArguments(adapter, str(tmp_path / "model")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(logits(merged, ids), expected)


def test_a_model_in_bfloat16_says_nearly_the_same(base_path, ids, tmp_path):
    AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16).save_pretrained(base_path)
    adapter = save_adapter(base_path, tmp_path / "adapter")
    merge(MergeArguments(adapter, str(tmp_path / "model")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert merged.dtype == torch.bfloat16
    expected = logits(adapted(base_path, adapter), ids)
    change = expected - logits(AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32), ids)
    assert (logits(merged, ids) - expected).norm() < 0.05 * change.norm()


@pytest.mark.parametrize(("scale", "is_told"), [(0.1, True), (1, False)])
def test_an_adapter_that_rounding_removes_is_told(scale, is_told, base_path, adapter_path, tmp_path, capsys):
    path = f"{adapter_path}/adapter_model.safetensors"
    save_file({name: scale * weight for name, weight in load_file(path).items()}, path)
    merge(MergeArguments(adapter_path, str(tmp_path / "model"), dtype="bfloat16"))
    printed = capsys.readouterr().out
    assert ("Warning: in bfloat16, it differs from" in printed) == is_told
    assert ("Merge again with `--dtype float32`" in printed) == is_told
    merge(MergeArguments(adapter_path, str(tmp_path / "float32"), dtype="float32"))
    assert "Warning" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for(dtype, adapter_path, tmp_path):
    merge(MergeArguments(adapter_path, str(tmp_path / "model"), dtype=dtype))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == getattr(torch, dtype)


def test_the_model_is_a_plain_one(adapter_path, tmp_path):
    merge(MergeArguments(adapter_path, str(tmp_path / "model")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(merged) is Qwen2ForCausalLM
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == Qwen2ForCausalLM(merged.config).state_dict().keys()
    assert not (tmp_path / "model" / "adapter_config.json").exists()


def test_the_model_has_a_card_of_its_own(base_path, adapter_path, tmp_path):
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\nThe base.\n")
    (tmp_path / "adapter" / "README.md").write_text(
        "---\nlibrary_name: peft\nlanguage: en\nbase_model: me/base\n"
        "tags: [trl, light-reasoner, peft, base_model:adapter:x]\n"
        '---\n# adapter\n\nOf the adapter.\n\n```python\nprompt = "2+2="\n```\n\n## Training data\n\nProblems.\n\n'
        "## Training curve\n\n![Loss](training_curve.png)\n\nA table.\n"
    )
    run_merge("--model", adapter_path, "--output_dir", tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.license, data.language) == ("transformers", "mit", "en")
    assert data.tags == ["trl", "light-reasoner"]
    assert (data.base_model, data.get("base_model_relation")) == (None, None)  # it is a folder of this machine
    assert "`base` with the LoRA adapter `adapter` merged" in text and str(tmp_path) not in text
    assert "| LoRA target modules | q_proj, v_proj |" in text and "| parameters | " in text
    assert "Problems." in text and "A table." in text and "![" not in text and "Of the adapter." not in text
    assert 'prompt = "2+2="' in text and "peft" not in text.partition("## How it was made")[0].lower().replace(
        "without peft", ""
    )


def test_the_quick_start_of_the_card_runs(adapter_path, tmp_path, monkeypatch, capsys):
    run_merge("--model", adapter_path, "--output_dir", tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search("```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert "LightReasoner]" not in text and "## Training data" not in text  # that nobody has told


def test_an_adapter_whose_card_cannot_be_read_is_merged(adapter_path, tmp_path):
    (tmp_path / "adapter" / "README.md").write_text("---\n: [\n---\n")
    run_merge("--model", adapter_path, "--output_dir", tmp_path / "model")
    assert "# model" in (tmp_path / "model" / "README.md").read_text()


def test_the_base_model_and_the_adapter_stay_as_they_are(base_path, adapter_path, tmp_path):
    files = [path for name in (base_path, adapter_path) for path in sorted((tmp_path / name).iterdir())]
    before = [path.read_bytes() for path in files]
    merge(MergeArguments(adapter_path, str(tmp_path / "model")))
    assert [path.read_bytes() for path in files] == before


def test_the_generation_config_comes_from_the_base_model(base_path, adapter_path, tmp_path):
    GenerationConfig(do_sample=True, top_k=7).save_pretrained(base_path)
    merge(MergeArguments(adapter_path, str(tmp_path / "model")))
    assert GenerationConfig.from_pretrained(tmp_path / "model").top_k == 7


@pytest.mark.parametrize("beside_adapter", [True, False])
def test_the_tokenizer_is_the_adapters_if_it_has_one_else_the_base_models(
    beside_adapter, base_path, adapter_path, tmp_path
):
    if beside_adapter:
        tokenizer = AutoTokenizer.from_pretrained(base_path)
        tokenizer.chat_template = "of the adapter"
        tokenizer.save_pretrained(adapter_path)
    merge(MergeArguments(adapter_path, str(tmp_path / "model")))
    merged = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert merged.get_vocab() == AutoTokenizer.from_pretrained(base_path).get_vocab()
    assert (merged.chat_template == "of the adapter") == beside_adapter


def test_tokens_trained_in_tied_embeddings_stay_tied(tokenizer, ids, tmp_path):
    make_model(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    config = LoraConfig(target_modules=TARGETS, trainable_token_indices=ids[0, :3].tolist())
    adapter = save_adapter(tmp_path / "tied", tmp_path / "adapter", config)
    merge(MergeArguments(adapter, str(tmp_path / "model")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert merged.config.tie_word_embeddings
    expected = logits(adapted(str(tmp_path / "tied"), adapter), ids)
    assert_same(logits(merged, ids), expected)


def test_another_base_model_takes_the_place_of_the_one_that_is_gone(base_path, adapter_path, ids, tmp_path):
    expected = logits(adapted(base_path, adapter_path), ids)
    moved = shutil.move(base_path, tmp_path / "moved")
    run_merge(
        *("--model_name_or_path", adapter_path, "--output_dir", tmp_path / "model"),
        *("--base_model_name_or_path", moved),
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(logits(merged, ids), expected)


def test_the_program_says_where_the_model_is(adapter_path, tmp_path, capsys):
    (tmp_path / "model").mkdir()  # empty
    run_merge("--model_name_or_path", adapter_path, "--output_dir", tmp_path / "model")
    stdout, stderr = capsys.readouterr()
    told, following = stdout.splitlines()
    assert told == f"The model is in {tmp_path / 'model'}."
    assert following == f"Next: lightreasoner eval --model {tmp_path / 'model'} --output_dir EVALUATION"
    assert re.search(r"Running on: CPU \(threads: \d+\), merged in float32\.\n1/3 Loading", stderr)
    assert "\n2/3 Merging" in stderr and "\n3/3 Comparing" in stderr


def test_an_adapter_trained_in_4_bits_is_merged_into_full_precision(tokenizer, steps, ids, tmp_path):
    pytest.importorskip("bitsandbytes")
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    make_model(tokenizer, hidden_size=64).save_pretrained(base)
    tokenizer.save_pretrained(base)
    steps.to_parquet(tmp_path / "steps.parquet")
    argv = ["train", "--model_name_or_path", base, "--dataset_name", str(tmp_path / "steps.parquet"), "--load_in_4bit"]
    argv += ["--output_dir", adapter, "--use_cpu", "--max_steps", "2", "--learning_rate", "1e-2"]
    argv += ["--lora_target_modules", *TARGETS]
    assert main([*argv, "--report_to", "none", "--disable_tqdm", "true"]) == 0

    merge(MergeArguments(adapter, str(tmp_path / "model")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert getattr(merged.config, "quantization_config", None) is None
    assert_same(logits(merged, ids), logits(adapted(base, adapter), ids))
    changed = {
        name
        for name, weight in AutoModelForCausalLM.from_pretrained(base).state_dict().items()
        if not torch.equal(weight, merged.state_dict()[name])
    }
    assert changed == {f"model.layers.{i}.self_attn.{name}.weight" for i in (0, 1) for name in TARGETS}


# What is refused


@pytest.fixture
def refused(adapter_path, tmp_path, capsys):
    """The one sentence with which `merge` of the adapter is refused."""

    def run(*argv, adapter=adapter_path, output_dir=tmp_path / "model") -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        flags = ["--model_name_or_path", adapter, "--output_dir", output_dir, *argv]
        status = main(["merge", *map(str, flags)])
        *_, line = capsys.readouterr().err.rstrip("\n").split("\n")
        assert status == 2
        assert line.startswith("lightreasoner merge: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return line.partition(": error: ")[2]

    return run


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)


@pytest.mark.parametrize("adapter", ["nowhere", "no/where", "{tmp_path}/nowhere", "{tmp_path}/base"])
def test_what_is_no_adapter_is_refused(adapter, refused, no_weights, tmp_path):
    adapter = adapter.format(tmp_path=tmp_path)
    assert refused(adapter=adapter).startswith(
        f"{adapter!r} is not an adapter: there is no adapter_config.json. Name the folder of `lightreasoner train`"
    )


@pytest.mark.parametrize(
    ("output_dir", "message"),
    [
        ("base/config.json", "is a file. Choose another `--output_dir`."),
        ("base", "is not empty, and a model there would be overwritten. Choose another `--output_dir`."),
        ("adapter", "is the adapter's own folder. Choose another `--output_dir`."),
        ("base/../adapter/", "is the adapter's own folder. Choose another `--output_dir`."),
        ("base/config.json/model", "(Not a directory). Choose another `--output_dir`, or fix the permissions."),
    ],
)
def test_a_folder_that_is_taken_is_refused(output_dir, message, refused, no_weights, tmp_path):
    assert refused(output_dir=f"{tmp_path}/{output_dir}").endswith(message)


def test_a_base_model_that_is_gone_is_refused(base_path, refused, no_weights):
    shutil.rmtree(base_path)
    message = refused()
    assert message.startswith(f"The base model {base_path!r} cannot be found.")
    assert message.endswith(
        "The adapter's config names this base model. If it has moved, give its path with `--base_model_name_or_path`."
    )


def test_a_base_model_that_is_named_wrongly_is_refused(refused, no_weights):
    message = refused("--base_model_name_or_path", "no/where")
    assert message.startswith("The base model 'no/where' cannot be found.")
    assert "The adapter's config names it" not in message


def test_an_adapter_that_names_no_base_model_is_refused(refused, no_weights, tmp_path):
    change_config(tmp_path / "adapter", base_model_name_or_path=None)
    assert refused() == "The adapter's config names no base model. Name it with `--base_model_name_or_path`."


def test_a_base_model_that_is_an_adapter_is_refused(adapter_path, refused, no_weights):
    message = refused("--base_model_name_or_path", adapter_path)
    assert message.startswith(f"The base model {adapter_path!r} is itself an adapter. Merge it first")


def test_a_base_model_that_is_quantized_is_refused(base_path, refused, no_weights, tmp_path):
    path = tmp_path / "base" / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    assert refused() == (
        f"The base model {base_path!r} is quantized, so merging into its weights would round the adapter away. Name "
        "the same model in full precision with `--base_model_name_or_path`."
    )


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "model.embed_tokens"),
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "lm_head"),
        (LoraConfig(target_modules=r".*(q_proj|embed_tokens|lm_head)"), "model.embed_tokens and lm_head"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), "model.embed_tokens"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head"),
    ],
    ids=["embed_tokens", "lm_head", "pattern", "embed_tokens saved", "lm_head saved"],
)
def test_an_adapter_of_tied_embeddings_is_refused(config, names, tokenizer, refused, tmp_path, monkeypatch):
    make_model(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    adapter = save_adapter(tmp_path / "tied", tmp_path / "tied_adapter", config)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    message = refused(adapter=adapter)
    assert message.startswith(f"The adapter changes {names}, and the base model ties its input and output embeddings")


@pytest.mark.parametrize("tokens", [{"lm_head": [200]}, {"embed_tokens": [200, 250], "lm_head": [260]}], ids=str)
def test_tokens_trained_in_one_of_two_tied_embeddings_are_refused(tokens, tokenizer, refused, tmp_path):
    make_model(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    config = LoraConfig(target_modules=TARGETS, trainable_token_indices=tokens)
    message = refused(adapter=save_adapter(tmp_path / "tied", tmp_path / "tied_adapter", config))
    places = "model.embed_tokens.weight and lm_head.weight"
    assert message.startswith(f"The adapter changes a weight that the base model uses in several places ({places}).")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LilyConfig(target_modules=TARGETS), "LILY"),
        (LoraConfig(target_modules=TARGETS, layer_replication=[(0, 2), (1, 2)]), "LoRA with `layer_replication`"),
    ],
    ids=["Lily", "layer_replication"],
)
def test_an_adapter_that_cannot_be_merged_is_refused(config, kind, base_path, refused, no_weights, tmp_path):
    adapter = save_adapter(base_path, tmp_path / "other", config)
    assert refused(adapter=adapter).startswith(f"An adapter of this type ({kind}) cannot be merged into the weights")


def test_a_bias_that_the_base_model_has_no_place_for_is_refused(base_path, refused, tmp_path):
    config = LoraConfig(target_modules=["o_proj"], lora_bias=True)
    message = refused(adapter=save_adapter(base_path, tmp_path / "other", config))
    assert "`lora_bias=True` because the base layer has no bias" in message and "\n" not in message


def test_an_adapter_of_virtual_tokens_is_refused(base_path, refused, no_weights, tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    message = refused(adapter=save_adapter(base_path, tmp_path / "prefix", config))
    assert message.startswith("The model is an adapter of virtual tokens (`PREFIX_TUNING`)")


@pytest.mark.parametrize("content", [None, b"damaged"], ids=["missing", "damaged"])
def test_an_adapter_without_sound_weights_is_refused(content, adapter_path, refused, no_weights, tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    assert refused().startswith(
        f"The weights of the adapter {adapter_path!r}, adapter_model.safetensors, are missing or damaged."
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(value, refused, no_weights, tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name][0, 0] = value
    save_file(weights, path, metadata={"format": "pt"})
    assert refused().startswith(f"The adapter's weights contain NaN or infinity, first in {name!r}.")


def test_a_merge_that_is_not_finite_is_refused(adapter_path, base_path, expert, refused):
    with torch.no_grad():
        expert.model.layers[1].self_attn.v_proj.weight.fill_(float("inf"))
    expert.save_pretrained(base_path)
    assert refused().startswith("In float32, the base model with the adapter gives NaN.")


def test_a_weight_of_a_rare_token_that_overflows_is_refused(base_path, expert, refused):
    with torch.no_grad():
        expert.get_input_embeddings().weight[250] *= 1e7
    expert.to(torch.bfloat16).save_pretrained(base_path)
    message = refused("--dtype", "float16")
    assert message.startswith("The merged weights contain NaN or infinity, first in 'model.embed_tokens.weight'.")


@pytest.mark.parametrize("part", ["lm_head", "model.layers.0.mlp.down_proj"])
def test_weights_that_overflow_in_float16_are_refused(part, base_path, adapter_path, expert, refused, tmp_path):
    with torch.no_grad():
        expert.get_submodule(part).weight.mul_(1e5)
    expert.to(torch.bfloat16).save_pretrained(base_path)
    assert refused("--dtype", "float16") == (
        "In float16, the base model with the adapter gives NaN. Merge in another `--dtype`, such as bfloat16 or "
        "float32, or check the base model's weights."
    )
    run_merge("--model", adapter_path, "--output_dir", tmp_path / "model")


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}], ids=str)
def test_a_base_model_that_the_adapter_does_not_fit_is_refused(change, expert, tokenizer, refused, tmp_path):
    config = Qwen2Config.from_dict({**expert.config.to_dict(), **change, "layer_types": None})
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    message = refused("--base_model_name_or_path", tmp_path / "other")
    assert message.startswith(f"The adapter '{tmp_path}/adapter' does not fit its base model '{tmp_path}/other': ")
    assert message.endswith("Name it with `--base_model_name_or_path`.")


def test_a_model_that_cannot_be_saved_leaves_no_folder(refused, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device.")

    monkeypatch.setattr(Qwen2ForCausalLM, "save_pretrained", fail)
    assert refused() == "No space left on device."


def test_a_tokenizer_that_is_nowhere_is_refused(base_path, refused, no_weights, tmp_path):
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()
    message = refused()
    assert message.startswith(f"No tokenizer can be loaded from {base_path!r} (there is none). Save the model's")
