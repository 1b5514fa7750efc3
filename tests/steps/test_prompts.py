from datetime import datetime
from pathlib import Path

import pytest
import trl
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trl_lightreasoner.steps.prompts import check_prompts, encode_continuation, encode_rows

from ..conftest import make_tokenizer


MESSAGES = [
    {"role": "system", "content": "Please reason step by step."},
    {"role": "user", "content": "What is 2+2?"},
]
RENDERED = (
    "<|im_start|>system\nPlease reason step by step.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
# What a naive `str.format` or template would change
VERBATIM = [
    "Solve for {question} and {0}.",
    "{{ 1 + 1 }} {% if x %} {# no #}",
    r"If $x^{2} = 49$, what is \frac{x}{7} \\ \text{in} \boxed{}?",
    " leading, trailing \n\n\tand  double spaces ",
    "Größe: 3 × 4 = 🍎",
    "%s %d $HOME \\n",
]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def bos_tokenizer(tokenizer):
    """A tokenizer that puts BOS before every text, as Llama's do."""
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer, **row):
    encoded = encode_rows([row], tokenizer, eos_ids={tokenizer.eos_token_id})
    return {column: ids for column, (ids,) in encoded.items()}


def test_plain_text_is_tokenized_as_it_is(tokenizer):
    assert encode(tokenizer, prompt="What is 2+2?") == {"prompt_ids": ids_of(tokenizer, "What is 2+2?")}


def test_the_chat_template_is_applied_once(tokenizer):
    prompt_ids = encode(tokenizer, prompt=MESSAGES)["prompt_ids"]
    assert tokenizer.decode(prompt_ids) == RENDERED
    assert prompt_ids == ids_of(tokenizer, RENDERED)


def test_plain_text_gets_no_chat_template(tokenizer):
    assert tokenizer.decode(encode(tokenizer, prompt=RENDERED)["prompt_ids"]) == RENDERED


def test_a_prompt_that_ends_in_an_assistants_message_is_continued(tokenizer):
    started = [*MESSAGES, {"role": "assistant", "content": "2+2 is"}]
    assert tokenizer.decode(encode(tokenizer, prompt=started)["prompt_ids"]) == RENDERED + "2+2 is"


def test_plain_text_gets_bos_once(bos_tokenizer):
    bos = bos_tokenizer.bos_token_id
    prompt_ids = encode(bos_tokenizer, prompt="What is 2+2?")["prompt_ids"]
    assert prompt_ids == [bos, *ids_of(bos_tokenizer, "What is 2+2?")]


def test_text_that_brings_its_bos_gets_no_second_one(bos_tokenizer):
    prompt_ids = encode(bos_tokenizer, prompt="<|begin|>What is 2+2?")["prompt_ids"]
    assert prompt_ids == [bos_tokenizer.bos_token_id, *ids_of(bos_tokenizer, "What is 2+2?")]


def test_a_template_that_brings_its_bos_gets_no_second_one(bos_tokenizer):
    bos_tokenizer.chat_template = "{{ bos_token }}" + bos_tokenizer.chat_template
    prompt_ids = encode(bos_tokenizer, prompt=MESSAGES)["prompt_ids"]
    assert prompt_ids == [bos_tokenizer.bos_token_id, *ids_of(bos_tokenizer, RENDERED)]


def test_a_template_without_bos_gets_none(bos_tokenizer):
    prompt_ids = encode(bos_tokenizer, prompt=MESSAGES)["prompt_ids"]
    assert bos_tokenizer.bos_token_id not in prompt_ids


def test_a_bos_token_that_the_tokenizer_does_not_use_is_not_added(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    assert encode(tokenizer, prompt="What is 2+2?")["prompt_ids"] == ids_of(tokenizer, "What is 2+2?")


def test_bos_is_not_counted_as_part_of_the_completion(bos_tokenizer):
    encoded = encode(bos_tokenizer, prompt="What is 2+2?", completion=" It is 4.")
    assert encoded["prompt_ids"] == [bos_tokenizer.bos_token_id, *ids_of(bos_tokenizer, "What is 2+2?")]
    assert encoded["completion_ids"] == ids_of(bos_tokenizer, " It is 4.")


def test_rows_are_encoded_each_for_itself(bos_tokenizer):
    rows = [{"prompt": "What is 2+2?"}, {"prompt": ""}, {"prompt": "<|begin|>Name a prime."}]
    assert encode_rows(rows, bos_tokenizer, set())["prompt_ids"] == [
        encode(bos_tokenizer, **row)["prompt_ids"] for row in rows
    ]


def test_a_row_that_is_refused_is_named(tokenizer):
    with pytest.raises(ValueError, match="^Row 8: `prompt` must be text or a list of messages, got nothing"):
        encode_rows([{"prompt": "Name a prime."}, {"prompt": None}], tokenizer, set(), first_row=7)


@pytest.mark.parametrize("text", VERBATIM)
def test_text_passes_verbatim(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, prompt=text)["prompt_ids"]) == text


