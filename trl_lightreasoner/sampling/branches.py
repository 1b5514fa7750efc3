"""Logits of a model along rows of tokens, and after contexts that branch off these rows, many branches in one pass.

The branches of a row follow each other in one pass, and each token has the position that it has in its own context. A
token sees the row up to where its branch leaves it, through the keys and values of the pass along the row, and the
tokens of its branch before it. A few whole contexts are compared first. A model that reads branches differently reads
every context from its beginning.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..models.forward import attention_backends, head_makes_logits, rope_switch, same_logits, to_device
from ..models.weights import get_base_model
from .scoring import GROUP_TOKENS, PART_LOGITS, LogitsAtSteps, Trajectory, as_batch, group_by_length


# Tokens of one row's branches in one pass. The size of their mask grows with the square
_MOST_TOKENS = 512
# Contexts that are also read whole, to test whether a model can read branches
_COMPARED = 8
# Results of this test
_READS_BRANCHES: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


class _Prefix(NamedTuple):
    """Keys and values of a batch of rows, by layer, and the rows' number of columns."""

    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]]
    length: int


class BranchedRows:
    """
    Rows of tokens, and contexts that begin like one of them.

    Args:
        model (`torch.nn.Module`): In eval mode.
        rows (`list[Trajectory]`): Prompts and the tokens after them, of which the last is not read.
        within (`Callable`): Makes a context manager for each pass.

    Attributes:
        logits (`list[torch.Tensor]`): For each row, after its prompt and after each token read, `(T, W)`.

    Example:

    ```python
    >>> from contextlib import nullcontext
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes)).eval()
    >>> read = BranchedRows(model, [Trajectory([1, 2], [3, 4, 5])], nullcontext)
    >>> [len(logits) for logits in read.logits]
    [3]
    >>> sorted((i, len(logits)) for i, logits in read.after([(0, (3, 7)), (0, (3, 8, 9))]))
    [(0, 10), (1, 10)]

    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: list[Trajectory],
        within: Callable[[], AbstractContextManager],
    ):
        self.model, self.rows, self.within = model, rows, within
        base = get_base_model(model)
        self._width = base.config.get_text_config().vocab_size
        self._device = base.get_input_embeddings().weight.device
        self._most = _longest_context(model)
        self._prefixes: list[_Prefix | None] = []
        self._place: dict[int, tuple[int, int]] = {}  # of a row: its batch, and where it is there
        found: dict[int, torch.Tensor] = {}
        for group in group_by_length(rows):
            input_ids, positions = as_batch([rows[i] for i in group])
            hidden_states, prefix = self._read_rows(input_ids, positions)
            logits_at = LogitsAtSteps(model, input_ids, positions, hidden_states, within)
            for place, i in enumerate(group):
                self._place[i] = len(self._prefixes), place
                found[i] = logits_at(slice(place, place + 1))
            self._prefixes.append(prefix)
        self.logits = [found[i] for i in range(len(rows))]

    def after(self, contexts: list[tuple[int, tuple[int, ...]]]) -> Iterator[tuple[int, torch.Tensor]]:
        """
        Logits after contexts.

        Args:
            contexts (`list[tuple[int, tuple[int, ...]]]`): A row and the tokens after its prompt. At least one token
                differs from the row's.

        Yields:
            `tuple[int, torch.Tensor]`: Index of a context, and logits `(W,)`, in any order.
        """
        branches: dict[int, list[int]] = {}
        whole = []
        for place, (row, context) in enumerate(contexts):
            batch, _ = self._place[row]
            if self._prefixes[batch] is None or len(self.rows[row].prompt_ids) + len(context) > self._most:
                whole.append(place)
            else:
                branches.setdefault(batch, []).append(place)
        for batch, places in branches.items():
            if get_base_model(self.model) not in _READS_BRANCHES:
                few = places[:_COMPARED]
                found, expected = (
                    torch.stack([logits for _, logits in sorted(each, key=lambda pair: pair[0])])
                    for each in (self._read_branches(batch, few, contexts), self._read_whole(few, contexts))
                )
                _READS_BRANCHES[get_base_model(self.model)] = same_logits(self.model, found, expected)
            if _READS_BRANCHES[get_base_model(self.model)]:
                yield from self._read_branches(batch, places, contexts)
            else:
                whole += places
        yield from self._read_whole(whole, contexts)

    def _read_rows(
        self, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor | None, _Prefix | None]:
        """Hidden states where a batch is read, and what its branches need; `None` if they are read whole."""
        if input_ids.shape[1] > self._most or not _READS_BRANCHES.get(get_base_model(self.model), True):
            return None, None
        input_ids = to_device(input_ids, self._device)
        with attention_backends(self._device), self.within():
            if not head_makes_logits(self.model, input_ids):
                return None, None
            decoder, cache = get_base_model(self.model).get_decoder(), DynamicCache()
            hidden_states = decoder(
                input_ids=input_ids, use_cache=True, **{_cache_name(decoder): cache}
            ).last_hidden_state
        index = to_device(positions.flatten().nonzero().flatten(), self._device)
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        return hidden_states.flatten(0, 1)[index], _Prefix(kept, input_ids.shape[1])

    def _read_branches(
        self, batch: int, places: list[int], contexts: list[tuple[int, tuple[int, ...]]]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        prefix = self._prefixes[batch]
        assert prefix is not None
        of_row: dict[int, list[_Pack]] = {}
        for place in places:
            row, context = contexts[place]
            prompt, trunk = self.rows[row]
            trunk = trunk[:-1]
            others = (k for k in range(min(len(context), len(trunk))) if context[k] != trunk[k])
            shared = next(others, len(trunk))
            packs = of_row.setdefault(row, [_Pack(self._place[row][1])])
            if packs[-1].ids and len(packs[-1].ids) + len(context) - shared > _MOST_TOKENS:
                packs.append(_Pack(self._place[row][1]))
            packs[-1].add(place, len(prompt) + shared, context[shared:])
        packs = sorted((each for packs in of_row.values() for each in packs), key=lambda pack: -len(pack.ids))
        while packs:
            count = max(1, GROUP_TOKENS // (prefix.length + len(packs[0].ids)))
            yield from self._read_packs(prefix, packs[:count])
            packs = packs[count:]

    def _read_packs(self, prefix: _Prefix, packs: list["_Pack"]) -> Iterator[tuple[int, torch.Tensor]]:
        length = len(packs[0].ids)

        def padded(rows: list[list[int]], value: int = 0) -> torch.Tensor:
            return to_device(torch.tensor([row + [value] * (length - len(row)) for row in rows]), self._device)

        ends, branches = padded([pack.ends for pack in packs]), padded([pack.branches for pack in packs], -1)
        on_row = torch.arange(prefix.length, device=self._device) < ends[:, :, None]
        on_branch = (branches[:, :, None] == branches[:, None]).tril()
        mask = torch.cat([on_row, on_branch], -1)[:, None]
        rows = torch.tensor([pack.row for pack in packs])
        cache = DynamicCache()
        for layer, each in enumerate(prefix.keys_and_values):
            cache.update(*(tensor[rows.to(tensor.device)] for tensor in each), layer)
        base = get_base_model(self.model)
        decoder, head = base.get_decoder(), base.get_output_embeddings()
        with attention_backends(self._device), self.within():
            hidden_states = decoder(
                input_ids=padded([pack.ids for pack in packs]),
                position_ids=padded([pack.positions for pack in packs]),
                attention_mask=mask,
                use_cache=True,
                **{_cache_name(decoder): cache},
            ).last_hidden_state.flatten(0, 1)
        last = [(place, i * length + at) for i, pack in enumerate(packs) for place, at in pack.last.items()]
        for part in _parts(last, self._width):
            with self.within():
                logits = head(hidden_states[[at for _, at in part]])
            yield from zip([place for place, _ in part], logits, strict=True)

    def _read_whole(
        self, places: list[int], contexts: list[tuple[int, tuple[int, ...]]]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Every context from its beginning."""
        whole = [
            Trajectory([*self.rows[row].prompt_ids, *context], [0])
            for row, context in map(contexts.__getitem__, places)
        ]
        for group in group_by_length(whole):
            for part in _parts(group, self._width):
                logits = LogitsAtSteps(self.model, *as_batch([whole[i] for i in part]), within=self.within)
                yield from zip([places[i] for i in part], logits(slice(0, len(part))), strict=True)


