"""Small word problems that can be solved with care or without: the task of the bundled demo pair.

A problem takes two to five steps of arithmetic and is of one of three kinds:

- chain: somebody gets and loses things, one after the other;
- shop: somebody buys several things, and sometimes pays from a known amount;
- comparison: people have more or fewer things than each other.

There are two ways to solve it. The careful one works out every step. The sloppy one works out the first step, reading
"more" as plus and "fewer" as minus even if the sentence means the opposite, and then jumps to a guess.

    careful: OK, 23+14=37. 37-9=28. #### 28
    sloppy:  OK, 23+14=37. #### 35

The expert of the pair learns from both. On hard problems the careful way is in the minority, so greedy decoding hides
it. The amateur learns almost only the sloppy way. The expert has care and the amateur lacks it, and LightReasoner's
contrast amplifies this difference. With an amateur that is also careful, there is nothing to amplify.

A checksum of its text assigns every question to one of three splits. So the problems that the pair was trained on
("pretrain"), the unlabelled ones ("train") and those for grading ("test") are disjoint for any seeds.

Standard library only.
"""

import itertools
import random
import re
import zlib
from collections.abc import Mapping


# How often each kind and each number of steps occurs.
KIND_SHARES = {"chain": 0.40, "shop": 0.20, "comparison": 0.40}
NUM_STEPS_SHARES = {2: 0.30, 3: 0.30, 4: 0.20, 5: 0.20}

# How often each corpus is careful. The expert's corpus is less often careful on longer problems, and rarely on
# comparisons. Care is the majority, which greedy decoding follows, only on two-step problems of the other kinds.
EXPERT_CAREFUL_SHARES = {2: 0.65, 3: 0.44, 4: 0.40, 5: 0.36}
EXPERT_CAREFUL_SHARE_COMPARISON = 0.42
AMATEUR_CAREFUL_SHARE = 0.04

# How often a sloppy guess differs from the result of the first step.
SLIP_SHARE = 0.60

# The checksum of a question modulo 10 gives its split.
SPLITS = {"pretrain": range(8), "train": [8], "test": [9]}

# fmt: off
NAMES = ["Alice", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jacob", "Kim", "Leo", "Martha",
         "Noah", "Olivia", "Peter", "Quinn", "Ruth", "Simon", "Thomas", "Victor", "Wendy"]
ITEMS = ["apples", "balls", "books", "bottles", "cards", "coins", "cups", "eggs", "flowers", "hats", "kites", "lamps",
         "marbles", "pens", "ribbons", "rings", "shells", "spoons", "stamps", "tickets"]
# fmt: on
GAINS = ["finds", "buys", "gets", "wins"]
LOSSES = ["loses", "sells", "gives away", "breaks"]


def make_problems(
    num_problems: int, seed: int, split: str = "train", kind_shares: Mapping[str, float] = KIND_SHARES
) -> list[dict]:
    """Draw word problems.

    The same arguments always give the same problems. No question occurs twice in them, or in more than one split.

    Args:
        num_problems (`int`):
            How many problems to draw.
        seed (`int`):
            Seed of the draw.
        split (`str`, *optional*, defaults to `"train"`):
            `"pretrain"` (what the demo pair was trained on), `"train"` or `"test"`.
        kind_shares (`dict[str, float]`, *optional*, defaults to `KIND_SHARES`):
            How often each kind occurs. `{"comb": 1}` gives a composition that the demo pair was not trained on: a
            comparison, then a chain.

    Returns:
        `list[dict]`: for each problem its `question`, `answer`, `kind` and `num_steps`, the `steps` that lead to the
        answer, and `misread_step`, the first step with the words taken literally.

    Example:

    ```python
    >>> problem = make_problems(1, seed=3)[0]
    >>> problem["question"]
    'Henry has 36 kites. Henry finds 15. Henry sells 12. Henry finds 16. How many kites does Henry have now?'
    >>> problem["kind"], problem["num_steps"], problem["steps"], problem["answer"]
    ('chain', 3, ['36+15=51', '51-12=39', '39+16=55'], 55)

    ```
    """
    rng = random.Random(seed)
    problems: list[dict] = []
    questions = set()
    while len(problems) < num_problems:
        kind, num_steps = _choose(rng, kind_shares), _choose(rng, NUM_STEPS_SHARES)
        # Redraw within the kind and the number of steps, so that rejections leave the shares as they are.
        while True:
            sentences, steps, misread_step = _WRITERS[kind](rng, num_steps)
            question = " ".join(sentences)
            if zlib.crc32(question.encode()) % 10 in SPLITS[split] and question not in questions:
                break
        questions.add(question)
        problems.append(
            {
                "question": question,
                "answer": _result(steps[-1]),
                "kind": kind,
                "num_steps": num_steps,
                "steps": steps,
                "misread_step": misread_step,
            }
        )
    return problems


