"""The benchmarks measure what they say: the baseline is the method, differences are found, nothing is left out."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config

from trl_lightreasoner.contrast import contrastive_loss
from trl_lightreasoner.generation.greedy import generate_greedy
from trl_lightreasoner.sampling.scoring import Trajectory, score_trajectories
from trl_lightreasoner.steps.training_rows import prepare_rows
from trl_lightreasoner.vocabulary import Vocabulary


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GOLDEN = Path(__file__).parents[1] / "data" / "sampling_golden"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def published(_importable):
    return importlib.import_module("published")


@pytest.fixture(scope="module")
def speed(_importable):
    return importlib.import_module("speed")


@pytest.fixture(scope="module")
def golden(tmp_path_factory, speed):
    """The golden pair, whose tokenizer loses nothing on the way through text, and what it samples."""
    folder = tmp_path_factory.mktemp("golden")
    args = speed.make_parser().parse_args(
        ["--expert", str(GOLDEN / "expert"), "--amateur", str(GOLDEN / "amateur"), "--output_dir", str(folder)]
        + ["--max_new_tokens", "24"]
    )
    pair = speed.Pair(args)
    questions = [json.loads(line)["question"] for line in (GOLDEN / "prompts.jsonl").read_text().splitlines()]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in questions[:4]])
    return pair, prompts, pair.sample(prompts).result


def test_the_published_way_keeps_the_same_steps(golden, published):
    pair, prompts, dataset = golden
    rows = published.sample(pair.expert, pair.amateur, pair.tokenizer, prompts["prompt"], max_new_tokens=24).result
    theirs = {(row["prompt"][0]["content"], row["step"]): row for row in rows}
    ours = {
        (row["prompt"][0]["content"], t): (row["kl_divergence"][t], dict(zip(ids, probs, strict=True)))
        for row in dataset
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True)
        if t > 0  # which the published way leaves out
    }
    assert len(ours) > 20
    assert theirs.keys() == ours.keys()
    for key, (divergence, label) in ours.items():
        assert theirs[key]["kl_divergence"] == pytest.approx(divergence, rel=1e-4, abs=1e-5)
        expected = dict(zip(theirs[key]["token_ids"], theirs[key]["weights"], strict=True))
        assert label == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_published_training_has_the_right_loss(golden, published):
    pair, _, dataset = golden
    expert = copy.deepcopy(pair.expert)
    rows = published.one_step_rows(dataset, pair.tokenizer)[:16]  # one update, so that order does not matter
    expected = []
    for row in dataset:
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            with torch.no_grad():
                logits = expert(torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])).logits[:, -1]
            loss = contrastive_loss(pair.vocabulary.select(logits), torch.tensor([ids]), torch.tensor([probs]))
            expected.append(loss.kl_divergence.item())
    model = get_peft_model(expert, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    measured = published.train(model, pair.tokenizer, rows, updates=1)
    assert len(measured.result) == 2
    assert measured.result[0] == pytest.approx(sum(expected[:16]) / 16, abs=1e-4)  # it is logged with four digits


def test_a_dataset_equals_itself(golden, speed):
    pair, _, dataset = golden
    quality = speed.compare(pair, dataset)
    assert quality["completions_alike"] == quality["problems"] == len(dataset)
    assert quality["kept_steps"] == quality["kept_steps_alike"] == quality["supports_alike"] > 20
    assert quality["largest_label_difference"] < 1e-4
    assert quality["largest_kl_difference"] < 1e-4


def test_planted_differences_are_found(golden, speed):
    pair, _, dataset = golden
    rows = dataset.to_list()
    plain = speed.compare(pair, dataset)
    rows[0]["step_positions"].pop()
    rows[0]["label_ids"].pop()
    rows[0]["label_probs"].pop()
    support = next(probs for probs in rows[1]["label_probs"] if len(probs) > 1)
    support[0], support[1] = support[0] - 0.01, support[1] + 0.01
    # The least probable token instead of the last one
    context = torch.tensor([rows[2]["prompt_ids"] + rows[2]["completion_ids"][:-1]])
    logits = pair.vocabulary.select(pair.expert(context).logits[0, -1])
    rows[2]["completion_ids"][-1] = logits.argmin().item()
    quality = speed.compare(pair, Dataset.from_list(rows, features=dataset.features))
    assert quality["kept_steps_alike"] == plain["kept_steps_alike"] - 1
    assert quality["largest_label_difference"] == pytest.approx(0.01, rel=1e-3)
    assert quality["completions_alike"] == plain["completions_alike"] - 1
    assert quality["near_ties"] == 0
    assert quality["largest_gap"] == pytest.approx((logits.max() - logits.min()).item(), rel=1e-3)


def test_padding_share(speed):
    assert speed.padding_share([4, 2, 3], [[0, 1], [2]]) == pytest.approx(2 / 11)
    assert speed.padding_share([4, 4], [[0, 1]]) == 0


def test_the_first_update_is_not_timed(speed):
    # 5 s for the first of four updates, then 1, 3 and 1, and 2 s until all is over; it held a quarter of the steps
    assert speed.pace(10.0, [15.0, 16.0, 19.0, 20.0], 22.0, 80, 0.25) == (60 / 7, 1.0)
    assert speed.pace(10.0, [14.0], 15.0, 80, 1.0) == (16.0, 4.0)


def test_it_runs_whole(speed, tmp_path, expert_path, amateur_path, prompts, capsys):
    prompts.rename_column("prompt", "question").to_json(tmp_path / "prompts.jsonl")
    argv = ["--expert", expert_path, "--amateur", amateur_path, "--dataset_name", str(tmp_path / "prompts.jsonl")]
    argv += ["--prompt_column", "question", "--system_prompt", "Think.", "--num_problems", "8"]
    argv += ["--max_new_tokens", "8", "--train_rows", "4", "--train_share", "0.25", "--check_problems", "3"]
    argv += ["--baseline_problems", "1", "--baseline_updates", "1", "--sizes", "2", "7", "--output_dir", str(tmp_path)]
    argv += ["--batch_sizes", "3", "--update_rows", "1", "4"]
    results = speed.main(argv)
    assert json.loads((tmp_path / "speed.json").read_text()) == results
    printed = capsys.readouterr().out
    assert (results["problems"], results["different_problems"]) == (8, 6)
    assert results["kept_steps"] == pytest.approx(results["steps"] / 4, abs=2)
    for key, digits in (("sample_s", 1), ("train_steps_per_s", 1), ("whole_s", 1)):
        cells = [f"{results[way][key]:,.{digits}f}" for way in ("published", "ours")]
        assert f"| {cells[0]} | {cells[1]} |" in printed
    assert [size["problems"] for size in results["sizes"]] == [2, 7]
    assert f"| 7 | {results['sizes'][1]['kept_steps']} |" in printed
    assert "6 problems are repeated to 8" in printed and "6 problems are repeated to 7" in printed
    assert "3 problems done again" in printed
    assert [batch["prompts"] for batch in results["batch_sizes"]] == [3]
    assert f"| 3 | {results['batch_sizes'][0]['sample_s']:.1f} |" in printed
    one, four = results["update_rows"]
    assert (one["rows"], four["rows"]) == (1, 4)
    assert f"| 4 | {four['update_s']:.3f} | {four['train_steps_per_s']:,.0f} |" in printed


def test_a_random_pair_is_like_a_real_one(_importable, tmp_path, tokenizer):
    random_pair = importlib.import_module("random_pair")
    folder = tmp_path / "config"
    tokenizer.save_pretrained(folder)
    Qwen2Config(
        vocab_size=5000,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    random_pair.main(
        ["--expert", str(folder), "--output_dir", str(tmp_path), "--num_rows", "2"]
        + ["--amateur_config", '{"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3}']
    )
    expert, amateur = (random_pair.AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("expert", "amateur"))
    assert (expert.config.hidden_size, amateur.config.hidden_size) == (384, 256)
    assert len(amateur.config.layer_types) == amateur.config.num_hidden_layers == 3
    vocabulary = Vocabulary(list(range(5000)))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5000, (8, 40), generator=generator).tolist()
    completions = generate_greedy(expert, prompts, vocabulary, [], 32)
    assert len({tuple(ids) for ids in completions}) == 8
    assert sum(len(set(ids)) for ids in completions) > 8 * 16  # no token over and over
    trajectories = [Trajectory(*ids) for ids in zip(prompts, completions, strict=True)]
    scores = score_trajectories(expert, amateur, trajectories, vocabulary, alpha=0.2, beta=0.4)
    supports = [len(ids) for score in scores for ids in score.label_ids]
    assert 0.04 < len(supports) / (8 * 32) < 0.3
    assert 1 <= sum(supports) / len(supports) < 4


def test_the_random_steps_can_be_trained_on(_importable):
    random_pair = importlib.import_module("random_pair")
    rows = random_pair.random_steps(3, 300)
    assert len(prepare_rows(rows, "train", Vocabulary(list(range(300))), 300, None, False)) == 3


def test_scaling_compares_runs(_importable, tmp_path, expert_path, amateur_path, prompts, capsys, monkeypatch):
    scaling = importlib.import_module("scaling")
    prompts.to_json(tmp_path / "prompts.jsonl")
    argv = ["--expert", expert_path, "--amateur", amateur_path, "--dataset_name", str(tmp_path / "prompts.jsonl")]
    argv += ["--num_problems", "6", "--max_new_tokens", "4", "--train_share", "0.5", "--output_dir", str(tmp_path)]
    started = []

    def start(command, env, check):
        started.append(command)
        scaling.work(command[command.index("--process") + 1 :])
        result = json.loads((tmp_path / "1.json").read_text())
        if len(started) == 2:
            halved = {"processes": 2, "sample_s": result["sample_s"] / 2, "train_s": result["train_s"] / 4}
            (tmp_path / "2.json").write_text(json.dumps({**result, **halved}))

    monkeypatch.setattr(scaling.subprocess, "run", start)
    scaling.main([*argv, "--num_processes", "2"])
    assert ["torch.distributed.run" in command for command in started] == [False, True]
    one, two = json.loads((tmp_path / "scaling.json").read_text())
    assert one["kept_steps"] == two["kept_steps"] > 0
    *_, last = capsys.readouterr().out.splitlines()
    ratios = [one[key] / two[key] for key in ("sample_s", "train_s")]
    assert last.startswith(f"| 2 | {two['sample_s']:.1f} | {ratios[0]:.2f} |") and f"| {ratios[1]:.2f} |" in last
