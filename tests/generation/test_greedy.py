import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Qwen2ForCausalLM

from trl_lightreasoner.contrast import NonFiniteLogitsError
from trl_lightreasoner.generation.completions import GreedyDecoder
from trl_lightreasoner.generation.cuda_graphs import complete_in_slots, generate_greedy_by_graph
from trl_lightreasoner.generation.greedy import (
    OnlyTokens,
    find_eos_ids,
    generate_by_passes,
    generate_greedy,
    is_broken,
    rows_alike,
)
from trl_lightreasoner.models.loading import load_model
from trl_lightreasoner.vocabulary import Vocabulary, model_vocabulary

from ..conftest import make_model


LENGTHS = [1, 4, 17, 9]


def make_prompts(lengths=LENGTHS, seed=0):
    torch.manual_seed(seed)
    return [torch.randint(297, (length,)).tolist() for length in lengths]


@torch.no_grad()
def naive_greedy(model, prompt_ids, allowed, eos_ids, max_new_tokens):
    """One prompt, one full forward pass a token, no cache, no `generate`."""
    completion = []
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([prompt_ids + completion])).logits[0, -1].tolist()
        best = max(allowed, key=lambda token_id: logits[token_id])
        completion.append(best)
        if best in eos_ids:
            break
    return completion


@pytest.fixture
def vocabulary(tokenizer, expert):
    return model_vocabulary(tokenizer, expert.config.vocab_size)


@pytest.fixture
def naive(expert, vocabulary):
    """What the expert says to each prompt in ten tokens without EOS."""
    return [naive_greedy(expert, ids, vocabulary.ids.tolist(), [], 10) for ids in make_prompts()]


@pytest.mark.parametrize("lengths", [[5], [3, 3], LENGTHS, [30, 1, 2, 15, 8, 8]])
def test_generation_equals_a_naive_loop(expert, vocabulary, lengths):
    prompts = make_prompts(lengths, seed=len(lengths))
    expected = [naive_greedy(expert, ids, vocabulary.ids.tolist(), [297], 12) for ids in prompts]
    assert generate_greedy(expert, prompts, vocabulary, [297], 12) == expected


def test_generation_does_not_depend_on_the_batch(expert, vocabulary, naive):
    alone = [generate_greedy(expert, [ids], vocabulary, [], 10)[0] for ids in make_prompts()]
    assert alone == naive
    assert generate_greedy(expert, make_prompts()[::-1], vocabulary, [], 10) == naive[::-1]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 10])
def test_max_new_tokens_is_the_longest_completion(expert, vocabulary, naive, max_new_tokens):
    completions = generate_greedy(expert, make_prompts(), vocabulary, [], max_new_tokens)
    assert completions == [ids[:max_new_tokens] for ids in naive]


def complete_in_two_slots(model, prompt_ids, vocabulary, eos_ids, max_new_tokens):
    completions = [[] for _ in prompt_ids]
    complete_in_slots(model, prompt_ids, [max_new_tokens] * len(prompt_ids), vocabulary, eos_ids, 2, completions)
    return completions


@pytest.mark.parametrize(
    "complete",
    [generate_greedy, generate_by_passes, lambda *args: generate_greedy_by_graph(*args).completions]
    + [complete_in_two_slots],
    ids=["generate", "passes", "graph", "slots"],
)
def test_no_token_is_chosen_from_logits_that_are_not_finite(expert, vocabulary, naive, complete):
    # Behind this token, which some answers come to, the logits are NaN
    token, prompts = naive[0][3], make_prompts()
    first = min(ids.index(token) for ids in naive if token in ids)
    assert first == 3 and not any(token in ids for ids in prompts)
    with torch.no_grad():
        expert.get_input_embeddings().weight[token] = math.nan
    assert complete(expert, prompts, vocabulary, [], first + 1) == [ids[: first + 1] for ids in naive]
    ended = [ids[: ids.index(token) + 1] if token in ids else ids for ids in naive]
    assert complete(expert, prompts, vocabulary, [token], 10) == ended  # nothing is read behind the end
    with pytest.raises(NonFiniteLogitsError, match="The model's logits at .* of an answer are not finite. Load the"):
        complete(expert, prompts, vocabulary, [], first + 2)


def test_the_first_context_with_broken_logits_is_noted_for_each_row(vocabulary):
    only_tokens = OnlyTokens(vocabulary, 320)
    for length, broken in ((5, []), (6, [1]), (7, [0, 1]), (8, [])):
        scores = torch.zeros(3, 320)
        scores[broken, 7] = math.nan
        only_tokens(torch.zeros(3, length, dtype=torch.long), scores)
    assert only_tokens.broken_at.tolist() == [7, 6, torch.iinfo(torch.long).max]


