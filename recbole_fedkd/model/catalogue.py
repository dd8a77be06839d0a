"""An attentive network asked for every item at once: what a full ranking needs.

What does not depend on the user (item vectors, queries, how an item's fields attend to each other, their share of the first
layer) is computed once for a block of items, where it is still in the cache when users are ranked; what does not depend on the
item (keys and values of the history, the user's own fields) once a user; and what does not depend on weights (which outputs of
the first layer are alike) once for all networks of a kind. Logits are those of the network's ``forward`` but for the last bits.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.model.attention import TargetAttention
from recbole_fedkd.model.backbone import Backbone
from recbole_fedkd.model.convolving import Linear
from recbole_fedkd.model.lookup import Tokens
from recbole_fedkd.model.ranking import (
    WIDTH,
    Asked,
    Bounds,
    Lengths,
    OfItems,
    OfLayers,
    OfNetworks,
    OfUsers,
    Sizes,
    Step,
    blocks,
    column_product,
    rank_blocks,
    refuse_strangers,
)

LOG_2 = math.log(2.0)

AT_ONCE, PAIRED = 64, 8
"""Users whose keys are made at a time; where something is known of pairs, of which there is a field for every item."""

KEPT = 32
"""Clients whose catalogues are kept at least."""

KEPT_ITEMS = 2**19
"""Items in all catalogues that are kept, but for those of so few clients."""

EVERYBODY = slice(None)

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
        refuse_strangers(chosen, items)
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


def ranks_side_by_side(network: Any) -> bool:
    """Whether many networks of a kind can be asked at once, by ``vmap``: what is known of pairs each has to itself."""
    return bool(getattr(network, "ranks", False)) and not any(
        getattr(part, "known", None) for part in network.modules()
    )


class Query:
    """What is asked of one attention."""

    def __init__(self, attention: TargetAttention) -> None:
        self.attention, self.weight = attention, attention.query.weight
        # Softmaxes are of base 2, whose powers cost less.
        self.heads = attention.head / (math.sqrt(attention.head.shape[1]) * LOG_2)

    def shift(self, shift: Tensor) -> Tensor:
        """What users' contexts ``[users, d]`` add to every query, as this attention sees it ``[users, d]``."""
        return column_product(self.weight, shift.T).T

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
        shift: what their context adds to every query ``[users, d]``; None: they have none.
        past: items of their histories ``[users, slots]``, 0 in slots behind the last, which are empty.
        keys: what attention sees of them ``[users, slots, d]``.
        pair: of a user, by place, the field that depends on both ``[d, items]`` and what goes to the logits past all
            layers ``[T, items]``; None: there is none.
    """

    own: Tensor
    shift: Tensor | None
    past: Tensor
    keys: Tensor
    pair: Callable[[int], tuple[Tensor, Tensor]] | None


class Catalogue:
    """What ranking needs of all items, whoever asks.

    The first layer of a backbone is linear. What an item's own fields add to it is known before anybody asks, what a user's
    add is one number an output, and of what attention adds, outputs that get the same are computed once.

    Args:
        fields: of each field of items a table ``[rows, d]`` and the tokens of all items.
        places: of an item's fields among those of a sample, of a user's, and of those that depend on both: the history's, the
            pair's.
        rows: fields of a user's context.
        attentions: over the fields of a sample, and over a history; None: there is none.
        backbone: behind them.
    """

    def __init__(
        self,
        fields: Sequence[tuple[Tensor, Tokens]],
        places: Sequence[Sequence[int]],
        rows: int,
        attentions: Sequence[TargetAttention | None],
        backbone: Backbone,
    ) -> None:
        self.table, *further = (table for table, _ in fields)
        self.more = torch.cat([self.table[:0], *further])
        self.items, self.averaged = _read(fields), len(fields) + rows
        self.to_fields, self.to_past = (None if attention is None else Query(attention) for attention in attentions)
        of_item, of_user, of_both = places
        alike = _alike(
            backbone.first_places, backbone.first_shape(), tuple(of_item), tuple(of_both), self.to_fields is not None
        )
        weight, self.bias = backbone.first()
        self.of_user = weight[:, of_user].flatten(1)
        self.first = weight[alike.known][:, of_item].flatten(1)
        of_different = weight[alike.different]
        self.different = of_different[:, of_both].flatten(1)
        if self.to_fields is not None:
            # To each field the same is added.
            self.different = torch.cat([self.different, of_different.double().sum(1).to(weight.dtype)], 1)
        others = backbone.others()
        plan, self.rows = _planned(len(alike.row_of), others)
        self.layers = OfLayers(alike.row_of, alike.which, plan)
        self.weights = torch.cat([(weight[0] if weight.dim() == 3 else weight).flatten() for weight, _ in others])
        self.biases = torch.cat([bias[: weight.shape[-2]] for weight, bias in others])

    def rank(self, asking: Asking, labels: int, chosen: Tensor | None = None) -> Tensor:
        """Logits ``[users, items, T]``, items side by side in memory; of all, or of those chosen ``[users, items]``."""
        count = len(self.items.tokens) if chosen is None else chosen.shape[1]
        networks, everything, parts = self.of_networks(), self.asked(asking, labels), []
        for begin in range(0, len(asking.own), AT_ONCE if asking.pair is None else PAIRED):
            rows = slice(begin, begin + (AT_ONCE if asking.pair is None else PAIRED))
            own = None if chosen is None else chosen[rows]
            pair, shortcut = (None, None) if asking.pair is None else _pairs(asking.pair, rows, len(asking.own), own)
            asked = everything if own is None else everything.about(own)
            logits = rank_blocks(asked, networks, self.of_users(asking, rows, pair))[..., :count]
            parts.append(logits if shortcut is None else logits + shortcut)
        ranked = parts[0] if len(parts) == 1 else torch.cat([self.table.new_empty(0, labels, count), *parts])
        return ranked.transpose(1, 2)

    def asked(self, asking: Asking, labels: int) -> Asked:
        """What all items are asked by such users, whichever network's they are."""
        numbers = blocks(torch.arange(len(self.items.tokens))).numpy()
        heads = _heads(self.to_past), _heads(self.to_fields)
        sizes = Sizes(*heads, asking.own.shape[1], self.averaged, self.rows, 0)
        return Asked(self.items._replace(numbers=numbers), self.layers, sizes, labels)

    def of_networks(self) -> OfNetworks:
        """What this network makes of items."""
        none = self.table.new_empty(0, 0)
        past, fields = self.to_past, self.to_fields
        return OfNetworks(
            self.table,
            self.more,
            none if past is None else past.weight,
            none if fields is None else fields.weight,
            none if fields is None else fields.heads,
            self.first,
            self.weights,
            self.biases,
            torch.stack(self._bounds()),
        )

    def _bounds(self) -> Bounds:
        # The mean of vectors is no longer than the longest, and a product no longer than a matrix's norm makes it.
        longest = torch.cat([_norms(table, 1) for table in (self.table, self.more)]).amax()
        past = query = largest = longest.new_zeros(())
        if self.to_past is not None:
            past = self.to_past.weight.norm() * longest
        if self.to_fields is not None:
            query, largest = self.to_fields.weight.norm() * longest, self.to_fields.heads.abs().amax()
        return Bounds(past, query, query * longest * largest, longest * largest)

    def of_users(self, asking: Asking, rows: slice = EVERYBODY, pair: Tensor | None = None) -> OfUsers:
        """What it makes of some of the users; ``pair``: of :func:`_pairs`."""
        own, past = asking.own[rows], asking.past[rows]
        (users, _, width), zero = own.shape, own.new_zeros(len(own))
        empty = own.new_empty(users, 0, 0)
        shift = own.new_zeros(users, width) if asking.shift is None else asking.shift[rows]
        keys, added, values = empty, empty[0], empty
        # Of the field that depends on both; what the history is lies between its values.
        both = zero if pair is None else _norms(pair, 1).amax(1)
        past_keys = past_added = moved = own_longest = own_most = zero
        if self.to_past is not None:
            keys, added, values = self.to_past.keys(asking.keys[rows], self.to_past.shift(shift))
            past_keys, past_added = _norms(keys, 2).amax(1), added.abs().amax(1)
            both = torch.maximum(both, _norms(values, 1).amax(1))
        own_keys, own_added, shifted, of_fields = empty, empty[0], empty, shift
        different = self.different.unsqueeze(0)
        if self.to_fields is not None:
            of_fields = self.to_fields.shift(shift)
            own_keys, own_added, own_values = self.to_fields.keys(own, of_fields)
            moved = _norms(of_fields, 1)
            if own.shape[1]:
                own_longest, own_most = _norms(own_keys, 2).amax(1), own_added.abs().amax(1)
            if asking.shift is not None:
                shifted = self.to_fields.heads * of_fields.unsqueeze(1)
            both = both * self.to_fields.heads.abs().amax()
            of_both, to_each = self.different[:, :-width], self.different[:, -width:]
            everybody = torch.cat([of_both, to_each @ self.to_fields.attention.value.weight], 1)
            of_own = column_product(to_each, own_values.transpose(0, 1).flatten(1)).unflatten(1, (users, -1))
            different = torch.cat([everybody.expand(users, -1, -1), of_own.transpose(0, 1)], 2)
        return OfUsers(
            past,
            ((past != 0) * torch.arange(1, past.shape[1] + 1)).amax(1) if past.shape[1] else past.new_zeros(users),
            keys,
            added,
            values,
            own_keys,
            own_added,
            of_fields,
            shifted,
            torch.stack(Lengths(past_keys, past_added, both, moved, own_longest, own_most), 1),
            different,
            column_product(self.of_user, own.flatten(1).T).T + self.bias,
            own.new_empty(users, 0, width, WIDTH) if pair is None else blocks(pair).transpose(0, 1),
        )


