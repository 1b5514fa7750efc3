import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_lightreasoner.models.token_bytes import TokenBytes
from trl_lightreasoner.sampling.independent_texts import independent_places

from .other_tokens import byte_level_tokenizer, make_texts, sentencepiece_tokenizer


TEXTS = make_texts(300)
TOKENIZERS = {
    "1 digit": lambda: byte_level_tokenizer(TEXTS, 1, 330),
    "3 digits": lambda: byte_level_tokenizer(TEXTS, 3, 400),
    "pieces": lambda: sentencepiece_tokenizer(TEXTS, 200),
    "a few tokens": lambda: sentencepiece_tokenizer(["a b c d " * 20], 20),
}


def make(name):
    tokenizer = TOKENIZERS[name]()
    return TokenBytes(tokenizer, len(tokenizer))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_is_tokenized_by_its_parts(name):
    tokens, draw = make(name), random.Random(0)
    places, count = independent_places(tokens), 0
    pieces = [content for content in tokens.ids if content.isascii()]
    for text in TEXTS[:100]:
        for content in (text.encode(), b"".join(draw.choices(pieces, k=12))):
            cuts = [0, *(found.start() for found in places.finditer(content)), len(content)]
            parts = [tokens.encode(content[first:end]) for first, end in zip(cuts, cuts[1:], strict=False)]
            assert sum(parts, []) == tokens.encode(content)
            count += len(parts)
    assert count > 250


def test_no_place_is_inside_a_token():
    tokens = make("a few tokens")
    assert any(b"a b" in content for content in tokens.ids)
    places = independent_places(tokens)
    assert not any(places.search(content) for content in tokens.ids)
    assert places.search(b"x y")


def test_digits_that_are_counted_from_the_left_are_not_parted():
    places = independent_places(make("3 digits"))
    assert [found.start() for found in places.finditer(b"is 1234, and a12.")] == [2, 8, 12, 14]


def test_the_start_of_a_line_is_independent_unless_it_parts_the_line_breaks_before_it(monkeypatch):
    assert independent_places(make("1 digit")).match(b"\na", 1)
    # Not by luck: all ends of lines are tried
    monkeypatch.setattr("trl_lightreasoner.sampling.independent_texts._PAIRS", 0)
    # As GPT-2's, which leaves the last of some line breaks to what follows
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text + "\n\n" for text in TEXTS], trainer)
    tokens = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer), tokenizer.get_vocab_size())
    assert b"\n\n" in tokens.ids and len(tokens.encode(b"\n\na")) == 3
    places = independent_places(tokens)
    assert places.match(b"a b", 1) and not places.match(b"\na", 1)
