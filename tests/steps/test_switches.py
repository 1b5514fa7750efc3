"""Switches of the chat template: where they come from, where they are stored, and that every prompt has them."""

import json
import shutil

import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import AutoTokenizer

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    EvaluationConfig,
    LightReasonerConfig,
    LightReasonerTrainer,
    RunConfig,
    evaluate,
    sampling_metadata,
)
from trl_lightreasoner.commands.pair_arguments import PairArguments, as_prompts
from trl_lightreasoner.pipeline.questions import prepare_questions
from trl_lightreasoner.sampling.amateur_prompts import AmateurPrompts
from trl_lightreasoner.sampling.encoding import encode_dataset
from trl_lightreasoner.steps.messages import say_unread
from trl_lightreasoner.steps.prompt_format import PromptFormat, agree_on_switches, format_of_steps, load_prompt_format
from trl_lightreasoner.steps.run_file import run_date
from trl_lightreasoner.steps.switches import as_switches, find_switches, put_switches
from trl_lightreasoner.training.accuracy import EvalQuestions

from ..conftest import QUESTIONS
from ..evaluation.test_sets import write


pytestmark = pytest.mark.usefixtures("propagated_logs")

SHOUT = "{% if shout is defined %}{{ shout }}{% endif %}"
NOW = {"shout": "NOW"}
FORMAT = PromptFormat("chat", chat_template_kwargs=NOW)
ROWS = [{"question": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(8)]


@pytest.fixture
def reader(expert_path):
    """A tokenizer whose chat template reads the switch `shout`, and puts its value at the end."""
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    tokenizer.chat_template += SHOUT
    return tokenizer


@pytest.fixture
def model(reader, expert_path, tmp_path) -> str:
    """A model whose tokenizer is the reader."""
    shutil.copytree(expert_path, tmp_path / "model")
    reader.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def conversations(*switches) -> Dataset:
    column = {"chat_template_kwargs": list(switches)} if switches else {}
    return Dataset.from_dict(
        {"prompt": [FORMAT.make_prompt(text) for text in QUESTIONS[: len(switches) or 2]], **column}
    )


# The column


@pytest.mark.parametrize("value", [None, [1], "{}", {"a": {1, 2}}, {"a": 1j}], ids=str)
def test_what_is_no_json_object_is_refused(value):
    with pytest.raises(ValueError, match="`chat_template_kwargs` must be a dict of JSON values, got"):
        as_switches(value)


def test_switches_have_the_form_of_json_without_nulls():
    assert as_switches({"a": (1, 2), "b": None, "c": {"d": None}}) == {"a": [1, 2], "c": {}}


@pytest.mark.parametrize(
    ("column", "found"),
    [([], {}), ([NOW, NOW], NOW), ([NOW, {"shout": "LATER"}], None), ([NOW, None], None), ([None, None], {})],
    ids=["no column", "same", "other values", "not in all", "none"],
)
def test_rows_share_switches_or_differ(column, found):
    assert find_switches(conversations(*column)) == found


def test_nulls_of_arrow_and_rows_without_a_prompt_make_no_difference():
    dataset = conversations(NOW, {"other": 1}, NOW)
    assert "other" in dataset[0]["chat_template_kwargs"]
    assert (
        find_switches(dataset.map(lambda row, i: {"prompt": row["prompt"] if i != 1 else []}, with_indices=True))
        == NOW
    )


def test_rows_get_a_column_only_if_there_are_switches():
    assert put_switches(conversations(), NOW)["chat_template_kwargs"][:] == [NOW, NOW]
    assert put_switches(conversations(), {}).column_names == ["prompt"]


def test_rows_with_other_switches_are_refused():
    assert find_switches(put_switches(conversations(NOW, NOW), NOW)) == NOW
    with pytest.raises(ValueError, match="a column 'chat_template_kwargs' with other values than the setting"):
        put_switches(conversations(NOW, NOW), {"shout": "LATER"})


def test_switches_that_no_column_holds_are_refused():
    with pytest.raises(ValueError, match="`chat_template_kwargs` does not fit into a column of a dataset: .*"):
        put_switches(conversations(), {"a": [1, "b"]})


@pytest.mark.parametrize("by_name", [False, True])
def test_a_switch_that_no_template_reads_is_named(by_name, reader):
    if by_name:
        reader.chat_template = {"default": reader.chat_template, "tool_use": "{{ think }}"}
    assert say_unread(reader, ["shout"]) == ""
    said = say_unread(reader, ["shout", "thinks", "hout"])
    assert said.startswith("The chat template does not read 'hout' and 'thinks' of 'chat_template_kwargs'")
    assert (say_unread(reader, ["think"]) == "") == by_name


# The format


def test_a_raw_prompt_takes_no_switches():
    with pytest.raises(ValueError, match="A raw prompt has no chat template to switch"):
        PromptFormat("raw", chat_template_kwargs=NOW)


def test_a_format_that_was_stored_without_switches_has_none(tmp_path):
    (tmp_path / "prompt_format.json").write_text('{"prompt_style": "chat", "system_prompt": "Think."}')
    assert load_prompt_format(str(tmp_path)) == PromptFormat("chat", system_prompt="Think.", chat_template_kwargs={})


@pytest.mark.parametrize(
    ("switches", "shown"),
    [
        ({}, "the chat template and no system prompt"),
        ({"think": False}, 'the chat template with {"think": false} and no system prompt'),
        (None, "the chat template with chat_template_kwargs that differ and no system prompt"),
    ],
)
def test_the_switches_are_shown(switches, shown):
    assert str(PromptFormat("chat", chat_template_kwargs=switches)) == shown


def test_formats_that_differ_only_in_switches_share_the_rest():
    formats = [PromptFormat("chat", system_prompt="Think.", chat_template_kwargs=each) for each in (NOW, {})]
    rows = [{"sampling_metadata": json.dumps({"prompt_format": each.to_dict()})} for each in formats]
    together = format_of_steps(Dataset.from_list(rows))
    assert together == PromptFormat("chat", system_prompt="Think.", chat_template_kwargs=None)
    assert format_of_steps(Dataset.from_list(rows[:1])) == formats[0]


# Sampling


@pytest.fixture
def sample(expert_path, amateur_path, reader, tmp_path):
    def run(dataset, prompt_format=None) -> Dataset:
        args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, beta=0.0)
        return ContrastiveStepSampler(expert_path, amateur_path, args, reader).sample(dataset, prompt_format)

    return run


