"""Slots that the next prompts fill, on a CPU, where each step is called instead of replayed."""

import pytest
import torch
from accelerate import PartialState

from trl_lightreasoner.evaluation.answering import Answering
from trl_lightreasoner.generation import cuda_graphs
from trl_lightreasoner.generation.completions import GreedyDecoder
from trl_lightreasoner.generation.cuda_graphs import complete_in_slots
from trl_lightreasoner.vocabulary import model_vocabulary

from ..generation.test_greedy import make_prompts, naive_greedy


LENGTHS = [12, 1, 7, 7, 20, 3, 9, 1, 15, 5, 2]
ROOMS = [9, 20, 1, 14, 3, 20, 2, 20, 6, 11, 20]


@pytest.fixture
def vocabulary(tokenizer, expert):
    return model_vocabulary(tokenizer, expert.config.vocab_size)


@pytest.fixture
def naive(expert, vocabulary):
    """What the expert says to each prompt in 20 tokens without EOS."""
    return [naive_greedy(expert, ids, vocabulary.ids.tolist(), [], 20) for ids in make_prompts(LENGTHS)]


@pytest.fixture
def in_slots(expert, vocabulary):
    def run(num_slots, rooms=ROOMS, eos_ids=(), is_answered=None):
        completions = [[] for _ in LENGTHS]
        arguments = (make_prompts(LENGTHS), list(rooms), vocabulary, list(eos_ids), num_slots)
        complete_in_slots(expert, *arguments, completions, is_answered)
        return completions

    return run


def cut(ids, room, eos_ids):
    end = next((i + 1 for i, token_id in enumerate(ids) if token_id in eos_ids), len(ids))
    return ids[: min(room, end)]