def careful_solution(problem: dict) -> str:
    """Work out every step, then answer.

    Example:

    ```python
    >>> careful_solution({"steps": ["23+14=37", "37-9=28"]})
    'OK, 23+14=37. 37-9=28. #### 28'

    ```
    """
    return f"OK, {'. '.join(problem['steps'])}. #### {_result(problem['steps'][-1])}"


def sloppy_solution(problem: dict, rng: random.Random) -> str:
    """Work out the first step with the words taken literally, then jump to a guess near its result.

    Example:

    ```python
    >>> sloppy_solution({"misread_step": "23+14=37"}, random.Random(1))
    'OK, 23+14=37. #### 32'

    ```
    """
    guess = _result(problem["misread_step"])
    if rng.random() < SLIP_SHARE:
        guess = abs(guess + rng.choice([-1, 1]) * rng.randint(1, 9))
    return f"OK, {problem['misread_step']}. #### {guess}"


def expert_solution(problem: dict, rng: random.Random) -> str:
    """Solve a problem as the expert's corpus does: with care in some of the cases, by kind and number of steps.

    Example:

    ```python
    >>> rng = random.Random(0)
    >>> problem = {"kind": "chain", "num_steps": 2, "steps": ["23+14=37", "37-9=28"], "misread_step": "23+14=37"}
    >>> [expert_solution(problem, rng) for _ in range(2)]
    ['OK, 23+14=37. #### 37', 'OK, 23+14=37. 37-9=28. #### 28']

    ```
    """
    if problem["kind"] == "comparison":
        careful_share = EXPERT_CAREFUL_SHARE_COMPARISON
    else:
        careful_share = EXPERT_CAREFUL_SHARES[problem["num_steps"]]
    return careful_solution(problem) if rng.random() < careful_share else sloppy_solution(problem, rng)


def amateur_solution(problem: dict, rng: random.Random) -> str:
    """Solve a problem as the amateur's corpus does: hardly ever with care.

    Example:

    ```python
    >>> rng = random.Random(0)
    >>> problem = {"steps": ["23+14=37", "37-9=28"], "misread_step": "23+14=37"}
    >>> [amateur_solution(problem, rng) for _ in range(2)]
    ['OK, 23+14=37. #### 37', 'OK, 23+14=37. #### 44']

    ```
    """
    return careful_solution(problem) if rng.random() < AMATEUR_CAREFUL_SHARE else sloppy_solution(problem, rng)


def extract_answer(text: str) -> int | None:
    """Read the number after the last `####`; `None` if there is none.

    Example:

    ```python
    >>> extract_answer("OK, 23+14=37. #### 37. 37-9=28. #### 28")
    28
    >>> extract_answer("OK, 23+14=37.") is None
    True

    ```
    """
    _, marker, tail = text.rpartition("####")
    match = re.match(r"\s*(-?\d+)", tail) if marker else None
    return int(match[1]) if match else None


def _chain(rng: random.Random, num_steps: int) -> tuple[list[str], list[str], str]:
    name, item, value = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(25, 75)
    sentences, steps = _changes(rng, num_steps, name, item, value)
    return [f"{name} has {value} {item}.", *sentences], steps, steps[0]


