"""On a CPU the step that a CUDA GPU replays is called instead; tests/test_cuda.py has what needs a GPU."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler
from trl_lightreasoner.generation import cuda_graphs
from trl_lightreasoner.generation.batches import even_batch_size, find_batch_size
from trl_lightreasoner.generation.cuda_graphs import generate_greedy_by_graph, why_no_graph
from trl_lightreasoner.generation.row_cache import bytes_of_row
from trl_lightreasoner.models.forward import has_full_attention, hidden_states_at
from trl_lightreasoner.vocabulary import Vocabulary, model_vocabulary

from ..conftest import make_model
from ..generation.test_greedy import LENGTHS, make_prompts, naive_greedy


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"num_key_value_heads": 1, "head_dim": 8}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "cohere": (CohereConfig, CohereForCausalLM, {"num_key_value_heads": 2, "logit_scale": 0.5}),
}


def make_family(name):
    config, model, settings = FAMILIES[name]
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return model(config(vocab_size=312, initializer_range=0.3, **shape, **tokens, **settings)).eval()


@pytest.fixture
def vocabulary(tokenizer, expert):
    return model_vocabulary(tokenizer, expert.config.vocab_size)


@pytest.fixture
def naive(expert, vocabulary):
    return [naive_greedy(expert, ids, vocabulary.ids.tolist(), [], 20) for ids in make_prompts()]


def complete(*args):
    return generate_greedy_by_graph(*args).completions


@pytest.mark.parametrize("max_new_tokens", [1, 2, 20])
@pytest.mark.parametrize("lengths", [[5], [3, 3], LENGTHS, [30, 1, 2, 15, 8, 8]])
def test_completions_equal_a_naive_loop(expert, vocabulary, lengths, max_new_tokens):
    prompts = make_prompts(lengths, seed=len(lengths))
    expected = [naive_greedy(expert, ids, vocabulary.ids.tolist(), [297], max_new_tokens) for ids in prompts]
    assert complete(expert, prompts, vocabulary, [297], max_new_tokens) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_other_families_decode_alike(name):
    model, vocabulary = make_family(name), Vocabulary(list(range(300)))
    expected = [naive_greedy(model, ids, vocabulary.ids.tolist(), [], 12) for ids in make_prompts()]
    assert has_full_attention(model)
    assert complete(model, make_prompts(), vocabulary, [], 12) == expected


@pytest.mark.parametrize("tokens", [1, 8, 30])
def test_prompts_are_read_a_few_at_a_time(expert, vocabulary, naive, tokens, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "PREFILL_TOKENS", tokens)
    assert complete(expert, make_prompts(), vocabulary, [], 20) == naive


@pytest.mark.parametrize("steps", [1, 2, 5, 32])
def test_any_eos_ends_a_completion_and_is_kept_once(expert, vocabulary, naive, steps, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", steps)
    eos_ids = [naive[1][2], naive[3][5], naive[2][0]]
    expected = []
    for ids in naive:
        end = min((ids.index(eos_id) for eos_id in eos_ids if eos_id in ids), default=19)
        expected.append(ids[: end + 1])
    assert len(set(map(len, expected))) > 2
    assert complete(expert, make_prompts(), vocabulary, eos_ids, 20) == expected


def test_rows_that_have_ended_leave_the_batch(expert, vocabulary, naive, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", 1)
    complete(expert, [[1]], vocabulary, [], 1)  # a first look at the model
    sizes = []
    expert.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    # Two rows end with their first token, the others go on
    ends = [ids[0] for ids in naive]
    others = {token_id for ids in naive for token_id in ids[1:]}
    ends = [end for end in ends if end not in others and ends.count(end) == 1][:2]
    assert len(ends) == 2
    complete(expert, make_prompts(), vocabulary, ends, 20)
    assert sizes == [4] + [2] * 19


def test_decoding_goes_little_further_than_the_last_eos(expert, vocabulary, naive, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", 2)
    complete(expert, [[1]], vocabulary, [], 1)  # a first look at the model
    calls = []
    expert.register_forward_hook(lambda *args: calls.append(1))
    completions = complete(expert, make_prompts(), vocabulary, [ids[3] for ids in naive], 20)
    assert max(map(len, completions)) <= len(calls) <= max(map(len, completions)) + 2


@pytest.mark.parametrize("ends", [False, True])
def test_hidden_states_are_those_of_a_pass_over_the_whole(expert, vocabulary, naive, ends, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", 2)
    eos_ids = [naive[1][2], naive[3][5]] if ends else []
    generated = generate_greedy_by_graph(expert, make_prompts(), vocabulary, eos_ids, 20)
    for prompt, completion, hidden_states in zip(make_prompts(), *generated, strict=True):
        positions = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
        with torch.no_grad():
            expected = hidden_states_at(expert, positions, torch.tensor([prompt + completion[:-1]]))
        assert hidden_states.shape == (len(completion), expert.config.hidden_size)
        torch.testing.assert_close(hidden_states, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_scales_its_logits_gives_no_hidden_states():
    model = make_family("cohere")
    assert generate_greedy_by_graph(model, make_prompts(), Vocabulary(list(range(300))), [], 3).hidden_states is None


@pytest.mark.parametrize("value", [1e4, float("inf"), float("nan")])
def test_padded_columns_are_never_chosen(expert, vocabulary, naive, value):
    with torch.no_grad():
        expert.lm_head.weight[300:] = value
    assert complete(expert, make_prompts(), vocabulary, [], 20) == naive


def test_a_column_between_tokens_that_no_token_owns_is_never_chosen(expert, naive):
    vocabulary = Vocabulary([i for i in range(300) if i != naive[2][0]])
    expected = [naive_greedy(expert, ids, vocabulary.ids.tolist(), [], 20) for ids in make_prompts()]
    assert complete(expert, make_prompts(), vocabulary, [], 20) == expected


def test_a_peft_model_decodes_with_its_adapter(expert, vocabulary, naive):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(expert, config).eval()
    expected = [naive_greedy(model, ids, vocabulary.ids.tolist(), [], 20) for ids in make_prompts()]
    assert expected != naive
    assert complete(model, make_prompts(), vocabulary, [], 20) == expected


def test_nothing_is_left_on_the_model(expert, vocabulary):
    before = len(expert.lm_head._forward_hooks)
    complete(expert, make_prompts(), vocabulary, [], 3)
    assert len(expert.lm_head._forward_hooks) == before


def test_a_model_on_a_cpu_does_not_decode_by_graph(expert):
    assert why_no_graph(expert) == "the expert is not on one CUDA GPU"


def test_attention_that_is_not_full_is_told():
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    assert not has_full_attention(MistralForCausalLM(config))


@pytest.mark.parametrize("implementation, full", [("sdpa", True), ("eager", False)])
def test_attention_that_reads_other_masks_is_told(tokenizer, implementation, full):
    assert has_full_attention(make_model(tokenizer, attn_implementation=implementation)) == full


# In the sampler


@pytest.fixture
def sample(expert_path, amateur_path, prompts, tmp_path):
    def run(name, **settings):
        args = ContrastiveSamplingConfig(str(tmp_path / name), max_new_tokens=12, beta=1.95, **settings)
        return ContrastiveStepSampler(expert_path, amateur_path, args).sample(prompts)

    return run


@pytest.fixture
def use_graphs(monkeypatch):
    monkeypatch.setattr("trl_lightreasoner.generation.completions.why_no_graph", lambda model: None)


def test_the_sampler_gives_the_same_by_graph(sample, steps, use_graphs):
    sampled = sample("graph")
    assert sum(map(len, sampled["step_positions"])) > 0
    for column in ("completion_ids", "step_positions", "label_ids"):
        assert sampled[column][:] == steps[column][:]
    for one, other in zip(sampled["label_probs"], steps["label_probs"], strict=True):
        assert [p for label in one for p in label] == pytest.approx([p for label in other for p in label], rel=1e-4)


def test_where_no_graph_can_be_captured_generate_goes_on(sample, steps, use_graphs, monkeypatch, caplog):
    calls = []

    def fail(*args):
        calls.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr("trl_lightreasoner.generation.completions.generate_greedy_by_graph", fail)
    sampled = sample("plain", per_device_batch_size=2)
    assert calls == [1]
    assert sampled["completion_ids"][:] == steps["completion_ids"][:]
    (message,) = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert message.endswith(
        "Completions are generated without CUDA graphs, which is slower: operation not permitted when stream is "
        "capturing."
    )


def test_a_batch_that_is_too_large_for_the_memory_is_halved_by_graph(sample, steps, use_graphs, monkeypatch):
    sizes = []

    def limited(model, prompt_ids, *args):
        sizes.append(len(prompt_ids))
        if len(prompt_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate_greedy_by_graph(model, prompt_ids, *args)

    monkeypatch.setattr("trl_lightreasoner.generation.completions.generate_greedy_by_graph", limited)
    sampled = sample("halved", per_device_batch_size=6)
    assert sizes == [6, 3, 2, 2, 2]
    assert sampled["completion_ids"][:] == steps["completion_ids"][:]


@pytest.mark.parametrize(
    "rows, most, count, expected",
    [
        (1000, 1024, 1, 1000),
        (1000, 512, 1, 500),
        (1000, 512, 2, 500),
        (1000, 1024, 2, 500),
        (9, 4, 2, 3),
        (1, 8, 4, 1),
    ],
)
def test_batches_are_of_one_size_so_that_no_process_waits_long(rows, most, count, expected):
    assert even_batch_size(rows, most, count) == expected <= most


def test_given_completions_are_scored_in_large_batches_on_a_gpu(monkeypatch, expert_path, amateur_path, tmp_path):
    args = ContrastiveSamplingConfig(str(tmp_path / "given"))
    sampler = ContrastiveStepSampler(expert_path, amateur_path, args)
    sampler._pair.expert = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr("trl_lightreasoner.generation.batches.rows_that_fit", lambda *args: 7)
    encoded = [{"prompt_ids": [1] * 5}]
    order = [(0, 12)] * 2000
    assert sampler._find_batch_size(encoded, order) == 1000
    sampler._decode = lambda *_: None  # whatever completes
    assert sampler._find_batch_size(encoded, order[:14]) == 7


@pytest.mark.parametrize("longest, most", [(None, 16), (10, 64), (200, 50), (500, 20), (1000, 16)])
def test_on_a_cpu_a_batch_takes_a_gibibyte(longest, most):
    config = Qwen3Config(hidden_size=2048, num_hidden_layers=24, num_key_value_heads=4, head_dim=128, vocab_size=1000)
    model = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"))
    assert find_batch_size(model, longest, 10**6, num_processes=1) == most


def test_heads_may_differ_from_layer_to_layer():
    layers = [SimpleNamespace(num_attention_heads=8, num_key_value_heads=heads, head_dim=4) for heads in (1, 2)]
    text = SimpleNamespace(is_heterogeneous=True, per_layer_config=layers, hidden_size=10, vocab_size=6)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text), dtype=torch.bfloat16)
    assert bytes_of_row(model, 100) == 2 * (2 * 100 * (1 + 2) * 4 + 10 * 100 + 2 * 6)


@pytest.mark.parametrize("way", ["by CUDA graphs", "by generate"])
def test_the_progress_bar_says_how_completions_are_made(sample, way, monkeypatch, capfd):
    if way == "by CUDA graphs":
        monkeypatch.setattr("trl_lightreasoner.generation.completions.why_no_graph", lambda model: None)
    sample("said")
    assert f"Sampling, {way}" in capfd.readouterr().err
