import hashlib
import logging
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, Qwen2ForCausalLM

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler, sampling_metadata
from trl_lightreasoner.generation import batches, completions
from trl_lightreasoner.sampling import family_amateur, model_pair

from ..conftest import QUESTIONS, make_model, make_tokenizer


BETA = 1.95  # keeps some of the tiny pair's steps and drops others
STEP_COLUMNS = ("prompt_ids", "completion_ids", "kl_divergence", "step_positions", "label_ids", "label_probs")


@pytest.fixture(scope="module")
def loaded_tokenizer(expert_path):
    """The expert's: loading gives the tokenizer Qwen2's rules for splitting a text into words."""
    return AutoTokenizer.from_pretrained(expert_path)


@pytest.fixture
def sample(tmp_path, expert_path, amateur_path):
    """Samples into a folder of its own with short completions, and takes settings and models by name."""
    number = iter(range(100))

    def run(dataset, expert=expert_path, amateur=amateur_path, tokenizers=(None, None), **settings):
        settings = {
            "output_dir": str(tmp_path / f"steps{next(number)}"),
            "max_new_tokens": 12,
            "beta": BETA,
            **settings,
        }
        return ContrastiveStepSampler(expert, amateur, ContrastiveSamplingConfig(**settings), *tokenizers).sample(
            dataset
        )

    return run


def prompts_of(*texts, **columns):
    return Dataset.from_dict({"prompt": list(texts), **columns})


def text_of(tokenizer, num_tokens):
    """A text of so many tokens."""
    text = "$" * num_tokens
    assert len(tokenizer(text)["input_ids"]) == num_tokens
    return text


def assert_same_rows(one, other, exact=False):
    assert len(one) == len(other)
    for row, other_row in zip(one, other, strict=True):
        for name in ("prompt_ids", "completion_ids", "step_positions", "label_ids"):
            assert row[name] == other_row[name]
        assert row["kl_divergence"] == pytest.approx(other_row["kl_divergence"], rel=0 if exact else 1e-5)
        for probs, other_probs in zip(row["label_probs"], other_row["label_probs"], strict=True):
            assert probs == pytest.approx(other_probs, rel=0 if exact else 1e-5, abs=0 if exact else 1e-6)


# What a row says


def test_a_row_adds_up(steps, loaded_tokenizer, prompts):
    assert steps["prompt"][:] == prompts["prompt"][:] and steps["id"][:] == prompts["id"][:]
    for row in steps:
        assert row["prompt_ids"] == loaded_tokenizer(row["prompt"])["input_ids"]
        assert row["completion"] == loaded_tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert 1 <= len(row["completion_ids"]) <= 12
        assert len(row["kl_divergence"]) == len(row["completion_ids"])
        assert row["step_positions"] == [t for t, kl in enumerate(row["kl_divergence"]) if kl >= BETA and t > 0]
        assert len(row["label_ids"]) == len(row["label_probs"]) == len(row["step_positions"])
        for ids, probs in zip(row["label_ids"], row["label_probs"], strict=True):
            assert len(ids) == len(set(ids)) == len(probs)
            assert sum(probs) == pytest.approx(1) and min(probs) > 0
            assert probs == sorted(probs, reverse=True)


def test_some_steps_are_kept_and_some_are_not(steps):
    num_kept = sum(map(len, steps["step_positions"]))
    assert 0 < num_kept < sum(map(len, steps["kl_divergence"]))


@torch.no_grad()
def test_each_token_is_the_experts_favourite(steps, expert):
    for row in steps:
        for t, token_id in enumerate(row["completion_ids"]):
            logits = expert(torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])).logits[0, -1, :300]
            assert logits.argmax() == token_id


@torch.no_grad()
def test_each_divergence_is_that_of_the_two_models(steps, expert, amateur):
    for row in steps:
        for t, kl in enumerate(row["kl_divergence"]):
            context = torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])
            pi_expert, pi_amateur = (
                model(context).logits[0, -1, :300].double().softmax(-1).tolist() for model in (expert, amateur)
            )
            naive = sum(p * math.log(p / q) for p, q in zip(pi_expert, pi_amateur, strict=True))
            assert kl == pytest.approx(naive, rel=1e-4)