def test_no_way_of_generating_is_chosen_by_logits_that_are_not_finite(expert, vocabulary):
    ids = make_prompts()[2]
    with torch.no_grad():
        expert.get_input_embeddings().weight[ids[0]] = math.nan
    with pytest.raises(NonFiniteLogitsError, match="The model's logits at the first tokens of an answer are not"):
        rows_alike(expert, ids, vocabulary)


def test_vllm_does_not_answer_for_a_model_whose_logits_are_not_finite(expert, vocabulary, naive):
    prompts = make_prompts()
    answers = [naive, naive]
    decode = GreedyDecoder(expert, vocabulary, [], vllm=lambda *args: answers.pop())
    assert decode(prompts, 10).completions == naive
    with torch.no_grad():
        expert.get_input_embeddings().weight[prompts[0][0]] = math.nan
    with pytest.raises(NonFiniteLogitsError, match="The model's logits at the first token of an answer are not"):
        GreedyDecoder(expert, vocabulary, [], vllm=lambda *args: answers.pop())(prompts, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([1.0, 2.0], False),
        ([-math.inf, 2.0], False),  # a token that is never chosen
        ([math.nan, 2.0], True),
        ([math.inf, 2.0], True),
        ([-math.inf, -math.inf], True),
    ],
)
def test_logits_are_broken_if_none_is_the_highest(logits, expected, dtype):
    both = torch.tensor([logits, [0.0, 1.0]], dtype=dtype)
    assert is_broken(both).tolist() == [expected, False]