def _read(fields: Sequence[tuple[Tensor, Tokens]]) -> OfItems:
    """What items are, not numbered yet, by the fields' tables one behind the other; fields as of :class:`Catalogue`."""
    tokens, begin = [], 0
    for table, read in fields:
        rows = read.of_table(len(table))
        tokens.append(rows.where(rows < 0, rows + begin))
        begin += len(table)
    present = torch.stack([(rows >= 0).sum(1) for rows in tokens], 1)
    begins = np.cumsum([0, *(rows.shape[1] for rows in tokens)])
    return OfItems(None, torch.cat(tokens, 1).numpy(), begins, present.clamp(min=1).numpy())


def _pairs(
    pair: Callable[[int], tuple[Tensor, Tensor]], rows: slice, users: int, chosen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of some users ``pair`` as of :class:`Asking`, side by side, of all items or of those chosen ``[users, items]``."""
    made = [pair(row) for row in range(rows.start, min(rows.stop, users))]
    if chosen is not None:
        made = [(field[:, own], more[:, own]) for (field, more), own in zip(made, chosen, strict=True)]
    fields, shortcuts = zip(*made, strict=True)
    return torch.stack(fields), torch.stack(shortcuts)


def _norms(values: Tensor, axis: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=axis)
    return norms


def _heads(query: Query | None) -> int:
    return 1 if query is None else len(query.heads)


@dataclass(frozen=True)
class Alike:
    """Which outputs of a first layer get the same of some fields, whatever its weights are.

    Attributes:
        known: those to which an item's own fields add something ``[rows]``.
        row_of: of every output its place among them, -1: it is none ``[outputs]``.
        different: one of each that get something else of what depends on both, and of what all fields are added.
        which: of every output its place among those ``[outputs]``.
    """

    known: Tensor
    row_of: Any
    different: Tensor
    which: Any


@cache
def _alike(
    first_places: Callable[..., tuple[Tensor, int]],
    shape: tuple[int, int, int],
    of_item: tuple[int, ...],
    of_both: tuple[int, ...],
    attends: bool,
) -> Alike:
    """As it is in backbones of a kind and shape, see :class:`Backbone`; ``attends``: if the same is added to all fields."""
    places, nothing = first_places(*shape)
    known = (places[:, of_item].flatten(1) != nothing).any(1)
    read = places[:, of_both].flatten(1)
    if attends:
        read = torch.cat([read, places.sort(1).values.flatten(1)], 1)
    which = torch.zeros(len(places), dtype=torch.long)
    if read.shape[1]:
        _, which = torch.unique(read, dim=0, return_inverse=True)
    numbers = torch.arange(len(places))
    different = torch.zeros(int(which.max()) + 1, dtype=torch.long).scatter_reduce(
        0, which, numbers, "amin", include_self=False
    )
    row_of = torch.where(known, known.cumsum(0) - 1, -1)
    return Alike(numbers[known], row_of.numpy(), different, which.numpy())


def _planned(outputs: int, others: Sequence[Linear]) -> tuple[Any, int]:
    """:class:`Step` of each layer behind the first, and the rows of the room in which they work."""
    # Two halves of a room take turns, so that it stays in the cache.
    half = max([outputs, *(weight.shape[:-1].numel() for weight, _ in others)])
    source, target, steps, begin = 0, half, [], (0, 0)
    for weight, _ in others:
        fields, step = (len(weight), weight.shape[2] // 3) if weight.dim() == 3 else (1, 0)
        made, seen = weight.shape[-2:]
        steps.append(Step(fields, made, seen, step, *begin, source, target))
        begin = begin[0] + made * seen, begin[1] + made
        source, target = target, source
    return np.array(steps, dtype=np.int64), 2 * half


class Kept:
    """What was made for the latest few, such as clients, of as many items each, so that many do not fill the memory."""

    def __init__(self, items: int) -> None:
        self._made: OrderedDict[int, Any] = OrderedDict()
        self.most = KEPT + KEPT_ITEMS // items

    def of(self, number: int, make: Callable[[], Any]) -> Any:
        """What was made for a number, or is made now."""
        if number not in self._made:
            self._made[number] = make()
            if len(self._made) > self.most:
                self._made.popitem(last=False)
        self._made.move_to_end(number)
        return self._made[number]
