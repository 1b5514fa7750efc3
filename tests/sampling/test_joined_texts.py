import random

import pytest

from trl_lightreasoner.models.token_bytes import TokenBytes
from trl_lightreasoner.sampling.independent_texts import independent_places
from trl_lightreasoner.sampling.joined_texts import JoinedTexts

from .other_tokens import byte_level_tokenizer, make_texts, sentencepiece_tokenizer


TEXTS = make_texts(300)
TOKENIZERS = {
    "1 digit": lambda: byte_level_tokenizer(TEXTS, 1, 330),
    "3 digits": lambda: byte_level_tokenizer(TEXTS, 3, 400),
    "pieces": lambda: sentencepiece_tokenizer(TEXTS, 200),
    "pieces without a blank before": lambda: sentencepiece_tokenizer(TEXTS, 200, begins_with_blank=False),
    "no independent places": lambda: sentencepiece_tokenizer(["a b c d " * 20], 20),
}
UNUSUAL = [
    b"",
    b" ",
    b"\n",
    b" \n",
    b"\n\n",
    b"'s",
    b"\xc3",
    b" \xc3\xa9",
    b"\xff",
    b" a\xff",
    b"a b",
    b"12",
    b" 12\n",
]


def make(name):
    tokenizer = TOKENIZERS[name]()
    return TokenBytes(tokenizer, len(tokenizer))


def draw_texts(tokens, count):
    draw, pieces = random.Random(0), list(tokens.ids)
    return [b"".join(draw.choices(pieces, k=draw.randint(1, 3))) for _ in range(count)] + UNUSUAL


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_joined_texts_have_the_tokens_that_they_have_alone(name, count):
    tokens = make(name)
    texts = draw_texts(tokens, count)
    expected = tokens.encode_all(texts)
    assert JoinedTexts(tokens, independent_places(tokens)).encode_all(texts) == expected
    assert JoinedTexts(tokens, None).encode_all(texts) == expected
    assert None in expected and [] in expected


def test_few_texts_are_left_to_tokenize(monkeypatch):
    tokens = make("1 digit")
    joined = JoinedTexts(tokens, independent_places(tokens))
    given, encode = [], tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda texts: given.extend(texts) or encode(texts))
    joined.encode_all([b" has", b"\n", b".", b" x\n"] * 100)
    assert 0 < len(given) < 10


def test_texts_that_turn_out_to_depend_on_each_other_are_tokenized_alone(monkeypatch):
    tokens = make("1 digit")
    joined = JoinedTexts(tokens, independent_places(tokens))
    pair = next(content for content in tokens.ids if len(content) == 2 and content.isalpha())
    texts = [pair[:1]] * 100
    # As if letters were independent of each other
    monkeypatch.setattr(joined, "_can_follow", [True] * 256)
    monkeypatch.setattr(joined, "_word_behind", [pair[1:]] * 256)
    assert joined.encode_all(texts) == tokens.encode_all(texts)


def test_no_texts_have_no_tokens():
    tokens = make("1 digit")
    assert JoinedTexts(tokens, independent_places(tokens)).encode_all([]) == []
