from contextlib import nullcontext

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from trl_lightreasoner.sampling import branches
from trl_lightreasoner.sampling.branches import BranchedRows
from trl_lightreasoner.sampling.scoring import Trajectory


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES["initializer_range"] = 0.5  # so that each token counts
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
# Prompts, what follows, of which the last token is not read, and contexts that leave it early, late and at its end
ROWS = [Trajectory([5, 6, 7], [8, 9, 10, 11, 12, 0]), Trajectory([5, 9], [8, 9, 10, 0]), Trajectory([1, 2, 3, 4], [0])]
CONTEXTS = [
    (0, (8, 3)),
    (1, (7, 7, 7)),
    (0, (8, 9, 10, 11, 4, 5)),
    (2, (6,)),
    (0, (1,)),
    (1, (8, 9, 10, 33)),
    (0, (8, 9, 10, 11, 12, 13, 14)),
]


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))


def gemma(window):
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HEADS, sliding_window=window, layer_types=layers))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5))


@pytest.fixture
def tokens_read():
    """Tokens of each pass through a decoder."""
    read = []

    def watch(model):
        def count(module, args, kwargs):
            read.append(kwargs["input_ids"].shape if "input_ids" in kwargs else args[0].shape)

        model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
        return model

    watch.read = read
    return watch


def alone(model, row, context):
    return model(torch.tensor([[*ROWS[row].prompt_ids, *context]])).logits[0, -1]


@pytest.mark.parametrize("make", [llama, lambda: gemma(64), gpt2], ids=["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("most_tokens", [512, 4], ids=["one pack a row", "several packs a row"])
@torch.no_grad()
def test_branches_are_read_like_whole_contexts(make, most_tokens, monkeypatch, tokens_read):
    torch.manual_seed(0)
    model = tokens_read(make().eval())
    monkeypatch.setattr(branches, "_MOST_TOKENS", most_tokens)
    rows = BranchedRows(model, ROWS, nullcontext)
    for row, logits in zip(ROWS, rows.logits, strict=True):
        whole = model(torch.tensor([[*row.prompt_ids, *row.completion_ids[:-1]]])).logits[0, len(row.prompt_ids) - 1 :]
        torch.testing.assert_close(logits, whole)
    dict(rows.after(CONTEXTS))  # where it is found out how the model reads
    tokens_read.read.clear()
    found = dict(rows.after(CONTEXTS))
    assert max(length for _, length in tokens_read.read) <= min(most_tokens, 9)
    assert found.keys() == set(range(len(CONTEXTS)))
    for place, (row, context) in enumerate(CONTEXTS):
        torch.testing.assert_close(found[place], alone(model, row, context), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_distances_that_are_counted_along_the_mask_are_read_from_the_beginning():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = FalconForCausalLM(FalconConfig(**sizes, alibi=True, initializer_range=0.5)).eval()
    found = dict(BranchedRows(model, ROWS, nullcontext).after(CONTEXTS))
    for place, (row, context) in enumerate(CONTEXTS):
        torch.testing.assert_close(found[place], alone(model, row, context), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [5, 9], ids=["rows", "a branch"])
@torch.no_grad()
def test_what_is_longer_than_a_window_is_read_from_the_beginning(window):
    torch.manual_seed(0)
    model = gemma(window).eval()
    found = dict(BranchedRows(model, ROWS, nullcontext).after(CONTEXTS))
    for place, (row, context) in enumerate(CONTEXTS):
        torch.testing.assert_close(found[place], alone(model, row, context), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_that_reads_branches_otherwise_reads_whole_contexts(tokens_read):
    torch.manual_seed(0)
    model = llama().eval()

    def forget(module, args, kwargs):
        return args, {**kwargs, "position_ids": None} if kwargs.get("attention_mask") is not None else kwargs

    model.get_decoder().register_forward_pre_hook(forget, with_kwargs=True)
    model = tokens_read(model)
    found = dict(BranchedRows(model, ROWS, nullcontext).after(CONTEXTS))
    for place, (row, context) in enumerate(CONTEXTS):
        torch.testing.assert_close(found[place], alone(model, row, context), rtol=1e-4, atol=1e-5)
    assert not branches._READS_BRANCHES[model]
