"""A row of a batch gets what it gets alone, whatever padding or the longest row does to a model."""

import math
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    DataCollatorForLightReasoner,
    LightReasonerConfig,
    LightReasonerTrainer,
)
from trl_lightreasoner.evaluation import answering
from trl_lightreasoner.generation import greedy, vllm
from trl_lightreasoner.generation.completions import GreedyDecoder
from trl_lightreasoner.training.combinations import check_rope
from trl_lightreasoner.vocabulary import model_vocabulary

from .conftest import make_model


PROMPTS = ["Ann has 3 apples and buys 4.", "2+2?", "Ben had 17 coins, lost 5, found 9.", "A train", "x", "12 of"]
PROMPTS += ["Name a prime above 7.", "How far is that?"]
SWITCH, NEW_TOKENS = 16, 8  # some prompts are shorter, some longer, and some completions lead from here to there
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def make(kind: str, seed: int, tokenizer) -> torch.nn.Module:
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    common = {"vocab_size": len(tokenizer) + 4, **ids}
    torch.manual_seed(seed)
    if kind == "rwkv":
        model = RwkvForCausalLM(RwkvConfig(**SIZES, **common, attention_hidden_size=32, context_length=64))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2 and 1 not in parameter.shape:
                    parameter.normal_(std=0.3)
        return model.eval()
    if kind == "minimax":
        layers = {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "block_size": 8}
        config = MiniMaxConfig(**SIZES, **HEADS, **common, **layers, head_dim=8, initializer_range=0.3)
        return MiniMaxForCausalLM(config).eval()
    if kind == "bart":
        layers = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
        config = BartConfig(**common, **layers, max_position_embeddings=64, init_std=0.3, is_decoder=True)
        return BartForCausalLM(config).eval()
    if kind == "longrope":
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        config = Phi3Config(
            **SIZES,
            **HEADS,
            **common,
            initializer_range=0.3,
            original_max_position_embeddings=SWITCH,
            rope_parameters=rope,
        )
        return Phi3ForCausalLM(config).eval()
    return make_model(tokenizer, seed, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})


KINDS = ["rwkv", "minimax", "bart", "longrope", "dynamic"]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def logits_after(model, ids: list[int], count: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :count].double()


def complete(model, ids: list[int], tokenizer) -> list[int]:
    made: list[int] = []
    while len(made) < NEW_TOKENS and tokenizer.eos_token_id not in made:
        made.append(logits_after(model, ids + made, len(tokenizer)).argmax().item())
    return made


def sample(expert, amateur, tokenizer, folder, batch_size: int = 8) -> Dataset:
    settings = {"per_device_batch_size": batch_size, "max_new_tokens": NEW_TOKENS, "beta": 1e-4}
    args = ContrastiveSamplingConfig(str(folder), **settings)
    both = {"processing_class": tokenizer, "amateur_processing_class": tokenizer}
    return ContrastiveStepSampler(expert, amateur, args, **both).sample(Dataset.from_dict({"prompt": PROMPTS}))


def test_a_batch_is_sampled_as_a_context_at_a_time(kind, tokenizer, tmp_path):
    expert, amateur = make(kind, 0, tokenizer), make(kind, 1, tokenizer)
    for row in sample(expert, amateur, tokenizer, tmp_path):
        ids = row["prompt_ids"]
        assert row["completion_ids"] == complete(expert, ids, tokenizer)
        labels = dict(zip(row["step_positions"], zip(row["label_ids"], row["label_probs"], strict=True), strict=True))
        for t, kl in enumerate(row["kl_divergence"]):
            context = ids + row["completion_ids"][:t]
            logp, logq = (logits_after(each, context, len(tokenizer)).log_softmax(-1) for each in (expert, amateur))
            assert kl == pytest.approx((logp.exp() * (logp - logq)).sum().item(), rel=1e-3, abs=1e-5)
            if t not in labels:
                assert t == 0 or kl < 1e-4
                continue
            label = torch.where(logp >= logp.max() + math.log(0.2), logp - logq, -math.inf).softmax(-1)
            assert label[labels[t][0]].tolist() == pytest.approx(labels[t][1], abs=1e-3)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_an_update_has_the_gradient_of_a_context_at_a_time(kind, padding_side, tokenizer, tmp_path):
    expert = make(kind, 0, tokenizer)
    steps = sample(expert, make(kind, 1, tokenizer), tokenizer, tmp_path / "steps")
    args = LightReasonerConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False)
    trainer = LightReasonerTrainer(expert, args, train_dataset=steps, processing_class=tokenizer)
    batch = DataCollatorForLightReasoner(padding_side=padding_side)(list(steps))
    expert.eval()  # as dropout is off, too
    loss = trainer.compute_loss(expert, dict(batch))
    loss.backward()
    gradient = torch.cat([each.grad.flatten() for each in expert.parameters() if each.grad is not None])
    expert.zero_grad()
    losses = []
    for row in steps:
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            context = torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])
            logq = expert(input_ids=context, use_cache=False).logits[0, -1, : len(tokenizer)].log_softmax(-1)[ids]
            label = torch.tensor(probs)
            losses.append((torch.special.xlogy(label, label) - label * logq).sum())
    expected = torch.stack(losses).mean()
    expected.backward()
    naive = torch.cat([each.grad.flatten() for each in expert.parameters() if each.grad is not None])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, naive, rtol=1e-3, atol=1e-4 * naive.abs().max().item())


