"""What the openings of many contexts ask of an amateur's next-token distributions, answered on its device together.

An opening asks for the most probable tokens among those that begin with some bytes, for single tokens, and for the
sums of all others by the expert token that each of them begins with. Tokens are ordered by their bytes, so tokens that
begin with the same bytes stand beside each other. The number of transfers does not depend on the number of openings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..models.forward import to_device
from .covering import Covering


# Amateur tokens of one context that are looked at in context, unless the others have less than this together
_MOST_TOKENS, _REST = 256, 1e-4
# Probabilities that are compared together
_BLOCK = 2**22


class Table(NamedTuple):
    """
    Expert tokens for which the sums of [`Covering.first`] are wanted, as places among the expert's tokens.

    Attributes:
        tokens (`list[int]`): Tokens whose own sums are wanted.
        near (`list[tuple[list[int], slice]]`): Some tokens and a slice of tokens, which are summed.
    """

    tokens: list[int]
    near: list[tuple[list[int], slice]]


class Request(NamedTuple):
    """
    What one opening asks for, as places among the amateur's tokens.

    Attributes:
        row (`int`): The distribution.
        among (`slice`): The slice whose most probable tokens are wanted.
        others (`list[int]`): Tokens that are wanted in any case.
        table ([`Table`], *optional*): Sums over the tokens of the slice that are neither.
    """

    row: int
    among: slice
    others: list[int]
    table: Table | None = None


@dataclass
class Reply:
    """
    Attributes:
        places, probs (`list`): The most probable tokens of the slice.
        rest (`float`): Probability of the slice's other tokens together.
        others (`list[float]`): Probabilities of the request's `others`.
        at_end (`float`): Probability of the tokens that end an answer.
        total (`float`), tokens, near (`list[float]`): Sums of the table, over all tokens and as it asks.
    """

    places: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    rest: float = 0.0
    others: list[float] = field(default_factory=list)
    at_end: float = 0.0
    total: float = 0.0
    tokens: list[float] = field(default_factory=list)
    near: list[float] = field(default_factory=list)


def look_up(covering: Covering, probs: torch.Tensor, requests: list[Request]) -> list[Reply]:
    """
    Answer the requests of some openings.

    Args:
        covering ([`Covering`]): The two tokenizers.
        probs (`torch.Tensor` of shape `(N, W)`, fp64): The amateur's next token in each context.
        requests (`list[Request]`): In any order.

    Returns:
        `list[Reply]`, in the order of the requests.
    """
    replies = [Reply() for _ in requests]
    of_text = probs[:, covering.text_ids(probs.device)]
    of_text[:, covering.end_places] = 0.0
    at_end = probs[:, covering.end_ids].sum(-1).tolist()
    others = _gather(of_text, [(each.row, each.others) for each in requests])
    askers: dict[tuple[int, int, int], list[int]] = {}
    for i, request in enumerate(requests):
        askers.setdefault((request.row, request.among.start, request.among.stop), []).append(i)
        replies[i].at_end, replies[i].others = at_end[request.row], others[i]
    for slices, values in _slices(of_text, list(askers)):
        top = values.topk(min(_MOST_TOKENS, values.shape[1]))
        # Each token is looked at unless it and the less probable ones have very little
        left = values.sum(-1, keepdim=True) - (top.values.cumsum(-1) - top.values)
        kept = left > _REST
        values.scatter_(1, top.indices, top.values.masked_fill(kept, 0.0))
        columns = (kept.sum(-1), top.indices, top.values, values.sum(-1))
        of_table = []
        for row, (key, count, places, likely, rest) in enumerate(
            zip(slices, *(column.tolist() for column in columns), strict=True)
        ):
            for i in askers[key]:
                reply = replies[i]
                reply.places, reply.probs = [key[1] + place for place in places[:count]], likely[:count]
                reply.rest = rest
                if requests[i].table is not None:
                    of_table.append((row, i))
        size = max(1, _BLOCK // values.shape[1])
        for start in range(0, len(of_table), size):
            part = of_table[start : start + size]
            _sum_by_table(covering, values[[row for row, _ in part]], [(requests[i], replies[i]) for _, i in part])
    return replies


def _sum_by_table(covering: Covering, values: torch.Tensor, pairs: list[tuple[Request, Reply]]) -> None:
    """Fill in the sums of requests that ask for all tokens, of which `values` has those that are not looked at."""
    rows, places = _flat([(row, request.others) for row, (request, _) in enumerate(pairs)], values.device)
    values[rows, places] = 0.0
    first = covering.first(values.device)
    table = values.new_zeros(len(pairs), len(covering.expert.sorted_ids) + 1).index_add_(1, first, values)[:, :-1]
    tables = [request.table or Table([], []) for request, _ in pairs]
    totals = table.sum(-1).tolist()
    tokens = _gather(table, [(row, each.tokens) for row, each in enumerate(tables)])
    single = _gather(table, [(row, some) for row, each in enumerate(tables) for some, _ in each.near])
    keys = {(row, near.start, near.stop): 0.0 for row, each in enumerate(tables) for _, near in each.near}
    for slices, found in _slices(table, list(keys)):
        keys.update(zip(slices, found.sum(-1).tolist(), strict=True))
    shorter = iter(single)
    for row, ((_, reply), each) in enumerate(zip(pairs, tables, strict=True)):
        reply.total, reply.tokens = totals[row], tokens[row]
        reply.near = [sum(next(shorter)) + keys[row, near.start, near.stop] for _, near in each.near]


def _slices(
    values: torch.Tensor, keys: list[tuple[int, int, int]]
) -> Iterator[tuple[list[tuple[int, int, int]], torch.Tensor]]:
    """Slices (row, first, end) of `values`, those of similar length together, padded with zeros, `(S, L)`."""
    keys = sorted(keys, key=lambda key: key[1] - key[2])
    while keys:
        longest = max(1, keys[0][2] - keys[0][1])
        most = max(1, _BLOCK // longest)
        count = max(1, sum(4 * (end - first) >= longest for _, first, end in keys[:most]))
        rows, firsts, ends = to_device(torch.tensor(keys[:count]), values.device).T[:, :, None]
        places = firsts + torch.arange(longest, device=values.device)
        found = values[rows, places.clamp(max=values.shape[1] - 1)]
        yield keys[:count], found.masked_fill_(places >= ends, 0.0)
        keys = keys[count:]


def _gather(values: torch.Tensor, wanted: list[tuple[int, list[int]]]) -> list[list[float]]:
    """Some columns of rows of `values`."""
    rows, places = _flat(wanted, values.device)
    found = iter(values[rows, places].tolist())
    return [[next(found) for _ in columns] for _, columns in wanted]


def _flat(wanted: list[tuple[int, list[int]]], device: torch.device) -> torch.Tensor:
    pairs = [(row, column) for row, columns in wanted for column in columns]
    return to_device(torch.tensor(pairs, dtype=torch.long).reshape(-1, 2), device).T
