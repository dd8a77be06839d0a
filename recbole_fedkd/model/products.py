"""Products of small matrices inside compiled loops, near the speed at which a core multiplies; they need numba.

numba's own products call a library, which takes as long to begin as these take to end. Here sums stay in the processor's
registers while their terms are added: a tile of some rows and columns of the result, as large as there are registers for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numpy.lib.stride_tricks import as_strided

from recbole_fedkd.model.compiled import LANES, ROWS, Table
from recbole_fedkd.model.vectors import (
    element,
    everywhere,
    inlined,
    larger,
    load,
    load_rows,
    part,
    spread,
    store,
    store_rows,
)

LARGE = bool(get_host_cpu_features().get("avx512f"))
"""Whether the processor has registers for the sums of 16 rows of LANES numbers, else for those of ROWS."""

NO_LEAST = np.float32(-np.inf)
"""The least value of a product that is not rectified."""


@part
def product(out: Table, start: Table, left: Table, right: Table, least: np.float32) -> None:
    """Fill ``out [rows, columns]`` with ``start + left [rows, depth] @ right [depth, columns]``, at ``least`` something.

    Numbers of a row lie side by side in each; rows may overlap, and those of ``start`` may be one. A ``start [rows]`` is the
    same in all columns. Columns are a multiple of LANES.
    """
    _fill(out, start, left, right, least, _step(left), 1)


@part
def transposed_product(out: Table, start: Table, left: Table, right: Table, least: np.float32) -> None:
    """:func:`product` of ``left [depth, rows]``, transposed."""
    _fill(out, start, left, right, least, 1, _step(left))


@part
def view(table: Table, first: int, rows: int, columns: int, step: int) -> Table:
    """Rows of a table's numbers, a row every ``step`` of them, from the table's row ``first`` on."""
    return as_strided(table[first:].reshape(-1), (rows, columns), (step * 4, 4))


@inlined
def _step(table: Table) -> int:
    """Numbers from one row to the next."""
    return table.strides[0] // 4


@inlined
def _fill(out: Table, start: Table, left: Table, right: Table, least: np.float32, down: int, along: int) -> None:
    """:func:`product` of a ``left`` whose next row is ``down`` numbers on, and the next term of a row ``along``."""
    rows, columns = out.shape
    column = 0
    while column < columns:
        row, together = 0, LANES
        if LARGE and column + 4 * LANES <= columns:
            together = 4 * LANES
            while row + ROWS <= rows:
                _four(out, start, left, right, least, down, along, row, column, 0, LANES)
                row += ROWS
        while LARGE and row + 4 * ROWS <= rows:
            _four(out, start, left, right, least, down, along, row, column, ROWS, 0)
            row += 4 * ROWS
        while row + ROWS <= rows:
            _one(out, start, left, right, least, down, along, row, column)
            row += ROWS
        while row < rows:
            for next_column in range(column, column + together, LANES):
                _single(out, start, left, right, least, down, along, row, next_column)
            row += 1
        column += together


@inlined
def _four(
    out: Table,
    start: Table,
    left: Table,
    right: Table,
    least: np.float32,
    down: int,
    along: int,
    row: int,
    column: int,
    lower: int,
    further: int,
) -> None:
    """Fill four times ROWS rows of LANES columns; each is so many rows lower and columns further than the one before."""
    a, b = _begin(start, row, column), _begin(start, row + lower, column + further)
    c, d = _begin(start, row + 2 * lower, column + 2 * further), _begin(start, row + 3 * lower, column + 3 * further)
    for k in range(len(right)):
        p, q, step = row * down + k * along, column + k * _step(right), lower * down
        a = a + spread(left, p, down) * load(right, q)
        b = b + spread(left, p + step, down) * load(right, q + further)
        c = c + spread(left, p + 2 * step, down) * load(right, q + 2 * further)
        d = d + spread(left, p + 3 * step, down) * load(right, q + 3 * further)
    _end(a, out, row, column, least)
    _end(b, out, row + lower, column + further, least)
    _end(c, out, row + 2 * lower, column + 2 * further, least)
    _end(d, out, row + 3 * lower, column + 3 * further, least)


@inlined
def _one(
    out: Table,
    start: Table,
    left: Table,
    right: Table,
    least: np.float32,
    down: int,
    along: int,
    row: int,
    column: int,
) -> None:
    """Fill ROWS rows of LANES columns."""
    sums = _begin(start, row, column)
    for k in range(len(right)):
        sums = sums + spread(left, row * down + k * along, down) * load(right, column + k * _step(right))
    _end(sums, out, row, column, least)


@inlined
def _single(
    out: Table,
    start: Table,
    left: Table,
    right: Table,
    least: np.float32,
    down: int,
    along: int,
    row: int,
    column: int,
) -> None:
    """Fill one row of LANES columns."""
    sums = everywhere(element(start, row)) if start.ndim == 1 else load(start, row * _step(start) + column)
    for k in range(len(right)):
        sums = sums + everywhere(element(left, row * down + k * along)) * load(right, column + k * _step(right))
    store(larger(sums, everywhere(least)), out, row * _step(out) + column)


@inlined
def _begin(start: Table, row: int, column: int) -> Any:
    if start.ndim == 1:
        return spread(start, row, 1)
    return load_rows(start, row * _step(start) + column, _step(start))


@inlined
def _end(sums: Any, out: Table, row: int, column: int, least: np.float32) -> None:
    store_rows(larger(sums, everywhere(least)), out, row * _step(out) + column, _step(out))
