import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_lightreasoner.models.token_bytes import TokenBytes

from ..conftest import make_tokenizer
from ..sampling.other_tokens import byte_level_tokenizer, make_texts, sentencepiece_tokenizer


TEXTS = make_texts(200)
KINDS = {
    "byte-level": lambda: byte_level_tokenizer(TEXTS, 1, 300),
    "a blank before the text": lambda: sentencepiece_tokenizer(TEXTS, 100),
    "no blank before the text": lambda: sentencepiece_tokenizer(TEXTS, 100, begins_with_blank=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["OK, 3+4=7.", " 3", "3", "\n\nA", "a  b ", "\u00e9 \U0001f600", "<|end|>", "<0x41>", ""]
)
def test_bytes_come_back_from_tokens(kind, text):
    tokenizer = KINDS[kind]()
    tokens = TokenBytes(tokenizer, len(tokenizer))
    ids = tokens.encode(text.encode())
    assert tokens.join(ids) == text.encode()
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_part_of_a_character_is_tokens_of_bytes(kind):
    tokenizer = KINDS[kind]()
    tokens = TokenBytes(tokenizer, len(tokenizer))
    assert tokens.join(tokens.encode("4 \U0001f600".encode()[:-2])) == "4 \U0001f600".encode()[:-2]
    assert tokens.encode(b"\xff4") is None


def test_what_a_normalizer_changes_has_no_tokens():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokens = TokenBytes(tokenizer, len(tokenizer))
    assert tokens.encode("e\u0301".encode()) is None
    assert tokens.encode("\u00e9".encode()) is not None


def test_padding_that_a_tokenizer_was_left_with_plays_no_part():
    tokenizer = make_tokenizer()
    tokenizer(["2", "2 + 2"], padding=True, truncation=True, max_length=2)
    tokens = TokenBytes(tokenizer, len(tokenizer))
    assert [tokens.join(ids) for ids in tokens.encode_all([b"2", b"2 + 2 = 4"])] == [b"2", b"2 + 2 = 4"]


def test_a_tokenizer_that_does_not_give_text_back_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError, match="The bytes of the amateur's tokens cannot be determined.* Choose two models"):
        TokenBytes(tokenizer, 3, "amateur")