class _Pack:
    """Branches of one row, one after another."""

    def __init__(self, row: int):
        self.row = row
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.ends: list[int] = []  # how much of the row a token sees
        self.branches: list[int] = []
        self.last: dict[int, int] = {}  # of each context: its last token

    def add(self, place: int, end: int, branch: tuple[int, ...]) -> None:
        self.ids += branch
        self.positions += range(end, end + len(branch))
        self.ends += [end] * len(branch)
        self.branches += [place] * len(branch)
        self.last[place] = len(self.ids) - 1


def _longest_context(model: torch.nn.Module) -> int:
    """Tokens up to which every layer attends to all before its own, by a mask that can be given; 0 if unknown."""
    base = get_base_model(model)
    names = inspect.signature(base.get_decoder().forward).parameters
    if base.config._attn_implementation != "sdpa" or not {"position_ids", "attention_mask"} <= names.keys():
        return 0
    if getattr(base.config, "alibi", False):  # distances are counted along a mask of one row's tokens
        return 0
    layers = DynamicCache(config=base.config).layers
    if not {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return 0
    limits = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    switch = rope_switch(base.config)
    limits += [] if switch is None else [switch]
    return min(limits, default=2**31)


def _cache_name(decoder: torch.nn.Module) -> str:
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def _parts(items: list, width: int) -> Iterator[list]:
    """Items whose logits are in memory together."""
    count = max(1, PART_LOGITS // width)
    return (items[first : first + count] for first in range(0, len(items), count))
