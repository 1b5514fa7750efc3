"""An exploration: every setting is what it says, and none is done twice or left out."""

import fcntl
import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def explore():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("explore")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def argv(tmp_path, expert_path, amateur_path):
    rows = [{"question": f"What is {a}+{a + 1}?", "answer": f"#### {2 * a + 1}"} for a in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--expert", expert_path, "--amateur", amateur_path, "--dataset_name", str(tmp_path / "train.jsonl")]
    argv += ["--settings", str(tmp_path / "settings.jsonl"), "--num_held_out", "4", "--max_new_tokens", "8"]
    return argv + ["--dtype", "float32", "--output_dir", str(tmp_path / "log")]


def write(argv, *settings):
    few = {
        "num_prompts": 4,
        "sampling": {"max_new_tokens": 6, "beta": 0.01},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "beta": 0.0, "logging_steps": 1},
    }
    lines = [{**few, **each, **{key: {**few[key], **each.get(key, {})} for key in list(few)[1:]}} for each in settings]
    Path(argv[argv.index("--settings") + 1]).write_text("\n".join(map(json.dumps, lines)))


def test_each_setting_is_a_result_and_a_line_of_the_table(explore, argv, capsys):
    settings = [
        {"name": "plain"},
        {"name": "two rounds", "rounds": 2, "prompt_style": "raw"},
        {"name": "two bits", "amateur": "rounded to 2 bits"},
        {"name": "careless", "amateur": None, "sampling": {"amateur_system_prompt": "Just answer.", "beta": 0.0}},
        {"name": "one-hot", "label": "one-hot", "lora": {"target_modules": "all-linear"}},
        {"name": "anchored", "label": "anchored"},
    ]
    write(argv, *settings)
    log = explore.main(argv)
    assert [entry["name"] for entry in log] == [setting["name"] for setting in settings]
    assert all(entry["kept_steps"] > 0 for entry in log)
    folder = Path(argv[argv.index("--output_dir") + 1])
    assert (folder / "two rounds-raw-0" / "adapter-1" / "adapter_config.json").exists()
    text = capsys.readouterr().out
    assert text.strip() == (folder / "table.md").read_text().strip()
    lines = text.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith(("| chat", "| raw"))] == ["| chat", "| raw"]
    assert len([line for line in lines if line.startswith("| ")]) == 2 * 2 + len(settings)
    assert any(line.startswith("| two rounds: {") and '"rounds": 2' in line for line in lines)


def test_a_result_is_not_made_again(explore, argv, monkeypatch):
    write(argv, {"name": "plain"})
    before = explore.main(argv)
    write(argv, {"name": "plain"}, {"name": "more", "training": {"max_steps": 3}})
    names = []
    run = explore.Exploration.run
    monkeypatch.setattr(
        explore.Exploration, "run", lambda self, setting: names.append(setting.name) or run(self, setting)
    )
    assert explore.main(argv)[0] == before[0]
    assert names == ["more"]
    write(argv, {"name": "plain", "training": {"max_steps": 4}})
    with pytest.raises(ValueError, match="holds another setting of the name 'plain'"):
        explore.main(argv)


def test_what_another_process_is_at_is_left_to_it(explore, tmp_path):
    work = explore.Work(tmp_path)
    with (tmp_path / "piece.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert work.result("piece", lambda: {"made": 1}, waits=False) is None
    assert work.result("piece", lambda: {"made": 2}) == {"made": 2}
    assert work.result("piece", lambda: {"made": 3}) == {"made": 2}


def test_the_first_setting_and_the_best_of_the_others_are_finalists(explore):
    base = {"chat": {"correct": {"held_out": [True, False, False, False]}}}
    verdicts = {"default": [1, 0, 0, 0], "worse": [0, 0, 0, 0], "best": [1, 1, 1, 0], "better": [1, 1, 0, 0]}
    settings = [explore.Setting(name) for name in verdicts]
    log = [
        {"name": name, "prompt_style": "chat", "correct": {"held_out": list(map(bool, correct))}}
        for name, correct in verdicts.items()
    ]
    assert [each.name for each in explore.choose(settings, log, base, 2)] == ["default", "best", "better"]


def test_anchored_labels_are_corrections_and_the_experts_own_elsewhere(explore):
    columns = {"prompt_ids": [[1], [2]], "completion_ids": [[5, 6, 7], [5, 6, 7]]}
    columns["kl_divergence"] = [[0.1, 2.0, 0.5], [0.1, 0.2, 0.5]]

    def steps(positions, token):
        labels = [[[token]] * len(each) for each in positions]
        probs = [[[1.0]] * len(each) for each in positions]
        return Dataset.from_dict({**columns, "step_positions": positions, "label_ids": labels, "label_probs": probs})

    rows = explore.anchored(steps([[1, 2], [2]], 9), steps([[0, 1, 2], [0, 1, 2]], 8))
    assert rows["step_positions"][:] == [[0, 1, 2], []]
    assert rows["label_ids"][0] == [[8], [9], [8]]


def test_rounded_weights_have_so_many_values_in_a_group(explore, expert):
    copied = explore.rounded(expert, bits=3)
    weights = copied.model.layers[0].mlp.up_proj.weight.reshape(-1, 64)
    assert max(len(group.unique()) for group in weights) <= 7
    original = expert.model.layers[0].mlp.up_proj.weight.reshape(-1, 64)
    step = original.abs().amax(-1, keepdim=True) / 3
    assert ((weights - original).abs() <= step / 2 + 1e-6).all()
    assert torch.equal(copied.lm_head.weight, expert.lm_head.weight)


def test_gains_are_means_over_seeds_and_sets_with_errors_over_questions(explore):
    base = {"correct": {"one": [True, False, False, False], "two": [False, True]}}
    entries = [
        {"correct": {"one": [True, True, True, False], "two": [True, True]}},
        {"correct": {"one": [True, True, False, False], "two": [True, True]}},
    ]
    gains = explore.gain(entries, base)
    differences = [0, 1, 0.5, 0]  # of the means over both seeds, 1, 1, 0.5 and 0
    one = (statistics.mean(differences), statistics.stdev(differences) / 2)
    two = (0.5, statistics.stdev([1, 0]) / 2**0.5)
    assert gains["one"] == pytest.approx(one)
    assert gains["two"] == pytest.approx(two)
    assert gains["average"] == pytest.approx(((one[0] + two[0]) / 2, (one[1] ** 2 + two[1] ** 2) ** 0.5 / 2))
