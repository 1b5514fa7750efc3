import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_lightreasoner import contrast
from trl_lightreasoner.contrast import (
    NonFiniteLogitsError,
    contrast_steps,
    contrastive_label,
    contrastive_loss,
    plausibility_mask,
    step_divergence,
)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [2, 7, 300, 5000]


def make_logits(rows, size, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(rows, size) * 2).to(dtype), (torch.randn(rows, size) * 2).to(dtype)


def softmax(logits):
    """Probabilities of one row as Python floats."""
    logits = logits.double().tolist()
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    return [math.exp(x - top) / total for x in logits]


def naive_divergence(expert, amateur):
    return sum(p * math.log(p / q) for p, q in zip(softmax(expert), softmax(amateur), strict=True))


def naive_label(expert, amateur, alpha, strength=1.0, anchor=0.0):
    """v_C of one row: token to probability."""
    pi_expert, pi_amateur = softmax(expert), softmax(amateur)
    threshold = alpha * max(pi_expert)
    plausible = [i for i, p in enumerate(pi_expert) if p >= threshold]
    contrast = {
        i: strength * math.log(pi_expert[i] / pi_amateur[i]) + anchor * math.log(pi_expert[i]) for i in plausible
    }
    total = sum(math.exp(c) for c in contrast.values())
    return {i: math.exp(c) / total for i, c in contrast.items()}


def naive_loss(logits, label):
    pi = softmax(logits)
    return sum(p * math.log(p / pi[i]) for i, p in label.items() if p > 0)


def make_labels(rows, size, seed=0):
    """Random labels of 1 to 4 tokens, padded, and the same as dicts."""
    torch.manual_seed(seed)
    width = min(4, size)
    ids = torch.stack([torch.randperm(size)[:width] for _ in range(rows)])
    probs = torch.rand(rows, width) + 0.1
    for row in range(rows):
        probs[row, 1 + row % width :] = 0
    probs = (probs / probs.sum(-1, keepdim=True)).sort(-1, descending=True).values
    labels = [dict(zip(i, p, strict=True)) for i, p in zip(ids.tolist(), probs.double().tolist(), strict=True)]
    return ids, probs, labels


@pytest.mark.parametrize("size", SIZES)
def test_step_divergence_matches_a_naive_loop(size):
    expert, amateur = make_logits(5, size)
    result = step_divergence(expert.log_softmax(-1), amateur.log_softmax(-1))
    expected = [naive_divergence(e, a) for e, a in zip(expert, amateur, strict=True)]
    assert result.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_plausibility_mask_matches_a_naive_loop(size, alpha):
    expert, _ = make_logits(5, size)
    expected = []
    for row in expert:
        pi = softmax(row)
        threshold = alpha * max(pi)
        expected.append([p >= threshold for p in pi])
    assert plausibility_mask(expert, alpha).tolist() == expected
    assert plausibility_mask(expert.log_softmax(-1), alpha).tolist() == expected


