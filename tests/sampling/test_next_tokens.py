import random

import pytest

from trl_lightreasoner.models.token_bytes import TokenBytes
from trl_lightreasoner.sampling.next_tokens import _PROBES, LOST, OPEN, NextTokens

from .other_tokens import byte_level_tokenizer, make_texts, sentencepiece_tokenizer


TEXTS = make_texts(300)


def make(tokenizer):
    return NextTokens(TokenBytes(tokenizer, len(tokenizer)))


@pytest.fixture(scope="module")
def next_tokens():
    return make(byte_level_tokenizer(TEXTS, 3, 400))


@pytest.fixture(scope="module")
def questions(next_tokens):
    """The last tokens before a step, and a text after it that goes on as a solution or as anything."""
    draw, tokens, made = random.Random(0), next_tokens.expert, []
    pieces = [content for content in tokens.bytes if content and content.isascii()]
    for text in TEXTS:
        ids = tokens.encode(text.encode())
        t = draw.randrange(len(ids))
        tail = tuple(ids[max(0, t - 6) : t])
        if tuple(tokens.encode(tokens.join(tail))) == tail:
            further = b"".join(draw.choices(pieces, k=draw.randint(1, 4)))
            made += [(tail, further), (tail, b" " + further), (tail, tokens.join(ids[t : t + draw.randint(1, 4)]))]
    return made


def asked_afresh(next_tokens, tail, beyond):
    """The next token, for which the whole text is tokenized."""
    ids = tuple(next_tokens.expert.encode(next_tokens.expert.join(tail) + beyond))
    return LOST if ids[: len(tail)] != tail else ids[len(tail)] if len(ids) > len(tail) else OPEN


def test_what_is_known_is_what_the_tokenizer_says_of_the_whole_text(next_tokens, questions):
    assert next_tokens.is_independent(b"a", b" ") and next_tokens.is_independent(b"a", b".")
    for tail, beyond in questions:
        ((token, whole),) = next_tokens.after(next_tokens.edge(tail), [beyond])
        assert whole and token == asked_afresh(next_tokens, tail, beyond)


def test_no_further_text_changes_what_is_final(next_tokens, questions):
    final, draw = 0, random.Random(1)
    pieces = [content for content in next_tokens.expert.bytes if content and content.isascii()]
    for tail, beyond in questions:
        ((is_open, lost),) = next_tokens.finality(next_tokens.edge(tail), [beyond])
        token = asked_afresh(next_tokens, tail, beyond)
        for _ in range(5):
            longer = asked_afresh(next_tokens, tail, beyond + b"".join(draw.choices(pieces, k=2)))
            assert is_open or longer == token
            assert lost or longer != LOST
        final += not is_open
    assert final > len(questions) / 2


@pytest.mark.parametrize("kind", ["byte level", "pieces"])
def test_texts_that_cannot_change_an_answer_are_not_tried(kind, questions, monkeypatch):
    tokenizer = byte_level_tokenizer(TEXTS, 3, 400) if kind == "byte level" else sentencepiece_tokenizer(TEXTS, 200)
    some, every = make(tokenizer), make(tokenizer)
    monkeypatch.setattr(every, "_probes", lambda content: list(_PROBES))
    texts = [beyond for _, beyond in questions]
    for edge in (some.edge(()), some.edge(tuple(some.expert.encode(b"OK, 12 apples")))):
        assert some.finality(edge, texts) == every.finality(edge, texts)
    assert some._probes(b"apples") == [b"a", b"'s"]


def test_texts_with_the_same_words_around_a_step_are_asked_once(next_tokens, monkeypatch):
    asked = []
    encode_all = TokenBytes.encode_all
    monkeypatch.setattr(TokenBytes, "encode_all", lambda self, texts: asked.extend(texts) or encode_all(self, texts))
    encode = next_tokens.expert.encode
    one, other = (tuple(encode(text)) for text in (b"OK, 12 apples", b"so 3 + 4"))
    asked.clear()
    next_tokens.finality(next_tokens.edge(one), [b" xyz and then"])
    count = len(asked)
    assert count
    next_tokens.finality(next_tokens.edge(other), [b" xyz or else"])
    assert len(asked) == count


def test_a_tokenizer_whose_tokens_go_on_behind_a_blank_is_asked_for_every_text():
    tokenizer = make(sentencepiece_tokenizer(["a b c d " * 20], 20))
    assert any(b"a b" in content for content in tokenizer.expert.ids)
    assert not tokenizer.is_independent(b"a", b" b")
    tail = tuple(tokenizer.expert.encode(b"a b c d"))
    assert tokenizer.edge(tail).tail == tail
