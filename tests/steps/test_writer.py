"""Which rows the folder of a run takes, and what it says of those that it does not take."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from trl_lightreasoner.steps.dataset import raise_beta
from trl_lightreasoner.steps.splits import load_split
from trl_lightreasoner.steps.training_rows import prepare_rows
from trl_lightreasoner.steps.writer import StepWriter
from trl_lightreasoner.vocabulary import Vocabulary


pytestmark = pytest.mark.usefixtures("propagated_logs")

INPUT = Dataset.from_dict({"prompt": [f"question {i}" for i in range(8)]})
ROWS = set(range(8))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "steps"


def columns_of(rows, sign=1):
    """Made-up results, which tell their row and, by their sign, who made them."""
    return {
        "prompt_ids": [[i] for i in rows],
        "completion_ids": [[sign * i, i + 1] for i in rows],
        "kl_divergence": [[0.5, 1.5] for _ in rows],
        "step_positions": [[1] for _ in rows],
        "label_ids": [[[i]] for i in rows],
        "label_probs": [[[1.0]] for _ in rows],
        "completion": [f"answer {i}" for i in rows],
    }


def open_run(folder, beta=0.4, done=(), **kwargs) -> StepWriter:
    writer = StepWriter(str(folder), INPUT, **kwargs)
    assert writer.open({"beta": beta}, {"settings": {"beta": beta}}) == set(done)
    return writer


def joined(main: StepWriter) -> StepWriter:
    """Another process of the run of `main`."""
    writer = StepWriter(str(main.folder), INPUT)
    writer.join(main.opening)
    return writer


def write(writer, *batches, sign=1):
    for rows in batches:
        writer.write(list(rows), columns_of(rows, sign))


def finish(writer) -> list[list[int]]:
    writer.finish(ROWS)
    writer.close()
    return writer.load()["completion_ids"][:]


EXPECTED = columns_of(range(8))["completion_ids"]


def finished(folder) -> list[list[int]]:
    writer = open_run(folder)
    write(writer, range(8))
    return finish(writer)


# Who writes


def test_a_process_that_is_left_over_is_refused_when_it_writes(folder):
    main = open_run(folder)
    left_over = joined(main)
    write(left_over, [2, 3])
    main.close()  # killed
    again = open_run(folder, done=[2, 3])
    with pytest.raises(ValueError, match="steps' was begun again while this run was writing into it"):
        write(left_over, [6, 7], sign=-1)
    write(again, [0, 1, 4], [5, 6, 7])
    assert finish(again) == EXPECTED


def test_a_process_that_is_left_over_cannot_join_a_later_run(folder):
    main = open_run(folder)
    main.close()  # killed before the other process has joined
    again = open_run(folder)
    with pytest.raises(ValueError, match="steps' was begun again while this run was writing into it"):
        joined(main)
    write(again, range(8))
    assert finish(again) == EXPECTED


def test_what_a_left_over_process_wrote_all_the_same_is_not_taken(folder, monkeypatch, caplog):
    main = open_run(folder)
    left_over = joined(main)
    main.close()
    again = open_run(folder)
    monkeypatch.setattr(left_over, "_check_opening", lambda: None)  # it came between the check and the rename
    write(left_over, [6, 7], sign=-1)
    write(again, [0, 1, 4], [2, 3], [5, 6, 7])
    assert finish(again) == EXPECTED
    assert "000000006-" in caplog.text and "is damaged or from another run. It is skipped." in caplog.text


def test_rows_that_two_shards_hold_at_the_start_count_once(folder, monkeypatch, caplog):
    main = open_run(folder)
    left_over = joined(main)
    main.close()
    killed = open_run(folder)
    monkeypatch.setattr(left_over, "_check_opening", lambda: None)
    write(left_over, [6, 7])
    write(killed, [5, 6])
    killed.close()
    again = open_run(folder, done=[5, 6])
    assert "is there twice. Its rows are sampled again." in caplog.text
    write(again, [0, 1, 2, 3, 4, 7])
    assert finish(again) == EXPECTED


def test_a_run_whose_folder_was_removed_and_begun_again_writes_nothing_into_it(folder):
    first = open_run(folder)
    write(first, [0, 1])
    shutil.rmtree(folder)
    other = open_run(folder, beta=0.8)
    for work in (lambda: write(first, [2, 3], sign=-1), lambda: first.finish({0, 1})):
        with pytest.raises(ValueError, match="begun again"):
            work()
    write(other, range(8))
    assert finish(other) == EXPECTED


def test_a_run_whose_folder_was_removed_and_finished_by_another_does_not_give_its_rows_back(folder):
    first = open_run(folder)
    shutil.rmtree(folder)
    other = open_run(folder, beta=0.8)
    write(other, range(8))
    finish(other)
    with pytest.raises(ValueError, match="begun again"):
        first.finish(ROWS)


def test_a_run_whose_folder_is_gone_says_so(folder):
    writer = open_run(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="steps' was removed while this run was writing into it"):
        write(writer, [2, 3])


# Which shards


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_a_shard_under_another_number_is_left_out(when, folder, caplog):
    writer = open_run(folder)
    write(writer, range(4))
    (shard,) = (folder / "shards").iterdir()
    copy = shard.with_name(shard.name.replace("000000000", "000000004"))
    if when == "before":
        writer.close()
        shutil.copy(shard, copy)
        writer = open_run(folder, done=range(4))
    else:
        shutil.copy(shard, copy)
    write(writer, range(4, 8))
    assert finish(writer) == EXPECTED
    assert f"{copy} is damaged" in caplog.text


def test_a_shard_of_another_folder_is_made_again(folder, tmp_path):
    other = open_run(tmp_path / "other", beta=0.8)
    write(other, [0, 1], sign=-1)
    writer = open_run(folder)
    write(writer, [2, 3])
    writer.close()
    shutil.copytree(tmp_path / "other" / "shards", folder / "shards", dirs_exist_ok=True)
    again = open_run(folder, done=[2, 3])
    write(again, [0, 1], range(4, 8))
    assert finish(again) == EXPECTED


def test_a_shard_that_is_damaged_while_the_run_goes_on_is_missed_at_its_end(folder):
    writer = open_run(folder)
    write(writer, range(4), range(4, 8))
    shard = sorted((folder / "shards").iterdir())[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        ValueError, match="4 of 8 rows are missing .* first row 0.*rerun the same command to sample the missing rows"
    ):
        writer.finish(ROWS)


def test_rows_that_are_there_twice_are_refused(folder):
    writer = open_run(folder)
    write(writer, range(4), range(3, 8))
    with pytest.raises(ValueError, match="1 rows are duplicated in .*shards'. Delete"):
        writer.finish(ROWS)
    assert len(list((folder / "shards").iterdir())) == 2


# What the finished Dataset is checked by


def test_no_flipped_bit_of_a_finished_dataset_is_read(folder):
    finished(folder)
    (data,) = (folder / "data").iterdir()
    expected = load_split(str(folder), None, "train").to_list()
    for path in (data, folder / "run.json"):
        content = path.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 40)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 7
            path.write_bytes(damaged)
            try:
                assert load_split(str(folder), None, "train").to_list() == expected  # white space, or a name's letter
                assert path.name == "run.json"
            except ValueError as error:
                assert "damaged" in str(error) and str(path) in str(error)
        path.write_bytes(content)
    assert load_split(str(folder), None, "train").to_list() == expected


def test_a_file_of_a_finished_dataset_that_is_gone_is_named(folder):
    finished(folder)
    (data,) = (folder / "data").iterdir()
    data.rename(folder / "data" / "moved.parquet")
    with pytest.raises(ValueError, match=f"'{data}' is missing. Rerun the command"):
        load_split(str(folder), None, "train")


RUN_FILES = {
    "empty": b"",
    "cut": b'{"identity": {"be',
    "a list": b"[]",
    "null": b"null",
    "no text": b"\xff\xfe\x00",
    "files as a list": b'{"files": ["a"]}',
    "metadata as text": b'{"metadata": "a"}',
    "too deep": b"[" * 200_000,
    "another checksum": b'{"identity": {}, "checksum": "0"}',
    "a file outside": b'{"files": {"../../other.parquet": "0"}}',
    "an absolute name": b'{"files": {"/etc/hostname": "0"}}',
}


@pytest.mark.parametrize("content", RUN_FILES.values(), ids=RUN_FILES.keys())
def test_a_damaged_run_file_is_named(content, folder):
    finished(folder)
    (folder / "run.json").write_bytes(content)
    writer = StepWriter(str(folder), INPUT)
    for work in (lambda: load_split(str(folder), None, "train"), lambda: writer.open({"beta": 0.4}, {})):
        with pytest.raises(ValueError, match=r"steps/run.json' is damaged: .*overwrite_output_dir=True") as error:
            work()
        assert "\n" not in str(error.value)
    writer.close()
    assert finish(write_all(open_run(folder, overwrite=True))) == EXPECTED


def write_all(writer: StepWriter) -> StepWriter:
    write(writer, range(8))
    return writer


def test_a_run_file_of_somebody_else_says_nothing(folder):
    (folder / "data").mkdir(parents=True)
    INPUT.to_parquet(folder / "data" / "train.parquet")
    (folder / "run.json").write_text(json.dumps({"settings": {"files": 3}}))
    assert load_split(str(folder), None, "train").to_list() == INPUT.to_list()


# Disks


@pytest.mark.parametrize("place", ["to_parquet", "from_parquet", "replace"])
def test_a_disk_that_fills_up_at_the_end_leaves_what_can_be_finished(place, folder, monkeypatch):
    writer = write_all(open_run(folder))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if place == "replace" else Dataset, place, full)
        with pytest.raises(OSError, match=r"^Cannot (finish|write to) '.*steps' \(No space left on device\)"):
            writer.finish(ROWS)
    assert not (folder / "merging").exists() and not (folder / "data").exists()
    assert not list(folder.glob("*.tmp"))
    writer.close()
    assert finish(open_run(folder, done=ROWS)) == EXPECTED


def test_too_little_room_is_said_beforehand(folder, monkeypatch):
    writer = write_all(open_run(folder))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(OSError, match="steps' takes 0.01 MB, but only 0.00 MB are free. All rows are kept"):
            writer.finish(ROWS)
    assert finish(writer) == EXPECTED


def test_a_finished_dataset_on_a_read_only_disk_is_given_back(folder, monkeypatch):
    finished(folder)

    def read_only(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder / ".lock"))

    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    again = StepWriter(str(folder), INPUT)
    again.lock.acquire = read_only
    assert again.open({"beta": 0.4}, {}) == ROWS
    assert finish(again) == EXPECTED
    (folder / "run.json").unlink()
    with pytest.raises(OSError, match="^Cannot write to .*steps' "):
        StepWriter(str(folder), INPUT, overwrite=True)


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    finished(folder)
    (tmp_path / "file").write_text("")
    full = OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "elsewhere" / "parquet"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "elsewhere")

    def refuse(*_, **__):
        raise full

    monkeypatch.setattr("datasets.builder.DatasetBuilder.download_and_prepare", refuse)
    for work in (open_run(folder, done=ROWS).load, lambda: load_split(str(folder), None, "train")):
        with pytest.raises(ValueError, match=r"cache of `datasets`, '.*elsewhere', cannot be written \(Read-only"):
            work()


def test_rows_that_were_saved_to_a_read_only_disk_are_prepared_in_memory(folder, tmp_path, monkeypatch):
    finished(folder)
    load_split(str(folder), None, "train").save_to_disk(tmp_path / "saved")
    before = set((tmp_path / "saved").iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    saved = load_split(str(tmp_path / "saved"), None, "train")
    rows = prepare_rows(saved, "train", Vocabulary(list(range(16))), 16, None, one_step_per_row=False)
    assert raise_beta(saved, 0.4)["step_positions"][:] == rows["step_positions"][:] == [[1]] * 8
    assert set((tmp_path / "saved").iterdir()) == before


def test_a_folder_without_room_for_prepared_rows_is_named(folder, monkeypatch):
    finished(folder)
    rows = load_split(str(folder), None, "train")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    monkeypatch.setattr(Dataset, "map", full)
    with pytest.raises(ValueError, match=r"'.*cache.*parquet.*', cannot be written \(No space left on device\)"):
        raise_beta(rows, 0.5)