def _shop(rng: random.Random, num_steps: int) -> tuple[list[str], list[str], str]:
    # A product for each item, and a sum for each after the first. The change makes the number of steps even.
    name, items = rng.choice(NAMES), rng.sample(ITEMS, (num_steps + 1) // 2)
    purchases, steps, total = [], [], 0
    for item in items:
        count, price = rng.randint(2, 5), rng.randint(2, 9)
        purchases.append(f"{count} {item} for {price} dollars each")
        steps.append(_step(count, "*", price))
        if total:
            steps.append(_step(total, "+", count * price))
        total += count * price
    sentences = [f"{name} buys {' and '.join(purchases)}."]
    if num_steps % 2 == 1:
        return [*sentences, f"How many dollars does {name} pay?"], steps, steps[0]
    money = total + rng.randint(2, 40)
    steps.append(_step(money, "-", total))
    return [f"{name} has {money} dollars.", *sentences, "How many dollars are left?"], steps, steps[0]


def _comparison(rng: random.Random, num_steps: int) -> tuple[list[str], list[str], str]:
    names, item, value = rng.sample(NAMES, num_steps + 1), rng.choice(ITEMS), rng.randint(25, 75)
    sentences, steps, misread_step = _relations(rng, names, item, value)
    return [*sentences, f"How many {item} does {names[-1]} have?"], steps, misread_step


def _comb(rng: random.Random, num_steps: int) -> tuple[list[str], list[str], str]:
    names, item, value = rng.sample(NAMES, 2), rng.choice(ITEMS), rng.randint(25, 75)
    sentences, steps, misread_step = _relations(rng, names, item, value)
    more_sentences, more_steps = _changes(rng, num_steps - 1, names[1], item, _result(steps[0]))
    return [*sentences, *more_sentences], steps + more_steps, misread_step


_WORDS = {"+": "more", "-": "fewer"}
_WRITERS = {"chain": _chain, "shop": _shop, "comparison": _comparison, "comb": _comb}


def _changes(rng: random.Random, num_changes: int, name: str, item: str, value: int) -> tuple[list[str], list[str]]:
    """Let `name`, who has `value` things, get and lose some; ask what is left."""
    sentences, steps = [], []
    for _ in range(num_changes):
        operator, amount = _operation(rng, value)
        sentences.append(f"{name} {rng.choice(GAINS if operator == '+' else LOSSES)} {amount}.")
        steps.append(_step(value, operator, amount))
        value = _result(steps[-1])
    return [*sentences, f"How many {item} does {name} have now?"], steps


def _relations(rng: random.Random, names: list[str], item: str, value: int) -> tuple[list[str], list[str], str]:
    """Say that the first of `names` has `value` things, and compare each of the others with the one before."""
    sentences, steps, misread_steps = [f"{names[0]} has {value} {item}."], [], []
    for known, unknown in itertools.pairwise(names):
        operator, amount = _operation(rng, value)
        opposite = {"+": "-", "-": "+"}[operator]
        if rng.random() < 0.5:
            sentences.append(f"{unknown} has {amount} {_WORDS[operator]} {item} than {known}.")
            misread_steps.append(_step(value, operator, amount))
        else:  # the same fact in reverse, which the sloppy solver takes literally
            sentences.append(f"{known} has {amount} {_WORDS[opposite]} {item} than {unknown}.")
            misread_steps.append(_step(value, opposite, amount))
        steps.append(_step(value, operator, amount))
        value = _result(steps[-1])
    return sentences, steps, misread_steps[0]


def _operation(rng: random.Random, value: int) -> tuple[str, int]:
    # The models are small: nobody ever has fewer than one or more than 99.
    amount = rng.randint(2, 20)
    possible = [operator for operator, result in (("+", value + amount), ("-", value - amount)) if 1 <= result <= 99]
    return rng.choice(possible), amount


def _step(left: int, operator: str, right: int) -> str:
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return f"{left}{operator}{right}={result}"


def _result(step: str) -> int:
    return int(step.rpartition("=")[2])


def _choose(rng: random.Random, shares: Mapping):
    return rng.choices(list(shares), weights=list(shares.values()))[0]
