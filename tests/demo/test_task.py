"""The demo's word problems, its two solvers, and the pair of models bundled for it."""

import doctest
import random
import re
from collections import Counter
from importlib.resources import files

import pytest
from transformers import AutoConfig, AutoTokenizer

from trl_lightreasoner.demo import task
from trl_lightreasoner.demo.task import (
    amateur_solution,
    careful_solution,
    expert_solution,
    extract_answer,
    make_problems,
    sloppy_solution,
)


DEMO_PAIR = files("trl_lightreasoner") / "demo" / "pair"
ROLES = ["expert", "amateur"]


@pytest.fixture(scope="module")
def problems():
    return make_problems(2000, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_PAIR / "expert")


def solve_by_reading(question):
    """Compute the answer of a question from its sentences alone, without the generator's steps."""
    owned = {}
    for name, amount in re.findall(r"(\w+) has (\d+) \w+\.", question):
        owned[name] = int(amount)
    if purchases := re.findall(r"(\d+) \w+ for (\d+) dollars each", question):
        cost = sum(int(count) * int(price) for count, price in purchases)
        return next(iter(owned.values())) - cost if "are left" in question else cost
    for left, amount, word, right in re.findall(r"(\w+) has (\d+) (more|fewer) \w+ than (\w+)\.", question):
        difference = int(amount) if word == "more" else -int(amount)
        if right in owned:
            owned[left] = owned[right] + difference
        else:
            owned[right] = owned[left] - difference
    for name, verb, amount in re.findall(
        r"(\w+) (finds|buys|gets|wins|loses|sells|gives away|breaks) (\d+)\.", question
    ):
        owned[name] += int(amount) if verb in ("finds", "buys", "gets", "wins") else -int(amount)
    return owned[re.search(r"does (\w+) have", question)[1]]


@pytest.mark.parametrize("kind", ["chain", "shop", "comparison", "comb"])
def test_answers_follow_from_the_question(kind):
    for problem in make_problems(200, seed=1, kind_shares={kind: 1}):
        assert problem["kind"] == kind
        assert solve_by_reading(problem["question"]) == problem["answer"]


def test_careful_solutions_calculate_correctly(problems):
    for problem in problems:
        steps = re.findall(r"(\d+)([-+*])(\d+)=(\d+)\.", careful_solution(problem))
        assert len(steps) == problem["num_steps"]
        for left, operator, right, result in steps:
            left, right = int(left), int(right)
            assert {"+": left + right, "-": left - right, "*": left * right}[operator] == int(result)


def test_careful_solutions_end_in_the_answer(problems):
    for problem in problems:
        assert careful_solution(problem).endswith(f" #### {problem['answer']}")
        assert extract_answer(careful_solution(problem)) == problem["answer"]


def test_sloppy_solutions_are_hardly_ever_right(problems):
    rng = random.Random(0)
    right = sum(extract_answer(sloppy_solution(problem, rng)) == problem["answer"] for problem in problems)
    assert right / len(problems) < 0.05


def test_sloppy_solutions_slip_in_their_share(problems):
    rng = random.Random(0)
    slips = sum(
        extract_answer(sloppy_solution(problem, rng)) != int(problem["misread_step"].partition("=")[2])
        for problem in problems
    )
    assert slips / len(problems) == pytest.approx(task.SLIP_SHARE, abs=0.04)


def test_same_seed_gives_same_problems():
    assert make_problems(50, seed=3) == make_problems(50, seed=3)
    assert make_problems(50, seed=3) != make_problems(50, seed=4)


def test_more_problems_begin_with_the_same_problems():
    assert make_problems(50, seed=3)[:20] == make_problems(20, seed=3)


def test_questions_are_distinct(problems):
    assert len({problem["question"] for problem in problems}) == len(problems)


def test_splits_are_disjoint_for_the_same_seed():
    questions = [
        problem["question"]
        for split in ("pretrain", "train", "test")
        for problem in make_problems(500, seed=0, split=split)
    ]
    assert len(set(questions)) == 1500


def test_kinds_and_numbers_of_steps_have_their_shares(problems):
    for key, shares in [("kind", task.KIND_SHARES), ("num_steps", task.NUM_STEPS_SHARES)]:
        counts = Counter(problem[key] for problem in problems)
        assert {value: counts[value] / len(problems) for value in counts} == pytest.approx(shares, abs=0.04)


def test_expert_is_careful_in_its_shares():
    rng = random.Random(0)
    for problem in make_problems(12, seed=0):
        share = (
            task.EXPERT_CAREFUL_SHARE_COMPARISON
            if problem["kind"] == "comparison"
            else task.EXPERT_CAREFUL_SHARES[problem["num_steps"]]
        )
        careful = sum(expert_solution(problem, rng) == careful_solution(problem) for _ in range(3000))
        assert careful / 3000 == pytest.approx(share, abs=0.04)


def test_amateur_is_careful_in_its_share(problems):
    rng = random.Random(0)
    careful = sum(amateur_solution(problem, rng) == careful_solution(problem) for problem in problems)
    assert careful / len(problems) == pytest.approx(task.AMATEUR_CAREFUL_SHARE, abs=0.02)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("OK, 23+14=37. #### 37", 37),
        ("#### 1 #### 2", 2),
        ("####12", 12),
        ("#### -3", -3),
        ("#### 28<|im_end|>", 28),
        ("#### 28. Done", 28),
        ("OK, 23+14=37.", None),
        ("#### ", None),
        ("#### 5 ####", None),
        ("#### five 5", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_docstring_examples_run():
    assert doctest.testmod(task).failed == 0


def test_demo_pair_is_at_most_four_megabytes():
    sizes = [path.stat().st_size for role in ROLES for path in (DEMO_PAIR / role).iterdir()]
    assert sum(sizes) <= 4_000_000


@pytest.mark.parametrize("role", ROLES)
def test_demo_pair_has_a_model_card_with_a_license(role):
    assert "license: apache-2.0" in (DEMO_PAIR / role / "README.md").read_text(encoding="utf-8")


def test_expert_and_amateur_share_the_tokenizer():
    expert, amateur = ((DEMO_PAIR / role / "tokenizer.json").read_bytes() for role in ROLES)
    assert expert == amateur


@pytest.mark.parametrize("role", ROLES)
def test_models_have_one_row_per_token(role, tokenizer):
    assert AutoConfig.from_pretrained(DEMO_PAIR / role).vocab_size == len(tokenizer) == 512


def test_tokenizer_round_trips(tokenizer, problems):
    rng = random.Random(0)
    for problem in problems[:200]:
        for text in (problem["question"], careful_solution(problem), sloppy_solution(problem, rng)):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.tokenize("123+4567=4690") == list("123+4567=4690")


def test_chat_template_ends_where_the_assistant_answers(tokenizer):
    messages = [{"role": "user", "content": "How many?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"


def test_chat_template_takes_a_system_message(tokenizer):
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "How many?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n")


def test_chat_template_closes_the_answer_with_eos(tokenizer):
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "#### 3"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n#### 3" + tokenizer.eos_token + "\n")