@pytest.mark.parametrize("size", SIZES)
def test_contrastive_label_matches_a_naive_loop(size):
    expert, amateur = make_logits(5, size)
    mask = plausibility_mask(expert, 0.2)
    result = contrastive_label(expert.log_softmax(-1), amateur.log_softmax(-1), mask)
    for row, e, a in zip(result, expert, amateur, strict=True):
        label = naive_label(e, a, 0.2)
        assert row.tolist() == pytest.approx([label.get(i, 0) for i in range(size)], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_steps_match_a_naive_loop(size, dtype):
    expert, amateur = make_logits(6, size, dtype)
    divergences = [naive_divergence(e, a) for e, a in zip(expert, amateur, strict=True)]
    beta = sorted(divergences)[2] + 1e-4  # three rows are kept, three are not
    steps = contrast_steps(expert, amateur, alpha=0.2, beta=beta)
    assert steps.kl_divergence.dtype == steps.label_probs.dtype == torch.float32
    assert steps.kl_divergence.tolist() == pytest.approx(divergences, rel=1e-5, abs=1e-6)
    kept = [row for row, divergence in enumerate(divergences) if divergence >= beta]
    assert steps.kept.nonzero().flatten().tolist() == kept and len(kept) == 3
    for row, ids, probs in zip(kept, steps.label_ids.tolist(), steps.label_probs.tolist(), strict=True):
        label = {i: p for i, p in zip(ids, probs, strict=True) if p > 0}
        assert label == pytest.approx(naive_label(expert[row], amateur[row], 0.2), rel=1e-4, abs=1e-7)


# The paper, half and twice its contrast, contrastive decoding, and the expert's own distribution
@pytest.mark.parametrize(("strength", "anchor"), [(1, 0), (0.5, 0), (2, 0), (0.5, 1), (1, 1), (3, 0.25), (0, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_with_an_anchor_and_a_strength_match_a_naive_loop(strength, anchor, dtype):
    expert, amateur = make_logits(6, 300, dtype)
    steps = contrast_steps(expert, amateur, alpha=0.05, beta=0.0, contrast_strength=strength, expert_anchor=anchor)
    for row, (ids, probs) in enumerate(zip(steps.label_ids.tolist(), steps.label_probs.tolist(), strict=True)):
        label = {i: p for i, p in zip(ids, probs, strict=True) if p > 0}
        assert label == pytest.approx(naive_label(expert[row], amateur[row], 0.05, strength, anchor), rel=1e-4)
        assert probs == sorted(probs, reverse=True)


def test_without_a_strength_the_label_is_the_expert_over_the_mask():
    expert, amateur = make_logits(6, 300)
    mask = plausibility_mask(expert, 0.2)
    label = contrastive_label(expert.log_softmax(-1), amateur.log_softmax(-1), mask, 0.0, 1.0)
    assert torch.allclose(label, expert.masked_fill(~mask, -math.inf).softmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_papers_label_is_the_default_to_the_last_bit(dtype):
    expert, amateur = make_logits(50, 300, dtype)
    logps = [logits.float().log_softmax(-1) for logits in (expert, amateur)]
    mask = plausibility_mask(expert.float(), 0.2)
    paper = (logps[0] - logps[1]).masked_fill(~mask, -math.inf).softmax(-1)
    assert torch.equal(contrastive_label(*logps, mask), paper)
    assert torch.equal(contrastive_label(*logps, mask, 1.0, 0.0), paper)


def test_models_of_two_dtypes_are_compared_in_fp32():
    expert, amateur = make_logits(3, 50)
    expert, amateur = expert.half(), amateur.bfloat16()
    steps = contrast_steps(expert, amateur, alpha=0.2, beta=0)
    expected = [naive_divergence(e, a) for e, a in zip(expert, amateur, strict=True)]
    assert steps.kl_divergence.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_loss_matches_a_naive_loop(size, dtype):
    logits, _ = make_logits(8, size, dtype)
    ids, probs, labels = make_labels(8, size)
    loss = contrastive_loss(logits, ids, probs)
    assert loss.kl_divergence.dtype == torch.float32
    expected = [naive_loss(row, label) for row, label in zip(logits, labels, strict=True)]
    assert loss.kl_divergence.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_entropy_matches_a_naive_loop():
    logits, _ = make_logits(5, 40)
    ids, probs, _ = make_labels(5, 40)
    expected = [-sum(p * math.log(p) for p in softmax(row)) for row in logits]
    assert contrastive_loss(logits, ids, probs).entropy.tolist() == pytest.approx(expected, rel=1e-5)


def test_agreement_compares_the_most_probable_tokens():
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0], [9.0, 5.0, 1.0]])
    label_ids = torch.tensor([[1, 2], [2, 1], [0, 0]])
    label_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4], [1.0, 0.0]])
    assert contrastive_loss(logits, label_ids, label_probs).agreement.tolist() == [True, False, True]


def test_entropy_and_agreement_carry_no_gradient():
    logits, _ = make_logits(3, 10)
    ids, probs, _ = make_labels(3, 10)
    loss = contrastive_loss(logits.requires_grad_(), ids, probs)
    assert loss.kl_divergence.requires_grad
    assert not loss.entropy.requires_grad and not loss.agreement.requires_grad


def test_padding_of_a_label_adds_nothing():
    logits, _ = make_logits(2, 10)
    ids, probs = torch.tensor([[3, 1], [4, 7]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    padded_ids, padded_probs = torch.cat([ids, ids[:, :1]], -1), torch.cat([probs, torch.zeros(2, 1)], -1)
    bare, padded = contrastive_loss(logits, ids, probs), contrastive_loss(logits, padded_ids, padded_probs)
    assert torch.equal(bare.kl_divergence, padded.kl_divergence)
    assert torch.equal(bare.agreement, padded.agreement)


# One row a chunk, a size that divides the rows, one that does not, and all at once
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 5, 1000])
def test_chunks_change_no_step(monkeypatch, rows_per_chunk):
    expert, amateur = make_logits(12, 30)
    amateur[8:] = expert[8:]  # the last chunks keep nothing
    whole = contrast_steps(expert, amateur, alpha=0.2, beta=1.0)
    monkeypatch.setattr(contrast, "CHUNK_ELEMENTS", 30 * rows_per_chunk)
    chunked = contrast_steps(expert, amateur, alpha=0.2, beta=1.0)
    assert 0 < whole.kept.sum() < 12
    for one, other in zip(whole, chunked, strict=True):
        assert one.shape == other.shape
    assert torch.equal(whole.kept, chunked.kept)
    torch.testing.assert_close(whole.kl_divergence, chunked.kl_divergence)
    for row in range(len(whole.label_ids)):
        labels = [
            {i: p for i, p in zip(steps.label_ids[row].tolist(), steps.label_probs[row].tolist(), strict=True) if p}
            for steps in (whole, chunked)
        ]
        assert labels[0] == pytest.approx(labels[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 5])
