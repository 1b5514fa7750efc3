import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, BitsAndBytesConfig, Qwen2ForCausalLM

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
)
from trl_lightreasoner.models.provenance import differences

from ..conftest import make_model


NF4 = {"load_in_4bit": "True", "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
COMMIT = "a" * 40


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kwargs)


@pytest.fixture
def warnings_of(tmp_path, caplog):
    """What a trainer says about the expert of its dataset."""

    def run(model, dataset, peft_config=None, quantization_config=None, **kwargs) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            LightReasonerTrainer(
                model,
                LightReasonerConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", **kwargs),
                train_dataset=dataset,
                peft_config=peft_config,
                quantization_config=quantization_config,
            )
        return [record.message for record in caplog.records if record.name == "trl_lightreasoner.models.provenance"]

    return run


@pytest.fixture(scope="module")
def adapter_path(tmp_path_factory, expert_path) -> str:
    folder = str(tmp_path_factory.mktemp("adapter"))
    torch.manual_seed(3)
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(expert_path), lora(init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def sampled_as(dataset, label_expert="live", **expert):
    """The dataset as if the expert had been another."""

    def change(row):
        metadata = json.loads(row["sampling_metadata"])
        metadata["expert"].update(expert)
        metadata["settings"]["label_expert"] = label_expert
        return {"sampling_metadata": json.dumps(metadata)}

    return dataset.map(change)


# What differs


@pytest.mark.parametrize(
    ("sampled", "trained", "phrases"),
    [
        ({"model": "Qwen/A"}, {"model": "Qwen/B"}, [("as 'Qwen/A'", "as 'Qwen/B'")]),
        ({"model": "/old/A"}, {"model": "/new/B/"}, [("as '/old/A'", "as '/new/B/'")]),
        ({"revision": "one"}, {"revision": "two"}, [("at revision one", "at revision two")]),
        ({"adapter": "x/A"}, {"adapter": None}, [("with the adapter 'x/A'", "without an adapter")]),
        ({"adapter": ["default"]}, {"adapter": None}, [("with an adapter", "without an adapter")]),
        ({"adapter": None}, {"adapter": ["default"]}, [("without an adapter", "with an adapter")]),
        ({"adapter": "x/A"}, {"adapter": "x/B"}, [("with the adapter 'x/A'", "with the adapter 'x/B'")]),
        ({"quantization": NF4}, {"quantization": None}, [("in 4 bits (nf4)", "without quantization")]),
        ({"quantization": None}, {"quantization": NF4}, [("without quantization", "in 4 bits (nf4)")]),
        ({"quantization": NF4}, {"quantization": {"load_in_8bit": True}}, [("in 4 bits (nf4)", "in 8 bits")]),
        ({"quantization": NF4}, {"quantization": {"load_in_4bit": True}}, [("in 4 bits (nf4)", "in 4 bits (fp4)")]),
        (
            {"quantization": NF4},
            {"quantization": {**NF4, "bnb_4bit_use_double_quant": True}},
            [("in 4 bits (nf4)", "in 4 bits (nf4, nested)")],
        ),
        (
            {"quantization": None},
            {"quantization": {"quant_method": "QuantizationMethod.GPTQ"}},
            [("without quantization", "with quantization gptq")],
        ),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, [("in float32", "in bfloat16")]),
        ({"dtype": "bfloat16"}, {"dtype": "float16"}, [("in bfloat16", "in float16")]),
        ({"dtype": "float16"}, {"dtype": "bfloat16"}, [("in float16", "in bfloat16")]),
        (
            {"revision": "one", "dtype": "float32"},
            {"revision": "two", "dtype": "float16"},
            [("at revision one", "at revision two"), ("in float32", "in float16")],
        ),
        (
            {"model": "one/final", "weights": "1"},
            {"model": "two/final", "weights": "2"},
            [("as 'one/final'", "as 'two/final', which has other weights")],
        ),
        (
            {"adapter": "one/adapter", "weights": "1", "revision": COMMIT},
            {"adapter": "two/adapter", "weights": "2", "revision": COMMIT},
            [("as 'one/adapter'", "as 'two/adapter', which has other weights")],
        ),
    ],
)
def test_what_makes_another_function_is_named(sampled, trained, phrases):
    assert differences(sampled, trained) == phrases


