"""An attentive network asked for every item at once: what a full ranking needs.

What does not depend on the user (item vectors, queries, how an item's fields attend to each other, their share of the first
layer) is computed once, what does not depend on the item (keys and values of the history, the user's own fields) once a user.
Between the two there are products of small matrices with the items on the last axis, and loops in machine code that read
memory in order. Logits are those of the network's ``forward`` but for the last bits.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.model.attention import TargetAttention
from recbole_fedkd.model.backbone import Backbone
from recbole_fedkd.model.convolving import Linear
from recbole_fedkd.model.ranking import (
    MOST,
    WIDTH,
    OfItems,
    OfLayers,
    OfUsers,
    Sizes,
    Step,
    blocks,
    column_product,
    rank_blocks,
)

LOG_2 = math.log(2.0)

AT_ONCE = 64
"""Users whose keys are made at a time."""

KEPT, NUMBERS, OF_ITEM = 32, 2**28, 200
"""Clients whose catalogues are kept; fewer, where these would be more than so many numbers, at so many an item."""

PAIRS = 32768
"""User-item pairs that a network without a ranking of its own scores at a time; bounds its memory."""


def rank_items(
    network: Any,
    users: Tensor,
    context: Mapping[str, Tensor],
    items: int,
    catalogue: Any = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """Logits ``[users, items, T]`` of every item, by the network's own ``rank`` where it has one.

    Args:
        network: as a ``NetworkBuilder`` builds it.
        users: local user ids ``[users]``.
        context: of each user, with an axis of one target.
        items: number of items, padding included.
        catalogue: what the network's own ``catalogue`` has made of its parameters as they are; None: it is made.
        chosen: items of each user ``[users, chosen]``, of which logits are returned; None: all.
    """
    if getattr(network, "ranks", False) and not network.training and not torch.is_grad_enabled():
        ranked: Tensor = network.rank(users, context, catalogue, chosen)
        return ranked
    if chosen is not None:
        scored: Tensor = network(users, chosen, context)
        return scored
    everything, parts = torch.arange(items, device=users.device), []
    for rows in torch.arange(len(users), device=users.device).split(max(1, PAIRS // items)):
        own = {name: values[rows] for name, values in context.items()}
        parts.append(network(users[rows], everything.expand(len(rows), -1), own))
    return torch.cat(parts)


def ranks_chosen(network: Any) -> bool:
    """Whether some items of each user cost a network's own ``rank`` less than its ``forward``.

    What is known of pairs it computes for all items of a user, and a context it takes to be that of all of them.
    """
    more = (getattr(part, "context_fields", None) or getattr(part, "known", None) for part in network.modules())
    return bool(getattr(network, "ranks", False)) and not any(more)


class Query:
    """What all items ask one attention.

    Args:
        attention: what they ask.
        query: of every item, without what a user's context adds, ``[d, items]``.
    """

    def __init__(self, attention: TargetAttention, query: Tensor) -> None:
        self.attention = attention
        # Softmaxes are of base 2, whose powers cost less.
        self.heads = attention.head / (math.sqrt(attention.head.shape[1]) * LOG_2)
        self.projected = attention.query.weight @ query
        self.longest = _norms(self.projected, 0).amax()

    def shift(self, shift: Tensor) -> Tensor:
        """What users' contexts ``[users, d]`` add to every query, as this attention sees it ``[users, d]``."""
        return column_product(self.attention.query.weight, shift.T).T

    def reach(self, of_heads: Tensor, added: Tensor) -> Tensor:
        """What no score of users is beyond ``[users]``, of what :meth:`keys` returns."""
        return _norms(of_heads, 2).amax(1) * self.longest + added.abs().amax(1)

    def keys(self, keys: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys ``[users, keys, d]`` as heads see them ``[users, keys * heads, d]``, what is added to their scores, and their
        values ``[users, d, keys]``.

        ``shift``: of :meth:`shift`.
        """
        (users, count, _), bias = keys.shape, self.attention.position_bias
        of_heads = (keys.unsqueeze(2) * self.heads).flatten(1, 2)
        added = column_product(self.heads, (keys * shift.unsqueeze(1)).flatten(0, 1).T).T.unflatten(0, (users, count))
        added = (added if bias is None else added + bias[:count] / LOG_2).flatten(1)
        values = column_product(self.attention.value.weight, keys.flatten(0, 1).T)
        return of_heads, added, values.unflatten(1, (users, count)).transpose(0, 1)


@dataclass(frozen=True)
class Asking:
    """The users of a ranking.

    Attributes:
        own: their fields ``[users, fields, d]``.
        shift: what their context adds to every query ``[users, d]``.
        past: items of their histories ``[users, slots]``, 0 in slots behind the last, which are empty.
        keys: what attention sees of them ``[users, slots, d]``.
        pair: of a user, by place, the field that depends on both ``[d, items]`` and what goes to the logits past all
            layers ``[T, items]``; None: there is none.
    """

    own: Tensor
    shift: Tensor
    past: Tensor
    keys: Tensor
    pair: Callable[[int], tuple[Tensor, Tensor]] | None


class Catalogue:
    """What ranking needs of all items, whoever asks.

    The first layer of a backbone is linear. What an item's own fields add to it is known before anybody asks, what a user's
    add is one number an output, and of what attention adds, outputs that get the same are computed once.

    Args:
        fields: vectors of the fields that are an item's own ``[fields, d, items]``.
        query: of every item, without what a user's context adds, ``[d, items]``.
        places: of an item's fields among those of a sample, of a user's, and of those that depend on both: the history's, the
            pair's.
        attentions: over the fields of a sample, and over a history; None: there is none.
        backbone: behind them.
    """

    def __init__(
        self,
        fields: Tensor,
        query: Tensor,
        places: Sequence[Sequence[int]],
        attentions: Sequence[TargetAttention | None],
        backbone: Backbone,
    ) -> None:
        self.fields, (of_item, of_user, of_both) = fields, places
        self.to_fields, self.to_past = (
            None if attention is None else Query(attention, query) for attention in attentions
        )
        weight, self.bias = backbone.first()
        self.of_user = weight[:, of_user].flatten(1)
        of_items = weight[:, of_item].flatten(1)
        known = of_items.any(1)
        varying = weight[:, of_both].flatten(1)
        if self.to_fields is not None:
            # To each field the same is added. What is equal shall be so to the last bit, in whatever order it is summed up.
            varying = torch.cat([varying, weight.double().sum(1).to(weight.dtype)], 1)
        self.different, which = varying[:1], torch.zeros(len(varying), dtype=torch.long)
        if varying.shape[1]:
            self.different, which = torch.unique(varying, dim=0, return_inverse=True)
        none = fields.new_zeros(0, fields.shape[1], WIDTH)
        own_scores = none if self.to_fields is None else _own_scores(self.to_fields, fields)
        self.own_reach, self.longest_field = (
            own_scores.abs().amax() if own_scores.numel() else 0.0,
            _norms(fields, 1).amax(),
        )
        self.items = OfItems(
            blocks(torch.arange(fields.shape[2])),
            none if self.to_past is None else blocks(self.to_past.projected),
            none if self.to_fields is None else blocks(self.to_fields.projected),
            blocks(fields),
            none if self.to_fields is None else blocks(own_scores),
            fields.new_empty(0, 0) if self.to_fields is None else self.to_fields.heads,
            blocks(of_items[known] @ fields.flatten(0, 1)),
        )
        row_of = torch.where(known, known.cumsum(0) - 1, -1)
        self.layers, self.rows = _layers(row_of, which, backbone.others())

    def rank(self, asking: Asking, labels: int, chosen: Tensor | None = None) -> Tensor:
        """Logits ``[users, items, T]``, items side by side in memory; of all, or of those chosen ``[users, items]``."""
        count = self.fields.shape[2] if chosen is None else chosen.shape[1]
        logits = self.fields.new_empty(len(asking.own), labels, -(-count // WIDTH) * WIDTH)
        at_once = AT_ONCE if asking.pair is None else 1
        for start in range(0, len(logits), at_once):
            rows = slice(start, min(start + at_once, len(logits)))
            pair, shortcut = asking.pair(rows.start) if asking.pair is not None else (None, None)
            items, of_each = self.items, 0
            if chosen is not None:
                items, of_each = self._chosen(chosen[rows]), logits.shape[2] // WIDTH
                if pair is not None and shortcut is not None:
                    pair, shortcut = pair[:, chosen[rows.start]], shortcut[:, chosen[rows.start]]
            of_users = self._of_users(asking, rows, pair)
            sizes = Sizes(_heads(self.to_past), _heads(self.to_fields), asking.own.shape[1], self.rows, of_each)
            rank_blocks(items, of_users, self.layers, sizes, logits[rows])
            if shortcut is not None:
                logits[rows, :, :count] += shortcut
        return logits[:, :, :count].transpose(1, 2)

    def _chosen(self, items: Tensor) -> OfItems:
        """What is that of some items ``[users, items]``, in blocks of each user."""
        numbers = functional.pad(items, (0, -items.shape[1] % WIDTH)).flatten()
        block, lane = numbers // WIDTH, numbers % WIDTH

        def taken(values: Tensor) -> Tensor:
            if not len(values) or values is self.items.heads:
                return values
            of_each: Tensor = values.movedim(-1, 1)[block, lane].unflatten(0, (-1, WIDTH))
            return of_each.movedim(1, -1)

        return OfItems(*(taken(values) for values in self.items))

    def _of_users(self, asking: Asking, rows: slice, pair: Tensor | None) -> OfUsers:
        own, shift, past = asking.own[rows], asking.shift[rows], asking.past[rows]
        width, empty = own.shape[2], own.new_empty
        keys, added, values = empty(0, 0, 0), empty(0, 0), empty(0, 0, 0)
        bounded = torch.zeros(len(own), 2, dtype=torch.bool)
        # Of the field that depends on both; what the history is lies between its values.
        longest = own.new_zeros(len(own)) if pair is None else _norms(pair, 0).amax().expand(len(own))
        if self.to_past is not None:
            keys, added, values = self.to_past.keys(asking.keys[rows], self.to_past.shift(shift))
            bounded[:, 0] = self.to_past.reach(keys, added) <= MOST
            longest = torch.maximum(longest, _norms(values, 1).amax(1))
        own_keys, own_added, shifted, of_fields = empty(0, 0, 0), empty(0, 0), empty(0, 0, 0), shift
        different = self.different.unsqueeze(0)
        if self.to_fields is not None:
            of_fields = self.to_fields.shift(shift)
            own_keys, own_added, own_values = self.to_fields.keys(own, of_fields)
            most, moved = self.to_fields.heads.abs().amax(), _norms(of_fields, 1)
            of_both = most * (self.to_fields.longest + moved) * longest
            of_items = self.own_reach + most * moved * self.longest_field
            reach = torch.maximum(of_both, of_items)
            if own.shape[1]:
                reach = torch.maximum(reach, self.to_fields.reach(own_keys, own_added))
            bounded[:, 1] = reach <= MOST
            if of_fields.any():
                shifted = self.to_fields.heads * of_fields.unsqueeze(1)
            both, to_each = self.different[:, :-width], self.different[:, -width:]
            everybody = torch.cat([both, to_each @ self.to_fields.attention.value.weight], 1)
            of_own = column_product(to_each, own_values.transpose(0, 1).flatten(1)).unflatten(1, (len(own), -1))
            different = torch.cat([everybody.expand(len(own), -1, -1), of_own.transpose(0, 1)], 2)
        return OfUsers(
            past,
            ((past != 0) * torch.arange(1, past.shape[1] + 1)).amax(1) if past.shape[1] else past.new_zeros(len(past)),
            keys,
            added,
            values,
            own_keys,
            own_added,
            of_fields,
            shifted,
            bounded,
            different,
            column_product(self.of_user, own.flatten(1).T).T + self.bias,
            empty(0, width, WIDTH) if pair is None else blocks(pair),
        )


def _norms(values: Tensor, axis: int) -> Tensor:
    norms: Tensor = values.square().sum(axis).sqrt()
    return norms


def _heads(query: Query | None) -> int:
    return 1 if query is None else len(query.heads)


def _own_scores(query: Query, fields: Tensor) -> Tensor:
    """What heads make of an item's own fields ``[fields * heads, items]``, but for a user's shift."""
    asked = (fields * query.projected).transpose(0, 1).flatten(1)
    scores: Tensor = (query.heads @ asked).unflatten(1, (len(fields), -1)).transpose(0, 1).flatten(0, 1)
    return scores


def _layers(row_of: Tensor, which: Tensor, others: Sequence[Linear]) -> tuple[OfLayers, int]:
    """What loops read of the layers behind the first, and the rows of the room in which they work."""
    # Two halves of a room take turns, so that it stays in the cache.
    half = max([len(which), *(weight.shape[:-1].numel() for weight, _ in others)])
    source, target, steps = 0, half, []
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for weight, bias in others:
        fields, step = (len(weight), weight.shape[2] // 3) if weight.dim() == 3 else (1, 0)
        outputs, seen = weight.shape[-2:]
        begin = sum(len(layer) for layer in weights), sum(len(layer) for layer in biases)
        steps.append(Step(fields, outputs, seen, step, *begin, source, target))
        weights.append((weight[0] if weight.dim() == 3 else weight).flatten())
        biases.append(bias[:outputs])
        source, target = target, source
    plan = torch.tensor(steps, dtype=torch.long)
    return OfLayers(row_of, which, plan, torch.cat(weights), torch.cat(biases)), 2 * half


class Kept:
    """What was made for the latest few, such as clients: :data:`KEPT` of them, so that many do not fill the memory.

    Args:
        items: in the catalogue; of a large one, fewer are kept.
    """

    def __init__(self, items: int) -> None:
        self.most = max(1, min(KEPT, NUMBERS // (items * OF_ITEM)))
        self._made: OrderedDict[int, Any] = OrderedDict()

    def of(self, number: int, make: Callable[[], Any]) -> Any:
        """What was made for a number, or is made now."""
        if number not in self._made:
            self._made[number] = make()
            if len(self._made) > self.most:
                self._made.popitem(last=False)
        self._made.move_to_end(number)
        return self._made[number]
