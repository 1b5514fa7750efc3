import inspect
import math

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, Qwen2ForCausalLM

from trl_lightreasoner.contrast import NonFiniteLogitsError
from trl_lightreasoner.models.forward import head_makes_logits, hidden_states_at
from trl_lightreasoner.sampling import scoring
from trl_lightreasoner.sampling.scoring import Trajectory, group_by_length, score_trajectories
from trl_lightreasoner.vocabulary import Vocabulary

from ..conftest import make_model, make_tokenizer


# Lengths of prompts and completions: one token each, a long prompt, a long completion, and some in between
SHAPES = [(1, 1), (20, 3), (2, 14), (6, 6), (9, 1)]
ALPHA, BETA = 0.2, 1.9
EVERYTHING = Vocabulary(list(range(300)))


def make_trajectories(shapes=SHAPES, seed=0):
    torch.manual_seed(seed)
    return [Trajectory(*(torch.randint(300, (length,)).tolist() for length in shape)) for shape in shapes]


@torch.no_grad()
def naive_scores(expert, amateur, trajectory, ids, alpha=ALPHA, beta=BETA, include_first_step=True):
    """One prefix at a time, in float64: divergences, and the label of every kept step by its position."""
    divergences, labels = [], {}
    for t, token_id in enumerate(trajectory.completion_ids):
        prefix = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids[:t]])
        pi_expert, pi_amateur = (
            model(prefix).logits[0, -1, ids].double().softmax(-1).tolist() for model in (expert, amateur)
        )
        divergences.append(sum(p * math.log(p / q) for p, q in zip(pi_expert, pi_amateur, strict=True)))
        if divergences[-1] < beta or token_id not in ids or (t == 0 and not include_first_step):
            continue
        plausible = [k for k, p in enumerate(pi_expert) if p >= alpha * max(pi_expert)]
        ratios = {ids[k]: pi_expert[k] / pi_amateur[k] for k in plausible}
        labels[t] = {i: ratio / sum(ratios.values()) for i, ratio in ratios.items()}
    return divergences, labels


def assert_equal(scores, divergences, labels):
    assert scores.kl_divergence == pytest.approx(divergences, rel=1e-4)
    assert scores.step_positions == list(labels)
    for ids, probs, label in zip(scores.label_ids, scores.label_probs, labels.values(), strict=True):
        assert dict(zip(ids, probs, strict=True)) == pytest.approx(label, rel=1e-3, abs=1e-6)
        assert probs == sorted(probs, reverse=True)


def score(expert, amateur, trajectories, vocabulary=EVERYTHING, **kwargs):
    return score_trajectories(expert, amateur, trajectories, vocabulary, **{"alpha": ALPHA, "beta": BETA, **kwargs})


@pytest.mark.parametrize("beta", [0.0, BETA, 100.0])
def test_scores_equal_a_naive_loop(expert, amateur, beta):
    trajectories = make_trajectories()
    for trajectory, scores in zip(trajectories, score(expert, amateur, trajectories, beta=beta), strict=True):
        assert_equal(scores, *naive_scores(expert, amateur, trajectory, list(range(300)), beta=beta))


def test_scores_over_a_part_of_the_vocabulary_equal_a_naive_loop(expert, amateur):
    ids = [i for i in range(300) if i % 7]
    trajectories = make_trajectories()
    for trajectory, scores in zip(
        trajectories, score(expert, amateur, trajectories, Vocabulary(ids), beta=0.0), strict=True
    ):
        assert_equal(scores, *naive_scores(expert, amateur, trajectory, ids, beta=0.0))


def test_both_kept_and_dropped_steps_are_tested(expert, amateur):
    scores = score(expert, amateur, make_trajectories())
    num_kept = sum(len(row.step_positions) for row in scores)
    assert 0 < num_kept < sum(len(row.kl_divergence) for row in scores)


def test_rows_do_not_depend_on_the_batch(expert, amateur):
    trajectories = make_trajectories()
    together = score(expert, amateur, trajectories)
    reversed_ = score(expert, amateur, trajectories[::-1])[::-1]
    alone = [score(expert, amateur, [trajectory])[0] for trajectory in trajectories]
    for others in (reversed_, alone):
        for one, other in zip(together, others, strict=True):
            assert one.step_positions == other.step_positions and one.label_ids == other.label_ids
            assert one.kl_divergence == pytest.approx(other.kl_divergence, rel=1e-5)
            for probs, other_probs in zip(one.label_probs, other.label_probs, strict=True):
                assert probs == pytest.approx(other_probs, rel=1e-4, abs=1e-6)


def test_trajectories_are_scored_in_their_order(expert, amateur):
    scores = score(expert, amateur, make_trajectories())
    assert [len(row.kl_divergence) for row in scores] == [length for _, length in SHAPES]


