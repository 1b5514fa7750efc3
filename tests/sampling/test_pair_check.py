"""Is a pair worth it? Numbers against loops written out here, verdicts of Datasets made by hand, and real models."""

import hashlib
import json
import tempfile
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler, PairCheck, check_steps
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR, as_prompt
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.generation.greedy import find_eos_ids, generate_greedy
from trl_lightreasoner.models.loading import load_model
from trl_lightreasoner.sampling.pair_check import CAVEAT, RESTS_ON
from trl_lightreasoner.sampling.pair_verdict import JUDGED_AT
from trl_lightreasoner.steps.dataset import STEP_FEATURES
from trl_lightreasoner.vocabulary import model_vocabulary

from ..conftest import QUESTIONS


EOS = 9
TEMPLATE = hashlib.sha256(b"a template").hexdigest()
NO_TEMPLATE = hashlib.sha256(b"").hexdigest()


def as_dataset(rows: list[dict], beta: float | None = 0.4, prompt="plain", **metadata) -> Dataset:
    settings = {"alpha": 0.2, "beta": beta, "include_first_step": False} | metadata.pop("settings", {})
    text = json.dumps({"settings": settings, "eos_token_ids": [EOS], "chat_template_sha256": NO_TEMPLATE} | metadata)
    kind = Value("string")
    if not isinstance(prompt, str):
        kind = List({"role": Value("string"), "content": Value("string")})
    rows = [{"prompt": prompt, "sampling_metadata": text, **row} for row in rows]
    return Dataset.from_list(rows, features=Features({"prompt": kind, **STEP_FEATURES}))


