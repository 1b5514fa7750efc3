import datetime
import errno
import json
import os

import pyarrow.parquet as pq
import pytest
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from trl_lightreasoner import sampling_metadata
from trl_lightreasoner.steps import writer as writer_module
from trl_lightreasoner.steps.dataset import STEP_FEATURES, count_steps, kl_quantiles, raise_beta
from trl_lightreasoner.steps.writer import StepWriter, describe_rows


METADATA = {"expert": {"model": "größer", "revision": None}, "settings": {"alpha": 0.2, "beta": 0.4}}
INPUT_FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "level": ClassLabel(names=["easy", "hard"]),
        "source": {"name": Value("string"), "pages": List(Value("int16"))},
        "answer": Value("float64"),
    }
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_input(rows=6):
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{i} {{}} \\frac{{1}}{{2}}"}],
                "level": i % 2 if i else None,
                "source": {"name": None if i == 1 else f"book {i}", "pages": list(range(i))} if i != 2 else None,
                "answer": None if i == 3 else i / 3,
            }
            for i in range(rows)
        ],
        features=INPUT_FEATURES,
    )


def columns_of(indices):
    """Made-up results of some rows, each of them telling its row; row 0 has no kept step."""
    return {
        "prompt_ids": [[100 + i, 5] for i in indices],
        "completion_ids": [[i, i + 1, i + 2] for i in indices],
        "kl_divergence": [[i + 0.25, 0.5, 0.125] for i in indices],
        "step_positions": [[0, 2][: min(i, 2)] for i in indices],
        "label_ids": [[[i, 7], [9]][: min(i, 2)] for i in indices],
        "label_probs": [[[0.75, 0.25], [1.0]][: min(i, 2)] for i in indices],
        "completion": [f"answer {i}" for i in indices],
    }


def write(folder, dataset, batches, **kwargs):
    writer = StepWriter(str(folder), dataset, **kwargs)
    writer.open({}, METADATA)
    for indices in batches:
        writer.write(indices, columns_of(indices))
    writer.finish({row for indices in batches for row in indices})
    writer.close()
    return writer.load()


@pytest.fixture
def made(tmp_path):
    return write(tmp_path / "steps", make_input(), [[4, 1], [5], [0, 2, 3]])


def test_rows_come_back_in_the_order_of_the_input(made):
    assert made["completion"][:] == [f"answer {i}" for i in range(6)]
    assert made["prompt_ids"][:] == [[100 + i, 5] for i in range(6)]
    assert [row[0]["content"][0] for row in made["prompt"]] == list("012345")


def test_columns_and_types_are_those_of_the_contract(made):
    assert made.features == Features(
        {
            **INPUT_FEATURES,
            "completion": Value("string"),
            "prompt_ids": List(Value("int32")),
            "completion_ids": List(Value("int32")),
            "kl_divergence": List(Value("float32")),
            "step_positions": List(Value("int32")),
            "label_ids": List(List(Value("int32"))),
            "label_probs": List(List(Value("float32"))),
            "sampling_metadata": Value("string"),
        }
    )


def test_what_is_written_comes_back(made):
    for name, values in columns_of(range(6)).items():
        assert made[name][:] == values


def test_types_do_not_depend_on_the_rows(tmp_path):
    # Nothing but empty lists, from which no type can be read off
    writer = StepWriter(str(tmp_path / "steps"), Dataset.from_dict({"prompt": ["a"]}))
    writer.open({}, METADATA)
    writer.write([0], {name: [[]] for name in STEP_FEATURES if name != "sampling_metadata"} | {"completion": [""]})
    writer.finish({0})
    features = writer.load().features
    assert {name: features[name] for name in STEP_FEATURES} == STEP_FEATURES


def test_other_columns_are_carried_along(made):
    dataset = make_input()
    for name in dataset.column_names:
        assert made[name][:] == dataset[name][:]
    assert made.features["level"].int2str(1) == "hard"


def test_a_given_completion_stays_as_it_is(tmp_path):
    messages = [[{"role": "assistant", "content": f"{i}"}] for i in range(2)]
    dataset = Dataset.from_dict({"completion": messages, "prompt": ["a", "b"]})
    writer = StepWriter(str(tmp_path / "steps"), dataset)
    writer.open({}, METADATA)
    columns = columns_of([1, 0])
    del columns["completion"]
    writer.write([1, 0], columns)
    writer.finish({0, 1})
    made = writer.load()
    assert made["completion"][:] == messages and made.features["completion"] == dataset.features["completion"]


