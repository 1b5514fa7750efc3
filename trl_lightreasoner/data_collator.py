"""`DataCollatorForLightReasoner`: from rows of kept steps to one padded batch."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.data.data_collator import DataCollatorMixin


@dataclass
class DataCollatorForLightReasoner(DataCollatorMixin):
    """
    Pads rows of kept steps to a batch. A row is cut after the context of its last kept step, since nothing behind it
    is read.

    Args:
        pad_token_id (`int`, *optional*, defaults to `0`):
            Id under the padding. It is masked, so that any id will do.
        padding_side (`"right"` or `"left"`, *optional*, defaults to `"right"`):
            Where the padding goes. On the left, `position_ids` are added.

    Returns a `dict` of tensors for B rows of at most L tokens with at most S kept steps of at most K label tokens:

    - `input_ids`, `attention_mask` `(B, L)`;
    - `step_mask` `(B, L)`, bool: True at the last token of the context of a kept step, where its distribution is;
    - `label_ids` `(B, S, K)` and `label_probs` `(B, S, K)`: v_C of the kept steps in the order of the mask. A step
      that is padding holds no probability.

    Example:

    ```python
    >>> row = {
    ...     "prompt_ids": [5, 6],
    ...     "completion_ids": [7, 8, 9],
    ...     "step_positions": [1],
    ...     "label_ids": [[8, 3]],
    ...     "label_probs": [[0.75, 0.25]],
    ... }
    >>> batch = DataCollatorForLightReasoner()([row])
    >>> batch["input_ids"].tolist(), batch["step_mask"].tolist()
    ([[5, 6, 7]], [[False, False, True]])

    ```
    """

    pad_token_id: int = 0
    padding_side: Literal["right", "left"] = "right"
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(example["prompt_ids"]) + example["step_positions"][-1] for example in examples]
        num_rows, length = len(examples), max(lengths)
        num_steps = max(len(example["step_positions"]) for example in examples)
        support = max(len(ids) for example in examples for ids in example["label_ids"])
        batch = {
            "input_ids": torch.full((num_rows, length), self.pad_token_id),
            "attention_mask": torch.zeros(num_rows, length, dtype=torch.long),
            "step_mask": torch.zeros(num_rows, length, dtype=torch.bool),
        }
        label_ids, label_probs = [], []
        for row, (example, row_length) in enumerate(zip(examples, lengths, strict=True)):
            start = length - row_length if self.padding_side == "left" else 0
            ids = (example["prompt_ids"] + example["completion_ids"])[:row_length]
            batch["input_ids"][row, start : start + row_length] = torch.tensor(ids)
            batch["attention_mask"][row, start : start + row_length] = 1
            # The step t is predicted at the token before it
            before_step = start + len(example["prompt_ids"]) - 1
            batch["step_mask"][row, [before_step + t for t in example["step_positions"]]] = True
            # Padding repeats a token of the label, which is sure to be one of the vocabulary
            labels = [ids + ids[:1] * (support - len(ids)) for ids in example["label_ids"]]
            label_ids.append(labels + [[0] * support] * (num_steps - len(labels)))
            labels = [probs + [0.0] * (support - len(probs)) for probs in example["label_probs"]]
            label_probs.append(labels + [[0.0] * support] * (num_steps - len(labels)))
        batch["label_ids"], batch["label_probs"] = torch.tensor(label_ids), torch.tensor(label_probs)
        if self.padding_side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return batch
