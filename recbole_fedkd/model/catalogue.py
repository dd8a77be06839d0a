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

from recbole_fedkd.model.attention import TargetAttention
from recbole_fedkd.model.backbone import Backbone
from recbole_fedkd.model.compiled import mean_of_heads, pooled, rectified

BLOCK = 1024
"""Items at a time: what they need of one user stays in the processor's cache."""

MOST, NUMBERS, OF_ITEM = 32, 2**28, 200
"""Clients whose catalogues are kept; fewer, where these would be more than so many numbers, at so many an item."""

PAIRS = 32768
"""User-item pairs that a network without a ranking of its own scores at a time; bounds its memory."""


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


class Query:
    """What all items ask one attention.

    Args:
        attention: what they ask.
        query: of every item, without what a user's context adds, ``[d, items]``.
    """

    def __init__(self, attention: TargetAttention, query: Tensor) -> None:
        self.attention = attention
        self.heads = attention.head / math.sqrt(attention.head.shape[1])
        self.projected = attention.query.weight @ query

    def keys(self, keys: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys ``[keys, d]`` of one user as heads see them ``[keys, heads, d]``, what is added to their scores, their values.

        ``shift``: what the user's context adds to every query ``[d]``.
        """
        of_heads, bias = keys.unsqueeze(1) * self.heads, self.attention.position_bias
        added = of_heads @ (self.attention.query.weight @ shift)
        return of_heads, added if bias is None else added + bias[: len(keys)], self.attention.value(keys).T


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
        self.fields, (of_item, of_user, of_both) = fields.contiguous(), places
        self.to_fields, self.to_past = (None if each is None else Query(each, query) for each in attentions)
        weight, self.bias = backbone.first()
        self.of_user, self.both, self.others = weight[:, of_user].flatten(1), len(of_both), backbone.others()
        of_items = weight[:, of_item].flatten(1)
        known = of_items.any(1)
        self.row_of = torch.where(known, known.cumsum(0) - 1, -1)
        self.items = of_items[known] @ self.fields.flatten(0, 1)
        varying = weight[:, of_both].flatten(1)
        if self.to_fields is not None:
            # To each field the same is added.
            varying = torch.cat([varying, weight.sum(1)], 1)
            # Scores of an item's own fields, but for a user's shift.
            asked = (self.fields * self.to_fields.projected).transpose(0, 1).flatten(1)
            self.own_scores = (self.to_fields.heads @ asked).unflatten(1, (len(fields), -1)).transpose(0, 1)
        self.different, self.which = varying[:1], torch.zeros_like(self.row_of)
        if varying.shape[1]:
            self.different, self.which = torch.unique(varying, dim=0, return_inverse=True)

    def rank(self, asking: Asking, labels: int) -> Tensor:
        """Logits ``[users, items, T]``, items side by side in memory."""
        (_, width, count), empty = self.fields.shape, self.fields.new_empty
        size = math.ceil(count / math.ceil(count / BLOCK))
        logits = empty(len(asking.own), labels, count)
        # The last block begins early: all are of one size.
        starts = [min(first, count - size) for first in range(0, count, size)]
        of_past = _PastAttention(self.to_past, asking, size) if self.to_past is not None else None
        of_fields = _FieldAttention(self, self.to_fields, asking, size) if self.to_fields is not None else None
        given = empty(self.both * width + (of_fields.rows if of_fields is not None else 0), size)
        varying = given[: self.both * width].view(self.both, width, size)
        layers, made = _Layers(self, size), empty(len(self.different), size)
        for place in range(len(asking.own)):
            pair, shortcut = asking.pair(place) if asking.pair is not None else (None, None)
            constant = self.of_user @ asking.own[place].flatten() + self.bias
            different = of_fields.ask(place) if of_fields is not None else self.different
            if of_past is not None:
                of_past.ask(place)
            for first in starts:
                if of_past is not None:
                    of_past.attend(first, varying[0])
                if pair is not None:
                    varying[-1] = pair[:, first : first + size]
                if of_fields is not None:
                    of_fields.attend(first, varying, given[self.both * width :])
                torch.mm(different, given, out=made)
                layers.run(constant, made, first, logits[place, :, first : first + size])
            if shortcut is not None:
                logits[place] += shortcut
        return logits.transpose(1, 2)


class _PastAttention:
    """Attention of blocks of items over one history after the other; arguments as of :class:`Catalogue`."""

    def __init__(self, query: Query, asking: Asking, size: int) -> None:
        self.query, self.asking = query, asking
        slots = asking.past.shape[1]
        self.used = ((asking.past != 0) * torch.arange(1, slots + 1)).amax(1).tolist()
        self.room = asking.keys.new_empty(slots, len(query.heads), size)
        self.weights = asking.keys.new_empty(slots, size)

    def ask(self, place: int) -> None:
        """It is about the user of this place from now on."""
        used = self.used[place]
        self.past = self.asking.past[place, :used]
        self.keys = self.query.keys(self.asking.keys[place, :used], self.asking.shift[place])

    def attend(self, first: int, out: Tensor) -> None:
        """What the history is to items from the first on ``[d, size]``; 0 where there is none."""
        of_heads, added, values = self.keys
        scores, weights = self.room[: len(added)], self.weights[: len(added)]
        of_block = self.query.projected[:, first : first + out.shape[1]]
        torch.mm(of_heads.flatten(0, 1), of_block, out=scores.flatten(0, 1))
        mean_of_heads(scores, added, self.past, len(self.room) - 1, first, weights)
        torch.mm(values, weights, out=out)


class _FieldAttention:
    """Attention of blocks of items over the fields of a sample, for one user after the other.

    Attributes:
        rows: of what :meth:`attend` fills: what it pooled of fields that are not the user's, and the weights of those.
    """

    def __init__(self, catalogue: Catalogue, query: Query, asking: Asking, size: int) -> None:
        self.catalogue, self.query, self.asking = catalogue, query, asking
        (items, self.width, _), own = catalogue.fields.shape, asking.own.shape[1]
        self.others, self.rows = items + catalogue.both, self.width + own
        self.scores = asking.own.new_empty(self.others + own, len(query.heads), size)
        self.weights = asking.own.new_empty(self.others + own, size)
        self.asked = asking.own.new_empty(2, self.width, size)
        self.everybody, self.shifted = torch.zeros(0, dtype=torch.long), bool(asking.shift.any())

    def ask(self, place: int) -> Tensor:
        """It is about the user of this place from now on.

        Returns:
            The first layer's different outputs, of what depends on both and of what :meth:`attend` fills.
        """
        self.shift = self.query.attention.query.weight @ self.asking.shift[place]
        of_heads, added, values = self.query.keys(self.asking.own[place], self.asking.shift[place])
        self.of_heads = of_heads.flatten(0, 1)
        self.added = torch.cat([added.new_zeros(self.others, added.shape[1]), added])
        different = self.catalogue.different
        to_each = different[:, -self.width :]
        return torch.cat(
            [different[:, : -self.width], to_each @ self.query.attention.value.weight, to_each @ values], 1
        )

    def attend(self, first: int, varying: Tensor, out: Tensor) -> None:
        """Fill ``[rows, size]`` for items from the first on, with the fields ``varying [fields, d, size]``."""
        fields, heads, (query, asked) = self.catalogue.fields, self.query.heads, self.asked
        block, items = slice(first, first + out.shape[1]), len(fields)
        projected = self.query.projected[:, block]
        torch.add(projected, self.shift.unsqueeze(1), out=query)
        self.scores[:items] = self.catalogue.own_scores[:, :, block]
        if self.shifted:
            self.scores[:items] += (heads * self.shift) @ fields[:, :, block]
        for number, field in enumerate(varying, items):
            torch.mm(heads, torch.mul(query, field, out=asked), out=self.scores[number])
        torch.mm(self.of_heads, projected, out=self.scores[self.others :].flatten(0, 1))
        mean_of_heads(self.scores, self.added, self.everybody, 0, first, self.weights)
        pooled(self.weights, fields, first, varying, out[: self.width])
        out[self.width :] = self.weights[self.others :]


class _Layers:
    """The backbone's layers, of one block of items after the other; arguments as of :class:`Catalogue`."""

    def __init__(self, catalogue: Catalogue, size: int) -> None:
        self.catalogue = catalogue
        rooms: list[Tensor] = []
        for weight, _ in catalogue.others:
            # Zeros before the first field and behind the last one, which the next layer's values may share.
            edge = weight.shape[2] // 3 if weight.dim() == 3 else 0
            inputs = len(weight) * edge if edge else weight.shape[1]
            if not rooms or len(rooms[-1]) != inputs:
                room = catalogue.fields.new_zeros(inputs + 2 * edge, size)
                rooms.append(room[edge : edge + inputs])
            else:
                rooms.append(rooms[-1])
        self.rooms = rooms
        self.made = catalogue.fields.new_empty(max(len(room) for room in rooms), size)
        self.own, none = torch.arange(len(self.made)), catalogue.row_of.new_full((len(self.made),), -1)
        self.nothing = none, catalogue.fields.new_empty(0, size)

    def run(self, constant: Tensor, made: Tensor, first: int, out: Tensor) -> None:
        """Logits ``[T, size]`` of items from the first on.

        Args:
            constant: what the first layer makes of a user's own fields ``[outputs]``.
            made: its different outputs, of what depends on both ``[rows, size]``.
            first: the first item's number.
            out: filled.
        """
        catalogue, (*others, last) = self.catalogue, self.catalogue.others
        rectified(constant, catalogue.which, made, (catalogue.row_of, catalogue.items), first, self.rooms[0])
        for (weight, bias), room, following in zip(others, self.rooms, self.rooms[1:], strict=False):
            values = self.made[: len(following)]
            if weight.dim() == 3:
                (fields, outputs, seen), size = weight.shape, out.shape[1]
                neighbours = room.as_strided((fields, seen, size), (seen // 3 * size, size, 1), 0)
                torch.bmm(weight, neighbours, out=values.view(fields, outputs, size))
            else:
                torch.mm(weight, room, out=values)
            rectified(bias, self.own, values, self.nothing, 0, following)
        torch.addmm(last[1].unsqueeze(1), last[0], self.rooms[-1], out=out)


class Kept:
    """What was made for the latest few, such as clients: :data:`MOST` of them, so that many do not fill the memory.

    Args:
        items: in the catalogue; of a large one, fewer are kept.
    """

    def __init__(self, items: int) -> None:
        self.most = max(1, min(MOST, NUMBERS // (items * OF_ITEM)))
        self._made: OrderedDict[int, Any] = OrderedDict()

    def of(self, number: int, make: Callable[[], Any]) -> Any:
        """What was made for a number, or is made now."""
        if number not in self._made:
            self._made[number] = make()
            if len(self._made) > self.most:
                self._made.popitem(last=False)
        self._made.move_to_end(number)
        return self._made[number]