def test_rows_that_were_left_out_are_left_out(tmp_path):
    made = write(tmp_path / "steps", make_input(), [[5, 2]])
    assert made["completion"][:] == ["answer 2", "answer 5"]


def test_a_view_of_a_dataset_is_written_as_it_is_seen(tmp_path):
    dataset = make_input().select([3, 5, 1]).with_format("numpy", columns=["level"])
    made = write(tmp_path / "steps", dataset, [[2, 0], [1]])
    assert [row[0]["content"][0] for row in made["prompt"]] == list("351")


def test_the_dataset_is_read_from_its_files(made, tmp_path):
    assert made.cache_files  # memory-mapped
    assert {path.name for path in (tmp_path / "steps").iterdir()} == {"data", "run.json", ".lock"}
    assert [path.name for path in (tmp_path / "steps" / "data").iterdir()] == ["train-00000-of-00001.parquet"]


def test_a_large_dataset_is_several_files(tmp_path, monkeypatch, made):
    monkeypatch.setattr(writer_module, "_MAX_FILE_BYTES", 500)
    split = write(tmp_path / "split", make_input(), [[4, 1], [5], [0, 2, 3]])
    assert len(list((tmp_path / "split" / "data").iterdir())) > 2
    assert split.to_list() == made.to_list()
    assert load_dataset(str(tmp_path / "split"), split="train").to_list() == made.to_list()


def through_disk(dataset, folder):
    dataset.save_to_disk(folder)
    return load_from_disk(folder)


def through_a_dict_on_disk(dataset, folder):
    DatasetDict({"train": dataset}).save_to_disk(folder)
    return load_from_disk(folder)["train"]


def through_parquet(dataset, folder):
    folder.mkdir()
    dataset.to_parquet(folder / "steps.parquet")
    return Dataset.from_parquet(str(folder / "steps.parquet"))


def through_a_repository(dataset, folder):
    (folder / "data").mkdir(parents=True)
    dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return load_dataset(str(folder), split="train")


JOURNEYS = {
    "save_to_disk": through_disk,
    "DatasetDict.save_to_disk": through_a_dict_on_disk,
    "parquet": through_parquet,
    "repository": through_a_repository,
}


@pytest.mark.parametrize("journey", JOURNEYS.values(), ids=JOURNEYS.keys())
def test_rows_types_and_metadata_survive_files(made, tmp_path, journey):
    loaded = journey(made, tmp_path / "elsewhere")
    assert loaded.to_list() == made.to_list()
    assert loaded.features == made.features
    assert sampling_metadata(loaded) == METADATA


def test_the_folder_itself_can_be_loaded(made, tmp_path):
    loaded = load_dataset(str(tmp_path / "steps"), split="train")
    assert loaded.to_list() == made.to_list() and loaded.features == made.features
    assert sampling_metadata(loaded) == METADATA


CHANGES = {
    "filter": lambda dataset: dataset.filter(lambda row: len(row["step_positions"]) > 1),
    "select": lambda dataset: dataset.select([4, 2]),
    "shuffle": lambda dataset: dataset.shuffle(seed=0),
    "concatenate": lambda dataset: concatenate_datasets([dataset.select([1]), dataset.select([0])]),
    "map": lambda dataset: dataset.map(lambda row: {"length": len(row["completion_ids"])}),
    "train_test_split": lambda dataset: dataset.train_test_split(test_size=2, seed=0)["test"],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_metadata_survives_changes(made, change):
    assert sampling_metadata(change(made)) == METADATA


def test_metadata_of_another_dataset_is_none(made):
    assert sampling_metadata(make_input()) is None
    assert sampling_metadata(made.select([])) is None


def test_metadata_is_one_json_text_in_every_row(made):
    assert set(made["sampling_metadata"]) == {json.dumps(METADATA)}


@pytest.mark.parametrize("folder", ["data", "shards"])
def test_a_folder_that_holds_a_dataset_is_refused(tmp_path, folder):
    (tmp_path / "steps" / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match="steps' holds files that are not from a run.*overwrite_output_dir=True"):
        StepWriter(str(tmp_path / "steps"), make_input())


def test_a_refused_folder_is_left_as_it_was(made, tmp_path):
    before = (tmp_path / "steps" / "data" / "train-00000-of-00001.parquet").read_bytes()
    with pytest.raises(ValueError, match="was started with beta = None, but it is now 0.4"):
        StepWriter(str(tmp_path / "steps"), make_input()).open({"beta": 0.4}, METADATA)
    assert (tmp_path / "steps" / "data" / "train-00000-of-00001.parquet").read_bytes() == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "steps").write_text("mine")
    with pytest.raises(ValueError, match="steps' is a file. Choose another `output_dir`"):
        StepWriter(str(tmp_path / "steps"), make_input(), overwrite=True)


