"""The log of an exploration: every setting is what it says, and none is done twice or left out."""

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
    few = {"num_problems": 6, "max_new_tokens": 6, "updates": 2, "rows": 2, "beta": 0.01}
    Path(argv[argv.index("--settings") + 1]).write_text("\n".join(json.dumps({**few, **each}) for each in settings))


def test_each_setting_is_a_line_of_the_log_and_of_the_table(explore, argv, capsys):
    settings = [
        {"name": "plain"},
        {"name": "two rounds", "rounds": 2, "prompt_style": "raw"},
        {"name": "two bits", "amateur": "rounded to 2 bits"},
        {"name": "careless", "amateur": "careless prompt"},
        {"name": "careless, raw", "amateur": "careless prompt", "prompt_style": "raw"},
        {"name": "one-hot", "label": "one-hot", "lora": "all"},
    ]
    write(argv, *settings)
    log = explore.main(argv)
    assert [entry["name"] for entry in log] == [setting["name"] for setting in settings]
    assert all(entry["kept_steps"] > 0 for entry in log)
    folder = Path(argv[argv.index("--output_dir") + 1])
    assert all((folder / entry["name"] / "adapter" / "adapter_config.json").exists() for entry in log)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| expert, chat, 4 problems", "| expert, raw, 4 problems"]
    assert len(lines) == 2 + 2 + len(settings)
    assert "amateur careless prompt" in lines[7] and "rounds 2" in lines[5]


def test_what_is_in_the_log_is_not_done_again(explore, argv, monkeypatch):
    write(argv, {"name": "plain"})
    before = explore.main(argv)
    write(argv, {"name": "plain"}, {"name": "more", "updates": 3})
    names = []
    run = explore.Exploration.run
    monkeypatch.setattr(
        explore.Exploration, "run", lambda self, setting: names.append(setting.name) or run(self, setting)
    )
    assert explore.main(argv)[0] == before[0]
    assert names == ["more"]
    write(argv, {"name": "plain", "updates": 4})
    with pytest.raises(ValueError, match="holds another setting of the name 'plain'"):
        explore.main(argv)


def test_rounded_weights_have_so_many_values_in_a_group(explore, expert):
    copied = explore.rounded(expert, bits=3)
    weights = copied.model.layers[0].mlp.up_proj.weight.reshape(-1, 64)
    assert max(len(group.unique()) for group in weights) <= 7
    original = expert.model.layers[0].mlp.up_proj.weight.reshape(-1, 64)
    step = original.abs().amax(-1, keepdim=True) / 3
    assert ((weights - original).abs() <= step / 2 + 1e-6).all()
    assert torch.equal(copied.lm_head.weight, expert.lm_head.weight)


def test_labels_are_compared_question_by_question_over_their_seeds(explore, tmp_path):
    verdicts = {
        ("contrast", 0): [1, 1, 1, 0],
        ("contrast", 1): [1, 1, 0, 0],
        ("one-hot", 0): [1, 0, 0, 0],
        ("one-hot", 1): [1, 0, 0, 1],
        ("one-hot", 2): [1, 1, 1, 1],  # without its counterpart
    }
    log = []
    for (label, seed), correct in verdicts.items():
        setting = explore.Setting(f"{label} {seed}", beta=1.6, label=label, seed=seed)
        log.append(vars(setting))
        Dataset.from_dict({"correct": list(map(bool, correct))}).to_parquet(
            tmp_path / setting.name / "chat" / "model" / "gsm8k.parquet"
        )
    log.append(vars(explore.Setting("one-hot 0", label="one-hot")))  # of another beta
    bases = {"chat": {"correct": [True, False, False, False]}}

    def interval(differences: list[float]) -> str:
        mean, error = statistics.mean(differences), 1.959964 * statistics.stdev(differences) / 2
        return f"{100 * mean:+.1f} ({100 * (mean - error):+.1f} to {100 * (mean + error):+.1f})"

    # The means over both seeds are 1, 1, 0.5, 0 and 1, 0, 0, 0.5
    assert explore.label_table(log, bases, tmp_path).splitlines()[2:] == [
        f"| contrast | beta 1.6 | 2 | 62.5% | {interval([0, 1, 0.5, 0])} |  |",
        f"| one-hot | beta 1.6 | 2 | 37.5% | {interval([0, 0, 0, 0.5])} | {interval([0, 1, 0.5, -0.5])} |",
    ]