@pytest.mark.parametrize("value", [1e4, math.nan, math.inf])
def test_padded_columns_change_nothing(expert, amateur, value):
    trajectories = make_trajectories()
    before = score(expert, amateur, trajectories)
    with torch.no_grad():
        expert.lm_head.weight[300:] = value
        amateur.lm_head.weight[300:] = value
    assert score(expert, amateur, trajectories) == before


def test_the_first_step_can_be_left_out(expert, amateur):
    trajectories = make_trajectories()
    with_first = score(expert, amateur, trajectories, beta=0.0)
    without = score(expert, amateur, trajectories, beta=0.0, include_first_step=False)
    for one, other in zip(with_first, without, strict=True):
        assert one.step_positions[0] == 0
        assert other.step_positions == one.step_positions[1:]
        assert other.label_ids == one.label_ids[1:] and other.label_probs == one.label_probs[1:]
        assert other.kl_divergence == one.kl_divergence  # of every step, kept or not


def test_a_step_whose_own_token_is_not_shared_is_never_kept(expert, amateur):
    (trajectory,) = make_trajectories([(3, 8)])
    missing = trajectory.completion_ids[4]
    vocabulary = Vocabulary([i for i in range(300) if i != missing])
    (scores,) = score(expert, amateur, [trajectory], vocabulary, beta=0.0)
    kept = [t for t, token_id in enumerate(trajectory.completion_ids) if token_id != missing]
    assert 4 not in kept and scores.step_positions == kept
    assert len(scores.label_ids) == len(scores.label_probs) == len(kept)
    assert len(scores.kl_divergence) == 8
    assert all(missing not in ids for ids in scores.label_ids)
    # The labels are those of their own steps, not shifted by the one that is missing
    _, labels = naive_scores(expert, amateur, trajectory, vocabulary.ids.tolist(), beta=0.0)
    assert [dict.fromkeys(ids) for ids in scores.label_ids] == [
        dict.fromkeys(sorted(label, key=label.get, reverse=True)) for label in labels.values()
    ]


def test_a_prompt_token_that_is_not_shared_is_no_obstacle(expert, amateur):
    (trajectory,) = make_trajectories([(3, 4)])
    vocabulary = Vocabulary([i for i in range(300) if i != trajectory.prompt_ids[1]])
    (scores,) = score(expert, amateur, [trajectory], vocabulary, beta=0.0)
    assert scores.step_positions == [
        t for t, token_id in enumerate(trajectory.completion_ids) if token_id != trajectory.prompt_ids[1]
    ]


def test_a_model_does_not_diverge_from_itself(expert):
    for scores in score(expert, expert, make_trajectories(), beta=1e-9):
        assert set(scores.kl_divergence) == {0.0} and scores.step_positions == []


@pytest.mark.parametrize("name", ["expert", "amateur"])
@pytest.mark.parametrize("names, place", [(None, "step 3 of trajectory 1"), (["row 8", "row 5"], "step 3 of row 5")])
def test_logits_that_are_not_finite_name_the_model_and_the_step(expert, amateur, name, names, place):
    trajectories = [Trajectory([1, 2, 3], [4, 5]), Trajectory([1, 2], [4, 5, 6, 7, 8])]
    model = {"expert": expert, "amateur": amateur}[name]

    def break_step(module, args, logits):
        # The second trajectory is longer, so that its steps come first
        logits.view(-1, logits.shape[-1])[3, 7] = math.nan

    model.lm_head.register_forward_hook(break_step)
    with pytest.raises(NonFiniteLogitsError, match=f"The {name}'s logits at {place} are not finite"):
        score(expert, amateur, trajectories, names=names)


def test_models_that_compute_all_logits_give_the_same(expert, amateur, monkeypatch):
    trajectories = make_trajectories()
    expected = score(expert, amateur, trajectories)
    monkeypatch.setattr("trl_lightreasoner.sampling.scoring.accepts_logits_to_keep", lambda model: False)
    for one, other in zip(expected, score(expert, amateur, trajectories), strict=True):
        assert one.label_ids == other.label_ids
        assert one.kl_divergence == pytest.approx(other.kl_divergence, rel=1e-5)