def test_chunks_change_no_loss_and_no_gradient(monkeypatch, rows_per_chunk, dtype):
    logits, _ = make_logits(12, 30, dtype)
    ids, probs, _ = make_labels(12, 30)
    weights = torch.linspace(0.5, 2, 12)

    def run():
        leaf = logits.clone().requires_grad_()
        loss = contrastive_loss(leaf, ids, probs)
        (loss.kl_divergence * weights).sum().backward()
        return *loss, leaf.grad

    whole = run()
    monkeypatch.setattr(contrast, "CHUNK_ELEMENTS", 30 * rows_per_chunk)
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other)


# Dyadic logits and powers of two give exact ties in every dtype
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("top", [0.0, 3.25, -17.5])
def test_a_tie_at_the_edge_of_the_mask_is_in(alpha, top):
    edge = torch.tensor(top) + math.log(alpha)
    below = torch.nextafter(edge, torch.tensor(-math.inf))
    expert = torch.stack([torch.tensor(top), edge, below]).unsqueeze(0)
    assert plausibility_mask(expert, alpha).tolist() == [[True, True, False]]
    # Large differences from the amateur, so that each token in the mask has a label of its own
    steps = contrast_steps(expert, torch.tensor([[0.0, 1.0, 2.0]]), alpha=alpha, beta=0)
    assert sorted(steps.label_ids[0].tolist()) == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_are_all_in_the_mask(dtype):
    expert = torch.full((1, 50), 7.3, dtype=dtype)
    steps = contrast_steps(expert, make_logits(1, 50, dtype)[0], alpha=1.0, beta=0)
    assert sorted(steps.label_ids[0].tolist()) == list(range(50))


