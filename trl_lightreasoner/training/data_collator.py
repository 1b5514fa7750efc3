"""`DataCollatorForLightReasoner`: from rows of kept steps to one padded batch."""

from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from transformers.data.data_collator import DataCollatorMixin

from ..steps.dataset import SFT_COLUMNS, STEP_COLUMNS


@dataclass
class DataCollatorForLightReasoner(DataCollatorMixin):
    """
    Pads rows of kept steps to a batch. A row is cut after the context of its last kept step, because nothing after it
    is read.

    Args:
        pad_token_id (`int`, *optional*, defaults to `0`):
            Token id of the padding. It is masked, so any id works.
        padding_side (`"right"` or `"left"`, *optional*, defaults to `"right"`):
            Side of the padding. With `"left"`, `position_ids` are added.

    Returns a `dict` of tensors for B rows of at most L tokens with at most S kept steps of at most K label tokens:

    - `input_ids`, `attention_mask` `(B, L)`;
    - `step_mask` `(B, L)`, bool: True at the last token of the context of a kept step, where its distribution is;
    - `label_ids` `(B, S, K)` and `label_probs` `(B, S, K)`: v_C of the kept steps in the order of the mask. A step
      that is padding holds no probability;
    - `step_weights` `(B, S)`, if the rows have weights: those of the kept steps, and 0 elsewhere;
    - `sft_mask` `(B,)`, bool, if each row is paired with a row of an SFT dataset: True at the SFT rows, which come
      last;
    - `token_index`, `step_index`, `label_index`: the result of [`find_indices`] for these.

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
        num_rows = len(examples)
        weights = [weight for example in examples for weight in example.get("step_weights", ())]
        has_weights, has_sft = "step_weights" in examples[0], SFT_COLUMNS[0] in examples[0]
        if has_sft:
            columns = [*zip(STEP_COLUMNS, SFT_COLUMNS, strict=True)]
            examples = [*examples, *({column: example[sft] for column, sft in columns} for example in examples)]
        # With NumPy: PyTorch would wake up all cores of a large machine for every line
        prompt_lengths = np.array([len(example["prompt_ids"]) for example in examples])
        lengths = prompt_lengths + np.array([example["step_positions"][-1] for example in examples])
        num_steps = np.array([len(example["step_positions"]) for example in examples])
        positions = np.arange(lengths.max())
        starts = len(positions) - lengths if self.padding_side == "left" else np.zeros_like(lengths)
        is_token = (positions >= starts[:, None]) & (positions < (starts + lengths)[:, None])
        tokens = [
            (example["prompt_ids"] + example["completion_ids"])[:row_length]
            for example, row_length in zip(examples, lengths, strict=True)
        ]
        input_ids = np.full(is_token.shape, self.pad_token_id)
        input_ids[is_token] = np.array(list(chain.from_iterable(tokens)))
        # Step t is predicted at the token before it
        steps = np.array([t for example in examples for t in example["step_positions"]])
        rows = np.arange(len(examples)).repeat(num_steps)
        step_mask = np.zeros_like(is_token)
        step_mask[rows, (starts + prompt_lengths - 1)[rows] + steps] = True

        is_step = np.arange(num_steps.max()) < num_steps[:, None]
        label_ids = [ids for example in examples for ids in example["label_ids"]]
        label_probs = [probs for example in examples for probs in example["label_probs"]]
        supports = np.array([len(ids) for ids in label_ids])
        in_support = np.arange(supports.max()) < supports[:, None]
        # Padding repeats a token of the label, which is certainly in the vocabulary
        ids = np.array([ids[0] for ids in label_ids])[:, None].repeat(in_support.shape[1], axis=1)
        ids[in_support] = np.array(list(chain.from_iterable(label_ids)))
        probs = np.zeros(in_support.shape, dtype=np.float32)
        probs[in_support] = np.array(list(chain.from_iterable(label_probs)))
        all_ids = np.zeros((*is_step.shape, ids.shape[1]), dtype=np.int64)
        all_probs = np.zeros(all_ids.shape, dtype=np.float32)
        all_ids[is_step], all_probs[is_step] = ids, probs
        arrays = {
            "input_ids": input_ids,
            "attention_mask": is_token.astype(np.int64),
            "step_mask": step_mask,
            "label_ids": all_ids,
            "label_probs": all_probs,
        }
        if has_weights:
            arrays["step_weights"] = np.zeros(is_step.shape, dtype=np.float32)
            arrays["step_weights"][:num_rows][is_step[:num_rows]] = weights
        if has_sft:
            arrays["sft_mask"] = np.arange(len(examples)) >= num_rows
        if self.padding_side == "left":
            arrays["position_ids"] = (is_token.cumsum(-1) - 1).clip(min=0)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {**batch, **find_indices(batch)}


def with_indices(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with the indices of [`find_indices`], which a user's own collator may omit."""
    return batch if "token_index" in batch else {**batch, **find_indices(batch)}


def find_indices(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Indices of the N tokens and the n kept steps of a batch. Compute them again after changing a mask. Indexing by a
    mask would make the processor wait for the GPU, and indexing by these does not.

    Args:
        batch (`dict`): `attention_mask`, `step_mask`, `label_probs` and, if there is one, `sft_mask` in the form of
            [`DataCollatorForLightReasoner`].

    Returns:
        `dict` of int64 tensors: `token_index` `(N,)` into the flattened `input_ids`, `step_index` `(n,)` into those
        tokens, `label_index` `(n,)` into the flattened labels `(B * S, K)`. The labels of SFT rows are in `sft_index`
        instead.

    Raises:
        `ValueError`: If SFT rows do not come last.

    Example:

    ```python
    >>> masks = {"attention_mask": torch.tensor([[1, 1], [1, 0]]), "step_mask": torch.tensor([[0, 1], [1, 0]])}
    >>> find_indices({**masks, "label_probs": torch.ones(2, 1, 1)})
    {'token_index': tensor([0, 1, 2]), 'step_index': tensor([1, 2]), 'label_index': tensor([0, 1])}

    ```
    """
    attention_mask, step_mask, label_probs = (
        batch[key].cpu().numpy() for key in ("attention_mask", "step_mask", "label_probs")
    )
    is_token = attention_mask.flatten() > 0
    indices = {
        "token_index": is_token.nonzero()[0],
        "step_index": step_mask.flatten()[is_token].nonzero()[0],
        "label_index": (label_probs.sum(-1).flatten() > 0).nonzero()[0],
    }
    if "sft_mask" in batch:
        sft_mask = batch["sft_mask"].cpu().numpy()
        if (sft_mask[:-1] & ~sft_mask[1:]).any():
            raise ValueError("The rows of `sft_mask` must come last in a batch.")
        is_sft = sft_mask[indices["label_index"] // label_probs.shape[1]]
        indices["sft_index"] = indices["label_index"][is_sft]
        indices["label_index"] = indices["label_index"][~is_sft]
    return {name: torch.from_numpy(index).to(batch["step_mask"].device) for name, index in indices.items()}