def test_each_model_runs_once_a_batch_and_computes_the_logits_of_steps_only(expert, amateur):
    score(expert, amateur, make_trajectories([(1, 1)]))  # a first look at each model
    calls = []
    for name, model in (("expert", expert), ("amateur", amateur)):

        def record_body(module, args, kwargs, name=name):
            calls.append((name, tuple(kwargs["input_ids"].shape)))

        def record_head(module, args, output, name=name):
            calls.append((name, output.numel() // output.shape[-1]))

        model.model.register_forward_pre_hook(record_body, with_kwargs=True)
        model.lm_head.register_forward_hook(record_head)
    score(expert, amateur, make_trajectories())
    longest = max(prompt + completion - 1 for prompt, completion in SHAPES)
    num_steps = sum(completion for _, completion in SHAPES)
    names = ("expert", "amateur")
    assert calls == [*((name, (len(SHAPES), longest)) for name in names), *((name, num_steps) for name in names)]


def test_models_of_two_dtypes_can_be_compared(expert):
    amateur = make_model(make_tokenizer(), seed=1, hidden_size=16, padding=4).bfloat16()
    (scores,) = score(expert, amateur, make_trajectories([(3, 5)]), beta=0.0)
    assert scores.step_positions == [0, 1, 2, 3, 4] and all(map(math.isfinite, scores.kl_divergence))


@pytest.mark.parametrize("group_tokens, part_logits", [(1, 2**28), (20, 2**28), (2**14, 1), (20, 312 * 6)])
def test_scores_do_not_depend_on_what_is_computed_together(expert, amateur, group_tokens, part_logits, monkeypatch):
    trajectories = make_trajectories()
    expected = score(expert, amateur, trajectories)
    monkeypatch.setattr(scoring, "GROUP_TOKENS", group_tokens)
    monkeypatch.setattr(scoring, "PART_LOGITS", part_logits)
    for one, other in zip(expected, score(expert, amateur, trajectories), strict=True):
        assert one.step_positions == other.step_positions and one.label_ids == other.label_ids
        assert one.kl_divergence == pytest.approx(other.kl_divergence, rel=1e-5, abs=1e-7)


def test_no_more_logits_exist_at_a_time_than_a_part_holds(expert, amateur, monkeypatch):
    sizes = []
    monkeypatch.setattr(scoring, "PART_LOGITS", 312 * 12)
    score(expert, amateur, make_trajectories([(1, 1)]))  # a first look at each model
    expert.lm_head.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape)))
    score(expert, amateur, make_trajectories())
    sizes = [rows for rows, width in sizes if width == 312]
    assert len(sizes) > 1 and sum(sizes) == sum(completion for _, completion in SHAPES)
    assert max(sizes) <= max(12, *(completion for _, completion in SHAPES))


def test_trajectories_of_like_length_are_scored_together(monkeypatch):
    monkeypatch.setattr(scoring, "GROUP_TOKENS", 24)
    trajectories = make_trajectories([(3, 2), (9, 4), (2, 3), (10, 3), (30, 9), (1, 4)])
    assert group_by_length(trajectories) == [[4], [1, 3], [0, 2, 5]]


def test_hidden_states_that_are_known_are_not_computed_again(expert, amateur):
    trajectories = make_trajectories()
    expected = score(expert, amateur, trajectories)
    hidden_states = []
    for prompt, completion in trajectories:
        positions = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
        input_ids = torch.tensor([prompt + completion[:-1]])
        with torch.no_grad():
            hidden_states.append(hidden_states_at(expert, positions, input_ids))
    expert.model.register_forward_hook(lambda *args: pytest.fail("the expert has run"))
    scores = score(expert, amateur, trajectories, expert_hidden_states=hidden_states)
    for one, other in zip(expected, scores, strict=True):
        assert one.step_positions == other.step_positions and one.label_ids == other.label_ids
        assert one.kl_divergence == pytest.approx(other.kl_divergence, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("config, model", [(CohereConfig, CohereForCausalLM), (GraniteConfig, GraniteForCausalLM)])
def test_models_that_change_what_their_head_returns_are_scored_by_their_logits(amateur, config, model):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    scale = {"logit_scale": 0.5} if config is CohereConfig else {"logits_scaling": 3.0}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    expert = model(config(vocab_size=312, num_key_value_heads=2, **shape, **scale, **tokens)).eval()
    assert not head_makes_logits(expert, torch.tensor([[1, 2, 3]]))
    for trajectory, scores in zip(
        make_trajectories(), score(expert, amateur, make_trajectories(), beta=0.0), strict=True
    ):
        assert_equal(scores, *naive_scores(expert, amateur, trajectory, list(range(300)), beta=0.0))


def test_a_model_that_changes_its_logits_in_place_is_scored_by_its_logits(amateur):
    class Silenced(Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits[..., 5:40] -= 20
            return outputs

        # `accepts_logits_to_keep` reads it
        forward.__signature__ = inspect.signature(Qwen2ForCausalLM.forward)

    expert = make_model(make_tokenizer())
    expert.__class__ = Silenced
    scores = score(expert, amateur, make_trajectories(), beta=0.0)
    for trajectory, row in zip(make_trajectories(), scores, strict=True):
        assert_equal(row, *naive_scores(expert, amateur, trajectory, list(range(300)), beta=0.0))
        assert all(not 5 <= token_id < 40 for label in row.label_ids for token_id in label)


def test_hidden_states_are_what_the_head_makes_the_logits_of(expert):
    input_ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    with torch.no_grad():
        made = expert.lm_head(hidden_states_at(expert, torch.tensor([1, 2, 3, 4]), input_ids))
        logits = expert(input_ids).logits.flatten(0, 1)[1:5]
    torch.testing.assert_close(made, logits)