def test_a_folder_with_other_files_is_used_and_keeps_them(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "notes.txt").write_text("mine")
    assert len(write(tmp_path / "steps", make_input(), [[1]])) == 1
    assert (tmp_path / "steps" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["st[e]ps", "st*ps", "st?ps", "~steps", "st{e}ps", "st#ps"])
def test_the_name_of_a_folder_is_no_pattern(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("steps", make_input(2), [[0, 1]])
    made = write(name, make_input(3), [[2], [0, 1]])
    assert made["completion_ids"][:] == columns_of(range(3))["completion_ids"]


def test_a_name_that_is_taken_for_a_chain_of_file_systems_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Choose another `output_dir`"):
        StepWriter(str(tmp_path / "steps::zip"), make_input())


def test_other_files_beside_the_rows_neither_damage_nor_join_them(made, tmp_path):
    (tmp_path / "steps" / "data" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "steps" / "data" / "README.md").write_text("mine")
    Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "steps" / "data" / "other.parquet")
    writer = StepWriter(str(tmp_path / "steps"), make_input())
    assert writer.open({}, METADATA) == set(range(6))
    writer.close()
    assert writer.load().to_list() == made.to_list()


def test_rows_without_checksums_are_made_again(made, tmp_path):
    run = tmp_path / "steps" / "run.json"
    begun = json.loads(run.read_text())
    run.write_text(json.dumps({name: value for name, value in begun.items() if name not in ("files", "checksum")}))
    writer = StepWriter(str(tmp_path / "steps"), make_input())
    assert writer.open({}, METADATA) == set()
    writer.close()


def test_any_column_tells_one_input_from_another():
    def columns_with(byte, day):
        return Dataset.from_dict({"of": [{"bytes": [bytes([byte]), None]}], "day": [datetime.date(2026, 1, day)]})

    described = [describe_rows(columns_with(*of)) for of in ((1, 1), (1, 1), (2, 1), (1, 2))]
    assert described[0] == described[1]
    assert len({json.dumps(each) for each in described}) == 3


def test_overwriting_replaces_the_rows(made, tmp_path):
    again = write(tmp_path / "steps", make_input(), [[3]], overwrite=True)
    assert again["completion"][:] == ["answer 3"]


def test_overwriting_deletes_nothing_before_it_is_opened(made, tmp_path):
    StepWriter(str(tmp_path / "steps"), make_input(), overwrite=True)
    assert (tmp_path / "steps" / "data" / "train-00000-of-00001.parquet").exists()


@pytest.mark.parametrize("name", [*STEP_FEATURES, "_row"])
def test_input_columns_with_our_names_are_refused(tmp_path, name):
    dataset = Dataset.from_dict({"prompt": ["a"], name: [1]})
    with pytest.raises(ValueError, match=rf"columns named \['{name}'\]"):
        StepWriter(str(tmp_path / "steps"), dataset)
    assert not (tmp_path / "steps").exists()


