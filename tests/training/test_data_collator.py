import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trl_lightreasoner import DataCollatorForLightReasoner


ROWS = [
    {
        "prompt_ids": [11, 12],
        "completion_ids": [21, 22, 23, 24],
        "step_positions": [0, 2],
        "label_ids": [[5], [6, 7, 8]],
        "label_probs": [[1.0], [0.5, 0.25, 0.25]],
    },
    {
        "prompt_ids": [13, 14, 15, 16],
        "completion_ids": [25, 26, 27],
        "step_positions": [2],
        "label_ids": [[9, 4]],
        "label_probs": [[0.75, 0.25]],
    },
    {
        "prompt_ids": [17],
        "completion_ids": [28, 29],
        "step_positions": [0],
        "label_ids": [[3, 2]],
        "label_probs": [[0.5, 0.5]],
    },
]


def gpt2(tokenizer) -> GPT2LMHeadModel:
    # Learned absolute positions, so that a row that starts at the wrong one gives other logits
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128, initializer_range=0.5
    )
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def losses_one_by_one(model, rows) -> list[float]:
    losses = []
    for row in rows:
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            context = row["prompt_ids"] + row["completion_ids"][:t]
            logps = model(torch.tensor([context])).logits[0, -1].log_softmax(-1).tolist()
            losses.append(sum(p * (math.log(p) - logps[i]) for i, p in zip(ids, probs, strict=True)))
    return losses


@torch.no_grad()
def losses_of_batch(model, batch) -> list[float]:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    logps = model(**inputs).logits.log_softmax(-1)
    losses = []
    for row in range(len(batch["input_ids"])):
        positions = batch["step_mask"][row].nonzero().flatten().tolist()
        for step, position in enumerate(positions):
            losses.append(0.0)
            label = zip(batch["label_ids"][row, step].tolist(), batch["label_probs"][row, step].tolist(), strict=True)
            for i, p in label:
                losses[-1] += p * (math.log(p) - logps[row, position, i].item()) if p > 0 else 0.0
    return losses


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_each_step_is_at_the_last_token_of_its_own_context(padding_side):
    batch = DataCollatorForLightReasoner(padding_side=padding_side)(ROWS)
    for row, example in enumerate(ROWS):
        positions = batch["step_mask"][row].nonzero().flatten().tolist()
        assert len(positions) == len(example["step_positions"])
        for position, t in zip(positions, example["step_positions"], strict=True):
            real = batch["attention_mask"][row, : position + 1].bool()
            context = batch["input_ids"][row, : position + 1][real].tolist()
            assert context == example["prompt_ids"] + example["completion_ids"][:t]
            assert batch["attention_mask"][row, position] == 1


def test_right_padding():
    batch = DataCollatorForLightReasoner(pad_token_id=99)(ROWS)
    assert batch["input_ids"].tolist() == [
        [11, 12, 21, 22, 99, 99],
        [13, 14, 15, 16, 25, 26],
        [17, 99, 99, 99, 99, 99],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]
    assert "position_ids" not in batch


def test_left_padding():
    batch = DataCollatorForLightReasoner(pad_token_id=99, padding_side="left")(ROWS)
    assert batch["input_ids"].tolist() == [
        [99, 99, 11, 12, 21, 22],
        [13, 14, 15, 16, 25, 26],
        [99, 99, 99, 99, 99, 17],
    ]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]


def test_a_row_is_cut_after_the_context_of_its_last_kept_step():
    row = {**ROWS[0], "completion_ids": ROWS[0]["completion_ids"] + [30] * 50}
    batch = DataCollatorForLightReasoner()([row])
    assert batch["input_ids"].tolist() == [[11, 12, 21, 22]]


def test_ragged_labels_are_padded_without_probability():
    batch = DataCollatorForLightReasoner()(ROWS)
    assert batch["label_probs"].tolist() == [
        [[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]],
        [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0]],
        [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]],
    ]
    assert batch["label_ids"][0, 1].tolist() == [6, 7, 8]
    assert batch["label_ids"][1, 0, :2].tolist() == [9, 4]


def test_padding_of_a_label_is_a_token_of_the_label():
    batch = DataCollatorForLightReasoner()(ROWS)
    assert batch["label_ids"][0, 0].tolist() == [5, 5, 5]
    assert batch["label_ids"][1, 0].tolist() == [9, 4, 9]


def test_other_columns_are_left_out():
    batch = DataCollatorForLightReasoner()([{**row, "prompt": "text", "kl_divergence": [0.5]} for row in ROWS])
    masks = ["attention_mask", "input_ids", "label_ids", "label_probs", "step_mask"]
    assert sorted(batch) == sorted([*masks, "label_index", "step_index", "token_index"])


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_indices_take_what_the_masks_take(padding_side):
    batch = DataCollatorForLightReasoner(padding_side=padding_side)(ROWS)
    is_token = batch["attention_mask"].bool()
    tokens = batch["input_ids"].flatten()[batch["token_index"]]
    assert torch.equal(tokens, batch["input_ids"][is_token])
    assert torch.equal(tokens[batch["step_index"]], batch["input_ids"][batch["step_mask"]])
    is_step = batch["label_probs"].sum(-1) > 0
    assert torch.equal(batch["label_ids"].flatten(0, 1)[batch["label_index"]], batch["label_ids"][is_step])


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", ["rotary positions", "absolute positions"])
def test_the_loss_of_a_step_in_a_batch_is_that_of_the_step_alone(kind, padding_side, expert, tokenizer, steps):
    model = expert if kind == "rotary positions" else gpt2(tokenizer)
    batch = DataCollatorForLightReasoner(padding_side=padding_side)(list(steps))
    assert losses_of_batch(model, batch) == pytest.approx(losses_one_by_one(model, list(steps)), rel=1e-4, abs=1e-5)


def test_the_id_under_the_padding_does_not_matter(expert, steps):
    losses = [losses_of_batch(expert, DataCollatorForLightReasoner(pad_token_id=i)(list(steps))) for i in (0, 7)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