@pytest.mark.parametrize("text", VERBATIM)
def test_messages_pass_verbatim(tokenizer, text):
    prompt_ids = encode(tokenizer, prompt=[{"role": "user", "content": text}])["prompt_ids"]
    assert tokenizer.decode(prompt_ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("text", VERBATIM)
def test_completions_pass_verbatim(tokenizer, text):
    encoded = encode(tokenizer, prompt="What is 2+2?", completion=text)
    assert tokenizer.decode(encoded["completion_ids"]) == text


def test_chat_template_kwargs_reach_the_template(tokenizer):
    tokenizer.chat_template += "{% if shout is defined %}{{ shout }}{% endif %}"
    encoded = encode(tokenizer, prompt=MESSAGES, chat_template_kwargs={"shout": "NOW"})
    assert tokenizer.decode(encoded["prompt_ids"]) == RENDERED + "NOW"
    assert tokenizer.decode(encode(tokenizer, prompt=MESSAGES, chat_template_kwargs=None)["prompt_ids"]) == RENDERED


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = "{% for tool in tools %}[{{ tool['name'] }}]{% endfor %}" + tokenizer.chat_template
    encoded = encode(tokenizer, prompt=MESSAGES, tools=[{"name": "calculator"}])
    assert tokenizer.decode(encoded["prompt_ids"]) == "[calculator]" + RENDERED


def test_tools_can_be_json(tokenizer):
    tokenizer.chat_template = "{% for tool in tools %}[{{ tool['name'] }}]{% endfor %}" + tokenizer.chat_template
    encoded = encode(tokenizer, prompt=MESSAGES, tools='[{"name": "calculator"}]')
    assert tokenizer.decode(encoded["prompt_ids"]) == "[calculator]" + RENDERED


@pytest.mark.parametrize("behind", ["", "<|im_end|>", "\n", "<|im_end|><|endoftext|>\n"])
def test_a_text_completion_ends_with_its_first_eos(tokenizer, behind):
    encoded = encode(tokenizer, prompt="What is 2+2?", completion="4<|im_end|>" + behind)
    assert encoded["completion_ids"] == [*ids_of(tokenizer, "4"), tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["text", "message"])
def test_a_completion_that_goes_on_behind_eos_is_refused(tokenizer, kind):
    text = "4<|im_end|>It is 4."
    completion = [{"role": "assistant", "content": text}] if kind == "message" else text
    with pytest.raises(ValueError, match="^Row 0: `completion` continues after the token '<|im_end|>', which ends an"):
        encode(tokenizer, prompt=MESSAGES if kind == "message" else "What is 2+2?", completion=completion)


def test_a_completion_message_ends_with_eos(tokenizer):
    # The template ends a message with EOS and a line break, which the expert would never write
    completion = [{"role": "assistant", "content": "It is 4."}]
    encoded = encode(tokenizer, prompt=MESSAGES, completion=completion)
    assert encoded["prompt_ids"] == ids_of(tokenizer, RENDERED)
    assert encoded["completion_ids"] == [*ids_of(tokenizer, "It is 4."), tokenizer.eos_token_id]


def test_a_template_without_eos_leaves_the_completion_whole(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_start|>")
    completion = [{"role": "assistant", "content": "It is 4."}]
    encoded = encode(tokenizer, prompt=MESSAGES, completion=completion)
    assert tokenizer.decode(encoded["completion_ids"]) == "It is 4.<|im_start|>\n"


def test_a_token_across_the_boundary_is_split_at_it(tokenizer):
    prompt, completion = "How ma", "ny"
    together = ids_of(tokenizer, prompt + completion)
    assert together[: len(ids_of(tokenizer, prompt))] != ids_of(tokenizer, prompt), "no token crosses the boundary"
    encoded = encode(tokenizer, prompt=prompt, completion=completion)
    assert encoded["prompt_ids"] == ids_of(tokenizer, prompt)
    assert encoded["completion_ids"] == ids_of(tokenizer, completion)


def test_a_completion_gets_no_space_that_a_text_of_its_own_would_get():
    # SentencePiece puts a space before every text
    tokenizer = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert ids_of(tokenizer, "b") == [0, 2]
    assert encode_continuation("a", [0, 1], "b", tokenizer) == [2]
    assert encode_continuation("a", [0, 1], " b", tokenizer) == [0, 2]


def test_an_empty_prompt_has_no_tokens(tokenizer):
    # Even where there would be a BOS or a template to start from
    for prompt in ("", []):
        assert encode(tokenizer, prompt=prompt) == {"prompt_ids": []}
    assert encode(tokenizer, prompt="", completion="4") == {"prompt_ids": [], "completion_ids": []}


def test_an_empty_completion_has_no_tokens(tokenizer):
    assert encode(tokenizer, prompt="What is 2+2?", completion="")["completion_ids"] == []


ANSWER = {"role": "assistant", "content": "4"}
WRONG_ROWS = {
    "no prompt": ({"prompt": None}, "`prompt` must be text or a list of messages, got nothing"),
    "a number": ({"prompt": 7}, "`prompt` must be text or a list of messages, got 7"),
    "no completion": ({"prompt": "2+2=", "completion": None}, "`completion` must be text .* got nothing"),
    "text and messages": ({"prompt": "2+2=", "completion": [ANSWER]}, "must both be text or both be lists"),
    "messages and text": ({"prompt": MESSAGES, "completion": "4"}, "must both be text or both be lists"),
    "a list of texts": ({"prompt": ["2+2="]}, "must both be text or both be lists"),
    "two completions": ({"prompt": MESSAGES, "completion": [ANSWER, ANSWER]}, "one assistant message, got 2 of them"),
    "an empty completion": ({"prompt": MESSAGES, "completion": []}, "one assistant message, got 0 of them"),
    "a user's completion": ({"prompt": MESSAGES, "completion": MESSAGES[1:]}, "must be one assistant message, got {"),
    "a system message last": ({"prompt": MESSAGES[:1]}, "Invalid role in the last message: system"),
    "null content": ({"prompt": [{"role": "user", "content": None}]}, "A message of `prompt` has no content"),
    "no call": (
        {"prompt": [{**MESSAGES[1], "tool_calls": 7}]},
        "`tool_calls` of a message of `prompt` must be a list",
    ),
    "no content": ({"prompt": [{"role": "user", "text": "2+2="}]}, "A message of `prompt` has no content"),
}


@pytest.mark.parametrize("row, message", WRONG_ROWS.values(), ids=WRONG_ROWS.keys())
def test_a_wrong_row_is_refused(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, **row)


def test_what_a_chat_template_refuses_is_an_error_of_the_row(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="The chat template refuses .*: System role not supported"):
        encode(tokenizer, prompt=MESSAGES)


def test_an_assistants_message_of_tool_calls_needs_no_content(tokenizer):
    printed = "message['content'] or message['tool_calls'][0]['name']"
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", printed)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "calculator"}]}
    prompt = [*MESSAGES, call, {"role": "tool", "content": "4"}]
    assert "assistant\ncalculator<|im_end|>" in tokenizer.decode(encode(tokenizer, prompt=prompt)["prompt_ids"])


TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def template_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "lfm2", "qwen2_5", "gptoss"])
def test_text_in_parts_is_joined(tokenizer, name):
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.chat_template = template_of(name)
    in_parts, whole = (
        encode(tokenizer, prompt=[{"role": "user", "content": content}], completion=[{**ANSWER, "content": answer}])
        for content, answer in ((parts("What is ", "2+2?"), parts("It is ", "4.")), ("What is 2+2?", "It is 4."))
    )
    assert in_parts == whole
    assert "What is 2+2?" in tokenizer.decode(whole["prompt_ids"])