def random_rows(num_rows: int = 25, beta: float = 0.1, seed: int = 0) -> list[dict]:
    """Rows of random trajectories of unequal lengths, whose labels prefer the token that was taken or another one."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        length = int(rng.integers(5, 40))
        divergences = np.exp(rng.normal(-3, 2.5, length)).astype(np.float32).tolist()
        completion = rng.integers(0, 9, length).tolist()
        completion[-1] = EOS if i % 3 else 0
        positions = [t for t, value in enumerate(divergences) if value >= beta]
        rows.append(
            {
                "prompt_ids": [i, 2],
                "completion_ids": completion,
                "kl_divergence": divergences,
                "step_positions": positions,
                "label_ids": [[int(rng.integers(0, 4)), 8] for _ in positions],
                "label_probs": [[0.75, 0.25] for _ in positions],
            }
        )
    return rows


def pair(
    kept: float,
    changed: float,
    kl: float = 1e-3,
    high: float = 0.9,
    num_steps: int = 2000,
    beta: float = 0.4,
    **metadata,
) -> Dataset:
    """
    A Dataset with a share of steps that diverge by `high`, all others by `kl`, and of the kept ones a share at which
    v_C prefers another token.
    """
    length = 20
    num_kept = round(kept * num_steps)
    # Spread over all rows, but never the first step
    places = [i for i in range(num_steps) if i % length]
    places = sorted(places[int(j * len(places) / max(num_kept, 1))] for j in range(num_kept))
    new = set(places[: round(changed * num_kept)])
    rows = []
    for row in range(num_steps // length):
        steps = range(row * length, (row + 1) * length)
        own = [i - steps[0] for i in places if i in steps]
        kl_divergence = [high if i in places else kl for i in steps]
        own = [t for t in own if kl_divergence[t] >= beta]
        rows.append(
            {
                "prompt_ids": [row, 1],
                "completion_ids": [5] * (length - 1) + [EOS],
                "kl_divergence": kl_divergence,
                "step_positions": own,
                "label_ids": [[7 if steps[t] in new else ([5] * (length - 1) + [EOS])[t], 6] for t in own],
                "label_probs": [[0.75, 0.25] for _ in own],
            }
        )
    return as_dataset(rows, beta, **metadata)


def sizes(expert: int, amateur: int) -> dict:
    return {"expert": {"num_parameters": expert}, "amateur": {"num_parameters": amateur}}


# Numbers


@pytest.mark.parametrize("beta", [0.1, 0.4, 1.0])
def test_every_number_is_that_of_a_loop(beta):
    rows = random_rows()
    check = check_steps(as_dataset(rows, 0.1), beta=beta)
    divergences = [value for row in rows for value in row["kl_divergence"]]
    kept = [
        (row["completion_ids"][t], ids[0], t)
        for row in rows
        for t, ids in zip(row["step_positions"], row["label_ids"], strict=True)
        if row["kl_divergence"][t] >= beta
    ]
    judged = [
        (row["completion_ids"][t], ids[0])
        for row in rows
        for t, ids in zip(row["step_positions"], row["label_ids"], strict=True)
        if row["kl_divergence"][t] >= JUDGED_AT
    ]
    assert (check.num_prompts, check.num_steps, check.num_kept) == (len(rows), len(divergences), len(kept))
    assert [check.kl_50, check.kl_90, check.kl_99] == pytest.approx(np.quantile(divergences, [0.5, 0.9, 0.99]))
    assert check.kept_share == len(kept) / len(divergences)
    assert check.changed_share == sum(taken != preferred for taken, preferred, _ in kept) / len(kept)
    assert check.first_step_share == sum(t == 0 for *_, t in kept) / len(kept)
    assert check.cut_off_share == sum(row["completion_ids"][-1] != EOS for row in rows) / len(rows)
    reached = sum(value >= JUDGED_AT for row in rows for value in row["kl_divergence"][1:])
    assert check.judged_kept_share == reached / len(divergences)
    assert check.judged_changed_share == sum(a != b for a, b in judged) / len(judged)
    wider = judged if beta > JUDGED_AT else [(a, b) for a, b, _ in kept]
    expected = Counter((a, b) for a, b in wider if a != b)
    shown = [(taken, preferred) for taken, preferred, _ in check.corrections]
    assert [count for *_, count in check.corrections] == [count for _, count in expected.most_common(10)]
    assert all(expected[tuple(int(token.removeprefix("#")) for token in each)] for each in shown)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_of_two_thresholds_are_judged_from_the_higher_one(order):
    def rows_from(beta: float, seed: int) -> Dataset:
        return as_dataset(random_rows(beta=beta, seed=seed), beta)

    parts = [rows_from(0.1, seed=1), rows_from(1.0, seed=2)]
    check = check_steps(concatenate_datasets([parts[i] for i in order]))
    divergences = [value for part in parts for row in part for value in row["kl_divergence"]]
    assert check.beta == 1.0
    assert check.num_kept == sum(value >= 1.0 for value in divergences)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_steps_below_the_threshold_of_the_sampling_are_not_counted_as_kept(beta):
    dataset = concatenate_datasets([as_dataset(random_rows(beta=each), each) for each in (0.1, 0.4)])
    with pytest.raises(ValueError, match=f"sampled with beta = 0.4, so steps between {beta:g} and that have no label"):
        check_steps(dataset, beta=beta)


def test_rows_of_several_samplings_are_said_to_be():
    """What is told of each pair by itself is not told of their mixture."""
    parts = [pair(0.1, 0.3, amateur={"model": "private/a/weak"}), pair(0.1, 0.3, amateur={"model": "strong"})]
    check = check_steps(concatenate_datasets(parts))
    rows = len(parts[0])
    assert check.samplings == [f"{rows} rows with amateur a/weak", f"{rows} rows with amateur strong"]
    assert check.verdict == "doubtful" and "2 samplings" in check.reasons[0] and "a/weak" in check.summary()
    assert check_steps(parts[0]).samplings == [] and check_steps(parts[0]).promising


def test_rows_that_one_pair_has_sampled_on_two_days_are_of_one_sampling():
    parts = [pair(0.1, 0.3, amateur={"model": "a"}, date=day) for day in ("2026-11-27", "2026-11-28")]
    assert check_steps(concatenate_datasets(parts)).samplings == []


def test_each_row_is_read_by_the_settings_of_its_own_sampling():
    rows = random_rows()
    settings = [{"include_first_step": True}, {"include_first_step": False}]
    kinds = [as_dataset(rows[i::2], 0.1, settings=each, eos_token_ids=[i]) for i, each in enumerate(settings)]
    check = check_steps(concatenate_datasets(kinds))
    nats = [row["kl_divergence"] for row in rows]
    reached = [value >= JUDGED_AT for i, row in enumerate(nats) for value in row[i % 2 :]]
    assert check.judged_kept_share == sum(reached) / sum(map(len, nats))
    assert check.cut_off_share == sum(row["completion_ids"][-1] != i % 2 for i, row in enumerate(rows)) / len(rows)


def test_first_steps_count_where_they_can_be_kept():
    rows = random_rows()
    check = check_steps(as_dataset(rows, 0.1, settings={"include_first_step": True}))
    divergences = [value for row in rows for value in row["kl_divergence"]]
    assert check.judged_kept_share == sum(value >= JUDGED_AT for value in divergences) / len(divergences)


def test_a_step_a_row_gives_the_same_numbers():
    rows = random_rows()
    single = [
        {**row, **{name: [row[name][k]] for name in ("step_positions", "label_ids", "label_probs")}}
        for row in rows
        for k in range(len(row["step_positions"]))
    ]
    rows = [row for row in rows if row["step_positions"]]
    assert check_steps(as_dataset(single, 0.1)) == check_steps(as_dataset(rows, 0.1))


def test_rows_that_come_twice_keep_the_share_of_their_steps():
    rows = random_rows()
    once, twice = check_steps(as_dataset(rows, 0.1)), check_steps(as_dataset(rows + rows, 0.1))
    assert (twice.num_steps, twice.num_kept) == (2 * once.num_steps, 2 * once.num_kept)
    assert (twice.kept_share, twice.kl_90) == (once.kept_share, pytest.approx(once.kl_90, rel=0.02))


def test_two_amateurs_that_read_the_same_answers_both_count():
    rows = random_rows()
    others = [{**row, "kl_divergence": [value / 4 for value in row["kl_divergence"]]} for row in rows]
    check = check_steps(as_dataset(rows + others, 0.1))
    divergences = [value for row in rows + others for value in row["kl_divergence"]]
    assert check.num_steps == len(divergences)
    assert check.kl_50 == pytest.approx(np.median(divergences))


def test_corrections_are_found_in_labels_of_any_order():
    rows = random_rows()
    turned = [
        {**row, **{name: [part[::-1] for part in row[name]] for name in ("label_ids", "label_probs")}} for row in rows
    ]
    assert check_steps(as_dataset(turned, 0.1)).changed_share == check_steps(as_dataset(rows, 0.1)).changed_share


def test_corrections_are_told_as_text(tokenizer):
    taken, preferred = tokenizer("coins").input_ids[0], tokenizer(" has").input_ids[0]
    row = random_rows(1)[0] | {"completion_ids": [taken] * 5, "kl_divergence": [0.0, 1.0, 0.0, 2.0, 0.0]}
    row |= {"step_positions": [1, 3], "label_ids": [[preferred], [preferred]], "label_probs": [[1.0], [1.0]]}
    ((before, after, count),) = check_steps(as_dataset([row]), tokenizer).corrections
    assert before == tokenizer.decode(taken) and after == tokenizer.decode(preferred).replace(" ", "␣")
    assert count == 2


def test_no_more_than_ten_corrections_are_told():
    assert len(check_steps(as_dataset(random_rows(200), 0.1)).corrections) == 10


# Verdicts

VERDICTS = {
    # The pairs' own amateurs, and the real pair, with a chat template and with a raw prompt
    "bundled": (pair, {"kept": 0.084, "changed": 0.42, "kl": 4e-4}, "promising"),
    "own": (pair, {"kept": 0.14, "changed": 0.27, "kl": 0.002}, "promising"),
    "real, chat": (pair, {"kept": 0.094, "changed": 0.3, "kl": 0.004}, "promising"),
    "real, raw": (pair, {"kept": 0.171, "changed": 0.28, "kl": 0.018}, "promising"),
    # The others
    "skill gap": (pair, {"kept": 0.5, "changed": 0.006, "kl": 0.3}, "unskilled"),
    "as careful": (pair, {"kept": 0.058, "changed": 0.034, "kl": 0.002}, "too close"),
    "too close": (pair, {"kept": 0.0, "changed": 0.0, "kl": 1e-5}, "too close"),
    "the expert's adapter": (pair, {"kept": 0.015, "changed": 0.3}, "too close"),
    "random weights": (pair, {"kept": 0.94, "changed": 0.008, "kl": 0.1, "high": 6.2}, "incoherent"),
    "shuffled": (pair, {"kept": 0.94, "changed": 0.024, "kl": 0.1, "high": 14.0}, "incoherent"),
    "more careful": (pair, {"kept": 0.16, "changed": 0.34, "high": 3.0}, "doubtful"),
    "the expert knows less": (pair, {"kept": 0.54, "changed": 0.74, "kl": 0.01, "high": 1.5}, "swapped"),
    # Between what gained and what did not
    "rather many": (pair, {"kept": 0.26, "changed": 0.3}, "doubtful"),
    "hardly another token": (pair, {"kept": 0.1, "changed": 0.12}, "doubtful"),
    "a high median": (pair, {"kept": 0.1, "changed": 0.3, "kl": 0.1}, "doubtful"),
    "few steps": (pair, {"kept": 0.1, "changed": 0.3, "num_steps": 100}, "doubtful"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_pair_is_judged_as_the_study_has_measured(name):
    make, arguments, verdict = VERDICTS[name]
    check = check_steps(make(**arguments))
    assert (check.verdict, check.promising) == (verdict, verdict == "promising")
    assert check.reasons and all(reason.endswith(".") for reason in check.reasons)


def test_swapped_sizes_are_noticed():
    check = check_steps(pair(0.1, 0.3, **sizes(500, 1500)))
    assert (check.verdict, check.promising) == ("swapped", False)
    assert check.reasons[0].startswith("The expert has 500 parameters, the amateur 1,500: exchange")
    assert check.reasons[0].endswith('the verdict by the other numbers is "promising".')


@pytest.mark.parametrize(("amateur", "verdict"), [(1300, "promising"), (1400, "doubtful"), (1510, "doubtful")])
def test_an_amateur_of_the_experts_size_is_doubtful_and_an_adapter_does_not_make_it_the_larger_model(amateur, verdict):
    check = check_steps(pair(0.1, 0.3, **sizes(1500, amateur)))
    assert check.verdict == verdict
    assert any(f"as many parameters as the expert ({amateur:,})" in each for each in check.reasons) == (amateur > 1350)


@pytest.mark.parametrize(("amateur", "is_of_expert"), [("a", True), ("b", False)])
def test_an_amateur_that_is_made_of_the_expert_is_doubtful_and_said_to_be(amateur, is_of_expert):
    models = {
        role: {"model": name, "revision": None, "num_parameters": 1500}
        for role, name in (("expert", "a"), ("amateur", amateur))
    }
    check = check_steps(pair(0.1, 0.3, **models))
    assert (check.verdict, check.is_of_expert) == ("doubtful", is_of_expert)
    assert check.reasons[0].startswith("The amateur is made from the expert") == is_of_expert


def with_adapters(expert: str | None, amateur: str | None) -> dict:
    model = {"model": "a", "revision": None, "num_parameters": 1500}
    return {"expert": {**model, "adapter": expert}, "amateur": {**model, "adapter": amateur}}


@pytest.mark.parametrize(
    ("expert", "amateur", "label_expert", "differ"),
    [
        (None, "own/adapter", "live", True),
        ("own/adapter", None, "live", True),
        ("own/adapter", "own/earlier", "live", True),
        ("own/adapter", None, "base", False),
        (None, None, "live", False),
        ("own/adapter", "own/adapter", "live", False),
    ],
)
def test_two_models_that_differ_by_an_adapter_are_doubtful_and_said_to_be(expert, amateur, label_expert, differ):
    made = with_adapters(expert, amateur) | {"settings": {"beta": 0.4, "label_expert": label_expert}}
    check = check_steps(pair(0.1, 0.3, **made))
    assert (check.verdict, check.differ_by_adapter) == ("doubtful", differ)
    assert check.reasons[0].startswith("The two models differ by an adapter") == differ


def test_an_adapter_leaves_a_worse_verdict():
    check = check_steps(pair(0.01, 0.3, **with_adapters(None, "own/adapter")))
    assert check.verdict == "too close" and len(check.reasons) == 2


@pytest.mark.parametrize(
    ("prompt", "template", "kept", "verdict", "warned"),
    [
        ("plain", TEMPLATE, 0.43, "plain prompt", False),
        ("plain", TEMPLATE, 0.1, "promising", True),
        ("plain", NO_TEMPLATE, 0.1, "promising", False),
        ("plain", NO_TEMPLATE, 0.43, "unskilled", False),
        ([{"role": "user", "content": "?"}], TEMPLATE, 0.43, "unskilled", False),
        ([{"role": "user", "content": "?"}], TEMPLATE, 0.1, "promising", False),
    ],
)
def test_a_plain_prompt_for_a_model_with_a_chat_template_is_noticed(prompt, template, kept, verdict, warned):
    check = check_steps(pair(kept, 0.3, prompt=prompt, chat_template_sha256=template))
    assert check.verdict == verdict
    assert [("--conversational" in warning) for warning in check.warnings] == [True] * warned
    if verdict == "plain prompt":
        assert "--conversational" in check.reasons[0]


def test_an_amateur_of_another_family_is_to_blame_before_its_plain_prompt():
    rows = pair(0.45, 0.1, chat_template_sha256=TEMPLATE, amateur_reading={"method": "covering"})
    check = check_steps(rows)
    assert check.verdict == "unskilled" and "Choose a better trained amateur" in check.reasons[0]
    assert "--conversational" in check.warnings[0]


def test_text_that_holds_the_marks_of_a_template_is_not_plain(tokenizer):
    rows = random_rows() + random_rows(seed=1)
    rows = [row | {"prompt_ids": [tokenizer.convert_tokens_to_ids("<|im_start|>"), 5]} for row in rows]
    made = as_dataset(rows, 0.1, chat_template_sha256=TEMPLATE)
    assert "--conversational" not in str(check_steps(made, tokenizer))
    assert "--conversational" in str(check_steps(made.map(lambda row: {"prompt_ids": [5]}), tokenizer))


def test_many_first_steps_are_warned_of():
    rows = [dict(row) for row in pair(0.1, 0.3)]
    for row in rows[:10]:
        row |= {"kl_divergence": [1.0, *row["kl_divergence"][1:]], "step_positions": [0, *row["step_positions"]]}
        row |= {"label_ids": [[5], *row["label_ids"]], "label_probs": [[1.0], *row["label_probs"]]}
    check = check_steps(as_dataset([{k: row[k] for k in random_rows(1)[0]} for row in rows]))
    assert ["include_first_step=False" in warning for warning in check.warnings] == [True]


def test_a_beta_above_all_corrections_is_warned_of():
    check = check_steps(pair(0.1, 0.4, high=0.7), beta=1.6)
    assert (check.verdict, check.num_kept, check.changed_share) == ("promising", 0, None)
    assert check.warnings[0].startswith("At beta = 1.6 the label repeats the expert at nearly every kept step")


def test_labels_above_a_higher_beta_alone_do_not_condemn_a_pair():
    check = check_steps(pair(0.1, 0.0, high=2.0, beta=1.6))
    assert check.verdict == "doubtful" and "`lightreasoner check`" in check.reasons[0]
    assert check_steps(pair(0.1, 0.3, high=2.0, beta=1.6)).judged_changed_share == pytest.approx(0.3)


@pytest.mark.parametrize("metadata", ['"nothing"', "{}", '{"settings": 3, "expert": null, "eos_token_ids": "x"}'])
def test_a_dataset_that_does_not_say_how_it_was_made_is_judged_all_the_same(metadata):
    made = pair(0.1, 0.3).map(lambda row: {"sampling_metadata": metadata})
    check = check_steps(made)
    assert (check.verdict, check.beta, check.cut_off_share) == ("promising", None, None)


# What is said


def test_the_text_says_every_number_and_what_the_verdict_rests_on():
    check = check_steps(pair(0.1, 0.3))
    text = str(check)
    for part in ("0.001", "10.0 %", "30.0 %", "0.0 %", "#5 -> #7", CAVEAT, RESTS_ON, "This pair is promising."):
        assert part in text
    assert check.summary().count("\n") == 1 and check.headline in check.summary() and CAVEAT in check.summary()


def test_numbers_are_judged_one_by_one():
    lines = str(check_steps(pair(0.5, 0.12, kl=0.1))).splitlines()
    looks = {line[:35].strip(): line[35:].split() for line in lines[3:8]}
    assert "bad" in looks["KL in nats at 50 % of the steps"] and "good" in looks["KL in nats at 90 %"]
    assert "bad" in looks["steps kept at beta = 0.4"]
    assert "between" in looks["of these, v_C prefers another token"]


def test_the_dictionary_is_json_and_holds_everything():
    check = check_steps(pair(0.1, 0.3))
    loaded = json.loads(json.dumps(check.to_dict()))
    assert loaded["promising"] is True and loaded["verdict"] == "promising" and loaded["reasons"] == check.reasons
    assert loaded["corrections"] == [{"taken": "#5", "preferred": "#7", "num_steps": 60}]
    assert set(PairCheck.__dataclass_fields__) < set(loaded)


# What is refused


def test_an_unknown_divergence_is_refused():
    rows = random_rows(2)
    rows[1]["kl_divergence"] = [None, *rows[1]["kl_divergence"][1:]]
    with pytest.raises(ValueError, match="without the divergence of every step.*`lightreasoner sample`"):
        check_steps(as_dataset(rows))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"prompt": ["a"]}), "has no column 'prompt_ids'.*`lightreasoner sample`"),
        (as_dataset(random_rows(1)).select([]), "has no row"),
        (as_dataset([row | {"kl_divergence": []} for row in random_rows(1, beta=1e9)]), "has no step"),
    ],
)
def test_what_is_no_dataset_of_kept_steps_is_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        check_steps(dataset)


# The sampler


@pytest.fixture
def make_sampler(tmp_path, expert_path, amateur_path):
    def make(expert=expert_path, amateur=amateur_path, **kwargs) -> ContrastiveStepSampler:
        kwargs = {"max_new_tokens": 12, "include_first_step": False, **kwargs}
        return ContrastiveStepSampler(expert, amateur, ContrastiveSamplingConfig(str(tmp_path / "steps"), **kwargs))

    return make


def test_the_first_prompts_are_looked_at(make_sampler, prompts):
    assert make_sampler().check(prompts, num_prompts=4).num_prompts == 4
    assert make_sampler().check(prompts).num_prompts == len(QUESTIONS)


@pytest.mark.parametrize("beta", [0.1, 0.4, 2.5])
def test_it_says_of_the_prompts_what_sampling_them_would(beta, make_sampler, prompts, tokenizer):
    check = make_sampler(beta=beta).check(prompts)
    sampled = check_steps(make_sampler(beta=beta).sample(prompts), tokenizer)
    for name in ("num_steps", "num_kept", "beta", "kl_50", "kept_share", "changed_share", "cut_off_share"):
        assert getattr(check, name) == getattr(sampled, name)


def test_labels_are_judged_from_the_same_divergence_whatever_beta_is(make_sampler, prompts):
    low, high = make_sampler(beta=0.4).check(prompts), make_sampler(beta=2.5).check(prompts)
    assert low.judged_changed_share == high.judged_changed_share and low.num_kept > high.num_kept


def test_the_first_answers_of_both_models_are_shown(make_sampler, prompts, expert, amateur):
    sampler = make_sampler()
    check, tokenizer = sampler.check(prompts), sampler.processing_class
    for model, answers in ((expert, check.expert_answers), (amateur, check.amateur_answers)):
        vocabulary = model_vocabulary(tokenizer, model.config.vocab_size)
        ids = [tokenizer(question).input_ids for question in QUESTIONS[:3]]
        greedy = generate_greedy(model, ids, vocabulary, find_eos_ids(model, tokenizer), 12)
        assert answers == tokenizer.batch_decode(greedy, skip_special_tokens=True)
    assert str(check).count("  amateur  ") == 3


def test_nothing_is_left_behind(make_sampler, prompts, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_sampler().check(prompts, 2)
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_nothing_is_left_behind_by_a_mistake_either(make_sampler, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(ValueError, match="no `prompt` column"):
        make_sampler().check(Dataset.from_dict({"question": ["a"]}))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_sampler_can_sample_afterwards(make_sampler, prompts):
    sampler = make_sampler(beta=2.5)
    sampler.check(prompts, 2)
    assert isinstance(sampler.expert, torch.nn.Module)  # loaded once
    assert check_steps(sampler.sample(prompts)).beta == 2.5


def test_a_model_with_equal_weights_is_refused(make_sampler, prompts, expert, expert_path):
    with pytest.raises(ValueError, match="Expert and amateur have equal weights.* Choose a weaker model"):
        make_sampler(amateur=expert).check(prompts)
    with pytest.raises(ValueError, match="Expert and amateur have equal weights"):
        make_sampler(amateur=expert_path).check(prompts)


def test_one_path_twice_is_refused_before_it_is_loaded(make_sampler, prompts, expert_path, monkeypatch):
    monkeypatch.setattr("trl_lightreasoner.sampling.model_pair.load_model", None)
    with pytest.raises(ValueError, match="Expert and amateur have equal weights"):
        make_sampler(amateur=expert_path).check(prompts)


def test_an_expert_that_is_smaller_is_noticed(make_sampler, prompts, expert_path, amateur_path):
    check = make_sampler(expert=amateur_path, amateur=expert_path).check(prompts)
    assert check.verdict == "swapped" and check.expert_parameters < check.amateur_parameters


@pytest.mark.parametrize("num_prompts", [0, -1, 1.5, True])
def test_a_wrong_number_of_prompts_is_refused(num_prompts, make_sampler, prompts):
    with pytest.raises(ValueError, match="`num_prompts` must be a whole number, 1 or more"):
        make_sampler().check(prompts, num_prompts)


# The bundled pair, of which the gain is known


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    return make_problems(50, seed=0, split="train", kind_shares=KIND_SHARES)


def check_bundled(problems: list[dict], folder, plain: bool = False, expert="expert", amateur="amateur") -> PairCheck:
    args = ContrastiveSamplingConfig(str(folder), include_first_step=False)
    models = [str(PAIR / model) if isinstance(model, str) else model for model in (expert, amateur)]
    tokenizers = ContrastiveStepSampler(str(PAIR / "expert"), str(PAIR / "amateur"), args).processing_class
    sampler = ContrastiveStepSampler(*models, args, tokenizers, tokenizers)
    prompts = [problem["question"] if plain else as_prompt(problem) for problem in problems]
    return sampler.check(Dataset.from_list([{"prompt": prompt} for prompt in prompts]))


def test_the_bundled_pair_is_promising(problems, tmp_path):
    check = check_bundled(problems, tmp_path)
    assert check.promising and check.warnings == []
    assert check.corrections[0][:2] == ("␣####", "␣")


def test_the_bundled_pair_with_a_plain_prompt_is_not(problems, tmp_path):
    assert check_bundled(problems, tmp_path, plain=True).verdict == "plain prompt"


def test_the_bundled_pair_the_other_way_round_is_not(problems, tmp_path):
    assert check_bundled(problems, tmp_path, expert="amateur", amateur="expert").verdict == "swapped"


def test_an_amateur_that_was_never_trained_is_incoherent(problems, tmp_path):
    amateur = load_model(str(PAIR / "amateur"))
    torch.manual_seed(0)
    amateur = type(amateur)(amateur.config).eval()
    assert check_bundled(problems, tmp_path, amateur=amateur).verdict == "incoherent"


def test_the_expert_with_some_noise_is_too_close(problems, tmp_path):
    amateur = load_model(str(PAIR / "expert"))
    with torch.no_grad():
        for parameter in amateur.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    assert check_bundled(problems, tmp_path, amateur=amateur).verdict == "too close"
