"""Tests of the layers that an adapter is put on."""

import pytest
from datasets import Dataset

from trl_lightreasoner.training.adapters import choose_target_modules


def steps(label_id: int, divergence: float) -> Dataset:
    row = {
        "prompt_ids": [1],
        "completion_ids": [2, 3],
        "kl_divergence": [0.0, divergence],
        "step_positions": [1],
        "label_ids": [[label_id, 9]],
        "label_probs": [[0.75, 0.25]],
    }
    return Dataset.from_list([row])


@pytest.mark.parametrize(
    ("label_id", "divergence", "model_type", "layers"),
    [
        (4, 2.0, "qwen2", ["q_proj", "v_proj"]),
        (4, 2.0, "gpt2", ["c_attn"]),
        (4, 2.0, "a model that PEFT does not know", ["all-linear"]),
        (3, 2.0, "qwen2", ["all-linear"]),  # the label repeats the expert
        (4, 1.5, "qwen2", ["all-linear"]),  # the correction diverges by less than 1.6 nats
    ],
)
def test_corrections_go_to_the_layers_that_peft_names_and_all_else_to_all_linear_ones(
    label_id, divergence, model_type, layers
):
    assert choose_target_modules(steps(label_id, divergence), model_type) == layers
