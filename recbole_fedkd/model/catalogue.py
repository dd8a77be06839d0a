"""An attentive network asked for every item at once: what a full ranking needs.

What does not depend on the user (item vectors, queries, how an item's fields attend to each other) is computed once, what does
not depend on the item (keys and values of the history, the user's own fields) once a user. Between the two there are products
of small matrices with the items on the last axis, where every step reads memory in order. Logits are those of the network's
``forward`` but for the last bits.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from recbole_fedkd.model.attention import TargetAttention

BLOCK = 2048
"""Items at a time: what they need of one user stays in the processor's cache."""

MOST = 32
"""Clients whose catalogues are kept."""

PAIRS = 32768
"""User-item pairs that a network without a ranking of its own scores at a time; bounds its memory."""

SAFE = 60.0
"""Scores up to this need no largest one taken off before they are exponents, which 32 bits then hold."""


def rank_items(network: Any, users: Tensor, context: Mapping[str, Tensor], items: int, catalogue: Any = None) -> Tensor:
    """Logits ``[users, items, T]`` of every item, by the network's own ``rank`` where it has one.

    Args:
        network: as a ``NetworkBuilder`` builds it.
        users: local user ids ``[users]``.
        context: of each user, with an axis of one target.
        items: number of items, padding included.
        catalogue: what the network's own ``catalogue`` has made of its parameters as they are; None: it is made.
    """
    if getattr(network, "ranks", False) and not network.training and not torch.is_grad_enabled():
        ranked: Tensor = network.rank(users, context, catalogue)
        return ranked
    everything, parts = torch.arange(items, device=users.device), []
    for rows in torch.arange(len(users), device=users.device).split(max(1, PAIRS // items)):
        own = {name: values[rows] for name, values in context.items()}
        parts.append(network(users[rows], everything.expand(len(rows), -1), own))
    return torch.cat(parts)


class Queries:
    """Queries of all items to one attention.

    Args:
        attention: what they ask.
        query: of every item, without what a row's context adds, ``[d, items]``.
    """

    def __init__(self, attention: TargetAttention, query: Tensor) -> None:
        self.attention = attention
        self.heads = attention.head / math.sqrt(attention.head.shape[1])
        self.projected = attention.query.weight @ query
        self.longest = float(self.projected.norm(dim=0).max())


class Keys:
    """Keys of one user that all items ask for.

    Args:
        queries: of the items.
        keys: ``[keys, d]``.
        shift: what the user's context adds to every query ``[d]``.
        bias: of the keys' places ``[heads, keys]``; None: they have none.
    """

    def __init__(self, queries: Queries, keys: Tensor, shift: Tensor, bias: Tensor | None = None) -> None:
        self.queries, self.count = queries, len(keys)
        self.shift, self.shifted = (queries.attention.query.weight @ shift).unsqueeze(1), bool(shift.any())
        self.values: Tensor = queries.attention.value(keys)
        self.summed = torch.cat([self.values, keys.new_ones(self.count, 1)], 1).T
        self.of_heads = (queries.heads.unsqueeze(1) * keys).flatten(0, 1)
        self.added = self.of_heads @ self.shift
        if bias is not None:
            self.added += bias.reshape(-1, 1)
        if self.count:
            reach = float(self.of_heads.norm(dim=1).max()) * queries.longest + float(self.added.abs().max())
            self.safe = reach < SAFE

    def scores(self, projected: Tensor) -> Tensor:
        """Scores ``[heads, keys, block]`` of projected queries ``[d, block]``."""
        scores = (self.of_heads @ projected).add_(self.added)
        return scores.view(len(self.queries.heads), self.count, projected.shape[1])

    def pooled(self, projected: Tensor, seen: Tensor | None = None) -> Tensor:
        """What the items of a block get of these keys alone ``[d, block]``; 0 where there is none.

        ``seen``: bool ``[keys, block]``, which of the keys an item sees; None: all.
        """
        if not self.count:
            return torch.zeros_like(projected)
        scores = self.scores(projected)
        if seen is not None:
            scores.masked_fill_(~seen, -torch.inf)
        pooled = torch.matmul(self.summed, exponents(scores, self.safe))
        share = pooled[:, -1:].reciprocal().div_(len(pooled))
        mean = pooled[:, :-1].mul_(share).sum(0)
        return mean if seen is None else mean.where(seen.any(0), 0.0)


def exponents(scores: Tensor, safe: bool = False) -> Tensor:
    """``exp(scores - c)``, ``c`` one number for each softmax along the second axis; in place.

    ``safe``: no score is beyond what 32 bits hold the exponent of.
    """
    return scores.exp_() if safe else scores.sub_(scores.amax(1, keepdim=True)).exp_()


def attended_fields(keys: Keys, own_scores: Tensor, projected: Tensor, varying: Sequence[Tensor]) -> Tensor:
    """What attention over the fields of a row adds to each of them ``[d, block]``.

    Args:
        keys: the fields that are the same for all items.
        own_scores: of the fields that are an item's own, for its query without the user's context ``[heads, own, block]``.
        projected: those queries ``[d, block]``.
        varying: vectors of each of the fields that are not the same for all items ``[d, block]``, the items' own first.
    """
    queries, own = keys.queries, own_scores.shape[1]
    query = projected + keys.shift
    if keys.shifted:
        moved = queries.heads * keys.shift.T
        own_scores = own_scores + torch.stack([moved @ field for field in varying[:own]], 1)
    others = [(queries.heads @ (query * field)).unsqueeze(1) for field in varying[own:]]
    weights = exponents(torch.cat([own_scores, *others, keys.scores(projected)], 1))
    weights = weights.div_(weights.sum(1, keepdim=True)).mean(0)
    pooled = torch.zeros_like(query)
    for weight, field in zip(weights, varying, strict=False):
        pooled.addcmul_(weight, field)
    return torch.addmm(keys.values.T @ weights[len(varying) :], queries.attention.value.weight, pooled)


def framed(fields: Sequence[Tensor], added: Tensor | None, width: int) -> Tensor:
    """Fields ``[d, width]`` or ``[d, 1]``, to each of which the same is added, between zeros ``[1 + fields + 1, d, width]``."""
    rows = fields[0].new_empty(len(fields) + 2, len(fields[0]), width)
    rows[:: len(fields) + 1] = 0.0
    for place, field in enumerate(fields, 1):
        if added is None:
            rows[place] = field
        else:
            torch.add(field, added, out=rows[place])
    return rows


@dataclass(frozen=True)
class Catalogue:
    """What ranking needs of all items, whoever asks.

    Attributes:
        fields: vectors of the fields that are an item's own ``[fields, d, items]``.
        to_fields: what the items ask attention over the fields of a row; None: there is none.
        to_past: what they ask attention over a history.
    """

    fields: Tensor
    to_fields: Queries | None
    to_past: Queries | None

    @cached_property
    def own_scores(self) -> Tensor:
        """Attention of an item over its own fields, before the softmax ``[heads, fields, items]``."""
        assert self.to_fields is not None
        return (self.to_fields.heads @ (self.to_fields.projected * self.fields)).transpose(0, 1)

    def of_history(self, keys: Tensor, shift: Tensor, kept: Tensor | None = None) -> Keys:
        """The keys ``[slots, d]`` of a history, of all slots or of those ``[slots]`` that are kept."""
        assert self.to_past is not None
        bias = self.to_past.attention.position_bias
        assert bias is not None
        return Keys(self.to_past, *((keys, shift, bias.T) if kept is None else (keys[kept], shift, bias[kept].T)))


class Kept:
    """What was made for the latest few, such as clients: :data:`MOST` of them, so that many do not fill the memory."""

    def __init__(self) -> None:
        self._made: OrderedDict[int, Any] = OrderedDict()

    def of(self, number: int, make: Callable[[], Any]) -> Any:
        """What was made for a number, or is made now."""
        if number not in self._made:
            self._made[number] = make()
            if len(self._made) > MOST:
                self._made.popitem(last=False)
        self._made.move_to_end(number)
        return self._made[number]
