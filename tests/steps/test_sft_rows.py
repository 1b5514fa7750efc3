import pytest
from datasets import Dataset, IterableDataset

from trl_lightreasoner.steps.sft_rows import encode_sft_rows

from ..conftest import make_tokenizer


MESSAGES = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Name a prime."},
    {"role": "assistant", "content": "7"},
]


def encode(tokenizer, *rows) -> list[dict]:
    return encode_sft_rows(Dataset.from_list(list(rows)), tokenizer).to_list()


def test_every_token_of_a_completion_is_a_kept_step_with_itself_as_its_label(tokenizer):
    (row,) = encode(tokenizer, {"prompt": "2+2=", "completion": "4 apples"})
    ids = tokenizer("4 apples")["input_ids"] + [tokenizer.eos_token_id]
    assert row == {
        "prompt_ids": tokenizer("2+2=")["input_ids"],
        "completion_ids": ids,
        "step_positions": list(range(len(ids))),
        "label_ids": [[token_id] for token_id in ids],
        "label_probs": [[1.0]] * len(ids),
    }


def test_an_eos_token_that_is_there_is_not_put_twice(tokenizer):
    with_eos = {"prompt": "2+2=", "completion": f"4{tokenizer.eos_token}"}
    assert encode(tokenizer, with_eos) == encode(tokenizer, {"prompt": "2+2=", "completion": "4"})


@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}])
def test_messages_are_rendered_by_the_template_and_the_last_is_the_completion(row, tokenizer):
    (encoded,) = encode(tokenizer, row)
    prompt = tokenizer.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(encoded["prompt_ids"]) == prompt
    assert tokenizer.decode(encoded["completion_ids"]) == "7<|im_end|>"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": MESSAGES[:3]}, "Row 1: `messages` must end with a message of the assistant"),
        ({"messages": []}, "Row 1: `messages` must end with a message of the assistant"),
        ({"messages": MESSAGES[1:2]}, "Row 1: the prompt is empty"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, "Row 1: the completion is empty"),
    ],
)
def test_conversations_without_an_answer_are_refused_by_row(row, sentence, tokenizer):
    with pytest.raises(ValueError, match=f"^`sft_dataset`: {sentence}"):
        encode(tokenizer, {"messages": MESSAGES}, row)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "", "completion": "4"}, "Row 1: the prompt is empty"),
        ({"prompt": None, "completion": "4"}, "Row 1: `prompt` must be text or a list of messages"),
        ({"prompt": "2+2=", "completion": None}, "Row 1: `completion` must be text or a list"),
        ({"prompt": "2+2=", "completion": "\n"}, "Row 1: the completion is empty"),
        ({"prompt": "2+2=", "completion": "4<|im_end|>5"}, "Row 1: `completion` continues after the token"),
    ],
)
def test_text_that_is_no_demonstration_is_refused_by_row(row, sentence, tokenizer):
    with pytest.raises(ValueError, match=f"^`sft_dataset`: {sentence}"):
        encode(tokenizer, {"prompt": "2+2=", "completion": "4"}, row)


def test_other_columns_are_refused(tokenizer):
    with pytest.raises(ValueError, match="must have the columns `prompt` and `completion`, or `messages`; it has"):
        encode(tokenizer, {"text": "2+2=4"})


def test_what_is_no_dataset_with_rows_is_refused(tokenizer):
    with pytest.raises(ValueError, match="^`sft_dataset` holds no row"):
        encode_sft_rows(Dataset.from_dict({"prompt": [], "completion": []}), tokenizer)
    with pytest.raises(TypeError, match="^`sft_dataset` must be a `datasets.Dataset`, got `IterableDataset`"):
        encode_sft_rows(IterableDataset.from_generator(lambda: iter([])), tokenizer)


def test_messages_need_a_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="rows of `sft_dataset` are messages, but the model's tokenizer has no chat"):
        encode(tokenizer, {"messages": MESSAGES})
