import dataclasses
import json

import pytest

from trl_lightreasoner import RunConfig
from trl_lightreasoner.pipeline.questions import prepare_questions
from trl_lightreasoner.steps.prompt_format import SYSTEM_PROMPT, PromptFormat

from ..evaluation.test_sets import FILES, write


ROWS = [{"question": f"What is {i}+{i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(10)]


@pytest.fixture
def prepare(tmp_path, tokenizer):
    """The questions of a file with such rows, by such settings."""

    def run(rows: list[dict] = ROWS, has_template: bool = True, **kwargs):
        write(tmp_path / "rows.jsonl", rows)
        args = RunConfig(str(tmp_path / "out"), "expert", str(tmp_path / "rows.jsonl"), "amateur", **kwargs)
        if has_template:
            return prepare_questions(args, tokenizer)
        template, tokenizer.chat_template = tokenizer.chat_template, None
        try:
            return prepare_questions(args, tokenizer)
        finally:
            tokenizer.chat_template = template

    return run


def texts(prompts) -> list[str]:
    return [prompt[-1]["content"] for prompt in prompts["prompt"]]


def test_the_last_rows_are_held_back_and_the_first_are_sampled(prepare):
    prompts, problems, *_ = prepare(num_held_out=3, num_prompts=4)
    assert texts(prompts) == [row["question"] for row in ROWS[:4]]
    assert problems["held_out"]["question"][:] == [row["question"] for row in ROWS[7:]]
    assert problems["held_out"]["gold"][:] == [["14"], ["16"], ["18"]]


def test_never_more_than_half_are_held_back(prepare):
    prompts, problems, *_ = prepare(ROWS[:9])
    assert (len(prompts), len(problems["held_out"])) == (5, 4)


def test_a_question_that_is_held_back_is_not_sampled_from_another_row(prepare):
    prompts, problems, *_ = prepare([ROWS[9], *ROWS], num_held_out=1)
    assert problems["held_out"]["question"][:] == ["What is 9+9?"]
    assert texts(prompts) == [row["question"] for row in ROWS[:9]]


def test_a_question_in_several_rows_is_held_back_once(prepare):
    solved = [{**row, "answer": f"So it is {row['answer']}"} for row in ROWS[2:5]]
    prompts, problems, *_ = prepare([ROWS[0], ROWS[1], *ROWS[2:5], *solved, *solved], num_held_out=4)
    assert problems["held_out"]["question"][:] == [row["question"] for row in ROWS[3:5]]
    assert texts(prompts) == [ROWS[row]["question"] for row in (0, 1, 2, 2, 2)]


def test_half_of_the_different_questions_are_left_to_sample(prepare):
    prompts, problems, *_ = prepare([row for row in ROWS[:4] for _ in range(5)])
    assert len(problems["held_out"]) == 2
    assert set(texts(prompts)) == {row["question"] for row in ROWS[:2]}


@pytest.mark.parametrize("again", ["Na\u00efve:  2+2?\n", "Nai\u0308ve: 2+2?"])
def test_spaces_and_unicode_forms_make_no_other_question(again, prepare):
    once = {"question": "Na\u00efve: 2+2?", "answer": "4"}
    prompts, problems, *_ = prepare([{**once, "question": again}, *ROWS[:3], once], num_held_out=1)
    assert problems["held_out"]["question"][:] == [once["question"]]
    assert texts(prompts) == [row["question"] for row in ROWS[:3]]


def test_a_row_without_an_answer_is_named_by_its_number_among_repeated_ones(prepare):
    with pytest.raises(ValueError, match="Row 4 of the dataset has no answer"):
        prepare([*ROWS[:2], *ROWS[:2], {"question": "What?", "answer": None}, ROWS[2]], num_held_out=2)


def test_a_question_in_several_rows_is_not_sampled_in_two_rounds(prepare):
    rows = [ROWS[0], ROWS[1], ROWS[0], ROWS[2], ROWS[1], ROWS[3]]
    once, *_ = prepare(rows, num_held_out=0, num_prompts=2)
    assert texts(once) == ["What is 0+0?", "What is 1+1?"]
    prompts, *_ = prepare(rows, num_held_out=0, num_prompts=2, num_rounds=2)
    assert texts(prompts) == [row["question"] for row in ROWS[:4]]


def test_without_answers_all_can_be_sampled(prepare):
    prompts, problems, *_ = prepare([{"prompt": row["question"]} for row in ROWS])
    assert len(prompts) == 10 and problems == {}


@pytest.mark.parametrize(
    ("settings", "is_warned"), [({}, True), ({"num_held_out": 0}, False), ({"benchmarks": ["gsm8k"]}, False)]
)
def test_without_answers_it_says_before_the_work_that_nothing_is_held_out(
    settings, is_warned, prepare, caplog, tmp_path
):
    write(tmp_path / "files" / "gsm8k.jsonl", FILES["gsm8k"])
    prepare(
        [{"question": row["question"], "output": "5"} for row in ROWS], data_dir=str(tmp_path / "files"), **settings
    )
    messages = [record.getMessage() for record in caplog.records]
    assert [message.startswith("There is no column 'answer', so no question is") for message in messages] == [
        True
    ] * is_warned
    assert all("The columns are 'question', 'output'. " in message for message in messages)


def test_none_are_held_back_if_asked(prepare):
    assert prepare(num_held_out=0).problems == {}


def test_benchmarks_come_beside_or_instead(prepare, tmp_path):
    write(tmp_path / "files" / "gsm8k.jsonl", FILES["gsm8k"])
    settings = {"benchmarks": ["gsm8k"], "data_dir": str(tmp_path / "files")}
    assert list(prepare(**settings).problems) == ["held_out", "gsm8k"]
    assert list(prepare(num_held_out=0, **settings).problems) == ["gsm8k"]


@pytest.mark.parametrize(
    ("answer", "gold"), [(5, ["5"]), ("3/4", ["3/4"]), (r"So $x=\boxed{7}$.", ["7"]), (["1", "2"], ["1", "2"])]
)
def test_answers_are_read_as_they_come(answer, gold, prepare):
    rows = [{"question": f"{row['question']}", "solution": answer} for row in ROWS]
    _, problems, *_ = prepare(rows, answer_column="solution", num_held_out=1)
    assert problems["held_out"]["gold"][:] == [gold]


@pytest.mark.parametrize("answer", ["", None, "First we add.\nThen we have it.", "word " * 50])
def test_an_answer_that_cannot_be_read_is_named(answer, prepare):
    with pytest.raises(ValueError, match="Row 9 of the dataset has no answer to grade by in its column 'answer'"):
        prepare([*ROWS[:9], {"question": "What?", "answer": answer}], num_held_out=2)


def test_a_missing_column_is_named(prepare):
    with pytest.raises(ValueError, match="The dataset has no column 'solution'; it has "):
        prepare(answer_column="solution")
    with pytest.raises(ValueError, match="The dataset has no column 'problem'; it has .*`--prompt_column`"):
        prepare(prompt_column="problem")


def test_text_goes_through_the_chat_template_of_an_expert_that_has_one(prepare):
    assert prepare().prompt_format == PromptFormat("chat", system_prompt=SYSTEM_PROMPT)
    assert prepare(system_prompt="").prompt_format == PromptFormat("chat")
    assert prepare(prompt_style="raw").prompt_format == PromptFormat("raw")


def test_a_base_model_gets_plain_text(prepare):
    prompts, _, _, prompt_format = prepare(has_template=False)
    assert prompt_format == PromptFormat("raw")
    assert prompts["prompt"][0] == "Question: What is 0+0?\nAnswer:"
    with pytest.raises(ValueError, match="The tokenizer of the expert has no chat template. Set `prompt_style='raw'`"):
        prepare(has_template=False, system_prompt="Think.")


def test_a_column_of_messages_holds_the_questions_if_there_is_no_other(prepare):
    messages = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": "5"}] for row in ROWS]
    prompts = prepare([{"messages": each} for each in messages]).prompts
    assert texts(prompts) == [row["question"] for row in ROWS]
    both = [{"messages": each, "question": "What?"} for each in messages]
    assert texts(prepare(both).prompts) == ["What?"] * 10


def test_messages_are_taken_as_they_are(prepare):
    messages = [
        [{"role": "system", "content": "Think."}, {"role": "user", "content": row["question"]}] for row in ROWS
    ]
    rows = [{"prompt": prompt, "answer": row["answer"]} for prompt, row in zip(messages, ROWS, strict=True)]
    prompts, problems, _, prompt_format = prepare(rows, num_held_out=2)
    assert json.loads(json.dumps(prompts["prompt"][0])) == messages[0]
    assert problems["held_out"]["question"][1] == messages[9]
    assert prompt_format == PromptFormat("chat", system_prompt="Think.")
    with pytest.raises(ValueError, match="The questions are already messages"):
        prepare(rows, system_prompt="Think.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompts": 0}, "`num_prompts` must be a whole number, 1 or more, got 0"),
        ({"beta": 0.2}, "`beta` must be 0 or at least 0.4 nats, the sampling threshold, got 0.2"),
        ({"num_held_out": -1}, "`num_held_out` must be a whole number, 0 or more, got -1"),
        ({"benchmarks": ["gsm9k"]}, "There is no benchmark 'gsm9k'. There are gsm8k"),
        ({"prompt_style": "poem"}, "`prompt_style` must be one of"),
        ({"prompt_style": "raw", "system_prompt": "Think."}, "cannot be combined with `system_prompt`"),
        ({"prompt_template": "no such file"}, "`prompt_template` must be text with"),
        ({"output_dir": ""}, "`output_dir` must name a folder"),
        ({"learning_rate": "fast"}, "`learning_rate` must be a number"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**{"output_dir": "out", "expert": "e", "amateur": "a", "dataset_name": "d", **settings})


def test_benchmarks_can_be_text_with_commas():
    args = RunConfig("out", "e", "d", "a", benchmarks=["gsm8k,svamp", "asdiv"])
    assert args.benchmarks == ["gsm8k", "svamp", "asdiv"]
    assert dataclasses.replace(args).benchmarks == args.benchmarks


def test_questions_that_choose_are_others_than_those_that_are_held_back_or_sampled(tmp_path, tokenizer):
    rows = [ROWS[9], ROWS[6], *ROWS[:6], ROWS[9], *ROWS[6:]]  # two that are held back or choose stand before, too
    write(tmp_path / "rows.jsonl", rows)
    args = RunConfig(str(tmp_path / "out"), "expert", str(tmp_path / "rows.jsonl"), "amateur", num_held_out=2)
    prompts, problems, validation, _ = prepare_questions(args, tokenizer, num_validation=3)
    assert problems["held_out"]["question"][:] == [row["question"] for row in ROWS[8:]]
    assert texts(validation) == [row["question"] for row in ROWS[5:8]]
    assert validation["answer"][:] == [["10"], ["12"], ["14"]]
    assert texts(prompts) == [row["question"] for row in ROWS[:5]]


def test_never_more_than_a_third_choose_and_a_third_are_held_back(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", ROWS)
    args = RunConfig(str(tmp_path / "out"), "expert", str(tmp_path / "rows.jsonl"), "amateur")
    prompts, problems, validation, _ = prepare_questions(args, tokenizer, num_validation=300)
    assert (len(prompts), len(validation), len(problems["held_out"])) == (4, 3, 3)


def test_what_the_chat_template_reads_beside_the_messages_is_read_in_every_use(tmp_path, tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
    rows = [{**row, "chat_template_kwargs": {"shout": f"NOW{i}"}, "tools": tools} for i, row in enumerate(ROWS)]
    write(tmp_path / "rows.jsonl", rows)
    args = RunConfig(str(tmp_path / "out"), "expert", str(tmp_path / "rows.jsonl"), "amateur", num_held_out=2)
    prompts, problems, validation, _ = prepare_questions(args, tokenizer, num_validation=3)
    for part, start in ((prompts, 0), (validation, 5), (problems["held_out"], 8)):
        assert [each["shout"] for each in part["chat_template_kwargs"]] == [
            f"NOW{start + i}" for i, _ in enumerate(part)
        ]
        assert part["tools"][0][0]["function"]["name"] == "add"
