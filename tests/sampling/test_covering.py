import functools
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from trl_lightreasoner.demo.task import expert_solution, make_problems
from trl_lightreasoner.models.token_bytes import TokenBytes
from trl_lightreasoner.sampling import token_lookup
from trl_lightreasoner.sampling.covered_step import FINE, USUAL, CoveredStep, log_width, open_contexts
from trl_lightreasoner.sampling.covering import Covering
from trl_lightreasoner.sampling.cross_scoring import MAX_WIDTH
from trl_lightreasoner.sampling.next_tokens import NextTokens

from .other_tokens import TableModel, byte_level_tokenizer, make_texts, sentencepiece_tokenizer


TEXTS = make_texts()
ACCENTS = [text.replace("OK", "Ol\u00e9").replace("####", "\u2192") for text in TEXTS]


def make_pair(expert, amateur, texts, doubt=0.005):
    tokens, amateur_tokens = TokenBytes(expert, len(expert)), TokenBytes(amateur, len(amateur))
    covering = Covering(tokens, amateur_tokens, [amateur.eos_token_id])
    model = TableModel(amateur, texts, doubt)
    return SimpleNamespace(expert=expert, tokens=tokens, amateur=amateur_tokens, covering=covering, model=model)


PAIRS = {
    # Digits of 1 against 1-3, both ways; blanks that are one token with what stands before
    "1 digit, 3 digits": lambda: make_pair(
        byte_level_tokenizer(TEXTS, 1, 330), byte_level_tokenizer(TEXTS, 3, 460), TEXTS
    ),
    "3 digits, 1 digit": lambda: make_pair(
        byte_level_tokenizer(TEXTS, 3, 460), byte_level_tokenizer(TEXTS, 1, 330), TEXTS
    ),
    "3 digits, pieces": lambda: make_pair(
        byte_level_tokenizer(TEXTS, 3, 460), sentencepiece_tokenizer(TEXTS, 200), TEXTS
    ),
    # Characters that are several tokens of the expert's
    "characters": lambda: make_pair(
        byte_level_tokenizer(TEXTS, 1, 300), sentencepiece_tokenizer(ACCENTS, 150, max_token_length=3), ACCENTS
    ),
}


@pytest.fixture(scope="module")
def pairs():
    made = {}
    return lambda name: made.setdefault(name, PAIRS[name]())


def completions(pair, count):
    draw, accents = random.Random(1), b"\xc3\xa9" in pair.amateur.ids
    for problem in make_problems(count, seed=9, split="train"):
        text = expert_solution(problem, draw)
        text = text.replace("OK", "Ol\u00e9").replace("####", "\u2192") if accents else text
        yield [*pair.expert(text, add_special_tokens=False).input_ids, pair.expert.eos_token_id]


def make_step(pair, completion, t, needed, asked=None, pruning=USUAL):
    start = pair.covering.starts(completion, t + 1)[t]
    return CoveredStep(pair.covering, start, needed, needed if asked is None else asked, pruning)


def all_tokens(pair):
    return [None, *pair.tokens.sorted_ids]


def read(pair, step):
    while contexts := step.wanted():
        probs = torch.stack([pair.model(context) for context in contexts])
        open_contexts(pair.covering, [(step, context, row) for row, context in enumerate(contexts)], probs)
    return step