def test_beta_can_be_raised_afterwards(sample, prompts):
    low, high = sample(prompts, beta=1.0), sample(prompts, beta=2.0)
    assert sum(map(len, high["step_positions"])) > 0
    for row, other in zip(low, high, strict=True):
        kept = [k for k, t in enumerate(row["step_positions"]) if row["kl_divergence"][t] >= 2.0]
        assert [row["step_positions"][k] for k in kept] == other["step_positions"]
        assert [row["label_ids"][k] for k in kept] == other["label_ids"]
        assert [row["label_probs"][k] for k in kept] == other["label_probs"]


def test_alpha_narrows_the_labels(sample, prompts):
    wide, narrow = sample(prompts, alpha=0.1), sample(prompts, alpha=1.0)
    for row, other in zip(wide, narrow, strict=True):
        assert row["step_positions"] == other["step_positions"]
        for ids, other_ids in zip(row["label_ids"], other["label_ids"], strict=True):
            assert len(other_ids) == 1 and set(other_ids) <= set(ids)


def test_the_first_step_is_left_out_unless_asked_for(sample, prompts):
    with_first, without = sample(prompts, beta=0.0, include_first_step=True), sample(prompts, beta=0.0)
    for row, other in zip(with_first, without, strict=True):
        assert row["step_positions"] == list(range(len(row["completion_ids"])))
        assert other["step_positions"] == row["step_positions"][1:]
        assert other["label_ids"] == row["label_ids"][1:]
        assert other["kl_divergence"] == row["kl_divergence"]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rows_do_not_depend_on_the_batch_size(sample, prompts, batch_size):
    texts = Dataset.from_dict({"prompt": prompts["prompt"][:] * 3})
    assert_same_rows(sample(texts, per_device_batch_size=batch_size), sample(texts, per_device_batch_size=16))


def test_a_model_does_not_diverge_from_itself(sample, prompts, expert_path):
    made = sample(prompts, amateur=expert_path, beta=1e-6)
    assert {kl for row in made["kl_divergence"] for kl in row} == {0.0}
    assert made["step_positions"][:] == [[]] * len(prompts)


def test_no_kept_step_is_a_warning_with_quantiles(sample, prompts, caplog):
    made = sample(prompts, beta=50.0)
    divergences = torch.tensor([kl for row in made["kl_divergence"] for kl in row])
    assert "No step reached beta = 50.0" in caplog.text
    half, most, tenth = (f"{divergences.quantile(q):.3g}" for q in (0.5, 0.99, 0.9))
    assert f"half of the divergences are at most {half} and 99 % at most {most} nats" in caplog.text
    assert f"beta = {tenth} would keep 10 %" in caplog.text


