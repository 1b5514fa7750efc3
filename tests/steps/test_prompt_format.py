import json

import pytest
from datasets import Dataset
from peft import LoraConfig

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    EvaluationConfig,
    LightReasonerConfig,
    LightReasonerTrainer,
    evaluate,
    sampling_metadata,
)
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.steps.prompt_format import (
    PromptFormat,
    format_of_prompts,
    format_of_steps,
    load_prompt_format,
    name_prompts,
)

from ..conftest import QUESTIONS
from ..evaluation.test_sets import write


CHAT = PromptFormat("chat", system_prompt="Think.")
RAW = PromptFormat("raw", "Q: {question}\nA:")
SWITCHED = PromptFormat("chat", chat_template_kwargs={"think": False})


@pytest.mark.parametrize("prompt_format", [CHAT, RAW, SWITCHED, PromptFormat("chat", "{question} Quick!")], ids=str)
def test_a_saved_format_is_loaded_again(prompt_format, tmp_path):
    prompt_format.save(tmp_path)
    assert load_prompt_format(str(tmp_path)) == prompt_format


def test_a_folder_without_a_format_has_none(tmp_path):
    assert load_prompt_format(str(tmp_path)) is None


def test_a_damaged_format_is_refused_by_its_name(tmp_path):
    (tmp_path / "prompt_format.json").write_text('{"prompt_style": "poem"}')
    with pytest.raises(ValueError, match="The prompt_format.json of .* cannot be read: `prompt_style` must be one of"):
        load_prompt_format(str(tmp_path))


def test_braces_in_a_question_stay():
    assert RAW.make_prompt("{question} of \\frac{1}{2}?") == "Q: {question} of \\frac{1}{2}?\nA:"


def test_a_raw_prompt_takes_no_system_message():
    with pytest.raises(ValueError, match="A raw prompt has no system message"):
        PromptFormat("raw", system_prompt="Think.")


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [
        ([CHAT.make_prompt(text) for text in QUESTIONS], CHAT),
        ([PromptFormat("chat").make_prompt(text) for text in QUESTIONS], PromptFormat("chat")),
        ([[], *(CHAT.make_prompt(text) for text in QUESTIONS)], CHAT),
        ([CHAT.make_prompt("a"), PromptFormat("chat", system_prompt="Guess.").make_prompt("b")], None),
        ([[*CHAT.make_prompt("a"), {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]], None),
        (QUESTIONS, None),
    ],
    ids=["system prompt", "none", "an empty row", "two system prompts", "several turns", "text"],
)
def test_messages_show_their_format(prompts, shown):
    assert format_of_prompts(Dataset.from_dict({"prompt": prompts})) == shown


def sample(expert_path, amateur_path, folder, rows, prompt_format=None) -> Dataset:
    args = ContrastiveSamplingConfig(str(folder), max_new_tokens=6, beta=1.0)
    return ContrastiveStepSampler(expert_path, amateur_path, args).sample(Dataset.from_list(rows), prompt_format)


def test_the_format_goes_with_the_dataset(expert_path, amateur_path, tmp_path):
    rows = [{"prompt": RAW.make_prompt(text)} for text in QUESTIONS]
    dataset = sample(expert_path, amateur_path, tmp_path, rows, RAW)
    assert sampling_metadata(dataset)["prompt_format"] == RAW.to_dict()
    assert format_of_steps(dataset) == RAW


def test_a_dataset_of_two_formats_has_none():
    rows = [{"sampling_metadata": json.dumps({"prompt_format": each.to_dict()})} for each in (RAW, CHAT)]
    assert format_of_steps(Dataset.from_list(rows)) is None
    assert format_of_steps(Dataset.from_list(rows[:1])) == RAW


@pytest.mark.parametrize("metadata", [None, "not JSON", "{}"])
def test_a_dataset_that_does_not_say_has_no_format(metadata):
    assert format_of_steps(Dataset.from_dict({"sampling_metadata": [metadata]})) is None