def naive(pair, completion, t, floor=1e-5):
    """
    The expert's next token after the first t, by every text that the amateur can write from the beginning on, each
    tokenized by the expert once two further pieces follow it; and the share of what was too unlikely to follow.
    """
    q = completion[:t]
    before = pair.tokens.join(q)
    pieces = pair.expert.backend_tokenizer.pre_tokenizer
    found, left = Counter(), 0.0

    @functools.cache
    def begins(context, rest):
        """Probability of writing some bytes next, whatever follows; the last three tokens are all that counts."""
        if not rest:
            return 1.0
        likely = 0.0
        for token_id, content in enumerate(pair.amateur.bytes):
            if content and content[: len(rest)] == rest[: len(content)]:
                after = begins((*context, token_id)[-3:], rest[len(content) :])
                likely += pair.model(context)[token_id].item() * after
        return likely

    floor *= begins((), before + (pair.tokens.bytes[completion[t]] or b""))

    def next_token(text):
        ids = pair.expert(text.decode(), add_special_tokens=False).input_ids
        return None if ids[: len(q)] != q else ids[len(q)] if len(ids) > len(q) else "end"

    def is_decided(text):
        try:
            ends = [end for _, (_, end) in pieces.pre_tokenize_str(text.decode())]
        except UnicodeDecodeError:
            return False
        whole = before.decode(errors="ignore")
        return len(ends) >= sum(end <= len(whole) for end in ends) + 3

    def write(context, text, mass):
        nonlocal left
        if len(text) > len(before) and is_decided(text):
            found[next_token(text)] += mass
        else:
            probs = pair.model(context)
            if text.startswith(before):
                try:
                    found[next_token(text)] += mass * probs[pair.model.end_id].item()
                except UnicodeDecodeError:
                    pass
            # Those of a text that goes on otherwise than q cannot have it
            fitting = [
                token_id
                for token_id, content in enumerate(pair.amateur.bytes)
                if content and (text + content).startswith(before[: len(text + content)])
            ]
            masses = mass * probs[fitting]
            left += masses[masses < floor].sum().item()
            for place in (masses >= floor).nonzero()[:, 0].tolist():
                token_id = fitting[place]
                write((*context, token_id), text + pair.amateur.bytes[token_id], masses[place].item())

    write((), b"", 1.0)
    found.pop(None, None)
    total = sum(found.values())
    return {token: mass / total for token, mass in found.items()}, left / total


