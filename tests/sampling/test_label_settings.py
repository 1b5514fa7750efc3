"""`contrast_strength` and `expert_anchor`, from the settings to labels, metadata and cards."""

import pytest
import torch

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler, sampling_metadata
from trl_lightreasoner.hub.cards import dataset_card
from trl_lightreasoner.report.model_reading import add_probabilities
from trl_lightreasoner.report.shown_steps import load_trajectories


STRENGTH, ANCHOR = 0.5, 1.0


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, expert_path, amateur_path, prompts):
    folder = tmp_path_factory.mktemp("steps")
    args = ContrastiveSamplingConfig(
        str(folder), max_new_tokens=12, beta=1.95, contrast_strength=STRENGTH, expert_anchor=ANCHOR
    )
    return str(folder), ContrastiveStepSampler(expert_path, amateur_path, args).sample(prompts)


@torch.no_grad()
def test_labels_are_those_of_a_loop(sampled, expert, amateur):
    _, dataset = sampled
    kept = 0
    for row in dataset:
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            context = torch.tensor([row["prompt_ids"] + row["completion_ids"][:t]])
            pi_e, pi_a = (model(context).logits[0, -1, :300].double().softmax(-1) for model in (expert, amateur))
            plausible = [i for i in range(300) if pi_e[i] >= 0.2 * pi_e.max()]
            scores = {i: (pi_e[i] ** ANCHOR * (pi_e[i] / pi_a[i]) ** STRENGTH).item() for i in plausible}
            label = {i: score / sum(scores.values()) for i, score in scores.items()}
            assert dict(zip(ids, probs, strict=True)) == pytest.approx(label, rel=1e-4)
            kept += 1
    assert kept > 5


def test_they_change_labels_alone(sampled, steps):
    for row, paper in zip(sampled[1], steps, strict=True):
        for name in ("completion_ids", "kl_divergence", "step_positions"):
            assert row[name] == paper[name]
        assert list(map(sorted, row["label_ids"])) == list(map(sorted, paper["label_ids"]))
    assert sampled[1]["label_probs"][:] != steps["label_probs"][:]


def test_the_metadata_holds_them_and_the_card_tells_them_where_they_are_not_the_papers(sampled, steps):
    settings = sampling_metadata(sampled[1])["settings"]
    assert (settings["contrast_strength"], settings["expert_anchor"]) == (STRENGTH, ANCHOR)
    settings = sampling_metadata(steps)["settings"]
    assert (settings["contrast_strength"], settings["expert_anchor"]) == (1.0, 0.0)
    card = str(dataset_card({"train": sampled[1]}, "own/steps"))
    assert "| contrast_strength | 0.5 |" in card and "| expert_anchor | 1 |" in card
    card = str(dataset_card({"train": steps}, "own/steps"))
    assert "contrast_strength" not in card and "expert_anchor" not in card


def test_a_run_with_another_strength_does_not_go_on(sampled, expert_path, amateur_path, prompts):
    args = ContrastiveSamplingConfig(sampled[0], max_new_tokens=12, beta=1.95, expert_anchor=ANCHOR)
    with pytest.raises(ValueError, match="was started with contrast_strength = 0.5, but it is now 1.0"):
        ContrastiveStepSampler(expert_path, amateur_path, args).sample(prompts)


def test_a_report_recognizes_the_models_by_such_labels(sampled):
    trajectories = load_trajectories(sampled[1], [0, 1, 2])
    metadata = sampling_metadata(sampled[1])
    assert add_probabilities(trajectories, metadata, None, None) is None
    trajectories = load_trajectories(sampled[1], [0, 1, 2])
    metadata["settings"] |= {"contrast_strength": 100.0, "expert_anchor": 0.0}
    assert "give a v_C that differs" in add_probabilities(trajectories, metadata, None, None)
