"""Products of small matrices whose sums stay in the processor's registers, as parts of compiled loops.

numba makes vectors of a plain loop, but brings every partial sum to memory and back, and libraries are as fast on large
matrices alone, or on one maker's processors. :func:`multiply` is for matrices of :data:`WIDTH` columns, which lie in the cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.model.compiled import Table, compiled

WIDTH = 64
"""Columns of a block: as many items, or samples, side by side in memory."""

NO_LEAST = np.float32(-np.inf)
"""The least value of a product that is not rectified."""


@cache
def vectors() -> tuple[int, int]:
    """Numbers in a vector, and rows of two vectors each whose sums fit the registers of this processor."""
    import llvmlite.binding

    return (16, 8) if llvmlite.binding.get_host_cpu_features().get("avx512f", False) else (8, 4)


def packed(weight: Tensor) -> Tensor:
    """``[..., outputs, inputs]`` as :func:`multiply` reads it ``[..., panels, inputs, rows]``, filled up with zeros."""
    rows = vectors()[1]
    filled = functional.pad(weight, (0, 0, 0, -weight.shape[-2] % rows))
    panels: Tensor = filled.unflatten(-2, (-1, rows)).transpose(-1, -2).contiguous()
    return panels


def filled_up(bias: Tensor) -> Tensor:
    """``[..., outputs]`` with zeros behind, as many as :func:`packed` adds."""
    return functional.pad(bias, (0, -bias.shape[-1] % vectors()[1]))


def blocks(values: Tensor) -> Tensor:
    """``[..., columns]`` as blocks ``[blocks, ..., WIDTH]``, the last filled up with zeros."""
    filled = functional.pad(values, (0, -values.shape[-1] % WIDTH))
    made: Tensor = filled.unflatten(-1, (-1, WIDTH)).movedim(-2, 0).contiguous()
    return made


def product(weight: Tensor, columns: Tensor) -> Tensor:
    """``weight [outputs, inputs] @ columns [inputs, columns]``, each column the same bits whichever stand beside it."""
    register()
    panels, columns_in = packed(weight), blocks(columns)
    out = columns.new_empty(len(columns_in), panels.shape[0] * panels.shape[2], WIDTH)
    arrays = (tensor.detach().numpy() for tensor in (panels, columns_in, torch.zeros(out.shape[1]), out))
    compiled(_product, "numpy", multiply)(*arrays)
    return out.movedim(0, 1).flatten(1)[: len(weight), : columns.shape[1]]


def _product(panels: Table, columns: Table, zeros: Table, out: Table) -> None:
    for block in range(len(columns)):
        shape = out.shape[1], columns.shape[1], columns.shape[1]
        multiply(panels, 0, shape, columns[block], 0, zeros, 0, NO_LEAST, out[block], 0)


def multiply(
    panels: Table,
    at: int,
    shape: tuple[int, int, int],
    columns: Table,
    columns_at: int,
    bias: Table,
    bias_at: int,
    least: np.float32,
    out: Table,
    out_at: int,
) -> None:
    """``max(least, bias + weight @ columns)``, as a part of loops, in which it is compiled.

    All arrays are read as if they were flat, from a place on. Outputs are filled up to whole panels, so that ``out`` has rows
    behind the last, which hold anything afterwards.

    Args:
        panels: a weight as :func:`packed` makes it, from ``at`` on.
        shape: outputs; inputs that are read; inputs that there are.
        columns: ``[inputs, WIDTH]``, from ``columns_at`` on.
        bias: of all outputs, filled up, from ``bias_at`` on.
        least: 0 rectifies.
        out: ``[outputs, WIDTH]``, from ``out_at`` on.
    """
    outputs, inputs, all_inputs = shape
    rows = panels.shape[-1]
    for first in range(0, outputs, rows):
        tile(
            panels,
            at + first * all_inputs,
            inputs,
            columns,
            columns_at,
            bias,
            bias_at + first,
            least,
            out,
            out_at + first * WIDTH,
        )


def tile(*arguments: Any) -> None:
    """One panel of :func:`multiply`; :func:`register` tells the compiler what it is."""
    raise NotImplementedError("it is a part of compiled loops")


@cache
def register() -> None:
    """Have the compiler know :func:`tile`."""
    from llvmlite import ir
    from numba.core import types
    from numba.extending import lower_builtin, type_callable

    lanes, rows = vectors()
    number, integer = ir.FloatType(), ir.IntType(64)
    vector = ir.VectorType(number, lanes)

    @type_callable(tile)
    def _typed(context: Any) -> Any:
        def typer(panels, at, inputs, columns, columns_at, bias, bias_at, least, out, out_at):  # type: ignore[no-untyped-def]
            whole = types.intp
            return types.none(panels, whole, whole, columns, whole, bias, whole, types.float32, out, whole)

        return typer

    array, whole = types.Array, types.intp

    @lower_builtin(tile, array, whole, whole, array, whole, array, whole, types.float32, array, whole)  # type: ignore[untyped-decorator]
    def _lowered(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def begin(argument: int) -> Any:
            kind = signature.args[argument]
            data = context.make_array(kind)(context, builder, arguments[argument]).data
            return builder.gep(data, [arguments[argument + 1]])

        def whole_number(value: int) -> Any:
            return ir.Constant(integer, value)

        def spread(value: Any) -> Any:
            nothing = ir.Constant(vector, ir.Undefined)
            one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))

        def at_vector(pointer: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())

        weights, columns, bias, out = begin(0), begin(3), begin(5), begin(8)
        inputs, least = arguments[2], spread(arguments[7])
        for column in range(0, WIDTH, 2 * lanes):
            start, head = builder.block, builder.append_basic_block("head")
            body, done = builder.append_basic_block("body"), builder.append_basic_block("done")
            own = [spread(builder.load(builder.gep(bias, [whole_number(row)]))) for row in range(rows)]
            builder.branch(head)
            builder.position_at_end(head)
            number_of = builder.phi(integer)
            number_of.add_incoming(whole_number(0), start)
            sums = [[builder.phi(vector), builder.phi(vector)] for _ in range(rows)]
            for row in range(rows):
                for total in sums[row]:
                    total.add_incoming(own[row], start)
            builder.cbranch(builder.icmp_signed("<", number_of, inputs), body, done)
            builder.position_at_end(body)
            row_at = builder.mul(number_of, whole_number(WIDTH))
            read = [
                builder.load(at_vector(columns, builder.add(row_at, whole_number(column + half * lanes))), align=4)
                for half in range(2)
            ]
            panel = builder.gep(weights, [builder.mul(number_of, whole_number(rows))])
            for row in range(rows):
                weight = spread(builder.load(builder.gep(panel, [whole_number(row)])))
                for half in range(2):
                    product = builder.fmul(weight, read[half], flags=("contract",))
                    sums[row][half].add_incoming(builder.fadd(product, sums[row][half], flags=("contract",)), body)
            number_of.add_incoming(builder.add(number_of, whole_number(1)), body)
            builder.branch(head)
            builder.position_at_end(done)
            for row in range(rows):
                for half in range(2):
                    # Of what is not a number nothing is made that is one.
                    below = builder.fcmp_ordered(">", least, sums[row][half])
                    kept = builder.select(below, least, sums[row][half])
                    where = at_vector(out, whole_number(row * WIDTH + column + half * lanes))
                    builder.store(kept, where, align=4)
        return context.get_dummy_value()