def test_a_kept_step_gives_no_warning(sample, prompts, caplog):
    sample(prompts)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_result_can_be_loaded_from_its_folder(sample, prompts, tmp_path):
    made = sample(prompts, output_dir=str(tmp_path / "folder"))
    loaded = load_dataset(str(tmp_path / "folder"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == made.features and loaded.to_list() == made.to_list()


# What goes in


def test_messages_get_the_chat_template(sample, loaded_tokenizer):
    messages = [[{"role": "user", "content": text}] for text in QUESTIONS[:3]]
    made = sample(prompts_of(*messages))
    for row, message in zip(made, messages, strict=True):
        assert loaded_tokenizer.decode(row["prompt_ids"]) == (
            f"<|im_start|>user\n{message[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert row["prompt"] == message


def test_a_list_a_stream_and_conversations_give_what_their_dataset_gives(sample, prompts):
    questions = prompts["prompt"][:2]
    from_dataset = sample(prompts_of(*questions))
    assert_same_rows(sample(questions), from_dataset, exact=True)
    assert_same_rows(sample(prompts.to_iterable_dataset(), num_prompts=2), from_dataset, exact=True)
    messages = [[{"role": "user", "content": question}] for question in questions]
    answered = [[*each, {"role": "assistant", "content": "12"}] for each in messages]
    from_messages = sample(prompts_of(*messages))
    assert_same_rows(sample(Dataset.from_dict({"messages": answered})), from_messages, exact=True)


def test_the_default_folder_is_named_after_the_expert(prompts, expert_path, amateur_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sampler = ContrastiveStepSampler(expert_path, amateur_path)
    assert sampler.args == ContrastiveSamplingConfig("expert-LightReasoner-steps")
    assert len(sampler.sample(prompts.select([1]))) == len(sampler.sample(prompts.select([1]))) == 1
    assert (tmp_path / "expert-LightReasoner-steps" / "run.json").is_file()


def test_other_columns_are_carried_along(sample):
    features = Features(
        {"prompt": Value("string"), "level": ClassLabel(names=["easy", "hard"]), "note": Value("string")}
    )
    rows = [{"prompt": text, "level": i % 2, "note": None if i else "first"} for i, text in enumerate(QUESTIONS)]
    dataset = Dataset.from_list(rows, features=features)
    made = sample(dataset)
    assert made.select_columns(list(features)).to_list() == rows
    assert {name: made.features[name] for name in features} == features


def test_a_formatted_dataset_is_sampled_like_any_other(sample, prompts):
    assert_same_rows(sample(prompts.with_format("torch", columns=["id"])), sample(prompts))


def test_a_transform_of_the_users_makes_the_prompts(sample, prompts, loaded_tokenizer):
    made = sample(prompts.with_transform(lambda rows: {"prompt": [f"Q: {text}" for text in rows["prompt"]]}))
    assert [loaded_tokenizer.decode(ids) for ids in made["prompt_ids"]] == [f"Q: {text}" for text in prompts["prompt"]]


@pytest.mark.parametrize(
    "stored, seen", [(["prompt"], ["prompt", "completion"]), (["prompt", "completion"], ["prompt"])]
)
def test_a_transform_that_adds_or_drops_completions_is_refused(stored, seen, sample):
    dataset = Dataset.from_dict(dict.fromkeys(stored, QUESTIONS))
    with pytest.raises(ValueError, match="The transform of the dataset turns .* Apply it with `dataset.map` first"):
        sample(dataset.with_transform(lambda rows: dict.fromkeys(seen, rows["prompt"])))


def test_given_completions_are_scored_and_nothing_is_generated(sample, loaded_tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a given completion must not be generated")

    monkeypatch.setattr(completions, "generate_greedy", fail)
    monkeypatch.setattr(Qwen2ForCausalLM, "generate", fail)
    given = [" She has 7.", " It is 4.", " 21", " 180 miles", " 7", r" $\frac{7}{7} = 1$"]
    made = sample(prompts_of(*QUESTIONS, completion=given), beta=0.0)
    assert made["completion"][:] == given
    for row, text in zip(made, given, strict=True):
        assert row["completion_ids"] == loaded_tokenizer(text)["input_ids"]
        assert row["step_positions"] == list(range(1, len(row["completion_ids"])))


def test_a_given_message_is_scored_up_to_its_eos(sample, loaded_tokenizer, expert, amateur):
    answer = {"role": "assistant", "content": "It is 4."}
    (row,) = sample(prompts_of([{"role": "user", "content": "2+2?"}], completion=[[answer]]), beta=0.0)
    assert row["completion"] == [answer]
    assert row["completion_ids"] == [*loaded_tokenizer("It is 4.")["input_ids"], loaded_tokenizer.eos_token_id]
    context = torch.tensor([row["prompt_ids"] + row["completion_ids"][:-1]])
    with torch.no_grad():
        logps = [model(context).logits[0, -1, :300].double().log_softmax(-1) for model in (expert, amateur)]
    assert row["kl_divergence"][-1] == pytest.approx(float((logps[0].exp() * (logps[0] - logps[1])).sum()), rel=1e-4)


def test_given_completions_longer_than_max_new_tokens_are_scored_whole(sample, loaded_tokenizer):
    (row,) = sample(prompts_of("2+2=", completion=[text_of(loaded_tokenizer, 30)]), max_new_tokens=3)
    assert len(row["kl_divergence"]) == 30


WRONG_ROWS = {
    "no prompt": ({"prompt": ["2+2=", None]}, "Row 1: `prompt` must be text"),
    "no completion": ({"prompt": ["2+2=", "3+3="], "completion": ["4", None]}, "Row 1: `completion` must be text"),
    "role": ({"prompt": [[{"role": "system", "content": "Add."}]]}, "Row 0: Invalid role in the last message"),
}


@pytest.mark.parametrize("columns, message", WRONG_ROWS.values(), ids=WRONG_ROWS.keys())
def test_a_wrong_row_is_named(sample, columns, message):
    with pytest.raises(ValueError, match=message):
        sample(Dataset.from_dict(columns))


def test_messages_and_text_in_one_row_are_refused_by_the_row(sample):
    columns = {"prompt": [[{"role": "user", "content": "2+2="}]], "completion": ["4"]}
    with pytest.raises(ValueError, match="Row 0: `prompt` and `completion` must both be text or both be lists"):
        sample(Dataset.from_dict(columns))


# What is skipped


def test_skipped_prompts_are_counted_and_the_rest_is_sampled(sample, loaded_tokenizer, caplog):
    texts = [
        "",
        QUESTIONS[0],
        text_of(loaded_tokenizer, 100),
        QUESTIONS[1],
        text_of(loaded_tokenizer, 256),
        "",
        text_of(loaded_tokenizer, 40),
    ]
    made = sample(prompts_of(*texts), max_prompt_length=99)
    assert made["prompt"][:] == [QUESTIONS[0], QUESTIONS[1], texts[-1]]
    assert "Skipped 4 of 7 prompts: 2 empty, 2 longer than `max_prompt_length=99`" in caplog.text


def test_prompts_without_room_are_counted(sample, loaded_tokenizer, caplog):
    made = sample(prompts_of(text_of(loaded_tokenizer, 256), text_of(loaded_tokenizer, 300), QUESTIONS[0]))
    assert made["prompt"][:] == [QUESTIONS[0]]
    assert "Skipped 2 of 3 prompts: 2 no room (the models' context is 256 tokens)" in caplog.text


def test_a_prompt_of_exactly_max_prompt_length_is_sampled(sample, loaded_tokenizer):
    assert len(sample(prompts_of(text_of(loaded_tokenizer, 30)), max_prompt_length=30)) == 1


def test_given_completions_that_do_not_fit_are_skipped(sample, loaded_tokenizer, caplog):
    prompts = [text_of(loaded_tokenizer, 250), text_of(loaded_tokenizer, 250), "2+2=", ""]
    completions = [text_of(loaded_tokenizer, 6), text_of(loaded_tokenizer, 7), "", "4"]
    made = sample(prompts_of(*prompts, completion=completions))
    assert made["completion"][:] == completions[:1]
    assert "Skipped 3 of 4 prompts: 2 empty, 1 no room" in caplog.text


def test_rows_without_text_alone_are_told_by_their_column(sample):
    with pytest.raises(
        ValueError, match="Every row of the dataset is empty: `prompt` holds no text.* Check the column"
    ):
        sample(prompts_of("", ""))
    with pytest.raises(ValueError, match="Every row of the dataset is empty: `prompt` or `completion` holds no text"):
        sample(prompts_of("2+2=", completion=[""]))


@pytest.mark.parametrize("texts", [["$" * 300], ["What is 2+2?", ""]])
def test_nothing_left_is_an_error(sample, tmp_path, texts):
    with pytest.raises(ValueError, match="Every prompt of the dataset was skipped .*Shorten the prompts"):
        sample(prompts_of(*texts), max_prompt_length=3, output_dir=str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def test_many_empty_prompts_before_the_first_are_no_obstacle(sample):
    # More than `map` writes at once, so that their type cannot be read off them
    assert len(sample(prompts_of(*[""] * 1001, "What is 2+2?"))) == 1


@pytest.mark.parametrize("prompt_length, room", [(255, 1), (250, 6), (243, 12)])
def test_a_prompt_with_less_room_than_max_new_tokens_fills_it(sample, loaded_tokenizer, prompt_length, room):
    made = sample(prompts_of(QUESTIONS[0], text_of(loaded_tokenizer, prompt_length), QUESTIONS[1]))
    assert [len(ids) for ids in made["completion_ids"]] == [12, room, 12]


def test_the_amateurs_context_counts_too(sample, loaded_tokenizer):
    amateur = make_model(loaded_tokenizer, seed=1, hidden_size=16)
    amateur.config.max_position_embeddings = 40
    made = sample(
        prompts_of("2+2=", text_of(loaded_tokenizer, 35)), amateur=amateur, tokenizers=(None, loaded_tokenizer)
    )
    assert [len(ids) for ids in made["completion_ids"]] == [12, 5]


# What runs out


def run_out_beyond(monkeypatch, name, largest):
    """Let a function of the sampler run out of memory on more rows than this; returns the sizes that it took."""
    module = completions if name == "generate_greedy" else family_amateur
    function, sizes = getattr(module, name), []

    def limited(*args, **kwargs):
        rows = args[1] if name == "generate_greedy" else args[2]
        if len(rows) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        sizes.append(len(rows))
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, limited)
    return sizes


@pytest.mark.parametrize("name", ["generate_greedy", "score_trajectories"])
def test_out_of_memory_halves_the_batch_and_loses_nothing(sample, prompts, monkeypatch, caplog, name):
    expected = sample(prompts)
    sizes = run_out_beyond(monkeypatch, name, largest=2)
    assert_same_rows(sample(prompts, per_device_batch_size=6), expected)
    assert sizes == [2, 2, 2]
    assert "Memory ran out with a batch of 6 prompts. Continuing with 3." in caplog.text
    assert "Memory ran out with a batch of 3 prompts. Continuing with 2." in caplog.text


def test_out_of_memory_with_one_prompt_is_an_error(sample, prompts, loaded_tokenizer, monkeypatch):
    run_out_beyond(monkeypatch, "generate_greedy", largest=0)
    longest = max(range(len(QUESTIONS)), key=lambda index: len(loaded_tokenizer(QUESTIONS[index])["input_ids"]))
    with pytest.raises(ValueError, match=rf"Memory ran out for row {longest} alone \(\d+ prompt tokens\). Lower"):
        sample(prompts)


# A batch is read longest first, and with "length" only rows of equal length are completed together
@pytest.mark.parametrize("batch_size", [1, 6])
@pytest.mark.parametrize("alike", ["any", "length"])
def test_an_answer_with_logits_that_are_not_finite_names_its_row(
    alike, batch_size, sample, prompts, expert, loaded_tokenizer, monkeypatch
):
    of_others = sample(prompts)["completion_ids"][:]
    token = of_others.pop(1)[4]
    assert not any(token in ids for ids in of_others)
    monkeypatch.setattr(completions, "rows_alike", lambda *args: alike)
    with torch.no_grad():
        expert.get_input_embeddings().weight[token] = math.nan
    with pytest.raises(ValueError, match="^The expert's logits at token 5 of an answer to row 1 are not finite"):
        sample(prompts, expert, tokenizers=(loaded_tokenizer, None), per_device_batch_size=batch_size)


@pytest.mark.parametrize("count", [1, 2])
def test_out_of_memory_speaks_of_other_processes_if_there_are_any(count):
    def run(indices, room):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    processes = SimpleNamespace(count=count, is_main=False)
    with pytest.raises(ValueError) as caught:
        batches.run_in_batches([(0, 8)], 1, run, lambda *args: "", lambda row: 3, processes, "Sampling")
    assert ("If processes share this device, start fewer." in str(caught.value)) == (count > 1)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_in_the_last_batch_stops_what_would_follow(number, raised):
    written = []

    def run(indices, room):
        os.kill(os.getpid(), number)
        return indices

    def write(indices, result):
        written.extend(result)
        return ""

    processes = SimpleNamespace(count=1, is_main=False)
    with pytest.raises(raised):
        batches.run_in_batches([(0, 8), (1, 8)], 2, run, write, lambda row: 3, processes, "Sampling")
    assert written == [0, 1]


def test_another_error_is_not_taken_for_one_of_memory(sample, prompts, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(completions, "generate_greedy", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        sample(prompts)


def test_logits_of_an_answer_that_are_not_finite_are_refused(sample, prompts, expert):
    with torch.no_grad():
        expert.lm_head.weight[7] = math.nan
    with pytest.raises(ValueError, match="The expert's logits at the first tokens of an answer to row 5 are"):
        sample(prompts, expert=expert)


# The models


def test_dropout_is_off_while_sampling_and_on_again_afterwards(sample, prompts, expert_path, amateur_path):
    expert = Qwen2ForCausalLM.from_pretrained(expert_path, attention_dropout=0.5).train()
    amateur = Qwen2ForCausalLM.from_pretrained(amateur_path, attention_dropout=0.5)
    assert_same_rows(sample(prompts, expert, amateur), sample(prompts), exact=True)
    assert expert.training and all(module.training for module in expert.modules())
    assert not amateur.training


def test_models_are_back_in_train_mode_after_an_error(sample, prompts, expert, monkeypatch):
    run_out_beyond(monkeypatch, "generate_greedy", largest=0)
    with pytest.raises(ValueError, match="Memory ran out"):
        sample(prompts, expert=expert.train())
    assert expert.training


def test_a_generation_config_changes_nothing(sample, prompts, expert, steps):
    expert.generation_config.repetition_penalty = 3.0
    expert.generation_config.temperature = 2.0
    expert.generation_config.do_sample = True
    assert_same_rows(sample(prompts, expert=expert), steps, exact=True)


def test_padded_columns_change_nothing(sample, prompts, expert, amateur, steps):
    with torch.no_grad():
        expert.lm_head.weight[300:] = 1e4
        amateur.lm_head.weight[300:] = math.nan
    assert_same_rows(sample(prompts, expert, amateur), steps, exact=True)


def test_an_adapter_is_part_of_the_expert(sample, prompts, expert, steps, tmp_path):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(expert, config)
    made = sample(prompts, expert=adapted)
    assert made["completion_ids"][:] != steps["completion_ids"][:]
    adapted.save_pretrained(tmp_path / "adapter")
    assert_same_rows(sample(prompts, expert=str(tmp_path / "adapter")), made)
    merged = adapted.merge_and_unload()
    assert_same_rows(sample(prompts, expert=merged), made)


def test_the_active_adapter_is_part_of_the_run(expert, prompts, amateur_path, loaded_tokenizer, tmp_path):
    model = get_peft_model(expert, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    args = ContrastiveSamplingConfig(str(tmp_path / "folder"), max_new_tokens=4)
    ContrastiveStepSampler(model, amateur_path, args, loaded_tokenizer).sample(prompts)
    with model.disable_adapter(), pytest.raises(ValueError, match="was started with expert weights = "):
        ContrastiveStepSampler(model, amateur_path, args, loaded_tokenizer).sample(prompts)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="was started with expert weights = "):
        ContrastiveStepSampler(model, amateur_path, args, loaded_tokenizer).sample(prompts)


def test_a_column_that_was_corrected_is_not_given_back_as_it_was(sample, tmp_path):
    folder = str(tmp_path / "folder")
    sample(prompts_of("2+2=", answer=["5"]), output_dir=folder)
    with pytest.raises(ValueError, match=r"was started with rows \(SHA-256\) = "):
        sample(prompts_of("2+2=", answer=["4"]), output_dir=folder)


def test_the_home_folder_may_be_named_by_a_tilde(sample, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(sample(prompts, output_dir="~/of mine")) == len(prompts)
    assert (tmp_path / "of mine" / "data").is_dir()


def test_a_tokenizer_without_pad_and_eos_tokens_works(sample, prompts, expert, amateur, loaded_tokenizer):
    # The models have no EOS either: every completion goes to the limit
    bare = PreTrainedTokenizerFast(tokenizer_object=loaded_tokenizer.backend_tokenizer)
    assert bare.eos_token is None and bare.pad_token is None
    for model in (expert, amateur):
        model.config.pad_token_id = model.generation_config.pad_token_id = None
        model.config.eos_token_id = model.generation_config.eos_token_id = None
    made = sample(prompts, expert, amateur, tokenizers=(bare, bare))
    assert [len(ids) for ids in made["completion_ids"]] == [12] * len(prompts)


def test_eos_is_kept_and_ends_the_row(sample, prompts, expert, steps, loaded_tokenizer):
    # The third token of the first answer becomes an EOS of the model beside the tokenizer's own
    eos_id = steps[0]["completion_ids"][2]
    expert.generation_config.eos_token_id = [loaded_tokenizer.eos_token_id, eos_id]
    made = sample(prompts, expert=expert)
    for row, longer in zip(made, steps, strict=True):
        ids = longer["completion_ids"]
        expected = ids[: ids.index(eos_id) + 1] if eos_id in ids else ids
        assert row["completion_ids"] == expected and len(row["kl_divergence"]) == len(expected)
    assert made[0]["completion_ids"][-1] == eos_id
    assert sampling_metadata(made)["eos_token_ids"] == sorted([loaded_tokenizer.eos_token_id, eos_id])


def test_the_expert_may_choose_a_token_that_the_amateur_lacks(tmp_path):
    big, small = make_tokenizer(), make_tokenizer()
    big.add_tokens(["<own>"])
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"))
    sampler = ContrastiveStepSampler(make_model(big), make_model(small, seed=1), args, big, small)
    own = big.convert_tokens_to_ids("<own>")
    assert own in sampler.expert_vocabulary and own not in sampler.shared_vocabulary


@pytest.fixture
def with_own_token(tmp_path):
    """Samples with an expert that has one token more, and one embedding more, than the amateur."""
    big, small = make_tokenizer(), make_tokenizer()
    big.add_tokens(["<own>"])
    own = big.convert_tokens_to_ids("<own>")
    expert, amateur = make_model(big), make_model(small, seed=1)
    amateur.resize_token_embeddings(own)

    def sample(dataset, number):
        args = ContrastiveSamplingConfig(str(tmp_path / f"own{number}"), max_new_tokens=8, beta=0.0)
        return ContrastiveStepSampler(expert, amateur, args, big, small).sample(dataset)

    return sample, expert, amateur, own


def test_a_token_that_the_amateur_cannot_read_ends_the_completion(with_own_token, monkeypatch):
    sample, expert, amateur, own = with_own_token
    monkeypatch.setattr("trl_lightreasoner.sampling.contrastive_step_sampler.find_eos_ids", lambda *args, **kwargs: [])
    usual = sample(prompts_of(*QUESTIONS), 0)
    # From its third token on the expert prefers its own one
    third = [row["completion_ids"][2] for row in usual]
    with torch.no_grad():
        expert.get_output_embeddings().weight[own] = 3 * expert.get_output_embeddings().weight[third[0]]
    (row,) = sample(prompts_of(QUESTIONS[0]), 1)
    end = row["completion_ids"].index(own)
    assert row["completion_ids"][end:] == [own] and row["completion_ids"][:end] == usual[0]["completion_ids"][:end]
    assert len(row["kl_divergence"]) == end + 1 and end not in row["step_positions"]


@pytest.mark.parametrize("columns", [{"prompt": ["<own>?"]}, {"prompt": ["a"], "completion": ["<own>?"]}])
def test_a_text_that_the_amateur_cannot_read_is_named(columns, with_own_token):
    sample, *_ = with_own_token
    with pytest.raises(ValueError, match=r"Row 0 has the token '<own>', for which the amateur has no embedding"):
        sample(Dataset.from_dict(columns), 0)


def test_a_last_token_that_the_amateur_need_not_read_is_scored(with_own_token):
    sample, *_, own = with_own_token
    (row,) = sample(Dataset.from_dict({"prompt": ["a"], "completion": ["b<own>"]}), 0)
    assert row["completion_ids"][-1] == own and len(row["kl_divergence"]) == len(row["completion_ids"])


def test_a_sampler_can_be_used_again(tmp_path, expert_path, amateur_path, prompts):
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, overwrite_output_dir=True)
    sampler = ContrastiveStepSampler(expert_path, amateur_path, args)
    first = sampler.sample(prompts).to_list()
    again = sampler.sample(prompts.select([2, 0]))
    assert again["prompt"][:] == [QUESTIONS[2], QUESTIONS[0]]
    assert again[0]["completion_ids"] == first[2]["completion_ids"]


def test_weights_are_not_hashed_to_tokenize_prompts(sample, prompts, expert, amateur, monkeypatch):
    # `map` hashes its function, and whatever hangs on it, to find a cached result
    def fail(self, protocol):
        raise AssertionError("a model was serialized")

    monkeypatch.setattr(PreTrainedModel, "__reduce_ex__", fail)
    assert len(sample(prompts, expert, amateur)) == len(prompts)


def test_settings_for_loading_reach_each_model(sample, prompts):
    made = sample(prompts, dtype="float32", amateur_model_init_kwargs='{"dtype": "bfloat16"}')
    metadata = sampling_metadata(made)
    assert (metadata["expert"]["dtype"], metadata["amateur"]["dtype"]) == ("float32", "bfloat16")


def test_the_dataset_says_how_it_was_made(sample, prompts, expert_path, amateur_path, loaded_tokenizer):
    metadata = sampling_metadata(sample(prompts, alpha=0.3, beta=0.5, max_prompt_length=99, include_first_step=False))
    assert (metadata["expert"]["model"], metadata["amateur"]["model"]) == (expert_path, amateur_path)
    assert metadata["settings"] == {
        "alpha": 0.3,
        "beta": 0.5,
        "max_new_tokens": 12,
        "max_prompt_length": 99,
        "include_first_step": False,
        "contrast_strength": 1.0,
        "expert_anchor": 0.0,
        "label_expert": "live",
        "amateur_skipped_layers": None,
        "amateur_system_prompt": None,
        "amateur_prompt_template": None,
        "use_vllm": False,
    }
    assert metadata["shared_tokens"] == 300 and metadata["eos_token_ids"] == [loaded_tokenizer.eos_token_id]
    template = loaded_tokenizer.chat_template.encode()
    assert metadata["chat_template_sha256"] == hashlib.sha256(template).hexdigest()
    assert {"trl-lightreasoner", "trl", "transformers", "torch", "datasets"} <= set(metadata["versions"])


# What is refused before a model is loaded


@pytest.fixture
def unloadable(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(model_pair, "load_model", fail)


def test_a_missing_prompt_column_is_found_first(sample, unloadable):
    with pytest.raises(ValueError, match="no `prompt` column"):
        sample(Dataset.from_dict({"question": QUESTIONS}))


def test_a_column_of_ours_is_found_first(sample, unloadable):
    with pytest.raises(ValueError, match=r"columns named \['label_ids'\]"):
        sample(prompts_of("2+2=", label_ids=[1]))


def test_a_folder_that_is_taken_is_found_first(sample, unloadable, prompts, tmp_path):
    (tmp_path / "folder" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds files that are not from a run of this version"):
        sample(prompts, output_dir=str(tmp_path / "folder"))


def test_a_bad_row_is_found_first(sample, unloadable):
    with pytest.raises(ValueError, match="Row 1: `prompt` must be text or a list of messages, got nothing"):
        sample(prompts_of("2+2=", None))


def test_a_dataset_without_a_usable_prompt_is_found_first(sample, unloadable, prompts):
    with pytest.raises(ValueError, match="Every prompt of the dataset was skipped"):
        sample(prompts, max_prompt_length=1)


@pytest.mark.parametrize("name", ["expert", "amateur"])
def test_a_missing_model_is_found_first(sample, unloadable, prompts, name):
    with pytest.raises(ValueError, match=f"The {name} 'no/such/folder' cannot be found"):
        sample(prompts, **{name: "no/such/folder"})


# The configuration

BAD_VALUES = [
    ("output_dir", ""),
    ("output_dir", None),
    ("output_dir", 7),
    ("overwrite_output_dir", "yes"),
    ("dtype", "int8"),
    ("dtype", None),
    ("dtype", torch.bfloat16),
    ("model_init_kwargs", "{revision: main}"),
    ("model_init_kwargs", "[1]"),
    ("model_init_kwargs", 7),
    ("amateur_model_init_kwargs", "main"),
    ("trust_remote_code", 1),
    ("alpha", 0.0),
    ("alpha", -0.2),
    ("alpha", 1.01),
    ("alpha", math.nan),
    ("alpha", math.inf),
    ("alpha", "0.2"),
    ("alpha", True),
    ("alpha", None),
    ("beta", -0.1),
    ("beta", math.nan),
    ("beta", math.inf),
    ("beta", "0.4"),
    ("beta", [0.4]),
    ("beta", True),
    ("include_first_step", "false"),
    ("include_first_step", None),
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 12.5),
    ("max_new_tokens", "12"),
    ("max_new_tokens", None),
    ("max_new_tokens", True),
    ("max_prompt_length", 0),
    ("max_prompt_length", 3.5),
    ("max_prompt_length", "99"),
    ("per_device_batch_size", 0),
    ("per_device_batch_size", 2.0),
    ("per_device_batch_size", "8"),
    ("use_vllm", 1),
    ("vllm_mode", "colocated"),
    ("vllm_server_base_url", "localhost:8000"),
    ("vllm_server_base_url", None),
    ("vllm_server_timeout", 0),
    ("vllm_server_timeout", float("inf")),
    ("vllm_gpu_memory_utilization", 0),
    ("vllm_gpu_memory_utilization", 1.1),
    ("vllm_gpu_memory_utilization", "0.3"),
]


@pytest.mark.parametrize("name, value", BAD_VALUES)
def test_a_bad_value_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must "):
        ContrastiveSamplingConfig(**{"output_dir": "steps", name: value})


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 1}, {"alpha": 1e-9}, {"beta": 0}, {"max_prompt_length": None}, {"per_device_batch_size": None}],
)
def test_values_at_the_edge_are_accepted(settings):
    ContrastiveSamplingConfig("steps", **settings)


def test_keyword_arguments_can_be_json():
    args = ContrastiveSamplingConfig("steps", model_init_kwargs='{"revision": "v1"}')
    assert args.model_init_kwargs == {"revision": "v1"} and args.amateur_model_init_kwargs is None