@pytest.mark.parametrize("steps", [1, 32])
@pytest.mark.parametrize("num_slots", [1, 4, 100])
@pytest.mark.parametrize("ends", ["never", "some", "at the first token"])
def test_completions_are_those_of_each_prompt_alone(in_slots, naive, num_slots, steps, ends, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", steps)
    eos_ids = {
        "never": [],
        "some": [naive[1][4], naive[5][11], naive[7][2]],
        "at the first token": [ids[0] for ids in naive],
    }[ends]
    expected = [cut(ids, room, eos_ids) for ids, room in zip(naive, ROOMS, strict=True)]
    assert in_slots(num_slots, eos_ids=eos_ids) == expected
    assert len(set(map(len, expected))) > 3 or ends == "at the first token"


@pytest.mark.parametrize("tokens", [1, 16])
def test_prompts_are_read_a_few_at_a_time(in_slots, naive, tokens, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "PREFILL_TOKENS", tokens)
    assert in_slots(4) == [ids[:room] for ids, room in zip(naive, ROOMS, strict=True)]


def test_one_graph_serves_until_no_prompt_waits(in_slots, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", 1)
    events = []
    for name in ("_capture", "fill"):
        method = getattr(cuda_graphs._Decoder, name)

        def noted(self, *args, name=name, method=method):
            events.append((name, len(self.rows)))
            return method(self, *args)

        monkeypatch.setattr(cuda_graphs._Decoder, name, noted)
    in_slots(4)
    last_fill = max(i for i, (name, _) in enumerate(events) if name == "fill")
    assert [event for event in events[:last_fill] if event[0] == "_capture"] == [("_capture", 4)]
    assert [size for name, size in events[last_fill:] if name == "_capture"] == [2, 1]


def test_prompts_wait_until_some_can_be_read_together(in_slots, naive, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", 1)
    monkeypatch.setattr(cuda_graphs, "_PARTS", 2)
    sizes, fill = [], cuda_graphs._Decoder.fill
    monkeypatch.setattr(
        cuda_graphs._Decoder, "fill", lambda self, slots, rows: sizes.append(len(rows)) or fill(self, slots, rows)
    )
    assert in_slots(6) == [ids[:room] for ids, room in zip(naive, ROOMS, strict=True)]
    assert sizes[0] == 6 and min(sizes[1:-1]) >= 3 and sum(sizes) == len(LENGTHS)


@pytest.mark.parametrize("num_slots, steps", [(1, 32), (3, 1), (3, 4), (11, 32)])
def test_an_answer_ends_at_the_look_that_found_it(in_slots, naive, num_slots, steps, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", steps)
    monkeypatch.setattr(cuda_graphs, "TOKENS_A_LOOK", 4)
    answered = {1: 6, 3: 4, 5: 17, 10: 9}  # tokens of the answer
    asked = []

    def is_answered(row, ids):
        assert ids == naive[row][: len(ids)]
        asked.append((row, len(ids)))
        return len(ids) >= answered.get(row, 99)

    expected = [ids[:room] for ids, room in zip(naive, ROOMS, strict=True)]
    for row, count in {1: 8, 3: 4, 5: 20, 10: 12}.items():
        expected[row] = naive[row][:count]
    assert in_slots(num_slots, is_answered=is_answered) == expected
    assert len(set(asked)) == len(asked) and all(count % 4 == 0 for _, count in asked)


def test_an_answered_row_leaves_its_slot(in_slots, expert, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", 1)
    monkeypatch.setattr(cuda_graphs, "TOKENS_A_LOOK", 4)
    passes = []
    expert.register_forward_pre_hook(lambda *args: passes.append(1))
    completions = in_slots(1, rooms=[20] * len(LENGTHS), is_answered=lambda row, ids: True)
    assert {len(ids) for ids in completions} == {4}
    assert len(passes) <= (4 + 2) * len(LENGTHS)


def test_an_eos_ends_a_row_before_the_look_behind_it(in_slots, naive, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "TOKENS_A_LOOK", 4)
    eos_ids = [naive[1][5]]
    expected = [cut(ids, room, eos_ids) for ids, room in zip(naive, ROOMS, strict=True)]
    assert len(expected[1]) == 6
    assert in_slots(3, eos_ids=eos_ids, is_answered=lambda row, ids: row == 1 and len(ids) > 6) == expected


def test_what_was_generated_is_kept_when_memory_runs_out(in_slots, expert, vocabulary, naive, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", 1)
    fill, completions = cuda_graphs._Decoder.fill, [[] for _ in LENGTHS]

    def limited(self, slots, rows):
        if rows[-1] > 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        fill(self, slots, rows)

    monkeypatch.setattr(cuda_graphs._Decoder, "fill", limited)
    with pytest.raises(torch.OutOfMemoryError):
        complete_in_slots(expert, make_prompts(LENGTHS), ROOMS, vocabulary, [], 4, completions)
    assert all(ids == naive[row][: len(ids)] for row, ids in enumerate(completions))
    whole = [len(ids) == room for ids, room in zip(completions, ROOMS, strict=True)]
    assert any(whole) and not all(whole)
    assert any(0 < len(ids) < room for ids, room in zip(completions, ROOMS, strict=True))


# Answers


class Texts:
    """A tokenizer whose text says how many tokens it has, and is answered from some number of them on."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["The answer is 4.\n\nQuestion: What?" if len(ids) > 6 else "Let me see" for ids in rows]


@pytest.fixture
def answering(expert, vocabulary, monkeypatch):
    monkeypatch.setattr("trl_lightreasoner.generation.completions.why_no_graph", lambda model: None)

    PartialState()  # for warnings

    def make(eos_ids, is_raw=False, batch_size=4):
        decode = GreedyDecoder(expert, vocabulary, eos_ids)
        return Answering(expert, decode, Texts(), eos_ids, is_raw, batch_size)

    return make


def test_answers_in_slots_are_those_of_each_prompt_alone(answering, naive, monkeypatch):
    calls = []
    monkeypatch.setattr(GreedyDecoder, "__call__", lambda *args: calls.append(args))  # pieces
    eos_ids = [naive[1][4], naive[5][11]]
    completions, ended = answering(eos_ids).complete(make_prompts(LENGTHS), ROOMS)
    assert completions == [cut(ids, room, eos_ids) for ids, room in zip(naive, ROOMS, strict=True)]
    assert ended == [ids[-1] in eos_ids for ids in completions]
    assert any(ended) and not all(ended) and not calls


def test_a_base_model_stops_after_its_answer(answering, naive, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "TOKENS_A_LOOK", 4)
    completions, ended = answering([], is_raw=True).complete(make_prompts(LENGTHS), ROOMS)
    assert completions == [ids[: min(room, 8)] for ids, room in zip(naive, ROOMS, strict=True)]
    assert ended == [room > 6 or room == 8 for room in ROOMS]


@pytest.mark.parametrize("is_raw", [False, True])
def test_answers_go_on_with_fewer_slots_when_memory_runs_out(answering, naive, is_raw, monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "TOKENS_A_LOOK", 4)
    monkeypatch.setattr(cuda_graphs, "STEPS_BETWEEN_CHECKS", 1)
    fill, tokens = cuda_graphs._Decoder.fill, []

    def limited(self, slots, rows):
        tokens.append(sum(len(self.prompt_ids[row]) for row in rows))
        if len(self.rows) > 2 and rows[-1] > 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        fill(self, slots, rows)

    monkeypatch.setattr(cuda_graphs._Decoder, "fill", limited)
    completions, ended = answering([], is_raw).complete(make_prompts(LENGTHS), ROOMS)
    if is_raw:
        assert all(
            ids == full[: len(ids)] and (has_ended or len(ids) == room)
            for ids, full, room, has_ended in zip(completions, naive, ROOMS, ended, strict=True)
        )
        # Tokens from before count for the first look after
        assert max(map(len, completions)) == 8
    else:
        assert completions == [ids[:room] for ids, room in zip(naive, ROOMS, strict=True)]
    assert "Memory ran out with 4 answers together; going on with 2." in caplog.text


def test_memory_that_does_not_hold_one_slot_is_told_on(answering, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cuda_graphs._Decoder, "fill", fail)
    with pytest.raises(torch.OutOfMemoryError):
        answering([]).complete(make_prompts(LENGTHS), ROOMS)


def test_where_no_graph_can_be_captured_pieces_go_on(answering, naive, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr(cuda_graphs._Decoder, "_capture", fail)
    completions, _ = answering([]).complete(make_prompts(LENGTHS), ROOMS)
    assert completions == [ids[:room] for ids, room in zip(naive, ROOMS, strict=True)]
    assert "not permitted when stream is capturing" in caplog.text


@pytest.mark.parametrize("fits, in_slots", [(255, False), (256, True)])
def test_a_memory_of_few_slots_answers_in_pieces(answering, fits, in_slots, monkeypatch):
    def fitting(model, longest, num_rows, num_processes):
        assert longest == 30 + 50  # a slot has room for the longest row
        return min(num_rows, fits)

    monkeypatch.setattr("trl_lightreasoner.evaluation.answering.find_batch_size", fitting)
    made = answering([], batch_size=None)
    prompts, rooms = [[1] * 30, *[[1]] * 999], [50] * 1000
    assert made._num_slots(prompts, rooms) == (fits if in_slots else 0)
    assert made._num_slots(prompts[:9], rooms[:9]) == 9