@pytest.mark.parametrize(
    ("sampled", "trained"),
    [
        ({}, {}),
        ({"model": "/old/A"}, {"model": "/new/A"}),
        ({"model": "Qwen/A"}, {"model": "/models/A/"}),
        ({"model": "Qwen/A"}, {"model": "qwen/a"}),
        ({"model": "Qwen/A"}, {"model": r"C:\models\A"}),
        ({"model": "Qwen/A"}, {"model": f"/cache/models--Qwen--A/snapshots/{COMMIT}"}),
        ({"model": ""}, {"model": "/models/A"}),
        ({"model": "."}, {"model": "/models/A"}),
        ({"revision": COMMIT}, {"revision": None}),
        ({"adapter": "x/A"}, {"adapter": "y/A"}),
        ({"adapter": "x/A"}, {"adapter": ["default"]}),
        ({"quantization": NF4}, {"quantization": {**NF4, "bnb_4bit_compute_dtype": "float32"}}),
        ({"quantization": NF4}, {"quantization": {"quant_method": "bitsandbytes", **NF4, "load_in_4bit": True}}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"dtype": "float16"}, {"dtype": "float32"}),
        ({"dtype": "float8_e4m3fn"}, {"dtype": "float32"}),
        ({"weights": "1"}, {"weights": "1"}),
        ({"weights": "1"}, {}),
        ({"weights": "1", "dtype": "bfloat16"}, {"weights": "2", "dtype": "float32"}),
        ({"weights": "1", "revision": COMMIT}, {"weights": "2", "revision": COMMIT}),
        ({"weights": "1", "quantization": NF4}, {"weights": "2", "quantization": NF4}),
    ],
)
def test_what_makes_the_same_function_is_no_difference(sampled, trained):
    assert differences(sampled, trained) == []


# What the trainer says


def test_a_difference_is_one_sentence_with_both_values_and_why(warnings_of, expert_path, steps):
    assert warnings_of(expert_path, sampled_as(steps, quantization=NF4)) == [
        "The expert was sampled in 4 bits (nf4) and is trained without quantization. The labels come from a "
        "different pi_E than the start of training, so training also learns the difference between the two."
    ]


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("expert", "kwargs", "phrase"),
    [
        ({"model": "somewhere/else"}, {}, "sampled as 'somewhere/else' and is trained as '"),
        ({"adapter": "some/adapter"}, {}, "sampled with the adapter 'some/adapter' and is trained without an adapter"),
        ({"quantization": NF4}, {}, "sampled in 4 bits (nf4) and is trained without quantization"),
        ({}, {"model_init_kwargs": {"dtype": "bfloat16"}}, "sampled in float32 and is trained in bfloat16"),
    ],
)
def test_another_expert_is_a_warning(expert, kwargs, phrase, peft_config, warnings_of, expert_path, steps):
    (message,) = warnings_of(expert_path, sampled_as(steps, **expert), peft_config, **kwargs)
    assert phrase in message


def test_another_revision_is_a_warning(warnings_of, expert, steps):
    expert.config._commit_hash = COMMIT
    (message,) = warnings_of(expert, sampled_as(steps, revision="b" * 40))
    assert f"sampled at revision {'b' * 40} and is trained at revision {COMMIT}" in message


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_other_weights_under_the_same_name_are_a_warning(
    peft_config, warnings_of, expert, expert_path, steps, tmp_path
):
    with torch.no_grad():
        expert.get_input_embeddings().weight[3, 3] += 1
    path = str(tmp_path / Path(expert_path).name)
    expert.save_pretrained(path)
    AutoTokenizer.from_pretrained(expert_path).save_pretrained(path)
    (message,) = warnings_of(path, steps, peft_config)
    assert f"is trained as {path!r}, which has other weights. The labels come from a different pi_E" in message


def test_another_adapter_of_the_same_name_is_a_warning(
    warnings_of, adapter_path, amateur_path, prompts, tmp_path, expert
):
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, beta=0)
    dataset = ContrastiveStepSampler(adapter_path, amateur_path, args).sample(prompts)
    torch.manual_seed(4)
    path = str(tmp_path / Path(adapter_path).name)
    get_peft_model(expert, lora(init_lora_weights=False)).save_pretrained(path)
    (message,) = warnings_of(path, dataset)
    assert f"is trained as {path!r}, which has other weights" in message


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("as_path", [True, False])
def test_the_sampled_expert_is_no_warning(as_path, peft_config, warnings_of, expert, expert_path, steps):
    assert warnings_of(expert_path if as_path else expert, steps, peft_config) == []


