"""Loops of the fleet in machine code.

Whoever calls them has another way where :func:`~recbole_fedkd.model.compiled.has_compiler` says no, and for tensors of a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.distillation.factors import FoldedUsers
from recbole_fedkd.model.compiled import Ids, Table, compiled

Losses = NDArray[np.float64]

LANES = 64
"""Rows side by side in a loop of :func:`of_other_rows`: what it needs of them stays in the processor's cache."""

LARGE = 1e200
"""What a product of numbers up to 2 may come to."""


def steps_of_many(
    of_user: Tensor,
    of_item: Tensor,
    rates: tuple[Tensor, Tensor],
    places: tuple[int, int, int, int, int],
    users: Tensor,
    items: Tensor,
    labels: Tensor,
    sizes: Sequence[int],
    batch_size: int,
) -> Tensor:
    """Train many networks whose scores are ``u . i + b_u + b_i`` for an epoch of SGD with the cross-entropy of clicks.

    Args:
        of_user: tables ``[c, users, U]``, changed in place; one row: it is that of all users.
        of_item: tables ``[c, rows, D]``, changed in place.
        rates: learning rate of every column of both.
        places: the columns that vectors of users and items, and their biases begin at (-1: there are none), and the
            vectors' size.
        users: rows of users ``[c, n]``, or one of each ``[c, 1]``.
        items: rows of items ``[c, n]``.
        labels: 1 for a click, 0 for none ``[c, n]``.
        sizes: samples of each, the first of ``n``.
        batch_size: samples in a step.

    Returns:
        Loss of each, summed over its samples ``[c]``, in double precision.
    """
    losses, counts = np.zeros(len(sizes)), np.asarray(sizes, dtype=np.int64)
    tables = [table.numpy() for table in (of_user, of_item)]
    columns = [rate.float().numpy() for rate in rates]
    compiled(_steps)(
        *tables, *columns, *places, users.numpy(), items.numpy(), labels.numpy(), counts, batch_size, losses
    )
    return torch.from_numpy(losses)


def _steps(
    of_user: Table,
    of_item: Table,
    user_rates: Table,
    item_rates: Table,
    user_start: int,
    item_start: int,
    user_bias: int,
    item_bias: int,
    width: int,
    users: Ids,
    items: Ids,
    labels: Ids,
    sizes: Ids,
    batch_size: int,
    losses: Losses,
) -> None:
    """See :func:`steps_of_many`. A batch is gone through twice, for no sample may see what another has changed."""
    errors = np.empty(batch_size, np.float32)
    gradients = np.zeros(of_user.shape[1:], np.float32)
    several = users.shape[1] > 1
    user_vector, item_vector = slice(user_start, user_start + width), slice(item_start, item_start + width)
    vector_rates = item_rates[item_vector]
    for client in range(len(sizes)):
        # A logarithm costs as much as all else of a sample: the sum of many is that of their product.
        total, product = 0.0, 1.0
        for begin in range(0, sizes[client], batch_size):
            count = min(batch_size, sizes[client] - begin)
            # Slices, whose places need not be looked at for negative numbers one by one; where they are, of the only user.
            user = users[client, 0]
            one, gradient = of_user[client, user, user_vector], gradients[user, user_vector]
            for sample in range(count):
                item = items[client, begin + sample]
                other = of_item[client, item, item_vector]
                if several:
                    user = users[client, begin + sample]
                    one, gradient = of_user[client, user, user_vector], gradients[user, user_vector]
                score = np.float32(0.0)
                for column in range(width):
                    score += one[column] * other[column]
                if user_bias >= 0:
                    score += of_user[client, user, user_bias]
                if item_bias >= 0:
                    score += of_item[client, item, item_bias]
                # CE = softplus(s z), its derivative s sigmoid(s z), with s = -1 for a click and 1 for none.
                sign = 1.0 - 2.0 * labels[client, begin + sample]
                margin = sign * score
                small = math.exp(-abs(margin))
                total += max(margin, 0.0)
                product *= 1.0 + small
                if product > LARGE:
                    total += math.log(product)
                    product = 1.0
                error = np.float32(sign * (1.0 if margin >= 0 else small) / (1.0 + small) / count)
                errors[sample] = error
                for column in range(width):
                    gradient[column] += error * other[column]
                if user_bias >= 0:
                    gradients[user, user_bias] += error
            for sample in range(count):
                item, error = items[client, begin + sample], errors[sample]
                other = of_item[client, item, item_vector]
                if several:
                    one = of_user[client, users[client, begin + sample], user_vector]
                for column in range(width):
                    other[column] -= vector_rates[column] * error * one[column]
                if item_bias >= 0:
                    of_item[client, item, item_bias] -= item_rates[item_bias] * error
            for sample in range(count if several else 1):
                user = users[client, begin + sample if several else 0]
                for column in range(len(user_rates)):
                    of_user[client, user, column] -= user_rates[column] * gradients[user, column]
                    gradients[user, column] = 0.0
        losses[client] = total + math.log(product)


