"""Loops in compiled code, where numba is installed: what torch does in a dozen passes through memory is done in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Table = NDArray[np.float32]
Ids = NDArray[np.int64]
Losses = NDArray[np.float64]

LARGE = 1e200
"""What a product of numbers up to 2 may come to."""

ROUNDING = {"reassoc", "contract", "arcp", "nsz"}
"""What the compiler may do to sums and products; what is not a number stays what it is."""


@cache
def compiled(function: Callable[..., None]) -> Callable[..., None] | None:
    """A function of arrays and numbers in machine code, which leaves Python's lock; None where numba is not installed."""
    try:
        from numba import njit
    except ImportError:
        return None
    made: Any
    try:
        made = njit(function, nogil=True, fastmath=ROUNDING, cache=True)
    except RuntimeError:  # there is no folder to keep it in
        made = njit(function, nogil=True, fastmath=ROUNDING)
    return made  # type: ignore[no-any-return]


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
) -> Tensor | None:
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
        Loss of each, summed over its samples ``[c]``, in double precision; None without a compiler.
    """
    run = compiled(_steps)
    if run is None:
        return None
    losses, counts = np.zeros(len(sizes)), np.asarray(sizes, dtype=np.int64)
    tables = [table.numpy() for table in (of_user, of_item)]
    columns = [rate.float().numpy() for rate in rates]
    run(*tables, *columns, *places, users.numpy(), items.numpy(), labels.numpy(), counts, batch_size, losses)
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
                for place in range(width):
                    score += one[place] * other[place]
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
                for place in range(width):
                    gradient[place] += error * other[place]
                if user_bias >= 0:
                    gradients[user, user_bias] += error
            for sample in range(count):
                item, error = items[client, begin + sample], errors[sample]
                other = of_item[client, item, item_vector]
                if several:
                    one = of_user[client, users[client, begin + sample], user_vector]
                for place in range(width):
                    other[place] -= vector_rates[place] * error * one[place]
                if item_bias >= 0:
                    of_item[client, item, item_bias] -= item_rates[item_bias] * error
            for sample in range(count if several else 1):
                user = users[client, begin + sample if several else 0]
                for place in range(len(user_rates)):
                    of_user[client, user, place] -= user_rates[place] * gradients[user, place]
                    gradients[user, place] = 0.0
        losses[client] = total + math.log(product)