def test_training_a_bfloat16_expert_in_float32_is_no_warning(warnings_of, expert_path, steps):
    assert warnings_of(expert_path, sampled_as(steps, dtype="bfloat16")) == []


def test_a_new_adapter_around_the_sampled_expert_is_no_warning(warnings_of, expert, steps):
    assert warnings_of(get_peft_model(expert, lora()), steps) == []


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_new_adapter_that_begins_with_a_share_of_the_weights_is_no_warning(init, warnings_of, expert, steps):
    assert warnings_of(get_peft_model(expert, lora(init_lora_weights=init)), steps) == []


@pytest.mark.parametrize("as_path", [True, False])
def test_a_trained_adapter_around_the_sampled_expert_is_a_warning(as_path, warnings_of, expert, adapter_path, steps):
    model = adapter_path if as_path else PeftModel.from_pretrained(expert, adapter_path, is_trainable=True)
    (message,) = warnings_of(model, steps)
    assert "sampled without an adapter and is trained with " in message


def test_a_later_round_trains_an_adapter_on_labels_of_its_base_model(warnings_of, adapter_path, steps):
    rounds = concatenate_datasets([steps, sampled_as(steps, "base", adapter="rounds/1/adapter")])
    assert warnings_of(adapter_path, rounds) == []
    assert len(warnings_of(adapter_path, sampled_as(rounds, "live"))) > 0
    (warning,) = warnings_of(adapter_path, sampled_as(steps, "base", model="another/model"))
    assert "sampled as 'another/model'" in warning


def test_the_sampled_adapter_is_no_warning(warnings_of, adapter_path, amateur_path, prompts, tmp_path):
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, beta=0)
    dataset = ContrastiveStepSampler(adapter_path, amateur_path, args).sample(prompts)
    assert warnings_of(adapter_path, dataset) == []


def test_every_expert_of_a_concatenated_dataset_is_compared_once(warnings_of, expert_path, steps):
    other = sampled_as(steps, model="some/other")
    another = sampled_as(steps, quantization=NF4)
    messages = warnings_of(expert_path, concatenate_datasets([steps, other, another, other]))
    assert len(messages) == 2
    assert "sampled as 'some/other'" in messages[0] and "sampled in 4 bits" in messages[1]


@pytest.mark.parametrize("text", [None, "", "text", "[]", "{}", '{"expert": "A"}', '{"settings": {}}'])
def test_metadata_of_another_kind_is_passed_over(text, warnings_of, expert_path, steps):
    column = [text] * len(steps)
    dataset = steps.remove_columns("sampling_metadata").add_column("sampling_metadata", column)
    assert warnings_of(expert_path, dataset) == []


def test_a_dataset_without_metadata_is_passed_over(warnings_of, expert_path, steps):
    assert warnings_of(expert_path, steps.remove_columns("sampling_metadata")) == []


def test_an_iterable_dataset_is_passed_over(warnings_of, expert_path, steps):
    dataset = sampled_as(steps, model="some/other").to_iterable_dataset()
    assert warnings_of(expert_path, dataset, max_steps=1) == []


@pytest.mark.parametrize("in_4_bits", [True, False])
def test_an_expert_sampled_in_4_bits_is_to_be_trained_in_4_bits(
    in_4_bits, warnings_of, tokenizer, amateur_path, prompts, tmp_path
):
    pytest.importorskip("bitsandbytes", reason="4-bit models need bitsandbytes")
    path = str(tmp_path / "expert")
    make_model(tokenizer, hidden_size=64).save_pretrained(path)
    tokenizer.save_pretrained(path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, beta=0)
    dataset = ContrastiveStepSampler(path, amateur_path, args, quantization_config=nf4).sample(prompts)
    messages = warnings_of(path, dataset, lora(), nf4 if in_4_bits else None)
    assert [message[:80] for message in messages] == (
        [] if in_4_bits else ["The expert was sampled in 4 bits (nf4) and is trained without quantization. The "]
    )
