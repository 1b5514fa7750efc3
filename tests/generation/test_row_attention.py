"""Attention by length, on a CPU with a naive kernel in the place of PyTorch's, which runs on a CUDA GPU only."""

import pytest
import torch

from trl_lightreasoner.generation import cuda_graphs, row_attention
from trl_lightreasoner.generation.cuda_graphs import complete_in_slots, generate_greedy_by_graph, why_by_mask
from trl_lightreasoner.generation.row_attention import row_attention_forward, row_bounds, why_no_row_attention
from trl_lightreasoner.vocabulary import Vocabulary

from .test_cuda_graphs import FAMILIES, make_family
from .test_greedy import make_prompts, naive_greedy


VOCABULARY = Vocabulary(list(range(300)))


def naive_kernel(queries, keys, values, query_starts, key_starts, longest_query, longest_key, lengths, scale):
    """As PyTorch's kernel checks its arguments, row by row and head by head."""
    count, heads, width = queries.shape
    for bounds in (query_starts, key_starts, lengths):
        assert bounds.dtype == torch.int32 and bounds.is_contiguous()
    assert len(query_starts) == len(key_starts) == count + 1 and len(lengths) == count
    assert longest_query == 1 and query_starts.tolist() == list(range(count + 1))
    assert keys.shape == values.shape == (count * longest_key, keys.shape[1], width)
    assert {each.stride(-1) for each in (queries, keys, values)} == {1}
    assert queries.dtype == keys.dtype == values.dtype
    made = torch.empty_like(queries)
    for row, head in ((row, head) for row in range(count) for head in range(heads)):
        used = slice(key_starts[row], key_starts[row] + lengths[row])
        shared = head // (heads // keys.shape[1])
        scores = keys[used, shared] @ queries[row, head] * (scale or width**-0.5)
        made[row, head] = scores.softmax(0) @ values[used, shared]
    return made


def reads_to_the_end(*args):
    *rest, longest_key, lengths, scale = args
    return naive_kernel(*rest, longest_key, torch.full_like(lengths, longest_key), scale)


@pytest.fixture
def kernel(monkeypatch):
    def use(function):
        def counted(*args):
            calls.append(args)
            return function(*args)

        monkeypatch.setattr(cuda_graphs, "why_no_row_attention", lambda keys, values: None)
        monkeypatch.setattr(row_attention, "flash_attention", counted)
        return calls

    calls = []
    return use


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_decodes_by_length_as_a_naive_loop(name, kernel):
    model, calls = make_family(name), kernel(naive_kernel)
    expected = [naive_greedy(model, ids, VOCABULARY.ids.tolist(), [], 12) for ids in make_prompts()]
    assert generate_greedy_by_graph(model, make_prompts(), VOCABULARY, [], 12).completions == expected
    assert why_by_mask(model) is None
    assert len(calls) == model.config.num_hidden_layers * (1 + 11)  # a test, and each step
    assert model.config._attn_implementation == "sdpa"


def test_slots_are_read_by_length(kernel):
    model, calls = make_family("llama"), kernel(naive_kernel)
    prompts, rooms = make_prompts([9, 2, 14, 5, 1]), [3, 12, 7, 1, 9]
    expected = [
        naive_greedy(model, ids, VOCABULARY.ids.tolist(), [], room) for ids, room in zip(prompts, rooms, strict=True)
    ]
    completions = [[] for _ in prompts]
    complete_in_slots(model, prompts, rooms, VOCABULARY, [], 2, completions)
    assert completions == expected and why_by_mask(model) is None
    assert calls and {args[-3] for args in calls} == {32}  # columns: 14 + 7, in sixteens


def test_a_row_that_has_ended_is_read_no_more(kernel, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", 32)
    model, lengths = make_family("llama"), []
    kernel(lambda *args: lengths.append(args[-2].tolist()) or naive_kernel(*args))
    completions = [[], [], []]
    complete_in_slots(model, make_prompts([8, 6, 4]), [2, 9, 9], VOCABULARY, [], 3, completions)
    by_step = lengths[model.config.num_hidden_layers :: model.config.num_hidden_layers]
    assert by_step == [[9, 7, 5]] + [[1, 7 + i, 5 + i] for i in range(1, 8)]


@pytest.mark.parametrize("room", [2, 12])
def test_a_kernel_that_reads_further_is_not_used(room, kernel):
    model, calls = make_family("llama"), kernel(reads_to_the_end)
    expected = [naive_greedy(model, ids, VOCABULARY.ids.tolist(), [], room) for ids in make_prompts()]
    for _ in range(2):
        assert generate_greedy_by_graph(model, make_prompts(), VOCABULARY, [], room).completions == expected
    assert why_by_mask(model) == "the logits differ from those under a mask"
    assert len(calls) == model.config.num_hidden_layers  # it is tested once


def test_what_lies_beyond_a_row_would_show_in_the_test(kernel):
    model, calls = make_family("llama"), kernel(naive_kernel)
    generate_greedy_by_graph(model, make_prompts([30, 9]), VOCABULARY, [], 2)
    values, lengths = calls[0][2].unflatten(0, (2, 32)), calls[0][-2]
    assert all((rows[length:] == 1e4).all() for rows, length in zip(values, lengths.tolist(), strict=True))


def test_a_kernel_that_fails_is_not_used(kernel):
    def fail(*args):
        raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.\nand so on")

    model, _ = make_family("llama"), kernel(fail)
    expected = [naive_greedy(model, ids, VOCABULARY.ids.tolist(), [], 5) for ids in make_prompts()]
    assert generate_greedy_by_graph(model, make_prompts(), VOCABULARY, [], 5).completions == expected
    assert why_by_mask(model) == "USE_FLASH_ATTENTION was not enabled for build."
    assert model.config._attn_implementation == "sdpa"


def test_memory_that_runs_out_in_the_test_is_no_verdict(kernel):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model, _ = make_family("llama"), kernel(fail)
    with pytest.raises(torch.OutOfMemoryError):
        generate_greedy_by_graph(model, make_prompts(), VOCABULARY, [], 5)
    kernel(naive_kernel)
    generate_greedy_by_graph(model, make_prompts(), VOCABULARY, [], 5)
    assert why_by_mask(model) is None


@pytest.mark.parametrize("name", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_a_layer_that_asks_for_more_is_refused(name):
    states = torch.zeros(2, 1, 1, 8)
    bounds = row_bounds(2, 1, states.device)
    with pytest.raises(ValueError, match=f"attention by length has no `{name}`"):
        row_attention_forward(None, states, states, states, bounds, **{name: 4})


@pytest.mark.parametrize("heads, groups", [(2, 3), (4, 1)])
def test_a_layer_attends_as_the_scaled_dot_product_does(heads, groups, kernel):
    kernel(naive_kernel)
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 16, heads, 8)
    query = torch.randn(3, heads * groups, 1, 8)
    bounds, lengths = row_bounds(3, 16, query.device), torch.tensor([1, 16, 5])
    bounds[0, 0, 0, :-1] = lengths
    views = [states.transpose(1, 2) for states in (keys, values)]
    made, _ = row_attention_forward(None, query, *views, bounds, scaling=0.3)
    mask = (torch.arange(16) < lengths[:, None])[:, None, None]
    repeated = [states.repeat_interleave(groups, 1) for states in views]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, mask, scale=0.3)
    torch.testing.assert_close(made, expected.transpose(1, 2))


def test_buffers_on_a_cpu_are_not_read_by_length():
    keys = torch.zeros(1, 16, 2, 8, dtype=torch.bfloat16)
    assert why_no_row_attention(keys, keys) == "it needs a CUDA GPU from Ampere on"
