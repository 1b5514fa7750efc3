import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from trl_lightreasoner.vocabulary import Vocabulary, check_embedded, model_vocabulary, shared_vocabulary

from .conftest import make_tokenizer


WORDS = {"one": 0, "two": 1, "three": 2, "four": 3}


def word_tokenizer(words=WORDS, **special_tokens):
    """A tokenizer with exactly these words; special tokens that are not among them come after the last."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="one")), **special_tokens)


# Every second id, ids with one gap, and the usual case without gaps
IDS = {"even": list(range(0, 20, 2)), "gap": [0, 1, 2, 5, 6], "late": [3, 4, 5], "prefix": list(range(8)), "one": [0]}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_columns_and_ids_round_trip(ids):
    vocabulary = Vocabulary(ids)
    columns = torch.arange(len(ids))
    assert len(vocabulary) == len(ids)
    assert vocabulary.ids_of(columns).tolist() == ids
    assert vocabulary.columns_of(torch.tensor(ids)).tolist() == columns.tolist()
    label_ids = torch.tensor([ids, ids[::-1]])
    assert torch.equal(vocabulary.ids_of(vocabulary.columns_of(label_ids)), label_ids)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_select_takes_the_columns_of_the_vocabulary(ids, shape):
    logits = torch.full((*shape, 24), math.nan)
    logits[..., ids] = torch.tensor(ids, dtype=torch.float32)
    assert torch.equal(Vocabulary(ids).select(logits), torch.tensor(ids).expand(*shape, -1).float())


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_contains_says_which_ids_are_in_the_vocabulary(ids):
    assert Vocabulary(ids).contains(torch.arange(24)).tolist() == [i in ids for i in range(24)]


def test_ids_in_any_order_are_the_same_vocabulary():
    assert Vocabulary([6, 0, 3]).ids.tolist() == [0, 3, 6]


def test_an_id_that_two_tokens_have_is_one_column():
    vocabulary = Vocabulary([0, 1, 1, 2])
    assert len(vocabulary) == 3
    assert vocabulary.select(torch.tensor([[1.0, 2.0, 3.0, 9.0]])).tolist() == [[1.0, 2.0, 3.0]]


def test_two_tokens_of_one_id_are_shared_once(monkeypatch):
    tokenizer = word_tokenizer()
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"one": 0, "two": 1, "zwei": 1, "three": 2})
    assert shared_vocabulary(tokenizer, tokenizer, 8, 8).ids.tolist() == [0, 1, 2]


def test_select_copies_nothing_when_the_real_tokens_come_first():
    logits = torch.randn(3, 12)
    assert Vocabulary(list(range(8))).select(logits).data_ptr() == logits.data_ptr()


def test_padded_columns_are_not_in_a_models_vocabulary(tokenizer):
    vocabulary = model_vocabulary(tokenizer, width=len(tokenizer) + 12)
    assert vocabulary.ids.tolist() == list(range(len(tokenizer)))


def test_a_token_that_is_added_later_is_in_the_vocabulary():
    tokenizer = word_tokenizer()
    before = len(model_vocabulary(tokenizer, width=99))
    tokenizer.add_tokens(["later"])
    assert len(model_vocabulary(tokenizer, width=99)) == before + 1


def test_the_tokens_are_listed_once(monkeypatch):
    tokenizer = word_tokenizer()
    tokens, listed = tokenizer.get_vocab(), []
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: listed.append(1) or tokens)
    assert [len(model_vocabulary(tokenizer, width)) for width in (99, 1)] == [len(tokens), 1]
    assert listed == [1]


def test_gaps_between_ids_are_not_in_a_models_vocabulary():
    assert model_vocabulary(word_tokenizer({"one": 0, "two": 3, "three": 5}), width=9).ids.tolist() == [0, 3, 5]


def test_differently_padded_logits_share_every_token(tokenizer):
    shared = shared_vocabulary(tokenizer, make_tokenizer(), len(tokenizer) + 12, len(tokenizer) + 4)
    assert shared.ids.tolist() == sorted(tokenizer.get_vocab().values())


def test_eos_and_added_tokens_are_shared(tokenizer):
    # `vocab_size` leaves out what was added to the tokenizer, EOS with it
    assert tokenizer.vocab_size <= tokenizer.eos_token_id
    shared = shared_vocabulary(tokenizer, tokenizer, 320, 320)
    added = torch.tensor([tokenizer.eos_token_id, tokenizer.pad_token_id, *tokenizer.added_tokens_decoder])
    assert shared.contains(added).all()


def test_swapped_ids_are_refused_by_the_first_token():
    swapped = {**WORDS, "two": 2, "three": 1}
    message = "token 'two' has id 1 for the expert and id 2 for the amateur"
    with pytest.raises(ValueError, match=message):
        shared_vocabulary(word_tokenizer(), word_tokenizer(swapped), 4, 4)


def test_another_word_under_one_id_is_refused():
    other = {"one": 0, "two": 1, "drei": 2, "four": 3}
    with pytest.raises(ValueError, match="id 2 is token 'three' for the expert and 'drei' for the amateur"):
        shared_vocabulary(word_tokenizer(), word_tokenizer(other), 4, 4)


def test_another_tokenizer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="tokenizers differ: .* Choose two models of one family"):
        shared_vocabulary(tokenizer, word_tokenizer(), len(tokenizer), 4)


def test_tokenizers_without_a_common_token_are_refused():
    words, others = word_tokenizer({"one": 0, "two": 1}), word_tokenizer({"eins": 2, "zwei": 3})
    with pytest.raises(ValueError, match="share no token"):
        shared_vocabulary(words, others, 4, 4)


@pytest.mark.parametrize("name", ["expert", "amateur"])
def test_a_token_without_a_logit_is_not_shared(name):
    widths = {"expert": 4, "amateur": 4, name: 3}
    shared = shared_vocabulary(word_tokenizer(), word_tokenizer(), widths["expert"], widths["amateur"])
    assert shared.ids.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=f"No token of the {name}'s tokenizer has a logit. Pass the tokenizer that"):
        model_vocabulary(word_tokenizer({"two": 1, "three": 2}), 1, name)


def test_a_token_that_occurs_needs_an_embedding():
    check_embedded([0, 2], word_tokenizer(), 3, 7, "model")
    with pytest.raises(ValueError, match="^Row 7 has the token 'four', whose id is 3, and the model has 3 embeddings"):
        check_embedded([3, 0], word_tokenizer(), 3, 7, "model")


def test_logits_exactly_as_wide_as_the_tokenizer_are_accepted():
    assert len(shared_vocabulary(word_tokenizer(), word_tokenizer(), 4, 4)) == 4


@pytest.mark.parametrize("larger", ["expert", "amateur"])
def test_a_token_that_one_side_has_is_not_shared(larger):
    tokenizers = {"expert": word_tokenizer(), "amateur": word_tokenizer()}
    tokenizers[larger].add_tokens(["five"])
    shared = shared_vocabulary(tokenizers["expert"], tokenizers["amateur"], 8, 8)
    assert shared.ids.tolist() == [0, 1, 2, 3]


def test_a_word_in_the_middle_that_one_side_lacks_is_not_shared():
    shared = shared_vocabulary(word_tokenizer(), word_tokenizer({"one": 0, "two": 1, "four": 3}), 4, 4)
    assert shared.ids.tolist() == [0, 1, 3]


def test_renamed_special_tokens_are_left_out_with_a_warning(caplog):
    expert = word_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    amateur = word_tokenizer(eos_token="<|Assistant|>", pad_token="<|endoftext|>")
    assert expert.eos_token_id == amateur.eos_token_id == 4
    shared = shared_vocabulary(expert, amateur, 8, 8)
    assert shared.ids.tolist() == [0, 1, 2, 3, 5]
    assert "1 added tokens have different names" in caplog.text
    assert "(the first is id 4: '<|im_end|>' and '<|Assistant|>')" in caplog.text


def test_words_that_were_added_are_no_special_tokens():
    expert, amateur = word_tokenizer(), word_tokenizer()
    expert.add_tokens("apples")
    amateur.add_tokens("pears")
    with pytest.raises(ValueError, match="id 4 is token 'apples' for the expert and 'pears' for the amateur"):
        shared_vocabulary(expert, amateur, 8, 8)


def test_tokens_that_agree_give_no_warning(caplog, tokenizer):
    shared_vocabulary(tokenizer, make_tokenizer(), 320, 304)
    assert not caplog.records


def test_special_tokens_with_moved_ids_are_refused():
    expert = word_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    amateur = word_tokenizer(eos_token="<|endoftext|>", pad_token="<|im_end|>")
    with pytest.raises(ValueError, match=r"token '<\|im_end\|>' has id 4 for the expert and id 5 for the amateur"):
        shared_vocabulary(expert, amateur, 8, 8)


def test_a_word_under_the_id_of_a_special_token_is_refused():
    expert = word_tokenizer({**WORDS, "five": 4})
    amateur = word_tokenizer(eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=r"id 4 is token 'five' for the expert and '<\|im_end\|>' for the amateur"):
        shared_vocabulary(expert, amateur, 8, 8)


def test_a_renamed_special_token_that_stands_elsewhere_is_refused():
    # '<b>' is id 4 for the amateur, but the expert knows it as id 5: reading 4 for 5 would be another text
    expert = word_tokenizer(eos_token="<a>", pad_token="<b>")
    amateur = word_tokenizer(eos_token="<b>")
    with pytest.raises(ValueError, match="tokenizers differ"):
        shared_vocabulary(expert, amateur, 8, 8)