@pytest.mark.parametrize(
    "part",
    [{"type": "image"}, {"type": "image", "text": "a"}, {"type": "text", "text": 4}, "2+2?", None, {"text": "a"}],
)
def test_a_part_that_is_not_text_is_refused(tokenizer, part):
    with pytest.raises(ValueError, match="Row 0: A message of `prompt` has a part that is not text: "):
        encode(tokenizer, prompt=[{"role": "user", "content": [*parts("What is this?"), part]}])


def test_what_a_template_leaves_out_of_a_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}"
    tokenizer.chat_template += "{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="^Row 0: The chat template omits 'Please reason step by step.' of"):
        encode(tokenizer, prompt=MESSAGES)


@pytest.mark.parametrize(
    "tools", [[{"name": "calculator"}], [{"type": "function", "function": {"name": "calculator"}}]]
)
def test_tools_that_a_template_leaves_out_are_refused(tokenizer, tools):
    with pytest.raises(ValueError, match="omits 'calculator' of `prompt`"):
        encode(tokenizer, prompt=MESSAGES, tools=tools)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "llama3", "gptoss", "deepseek_r1_distill", "gemma3"])
def test_reasoning_of_an_earlier_turn_may_be_left_out_of_a_prompt(tokenizer, name):
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.chat_template = template_of(name)
    prompt = [MESSAGES[1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}, MESSAGES[1]]
    assert tokenizer.decode(encode(tokenizer, prompt=prompt)["prompt_ids"]).count("What is 2+2?") == 2


