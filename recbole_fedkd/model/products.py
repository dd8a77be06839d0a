"""Products of small matrices inside compiled loops, near the speed at which a core multiplies.

numba's own products call a library, which takes as long to begin as these take to end. Here sums stay in the processor's
registers while their terms are added: a tile of some rows and columns of the result, as large as there are registers for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from recbole_fedkd.model.compiled import ROUNDING, Table

STEP = 4
"""Terms of a sum at a time: a row's address is found once for all of them."""


@cache
def lanes() -> int:
    """Numbers in a register of the processor; columns of what is multiplied are filled up to a multiple of it."""
    from llvmlite.binding import get_host_cpu_features

    return 16 if get_host_cpu_features().get("avx512f") else 8


def product(out: Table, start: Table, left: Table, right: Table, least: np.float32) -> None:
    """Fill ``out [rows, columns]`` with ``start + left [rows, depth] @ right [depth, columns]``, at ``least`` something.

    Numbers of a row lie side by side in each; rows may overlap, and those of ``start`` may be one. Columns are a multiple of
    :func:`lanes`, the depth is one of :data:`STEP`.
    """
    total = start + left @ right
    out[:] = np.where(total < least, least, total)


def transposed_product(out: Table, start: Table, left: Table, right: Table, least: np.float32) -> None:
    """:func:`product` of ``left [depth, rows]``, transposed; the depth is any."""
    product(out, start, left.T, right, least)


@cache
def compile_products() -> None:
    """Let compiled functions call both; before it numba does not know them."""
    from numba.extending import overload

    # Of 32 or 16 registers a quarter is left for the terms.
    room = 24 if lanes() == 16 else 12
    for function in (product, transposed_product):
        panels = [_panel(vectors, room // vectors, function is transposed_product) for vectors in (4, 2, 1)]
        overload(function, jit_options={"fastmath": ROUNDING})(_overloaded(lanes(), *panels))


def _overloaded(width: int, four: Callable[..., None], two: Callable[..., None], one: Callable[..., None]) -> Any:
    """How numba compiles a product: columns four, two or one register at a time."""

    def filled(out: Table, start: Table, left: Table, right: Table, least: np.float32) -> None:
        column = 0
        while column < out.shape[1]:
            registers = (out.shape[1] - column) // width
            if registers >= 4:
                four(out, start, left, right, least, column)
                column += 4 * width
            elif registers >= 2:
                two(out, start, left, right, least, column)
                column += 2 * width
            else:
                one(out, start, left, right, least, column)
                column += width

    def called(out: Table, start: Table, left: Table, right: Table, least: np.float32) -> None:
        return filled  # type: ignore[return-value]

    return called


def _panel(vectors: int, rows: int, transposed: bool) -> Callable[..., None]:
    """A function that fills all rows of some columns: so many at a time, then a third of them, then one."""
    from numba.extending import register_jitable

    third = rows // 3
    many, some, single = (_tile(count, vectors, transposed) for count in (rows, third, 1))

    def panel(out: Table, start: Table, left: Table, right: Table, least: np.float32, column: int) -> None:
        row = 0
        while row + rows <= out.shape[0]:
            many(out, start, left, right, least, row, column)
            row += rows
        while row + third <= out.shape[0]:
            some(out, start, left, right, least, row, column)
            row += third
        while row < out.shape[0]:
            single(out, start, left, right, least, row, column)
            row += 1

    made: Callable[..., None] = register_jitable(fastmath=ROUNDING)(panel)
    return made


def _tile(rows: int, vectors: int, transposed: bool) -> Any:
    """An instruction of numba's: fill ``rows`` x ``vectors`` registers of the result, from a row and a column on."""
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    number, byte, size = ir.FloatType(), ir.IntType(8).as_pointer(), ir.IntType(64)
    vector, bytes_of_number = ir.VectorType(number, lanes()), 4
    spread = ir.Constant(ir.VectorType(ir.IntType(32), lanes()), [0] * lanes())
    nothing, flags = ir.Constant(vector, ir.Undefined), ("contract", "reassoc", "nsz")
    across, down, steps = range(vectors), range(rows), 1 if transposed else STEP

    def generated(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def array(number: int) -> tuple[Any, Any, Any]:
            """Address, bytes from row to row, and number of rows."""
            made = context.make_array(signature.args[number])(context, builder, arguments[number])
            strides, shape = (cgutils.unpack_tuple(builder, member) for member in (made.strides, made.shape))
            return builder.bitcast(made.data, byte), strides[0], shape[0]

        def moved(address: Any, count: Any, stride: Any = bytes_of_number) -> Any:
            count, stride = (value if isinstance(value, ir.Value) else size(value) for value in (count, stride))
            return builder.gep(address, [builder.mul(count, stride)])

        def loaded(address: Any, kind: Any = vector) -> Any:
            return builder.load(builder.bitcast(address, kind.as_pointer()), align=bytes_of_number)

        def everywhere(value: Any) -> Any:
            first = builder.insert_element(nothing, value, ir.IntType(32)(0))
            return builder.shuffle_vector(first, nothing, spread)

        (out, out_stride, _), (start, start_stride, _), (left, left_stride, _), (right, right_stride, depth) = map(
            array, range(4)
        )
        least, row, column = arguments[4:]
        out, start = (
            moved(moved(address, row, stride), column) for address, stride in ((out, out_stride), (start, start_stride))
        )
        right, left = moved(right, column), moved(left, row) if transposed else moved(left, row, left_stride)
        # What is allocated here the compiler keeps in registers.
        sums = [
            [
                cgutils.alloca_once_value(builder, loaded(moved(moved(start, i, start_stride), j * lanes())))
                for j in across
            ]
            for i in down
        ]
        with cgutils.for_range_slice(builder, size(0), depth, size(steps), intp=size) as (k, _):
            terms = moved(left, k, left_stride) if transposed else moved(left, k)
            firsts = [moved(terms, i) if transposed else moved(terms, i, left_stride) for i in down]
            for step in range(steps):
                line = moved(moved(right, k, right_stride), step, right_stride)
                factors = [loaded(moved(line, j * lanes())) for j in across]
                for i in down:
                    factor = everywhere(loaded(moved(firsts[i], step), number))
                    for j in across:
                        term = builder.fmul(factor, factors[j], flags=flags)
                        builder.store(builder.fadd(builder.load(sums[i][j]), term, flags=flags), sums[i][j])
        for i in down:
            for j in across:
                total = builder.load(sums[i][j])
                # What is not a number stays what it is.
                total = builder.select(builder.fcmp_ordered("<", total, everywhere(least)), everywhere(least), total)
                target = builder.bitcast(moved(moved(out, i, out_stride), j * lanes()), vector.as_pointer())
                builder.store(total, target, align=bytes_of_number)
        return context.get_dummy_value()

    def tile(
        typing: Any, out: Any, start: Any, left: Any, right: Any, least: Any, row: Any, column: Any
    ) -> tuple[Any, Any]:
        return types.void(out, start, left, right, types.float32, types.intp, types.intp), generated

    return intrinsic(tile)