@pytest.fixture
def prompts_file(tmp_path) -> str:
    write(tmp_path / "prompts.jsonl", [{"question": text} for text in QUESTIONS])
    return str(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], PromptFormat("raw", "{question}")),
        (["--prompt_style", "raw"], PromptFormat("raw")),
        (["--prompt_template", "Q: {question}"], PromptFormat("raw", "Q: {question}")),
        (["--conversational"], PromptFormat("chat")),
        (["--prompt_style", "chat", "--prompt_template", "{question}!"], PromptFormat("chat", "{question}!")),
        (["--system_prompt", "Think."], CHAT),
        (["--chat_template_kwargs", '{"think": false}'], PromptFormat("chat", chat_template_kwargs={"think": False})),
    ],
    ids=["verbatim", "raw", "template", "conversational", "chat", "system prompt", "switches"],
)
def test_flags_of_sample_are_the_format(flags, expected, prompts_file, expert_path, amateur_path, tmp_path):
    pair = ["--expert", expert_path, "--amateur", amateur_path, "--dataset_name", prompts_file]
    argv = [*pair, "--prompt_column", "question", "--max_new_tokens", "4", "--beta", "0"]
    assert main(["sample", *argv, "--output_dir", str(tmp_path / "steps"), *flags]) == 0
    dataset = Dataset.from_parquet(str(tmp_path / "steps" / "data" / "*.parquet"))
    assert format_of_steps(dataset) == expected
    assert dataset["prompt"][:] == [expected.make_prompt(text) for text in QUESTIONS]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, expert_path, amateur_path) -> str:
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": CHAT.make_prompt(text)} for text in QUESTIONS]
    trainer = LightReasonerTrainer(
        expert_path,
        LightReasonerConfig(
            str(folder / "adapter"), max_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        ),
        train_dataset=sample(expert_path, amateur_path, folder / "steps", rows),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    return str(folder / "adapter")


@pytest.mark.parametrize("name", ["", "checkpoint-1"])
def test_the_format_lies_beside_what_is_trained(name, adapter):
    assert load_prompt_format(f"{adapter}/{name}") == CHAT


def test_the_card_shows_the_format_and_asks_in_it(adapter):
    card = open(f"{adapter}/README.md").read()
    assert "| prompt format | the chat template and the system prompt 'Think.' |" in card
    asked = (
        'prompt = [{"role": "system", "content": "Think."}, {"role": "user", "content": ' + json.dumps(text)
        for text in QUESTIONS
    )
    assert any(each in card for each in asked)


def test_merging_keeps_the_format(adapter, tmp_path):
    assert main(["merge", "--model_name_or_path", adapter, "--output_dir", str(tmp_path / "model")]) == 0
    assert load_prompt_format(str(tmp_path / "model")) == CHAT


@pytest.fixture
def asked(adapter, tmp_path, caplog, propagated_logs):
    """The settings with which an adapter was asked, and what was said of them."""
    write(tmp_path / "gsm8k.jsonl", [{"question": "What is 2+2?", "answer": "#### 4"}])

    def ask(**kwargs) -> tuple[dict, str]:
        args = EvaluationConfig(
            str(tmp_path / "out"), benchmarks=["gsm8k"], data_dir=str(tmp_path), max_new_tokens=3, **kwargs
        )
        evaluate(adapter, args)
        settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
        return {name: settings[name] for name in CHAT.to_dict()}, caplog.text

    return ask


def test_an_adapter_is_asked_in_the_form_in_which_it_was_trained(asked):
    settings, said = asked()
    assert settings == CHAT.to_dict() and "trained on prompts" not in said


def test_another_form_is_a_warning_that_names_both(asked):
    settings, said = asked(system_prompt="Guess.")
    assert settings["system_prompt"] == "Guess."
    assert "trained on prompts with the chat template and the system prompt 'Think.'" in said
    assert "is evaluated with the chat template and the system prompt 'Guess.'" in said


def test_another_style_has_the_template_of_its_own(asked):
    settings, said = asked(prompt_style="raw")
    assert settings == PromptFormat("raw").to_dict()
    assert "is evaluated with plain text 'Question: {question}\\nAnswer:'" in said


def test_a_dataset_of_conversations_needs_no_name_for_its_column():
    question = {"role": "user", "content": "What is 2+2?"}
    dataset = Dataset.from_dict({"messages": [[question]]})
    for column in ("messages", "prompt"):
        assert name_prompts(dataset, column)["prompt"][0] == [question]
    with pytest.raises(ValueError, match="no column 'question'"):
        name_prompts(dataset, "question")