REASONED = [
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is 4."},
    {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."},
]


@pytest.mark.parametrize("message", REASONED, ids=["in the content", "beside it"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_6"])
def test_a_completion_that_comes_out_of_the_template_whole_is_scored_whole(tokenizer, name, message):
    tokenizer.chat_template = template_of(name)
    encoded = encode(tokenizer, prompt=MESSAGES, completion=[message])
    text = tokenizer.decode([*encoded["prompt_ids"], *encoded["completion_ids"]])
    assert "<think>\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>" in text
    assert "Two and two." in tokenizer.decode(encoded["completion_ids"])


@pytest.mark.parametrize("message", REASONED, ids=["in the content", "beside it"])
def test_a_completion_whose_reasoning_the_template_drops_is_refused(tokenizer, message):
    tokenizer.chat_template = template_of("deepseek_r1_distill")
    with pytest.raises(ValueError, match="^Row 0: The chat template omits .*Two and two.* of `completion`"):
        encode(tokenizer, prompt=MESSAGES, completion=[message])


def test_nulls_that_arrow_fills_in_do_not_reach_the_template(tokenizer):
    tokenizer.chat_template = template_of("qwen3")

    def row(name: str, **arguments) -> dict:
        parameters = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "prompt": [MESSAGES[1], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "4"}],
            "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}],
            "chat_template_kwargs": {name: 1},
        }

    rows = [row("calculator", sum="2+2"), row("weather", city="Rome")]
    assert encode_rows(Dataset.from_list(rows).to_list(), tokenizer, set()) == encode_rows(rows, tokenizer, set())


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_a_template_takes_the_date_that_it_is_given_for_today(tokenizer, name):
    tokenizer.chat_template = template_of(name)
    date = datetime(1999, 12, 31)
    (ids,) = encode_rows([{"prompt": MESSAGES}], tokenizer, set(), date=date)["prompt_ids"]
    assert any(each in tokenizer.decode(ids) for each in ("31 Dec 1999", "1999-12-31"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "[oops"}, "`tools` is not JSON"),
        ({"tools": '{"name": "a"}'}, "`tools` must be a list"),
        ({"chat_template_kwargs": "a"}, "`chat_template_kwargs` must be a dict"),
    ],
)
def test_what_goes_with_messages_is_refused_by_its_name(tokenizer, row, message):
    with pytest.raises(ValueError, match=f"^Row 0: {message}"):
        encode(tokenizer, prompt=MESSAGES, **row)


def test_an_error_in_the_code_of_a_template_is_one_of_the_row(tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{{ 'a' + 1 }}{% endfor %}"
    with pytest.raises(ValueError, match="^Row 0: The chat template refuses the messages .* can only concatenate"):
        encode(tokenizer, prompt=MESSAGES)


@pytest.mark.parametrize("prompt", ["What is 2+2?", MESSAGES], ids=["standard", "conversational"])
def test_both_kinds_of_datasets_are_accepted(tokenizer, prompt):
    check_prompts(Dataset.from_dict({"prompt": [prompt]}), tokenizer)


def test_messages_without_a_chat_template_are_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="conversational, but the expert's tokenizer has no chat template"):
        check_prompts(Dataset.from_dict({"prompt": [MESSAGES]}), tokenizer)


def test_text_needs_no_chat_template(tokenizer):
    tokenizer.chat_template = None
    check_prompts(Dataset.from_dict({"prompt": ["What is 2+2?"]}), tokenizer)


def test_a_missing_prompt_column_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"no `prompt` column; it has 'question'\."):
        check_prompts(Dataset.from_dict({"question": ["What is 2+2?"]}), tokenizer)


def test_an_empty_dataset_is_refused(tokenizer):
    with pytest.raises(ValueError, match="The dataset is empty"):
        check_prompts(Dataset.from_dict({"prompt": []}), tokenizer)


def test_a_dataset_dict_is_refused_with_a_hint(tokenizer):
    dataset = DatasetDict({"train": Dataset.from_dict({"prompt": ["What is 2+2?"]})})
    with pytest.raises(TypeError, match=r"got `DatasetDict`. Choose a split, such as `dataset\['train'\]`"):
        check_prompts(dataset, tokenizer)


@pytest.mark.parametrize("dataset", [[{"prompt": "2+2="}], "gsm8k", None], ids=["list", "str", "None"])
def test_what_is_no_dataset_is_refused(tokenizer, dataset):
    with pytest.raises(TypeError, match="must be a `datasets.Dataset`"):
        check_prompts(dataset, tokenizer)


def test_a_streamed_dataset_is_refused(tokenizer):
    dataset = Dataset.from_dict({"prompt": ["What is 2+2?"]}).to_iterable_dataset()
    with pytest.raises(TypeError, match="got `IterableDataset`"):
        check_prompts(dataset, tokenizer)
