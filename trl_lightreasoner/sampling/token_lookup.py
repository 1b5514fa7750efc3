"""Looks up what many openings need of an amateur's next-token distributions, on its device.

An opening needs the most probable of all tokens, or of those that begin with some bytes; single tokens; and the sums
of the others by the expert token that each of them begins with. The number of transfers does not depend on the number
of openings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from ..models.forward import to_device
from .covering import Covering


# Amateur tokens that are followed from one context
_MOST_TOKENS = 256
# Probabilities in one tensor, of which there are about five: few for a CPU's cache, and 128 MiB on a GPU, where each
# transfer is waited for
_BLOCK, _BLOCK_ON_DEVICE = 2**22, 2**24


class Table(NamedTuple):
    """
    Sums of the probabilities of the amateur's tokens.

    Attributes:
        tokens (`np.ndarray`): Expert tokens, as places in its `sorted_ids`. Each has the sum of the amateur's tokens
            of which it is the first expert token (see [`Covering.first`]).
        near (`list[slice]`): Slices of the amateur's `sorted_ids`, with the sum of each.
    """

    tokens: np.ndarray
    near: list[slice]


class Request(NamedTuple):
    """
    What one opening needs.

    Attributes:
        row (`int`): Row of the distribution.
        among (`slice`, *optional*): Slice of the amateur's `sorted_ids`, whose most probable tokens are returned.
            `None` for all tokens that stand for text.
        rest (`float`): Probability that all tokens that are not returned can have together.
        others (`np.ndarray`): Tokens that are returned in any case.
        blank (`float`): If `among` is `None`, the probability from which a token that begins with a blank can be one
            of the most probable ones. The others are summed.
        table ([`Table`], *optional*): Sums over all tokens that are not returned.
    """

    row: int
    among: slice | None
    rest: float
    others: np.ndarray
    blank: float = 0.0
    table: Table | None = None


@dataclass
class Reply:
    """
    The result for one request.

    Attributes:
        ids, probs (`np.ndarray`): The most probable tokens.
        rest (`float`): Probability of all other tokens of the slice, apart from those in `blank`.
        blank (`float`): Probability of the tokens that begin with a blank and are less probable than the request says.
        others (`np.ndarray`): Probabilities of the request's `others`.
        at_end (`float`): Probability of the tokens that end an answer.
        total (`float`), tokens, near (`np.ndarray`): Sum over all tokens, and the sums of the table.
    """

    ids: np.ndarray = field(default_factory=partial(np.empty, 0, np.int64))
    probs: np.ndarray = field(default_factory=partial(np.empty, 0))
    rest: float = 0.0
    blank: float = 0.0
    others: np.ndarray = field(default_factory=partial(np.empty, 0))
    at_end: float = 0.0
    total: float = 0.0
    tokens: np.ndarray = field(default_factory=partial(np.empty, 0))
    near: np.ndarray = field(default_factory=partial(np.empty, 0))


def look_up(covering: Covering, probs: torch.Tensor, requests: list[Request]) -> list[Reply]:
    """
    Look up what some openings need.

    Args:
        covering ([`Covering`]): The two tokenizers.
        probs (`torch.Tensor` of shape `(N, W)`, fp64): The amateur's next token in each context. Modified in place.
        requests (`list[Request]`): In any order.

    Returns:
        `list[Reply]`, in the order of the requests.
    """
    replies = [Reply() for _ in requests]
    at_end = probs[:, covering.end_ids].sum(-1).tolist()
    probs.masked_fill_(covering.no_text(probs.device), 0.0)
    others = _gather(probs, [(each.row, each.others) for each in requests])
    everything: dict[tuple[int, float, float], list[int]] = {}
    slices: dict[tuple[int, int, int, float], list[int]] = {}
    for i, (request, reply) in enumerate(zip(requests, replies, strict=True)):
        if request.among is None:
            everything.setdefault((request.row, request.blank, request.rest), []).append(i)
        else:
            slices.setdefault((request.row, request.among.start, request.among.stop, request.rest), []).append(i)
        reply.at_end, reply.others = at_end[request.row], others[i]
    for part in _parts(list(everything), probs):
        values = probs.index_select(0, to_device(torch.tensor([row for row, _, _ in part]), probs.device))
        least, rest = to_device(torch.tensor([key[1:] for key in part], dtype=probs.dtype), probs.device).T[:, :, None]
        hidden = (values < least) & covering.begins_with_blank(probs.device)
        _take_most_probable(values, None, hidden, rest, [[replies[i] for i in everything[key]] for key in part])
        of_table = [(place, i) for place, key in enumerate(part) for i in everything[key] if requests[i].table]
        for some in _parts(of_table, probs):
            left = values.index_select(0, to_device(torch.tensor([place for place, _ in some]), probs.device))
            _sum_by_table(covering, left, [(requests[i], replies[i]) for _, i in some])
    for keys, places in _slices(list(slices), probs.device):
        ids = covering.sorted_ids(probs.device)[places.clamp(0)]
        rows_of = to_device(torch.tensor([key[:1] for key in keys]), probs.device)
        values = probs[rows_of, ids].masked_fill_(places < 0, 0.0)
        rest = to_device(torch.tensor([key[3:] for key in keys], dtype=probs.dtype), probs.device)
        _take_most_probable(values, ids, None, rest, [[replies[i] for i in slices[key]] for key in keys])
    return replies


def _take_most_probable(
    values: torch.Tensor,
    ids: torch.Tensor | None,
    hidden: torch.Tensor | None,
    most_left: torch.Tensor,
    askers: list[list[Reply]],
) -> None:
    """
    Move the most probable tokens of each row from `values`, which are those of `ids`, to the replies, and sum those
    that are `hidden`.
    """
    shown = values if hidden is None else values.masked_fill(hidden, 0.0)
    top = shown.topk(min(_MOST_TOKENS, values.shape[1]))
    # A token counts unless it and all that are less probable have very little together
    kept = shown.sum(-1, keepdim=True) - (top.values.cumsum(-1) - top.values) > most_left
    left = top.values.masked_fill(kept, 0.0)
    rest = shown.scatter_(1, top.indices, left).sum(-1)
    blank = torch.zeros_like(rest)
    if hidden is not None:
        blank = values.masked_fill(~hidden, 0.0).sum(-1)
        values.scatter_(1, top.indices, values.gather(1, top.indices).masked_fill(kept, 0.0))
    top_ids = top.indices if ids is None else ids.gather(1, top.indices)
    columns = [each.cpu().numpy() for each in (kept.sum(-1), top_ids, top.values, rest, blank)]
    for replies, count, found, probs, rest_, blank_ in zip(askers, *columns, strict=True):
        for reply in replies:
            reply.ids, reply.probs, reply.rest, reply.blank = found[:count], probs[:count], rest_, blank_


def _sum_by_table(covering: Covering, values: torch.Tensor, pairs: list[tuple[Request, Reply]]) -> None:
    """Fill in the sums over the tokens `values` that are not the most probable ones, `(len(pairs), W)`."""
    rows, ids = _flat([(row, request.others) for row, (request, _) in enumerate(pairs)], values.device)
    values[rows, ids] = 0.0
    first = covering.first(values.device)
    table = values.new_zeros(len(pairs), len(covering.expert.sorted_ids) + 1).index_add_(1, first, values)[:, :-1]
    tables = [request.table or Table(np.empty(0, np.int64), []) for request, _ in pairs]
    totals = table.sum(-1).tolist()
    tokens = _gather(table, [(row, each.tokens) for row, each in enumerate(tables)])
    keys = {(row, near.start, near.stop): 0.0 for row, each in enumerate(tables) for near in each.near}
    for some, places in _slices(list(keys), values.device):
        rows_of = to_device(torch.tensor([key[:1] for key in some]), values.device)
        ids = covering.sorted_ids(values.device)[places.clamp(0)]
        found = values[rows_of, ids].masked_fill_(places < 0, 0.0)
        keys.update(zip(some, found.sum(-1).tolist(), strict=True))
    for row, ((_, reply), each) in enumerate(zip(pairs, tables, strict=True)):
        reply.total, reply.tokens = totals[row], tokens[row]
        reply.near = np.array([keys[row, near.start, near.stop] for near in each.near])


def _slices(keys: list[tuple], device: torch.device) -> Iterator[tuple[list[tuple], torch.Tensor]]:
    """Slices (row, first, end, ...) of similar length, and their places, padded with -1, `(S, L)`; none empty."""
    keys = sorted((key for key in keys if key[1] < key[2]), key=lambda key: key[1] - key[2])
    while keys:
        longest = keys[0][2] - keys[0][1]
        most = max(1, _block(device) // longest)
        count = sum(4 * (end - first) >= longest for _, first, end, *_ in keys[:most])
        firsts, ends = to_device(torch.tensor([key[1:3] for key in keys[:count]]), device).T[:, :, None]
        places = firsts + torch.arange(longest, device=device)
        yield keys[:count], places.masked_fill_(places >= ends, -1)
        keys = keys[count:]


def _parts(items: list, probs: torch.Tensor) -> Iterator[list]:
    size = max(1, _block(probs.device) // probs.shape[1])
    return (items[start : start + size] for start in range(0, len(items), size))


def _block(device: torch.device) -> int:
    return _BLOCK if device.type == "cpu" else _BLOCK_ON_DEVICE


def _gather(values: torch.Tensor, wanted: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
    """Some columns of rows of `values`."""
    rows, columns = _flat(wanted, values.device)
    found = values[rows, columns].cpu().numpy()
    ends = accumulate([len(columns) for _, columns in wanted], initial=0)
    return [found[first:end] for first, end in pairwise(ends)]


def _flat(wanted: list[tuple[int, np.ndarray]], device: torch.device) -> torch.Tensor:
    rows = np.repeat([row for row, _ in wanted], [len(columns) for _, columns in wanted])
    columns = np.concatenate([np.empty(0, np.int64), *(columns for _, columns in wanted)])
    return to_device(torch.from_numpy(np.stack([rows, columns]).astype(np.int64)), device)