def drawn_of_many(
    keys: NDArray[np.uint64],
    orders: Tensor,
    runs: tuple[Tensor, Tensor],
    batch_size: int,
    samples: tuple[Tensor, Tensor],
    negatives: int,
    item_count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """An epoch of clients of one user each, negatives included.

    Args:
        keys: what the negatives of each client come from ``[c]``, see :class:`~recbole_fedkd.federated.draws.KeyedDraws`.
        orders: of each client's samples ``[c, largest]``, its positives first.
        runs: the first positive and the number of positives of each ``[c]``; nobody holds all items.
        batch_size: samples in a step; a sample of a client's last batch fills up behind its own.
        samples: items and labels of the positives of all.
        negatives: of every positive.
        item_count: number of items, padding included.

    Returns:
        Items, labels, and the positive that each belongs to, ``[c, largest]`` each.
    """
    made = [torch.empty_like(orders) for _ in range(3)]
    arrays = [values.numpy() for values in (orders, *runs, *samples)]
    compiled(_drawn)(keys, *arrays, batch_size, negatives, item_count, *(values.numpy() for values in made))
    return made[0], made[1], made[2]


def _drawn(
    keys: NDArray[np.uint64],
    orders: Ids,
    starts: Ids,
    held: Ids,
    items: Ids,
    labels: Ids,
    batch_size: int,
    negatives: int,
    item_count: int,
    of_items: Ids,
    of_labels: Ids,
    of_rows: Ids,
) -> None:
    """See :func:`drawn_of_many`; words as of :func:`~recbole_fedkd.splitmix.mixed`."""
    golden, one, two = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
    first, second, third, half = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)
    taken = np.zeros(item_count, np.bool_)
    for client in range(len(keys)):
        start, own = starts[client], held[client]
        size = own * (1 + negatives)
        for row in range(start, start + own):
            taken[items[row]] = True
        for position in range(orders.shape[1]):
            sample = orders[client, position if position < size else (size - 1) // batch_size * batch_size]
            if sample < own:
                row = start + sample
                item, label = items[row], labels[row]
            else:
                sample -= own
                row, label, item = start + sample % own, 0, 0
                attempt = np.uint64(0)
                while item == 0 or taken[item]:
                    word = (keys[client] ^ attempt) + golden
                    for turn in range(2):
                        word = (word ^ (word >> first)) * one
                        word = (word ^ (word >> second)) * two
                        word ^= word >> third
                        if turn == 0:
                            word += np.uint64(sample) * golden
                    item = np.int64((((word >> half) * np.uint64(item_count - 1)) >> half) + np.uint64(1))
                    attempt += np.uint64(1)
            of_items[client, position], of_labels[client, position], of_rows[client, position] = item, label, row
        for row in range(start, start + own):
            taken[items[row]] = False


def touched_by_many(needed: Tensor, item_count: int) -> tuple[Tensor, Tensor]:
    """Which items clients need ``[c, n]``: those of each ``[c, rows]``, padding first and 0 behind, and how many ``[c]``."""
    items = torch.zeros(len(needed), min(needed.shape[1] + 1, item_count), dtype=torch.long)
    count = torch.ones(len(needed), dtype=torch.long)
    compiled(_touched)(needed.numpy(), np.zeros(item_count, np.int64), items.numpy(), count.numpy())
    return items[:, : int(count.max())].contiguous(), count


def _touched(needed: Ids, asked_by: Ids, items: Ids, count: Ids) -> None:
    """See :func:`touched_by_many`; ``asked_by``: zeros, one an item."""
    for client in range(len(needed)):
        taken = 1
        for column in range(needed.shape[1]):
            item = needed[client, column]
            if item > 0 and asked_by[item] != client + 1:
                asked_by[item] = client + 1
                items[client, taken] = item
                taken += 1
        count[client] = taken


def placed_by_many(items: Tensor, count: Tensor, asked: Tensor, item_count: int) -> Tensor:
    """Where among each client's ``items [c, rows]``, the first ``count [c]`` of them, ``asked [c, n]`` stand, which do."""
    places = torch.empty_like(asked)
    compiled(_placed)(items.numpy(), count.numpy(), asked.numpy(), np.zeros(item_count, np.int64), places.numpy())
    return places


def _placed(items: Ids, count: Ids, asked: Ids, place_of: Ids, places: Ids) -> None:
    """See :func:`placed_by_many`; ``place_of``: zeros, one an item."""
    for client in range(len(items)):
        for row in range(count[client]):
            place_of[items[client, row]] = row
        for sample in range(asked.shape[1]):
            places[client, sample] = place_of[asked[client, sample]]


def add_changes(items: Tensor, count: Tensor, rows: Tensor, base: Tensor, shares: Tensor, total: Tensor) -> None:
    """Add ``share_k (w_k - base)`` of the item rows of many clients to ``total [items, D]``.

    Args:
        items: of each client's rows ``[c, rows]``.
        count: rows of each ``[c]``.
        rows: ``w [c, rows, D]``.
        base: ``[items, D]``.
        shares: ``[c]``, in double precision.
        total: changed in place.
    """
    compiled(_add_changes)(*(values.numpy() for values in (items, count, rows, base, shares.to(rows.dtype), total)))


def _add_changes(items: Ids, count: Ids, rows: Table, base: Table, shares: Table, total: Table) -> None:
    for client in range(len(items)):
        share = shares[client]
        for row in range(count[client]):
            item = items[client, row]
            own, common, sums = rows[client, row], base[item], total[item]
            for column in range(len(sums)):
                sums[column] += share * (own[column] - common[column])


def changes_of_many(own: Tensor, base: Tensor, shares: Tensor) -> Tensor:
    """``sum_k share_k (w_k - base)`` of many clients' ``own [c, P]``, and ``shares [c]``; in double precision ``[P]``."""
    total = torch.zeros(len(base), dtype=torch.float64)
    compiled(_changes)(*(values.numpy() for values in (own, base, shares.double(), total)))
    return total


def _changes(own: Table, base: Table, shares: Losses, total: Losses) -> None:
    """See :func:`changes_of_many`."""
    for client in range(len(own)):
        share, row = shares[client], own[client]
        for column in range(len(total)):
            total[column] += share * np.float64(row[column] - base[column])


def of_other_rows(fold: FoldedUsers) -> tuple[Tensor, Tensor]:
    """:meth:`FoldedUsers.of_rows`, of :data:`LANES` rows side by side: their matrices are too small for a library."""
    rows, size = fold.rows, fold.vectors.shape[1]
    (i, j), root = torch.tril_indices(size, size), fold.uncertainty.root
    outer = root[i] * root[j]
    means, shares = torch.empty_like(rows.values), torch.empty_like(rows.values)
    of_users = fold.precision.numpy(), fold.weighted.numpy()
    for part in fold.parts():
        items = rows.items[part]
        spread = outer @ fold.uncertainty.scales[items].T
        made = (spread, rows.users[part], rows.values[part], fold.vectors[items], means[part], shares[part])
        *given, mean, share = (values.numpy() for values in made)
        compiled(_of_other_rows, "numpy")(*of_users, *given, float(fold.noise), mean, share)
        means[part], shares[part] = torch.from_numpy(mean), torch.from_numpy(share)
    return means, shares


def _of_other_rows(
    precision: Losses,
    weighted: Losses,
    spread: Losses,
    users: Ids,
    values: Losses,
    vectors: Losses,
    noise: float,
    means: Losses,
    shares: Losses,
) -> None:
    """See :func:`of_other_rows`; ``spread``: lower triangle of every row's ``S_i``, ``[k (k + 1) / 2, n]``.

    A user's precision without a row is turned into its inverse, with the other sign, by sweeping one column after another.
    """
    size = vectors.shape[1]
    left, column = np.empty((len(spread), LANES)), np.empty((size, LANES))
    vector, pull, mean = np.empty((size, LANES)), np.empty((size, LANES)), np.empty((size, LANES))
    factor, total = np.empty(LANES), np.empty(LANES)
    for begin in range(0, len(users), LANES):
        for lane in range(LANES):
            row = min(begin + lane, len(users) - 1)
            user, entry = users[row], 0
            for i in range(size):
                vector[i, lane], mean[i, lane] = vectors[row, i], 0.0
                pull[i, lane] = weighted[user, i] - vectors[row, i] * values[row] / noise
                for j in range(i + 1):
                    own = spread[entry, row] + vectors[row, i] * vectors[row, j]
                    left[entry, lane] = precision[user, i, j] - own / noise
                    entry += 1
        for p in range(size):
            first = p * (p + 1) // 2
            for i in range(size):
                entry = first + i if i < p else i * (i + 1) // 2 + p
                for lane in range(LANES):
                    column[i, lane] = left[entry, lane]
            for lane in range(LANES):
                factor[lane] = 1.0 / column[p, lane]
            entry = 0
            for i in range(size):
                for lane in range(LANES):
                    total[lane] = column[i, lane] * factor[lane]
                for j in range(i + 1):
                    into, other = left[entry], column[j]
                    for lane in range(LANES):
                        into[lane] -= total[lane] * other[lane]
                    entry += 1
            for i in range(size):
                into = left[first + i if i < p else i * (i + 1) // 2 + p]
                for lane in range(LANES):
                    into[lane] = column[i, lane] * factor[lane] if i != p else -factor[lane]
        entry = 0
        for i in range(size):
            for j in range(i + 1):
                for lane in range(LANES):
                    mean[i, lane] -= left[entry, lane] * pull[j, lane]
                    if i != j:
                        mean[j, lane] -= left[entry, lane] * pull[i, lane]
                entry += 1
        entry = 0
        for lane in range(LANES):
            factor[lane], total[lane] = 0.0, 0.0
        for i in range(size):
            for lane in range(LANES):
                factor[lane] += vector[i, lane] * mean[i, lane]
            for j in range(i + 1):
                times = 1.0 if i == j else 2.0
                for lane in range(LANES):
                    row = min(begin + lane, len(users) - 1)
                    second = mean[i, lane] * mean[j, lane] - left[entry, lane]
                    along = vector[i, lane] * vector[j, lane] * left[entry, lane]
                    total[lane] += times * (spread[entry, row] * second - along)
                entry += 1
        for lane in range(min(LANES, len(users) - begin)):
            means[begin + lane], shares[begin + lane] = factor[lane], total[lane] / noise
