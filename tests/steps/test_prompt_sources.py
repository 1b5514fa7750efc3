"""Lists, streams and conversations become a Dataset of prompts."""

from types import SimpleNamespace

import pytest
from datasets import Dataset, Features, IterableDataset, List, Value

from trl_lightreasoner.processes import Processes
from trl_lightreasoner.steps.prompt_sources import read_prompts, source_of, take_messages


SYSTEM, QUESTION = {"role": "system", "content": "Think."}, {"role": "user", "content": "What is 2+2?"}
ANSWER, NEXT = {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3+3?"}


def read(prompts, num_prompts=None):
    return read_prompts(prompts, num_prompts, Processes())


def stream(*rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def test_a_list_of_texts_is_taken_as_it_is():
    assert read(["one", "two", "three"])["prompt"][:] == ["one", "two", "three"]
    assert read(["one", "two", "three"], 2)["prompt"][:] == ["one", "two"]


def test_a_list_of_conversations_is_one_of_prompts():
    assert read([[SYSTEM, QUESTION], [QUESTION]])["prompt"][:] == [[SYSTEM, QUESTION], [QUESTION]]


@pytest.mark.parametrize("prompts", [["one", [QUESTION]], [QUESTION], ["one", None]])
def test_a_list_of_something_else_is_refused(prompts):
    with pytest.raises(ValueError, match="^A list of prompts must hold texts, or conversations"):
        read(prompts)


@pytest.mark.parametrize("prompts", ["one", None, {"prompt": ["one"]}])
def test_what_is_no_dataset_is_refused(prompts):
    with pytest.raises(TypeError, match="^`dataset` must be a `datasets.Dataset`"):
        read(prompts)


def test_a_dataset_is_cut_to_the_limit():
    dataset = Dataset.from_dict({"prompt": ["one", "two"], "answer": ["1", "2"]})
    assert read(dataset, 1).to_list() == [{"prompt": "one", "answer": "1"}]
    assert read(dataset, 5).to_list() == read(dataset).to_list() == dataset.to_list()


def test_a_stream_is_read_up_to_the_limit():
    seen = []

    def rows():
        for number in range(1000):
            seen.append(number)
            yield {"prompt": f"{number}+1=", "answer": number + 1}

    read_rows = read(IterableDataset.from_generator(rows), 3).to_list()
    assert read_rows == [{"prompt": f"{number}+1=", "answer": number + 1} for number in range(3)]
    assert len(seen) < 1000


def test_every_process_has_the_rows_that_the_main_one_read():
    def on_main(read):  # of another process
        return Dataset.from_dict({"prompt": ["the main one's"]})

    rows = read_prompts(stream({"prompt": "mine"}), 1, SimpleNamespace(on_main=on_main))
    assert rows["prompt"][:] == ["the main one's"]


def test_a_stream_without_a_limit_is_refused():
    with pytest.raises(ValueError, match="^The prompts are streamed.*Set `num_prompts`"):
        read(stream({"prompt": "one"}))


def test_a_stream_without_a_row_is_refused():
    with pytest.raises(ValueError, match="^The stream is empty: there is no prompt to sample"):
        read(stream(), 2)


def test_a_stream_of_texts_and_conversations_is_refused():
    with pytest.raises(ValueError, match="^A column of the streamed rows holds values of several types: .* Convert"):
        read(stream({"prompt": "one"}, {"prompt": [{"role": "user", "content": "two"}]}), 2)


def test_a_column_of_a_stream_may_begin_later():
    rows = read(stream({"prompt": "one"}, {"prompt": "two", "answer": "2"}), 2).to_list()
    assert rows == [{"prompt": "one", "answer": None}, {"prompt": "two", "answer": "2"}]


def test_a_stream_keeps_its_types_and_no_format():
    features = Features({"prompt": Value("string"), "ids": List(Value("int32"))})
    dataset = Dataset.from_dict({"prompt": ["one"], "ids": [[1]]}, features=features)
    rows = read(dataset.to_iterable_dataset().with_format("torch"), 1)
    assert rows.features == features
    assert rows.to_list() == dataset.to_list()
    assert read(dataset.to_iterable_dataset().skip(1), 1).column_names == ["prompt", "ids"]


def test_conversations_are_prompts():
    rows = read(Dataset.from_dict({"messages": [[SYSTEM, QUESTION], [QUESTION, ANSWER, NEXT]], "level": [1, 2]}))
    assert rows.to_list() == [
        {"prompt": [SYSTEM, QUESTION], "level": 1},
        {"prompt": [QUESTION, ANSWER, NEXT], "level": 2},
    ]


def test_an_answer_at_the_end_of_a_conversation_is_left_out_with_a_warning(caplog):
    dataset = Dataset.from_dict({"messages": [[QUESTION, ANSWER, NEXT, ANSWER, ANSWER], [QUESTION]]})
    assert take_messages(dataset, "messages")["prompt"][:] == [[QUESTION, ANSWER, NEXT], [QUESTION]]
    assert "'messages' end with an answer in 1 of 2 rows. It is left out" in caplog.text


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_conversations_beside_prompts_or_completions_are_not_touched(column):
    dataset = Dataset.from_dict({column: ["one"], "messages": [[QUESTION, ANSWER]]})
    assert read(dataset).to_list() == dataset.to_list()


@pytest.mark.parametrize(
    ("card", "told"), [("---\nlanguage:\n- en\n---\n", {"language": ["en"]}), ("", {}), (None, {})]
)
def test_rows_of_the_hub_are_known_by_their_commit(card, told, tmp_path, monkeypatch):
    commit, snapshots = "0123456789" * 4, tmp_path / "hub" / "datasets--Owner--A--B" / "snapshots"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "datasets" / "Owner___a--b" / "default" / "0.0.0" / commit
    folder.mkdir(parents=True)
    rows = Dataset.from_dict({"prompt": ["one", "two"]}).map(
        lambda row: row, cache_file_name=str(folder / "train.arrow"), load_from_cache_file=False
    )
    assert source_of(rows) is None  # whose they are, nothing says
    (snapshots / commit).mkdir(parents=True)
    if card is not None:
        (snapshots / commit / "README.md").write_text(card)
    assert source_of(rows.select([1])) == {"dataset": "Owner/A--B", "revision": commit, **told}


def test_rows_of_this_machine_have_no_source(tmp_path):
    Dataset.from_dict({"prompt": ["one"]}).save_to_disk(str(tmp_path / "rows"))
    assert source_of(Dataset.load_from_disk(str(tmp_path / "rows"))) is None
    assert source_of(Dataset.from_dict({"prompt": ["one"]})) is None
