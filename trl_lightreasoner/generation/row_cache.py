"""Keys and values of rows at different positions, in buffers of fixed size, and how many rows fit in memory."""

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import StaticLayer

from ..models.weights import get_base_model


# Beyond this number of rows, the time of a step grows in proportion to them
MAX_ROWS = 1024


class RowLayer(StaticLayer):
    """
    Keys and values of one layer for rows at different positions.

    Args:
        keys (`torch.Tensor` of shape `(B, L, H, D)`): Buffer, as attention by length reads it.
        values (`torch.Tensor` of shape `(B, L, H, D)`): Buffer.
        positions (`torch.Tensor` of shape `(B,)`, int64): Index of each row's next token. Read at every update.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor):
        super().__init__(max_cache_len=keys.shape[1])
        # Views of the shape that transformers uses, (B, H, L, D)
        self.keys, self.values, self.positions = keys.transpose(1, 2), values.transpose(1, 2), positions
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.positions[:, None, None, None]
        self.keys.scatter_(2, index.expand_as(key_states), key_states)
        self.values.scatter_(2, index.expand_as(value_states), value_states)
        return self.keys, self.values


def rows_that_fit(model: torch.nn.Module, num_tokens: int) -> int:
    """Estimated number of rows of `num_tokens` tokens that fit in the free memory of the model's GPU."""
    device = get_base_model(model).get_input_embeddings().weight.device
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Half is left for passes over prompts or trajectories, and for copies when ended rows are removed
    return max(1, min(MAX_ROWS, int(free / 2) // bytes_of_row(model, num_tokens)))


def bytes_of_row(model: torch.nn.Module, num_tokens: int) -> int:
    """Estimated memory of a row of `num_tokens` tokens in decoding: its keys and values, hidden states and logits."""
    base = get_base_model(model)
    config = base.config.get_text_config()
    # In some families, such as Gemma 4, the heads differ from layer to layer
    differ = getattr(config, "is_heterogeneous", False)
    layers = config.per_layer_config if differ else [config] * config.num_hidden_layers
    hidden_size = getattr(config, "hidden_size", 0)
    keys_and_values = 2 * num_tokens * sum(_width_of_heads(layer, hidden_size) for layer in layers)
    return (keys_and_values + hidden_size * num_tokens + 2 * config.vocab_size) * base.dtype.itemsize


def _width_of_heads(config: PretrainedConfig, hidden_size: int) -> int:
    """Numbers that a layer keeps of a token as its keys, and as many as its values: 0 without attention."""
    num_heads = getattr(config, "num_attention_heads", None) or 0
    head_dim = getattr(config, "head_dim", None) or hidden_size // max(1, num_heads)
    return (getattr(config, "num_key_value_heads", None) or num_heads) * head_dim
