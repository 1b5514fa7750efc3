"""Answers in pieces, by a decoder that runs out of memory."""

import pytest
import torch

from trl_lightreasoner.contrast import NonFiniteLogitsError
from trl_lightreasoner.evaluation import answering
from trl_lightreasoner.evaluation.answering import Answering
from trl_lightreasoner.generation.cuda_graphs import Generated


EOS = 0
ROOM = 10
# Prompts of one token, which says how many tokens the answer has
PROMPTS = [[length] for length in (3, 9, 10, 2, 7, 10, 8, 12)]


def answer_to(prompt: list[int]) -> list[int]:
    return [100 + prompt[0] + i for i in range(prompt[0] - 1)] + [EOS]


class Memory:
    """A decoder whose memory holds `most` rows, from contexts of more than `length` tokens on."""

    def __init__(self, most: int, length: int):
        self.most, self.length = most, length
        self.calls: list[list[int]] = []  # lengths of the contexts

    def __call__(self, contexts: list[list[int]], max_new_tokens: int) -> Generated:
        if len(contexts) > self.most and max(map(len, contexts)) > self.length:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.calls.append([len(context) for context in contexts])
        written = [len(context) - 1 for context in contexts]
        pairs = zip(contexts, written, strict=True)
        return Generated([answer_to(context)[start : start + max_new_tokens] for context, start in pairs], None)


def answers(decode: Memory, monkeypatch) -> list[list[int]]:
    monkeypatch.setattr(answering, "TOKENS_A_PIECE", 4)
    completions, ended = Answering(None, decode, None, [EOS], is_raw=False, batch_size=8).complete(PROMPTS, [ROOM] * 8)
    assert ended == [prompt[0] <= ROOM for prompt in PROMPTS]
    return completions


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_pieces_that_are_written_are_kept_when_memory_runs_out(most, monkeypatch, caplog):
    decode = Memory(most, length=1)  # the first piece of all rows fits
    assert answers(decode, monkeypatch) == [answer_to(prompt)[:ROOM] for prompt in PROMPTS]
    lengths = sorted(length for call in decode.calls for length in call)
    assert lengths == [1] * 8 + [5] * 6 + [9] * 4  # each piece of each answer once
    assert ("Memory ran out with 6 answers together; going on with 3." in caplog.text) == (most < 6)


def test_rows_that_follow_are_as_few_without_another_try(monkeypatch, caplog):
    decode = Memory(most=3, length=1)
    answers(decode, monkeypatch)
    assert [len(call) for call in decode.calls] == [8, 3, 3, 3, 1]
    assert caplog.text.count("Memory ran out") == 1


def test_answers_with_different_room_share_a_batch(monkeypatch):
    monkeypatch.setattr(answering, "TOKENS_A_PIECE", 4)
    decode = Memory(most=8, length=1)
    rooms = [10, 7, 10, 10, 6, 1, 8, 12]
    completions, ended = Answering(None, decode, None, [EOS], is_raw=False, batch_size=8).complete(PROMPTS, rooms)
    assert completions == [answer_to(prompt)[:room] for prompt, room in zip(PROMPTS, rooms, strict=True)]
    assert ended == [prompt[0] <= room for prompt, room in zip(PROMPTS, rooms, strict=True)]
    assert len(decode.calls[0]) == 8


def test_logits_that_are_not_finite_in_a_later_piece_are_those_of_their_prompt(monkeypatch):
    class Broken(Memory):
        def __call__(self, contexts: list[list[int]], max_new_tokens: int) -> Generated:
            broken = [row for row, context in enumerate(contexts) if context[0] == 7 and len(context) > 1]
            if broken:
                raise NonFiniteLogitsError("model", broken[0], "token 1 of an answer")
            return super().__call__(contexts, max_new_tokens)

    with pytest.raises(NonFiniteLogitsError, match="at a token after the first 4 of an answer are not") as error:
        answers(Broken(most=8, length=1), monkeypatch)
    assert PROMPTS[error.value.row] == [7]


def test_memory_that_does_not_hold_one_row_is_told_on(monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        answers(Memory(most=0, length=1), monkeypatch)


def test_another_error_comes_through(monkeypatch):
    def broken(contexts, max_new_tokens):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        answers(broken, monkeypatch)
