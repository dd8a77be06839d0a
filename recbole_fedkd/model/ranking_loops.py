"""The compiled loops of a full ranking: blocks of items, and for each block one user after the other; they need numba.

Items lie side by side on the last axis, WIDTH in a block, so that all that a user's scores of a block go through stays in the
processor's cache, from attention to logits.
"""

from __future__ import annotations

import numpy as np

from recbole_fedkd.model.compiled import HIDDEN, Ids, Table
from recbole_fedkd.model.products import NO_LEAST, product, view
from recbole_fedkd.model.ranking import WIDTH, OfItems, OfLayers, OfUsers, Sizes
from recbole_fedkd.model.vectors import inlined, part

NOTHING = np.float32(2.0**-100)
"""What the sum of powers of scores that are not subtracted from is above where an item sees a key."""


def rank(items: OfItems, users: OfUsers, layers: OfLayers, sizes: Sizes, logits: Table) -> None:
    """Fill ``logits [users, T, blocks * WIDTH]``."""
    blocks, count, width, _ = items.fields.shape
    slots, attends = users.past.shape[1], len(items.query) > 0
    both = int(slots > 0) + int(len(users.pair) > 0)
    keys, heads = max(slots, count + both + sizes.own), max(sizes.past_heads, sizes.heads)
    scores, shares = np.empty((keys * heads, WIDTH), np.float32), np.empty((keys, WIDTH), np.float32)
    sums, asked = np.empty((2, heads, WIDTH), np.float32), np.empty((max(width, heads), WIDTH), np.float32)
    rows = both * width + (width + sizes.own if attends else 0)
    given, different = np.empty((rows, WIDTH), np.float32), layers.which.max() + 1
    made, room = np.empty((different, WIDTH), np.float32), np.empty((sizes.rows, WIDTH), np.float32)
    zeros = np.zeros(max(width, heads, different), np.float32)
    for block in range(blocks):
        begin, end, first = 0, len(users.constant), block * WIDTH
        if sizes.blocks > 0:
            begin, first = block // sizes.blocks, block % sizes.blocks * WIDTH
            end = begin + 1
        for user in range(begin, end):
            if slots > 0:
                used, added = users.used[user], users.added[user]
                product(scores[: used * sizes.past_heads], added, users.keys[user], items.past[block], NO_LEAST)
                _hide(users.past[user, :used], slots - 1, items.numbers[block], sizes, scores, sums[0, 0])
                _softmax(used, sizes.past_heads, users.bounded[user, 0], scores, sums, shares)
                product(given[:width], zeros, users.values[user], shares[:used], NO_LEAST)
            if len(users.pair) > 0:
                given[(both - 1) * width : both * width] = users.pair[block]
            if attends:
                _attend_to_fields(items, users, sizes, block, user, both, zeros, scores, shares, sums, asked, given)
            weight = users.different[user if len(users.different) > 1 else 0]
            product(made, zeros, weight, given, NO_LEAST)
            _first_layer(users.constant[user], layers.which, made, layers.row_of, items.first[block], room)
            last = _further_layers(layers, room)
            for label in range(logits.shape[1]):
                for i in range(WIDTH):
                    logits[user, label, first + i] = room[last + label, i]


def multiply(weight: Table, columns: Table, out: Table) -> None:
    """Fill ``out [outputs, columns]`` with ``weight [outputs, inputs] @ columns``."""
    product(out, np.zeros(len(out), np.float32), weight, columns, NO_LEAST)


@part
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


@part
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
                    power = _power_of_two(scores[key * heads + head, i])
                    scores[key * heads + head, i] = power
                    total[head, i] += power
    else:
        for key in range(keys):
            for head in range(heads):
                for i in range(WIDTH):
                    power = _power_of_two(scores[key * heads + head, i] - most[head, i])
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


@inlined
def _power_of_two(x: np.float32) -> np.float32:
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


@part
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
        product(asked[:heads], zeros, users.shifted[user], items.fields[block, position], NO_LEAST)
        for head in range(heads):
            for i in range(WIDTH):
                scores[position * heads + head, i] += asked[head, i]
    for position in range(both):
        for channel in range(width):
            more, field = users.shift[user, channel], given[position * width + channel]
            for i in range(WIDTH):
                asked[channel, i] = (query[channel, i] + more) * field[i]
        begin = (count + position) * heads
        product(scores[begin : begin + heads], zeros, items.heads, asked[:width], NO_LEAST)
    begin, end = others * heads, (others + sizes.own) * heads
    product(scores[begin:end], users.own_added[user], users.own_keys[user], query, NO_LEAST)
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


@part
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


@part
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
            read = view(layers.weights, weight + missing, outputs, inputs, seen)
            begin, into = source + (field - 1) * step + missing, target + field * outputs
            above = room[into : into + outputs]
            product(above, layers.biases[bias:], read, room[begin : begin + inputs], least)
    return target