def test_a_batch_that_breaks_off_leaves_no_half_written_file(tmp_path, monkeypatch):
    def break_off(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = StepWriter(str(tmp_path / "steps"), make_input())
    writer.open({}, METADATA)
    writer.write([4, 1], columns_of([4, 1]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", break_off)
        with pytest.raises(OSError, match="shards' \\(No space left on device\\). Everything written before is kept"):
            writer.write([0], columns_of([0]))
    (shard,) = (tmp_path / "steps" / "shards").glob("*.parquet")
    assert pq.read_table(shard)["completion"].to_pylist() == ["answer 4", "answer 1"]
    # And writing can go on
    writer.write([0], columns_of([0]))
    writer.finish({0, 1, 4})
    assert writer.load()["completion"][:] == ["answer 0", "answer 1", "answer 4"]


def test_rows_that_are_missing_at_the_end_are_refused(tmp_path):
    writer = StepWriter(str(tmp_path / "steps"), make_input())
    writer.open({}, METADATA)
    writer.write([4, 1], columns_of([4, 1]))
    with pytest.raises(ValueError, match="2 of 4 rows are missing in .*shards', first row 0. Choose an `output_dir`"):
        writer.finish({0, 1, 3, 4})
    assert len(list((tmp_path / "steps" / "shards").glob("*.parquet"))) == 1


def test_a_folder_that_the_main_process_did_not_open_cannot_be_joined(tmp_path):
    with pytest.raises(ValueError, match="The file .*run.json' of the main process is not visible"):
        StepWriter(str(tmp_path / "steps"), make_input()).join("opening")


def test_every_batch_is_on_disk_when_it_is_written(tmp_path):
    writer = StepWriter(str(tmp_path / "steps"), make_input())
    writer.open({}, METADATA)
    for number, indices in enumerate([[4, 1], [5]], start=1):
        writer.write(indices, columns_of(indices))
        shards = list((tmp_path / "steps" / "shards").glob("*.parquet"))
        assert len(shards) == number
        (shard,) = (shard for shard in shards if shard.name.startswith(f"{min(indices):09d}"))
        assert pq.read_table(shard)["completion"].to_pylist() == [f"answer {i}" for i in indices]


def test_steps_are_counted(made):
    assert count_steps(made) == 0 + 1 + 4 * 2


def test_quantiles_are_over_every_step(made):
    values = sorted(value for row in columns_of(range(6))["kl_divergence"] for value in row)
    assert kl_quantiles(made, [0.0, 0.5, 1.0]) == [values[0], (values[8] + values[9]) / 2, values[-1]]


@pytest.mark.parametrize(
    "choose",
    [lambda made: made.select([4, 1]), lambda made: made.filter(lambda _, i: i % 2 == 1, with_indices=True)],
    ids=["selected", "filtered"],
)
def test_quantiles_are_of_the_rows_that_were_chosen(choose, made):
    chosen = choose(made)
    values = sorted(value for row in chosen for value in row["kl_divergence"])
    assert 0 < len(chosen) < len(made)
    assert kl_quantiles(chosen, [0.0, 1.0]) == [values[0], values[-1]]


@pytest.mark.parametrize("beta", [0.4, 0.5, 0.6, 9.0])
def test_raising_beta_keeps_the_steps_that_reach_it(made, beta):
    raised = raise_beta(made, beta)
    for row, before in zip(raised, made, strict=True):
        kept = [t for t in before["step_positions"] if before["kl_divergence"][t] >= beta]
        assert row["step_positions"] == kept
        place = {t: k for k, t in enumerate(before["step_positions"])}
        for name in ("label_ids", "label_probs"):
            assert row[name] == [before[name][place[t]] for t in kept]


def test_raising_beta_is_told_by_the_metadata(made):
    assert sampling_metadata(raise_beta(made, 0.6))["settings"]["beta"] == 0.6


@pytest.mark.parametrize("metadata", ["{}", "[]", '{"settings": null}', '{"settings": {"beta": "low"}}'])
def test_raising_beta_leaves_other_metadata_alone(metadata, made):
    other = made.remove_columns("sampling_metadata").add_column("sampling_metadata", [metadata] * len(made))
    raised = raise_beta(other, 0.6)
    assert raised["step_positions"][:] == raise_beta(made, 0.6)["step_positions"][:]
    if "beta" not in str(metadata):
        assert raised["sampling_metadata"][:] == [metadata] * len(made)


def test_a_higher_threshold_keeps_the_weights_of_its_steps(made):
    weights = [[float(t) for t in positions] for positions in made["step_positions"]]
    raised = raise_beta(made.add_column("step_weights", weights), 0.6)
    assert raised["step_weights"][:] == [[float(t) for t in positions] for positions in raised["step_positions"]]
    assert count_steps(raised) < count_steps(made)


def test_beta_is_lowered_for_no_row_of_several_samplings(made):
    higher = raise_beta(made, 0.6)
    for both in ([made, higher], [higher, made]):
        with pytest.raises(ValueError, match="sampled with beta = 0.6; steps below it have no label"):
            raise_beta(concatenate_datasets(both), 0.5)


def test_beta_of_all_splits_at_once_is_refused(made):
    with pytest.raises(TypeError, match=r"must be a `datasets.Dataset`, got `DatasetDict`. Choose a split"):
        raise_beta(DatasetDict({"train": made}), 0.6)


def test_beta_cannot_be_lowered(made):
    with pytest.raises(ValueError, match="sampled with beta = 0.4; steps below it have no label"):
        raise_beta(made, 0.3)
