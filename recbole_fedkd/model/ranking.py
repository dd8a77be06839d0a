"""What loops of a full ranking are given, and those loops; items lie side by side on the last axis, in blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.model.compiled import LANES, compiled, has_compiler
from recbole_fedkd.model.function import DirectFunction, array_of, side_by_side

WIDTH = 64
"""Items of a block."""

MOST = 60.0
"""Scores within which powers of two and their sums are numbers."""


class OfItems(NamedTuple):
    """What items are, whichever network is asked.

    Attributes:
        numbers: of the items that are ranked ``[blocks, WIDTH]``.
        tokens: of every item, field by field, the rows of the tables whose mean a field is, -1: none ``[items, slots]``.
        begins: the first slot of every field, and behind the last ``[fields + 1]``.
        counts: number of tokens, 1 where there is none ``[items, fields]``.
    """

    numbers: Any
    tokens: Any
    begins: Any
    counts: Any


class OfNetworks(NamedTuple):
    """What networks make of items, the first axis of all; empty where there is no such attention.

    Attributes:
        table: vectors of all tokens of the items' first field ``[networks, tokens, d]``, which has many and is not copied.
        more: of the others, whose tokens are numbered behind those.
        past: what makes a query to a history of the mean of an item's fields ``[networks, d, d]``.
        query: to the fields of a sample, likewise.
        heads: of the attention over the fields ``[networks, heads, d]``.
        first: what the first layer makes of an item's own fields ``[networks, rows, fields * d]``.
        weights: of all further layers, one behind the other ``[networks, n]``.
        biases: likewise.
        bounds: :class:`Bounds` of each, as a row.
    """

    table: Any
    more: Any
    past: Any
    query: Any
    heads: Any
    first: Any
    weights: Any
    biases: Any
    bounds: Any


class OfUsers(NamedTuple):
    """What is the users', the first axis of all; those of a network stand behind those of the one before.

    Attributes:
        past: items of their histories ``[users, slots]``.
        used: slots that are not empty ``[users]``.
        keys: of a history as heads see them, slot by slot the heads.
        added: to the scores of those.
        values: of a history.
        own_keys: of their own fields as heads see them, field by field the heads.
        own_added: to the scores of those.
        shift: what their context adds to a query to the fields ``[users, d]``.
        shifted: heads times the shift; empty where nobody has a context.
        lengths: :class:`Lengths` of each, as a row.
        different: the first layer's different outputs; of each network, where they are the same for all of its users.
        constant: what the first layer makes of their own fields ``[users, outputs]``.
        pair: the field that depends on both, in blocks ``[users, blocks, d, WIDTH]``; none where there is no such field.
    """

    past: Any
    used: Any
    keys: Any
    added: Any
    values: Any
    own_keys: Any
    own_added: Any
    shift: Any
    shifted: Any
    lengths: Any
    different: Any
    constant: Any
    pair: Any


class Bounds(NamedTuple):
    """What bounds the scores of a network's items, whichever they are: what is made of one does not depend on the others.

    Attributes:
        past: the longest query to a history.
        query: to the fields of a sample.
        scores: the largest of an item's own fields.
        field: the longest of them, times the largest number of a head.
    """

    past: Tensor
    query: Tensor
    scores: Tensor
    field: Tensor


class Lengths(NamedTuple):
    """What bounds the scores of a user: no product of two vectors is beyond that of their lengths.

    Attributes:
        past_keys: the longest key of the history.
        past_added: the most that is added to a score of it.
        both: the longest field that depends on user and item, times the largest number of a head.
        shift: of the query to the fields.
        own_keys: the longest key of the user's own fields.
        own_added: the most that is added to a score of those.
    """

    past_keys: Tensor
    past_added: Tensor
    both: Tensor
    shift: Tensor
    own_keys: Tensor
    own_added: Tensor


class OfLayers(NamedTuple):
    """What a backbone does, whichever network's it is.

    Attributes:
        row_of: of every output of the first layer the row of ``OfNetworks.first``, -1: there is none.
        which: its row among the different ones.
        plan: of each further layer :class:`Step`, as a row.
    """

    row_of: Any
    which: Any
    plan: Any


class Step(NamedTuple):
    """A layer behind the first.

    Attributes:
        fields: that are convolved; 1 where all is.
        outputs: of a field.
        seen: inputs of an output.
        step: inputs of a field; 0: of all.
        weight: where its weight begins.
        bias: where its bias begins.
        source: the first row of what it is given, in the room.
        target: of what it makes.
    """

    fields: int
    outputs: int
    seen: int
    step: int
    weight: int
    bias: int
    source: int
    target: int


class Sizes(NamedTuple):
    """Numbers of things.

    Attributes:
        past_heads: heads over a history.
        heads: heads over the fields of a sample.
        own: the users' fields.
        averaged: fields whose mean is what asks: the items' and those of a context.
        rows: of the room in which the layers work.
        blocks: of each user, one user's behind the other's; 0: all blocks are everybody's, items in their order.
    """

    past_heads: int
    heads: int
    own: int
    averaged: int
    rows: int
    blocks: int


@dataclass(frozen=True)
class Asked:
    """What is asked, but for the numbers of networks and users; ``vmap`` looks into tuples, and not into this."""

    items: OfItems
    layers: OfLayers
    sizes: Sizes
    labels: int

    def about(self, chosen: Tensor) -> Asked:
        """The same of items that are chosen for every user ``[users, items]``.

        Raises:
            IndexError: one is none.
        """
        refuse_strangers(chosen, len(self.items.tokens))
        of_each = padded(chosen)
        numbers = of_each.reshape(-1, WIDTH).numpy()
        sizes = self.sizes._replace(blocks=of_each.shape[1] // WIDTH)
        return replace(self, items=self.items._replace(numbers=numbers), sizes=sizes)


def blocks(values: Tensor) -> Tensor:
    """``[..., columns]`` as blocks ``[blocks, ..., WIDTH]``, the last filled up with zeros."""
    made: Tensor = padded(values).unflatten(-1, (-1, WIDTH)).movedim(-2, 0).contiguous()
    return made


def column_product(weight: Tensor, columns: Tensor) -> Tensor:
    """``weight [outputs, inputs] @ columns [inputs, columns]``, each column the same bits whichever stand beside it."""
    made: Tensor = _ColumnProduct.apply(False, weight, padded(columns))
    return made[:, : columns.shape[1]]


def rank_blocks(asked: Asked, networks: OfNetworks, users: OfUsers) -> Tensor:
    """Logits ``[users, T, blocks * WIDTH]`` of all users, blocks being those of a user; of one network, without its axis."""
    made: Tensor = _Rank.apply(False, asked, *networks, *users)
    return made


def expected_values(logits: Tensor, values: Tensor) -> Tensor:
    """Means ``[users, items]`` of ``values [T]`` by a softmax of ``logits [users, T, items]``.

    In machine code each is the same bits whichever items stand beside it, so that no list depends on what is asked together.
    """
    if not (has_compiler() and logits.device.type == "cpu" and logits.dtype == torch.float32) or logits.requires_grad:
        return values @ logits.softmax(1)
    from recbole_fedkd.model import ranking_loops

    given = functional.pad(logits, (0, max(0, LANES - logits.shape[2]))).contiguous()
    means = given.new_empty(len(given), given.shape[2])
    compiled(ranking_loops.expect, "numpy")(given.numpy(), values.numpy(), means.numpy())
    return means[:, : logits.shape[2]]


def rank_some(asked: Asked, rows: Tensor, networks: OfNetworks, users: OfUsers) -> Tensor:
    """Logits ``[n, T, blocks * WIDTH]`` of users in some places ``[n]``, for whom blocks are chosen.

    ``networks`` and ``users``: arrays of all.
    """
    return _ranked(asked, rows.numpy(), networks, users)


def refuse_strangers(numbers: Tensor, items: int) -> None:
    """Refuse numbers of items that are none.

    Raises:
        IndexError: there is one.
    """
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < items:
        raise IndexError(f"an item is out of range: items are 0 to {items - 1}")


def padded(values: Tensor) -> Tensor:
    """``[..., columns]``, filled up to whole blocks."""
    return functional.pad(values, (0, -values.shape[-1] % WIDTH))


class _ColumnProduct(DirectFunction):
    """:func:`column_product` of whole blocks; with ``many`` of many networks, the first axis of every tensor."""

    @staticmethod
    def forward(many: bool, weight: Tensor, columns: Tensor) -> Tensor:
        from recbole_fedkd.model import ranking_loops

        out = columns.new_empty(*columns.shape[:-2], weight.shape[-2], columns.shape[-1])
        compiled(ranking_loops.multiply, "numpy")(*(array_of(many, tensor) for tensor in (weight, columns, out)))
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, many: bool, *tensors: Tensor) -> Any:
        return _ColumnProduct.apply(True, *side_by_side(info.batch_size, in_dims[1:], tensors)), 0


class _Rank(DirectFunction):
    """:func:`rank_blocks`; with ``many`` of many networks, the first axis of every tensor."""

    @staticmethod
    def forward(many: bool, asked: Asked, *tensors: Tensor) -> Tensor:
        of_networks, of_users = tensors[: len(OfNetworks._fields)], tensors[len(OfNetworks._fields) :]
        networks = OfNetworks(*(array_of(many, tensor) for tensor in of_networks))
        users = OfUsers(*(array_of(True, tensor.flatten(0, 1) if many else tensor) for tensor in of_users))
        logits = _ranked(asked, np.arange(len(users.constant)), networks, users)
        return logits.unflatten(0, (len(networks.table), -1)) if many else logits

    @staticmethod
    def vmap(info: Any, in_dims: Any, many: bool, asked: Asked, *tensors: Tensor) -> Any:
        return _Rank.apply(True, asked, *side_by_side(info.batch_size, in_dims[2:], tensors)), 0


def _ranked(asked: Asked, askers: Any, networks: OfNetworks, users: OfUsers) -> Tensor:
    """Logits ``[asking, T, blocks * WIDTH]`` of users ``askers [asking]``, given arrays of all.

    Where blocks are everybody's, these are all users in their order.
    """
    from recbole_fedkd.model import ranking_loops

    columns = (asked.sizes.blocks or len(asked.items.numbers)) * WIDTH
    logits = torch.empty(len(askers), asked.labels, columns)
    loop = compiled(ranking_loops.rank, "numpy")
    loop(asked.items, askers, networks, users, asked.layers, asked.sizes, logits.numpy())
    return logits
