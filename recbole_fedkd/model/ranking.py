"""What loops of a full ranking are given, and those loops; items lie side by side on the last axis, in blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from recbole_fedkd.model.compiled import compiled

WIDTH = 64
"""Items of a block."""

MOST = 60.0
"""Scores within which powers of two and their sums are numbers."""


class OfItems(NamedTuple):
    """What is the items', in blocks; empty arrays where there is no such attention.

    Attributes:
        numbers: of the items ``[blocks, WIDTH]``.
        past: queries to a history ``[blocks, d, WIDTH]``.
        query: to the fields of a sample, likewise.
        fields: an item's own ``[blocks, fields, d, WIDTH]``.
        scores: what its own fields get, but for a user's shift ``[blocks, fields * heads, WIDTH]``.
        heads: of the attention over the fields.
        first: what its own fields add to the first layer ``[blocks, rows, WIDTH]``.
    """

    numbers: Any
    past: Any
    query: Any
    fields: Any
    scores: Any
    heads: Any
    first: Any


class OfUsers(NamedTuple):
    """What is the users', the first axis of all but ``pair``.

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
        bounded: whether scores, of the history and of the fields, lie within :data:`MOST` ``[users, 2]``.
        different: the first layer's different outputs; of one user where they are everybody's.
        constant: what the first layer makes of their own fields ``[users, outputs]``.
        pair: the field that depends on both, of one user, in blocks ``[blocks, d, WIDTH]``; empty where there is none.
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
    bounded: Any
    different: Any
    constant: Any
    pair: Any


class OfLayers(NamedTuple):
    """What a backbone does.

    Attributes:
        row_of: of every output of the first layer the row of ``OfItems.first``, -1: there is none.
        which: its row among the different ones.
        plan: of each further layer :class:`Step`, as a row.
        weights: of all further layers, one behind the other ``[n]``.
        biases: likewise.
    """

    row_of: Any
    which: Any
    plan: Any
    weights: Any
    biases: Any


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
        rows: of the room in which the layers work.
        blocks: of each user, one user's behind the other's; 0: all blocks are everybody's, items in their order.
    """

    past_heads: int
    heads: int
    own: int
    rows: int
    blocks: int


def blocks(values: Tensor) -> Tensor:
    """``[..., columns]`` as blocks ``[blocks, ..., WIDTH]``, the last filled up with zeros."""
    made: Tensor = _filled(values).unflatten(-1, (-1, WIDTH)).movedim(-2, 0).contiguous()
    return made


def column_product(weight: Tensor, columns: Tensor) -> Tensor:
    """``weight [outputs, inputs] @ columns [inputs, columns]``, each column the same bits whichever stand beside it."""
    from recbole_fedkd.model import ranking_loops

    filled = _filled(columns)
    out = filled.new_empty(len(weight), filled.shape[1])
    compiled(ranking_loops.multiply, "numpy")(
        *(tensor.detach().contiguous().numpy() for tensor in (weight, filled, out))
    )
    return out[:, : columns.shape[1]]


def rank_blocks(items: OfItems, users: OfUsers, layers: OfLayers, sizes: Sizes, logits: Tensor) -> None:
    """Fill ``logits [users, T, blocks * WIDTH]``, blocks being those of a user."""
    from recbole_fedkd.model import ranking_loops

    # In one order of memory, so that the loop is compiled once.
    arrays = [type(part)(*(tensor.detach().contiguous().numpy() for tensor in part)) for part in (items, users, layers)]
    compiled(ranking_loops.rank, "numpy")(*arrays, sizes, logits.numpy())


def _filled(values: Tensor) -> Tensor:
    """``[..., columns]``, filled up to whole blocks."""
    return functional.pad(values, (0, -values.shape[-1] % WIDTH))
