"""An adapter whose base model was replaced is warned of, wherever it is loaded by name."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2ForCausalLM

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    EvaluationConfig,
    LightReasonerConfig,
    LightReasonerTrainer,
    evaluate,
)
from trl_lightreasoner.commands.merge import MergeArguments
from trl_lightreasoner.commands.merge import main as merge
from trl_lightreasoner.models import base_model
from trl_lightreasoner.models.base_model import FILE_NAME, describe_base, save_base
from trl_lightreasoner.models.loading import load_model
from trl_lightreasoner.models.weights import base_fingerprint, weight_fingerprint

from ..conftest import make_model


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **kwargs})


def config(folder, **kwargs) -> LightReasonerConfig:
    kwargs = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, **kwargs}
    return LightReasonerConfig(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **kwargs)


def train(model, folder, steps, peft_config=None, checkpoint=None, **kwargs) -> None:
    trainer = LightReasonerTrainer(model, config(folder, **kwargs), train_dataset=steps, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


def name_base(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))


@pytest.fixture(scope="module")
def _trained(tmp_path_factory, tokenizer, steps) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_model(tokenizer, hidden_size=64).save_pretrained(folder / "final")
    tokenizer.save_pretrained(folder / "final")
    train(str(folder / "final"), folder / "adapter", steps, lora())
    return folder


@pytest.fixture
def base(_trained, tmp_path) -> Path:
    return Path(shutil.copytree(_trained / "final", tmp_path / "final"))


@pytest.fixture
def adapter(_trained, base, tmp_path) -> Path:
    """An adapter that was trained on the model in `base`."""
    folder = Path(shutil.copytree(_trained / "adapter", tmp_path / "adapter"))
    name_base(folder, base)
    return folder


@pytest.fixture
def replace(base, tokenizer):
    return lambda: make_model(tokenizer, seed=5, hidden_size=64).save_pretrained(base)


@pytest.fixture
def said(caplog):
    """What is said of base models since the last call."""

    def said() -> list[str]:
        messages = [record.getMessage() for record in caplog.records if record.name == base_model.__name__]
        caplog.clear()
        return messages

    with caplog.at_level(logging.WARNING):
        yield said


# Everything that loads an adapter by name


def evaluates(adapter, base, tmp_path, request):
    pytest.importorskip("math_verify")
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "What is 2+2?", "answer": "#### 4"}')
    args = EvaluationConfig(str(tmp_path / "out"), benchmarks=["gsm8k"], data_dir=str(tmp_path), max_new_tokens=2)
    evaluate(str(adapter), args)


def merges(adapter, base, tmp_path, request):
    merge(MergeArguments(str(adapter), str(tmp_path / "out")))


def samples(expert, amateur, tmp_path, request):
    args = ContrastiveSamplingConfig(str(tmp_path / "out"), max_new_tokens=2, beta=0)
    ContrastiveStepSampler(str(expert), str(amateur), args).sample(request.getfixturevalue("prompts"))


def samples_its_steps(adapter, base, tmp_path, request):
    samples(adapter, request.getfixturevalue("amateur_path"), tmp_path, request)


def samples_beside_its_base(adapter, base, tmp_path, request):
    samples(adapter, base, tmp_path, request)


def samples_as_the_amateur(adapter, base, tmp_path, request):
    samples(base, adapter, tmp_path, request)


def trains_further(adapter, base, tmp_path, request):
    train(str(adapter), tmp_path / "out", request.getfixturevalue("steps"))


USES = [evaluates, merges, samples_its_steps, samples_beside_its_base, samples_as_the_amateur, trains_further]


@pytest.mark.parametrize("use", USES)
def test_a_replaced_base_model_is_one_warning(use, adapter, base, replace, said, tmp_path, request):
    replace()
    use(adapter, base, tmp_path, request)
    assert said() == [
        f"The adapter {str(adapter)!r} was trained on other weights than its base model {str(base)!r} has now, so the "
        "two together are not the model that was trained: restore the former base model, or train the adapter again."
    ]


@pytest.mark.parametrize("use", USES)
def test_the_base_model_of_the_training_is_no_warning(use, adapter, base, said, tmp_path, request):
    use(adapter, base, tmp_path, request)
    assert said() == []


def test_a_checkpoint_on_a_replaced_base_model_is_refused_unless_it_is_named(base, replace, steps, tmp_path, caplog):
    train(str(base), tmp_path / "out", steps, lora(), max_steps=1)
    train(str(base), tmp_path / "out", steps, lora(), checkpoint=True, max_steps=2)
    replace()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    message = (
        f"The checkpoint {checkpoint!r} is from a different training: the weights of the base model 'final' have "
        "changed."
    )
    with pytest.raises(ValueError, match=f"^{message} Restore the old value, or choose another `output_dir`"):
        train(str(base), tmp_path / "out", steps, lora(), checkpoint=True, max_steps=3)
    caplog.clear()
    train(str(base), tmp_path / "out", steps, lora(), checkpoint=checkpoint, max_steps=3)
    assert [each.getMessage() for each in caplog.records if each.getMessage().startswith(message)]


# What is the same, or cannot be compared


def test_folders_that_have_moved_are_no_warning(adapter, base, said, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved, moved_base = (Path(shutil.move(each, tmp_path / "elsewhere" / each.name)) for each in (adapter, base))
    name_base(moved, moved_base)
    load_model(str(moved))
    assert said() == []


def test_a_base_model_saved_again_is_no_warning(adapter, base, said, tmp_path):
    load_model(str(base)).save_pretrained(tmp_path / "again")
    name_base(adapter, tmp_path / "again")
    load_model(str(adapter))
    assert said() == []


def test_a_merged_model_has_no_base_model(adapter, tmp_path):
    merge(MergeArguments(str(adapter), str(tmp_path / "merged")))
    assert not (tmp_path / "merged" / FILE_NAME).exists()


def test_an_adapter_that_peft_saved_says_nothing_of_its_base_model(adapter, replace, said, tmp_path):
    load_model(str(adapter)).save_pretrained(tmp_path / "again")
    replace()
    load_model(str(tmp_path / "again"))
    assert said() == []


def test_another_dtype_is_not_compared(adapter, replace, said):
    replace()
    load_model(str(adapter), dtype="bfloat16")
    assert said() == []


def test_a_base_model_in_4_bits_is_not_compared(adapter, replace, said):
    pytest.importorskip("bitsandbytes", reason="4-bit models need bitsandbytes")
    replace()
    load_model(str(adapter), dtype="float32", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert said() == []


@pytest.mark.parametrize(("commit", "is_another"), [("a" * 40, False), ("b" * 40, True), (None, True)])
def test_one_commit_on_the_hub_is_not_compared(commit, is_another, adapter, base, replace, said):
    path = adapter / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "revision": "a" * 40}))
    replace()
    model = load_model(str(base))
    model.config._commit_hash = commit
    base_model.warn_of_another_base(str(adapter), model)
    assert bool(said()) == is_another


def test_resized_embeddings_are_not_compared(adapter, base, said, steps, tmp_path):
    model = load_model(str(base))
    model.resize_token_embeddings(model.config.vocab_size + 8)
    train(model, tmp_path / "resized", steps, lora())
    assert (tmp_path / "resized" / FILE_NAME).is_file()
    load_model(str(tmp_path / "resized"))
    assert said() == []


# What is written


def test_the_file_identifies_the_base_model_and_holds_no_path(adapter, base):
    text = (adapter / FILE_NAME).read_text()
    assert json.loads(text) == {
        "model": "final",
        "revision": None,
        "dtype": "float32",
        "weights": weight_fingerprint(load_model(str(base))),
    }


def test_checkpoints_have_it_too(adapter):
    assert (adapter / "checkpoint-1" / FILE_NAME).read_text() == (adapter / FILE_NAME).read_text()


@pytest.mark.parametrize("is_loaded", [False, True])
def test_an_adapter_that_is_trained_further_has_that_of_its_base_model(is_loaded, adapter, base, steps, tmp_path):
    model = str(adapter)
    if is_loaded:
        model = PeftModel.from_pretrained(load_model(str(base)), model, is_trainable=True)
    train(model, tmp_path / "further", steps)
    assert (tmp_path / "further" / FILE_NAME).read_text() == (adapter / FILE_NAME).read_text()


def test_a_checksum_that_is_known_is_not_computed_again(base, amateur_path, prompts, tmp_path, monkeypatch):
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, beta=0)
    steps = ContrastiveStepSampler(str(base), amateur_path, args).sample(prompts)
    monkeypatch.setattr(base_model, "base_fingerprint", None)
    train(str(base), tmp_path / "out", steps, lora())
    weights = json.loads((tmp_path / "out" / FILE_NAME).read_text())["weights"]
    assert weights == weight_fingerprint(load_model(str(base)))


def test_a_model_without_an_adapter_has_none(base, steps, tmp_path):
    train(str(base), tmp_path / "out", steps)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / FILE_NAME).exists()


def test_that_of_an_earlier_adapter_does_not_stay(adapter):
    save_base(None, str(adapter))
    assert not (adapter / FILE_NAME).exists()
    save_base(None, str(adapter))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": "final"}'])
def test_a_damaged_file_is_refused(text, adapter):
    (adapter / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"The {FILE_NAME} of '{adapter}' cannot be read: .* or remove the file"):
        load_model(str(adapter))


# The checksum below an adapter

WITH_TOKENS = {"trainable_token_indices": [3, 4]}
SAVED = {"modules_to_save": ["lm_head", "embed_tokens"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": "all-linear"}, {"use_dora": True}, {"lora_bias": True}, SAVED, WITH_TOKENS],
    ids=["lora", "all", "dora", "bias", "saved", "tokens"],
)
def test_the_checksum_of_a_base_model_is_the_same_below_an_adapter(settings, is_tied, dtype, tokenizer):
    model = make_model(tokenizer, tie_word_embeddings=is_tied).to(dtype)
    before = weight_fingerprint(model)
    adapted = get_peft_model(model, lora(**settings))
    assert describe_base(adapted)["weights"] == base_fingerprint(adapted) == before
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert base_fingerprint(adapted) == before
    with torch.no_grad():
        adapted.get_base_model().model.norm.weight.add_(1)
    assert base_fingerprint(adapted) != before


@pytest.mark.parametrize(
    "peft_config",
    [
        lora(bias="all"),
        lora(init_lora_weights="pissa"),
        lora(layer_replication=[(0, 2), (1, 2)]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=["bias", "pissa", "replication", "ia3"],
)
def test_an_adapter_that_may_change_its_base_model_has_none(peft_config, expert):
    assert describe_base(get_peft_model(expert, peft_config)) is None


def test_weights_that_are_not_here_have_none(expert):
    model = get_peft_model(expert, lora())
    assert describe_base(model) is not None
    assert describe_base(model.to("meta")) is None


def test_only_the_main_process_computes(expert, monkeypatch):
    model = get_peft_model(expert, lora())
    monkeypatch.setattr(PartialState, "is_main_process", False)
    assert describe_base(model) is None


def test_quantized_weights_have_none(base):
    pytest.importorskip("bitsandbytes", reason="4-bit models need bitsandbytes")
    quantized = Qwen2ForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert describe_base(get_peft_model(quantized, lora())) is None
