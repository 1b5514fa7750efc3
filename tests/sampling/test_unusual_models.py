"""Models that do one thing differently, and are sampled as any other."""

import copy
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedModel,
)

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
    sampling_metadata,
)
from trl_lightreasoner.commands.merge import MergeArguments
from trl_lightreasoner.commands.merge import main as merge
from trl_lightreasoner.hub.cards import dataset_card
from trl_lightreasoner.models.loading import load_config, load_model, load_tokenizer

from ..conftest import TEMPLATE


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def sample(amateur_path, tmp_path):
    def run(expert, dataset, tokenizer=None, beta=0.0, folder="steps") -> Dataset:
        args = ContrastiveSamplingConfig(str(tmp_path / folder), max_new_tokens=6, beta=beta)
        return ContrastiveStepSampler(expert, amateur_path, args, tokenizer, tokenizer).sample(dataset)

    return run


@torch.no_grad()
def assert_sampled(steps: Dataset, expert: PreTrainedModel, amateur: PreTrainedModel, num_tokens: int) -> None:
    """Completions are the most probable tokens, and divergences those of the models' own logits."""
    for row in steps:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        of_expert, of_amateur = (
            model(ids, use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1, :num_tokens].log_softmax(-1)
            for model in (expert, amateur)
        )
        assert of_expert.argmax(-1).tolist() == row["completion_ids"]
        kl = (of_expert.exp() * (of_expert - of_amateur)).sum(-1)
        torch.testing.assert_close(kl, torch.tensor(row["kl_divergence"]), rtol=1e-3, atol=1e-4)


def test_a_mixture_of_experts_that_reports_its_routers(sample, amateur, prompts, tokenizer):
    torch.manual_seed(0)
    config = MixtralConfig(
        **SMALL, vocab_size=len(tokenizer) + 5, num_key_value_heads=1, num_local_experts=2, output_router_logits=True
    )
    expert = MixtralForCausalLM(config).eval()
    steps = sample(expert, prompts, tokenizer)
    assert expert.config.output_router_logits
    expert.config.output_router_logits = False
    assert_sampled(steps, expert, amateur, len(tokenizer))


def test_a_model_whose_decoder_is_its_head(sample, amateur, prompts, tokenizer):
    torch.manual_seed(0)
    expert = ModernBertDecoderForCausalLM(
        ModernBertDecoderConfig(**SMALL, vocab_size=len(tokenizer) + 5, pad_token_id=0)
    ).eval()
    assert isinstance(expert.get_decoder(), torch.nn.Linear)
    assert_sampled(sample(expert, prompts, tokenizer), expert, amateur, len(tokenizer))


def test_a_tokenizer_with_several_templates(sample, expert, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "What is 2+2?"}]]})
    expected = sample(expert, dataset, tokenizer, folder="one")
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ messages }}"}
    assert sample(expert, dataset, tokenizer)["prompt_ids"] == expected["prompt_ids"]


def test_a_tokenizer_with_a_token_that_has_no_embedding(sample, expert, amateur, prompts, tokenizer):
    """As Gemma 3 of 1B: what never occurs needs none."""
    tokenizer = copy.deepcopy(tokenizer)
    num_tokens, width = len(tokenizer), expert.config.vocab_size
    tokenizer.add_tokens([f"<{i}>" for i in range(width + 1 - num_tokens)])
    sampled = sample(expert, prompts, tokenizer)
    assert sampled["completion_ids"] and max(map(max, sampled["completion_ids"])) < width
    last = f"<{width - num_tokens}>"
    with pytest.raises(ValueError, match=f"^Row 1 has the token '{last}', whose id is {width}, and the expert has"):
        sample(expert, Dataset.from_dict({"prompt": ["2+2=", last]}), tokenizer)


@pytest.mark.parametrize(
    ("kwargs", "setting"),
    [
        ({"attn_implementation": "eager"}, "expert attention = 'sdpa', but it is now 'eager'"),
        ({"rms_norm_eps": 0.5}, "expert model_init_kwargs = {}, but it is now {'rms_norm_eps': 0.5}"),
        ({"device_map": "cpu", "local_files_only": True}, None),
    ],
    ids=["attention", "config", "place"],
)
def test_a_run_goes_on_only_with_a_model_that_is_loaded_alike(
    kwargs, setting, sample, expert_path, amateur_path, prompts, tmp_path
):
    expected = sample(expert_path, prompts)
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=6, beta=0.0, model_init_kwargs=kwargs)
    sampler = ContrastiveStepSampler(expert_path, amateur_path, args)
    if setting is None:
        assert sampler.sample(prompts).to_list() == expected.to_list()
    else:
        with pytest.raises(ValueError, match=f"was started with {re.escape(setting)}"):
            sampler.sample(prompts)


def test_what_decides_rows_in_half_precision_is_in_the_metadata_and_on_the_card(sample, expert_path, prompts):
    steps = sample(expert_path, prompts)
    metadata = sampling_metadata(steps)
    assert metadata["per_device_batch_size"] == len(steps)
    assert [metadata[role][key] for role in ("expert", "amateur") for key in ("attention", "device")] == [
        "sdpa",
        "cpu",
    ] * 2
    card = dataset_card({"train": steps}, "steps")
    assert "sdpa attention, on cpu" in card.text and "batch size" in card.text


@pytest.fixture
def resized_adapter(expert, expert_path, sample, prompts, tmp_path) -> str:
    """An adapter of a model that was given two more tokens than it has logits."""
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    tokenizer.add_tokens([f"<{i}>" for i in range(expert.config.vocab_size + 2 - len(tokenizer))])
    expert.resize_token_embeddings(len(tokenizer))
    steps = sample(expert, prompts, tokenizer, folder="resized")
    args = LightReasonerConfig(str(tmp_path / "adapter"), use_cpu=True, report_to="none", max_steps=1)
    peft_config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = LightReasonerTrainer(expert, args, None, steps, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    return str(tmp_path / "adapter")


def test_an_adapter_of_a_resized_model(resized_adapter, expert, sample, prompts, tmp_path):
    ids = torch.tensor([[5, 312, 313, 7]])
    merge(MergeArguments(resized_adapter, str(tmp_path / "merged")))
    for folder in (resized_adapter, str(tmp_path / "merged")):
        assert load_config(folder).vocab_size == len(load_tokenizer(folder)) == 314
        with torch.no_grad():
            assert torch.allclose(load_model(folder)(ids).logits, expert(ids).logits, atol=1e-4)
    assert len(sample(resized_adapter, prompts)) == len(prompts)