def test_the_switches_of_the_format_are_in_every_prompt(sample, reader):
    steps = sample(conversations(), FORMAT)
    assert all(text.endswith("NOW") for text in reader.batch_decode(steps["prompt_ids"][:]))
    assert sampling_metadata(steps)["prompt_format"] == FORMAT.to_dict()
    assert steps["chat_template_kwargs"][:] == [NOW, NOW]


@pytest.mark.parametrize(("other", "stored"), [(NOW, NOW), (None, None), ({"shout": "LATER"}, None)])
def test_the_switches_of_the_rows_are_stored_if_all_have_the_same(other, stored, sample):
    steps = sample(conversations(NOW, other))
    assert sampling_metadata(steps)["prompt_format"]["chat_template_kwargs"] == stored


def test_an_amateur_with_a_chat_template_of_its_own_is_switched_too(reader, expert_path):
    amateurs = AutoTokenizer.from_pretrained(expert_path)
    amateurs.chat_template = "Be brief." + amateurs.chat_template + SHOUT
    dataset, _ = agree_on_switches(conversations(), FORMAT)
    encoded = encode_dataset(dataset, reader, [], run_date("none"), AmateurPrompts(amateurs))
    for text in amateurs.batch_decode(encoded["amateur_prompt_ids"][:]):
        assert text.startswith("Be brief.") and text.endswith("NOW")


def test_an_amateur_with_a_prompt_of_its_own_is_switched_in_a_check_too(
    expert_path, amateur_path, reader, tmp_path, monkeypatch
):
    read = []

    def encode(self, *args, **kwargs):
        read.append(encode_prompts(self, *args, **kwargs))
        return read[-1]

    encode_prompts = AmateurPrompts.encode
    monkeypatch.setattr(AmateurPrompts, "encode", encode)
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, amateur_system_prompt="Guess.")
    sampler = ContrastiveStepSampler(expert_path, amateur_path, args, reader, reader)
    sampler.check(conversations(), prompt_format=FORMAT)
    assert len(read) == 2  # for the divergences and for the answers
    assert all(text.endswith("NOW") for prompts in read for text in reader.batch_decode(prompts))


def test_a_transform_that_drops_the_switches_is_refused(sample):
    dataset = conversations(NOW, NOW).with_transform(lambda rows: {"prompt": rows["prompt"]})
    with pytest.raises(ValueError, match="The transform of the dataset turns the columns"):
        sample(dataset)


