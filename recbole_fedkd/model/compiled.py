"""Machine code made by numba, where it is installed: what torch does in a dozen passes through memory is done in one.

Whoever calls it has another way where :func:`has_compiler` says no, and for tensors of a GPU. Here are the loops of a full
ranking; those of the fleet are in ``engine/fleet/compiled.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Table = NDArray[np.float32]
Ids = NDArray[np.int64]

ROUNDING = {"reassoc", "contract", "arcp", "nsz"}
"""What the compiler may do to sums and products; what is not a number stays what it is."""

TILE = 512
"""Items at a time in a loop: what it needs of them stays in the processor's cache."""

HIDDEN = np.float32(-1e30)
"""Score of a key that an item does not see."""


@cache
def has_compiler() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


@cache
def compiled(
    function: Callable[..., None], errors: str = "python", *helpers: Callable[..., Any]
) -> Callable[..., None]:
    """A function of arrays and numbers in machine code, which leaves Python's lock.

    Args:
        function: is compiled, and kept where there is a folder for it.
        errors: whose rules hold where something is divided by zero, Python's or numpy's.
        helpers: functions that it calls.
    """
    from numba import njit

    for helper in helpers:
        _compiled_inside(helper)
    options: Any = {"nogil": True, "fastmath": ROUNDING, "error_model": errors}
    made: Any
    try:
        made = njit(function, cache=True, **options)
    except RuntimeError:  # there is no folder to keep it in
        made = njit(function, **options)
    return made  # type: ignore[no-any-return]


@cache
def _compiled_inside(helper: Callable[..., Any]) -> None:
    from numba.extending import register_jitable

    register_jitable(fastmath=ROUNDING, error_model="numpy")(helper)


def exponential(x: np.float32) -> np.float32:
    """``e^x`` of ``x <= 0``, as a part of loops, in which it is compiled; of less than -87, that of -87."""
    # e^x = 2^n e^r, with r within half of log 2: a polynomial, and n in the place of a number's exponent.
    x = max(x, np.float32(-87.0))
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.69314718)
    p = np.float32(1.9875691e-4) * r + np.float32(1.3981999e-3)
    p = (p * r + np.float32(8.3334519e-3)) * r + np.float32(4.1665796e-2)
    p = (p * r + np.float32(1.6666665e-1)) * r + np.float32(0.5)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + np.float32(1.0)) * power  # type: ignore[no-any-return]


def mean_of_heads(scores: Tensor, added: Tensor, past: Tensor, oldest: int, first: int, weights: Tensor) -> None:
    """Attention of each head, a softmax over the keys, averaged over the heads.

    Args:
        scores: ``[keys, heads, items]``, overwritten.
        added: to the scores of all items ``[keys, heads]``.
        past: item of each key ``[keys]``, which does not see itself, 0: nobody sees it; empty: everybody sees all keys.
        oldest: number of the key that only items see which do not see themselves.
        first: the first item's number.
        weights: ``[keys, items]``, filled; 0 where an item sees no key.
    """
    arrays = scores.numpy(), added.numpy(), past.numpy()
    compiled(_mean_of_heads, "numpy", exponential)(*arrays, oldest, first, weights.numpy())


def _mean_of_heads(scores: Table, added: Table, past: Ids, oldest: int, first: int, weights: Table) -> None:
    """See :func:`mean_of_heads`."""
    keys, heads, width = scores.shape
    most, total, unless_held = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for begin in range(0, width, TILE):
        size = min(TILE, width - begin)
        least, m, t = first + begin, most[:size], total[:size]
        unless_held[:] = HIDDEN
        for key in range(len(past)):
            if past[key] > 0 and least <= past[key] < least + size:
                unless_held[past[key] - least] = 0.0
        for head in range(heads):
            for key in range(len(past)):
                row, item = scores[key, head][begin : begin + size], past[key]
                if item == 0:
                    for i in range(size):
                        row[i] = HIDDEN
                elif key == oldest:
                    for i in range(size):
                        row[i] += unless_held[i]
                if item > 0 and least <= item < least + size:
                    row[item - least] = HIDDEN
            for i in range(size):
                m[i], t[i] = HIDDEN, np.float32(0.0)
            for key in range(keys):
                row, more = scores[key, head][begin : begin + size], added[key, head]
                for i in range(size):
                    m[i] = max(m[i], row[i] + more)
            for key in range(keys):
                row, more = scores[key, head][begin : begin + size], added[key, head]
                for i in range(size):
                    row[i] = exponential(row[i] + more - m[i])
                    t[i] += row[i]
            for i in range(size):
                t[i] = np.float32(1.0) / (t[i] * np.float32(heads)) if m[i] > np.float32(-1e29) else np.float32(0.0)
            for key in range(keys):
                row, mean = scores[key, head][begin : begin + size], weights[key][begin : begin + size]
                if head == 0:
                    for i in range(size):
                        mean[i] = row[i] * t[i]
                else:
                    for i in range(size):
                        mean[i] += row[i] * t[i]


def pooled(weights: Tensor, fields: Tensor, first: int, varying: Tensor, out: Tensor) -> None:
    """Weighted sum of fields ``[fields, d, all items]``, from the first item on, and of others ``[others, d, items]``.

    ``weights``: ``[fields + others + ..., items]``. ``out``: ``[d, items]``, filled.
    """
    compiled(_pooled)(weights.numpy(), fields.numpy(), first, varying.numpy(), out.numpy())


def _pooled(weights: Table, fields: Table, first: int, varying: Table, out: Table) -> None:
    """See :func:`pooled`."""
    width = out.shape[1]
    for channel in range(len(out)):
        sums = out[channel]
        for i in range(width):
            sums[i] = 0.0
        for place in range(len(fields) + len(varying)):
            share = weights[place]
            of_items = place < len(fields)
            row = fields[place, channel][first:] if of_items else varying[place - len(fields), channel]
            for i in range(width):
                sums[i] += share[i] * row[i]


def rectified(
    own: Tensor, which: Tensor, made: Tensor, of_items: tuple[Tensor, Tensor], first: int, out: Tensor
) -> None:
    """``max(0, own_p + made_which(p) + items_of(p))`` of outputs ``p``.

    Args:
        own: of every output ``[outputs]``.
        which: the row of ``made`` of every output ``[outputs]``.
        made: ``[rows, items]``.
        of_items: the row of every output ``[outputs]``, -1: there is none; and the rows ``[rows, all items]``.
        first: the first item's number.
        out: ``[outputs, items]``, filled; may be ``made``, where each output has a row of its own.
    """
    arrays = [each.numpy() for each in (own, which, made, *of_items)]
    compiled(_rectified)(*arrays, first, out.numpy())


def _rectified(own: Table, which: Ids, made: Table, row_of: Ids, items: Table, first: int, out: Table) -> None:
    """See :func:`rectified`."""
    width = out.shape[1]
    for output in range(len(out)):
        into, row, more = out[output], made[which[output]], own[output]
        if row_of[output] < 0:
            for i in range(width):
                into[i] = max(row[i] + more, np.float32(0.0))
        else:
            known = items[row_of[output]][first : first + width]
            for i in range(width):
                into[i] = max(row[i] + more + known[i], np.float32(0.0))