def test_questions_are_answered_as_a_context_at_a_time(kind, tokenizer, monkeypatch):
    monkeypatch.setattr(answering, "TOKENS_A_PIECE", 3)
    model = make(kind, 0, tokenizer)
    eos_ids = [tokenizer.eos_token_id]
    decode = GreedyDecoder(model, model_vocabulary(tokenizer, model.config.vocab_size), eos_ids)
    prompt_ids = tokenizer(PROMPTS)["input_ids"]
    answers = answering.Answering(model, decode, tokenizer, eos_ids, is_raw=False, batch_size=8)
    completions, _ = answers.complete(prompt_ids, [NEW_TOKENS] * len(prompt_ids))
    assert completions == [complete(model, ids, tokenizer) for ids in prompt_ids]


@pytest.mark.parametrize("kind, num_calls", [("dynamic", 1), ("rwkv", len(PROMPTS))])
def test_only_what_padding_changes_is_completed_by_length(kind, num_calls, tokenizer, monkeypatch, caplog):
    model = make(kind, 0, tokenizer)
    decode = GreedyDecoder(model, model_vocabulary(tokenizer, model.config.vocab_size), [])
    prompt_ids = [list(range(5, 10 + i)) for i in range(len(PROMPTS))]
    decode(prompt_ids, 1)
    sizes, generate = [], greedy._generate
    monkeypatch.setattr(greedy, "_generate", lambda *args: sizes.append(len(args[1])) or generate(*args))
    decode(prompt_ids, 4)
    assert len(sizes) == num_calls
    assert ("The predictions of `RwkvForCausalLM` depend on other rows of a batch" in caplog.text) == (kind == "rwkv")


def test_rows_beyond_the_switch_of_the_rope_are_refused_in_several_processes():
    class Args:
        world_size, max_length = 2, None

    rows = Dataset.from_list([{"prompt_ids": [1] * 10, "step_positions": [0, 7]}])
    check_rope(Args, 17, rows, None)
    with pytest.raises(ValueError, match="beyond 16 tokens with another rope .* Set `max_length=16`"):
        check_rope(Args, 16, rows, None)
    Args.max_length = 16
    check_rope(Args, 16, rows, None)


@pytest.mark.parametrize(
    "mode, max_length, is_refused", [("colocate", 16, False), ("colocate", 17, True), ("server", 9, True)]
)
def test_vllm_is_refused_where_it_would_read_with_another_rope(
    mode, max_length, is_refused, tokenizer, tmp_path, monkeypatch
):
    make("longrope", 0, tokenizer).save_pretrained(tmp_path)
    monkeypatch.setattr(vllm, "ColocatedVLLM", lambda *args, **kwargs: None)
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), use_vllm=True, vllm_mode=mode)
    expected = pytest.raises(ValueError, match="beyond 16 tokens with another rope") if is_refused else nullcontext()
    with expected:
        vllm.connect_vllm(args, str(tmp_path), max_length)


def test_a_model_that_reads_ahead_is_refused_by_the_trainer(tokenizer, steps, tmp_path, monkeypatch):
    model = make_model(tokenizer)
    forward = model.forward
    # What stands at the last token has a say in every logit
    monkeypatch.setattr(model, "forward", lambda input_ids, **kwargs: ahead(forward(input_ids, **kwargs), input_ids))
    with pytest.raises(ValueError, match="The logits of the model .* depend on later tokens"):
        args = LightReasonerConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
        LightReasonerTrainer(model, args, train_dataset=steps, processing_class=tokenizer)


def ahead(outputs, input_ids: torch.Tensor):
    outputs.logits = outputs.logits.roll(1, dims=-1) * (1 + input_ids[:, -1:, None] % 7)
    return outputs
