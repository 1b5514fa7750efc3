"""Which columns of the logits are tokens, and which of these two models share.

A model's logits can be wider than its tokenizer (Qwen2.5 pads 151,665 tokens to 151,936 or 152,064 columns), and two
models of one family can be padded differently. So shared tokens are found by comparing tokens and ids, never sizes. A
column that belongs to no token is excluded from every probability, whatever its value.
"""

import copy
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase, logging


logger = logging.get_logger(__name__)

# Of each tokenizer the number of its tokens and these with their ids, which take a tenth of a second to list
_listed: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, dict[str, int]]] = WeakKeyDictionary()


class Vocabulary:
    """
    The token ids over which probabilities are computed.

    Args:
        ids (`list[int]`): Token ids, in any order. Duplicates count once.

    Example:

    ```python
    >>> import torch
    >>> vocabulary = Vocabulary([0, 1, 3])
    >>> vocabulary.select(torch.tensor([[1.0, 2.0, float("nan"), 4.0]]))
    tensor([[1., 2., 4.]])
    >>> vocabulary.ids_of(torch.tensor([2]))
    tensor([3])

    ```
    """

    def __init__(self, ids: list[int]):
        members = sorted(set(ids))
        self.ids = torch.tensor(members, dtype=torch.long)
        self._size = len(members)
        # The usual case: real tokens come first, so a view is enough
        self._is_prefix = members != [] and members[-1] == self._size - 1
        self._members = range(self._size) if self._is_prefix else frozenset(members)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, token_id: object) -> bool:
        return token_id in self._members

    def to(self, device: torch.device) -> "Vocabulary":
        """The same vocabulary with its ids on another device."""
        moved = copy.copy(self)
        moved.ids = self.ids.to(device)
        return moved

    def select(self, logits: torch.Tensor) -> torch.Tensor:
        """Columns of `logits` `(..., W)` in the vocabulary, `(..., len(self))`, as a view if possible."""
        if self._is_prefix:
            return logits[..., : len(self)]
        return logits.index_select(-1, self.ids.to(logits.device))

    def ids_of(self, columns: torch.Tensor) -> torch.Tensor:
        """Token ids of columns in the result of [`~Vocabulary.select`]."""
        return columns if self._is_prefix else self.ids.to(columns.device)[columns]

    def columns_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Columns of token ids, the inverse of [`~Vocabulary.ids_of`]. All ids must be in the vocabulary."""
        return ids if self._is_prefix else torch.searchsorted(self.ids.to(ids.device), ids)

    def contains(self, ids: torch.Tensor) -> torch.Tensor:
        """Whether each token id is in the vocabulary."""
        if self._is_prefix:
            return (ids >= 0) & (ids < len(self))
        return torch.isin(ids, self.ids.to(ids.device))


class OtherTokensError(ValueError):
    """Two tokenizers assign one id to two tokens, or two ids to one token."""


def model_vocabulary(tokenizer: PreTrainedTokenizerBase, width: int, name: str = "model") -> Vocabulary:
    """
    Every token of one tokenizer that has a column in the logits, including EOS and added tokens.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        width (`int`): Number of columns of the model's logits.
        name (`str`): What to call the model in an error message.

    Raises:
        `ValueError`: If no token has a column.
    """
    return Vocabulary(list(_tokens_with_logits(tokenizer, width, name).values()))


def _tokens_with_logits(tokenizer: PreTrainedTokenizerBase, width: int, name: str) -> dict[str, int]:
    count, tokens = _listed.get(tokenizer, (None, {}))
    if count != len(tokenizer):  # not listed yet, or a token was added
        tokens = tokenizer.get_vocab()
        _listed[tokenizer] = (len(tokenizer), tokens)
    # A tokenizer can have more tokens: Gemma 3 1B has no embedding for the image token
    vocabulary = {token: token_id for token, token_id in tokens.items() if token_id < width}
    if not vocabulary:
        raise ValueError(
            f"No token of the {name}'s tokenizer has a logit. Pass the tokenizer that belongs to the {name}."
        )
    return vocabulary


def check_embedded(ids: list[int], tokenizer: PreTrainedTokenizerBase, width: int, row: int, name: str) -> None:
    """
    Refuse a row with a token beyond the `width` embeddings of a model.

    Raises:
        `ValueError`: If there is one. The message names the row and the token.
    """
    token_id = max(ids, default=0)
    if token_id >= width:
        raise ValueError(
            f"Row {row} has the token {tokenizer.convert_ids_to_tokens(token_id)!r}, whose id is {token_id}, and the "
            f"{name} has {width} embeddings. Leave the token out, or use the tokenizer that belongs to the {name}."
        )


def shared_vocabulary(
    expert_tokenizer: PreTrainedTokenizerBase,
    amateur_tokenizer: PreTrainedTokenizerBase,
    expert_width: int,
    amateur_width: int,
) -> Vocabulary:
    """
    The tokens that have the same id in two models.

    One tokenizer may have tokens that the other lacks, which are not shared. An added token of one may also have the
    id of a differently named one of the other, if one of them is special (DeepSeek-R1-Distill-Qwen and Qwen2.5).
    Neither is shared then, and a warning is logged. With any other difference the amateur would read a different text
    from the one that the expert wrote, so it is refused.

    Args:
        expert_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The expert's tokenizer.
        amateur_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The amateur's tokenizer.
        expert_width (`int`): Number of columns of the expert's logits.
        amateur_width (`int`): Number of columns of the amateur's logits.

    Returns:
        [`Vocabulary`]

    Raises:
        [`OtherTokensError`]: If the tokenizers assign one id to two tokens, or two ids to one token. It is a
            `ValueError` that names the first one.
    """
    expert = _tokens_with_logits(expert_tokenizer, expert_width, "expert")
    amateur = _tokens_with_logits(amateur_tokenizer, amateur_width, "amateur")
    if expert == amateur:  # the usual case
        return Vocabulary(list(expert.values()))
    amateur_token = {token_id: token for token, token_id in amateur.items()}
    added = _added_ids(expert_tokenizer) & _added_ids(amateur_tokenizer)
    special = special_ids(expert_tokenizer) | special_ids(amateur_tokenizer)  # added words are text
    shared, renamed = [], []
    for token, token_id in sorted(expert.items(), key=lambda item: item[1]):
        other = amateur_token.get(token_id)
        if amateur.get(token) == token_id:
            shared.append(token_id)
        elif token in amateur:
            raise OtherTokensError(
                f"The expert's and the amateur's tokenizers differ: token {token!r} has id {token_id} for the expert "
                f"and id {amateur[token]} for the amateur. Choose two models of one family."
            )
        elif other is not None:
            if token_id not in added & special or other in expert:
                raise OtherTokensError(
                    f"The expert's and the amateur's tokenizers differ: id {token_id} is token {token!r} for the "
                    f"expert and {other!r} for the amateur. Choose two models of one family."
                )
            renamed.append(token_id)
    if not shared:
        raise OtherTokensError(
            "The expert's and the amateur's tokenizers share no token. Choose two models of one family."
        )
    if renamed:
        first = renamed[0]
        names = f"{expert_tokenizer.convert_ids_to_tokens(first)!r} and {amateur_token[first]!r}"
        logger.warning(
            f"{len(renamed)} added tokens have different names in the two tokenizers (the first is id {first}: "
            f"{names}). They are excluded from all probabilities, and the amateur reads them under its own name."
        )
    return Vocabulary(shared)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that stand for something other than text. Added words are not among them."""
    added = tokenizer.added_tokens_decoder.items()
    return {token_id for token_id, token in added if token.special} | set(tokenizer.all_special_ids)


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
