import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from trl_lightreasoner.models.token_text import TokenTexts, label_of, spell_out

from ..conftest import make_tokenizer


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain $x^2$ <b>", "plain $x^2$ <b>"),
        ("a\nb", "a↵\nb"),
        ("\t", "⇥"),
        ("\x00\x1b", "⟨U+0000⟩⟨U+001B⟩"),
        ("\u202eabc\u2069", "⟨U+202E⟩abc⟨U+2069⟩"),
        ("\u200b\ufeff", "⟨U+200B⟩⟨U+FEFF⟩"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("\u0301e", "◌\u0301e"),
        ("数学 é שלום", "数学 é שלום"),
        ("\u2028", "⟨U+2028⟩"),
    ],
)
def test_what_cannot_be_seen_is_spelled_out(text, shown):
    assert spell_out(text) == shown


def test_nothing_invisible_is_left_of_any_character():
    shown = spell_out("".join(map(chr, range(0x3000))))
    assert {char for char in shown if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Cn", "Co")} == {"\n"}


@pytest.mark.parametrize(
    ("text", "label"), [(" the", "␣the"), ("  ", "␣␣"), ("a b ", "a b␣"), ("↵\n", "↵"), ("", "⟨empty⟩")]
)
def test_a_token_alone_shows_its_blanks(text, label):
    assert label_of(text) == label


def test_the_tokens_of_a_text_are_the_text(tokenizer):
    texts = TokenTexts(tokenizer)
    text = "Ann has 3 apples,  and $x^{2}$."
    assert "".join(map(texts, tokenizer(text).input_ids)) == text


def test_a_part_of_a_character_is_shown_as_bytes(tokenizer):
    texts = TokenTexts(tokenizer)
    assert [texts(i) for i in tokenizer("é").input_ids] == ["⟨C3⟩", "⟨A9⟩"]


def test_special_tokens_are_shown_and_known(tokenizer):
    texts = TokenTexts(tokenizer)
    assert texts(tokenizer.eos_token_id) == "<|im_end|>"
    assert texts.is_special(tokenizer.eos_token_id)
    assert not texts.is_special(tokenizer("a").input_ids[0])


def test_a_word_that_was_added_is_text():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens("apples")
    texts = TokenTexts(tokenizer)
    (token_id,) = tokenizer("apples").input_ids
    assert texts(token_id) == "apples" and not texts.is_special(token_id)


@pytest.mark.parametrize("token_id", [10**6, -1])
def test_an_unknown_id_is_shown_as_such(token_id, tokenizer):
    assert TokenTexts(tokenizer)(token_id) == f"⟨token {token_id}⟩"


def test_without_a_tokenizer_tokens_are_numbers():
    assert TokenTexts(None)(12) == "#12"
    assert not TokenTexts(None).is_special(12)


def test_the_blank_before_a_word_of_a_sentencepiece_model_is_kept():
    vocabulary = {"<unk>": 0, "▁the": 1, "a": 2, "<0xE2>": 3, "▁": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert [texts(i) for i in (1, 2, 3)] == [" the", "a", "⟨E2⟩"]