def test_other_switches_do_not_resume(sample):
    sample(conversations(), FORMAT)
    with pytest.raises(ValueError, match="was started with"):
        sample(conversations(), PromptFormat("chat", chat_template_kwargs={"shout": "LATER"}))


def test_check_and_sampling_warn_once_of_a_switch_that_the_template_does_not_read(
    expert_path, amateur_path, reader, tmp_path, caplog
):
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, beta=0.0)
    sampler = ContrastiveStepSampler(expert_path, amateur_path, args, reader)
    for switches in ({"shout": "NOW"}, {"whisper": True}):
        prompt_format = PromptFormat("chat", chat_template_kwargs=switches)
        sampler.check(conversations(), prompt_format=prompt_format)
        sampler.sample(conversations(), prompt_format)
        assert caplog.text.count("does not read 'whisper'") == ("whisper" in switches)
        shutil.rmtree(tmp_path / "steps")


# Settings


def pair_arguments(**kwargs) -> PairArguments:
    return PairArguments("expert", "rows", "amateur", **kwargs)


def run_config(**kwargs) -> RunConfig:
    return RunConfig("run", "expert", "rows", "amateur", **kwargs)


def evaluation_config(**kwargs) -> EvaluationConfig:
    return EvaluationConfig("evaluation", **kwargs)


ALL = pytest.mark.parametrize("make", [pair_arguments, run_config, evaluation_config])


@ALL
def test_switches_are_given_as_json_or_as_a_dict(make):
    for given in (NOW, json.dumps(NOW)):
        assert make(chat_template_kwargs=given).chat_template_kwargs == NOW


@ALL
@pytest.mark.parametrize("text", ["[1]", "{oops", "true"])
def test_a_setting_that_is_no_json_object_is_refused(text, make):
    with pytest.raises(
        ValueError, match='`chat_template_kwargs` must be a dict or a JSON object, such as .*"enable_thinking"'
    ):
        make(chat_template_kwargs=text)


@ALL
def test_a_raw_style_takes_no_switches(make):
    with pytest.raises(ValueError, match="`prompt_style='raw'` cannot be combined with `chat_template_kwargs`"):
        make(prompt_style="raw", chat_template_kwargs=NOW)


def test_switches_of_sample_put_text_into_the_chat_template():
    texts = Dataset.from_dict({"prompt": QUESTIONS})
    made, prompt_format = as_prompts(texts, pair_arguments(chat_template_kwargs=NOW))
    assert prompt_format == FORMAT and made["prompt"][:] == [FORMAT.make_prompt(text) for text in QUESTIONS]


def test_switches_of_sample_apply_to_conversations_of_any_form():
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "?"},
    ]
    made, _ = as_prompts(Dataset.from_dict({"prompt": [turns]}), pair_arguments(chat_template_kwargs=NOW))
    assert made["chat_template_kwargs"][:] == [NOW]


@pytest.fixture
def prepare(reader, tmp_path):
    """The questions of a run."""

    def run(rows, num_validation=0, **kwargs):
        write(tmp_path / "rows.jsonl", rows)
        args = RunConfig(str(tmp_path / "out"), "expert", str(tmp_path / "rows.jsonl"), "amateur", **kwargs)
        return prepare_questions(args, reader, num_validation)

    return run


@pytest.mark.parametrize("as_messages", [False, True])
@pytest.mark.parametrize("in_rows", [False, True])
def test_all_questions_of_a_run_have_the_switches(in_rows, as_messages, prepare):
    rows = [{**row, "question": FORMAT.make_prompt(row["question"])} if as_messages else row for row in ROWS]
    if in_rows:
        made = prepare([{**row, "chat_template_kwargs": NOW} for row in rows], 2, num_held_out=2)
    else:
        made = prepare(rows, 2, num_held_out=2, chat_template_kwargs=NOW)
    assert made.prompt_format.chat_template_kwargs == NOW
    for part, count in ((made.prompts, 4), (made.validation, 2), (made.problems["held_out"], 2)):
        assert part["chat_template_kwargs"][:] == [NOW] * count


