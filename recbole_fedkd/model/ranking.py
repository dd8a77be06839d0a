"""The loops of a full ranking in machine code: blocks of items, and for each block one user after the other.

Items lie side by side on the last axis, :data:`~recbole_fedkd.model.tiles.WIDTH` in a block, so that all that a user's scores
of a block go through stays in the processor's cache, from attention to logits. Weights are packed and biases filled up as
:mod:`~recbole_fedkd.model.tiles` has them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from recbole_fedkd.model.compiled import HIDDEN, Ids, Table, compiled
from recbole_fedkd.model.tiles import NO_LEAST, WIDTH, multiply, register

MOST, NOTHING = 60.0, np.float32(2.0**-100)
"""Scores within which powers of two and their sums are numbers, and what their sum is above where an item sees a key."""

SPILL = 16
"""Rows behind the last one of a room, into which a whole panel may write."""


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
        weights: of all further layers, one behind the other ``[n, rows]``.
        biases: likewise ``[n]``.
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


def rank_blocks(items: OfItems, users: OfUsers, layers: OfLayers, sizes: Sizes, logits: Tensor) -> None:
    """Fill ``logits [users, T, blocks * WIDTH]``, blocks being those of a user."""
    register()
    # In one order of memory, so that the loop is compiled once.
    arrays = (type(part)(*(tensor.detach().contiguous().numpy() for tensor in part)) for part in (items, users, layers))
    helpers = power_of_two, multiply, _hide, _softmax, _attend_to_fields, _first_layer, _further_layers
    compiled(_rank_blocks, "numpy", *helpers)(*arrays, sizes, logits.numpy())


def _rank_blocks(items: OfItems, users: OfUsers, layers: OfLayers, sizes: Sizes, logits: Table) -> None:
    """See :func:`rank_blocks`."""
    blocks, count, width, _ = items.fields.shape
    slots, attends = users.past.shape[1], len(items.query) > 0
    both = int(slots > 0) + int(len(users.pair) > 0)
    keys, heads = max(slots, count + both + sizes.own), max(sizes.past_heads, sizes.heads)
    scores, shares = np.empty((keys * heads + SPILL, WIDTH), np.float32), np.empty((keys, WIDTH), np.float32)
    sums, asked = np.empty((2, heads, WIDTH), np.float32), np.empty((2, max(width, heads) + SPILL, WIDTH), np.float32)
    rows = both * width + (width + sizes.own if attends else 0)
    given, different = np.empty((rows + SPILL, WIDTH), np.float32), layers.which.max() + 1
    made, room = np.empty((different + SPILL, WIDTH), np.float32), np.empty((sizes.rows + SPILL, WIDTH), np.float32)
    zeros = np.zeros(max(width, heads, different) + SPILL, np.float32)
    for block in range(blocks):
        begin, end, first = 0, len(users.constant), block * WIDTH
        if sizes.blocks > 0:
            begin, first = block // sizes.blocks, block % sizes.blocks * WIDTH
            end = begin + 1
        for user in range(begin, end):
            if slots > 0:
                used, added = users.used[user], users.added[user]
                shape = used * sizes.past_heads, width, width
                multiply(users.keys[user], 0, shape, items.past[block], 0, added, 0, NO_LEAST, scores, 0)
                _hide(users.past[user, :used], slots - 1, items.numbers[block], sizes, scores, sums[0, 0])
                _softmax(used, sizes.past_heads, users.bounded[user, 0], scores, sums, shares)
                multiply(users.values[user], 0, (width, used, slots), shares, 0, zeros, 0, NO_LEAST, given, 0)
            if len(users.pair) > 0:
                given[(both - 1) * width : both * width] = users.pair[block]
            if attends:
                _attend_to_fields(items, users, sizes, block, user, both, zeros, scores, shares, sums, asked, given)
            weight = users.different[user if len(users.different) > 1 else 0]
            multiply(weight, 0, (different, rows, rows), given, 0, zeros, 0, NO_LEAST, made, 0)
            _first_layer(users.constant[user], layers.which, made, layers.row_of, items.first[block], room)
            last = _further_layers(layers, room)
            for label in range(logits.shape[1]):
                for i in range(WIDTH):
                    logits[user, label, first + i] = room[last + label, i]


def _hide(past: Ids, oldest: int, numbers: Ids, sizes: Sizes, scores: Table, unless_held: Table) -> None:
    """Of a history, what an item of the block does not see ``scores [keys * heads, WIDTH]``.

    Args:
        past: item of each key ``[keys]``, which does not see itself, 0: nobody sees it.
        oldest: number of the key that only items see which do not see themselves.
        numbers: the block's items ``[WIDTH]``.
        sizes: heads, and whether items are in their order.
        unless_held: room ``[WIDTH]``.
    """
    heads = sizes.past_heads
    unless_held[:] = HIDDEN
    for key in range(len(past)):
        item = past[key]
        if item == 0:
            scores[key * heads : (key + 1) * heads] = HIDDEN
            continue
        position = item - numbers[0]
        begin, end = (max(position, 0), min(position + 1, WIDTH)) if sizes.blocks == 0 else (0, WIDTH)
        for i in range(begin, end):
            if numbers[i] == item:
                unless_held[i] = 0.0
                scores[key * heads : (key + 1) * heads, i] = HIDDEN
    if len(past) == oldest + 1:
        for head in range(oldest * heads, (oldest + 1) * heads):
            for i in range(WIDTH):
                scores[head, i] += unless_held[i]


def _softmax(keys: int, heads: int, bounded: bool, scores: Table, sums: Table, shares: Table) -> None:
    """A softmax over the keys for each head, averaged over the heads; of base 2, since scores are divided by log 2.

    Args:
        keys: number of them.
        heads: likewise.
        bounded: no score is beyond :data:`MOST`, so that the largest need not be subtracted.
        scores: ``[keys * heads, WIDTH]``, overwritten.
        sums: room ``[2, heads, WIDTH]``.
        shares: ``[keys, WIDTH]``, filled; 0 where an item sees no key.
    """
    most, total, four = sums[0], sums[1], heads // 4 * 4
    for head in range(heads):
        for i in range(WIDTH):
            most[head, i], total[head, i] = HIDDEN, np.float32(0.0)
    for key in range(0 if bounded else keys):
        for head in range(heads):
            for i in range(WIDTH):
                most[head, i] = max(most[head, i], scores[key * heads + head, i])
    if bounded:
        for key in range(keys):
            for head in range(heads):
                for i in range(WIDTH):
                    power = power_of_two(scores[key * heads + head, i])
                    scores[key * heads + head, i] = power
                    total[head, i] += power
    else:
        for key in range(keys):
            for head in range(heads):
                for i in range(WIDTH):
                    power = power_of_two(scores[key * heads + head, i] - most[head, i])
                    scores[key * heads + head, i] = power
                    total[head, i] += power
    for head in range(heads):
        for i in range(WIDTH):
            seen = total[head, i] > NOTHING if bounded else most[head, i] > np.float32(-1e29)
            total[head, i] = np.float32(1.0) / (total[head, i] * np.float32(heads)) if seen else np.float32(0.0)
    for key in range(keys):
        row = key * heads
        for i in range(WIDTH):
            shares[key, i] = 0.0
        for head in range(0, four, 4):
            for i in range(WIDTH):
                two = scores[row + head, i] * total[head, i] + scores[row + head + 1, i] * total[head + 1, i]
                more = scores[row + head + 2, i] * total[head + 2, i] + scores[row + head + 3, i] * total[head + 3, i]
                shares[key, i] += two + more
        for head in range(four, heads):
            for i in range(WIDTH):
                shares[key, i] += scores[row + head, i] * total[head, i]


def power_of_two(x: np.float32) -> np.float32:
    """``2^x`` of ``x <= 0``; of less than -125, that of -125."""
    # n goes in the place of a number's exponent; of x - n, at most a half, a polynomial.
    x = max(x, np.float32(-125.0))
    n = np.rint(x)
    r = x - n
    p = np.float32(1.33335581e-3) * r + np.float32(9.61812911e-3)
    p = (p * r + np.float32(5.55041087e-2)) * r + np.float32(2.40226507e-1)
    p = (p * r + np.float32(6.93147181e-1)) * r + np.float32(1.0)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * power  # type: ignore[no-any-return]


def _attend_to_fields(
    items: OfItems,
    users: OfUsers,
    sizes: Sizes,
    block: int,
    user: int,
    both: int,
    zeros: Table,
    scores: Table,
    shares: Table,
    sums: Table,
    asked: Table,
    given: Table,
) -> None:
    """Fill ``given``, behind the ``both`` fields that depend on both, with what attention pools of fields that are not the
    user's, and with the shares of those that are.
    """
    _, count, width, _ = items.fields.shape
    heads, query, others = sizes.heads, items.query[block], count + both
    scores[: count * heads] = items.scores[block]
    for position in range(count if len(users.shifted) > 0 else 0):
        shape = heads, width, width
        multiply(users.shifted[user], 0, shape, items.fields[block, position], 0, zeros, 0, NO_LEAST, asked[0], 0)
        for head in range(heads):
            for i in range(WIDTH):
                scores[position * heads + head, i] += asked[0, head, i]
    for position in range(both):
        for channel in range(width):
            more, field = users.shift[user, channel], given[position * width + channel]
            for i in range(WIDTH):
                asked[0, channel, i] = (query[channel, i] + more) * field[i]
        begin = (count + position) * heads * WIDTH
        multiply(items.heads, 0, (heads, width, width), asked[0], 0, zeros, 0, NO_LEAST, scores, begin)
    shape, begin = (sizes.own * heads, width, width), others * heads * WIDTH
    multiply(users.own_keys[user], 0, shape, query, 0, users.own_added[user], 0, NO_LEAST, scores, begin)
    _softmax(others + sizes.own, heads, users.bounded[user, 1], scores, sums, shares)
    for channel in range(width):
        pooled = given[both * width + channel]
        for i in range(WIDTH):
            pooled[i] = 0.0
        for position in range(count):
            field = items.fields[block, position, channel]
            for i in range(WIDTH):
                pooled[i] += shares[position, i] * field[i]
        for position in range(both):
            field = given[position * width + channel]
            for i in range(WIDTH):
                pooled[i] += shares[count + position, i] * field[i]
    given[(both + 1) * width : (both + 1) * width + sizes.own] = shares[others : others + sizes.own]


def _first_layer(constant: Table, which: Ids, made: Table, row_of: Ids, first: Table, out: Table) -> None:
    """``max(0, constant_p + made_which(p) + first_row_of(p))`` of outputs ``p``."""
    for output in range(len(which)):
        row, known, more = which[output], row_of[output], constant[output]
        if known < 0:
            for i in range(WIDTH):
                out[output, i] = max(made[row, i] + more, np.float32(0.0))
        else:
            for i in range(WIDTH):
                out[output, i] = max(made[row, i] + more + first[known, i], np.float32(0.0))


def _further_layers(layers: OfLayers, room: Table) -> int:
    """The first row of what the last layer makes in the room ``[rows, WIDTH]``, which holds what the first has made."""
    count, target = len(layers.plan), 0
    for number in range(count):
        fields, outputs, seen, step, weight, bias, source, target = layers.plan[number]
        least = np.float32(0.0) if number < count - 1 else NO_LEAST
        for field in range(fields):
            # A field sees its neighbours; behind the edge there is none.
            missing = step if step > 0 and field == 0 else 0
            inputs = seen - missing - (step if field == fields - 1 else 0)
            at = weight + missing * layers.weights.shape[1]
            begin = (source + (field - 1) * step + missing) * WIDTH
            into = (target + field * outputs) * WIDTH
            shape = outputs, inputs, seen
            multiply(layers.weights, at, shape, room, begin, layers.biases, bias, least, room, into)
    return target
