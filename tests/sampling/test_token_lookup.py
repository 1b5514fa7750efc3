import math

import numpy as np
import pytest
import torch

from trl_lightreasoner.models.token_bytes import TokenBytes
from trl_lightreasoner.sampling import token_lookup
from trl_lightreasoner.sampling.covering import Covering
from trl_lightreasoner.sampling.token_lookup import Request, Table, look_up

from .other_tokens import byte_level_tokenizer, make_texts


@pytest.fixture(scope="module")
def covering():
    texts = make_texts(200)
    expert, amateur = byte_level_tokenizer(texts, 1, 300), byte_level_tokenizer(texts, 3, 330)
    tokens, own = TokenBytes(expert, len(expert)), TokenBytes(amateur, len(amateur) + 5)  # some columns are no tokens
    return Covering(tokens, own, [amateur.eos_token_id])


def make_requests(covering, rows):
    beginnings = [b"a", b" ", b"1", b"xyz", b" a"]
    slices = [covering.amateur.starting_with(beginning) for beginning in beginnings]
    tokens = [covering.expert.ids[content][0] for content in (b" ", b"1", b"a")]
    table = Table(
        np.array([covering.expert_places[token] for token in tokens]), list(map(covering.starting_with, tokens))
    )
    of_row = [(slices[0], [3]), (slices[1], []), (slices[2], [70, 5]), (slices[3], []), (slices[4], []), (None, [])]
    requests = [
        Request(row, each, rest, np.array(others, np.int64))
        for row in range(rows)
        for each, others in of_row
        for rest in (1e-4, 0.1)
    ]
    nothing = np.empty(0, np.int64)
    requests += [Request(row, None, 1e-4, nothing, blank) for row in range(rows) for blank in (0.01, math.inf)]
    return requests + [
        Request(row, None, 1e-3, np.array([40 + row, 90]), blank, table)
        for row in range(rows)
        for blank in (0.0, 0.01)
    ]


def naive(covering, probs, request):
    """What a request asks for, token by token."""
    probs, own = probs[request.row].tolist(), covering.amateur
    is_text = [bool(content) and i not in covering.end_ids for i, content in enumerate(own.bytes)]
    among = range(len(probs)) if request.among is None else own.sorted_ids[request.among]
    hidden = [i for i in range(len(probs)) if (own.bytes[i] or b"")[:1] == b" " and probs[i] < request.blank]
    among = sorted((i for i in among if is_text[i] and i not in hidden), key=lambda i: -probs[i])
    count = 0
    while sum(probs[i] for i in among[count:]) > request.rest and count < token_lookup._MOST_TOKENS:
        count += 1
    found = {"likely": {i: probs[i] for i in among[:count]}, "rest": sum(probs[i] for i in among[count:])}
    found["blank"] = sum(probs[i] for i in hidden)
    found["others"] = [probs[i] * is_text[i] for i in request.others]
    found["at_end"] = sum(probs[i] for i in covering.end_ids)
    if request.table is None:
        return found
    sums = dict.fromkeys(range(len(covering.expert.sorted_ids)), 0.0)
    unlisted = [i for i in (*among[count:], *hidden) if i not in request.others]
    for i in unlisted:
        ids = covering.expert.encode(own.bytes[i])
        if ids is not None:  # else no text begins with it
            sums[covering.expert_places[ids[0]]] += probs[i]
    found["total"] = sum(sums.values())
    found["tokens"] = [sums[place] for place in request.table.tokens]
    contents = [covering.expert.bytes[covering.expert.sorted_ids[place]] for place in request.table.tokens]
    found["near"] = [sum(probs[i] for i in unlisted if own.bytes[i].startswith(content)) for content in contents]
    return found


@pytest.mark.parametrize(("most_tokens", "block"), [(256, 2**22), (4, 2**22), (4, 500)])
def test_a_lookup_says_what_a_loop_over_the_tokens_says(most_tokens, block, covering, monkeypatch):
    monkeypatch.setattr(token_lookup, "_MOST_TOKENS", most_tokens)
    monkeypatch.setattr(token_lookup, "_BLOCK", block)
    torch.manual_seed(0)
    probs = (3 * torch.randn(3, len(covering.amateur.bytes), dtype=torch.float64)).softmax(-1)
    requests = make_requests(covering, len(probs))
    for request, reply in zip(requests, look_up(covering, probs.clone(), requests), strict=True):
        expected = naive(covering, probs, request)
        assert dict(zip(reply.ids, reply.probs, strict=True)) == pytest.approx(expected.pop("likely"), rel=1e-12)
        for name, value in expected.items():
            assert getattr(reply, name) == pytest.approx(value, rel=1e-9, abs=1e-15), name


def test_more_contexts_need_no_more_transfers(covering, monkeypatch):
    transfers = []
    for name in ("tolist", "numpy"):
        copy = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, copy=copy: transfers.append(0) or copy(self))
    counts = []
    for rows in (2, 40):
        transfers.clear()
        probs = torch.full((rows, len(covering.amateur.bytes)), 1 / len(covering.amateur.bytes), dtype=torch.float64)
        look_up(covering, probs, make_requests(covering, rows))
        counts.append(len(transfers))
    assert counts[0] == counts[1]
