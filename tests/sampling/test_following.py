import random

import numpy as np
import pytest

from trl_lightreasoner.models.token_bytes import TokenBytes
from trl_lightreasoner.sampling import following as module
from trl_lightreasoner.sampling.following import Following
from trl_lightreasoner.sampling.next_tokens import NextTokens

from .other_tokens import byte_level_tokenizer, make_texts, sentencepiece_tokenizer


TEXTS = make_texts(300)


@pytest.mark.parametrize("most_waiting", [0, 40, 2**13])
def test_an_amateur_s_token_is_followed_as_its_text_is(most_waiting, monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING", most_waiting)
    expert, amateur = byte_level_tokenizer(TEXTS, 1, 330), sentencepiece_tokenizer(TEXTS, 200)
    own, draw = TokenBytes(amateur, len(amateur)), random.Random(0)
    next_tokens = NextTokens(TokenBytes(expert, len(expert)))
    following = Following(next_tokens, own)
    for text in TEXTS[:10]:
        ids = next_tokens.expert.encode(text.encode())
        edge = next_tokens.edge(tuple(ids[:5]))
        contexts = [(b"", 0), (b" a", 0), (b"1", 0), (b"", 1)]
        places = [following.place(edge, *context) for context in contexts]
        for _ in range(2):
            asked = [(draw.randrange(len(places)), draw.choice(own.sorted_ids)) for _ in range(50)]
            found = following(np.array([places[i] for i, _ in asked]), np.array([token for _, token in asked]))
            texts = [contexts[i][0] + own.bytes[token][contexts[i][1] :] for i, token in asked]
            expected = NextTokens(next_tokens.expert).after(edge, texts)
            assert list(zip(*(column.tolist() for column in found), strict=True)) == expected
    following.forget()
    assert following.place(next_tokens.edge(())) == 0
