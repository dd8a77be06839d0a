"""Numbers side by side as values of compiled code, which stay in the processor's registers from one step to the next.

A :class:`Rows` is one row of :data:`LANES` numbers, or :data:`ROWS` of them; one and many together are many. ``+``, ``-`` and
``*`` are those of each number. Arrays have to be contiguous, and places in them count all of their numbers, whatever their
shape: none is checked. Only compiled functions can call what is here; the module needs numba.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.extending import models, overload, register_jitable, register_model

from recbole_fedkd.model.compiled import LANES, ROUNDING, ROWS

intrinsic: Any = extending.intrinsic

part: Callable[[Callable[..., Any]], Callable[..., Any]] = register_jitable(fastmath=ROUNDING, error_model="numpy")
"""Has compiled functions call a function; with :data:`inlined` its instructions are among theirs."""

inlined: Callable[[Callable[..., Any]], Callable[..., Any]] = register_jitable(
    fastmath=ROUNDING, error_model="numpy", forceinline=True
)

# A processor of narrower registers takes two or four for a row.
NUMBER, INTEGER = ir.FloatType(), ir.IntType(32)
ROW, INTEGERS = ir.VectorType(NUMBER, LANES), ir.VectorType(INTEGER, LANES)
FLAGS = "contract", "reassoc", "nsz"
"""What the compiler may do to sums and products; what is not a number stays what it is."""


class Rows(types.Type):
    """The type of one row or of many."""

    def __init__(self, count: int) -> None:
        super().__init__(name=f"Rows{count}")
        self.count = count


class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Rows) -> None:
        super().__init__(manager, kind, ir.ArrayType(ROW, kind.count))


register_model(Rows)(_Model)
ONE, MANY, PLACE = Rows(1), Rows(ROWS), types.intp


def _apart(builder: Any, value: Any) -> list[Any]:
    """The rows of a value."""
    return [builder.extract_value(value, row) for row in range(value.type.count)]


def _together(builder: Any, rows: Sequence[Any]) -> Any:
    """A value of these rows."""
    value = ir.Constant(ir.ArrayType(ROW, len(rows)), ir.Undefined)
    for number, row in enumerate(rows):
        value = builder.insert_value(value, row, number)
    return value


def _same(value: float) -> Any:
    return ir.Constant(ROW, [value] * LANES)


def _places(places: Iterable[int]) -> Any:
    """Where every lane comes from; places of a second row lie behind those of the first."""
    return ir.Constant(INTEGERS, list(places))


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any, row: int = 0, step: Any = None) -> Any:
    """Of a number, so many rows of ``step`` numbers behind a place."""
    made = context.make_array(kind)(context, builder, array)
    if row:
        index = builder.add(index, builder.mul(step, step.type(row)))
    return builder.gep(made.data, [index])


def _read(context: Any, builder: Any, *address: Any) -> Any:
    return builder.load(builder.bitcast(_address(context, builder, *address), ROW.as_pointer()), align=4)


def _write(context: Any, builder: Any, row: Any, *address: Any) -> None:
    builder.store(row, builder.bitcast(_address(context, builder, *address), ROW.as_pointer()), align=4)


def _filled(builder: Any, number: Any) -> Any:
    nothing = ir.Constant(ROW, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, number, INTEGER(0)), nothing, _places([0] * LANES))


def _of_one(typing: Any, array: Any, index: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _together(builder, [_read(context, builder, signature.args[0], *values)])

    return ONE(array, PLACE), generated


def _of_many(typing: Any, array: Any, index: Any, step: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, index, step = values
        address = context, builder, signature.args[0], array, index
        return _together(builder, [_read(*address, row, step) for row in range(ROWS)])

    return MANY(array, PLACE, PLACE), generated


def _to_one(typing: Any, rows: Any, array: Any, index: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _write(context, builder, *_apart(builder, values[0]), signature.args[1], *values[1:])
        return context.get_dummy_value()

    return types.void(ONE, array, PLACE), generated


def _to_many(typing: Any, rows: Any, array: Any, index: Any, step: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value, array, index, step = values
        for number, row in enumerate(_apart(builder, value)):
            _write(context, builder, row, signature.args[1], array, index, number, step)
        return context.get_dummy_value()

    return types.void(MANY, array, PLACE, PLACE), generated


def _element(typing: Any, array: Any, index: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], *values))

    return array.dtype(array, PLACE), generated


def _everywhere(typing: Any, number: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _together(builder, [_filled(builder, *values)])

    return ONE(types.float32), generated


def _spread(typing: Any, array: Any, index: Any, step: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, index, step = values
        address = context, builder, signature.args[0], array, index
        numbers = [builder.load(_address(*address, row, step)) for row in range(ROWS)]
        return _together(builder, [_filled(builder, number) for number in numbers])

    return MANY(array, PLACE, PLACE), generated


load, load_rows = intrinsic(_of_one), intrinsic(_of_many)
"""``(array, place)``: one row; ``(array, place, step)``: many, each ``step`` numbers behind the one before."""

store, store_rows = intrinsic(_to_one), intrinsic(_to_many)
"""``(row, array, place)`` and ``(rows, array, place, step)``: the way back."""

element = intrinsic(_element)
"""``(array, place)``: a number or id."""

everywhere, spread = intrinsic(_everywhere), intrinsic(_spread)
"""``(number)``: a row of nothing else; ``(array, place, step)``: rows, each of nothing but one number of the array."""


def _each(combine: Callable[..., Any]) -> Any:
    """An instruction that makes numbers of those of two values in the same place."""

    def typed(typing: Any, left: Any, right: Any) -> Any:
        def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            count = signature.return_type.count
            rows = [_apart(builder, value) * (count // value.type.count) for value in values]
            return _together(builder, [combine(builder, *pair) for pair in zip(*rows, strict=True)])

        return (left if left.count > right.count else right)(left, right), generated

    return intrinsic(typed)


def _of_each(change: Callable[..., Any]) -> Any:
    """An instruction that makes a number of each."""

    def typed(typing: Any, rows: Any) -> Any:
        def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return _together(builder, [change(builder, row) for row in _apart(builder, *values)])

        return rows(rows), generated

    return intrinsic(typed)


def _sum(builder: Any, left: Any, right: Any) -> Any:
    return builder.fadd(left, right, flags=FLAGS)


def _difference(builder: Any, left: Any, right: Any) -> Any:
    return builder.fsub(left, right, flags=FLAGS)


def _product(builder: Any, left: Any, right: Any) -> Any:
    return builder.fmul(left, right, flags=FLAGS)


def _larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", left, right), right, left)


def _inverse(builder: Any, row: Any) -> Any:
    zero = builder.fcmp_ordered("==", row, _same(0.0))
    return builder.select(zero, row, builder.fdiv(_same(1.0), row, flags=FLAGS))


def _exponential(builder: Any, row: Any) -> Any:
    # e^x = 2^n e^r, with r within half of log 2: a polynomial, and n in the place of a number's exponent; that of the least
    # is 0, and so is the power.
    least = _same(-88.0)
    row = builder.select(builder.fcmp_ordered("<", row, least), least, row)
    n = _rounded(builder, _product(builder, row, _same(1.44269504)))
    r = _difference(builder, row, _product(builder, n, _same(0.69314718)))
    p = _same(1.9875691e-4)
    for factor in (1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666665e-1, 0.5, 1.0, 1.0):
        p = _sum(builder, _product(builder, p, r), _same(factor))
    return _product(builder, p, _whole_power(builder, n))


def _power_of_two(builder: Any, row: Any) -> Any:
    # Not e^(x log 2): rankings scale what they ask by 1 / log 2 once for all items, which leaves out a reduction of x and two
    # terms for every score.
    least = _same(-127.0)
    row = builder.select(builder.fcmp_ordered("<", row, least), least, row)
    n = _rounded(builder, row)
    r = _difference(builder, row, n)
    p = _same(1.33335581e-3)
    for factor in (9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1, 1.0):
        p = _sum(builder, _product(builder, p, r), _same(factor))
    return _product(builder, p, _whole_power(builder, n))


def _rounded(builder: Any, row: Any) -> Any:
    kind = ir.FunctionType(ROW, [ROW])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{LANES}f32"), [row])


def _whole_power(builder: Any, n: Any) -> Any:
    """``2^n`` of whole numbers from -126 on; 0 of -127."""
    bits = builder.add(builder.fptosi(n, INTEGERS), ir.Constant(INTEGERS, [127] * LANES))
    return builder.bitcast(builder.shl(bits, ir.Constant(INTEGERS, [23] * LANES)), ROW)


larger = _each(_larger)
"""``(a, b)``: the larger of each two numbers; where that of ``a`` is not a number, it stays."""

exponential, power_of_two = _of_each(_exponential), _of_each(_power_of_two)
"""``(a)``: ``e^x`` of every ``x <= 0``, exactly 0 below -88; ``2^x`` of every ``x < 127``, exactly 0 below -126.5."""

inverse = _of_each(_inverse)
"""``(a)``: of every number, 0 of 0."""


def _means(function: Any, combine: Callable[..., Any]) -> None:
    combined = _each(combine)

    def applied(left: Any, right: Any) -> Any:
        return combined(left, right)

    def of(left: Any, right: Any) -> Any:
        return applied if isinstance(left, Rows) and isinstance(right, Rows) else None

    overload(function)(of)


_means(operator.add, _sum)
_means(operator.sub, _difference)
_means(operator.mul, _product)


def _of_rows(combine: Callable[..., Any]) -> Any:
    """An instruction that makes one number of each of many rows, and a row of those, again and again."""

    def typed(typing: Any, rows: Any) -> Any:
        def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            rows, size = _apart(builder, *values), 1
            while len(rows) > 1:
                halves = _by_turns(size, 0), _by_turns(size, 1)
                pairs = zip(rows[::2], rows[1::2], strict=True)
                rows = [combine(builder, *(builder.shuffle_vector(*pair, half) for half in halves)) for pair in pairs]
                size *= 2
            (row,) = rows
            while size < LANES:
                others = builder.shuffle_vector(row, row, _places((lane + size) % LANES for lane in range(LANES)))
                row, size = combine(builder, row, others), 2 * size
            return _together(builder, [row])

        return ONE(MANY), generated

    return intrinsic(typed)


def _by_turns(size: int, half: int) -> Any:
    """Two rows take turns, ``size`` lanes each: the first or second half of every :data:`ROWS` lanes of both."""

    def index(lane: int) -> int:
        inside = lane % ROWS
        of_second = LANES * (inside // size % 2)
        return of_second + lane - inside + half * ROWS // 2 + inside // (2 * size) * size + inside % size

    return _places(map(index, range(LANES)))


def _all(typing: Any, rows: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        rows = _apart(builder, *values)
        while len(rows) > 1:
            rows = [_sum(builder, *rows[pair : pair + 2]) for pair in range(0, len(rows), 2)]
        return _together(builder, rows)

    return ONE(MANY), generated


def _rows_of(typing: Any, row: Any) -> Any:
    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (row,) = _apart(builder, *values)
        firsts = [lane - lane % ROWS for lane in range(LANES)]
        lanes = [_places(first + number for first in firsts) for number in range(ROWS)]
        return _together(builder, [builder.shuffle_vector(row, row, of_row) for of_row in lanes])

    return MANY(ONE), generated


largest, totals = _of_rows(_larger), _of_rows(_sum)
"""``(rows)``: of the numbers of each row, as one row: those of all rows, one after the other, again and again."""

rows_of = intrinsic(_rows_of)
"""``(row)``: of what :data:`largest` and :data:`totals` return, a row of nothing else for each number."""

sum_of = intrinsic(_all)
"""``(rows)``: their sum, one row."""


def _turn(typing: Any, source: Any, index: Any, step: Any, out: Any, out_place: Any, out_step: Any) -> Any:
    halves = [_places((start + lane) // 2 + lane % 2 * LANES for lane in range(LANES)) for start in (0, LANES)]

    def generated(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        source, index, step, out, out_place, out_step = values
        address = context, builder, signature.args[0], source, index
        rows = [_read(*address, row, step) for row in range(LANES)]
        for _ in range(LANES.bit_length() - 1):
            pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
            rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in halves]
        for number, row in enumerate(rows):
            _write(context, builder, row, signature.args[3], out, out_place, number, out_step)
        return context.get_dummy_value()

    return types.void(source, PLACE, PLACE, out, PLACE, PLACE), generated


turn = intrinsic(_turn)
"""``(source, place, step, out, out_place, out_step)``: :data:`LANES` rows of a source become columns of ``out``."""
