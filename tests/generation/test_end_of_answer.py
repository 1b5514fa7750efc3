"""One rule for the tokens that end an answer: in sampling, in evaluation, and in whatever is saved."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

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
from trl_lightreasoner.generation.greedy import find_eos_ids
from trl_lightreasoner.models.loading import load_model
from trl_lightreasoner.steps.prompts import end_of_turn

from ..conftest import TEMPLATE


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
IM_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


def change(path: Path, **changes) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def qwen_math(tmp_path, expert_path, tokenizer) -> str:
    """As Qwen2.5-Math has it: the tokenizer ends by one token, and the generation_config by another."""
    folder = Path(shutil.copytree(expert_path, tmp_path / "expert"))
    for file in ("config.json", "generation_config.json"):
        change(folder / file, eos_token_id=tokenizer.pad_token_id)
    return str(folder)


def eos_tokens(folder) -> set[str]:
    """What a folder says that `generate` is to stop at."""
    ids = GenerationConfig.from_pretrained(folder).eos_token_id
    return set(AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids if isinstance(ids, list) else [ids]))


@pytest.mark.parametrize("as_path", [True, False])
@pytest.mark.parametrize(
    ("eos", "generation_config", "config", "template", "expected"),
    [
        (IM_END, END_OF_TEXT, None, None, {IM_END, END_OF_TEXT}),
        (END_OF_TEXT, END_OF_TEXT, END_OF_TEXT, TEMPLATE, {IM_END, END_OF_TEXT}),
        (None, None, END_OF_TEXT, None, {END_OF_TEXT}),
        (None, [IM_END, "a"], END_OF_TEXT, None, {IM_END, "a"}),
        (None, None, None, None, set()),
    ],
    ids=["two files", "a base model with a template", "config alone", "several", "none"],
)
def test_every_token_that_a_checkpoint_ends_by_ends_an_answer(
    eos, generation_config, config, template, expected, as_path, qwen_math, tokenizer
):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    for file, tokens in {"generation_config.json": generation_config, "config.json": config}.items():
        ids = None if tokens is None else tokenizer.convert_tokens_to_ids(tokens)
        change(Path(qwen_math, file), eos_token_id=ids)
    ids = find_eos_ids(qwen_math if as_path else load_model(qwen_math), tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(ids)) == expected


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (TEMPLATE, IM_END),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n<|endoftext|>{% endfor %}", END_OF_TEXT),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", None),
        ("{{ raise_exception('No.') }}", None),
        ({"default": TEMPLATE, "tool_use": "{{ messages }}"}, IM_END),
        ({"tool_use": TEMPLATE}, None),
        (None, None),
    ],
    ids=["token", "behind a line", "text", "refuses", "several", "no default", "none"],
)
def test_the_end_of_turn_is_the_special_token_behind_an_assistants_message(template, token, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    assert (
        tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == token if token else end_of_turn(tokenizer) is None
    )


@torch.no_grad()
def write_in_a_ring(model: PreTrainedModel, ids: list[int]) -> None:
    """Let a model write each of these tokens behind the one before it, and the first behind the last."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for token, following in zip(ids, [*ids[1:], ids[0]], strict=True):
        model.lm_head.weight[following] = 9 * model.model.norm(model.model.embed_tokens.weight[token])


def test_a_base_model_that_is_asked_by_a_template_ends_with_its_turn(expert, amateur_path, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token, expert.generation_config.eos_token_id = END_OF_TEXT, tokenizer.pad_token_id
    # With the next turn it begins the answer anew
    write_in_a_ring(expert, tokenizer("\nYes.<|im_end|>")["input_ids"])
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=30, beta=0.0)
    question = {"role": "user", "content": "Why?"}
    sampler = ContrastiveStepSampler(expert, amateur_path, args, tokenizer, tokenizer)
    steps = sampler.sample(Dataset.from_dict({"prompt": [[question]]}))
    assert tokenizer.decode(steps["completion_ids"][0]) == "Yes.<|im_end|>"
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "Why?", "answer": "#### 4"}))
    args = EvaluationConfig(
        str(tmp_path / "evaluation"), benchmarks=["gsm8k"], data_dir=str(tmp_path), prompt_style="chat"
    )
    results = evaluate(expert, args, processing_class=tokenizer).results
    assert results["benchmarks"]["gsm8k"]["model"]["mean_tokens"] == len(steps["completion_ids"][0])
    assert set(results["model"]["eos_tokens"]) == {IM_END, END_OF_TEXT}
    assert results["model"]["chat_template"] == TEMPLATE


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_what_is_saved_ends_as_what_was_sampled(peft_config, qwen_math, steps, tmp_path):
    args = LightReasonerConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=1, save_steps=1)
    trainer = LightReasonerTrainer(qwen_math, args, train_dataset=steps, peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    assert eos_tokens(tmp_path / "out") == eos_tokens(tmp_path / "out" / "checkpoint-1") == {IM_END, END_OF_TEXT}


def test_what_is_merged_ends_as_the_adapter(qwen_math, steps, tmp_path):
    args = LightReasonerConfig(str(tmp_path / "adapter"), use_cpu=True, report_to="none")
    expert = AutoModelForCausalLM.from_pretrained(qwen_math)
    expert.generation_config.eos_token_id = 5  # which the file of the base model does not know
    trainer = LightReasonerTrainer(expert, args, train_dataset=steps, peft_config=LORA)
    trainer.save_model()
    expected = {5, *trainer.processing_class.convert_tokens_to_ids([IM_END])}
    merge(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "model")))
    for folder in ("adapter", "model"):
        assert set(GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id) == expected
        for model in (str(tmp_path / folder), load_model(str(tmp_path / folder))):
            assert set(find_eos_ids(model, trainer.processing_class)) == expected


def test_a_merged_base_model_keeps_a_generation_config_that_transformers_would_not_save(qwen_math, steps, tmp_path):
    change(Path(qwen_math, "generation_config.json"), do_sample=False, temperature=0.9)
    args = LightReasonerConfig(str(tmp_path / "adapter"), use_cpu=True, report_to="none")
    LightReasonerTrainer(qwen_math, args, train_dataset=steps, peft_config=LORA).save_model()
    merge(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "model")))
    assert GenerationConfig.from_pretrained(tmp_path / "model").temperature == 0.9
    assert eos_tokens(tmp_path / "model") == {IM_END, END_OF_TEXT}