HOSTILE = {
    "temperature": {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "suppress_tokens": {"suppress_tokens": "first tokens"},
    "begin_suppress_tokens": {"begin_suppress_tokens": "first tokens"},
    "bad_words_ids": {"bad_words_ids": "first words"},
    "sequence_bias": {"sequence_bias": [[[7], 50.0]]},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "min_new_tokens": {"min_new_tokens": 10},
    "min_length": {"min_length": 100},
    "max_length": {"max_length": 3},
    "stop_strings": {"stop_strings": ["a", "e"]},
    "num_beams": {"num_beams": 4, "length_penalty": 5.0, "num_return_sequences": 2},
    "guidance_scale": {"guidance_scale": 3.0},
    "use_cache": {"use_cache": False},
    "return_dict": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("settings", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_generation_config_changes_nothing(expert, vocabulary, naive, settings):
    # The second token of the first answer is an EOS, so that settings on lengths have something to change
    eos_id = naive[0][1]
    expected = [ids[: ids.index(eos_id) + 1] if eos_id in ids else ids for ids in naive]
    chosen = {
        "first tokens": [ids[0] for ids in naive],
        "first words": [[ids[0]] for ids in naive],
    }
    settings = {
        name: chosen.get(value, value) if isinstance(value, str) else value for name, value in settings.items()
    }
    for name, value in settings.items():
        setattr(expert.generation_config, name, value)
    own, before = expert.generation_config, copy.deepcopy(expert.generation_config.to_dict())
    assert generate_greedy(expert, make_prompts(), vocabulary, [eos_id], 10) == expected
    assert expert.generation_config is own
    assert own.to_dict() == before


def test_the_hostile_settings_would_change_the_answer(expert, vocabulary, naive):
    # Else the test above could not fail
    expert.generation_config.repetition_penalty = 5.0
    output = expert.generate(torch.tensor([make_prompts()[2]]), max_new_tokens=10, eos_token_id=None)
    assert output[0, LENGTHS[2] :].tolist() != naive[2]


def test_the_generation_config_is_restored_after_an_error(expert, vocabulary, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the device is gone")

    own = expert.generation_config
    monkeypatch.setattr(expert, "forward", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        generate_greedy(expert, make_prompts(), vocabulary, [297], 4)
    assert expert.generation_config is own


@pytest.mark.parametrize("named, expected", [(5, [5, 297]), ([5, 9], [5, 9, 297]), (297, [297]), (None, [297])])
def test_eos_is_the_tokenizers_and_the_models(expert, tokenizer, named, expected):
    expert.generation_config.eos_token_id = named
    assert find_eos_ids(expert, tokenizer) == expected


@pytest.mark.parametrize("named, expected", [(None, []), (5, [5]), ([9, 5], [5, 9])])
def test_a_tokenizer_without_eos_leaves_the_models(expert, tokenizer, named, expected):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.chat_template = expert.config.eos_token_id = None
    expert.generation_config.eos_token_id = named
    assert find_eos_ids(expert, tokenizer) == expected


def test_eos_of_a_model_that_cannot_generate_is_the_tokenizers(expert, tokenizer):
    expert.generation_config = None
    assert find_eos_ids(expert, tokenizer) == [297]


@pytest.mark.parametrize("stored", [[5, 9], 7, None])
@pytest.mark.parametrize("as_adapter", [False, True])
def test_eos_of_a_path_is_that_of_the_loaded_model(expert, tokenizer, stored, as_adapter, tmp_path):
    folder = tmp_path / "model"
    expert.config.eos_token_id = 11
    expert.generation_config.eos_token_id = stored
    expert.save_pretrained(folder)
    if stored is None:  # then it is the config that counts
        (folder / "generation_config.json").unlink()
    if as_adapter:
        expert = Qwen2ForCausalLM.from_pretrained(folder)
        folder = tmp_path / "adapter"
        get_peft_model(expert, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    expected = find_eos_ids(load_model(str(folder)), tokenizer)
    assert len(expected) > 1
    assert find_eos_ids(str(folder), tokenizer) == expected


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_eos_ends_a_completion_and_is_kept_once(expert, vocabulary, naive, count):
    eos_ids = [naive[1][2], naive[3][5], naive[2][0]][:count]
    expected = []
    for ids in naive:
        end = min((ids.index(eos_id) for eos_id in eos_ids if eos_id in ids), default=9)
        expected.append(ids[: end + 1])
    assert len(set(map(len, expected))) > 1
    assert generate_greedy(expert, make_prompts(), vocabulary, eos_ids, 10) == expected


def test_generation_goes_no_further_than_the_last_eos(expert, vocabulary, naive):
    calls = []
    expert.register_forward_hook(lambda *args: calls.append(1))
    completions = generate_greedy(expert, make_prompts(), vocabulary, [ids[3] for ids in naive], 10)
    assert len(calls) == max(map(len, completions)) < 10


def test_eos_is_kept_once_when_pad_is_eos(expert, vocabulary, naive):
    # The first answer ends at once and is padded up to the others, with EOS
    eos_id = naive[0][0]
    expert.config.pad_token_id = expert.generation_config.pad_token_id = eos_id
    completions = generate_greedy(expert, make_prompts(), vocabulary, [eos_id], 10)
    assert completions[0] == [eos_id]
    assert [ids.count(eos_id) for ids in completions] == [int(eos_id in ids) for ids in naive]


def test_a_model_without_a_pad_token_can_generate(expert, vocabulary, naive):
    expert.config.pad_token_id = expert.generation_config.pad_token_id = None
    expected = [ids[: ids.index(naive[1][2]) + 1] if naive[1][2] in ids else ids for ids in naive]
    assert generate_greedy(expert, make_prompts(), vocabulary, [naive[1][2]], 10) == expected


def test_a_model_without_eos_generates_up_to_the_limit(expert, vocabulary, naive):
    # The models own EOS does not count unless it is among the given ones
    expert.generation_config = GenerationConfig(eos_token_id=naive[0][0], pad_token_id=None)
    assert generate_greedy(expert, make_prompts(), vocabulary, [], 10) == naive


@pytest.mark.parametrize("value", [1e4, math.inf, math.nan])
def test_padded_columns_are_never_chosen(expert, vocabulary, naive, value):
    with torch.no_grad():
        expert.lm_head.weight[300:] = value
    assert generate_greedy(expert, make_prompts(), vocabulary, [], 10) == naive


def test_a_column_between_tokens_that_no_token_owns_is_never_chosen(expert, naive):
    missing = naive[2][0]
    vocabulary = Vocabulary([i for i in range(300) if i != missing])
    expected = [naive_greedy(expert, ids, vocabulary.ids.tolist(), [], 10) for ids in make_prompts()]
    assert generate_greedy(expert, make_prompts(), vocabulary, [], 10) == expected


def test_a_peft_model_generates_with_its_adapter(expert, vocabulary, naive):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(expert, config).eval()
    expected = [naive_greedy(model, ids, vocabulary.ids.tolist(), [], 10) for ids in make_prompts()]
    assert expected != naive
    assert generate_greedy(model, make_prompts(), vocabulary, [], 10) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_generate_what_their_logits_say(tokenizer, dtype):
    # One prompt: in half precision a batch rounds differently, and greedy decoding follows the rounding
    model = make_model(tokenizer).to(dtype)
    vocabulary = model_vocabulary(tokenizer, model.config.vocab_size)
    (prompt,) = make_prompts([6])
    completion = generate_greedy(model, [prompt], vocabulary, [297], 6)[0]
    for t, token_id in enumerate(completion):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1, :300].float()
        assert logits[token_id] >= logits.max() - 2 * torch.finfo(dtype).eps * logits.max().abs()
