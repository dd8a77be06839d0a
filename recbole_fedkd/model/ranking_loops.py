"""The compiled loops of a full ranking: blocks of items, and for each block one user after the other; they need numba.

Items lie side by side on the last axis, WIDTH in a block, so that all that a user's scores of a block go through stays in the
processor's cache, from attention to logits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recbole_fedkd.model.compiled import HIDDEN, LANES, ROWS, Ids, Table
from recbole_fedkd.model.products import NO_LEAST, product, view
from recbole_fedkd.model.ranking import MOST, WIDTH, OfItems, OfLayers, OfNetworks, OfUsers, Sizes
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
    turn,
)

LEAST = np.float32(0.1) * HIDDEN
"""Below what a key gets that an item sees."""


class Block(NamedTuple):
    """What a network makes of the items of a block, made anew for every block.

    Attributes:
        numbers: of the items ``[WIDTH]``.
        fields: an item's own ``[fields * d, WIDTH]``.
        past: queries to a history ``[d, WIDTH]``.
        query: to the fields of a sample, likewise.
        scores: what its own fields get, but for a user's shift ``[fields * heads, WIDTH]``.
        first: what its own fields add to the first layer ``[rows, WIDTH]``.
    """

    numbers: Ids
    fields: Table
    past: Table
    query: Table
    scores: Table
    first: Table


def rank(
    items: OfItems, askers: Ids, networks: OfNetworks, users: OfUsers, layers: OfLayers, sizes: Sizes, logits: Table
) -> None:
    """Fill ``logits [asking, T, blocks * WIDTH]`` of users ``askers [asking]``.

    Where blocks are everybody's, these are all users in their order.
    """
    count, width = len(items.begins) - 1, networks.table.shape[2]
    slots, attends, pairs = users.past.shape[1], networks.query.shape[1] > 0, users.pair.shape[1] > 0
    both, asking = int(slots > 0) + int(pairs), len(users.constant) // len(networks.table)
    keys, heads = max(slots, count + both + sizes.own), max(sizes.past_heads, sizes.heads)
    scores, shares = np.empty((keys * heads, WIDTH), np.float32), np.empty((keys, WIDTH), np.float32)
    held, asked = np.empty(WIDTH, np.float32), np.empty((max(width, heads), WIDTH), np.float32)
    rows = both * width + (width + sizes.own if attends else 0)
    given, different = np.empty((rows, WIDTH), np.float32), layers.which.max() + 1
    made, room = np.empty((different, WIDTH), np.float32), np.empty((sizes.rows, WIDTH), np.float32)
    zeros = np.zeros(max(width, heads, different, networks.first.shape[1]), np.float32)
    vectors = np.zeros((WIDTH, (width + LANES - 1) // LANES * LANES), np.float32)
    block = Block(
        np.zeros(WIDTH, np.int64),
        np.empty((count * width + LANES, WIDTH), np.float32),
        np.empty((width, WIDTH), np.float32),
        np.empty((width, WIDTH), np.float32),
        np.empty((count * sizes.heads, WIDTH), np.float32),
        np.empty((networks.first.shape[1], WIDTH), np.float32),
    )
    of_each = sizes.blocks if sizes.blocks > 0 else len(items.numbers)
    for position in range(of_each * (len(askers) if sizes.blocks > 0 else len(networks.table))):
        # Blocks of a network's users all, or of one user's items alone.
        owner, number = position // of_each, position % of_each
        network = askers[owner] // asking if sizes.blocks > 0 else owner
        begin, end = (owner, owner + 1) if sizes.blocks > 0 else (owner * asking, (owner + 1) * asking)
        first = number * WIDTH
        block.numbers[:] = items.numbers[position if sizes.blocks > 0 else number]
        _fill_block(items, networks, network, sizes, zeros, vectors, asked, block)
        for slot in range(begin, end):
            user = askers[slot]
            bounded = _bounded(users.lengths[user], networks.bounds[network])
            if slots > 0:
                used, added = users.used[user], users.added[user]
                product(scores[: used * sizes.past_heads], added, users.keys[user], block.past, NO_LEAST)
                _hide(users.past[user, :used], slots - 1, block.numbers, sizes, scores, held)
                _softmax(used, sizes.past_heads, bounded[0], scores, shares)
                product(given[:width], zeros, users.values[user], shares[:used], NO_LEAST)
            if pairs:
                given[(both - 1) * width : both * width] = users.pair[user, number]
            if attends:
                _attend_to_fields(
                    block,
                    networks.heads[network],
                    users,
                    sizes,
                    bounded[1],
                    user,
                    both,
                    zeros,
                    scores,
                    shares,
                    asked,
                    given,
                )
            weight = users.different[user if len(users.different) == len(users.constant) else network]
            product(made, zeros, weight, given, NO_LEAST)
            _first_layer(users.constant[user], layers.which, made, layers.row_of, block.first, room)
            last = _further_layers(layers.plan, networks.weights[network], networks.biases[network], room)
            for label in range(logits.shape[1]):
                for i in range(WIDTH):
                    logits[slot, label, first + i] = room[last + label, i]


def expect(logits: Table, values: Table, out: Table) -> None:
    """Fill ``out [users, columns]`` with the means of ``values [labels]`` by a softmax of ``logits [users, labels, columns]``.

    There are LANES columns or more; each is the same bits whichever stand beside it.
    """
    users, labels, columns = logits.shape
    scale = everywhere(np.float32(1.0 / np.log(2.0)))
    for user in range(users):
        for begin in range(0, columns, LANES):
            # The last go back to where there are so many.
            column = min(begin, columns - LANES)
            first = user * labels * columns + column
            most = load(logits, first)
            for label in range(1, labels):
                most = larger(most, load(logits, first + label * columns))
            total, mean = everywhere(np.float32(0.0)), everywhere(np.float32(0.0))
            for label in range(labels):
                share = power_of_two((load(logits, first + label * columns) - most) * scale)
                total, mean = total + share, mean + share * everywhere(values[label])
            store(mean * inverse(total), out, user * columns + column)


def multiply(weight: Table, columns: Table, out: Table) -> None:
    """Fill ``out [networks, outputs, columns]`` with ``weight [networks, outputs, inputs] @ columns``."""
    zeros = np.zeros(out.shape[1], np.float32)
    for network in range(len(out)):
        product(out[network], zeros, weight[network], columns[network], NO_LEAST)


@part
def _fill_block(
    items: OfItems,
    networks: OfNetworks,
    network: int,
    sizes: Sizes,
    zeros: Table,
    vectors: Table,
    asked: Table,
    block: Block,
) -> None:
    """Fill a block of the items that it numbers; ``vectors [WIDTH, d]`` and ``asked [d, WIDTH]``: room."""
    count, width = len(items.begins) - 1, networks.table.shape[2]
    mean, inputs = asked[:width], block.fields[: count * width]
    # In double precision, so that a product with an inverse rounds as the quotient does, which torch makes.
    share = 1.0 / sizes.averaged
    for field in range(count):
        _vectors_of(items, networks.table[network], networks.more[network], field, block.numbers, vectors)
        # What goes beyond a field's last row is overwritten by the next.
        for i in range(0, WIDTH, LANES):
            for channel in range(0, width, LANES):
                source, into = i * vectors.shape[1] + channel, (field * width + channel) * WIDTH + i
                turn(vectors, source, vectors.shape[1], block.fields, into, WIDTH)
    for channel in range(width):
        for i in range(WIDTH):
            mean[channel, i] = block.fields[channel, i]
        for field in range(1, count):
            for i in range(WIDTH):
                mean[channel, i] += block.fields[field * width + channel, i]
        for i in range(WIDTH):
            mean[channel, i] = np.float32(np.float64(mean[channel, i]) * share)
    if networks.past.shape[1] > 0:
        product(block.past, zeros, networks.past[network], mean, NO_LEAST)
    product(block.first, zeros, networks.first[network], inputs, NO_LEAST)
    if networks.query.shape[1] == 0:
        return
    heads = networks.heads[network]
    product(block.query, zeros, networks.query[network], mean, NO_LEAST)
    for field in range(count):
        for channel in range(width):
            for i in range(WIDTH):
                asked[channel, i] = block.query[channel, i] * block.fields[field * width + channel, i]
        product(block.scores[field * len(heads) : (field + 1) * len(heads)], zeros, heads, asked[:width], NO_LEAST)


@part
def _vectors_of(items: OfItems, table: Table, more: Table, field: int, numbers: Ids, vectors: Table) -> None:
    """Fill ``vectors [WIDTH, d]`` with the means of the tokens of a field, row by row of the numbered items."""
    begin, end, width, count = items.begins[field], items.begins[field + 1], table.shape[1], len(table)
    for i in range(len(numbers)):
        item = numbers[i]
        token = items.tokens[item, begin]
        if end == begin + 1 and token >= 0:
            vector = table[token] if token < count else more[token - count]
            for channel in range(width):
                vectors[i, channel] = vector[channel]
            continue
        for channel in range(width):
            vectors[i, channel] = 0.0
        for slot in range(begin, end):
            token = items.tokens[item, slot]
            if token >= 0:
                vector = table[token] if token < count else more[token - count]
                for channel in range(width):
                    vectors[i, channel] += vector[channel]
        share = 1.0 / items.counts[item, field]
        for channel in range(width):
            vectors[i, channel] = np.float32(np.float64(vectors[i, channel]) * share)


@part
def _bounded(user: Table, network: Table) -> tuple[bool, bool]:
    """Whether no score of a user and an item, of the history and of the fields, is beyond :data:`MOST`."""
    past, query, scores, field = network[0], network[1], network[2], network[3]
    past_keys, past_added, both, shift, own_keys, own_added = user[0], user[1], user[2], user[3], user[4], user[5]
    of_items = scores + shift * field <= MOST
    of_users = both * (query + shift) <= MOST and own_keys * query + own_added <= MOST
    return past_keys * past + past_added <= MOST, of_items and of_users


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
    block: Block,
    of_heads: Table,
    users: OfUsers,
    sizes: Sizes,
    bounded: bool,
    user: int,
    both: int,
    zeros: Table,
    scores: Table,
    shares: Table,
    asked: Table,
    given: Table,
) -> None:
    """Fill ``given``, behind the ``both`` fields that depend on both, with what attention pools of fields that are not the
    user's, and with the shares of those that are.
    """
    width, heads, query = len(block.query), sizes.heads, block.query
    count = len(block.scores) // heads
    others = count + both
    scores[: count * heads] = block.scores
    for position in range(count if users.shifted.shape[1] > 0 else 0):
        field = block.fields[position * width : (position + 1) * width]
        product(asked[:heads], zeros, users.shifted[user], field, NO_LEAST)
        for head in range(heads):
            for i in range(WIDTH):
                scores[position * heads + head, i] += asked[head, i]
    for position in range(both):
        for channel in range(width):
            more, vector = users.shift[user, channel], given[position * width + channel]
            for i in range(WIDTH):
                asked[channel, i] = (query[channel, i] + more) * vector[i]
        begin = (count + position) * heads
        product(scores[begin : begin + heads], zeros, of_heads, asked[:width], NO_LEAST)
    begin, end = others * heads, (others + sizes.own) * heads
    product(scores[begin:end], users.own_added[user], users.own_keys[user], query, NO_LEAST)
    _softmax(others + sizes.own, heads, bounded, scores, shares)
    for channel in range(width):
        pooled = given[both * width + channel]
        for i in range(WIDTH):
            pooled[i] = 0.0
        for position in range(count):
            vector = block.fields[position * width + channel]
            for i in range(WIDTH):
                pooled[i] += shares[position, i] * vector[i]
        for position in range(both):
            vector = given[position * width + channel]
            for i in range(WIDTH):
                pooled[i] += shares[count + position, i] * vector[i]
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
def _further_layers(plan: Ids, weights: Table, biases: Table, room: Table) -> int:
    """The first row of what the last layer makes in the room ``[rows, WIDTH]``, which holds what the first has made."""
    count, target = len(plan), 0
    for number in range(count):
        fields, outputs, seen, step, weight, bias, source, target = plan[number]
        least = np.float32(0.0) if number < count - 1 else NO_LEAST
        for field in range(fields):
            # A field sees its neighbours; behind the edge there is none.
            missing = step if step > 0 and field == 0 else 0
            inputs = seen - missing - (step if field == fields - 1 else 0)
            read = view(weights, weight + missing, outputs, inputs, seen)
            begin, into = source + (field - 1) * step + missing, target + field * outputs
            above = room[into : into + outputs]
            product(above, biases[bias:], read, room[begin : begin + inputs], least)
    return target