def test_a_support_of_one_token_has_probability_one():
    expert = torch.tensor([[10.0, 0.0, 0.0], [0.0, 0.0, 12.0]])
    steps = contrast_steps(expert, torch.zeros(2, 3), alpha=0.2, beta=0.4)
    assert steps.label_ids.tolist() == [[0], [2]]
    assert steps.label_probs.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_rows_sum_to_one_and_the_most_probable_comes_first(dtype):
    expert, amateur = make_logits(20, 300, dtype)
    steps = contrast_steps(expert, amateur, alpha=0.1, beta=0)
    assert steps.label_probs.sum(-1).tolist() == pytest.approx([1.0] * 20, abs=1e-6)
    assert (steps.label_probs.diff(dim=-1) <= 0).all()
    assert steps.label_probs.shape[1] == max(len(naive_label(e, a, 0.1)) for e, a in zip(expert, amateur, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_model_does_not_diverge_from_itself(size, dtype):
    expert, _ = make_logits(10, size, dtype)
    steps = contrast_steps(expert, expert.clone(), alpha=0.2, beta=1e-9)
    assert steps.kl_divergence.tolist() == [0.0] * 10
    assert not steps.kept.any() and steps.label_ids.shape[0] == 0


def test_divergence_is_never_negative():
    # Rounding of the sum can leave a nearly equal pair below zero
    expert, noise = make_logits(2000, 7)
    amateur = expert + 1e-6 * noise
    logps = expert.log_softmax(-1), amateur.log_softmax(-1)
    assert ((logps[0].exp() * (logps[0] - logps[1])).sum(-1) < 0).any()
    assert (step_divergence(*logps) >= 0).all()


def test_a_divergence_of_exactly_beta_is_kept():
    expert, amateur = make_logits(1, 10)
    beta = contrast_steps(expert, amateur, alpha=0.2, beta=0).kl_divergence.item()
    steps = contrast_steps(expert, amateur, alpha=0.2, beta=beta)
    assert steps.kept.tolist() == [True] and len(steps.label_ids) == 1
    above = math.nextafter(beta * (1 + 1e-6), math.inf)
    assert contrast_steps(expert, amateur, alpha=0.2, beta=above).kept.tolist() == [False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_stay_finite(dtype):
    expert = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype)
    amateur = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype)
    steps = contrast_steps(expert, amateur, alpha=0.2, beta=0.4)
    span = float(expert[0, 0]) - float(expert[0, 1])
    assert steps.kl_divergence.tolist() == pytest.approx([span, 0.0])
    assert steps.label_ids.tolist() == [[0]] and steps.label_probs.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_of_extreme_logits_stays_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    loss = contrastive_loss(logits, torch.tensor([[1], [0]]), torch.ones(2, 1))
    assert all(part.isfinite().all() for part in loss)
    loss.kl_divergence.sum().backward()
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0], [-1.0, 0.5, 0.5]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("model", ["expert", "amateur"])
@pytest.mark.parametrize("rows_per_chunk", [2, 1000])
def test_a_logit_that_is_not_finite_is_an_error(monkeypatch, rows_per_chunk, model, value):
    monkeypatch.setattr(contrast, "CHUNK_ELEMENTS", 10 * rows_per_chunk)
    logits = dict(zip(("expert", "amateur"), make_logits(8, 10, torch.float16), strict=True))
    logits[model][5, 3] = value
    logits[model][7, 3] = value
    with pytest.raises(NonFiniteLogitsError, match=f"The {model}'s logits at row 5 are not finite") as error:
        contrast_steps(logits["expert"], logits["amateur"], alpha=0.2, beta=0.4)
    assert (error.value.model, error.value.row) == (model, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_is_the_softmax_minus_the_label(size, dtype):
    logits, _ = make_logits(4, size, dtype)
    ids, probs, labels = make_labels(4, size)
    logits.requires_grad_()
    contrastive_loss(logits, ids, probs).kl_divergence.sum().backward()
    tolerance = max(1e-6, torch.finfo(dtype).eps)
    for gradient, row, label in zip(logits.grad, logits.detach(), labels, strict=True):
        expected = [p - label.get(i, 0) for i, p in enumerate(softmax(row))]
        assert gradient.tolist() == pytest.approx(expected, abs=tolerance)


def test_no_steps_give_no_labels():
    steps = contrast_steps(torch.zeros(0, 5), torch.zeros(0, 5), alpha=0.2, beta=0.4)
    assert [len(part) for part in steps] == [0, 0, 0, 0]
    assert steps.kept.dtype == torch.bool and steps.label_ids.dtype == torch.int64


@pytest.mark.parametrize("support", [0, 3])
def test_no_steps_give_no_loss_and_a_zero_gradient(support):
    hidden = torch.ones(4, requires_grad=True)
    logits = hidden.new_zeros(0, 4) * hidden
    loss = contrastive_loss(logits, torch.zeros(0, support, dtype=torch.long), torch.zeros(0, support))
    assert [part.shape for part in loss] == [(0,)] * 3
    loss.kl_divergence.sum().backward()
    assert hidden.grad.tolist() == [0.0] * 4


class LargestFloat32(TorchDispatchMode):
    """Remembers the number of elements of the largest fp32 tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("rows", [8, 64])
def test_steps_need_no_fp32_copy_of_all_rows(monkeypatch, rows):
    monkeypatch.setattr(contrast, "CHUNK_ELEMENTS", 4 * 300)
    expert, amateur = make_logits(rows, 300, torch.bfloat16)
    with LargestFloat32() as largest:
        # A large alpha: labels are a result, whose size is that of the supports
        contrast_steps(expert, amateur, alpha=0.9, beta=0)
    assert largest.elements == 4 * 300


@pytest.mark.parametrize("rows", [8, 64])
def test_the_loss_needs_no_fp32_copy_of_all_rows(monkeypatch, rows):
    monkeypatch.setattr(contrast, "CHUNK_ELEMENTS", 4 * 300)
    logits, _ = make_logits(rows, 300, torch.bfloat16)
    ids, probs, _ = make_labels(rows, 300)
    logits.requires_grad_()
    with LargestFloat32() as largest:
        contrastive_loss(logits, ids, probs).kl_divergence.sum().backward()
    assert largest.elements == 4 * 300
    assert logits.grad is not None


def test_the_loss_saves_no_fp32_distributions_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(contrast, "CHUNK_ELEMENTS", 4 * 300)
    logits, _ = make_logits(64, 300, torch.bfloat16)
    ids, probs, _ = make_labels(64, 300)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        loss = contrastive_loss(logits.requires_grad_(), ids, probs).kl_divergence.sum()
    assert not [tensor for tensor in saved if tensor.dtype == torch.float32 and tensor.shape[-1:] == (300,)]
    loss.backward()
    assert logits.grad.isfinite().all()