@pytest.mark.parametrize("benchmarks", [None, ["gsm8k"]])
def test_rows_of_a_run_that_differ_are_a_warning_if_there_are_benchmarks(benchmarks, prepare, tmp_path, caplog):
    write(tmp_path / "gsm8k.jsonl", [{"question": "What is 2+2?", "answer": "#### 4"}])
    rows = [{**row, "chat_template_kwargs": {"shout": str(i)}} for i, row in enumerate(ROWS)]
    made = prepare(rows, benchmarks=benchmarks, data_dir=str(tmp_path))
    assert made.prompt_format.chat_template_kwargs is None
    assert ("but the benchmarks are asked without any" in caplog.text) == (benchmarks is not None)


# Evaluation


@pytest.fixture
def ask(model, tmp_path, caplog):
    """Ask a model that was trained with some switches, and return the end of its prompt and what was said."""
    pytest.importorskip("math_verify")
    write(tmp_path / "gsm8k.jsonl", [{"question": "What is 2+2?", "answer": "#### 4"}])

    def run(trained, **kwargs) -> tuple[str, str]:
        PromptFormat("chat", chat_template_kwargs=trained).save(model)
        args = EvaluationConfig(
            str(tmp_path / "out"), benchmarks=["gsm8k"], data_dir=str(tmp_path), max_new_tokens=2, **kwargs
        )
        evaluate(model, args)
        (prompt,) = Dataset.from_parquet(str(tmp_path / "out" / "model" / "gsm8k.parquet"))["prompt"][:]
        return prompt.rpartition("assistant\n")[2], caplog.text

    return run


def test_a_model_is_asked_with_the_switches_that_it_was_trained_with(ask):
    assert ask(NOW) == ("NOW", "")


def test_other_switches_are_a_warning_that_names_both(ask):
    end, said = ask(NOW, chat_template_kwargs={})
    assert end == ""
    assert 'trained on prompts with the chat template with {"shout": "NOW"} and no system prompt' in said
    assert "is evaluated with the chat template and no system prompt" in said


@pytest.mark.parametrize("chosen", [None, {}, NOW], ids=str)
def test_a_model_trained_on_rows_that_differ_is_a_warning_until_switches_are_chosen(chosen, ask):
    end, said = ask(None, chat_template_kwargs=chosen)
    assert end == ("NOW" if chosen else "")
    assert ("Choose some with `chat_template_kwargs`" in said) == (chosen is None)
    assert "Remove the prompt settings" not in said


def test_a_switch_that_an_evaluated_model_does_not_read_is_a_warning(ask):
    assert "does not read 'whisper' of 'chat_template_kwargs'" in ask({}, chat_template_kwargs={"whisper": True})[1]


def test_a_warning_may_be_the_first_thing_that_a_process_says(ask):
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "Choose some with" in ask(None)[1]


# Accuracy while training


@pytest.mark.parametrize(("own", "end"), [({}, "NOW"), ({"chat_template_kwargs": [{"shout": "LATER"}]}, "LATER")])
def test_questions_while_training_have_the_switches_of_the_training_or_their_own(own, end, reader, expert):
    rows = {"prompt": [FORMAT.make_prompt("2+2?")], "answer": ["4"], **own}
    questions = EvalQuestions(Dataset.from_dict(rows), reader, expert.config, 4, prompt_format=FORMAT)
    assert reader.decode(questions.prompt_ids[0]).endswith(end)


def test_a_trainer_asks_with_the_switches_of_its_dataset(sample, reader, expert_path, tmp_path):
    pytest.importorskip("math_verify")
    trainer = LightReasonerTrainer(
        expert_path,
        LightReasonerConfig(str(tmp_path / "adapter"), eval_strategy="steps", use_cpu=True, report_to="none"),
        train_dataset=sample(conversations(), FORMAT),
        processing_class=reader,
        eval_questions=Dataset.from_dict({"prompt": [FORMAT.make_prompt("2+2?")], "answer": ["4"]}),
    )
    assert reader.decode(trainer._questions.prompt_ids[0]).endswith("NOW")


@pytest.mark.parametrize(("own", "is_told"), [({}, True), ({"chat_template_kwargs": [NOW]}, False)])
def test_questions_of_a_training_on_rows_that_differ_are_a_warning(own, is_told, reader, expert, caplog):
    rows = {"prompt": [FORMAT.make_prompt("2+2?")], "answer": ["4"], **own}
    mixed = PromptFormat("chat", chat_template_kwargs=None)
    EvalQuestions(Dataset.from_dict(rows), reader, expert.config, 4, prompt_format=mixed)
    assert ("`eval_questions` are asked without any" in caplog.text) == is_told
