"""The compiled loops of a full ranking: blocks of items, and for each block one user after the other; they need numba.

Items lie side by side on the last axis, WIDTH in a block, so that all that a user's scores of a block go through stays in the
processor's cache, from attention to logits.
"""

from __future__ import annotations

import numpy as np

from recbole_fedkd.model.compiled import HIDDEN, LANES, ROWS, Ids, Table
from recbole_fedkd.model.products import NO_LEAST, product, view
from recbole_fedkd.model.ranking import WIDTH, OfItems, OfLayers, OfUsers, Sizes
from recbole_fedkd.model.vectors import (
    everywhere,
    inlined,
    inverse,
    larger,
    load,
    load_rows,
    part,
    power_of_two,
    rows_of,
    store,
    store_rows,
    sum_of,
)

LEAST = np.float32(0.1) * HIDDEN
"""Below what a key gets that an item sees."""


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
                _softmax(used, sizes.past_heads, users.bounded[user, 0], scores, shares)
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
def _softmax(keys: int, heads: int, bounded: bool, scores: Table, shares: Table) -> None:
    """A softmax over the keys for each head, averaged over the heads; of base 2, since scores are divided by log 2.

    Args:
        keys: number of them.
        heads: likewise.
        bounded: no score is beyond :data:`MOST`, so that the largest need not be subtracted.
        scores: ``[keys * heads, WIDTH]``, overwritten.
        shares: ``[keys, WIDTH]``, filled; 0 where an item sees no key.
    """
    four = heads // ROWS * ROWS
    for column in range(0, WIDTH, 2 * LANES):
        for head in range(0, four, ROWS):
            _four_heads(keys, heads, head, bounded, scores, shares, column)
        for head in range(four, heads):
            _one_head(keys, heads, head, bounded, scores, shares, column)
            _one_head(keys, heads, head, bounded, scores, shares, column + LANES)


@inlined
def _four_heads(keys: int, heads: int, head: int, bounded: bool, scores: Table, shares: Table, column: int) -> None:
    """Add what ROWS heads make of two rows of LANES columns to the shares; the first heads fill them."""
    left, right = rows_of(everywhere(np.float32(0.0))), rows_of(everywhere(np.float32(0.0)))
    if not bounded:
        left, right = rows_of(everywhere(LEAST)), rows_of(everywhere(LEAST))
        for key in range(keys):
            begin = (key * heads + head) * WIDTH + column
            left = larger(left, load_rows(scores, begin, WIDTH))
            right = larger(right, load_rows(scores, begin + LANES, WIDTH))
    of_left, of_right = rows_of(everywhere(np.float32(0.0))), rows_of(everywhere(np.float32(0.0)))
    for key in range(keys):
        begin = (key * heads + head) * WIDTH + column
        a = power_of_two(load_rows(scores, begin, WIDTH) - left)
        b = power_of_two(load_rows(scores, begin + LANES, WIDTH) - right)
        store_rows(a, scores, begin, WIDTH)
        store_rows(b, scores, begin + LANES, WIDTH)
        of_left, of_right = of_left + a, of_right + b
    count = everywhere(np.float32(heads))
    of_left, of_right = inverse(of_left * count), inverse(of_right * count)
    for key in range(keys):
        begin, share = (key * heads + head) * WIDTH + column, key * WIDTH + column
        c = sum_of(load_rows(scores, begin, WIDTH) * of_left)
        d = sum_of(load_rows(scores, begin + LANES, WIDTH) * of_right)
        if head > 0:
            c, d = c + load(shares, share), d + load(shares, share + LANES)
        store(c, shares, share)
        store(d, shares, share + LANES)


@inlined
def _one_head(keys: int, heads: int, head: int, bounded: bool, scores: Table, shares: Table, column: int) -> None:
    """:func:`_four_heads` of one, and of one row of LANES columns."""
    most, total = everywhere(np.float32(0.0) if bounded else LEAST), everywhere(np.float32(0.0))
    for key in range(0 if bounded else keys):
        most = larger(most, load(scores, (key * heads + head) * WIDTH + column))
    for key in range(keys):
        begin = (key * heads + head) * WIDTH + column
        power = power_of_two(load(scores, begin) - most)
        store(power, scores, begin)
        total = total + power
    total = inverse(total * everywhere(np.float32(heads)))
    for key in range(keys):
        share = load(scores, (key * heads + head) * WIDTH + column) * total
        if head > 0:
            share = share + load(shares, key * WIDTH + column)
        store(share, shares, key * WIDTH + column)


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
    _softmax(others + sizes.own, heads, users.bounded[user, 1], scores, shares)
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