@pytest.mark.parametrize("pruning", [USUAL, FINE], ids=["usual", "fine"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_covering_is_what_every_text_of_the_amateur_says(name, pruning, pairs):
    pair = pairs(name)
    errors, favourites, nested = [], [], 0
    (completion,) = completions(pair, 1)
    steps = range(len(completion))[:11]
    for t in steps:
        true, left = naive(pair, completion, t)
        tokens = [token for token in sorted(true, key=true.get, reverse=True) if true[token] >= 5e-3][:6]
        needed = [None if token == "end" else token for token in tokens]
        step = read(pair, make_step(pair, completion, t, needed, all_tokens(pair), pruning))
        bounds = step.bounds(needed)
        for token, low, high in zip(tokens, bounds.low, bounds.high, strict=True):
            # The naive value has an interval too, of what it did not follow
            assert low * (1 - 1e-9) <= (true[token] + left) / (1 + left), (t, token)
            assert true[token] / (1 + left) <= high * (1 + 1e-9), (t, token)
        assert sum(step.estimate(all_tokens(pair))) == pytest.approx(1, abs=1e-12)
        if max(map(log_width, bounds.low, bounds.high)) > MAX_WIDTH:
            continue  # which is dropped
        values = [true[token] for token in tokens]
        errors.append(max(abs(math.log(a / b)) for a, b in zip(bounds.estimate, values, strict=True)))
        favourites.append(values.index(min(values)) == bounds.estimate.index(min(bounds.estimate)))
        texts = [pair.tokens.bytes[token] for token in tokens if token != "end"]
        nested += any(text != other and text.startswith(other) for text in texts for other in texts)
    assert len(errors) >= 0.9 * len(steps)
    assert sorted(errors)[int(0.9 * len(errors))] < 0.02
    assert all(favourites)
    assert nested or not name.startswith("3 digits")  # candidates that begin others were among them


def test_what_follows_a_step_changes_nothing(pairs):
    pair = pairs("1 digit, 3 digits")
    one = next(completions(pair, 1))
    place = 7  # after "OK, 3*2=", before a number that the amateur may write as one token
    other = [*one[:place], *pair.expert("123456 apples", add_special_tokens=False).input_ids]
    bounds = [
        read(pair, make_step(pair, completion, place, one[place : place + 1])).bounds(one[place : place + 1])
        for completion in (one[: place + 1], one, other)
    ]
    assert bounds[0] == bounds[1] == bounds[2]


def test_a_step_after_tokens_that_the_expert_would_not_write_is_not_read(pairs):
    pair = pairs("3 digits, 1 digit")
    ids = pair.tokens.ids
    digits = [ids[digit][0] for digit in (b"3", b"0")]
    assert b"30" in ids
    assert pair.covering.starts([*digits, ids[b"."][0]], 3)[2] is None


def test_the_table_says_what_many_unlikely_tokens_say(pairs, monkeypatch):
    pair = pairs("1 digit, 3 digits")
    (completion,) = completions(pair, 1)
    exact, by_table = (make_step(pair, completion, 7, [], all_tokens(pair)) for _ in range(2))
    read(pair, exact)
    monkeypatch.setattr(token_lookup, "_MOST_TOKENS", 2)
    read(pair, by_table)
    assert by_table._by_table > 0.2 * by_table._everything()
    estimates = [step.estimate(all_tokens(pair)) for step in (by_table, exact)]
    torch.testing.assert_close(*estimates, rtol=0, atol=0.01)


@pytest.mark.parametrize("name", PAIRS)
def test_an_interval_that_is_narrow_enough_needs_no_further_trials(name, pairs, monkeypatch):
    pair = pairs(name)
    (completion,) = completions(pair, 1)
    tried = Counter()
    finality = NextTokens.finality

    def count(self, edge, beyond):
        tried[exact] += len(beyond)
        return finality(self, edge, beyond)

    monkeypatch.setattr(NextTokens, "finality", count)
    for t, token in enumerate(completion[:-1][:11]):
        found = []
        for exact in (False, True):
            step = read(pair, make_step(pair, completion, t, [token]))
            found.append((step.bounds([token], 0.0 if exact else MAX_WIDTH), step.num_opened))
        (wide, few), (narrow, many) = found
        assert few == many
        assert wide.estimate == pytest.approx(narrow.estimate, rel=1e-12)
        assert wide.low[0] <= narrow.low[0] * (1 + 1e-12) and narrow.high[0] <= wide.high[0] * (1 + 1e-12)
        is_kept = log_width(wide.low[0], wide.high[0]) <= MAX_WIDTH
        assert is_kept == (log_width(narrow.low[0], narrow.high[0]) <= MAX_WIDTH)
    assert 0 < tried[False] < tried[True]


@pytest.mark.parametrize("name", PAIRS)
def test_few_contexts_are_enough_to_reach_a_step(name, pairs):
    pair = pairs(name)
    (completion,) = completions(pair, 1)
    for t, token in enumerate(completion[:-1][:11]):
        start = pair.covering.starts(completion, t + 1)[t]
        assert pair.amateur.join(start.path) == start.missing
        pruning = USUAL._replace(most_contexts=len(start.path) + 1)
        step = read(pair, make_step(pair, completion, t, [token], pruning=pruning))
        assert step.is_read and step.num_opened == len(start.path) + 1


def test_an_interval_that_cannot_be_narrow_enough_is_not_tried(pairs, monkeypatch):
    pair = pairs("3 digits, 1 digit")
    (completion,) = completions(pair, 1)
    steps = []
    for t, token in enumerate(completion[:-1][:11]):
        start = pair.covering.starts(completion, t + 1)[t]
        pruning = USUAL._replace(most_contexts=len(start.path) + 1)
        step = read(pair, make_step(pair, completion, t, [token], pruning=pruning))
        if not step._states.tried.all() and step._least_width([token]) > MAX_WIDTH:
            steps.append((step, token))
    assert steps
    monkeypatch.setattr(CoveredStep, "_try", lambda self, states: pytest.fail("tried"))
    for step, token in steps:
        bounds = step.bounds([token], MAX_WIDTH)
        assert log_width(bounds.low[0], bounds.high[0]) > MAX_WIDTH


def test_without_a_text_that_begins_as_the_expert_s_nothing_is_said(pairs):
    pair = pairs("1 digit, 3 digits")
    step = make_step(pair, pair.expert("OK", add_special_tokens=False).input_ids, 0, [5])
    assert not step.is_read and step.bounds([5]).high == [1.0]
    read(pair, step)
    assert step.is_read


@pytest.mark.parametrize("name", PAIRS)
def test_the_amateur_s_own_tokens_are_those_of_the_whole_text(name, pairs):
    pair = pairs(name)
    for completion in completions(pair, 5):
        content = pair.tokens.join(completion[:-1])
        ends = list(range(len(content) + 1))
        expected = pair.amateur.encode_all([content[:end] for end in ends])
        assert pair.covering._own_tokens_up_to(content, ends) == expected
