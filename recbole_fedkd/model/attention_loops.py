"""The compiled loops of attention, forward and backward; importing them needs numba.

A few samples at a time go through each step, so that the processor has something to do while one waits for the result of the
one before. Keys lie in rows, as they are gathered and as their derivatives are scattered, and in columns, of which a row of
scores is a sum. Arrays are contiguous and places count all of their numbers. ``wide`` is the size of a vector and ``long`` the
number of keys, both filled up to a multiple of LANES; ``many`` that of heads, to one of ROWS.
"""

from __future__ import annotations

import numpy as np

from recbole_fedkd.model.compiled import HIDDEN, LANES, ROWS, Ids, Table
from recbole_fedkd.model.vectors import (
    element,
    everywhere,
    exponential,
    inlined,
    inverse,
    larger,
    largest,
    load,
    load_rows,
    rows_of,
    spread,
    store,
    store_rows,
    sum_of,
    totals,
    turn,
)

SAMPLES, COPIES = 8, 4
"""Samples at a time, and sums of a label's derivatives: one addition to a row of memory waits for the one before."""


def attend(
    backward: bool,
    sizes: tuple[int, int, int],
    projected: Table,
    heads: Table,
    bias: Table,
    table: Table,
    of_kinds: Table,
    rows: Ids,
    kinds: Ids,
    past: Ids,
    items: Ids,
    out: Table,
    mean: Table,
    d_projected: Table,
    d_heads: Table,
    d_bias: Table,
    d_table: Table,
    d_of_kinds: Table,
) -> None:
    """Of all networks, the first axis of every array; see :func:`recbole_fedkd.model.attending.attend`.

    Args:
        backward: whether derivatives are filled, which those of the table, the labels, heads and bias are added to; ``out``
            and ``mean`` are then given.
        sizes: targets of an entry, heads, keys.
        mean: ``[networks, samples, long]``.
    """
    targets, count, slots = sizes
    networks, samples, wide = projected.shape
    many, long, length, labels = heads.shape[1], mean.shape[2], table.shape[1], of_kinds.shape[1]
    few = labels * wide
    keys, columns, d_keys = _room(SAMPLES * long * wide), _room(wide * long), _room(long * wide)
    asked, d_labels = _room(SAMPLES * many * wide), _room(COPIES * few)
    scores, biases, d_biases = _room(SAMPLES * many * long), _room(many * long), _room(many * long)
    most, portions = _room(SAMPLES * many // ROWS * LANES), _room(many // ROWS * LANES)
    hidden, shares, d_shares = _room(long), _room(SAMPLES * long), _room(SAMPLES * long)
    for head in range(count):
        for lane in range(head % ROWS, LANES, ROWS):
            portions[head // ROWS * LANES + lane] = 1.0 / count
    for network in range(networks):
        _fill_biases(bias, network, count, slots, biases, long)
        d_biases[:], d_labels[:] = 0.0, 0.0
        loaded, end = -1, (network + 1) * samples
        for first in range(network * samples, end, SAMPLES):
            size = min(SAMPLES, end - first)
            for sample in range(size):
                entry = (first + sample) // targets
                offset = entry % SAMPLES * long * wide
                if entry != loaded:  # targets of one entry have the same keys
                    loaded = entry
                    _gather(entry * slots, slots, network * length, table, rows, keys, offset, wide)
                    if kinds.shape[1] > 0:
                        _add_labels(entry * slots, slots, network * labels, of_kinds, kinds, keys, offset, wide)
                    for key in range(0, long, LANES):
                        for x in range(0, wide, LANES):
                            turn(keys, offset + key * wide + x, wide, columns, x * long + key, long)
                if past.shape[1] > 0:
                    _hide(past, entry * slots, slots, element(items, first + sample), hidden)
                _ask(
                    projected,
                    (first + sample) * wide,
                    heads,
                    network * many * wide,
                    asked,
                    sample * many * wide,
                    wide,
                    many,
                )
                _score(asked, sample * many, columns, biases, hidden, scores, most, wide, long, many)
                if backward:
                    _combine(out, (first + sample) * wide, columns, 0, d_shares, sample * long, long, wide)
            _soften(size, scores, most, portions, shares, long, many)
            if backward:
                for i in range(0, size * long, LANES):
                    store(load(d_shares, i) + load(mean, first * long + i), d_shares, i)
                _soften_back(size, count, scores, d_shares, d_biases, long, many)
                for sample in range(size):
                    offset = (first + sample) // targets % SAMPLES * long * wide
                    at = (first + sample) * wide, network * many * wide
                    _add_by_heads(
                        scores,
                        sample * many,
                        keys,
                        offset,
                        at,
                        projected,
                        heads,
                        d_projected,
                        d_heads,
                        wide,
                        long,
                        many,
                    )
                for sample in range(size):
                    entry, at = (first + sample) // targets, (first + sample) * wide
                    begins, ends = first + sample == entry * targets, first + sample + 1 == (entry + 1) * targets
                    _by_keys(
                        begins, scores, sample * many, asked, shares, sample * long, out, at, d_keys, wide, long, many
                    )
                    if ends:
                        _scatter(entry * slots, slots, network * length, d_keys, rows, d_table, wide)
                        if kinds.shape[1] > 0:
                            _scatter_labels(entry * slots, slots, labels, d_keys, kinds, d_labels, wide)
            else:
                for sample in range(size):
                    offset = (first + sample) // targets % SAMPLES * long * wide
                    _combine(shares, sample * long, keys, offset, out, (first + sample) * wide, wide, long)
                for i in range(0, size * long, LANES):
                    store(load(shares, i), mean, first * long + i)
        if backward:
            _return_biases(d_biases, network, count, d_bias, long)
            _return_labels(d_labels, d_of_kinds, network * few, few)


@inlined
def _room(size: int) -> Table:
    """Zeros that begin where the processor's cache begins a line."""
    room = np.zeros(size + LANES, np.float32)
    start = -(room.ctypes.data // 4) % LANES
    return room[start : start + size]


@inlined
def _fill_biases(bias: Table, network: int, count: int, slots: int, biases: Table, long: int) -> None:
    """Bring heads in front, and hide the keys that only fill up."""
    for head in range(count):
        if bias.shape[1] > 0:
            for key in range(slots):
                biases[head * long + key] = bias[network, key, head]
        for key in range(slots, long):
            biases[head * long + key] = HIDDEN


@inlined
def _return_biases(d_biases: Table, network: int, count: int, d_bias: Table, long: int) -> None:
    """The way back of :func:`_fill_biases`."""
    for key in range(d_bias.shape[1]):
        for head in range(count):
            d_bias[network, key, head] = d_biases[head * long + key]


@inlined
def _return_labels(d_labels: Table, d_of_kinds: Table, at: int, few: int) -> None:
    """Add up the :data:`COPIES`."""
    for i in range(0, few, LANES):
        total = load(d_labels, i)
        for copy in range(1, COPIES):
            total = total + load(d_labels, copy * few + i)
        store(total, d_of_kinds, at + i)


@inlined
def _gather(start: int, slots: int, base: int, table: Table, rows: Ids, keys: Table, offset: int, wide: int) -> None:
    """Fill keys from a place on with rows of a table, behind ``base``, whose numbers are found from ``start`` on."""
    for x in range(0, wide, LANES):
        if rows.shape[1] > 0:
            for key in range(slots):
                store(load(table, (base + element(rows, start + key)) * wide + x), keys, offset + key * wide + x)
        else:
            for key in range(slots):
                store(load(table, (start + key) * wide + x), keys, offset + key * wide + x)


@inlined
def _add_labels(
    start: int, slots: int, base: int, table: Table, kinds: Ids, keys: Table, offset: int, wide: int
) -> None:
    """Add the vectors of their labels to keys; arguments as of :func:`_gather`."""
    for x in range(0, wide, LANES):
        for key in range(slots):
            own = offset + key * wide + x
            store(load(keys, own) + load(table, (base + element(kinds, start + key)) * wide + x), keys, own)


@inlined
def _scatter(start: int, slots: int, base: int, d_keys: Table, rows: Ids, table: Table, wide: int) -> None:
    """Add derivatives of keys to those of the rows that they came from; without numbers of rows no two keys share one."""
    for x in range(0, wide, LANES):
        if rows.shape[1] > 0:
            for key in range(slots):
                row = (base + element(rows, start + key)) * wide + x
                store(load(table, row) + load(d_keys, key * wide + x), table, row)
        else:
            for key in range(slots):
                store(load(d_keys, key * wide + x), table, (start + key) * wide + x)


@inlined
def _scatter_labels(start: int, slots: int, labels: int, d_keys: Table, kinds: Ids, table: Table, wide: int) -> None:
    """Add derivatives of keys to those of their labels ``[COPIES, labels, wide]``."""
    for x in range(0, wide, LANES):
        for key in range(slots):
            row = (key % COPIES * labels + element(kinds, start + key)) * wide + x
            store(load(table, row) + load(d_keys, key * wide + x), table, row)


@inlined
def _hide(past: Ids, start: int, slots: int, item: int, hidden: Table) -> None:
    """Fill what is added to the scores of the keys of a target."""
    own = False
    for key in range(slots):
        other = element(past, start + key)
        own |= other == item
        hidden[key] = HIDDEN if (other == item) | (other == 0) else np.float32(0.0)
    if not own:
        hidden[slots - 1] = HIDDEN


@inlined
def _ask(projected: Table, at: int, heads: Table, of: int, asked: Table, offset: int, wide: int, many: int) -> None:
    """Fill what every head multiplies keys with, ``many`` rows from a place on."""
    for x in range(0, wide, LANES):
        query = load(projected, at + x)
        for row in range(0, many * wide, wide):
            store(load(heads, of + row + x) * query, asked, offset + row + x)


@inlined
def _score(
    asked: Table,
    row: int,
    columns: Table,
    biases: Table,
    hidden: Table,
    scores: Table,
    most: Table,
    wide: int,
    long: int,
    many: int,
) -> None:
    """Fill the scores of a sample, ``many`` rows from a row on, and for ROWS heads each a row with the largest of each."""
    for head in range(0, many, ROWS):
        highest = rows_of(everywhere(np.float32(0.1) * HIDDEN))
        for key in range(0, long, LANES):
            total = load_rows(biases, head * long + key, long) + load(hidden, key)
            for x in range(wide):
                total = total + spread(asked, (row + head) * wide + x, wide) * load(columns, x * long + key)
            store_rows(total, scores, (row + head) * long + key, long)
            highest = larger(highest, total)
        store(largest(highest), most, (row + head) // ROWS * LANES)


@inlined
def _soften(size: int, scores: Table, most: Table, portions: Table, shares: Table, long: int, many: int) -> None:
    """Turn scores into a softmax, divided by the number of heads, and fill the sums over those."""
    for block in range(size * many // ROWS):
        highest, total = rows_of(load(most, block * LANES)), rows_of(everywhere(np.float32(0.0)))
        for key in range(block * ROWS * long, (block * ROWS + 1) * long, LANES):
            power = exponential(load_rows(scores, key, long) - highest)
            store_rows(power, scores, key, long)
            total = total + power
        store(totals(total), most, block * LANES)
    for sample in range(size):
        for key in range(0, long, LANES):
            store(everywhere(np.float32(0.0)), shares, sample * long + key)
        for head in range(0, many, ROWS):
            row = sample * many + head
            portion = rows_of(inverse(load(most, row // ROWS * LANES)) * load(portions, head // ROWS * LANES))
            for key in range(0, long, LANES):
                softmax = load_rows(scores, row * long + key, long) * portion
                store_rows(softmax, scores, row * long + key, long)
                store(load(shares, sample * long + key) + sum_of(softmax), shares, sample * long + key)


@inlined
def _soften_back(size: int, count: int, scores: Table, d_shares: Table, d_biases: Table, long: int, many: int) -> None:
    """Turn the softmax into derivatives by the scores, and add them up over samples."""
    # Of a softmax p it is p (d - sum p d).
    heads = everywhere(np.float32(count))
    for block in range(size * many // ROWS):
        begin = block * ROWS // many * long
        total = rows_of(everywhere(np.float32(0.0)))
        for key in range(0, long, LANES):
            total = total + load_rows(scores, block * ROWS * long + key, long) * load(d_shares, begin + key)
        mean = rows_of(totals(total) * heads)
        for key in range(0, long, LANES):
            row = block * ROWS * long + key
            store_rows(load_rows(scores, row, long) * (load(d_shares, begin + key) - mean), scores, row, long)
    for i in range(0, many * long, LANES):
        sums = load(d_biases, i)
        for sample in range(size):
            sums = sums + load(scores, sample * many * long + i)
        store(sums, d_biases, i)


@inlined
def _combine(
    factors: Table, start: int, table: Table, offset: int, out: Table, at: int, columns: int, depth: int
) -> None:
    """Fill a row of ``out`` with the sum of ``depth`` rows of a table, each times its factor."""
    for column in range(0, columns, LANES):
        total = rows_of(everywhere(np.float32(0.0)))
        for row in range(0, depth, ROWS):
            rows = load_rows(table, offset + row * columns + column, columns)
            total = total + spread(factors, start + row, 1) * rows
        store(sum_of(total), out, at + column)


@inlined
def _add_by_heads(
    d_scores: Table,
    row: int,
    keys: Table,
    offset: int,
    at: tuple[int, int],
    projected: Table,
    heads: Table,
    d_projected: Table,
    d_heads: Table,
    wide: int,
    long: int,
    many: int,
) -> None:
    """Fill the derivatives of a query and add to those of the heads; ``at`` is where both begin."""
    for x in range(0, wide, LANES):
        query, d_query = load(projected, at[0] + x), everywhere(np.float32(0.0))
        for head in range(0, many, ROWS):
            total = rows_of(everywhere(np.float32(0.0)))
            for key in range(long):
                total = total + spread(d_scores, (row + head) * long + key, long) * load(keys, offset + key * wide + x)
            own = at[1] + head * wide + x
            d_query = d_query + sum_of(total * load_rows(heads, own, wide))
            store_rows(load_rows(d_heads, own, wide) + total * query, d_heads, own, wide)
        store(d_query, d_projected, at[0] + x)


@inlined
def _by_keys(
    begins: bool,
    d_scores: Table,
    row: int,
    asked: Table,
    shares: Table,
    start: int,
    given: Table,
    at: int,
    d_keys: Table,
    wide: int,
    long: int,
    many: int,
) -> None:
    """Add to derivatives of keys, or fill them where a sample begins an entry."""
    for x in range(0, wide, LANES):
        sums = load(given, at + x)
        for key in range(0, long, ROWS):
            total = spread(shares, start + key, 1) * sums
            if not begins:
                total = total + load_rows(d_keys, key * wide + x, wide)
            for head in range(row, row + many):
                total = total + spread(d_scores, head * long + key, 1) * load(asked, head * wide + x)
            store_rows(total, d_keys, key * wide + x, wide)
