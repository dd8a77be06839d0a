"""Fields of a batch looked up in their tables, and the norm of the rows that it touches, in machine code.

For a batch torch looks up tokens, then vectors, stacks them and takes means, field by field, and adds each field's gradient up
in a table of its own in as many steps; here one short loop a field does it, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.distillation.losses import touched_squared_norm
from recbole_fedkd.model.compiled import Ids, Table, compiled, has_compiler
from recbole_fedkd.model.function import DirectFunction, array_of, side_by_side

Marks = NDArray[np.bool_]
Sums = NDArray[np.float32]
Reader = tuple[Ids, Ids, bool]

NO_COLUMN: Ids = np.empty((0, 0, 0), dtype=np.int64)


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch, the rows of one table that it reads.

    Attributes:
        ids: of users or items ``[n]``.
        column: tokens of each id ``[ids, ...]``; None: an id is a token itself.
        masked: whether 0 among the tokens of an id is none.
    """

    ids: Tensor
    column: Tensor | None = None
    masked: bool = False

    def numbers(self) -> Tensor:
        """Tokens ``[n, ...]``."""
        return self.ids if self.column is None else self.column.index_select(0, self.ids)

    def of_table(self, rows: int) -> Tensor:
        """Tokens ``[n, tokens]`` as rows of a table, -1 where there is none.

        Raises:
            IndexError: the table has no such row.
        """
        numbers = self.numbers().view(len(self.ids), -1)
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < rows:
            raise _no_row(rows)
        return numbers.masked_fill(numbers == 0, -1) if self.masked else numbers

    def looked_up(self, table: Tensor) -> Tensor:
        """Vectors of a table ``[n, d]``, in steps of torch."""
        numbers = self.numbers()
        try:
            vectors = functional.embedding(numbers, table)
        except IndexError as error:
            raise _no_row(table.shape[-2]) from error
        if not self.masked:
            return vectors
        present = (numbers != 0).unsqueeze(-1)
        return (vectors * present).sum(-2) / present.sum(-2).clamp(min=1)


def _no_row(rows: int) -> IndexError:
    return IndexError(f"an id or token is out of range: a table has rows 0 to {rows - 1}")


def _is_compiled(tables: Sequence[Tensor]) -> bool:
    return all(table.dtype == torch.float32 and table.device.type == "cpu" for table in tables) and has_compiler()


def look_up(tables: Sequence[Tensor], tokens: Sequence[Tokens], averaged: int) -> tuple[Tensor, Tensor]:
    """Vectors of the fields of a batch; of several tokens that are not masked the mean.

    Args:
        tables: of each field ``[rows, d]``.
        tokens: of each field, of the same ``n`` samples.
        averaged: the first fields, of which the mean is taken as well.

    Returns:
        ``[n, fields, d]`` and the mean ``[n, d]``; both are differentiable.
    """
    if not _is_compiled(tables):
        vectors = torch.stack([reading.looked_up(table) for table, reading in zip(tables, tokens, strict=True)], 1)
        return vectors, vectors[:, :averaged].mean(1)
    readers = [part for reading in tokens for part in (reading.ids, reading.column, reading.masked)]
    return _LookUp.apply(False, averaged, len(tables), {}, *tables, *readers)  # type: ignore[no-any-return]


def touched_norm(tables: Sequence[tuple[Tensor, Sequence[Tokens]]], dense: Sequence[Tensor]) -> Tensor:
    """:func:`touched_squared_norm`, a scalar; each table with all that reads it."""
    own = [table for table, _ in tables]
    if not _is_compiled([*own, *dense]):
        touched = [(table, torch.cat([reading.numbers().flatten() for reading in tokens])) for table, tokens in tables]
        return touched_squared_norm(touched, dense)
    readers = [
        part for _, tokens in tables for reading in tokens for part in (reading.ids, reading.column, reading.masked)
    ]
    counts = tuple(len(tokens) for _, tokens in tables)
    norm: Tensor = _TouchedNorm.apply(False, counts, {}, *own, *dense, *readers)
    return norm


class _LookUp(DirectFunction):
    """:func:`look_up`; with ``many`` of many networks, the first axis of every tensor.

    Tensors are tables, then of each its ids, its column and whether 0 is no token. What is kept for the way back goes through
    a dictionary of the call's own, since torch hands over to it arguments and results alone.
    """

    @staticmethod
    def forward(many: bool, averaged: int, fields: int, kept: dict[str, Any], *tensors: Any) -> tuple[Tensor, Tensor]:
        tables, readers = tensors[:fields], kept.setdefault("readers", _readers(many, tensors[fields:]))
        shape = readers[0][0].shape if many else readers[0][0].shape[1:]
        out = tables[0].new_empty(*shape, fields, tables[0].shape[-1])
        mean = tables[0].new_zeros(*shape, tables[0].shape[-1])
        _run(
            False,
            averaged,
            [array_of(many, table) for table in tables],
            readers,
            array_of(many, out),
            array_of(many, mean),
        )
        return out, mean

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.many, ctx.averaged, ctx.fields, ctx.kept, *tensors = inputs
        ctx.shapes = [table.shape for table in tensors[: ctx.fields]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, out: Tensor, mean: Tensor) -> Any:
        gradients = [out.new_zeros(shape) for shape in ctx.shapes]
        arrays = [array_of(ctx.many, tensor) for tensor in (*gradients, out, mean)]
        _run(True, ctx.averaged, arrays[:-2], ctx.kept["readers"], *arrays[-2:])
        return None, None, None, None, *gradients, *[None] * (3 * ctx.fields)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, _many: bool, averaged: int, fields: int, _kept: dict[str, Any], *tensors: Any
    ) -> Any:
        return _LookUp.apply(True, averaged, fields, {}, *side_by_side(info.batch_size, in_dims[4:], tensors)), (0, 0)


class _TouchedNorm(DirectFunction):
    """:func:`touched_norm`; as :class:`_LookUp`, tensors are tables, other weights, and the readers of each table."""

    @staticmethod
    def forward(many: bool, counts: tuple[int, ...], kept: dict[str, Any], *tensors: Any) -> Tensor:
        weights = tensors[: len(tensors) - 3 * sum(counts)]
        readers = iter(_readers(many, tensors[len(weights) :]))
        networks = len(weights[0]) if many else 1
        total = np.zeros(networks, np.float32)
        tables, marked = [array_of(many, table) for table in weights[: len(counts)]], []
        for table, count in zip(tables, counts, strict=True):
            marks = np.zeros(table.shape[:2], np.bool_)
            for _ in range(count):
                ids, column, _ = next(readers)
                compiled(_touch, "numpy")(table, ids, column, marks, total)
            marked.append(marks)
        norm, dense = torch.from_numpy(total), None
        if len(weights) > len(counts):
            dense = torch.cat([weight.reshape(networks, -1) for weight in weights[len(counts) :]], 1)
            norm += torch.linalg.vecdot(dense, dense)
        kept.update(tables=tables, marked=marked, dense=dense)
        return norm if many else norm.squeeze(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.many, ctx.counts, ctx.kept, *tensors = inputs
        ctx.shapes = [weight.shape for weight in tensors[: len(tensors) - 3 * sum(ctx.counts)]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> Any:
        tables, shapes, dense = ctx.kept["tables"], ctx.shapes, ctx.kept["dense"]
        twice = (2 * given).reshape(-1)
        gradients = [given.new_empty(shape) for shape in shapes[: len(tables)]]
        for table, marks, gradient in zip(tables, ctx.kept["marked"], gradients, strict=True):
            compiled(_decay, "numpy")(table, marks, twice.numpy(), array_of(ctx.many, gradient))
        others = shapes[len(tables) :]
        if others:
            sizes = [shape.numel() // len(twice) for shape in others]
            parts = (dense * twice.unsqueeze(1)).split(sizes, 1)
            gradients += [part.reshape(shape) for part, shape in zip(parts, others, strict=True)]
        return None, None, None, *gradients, *[None] * (3 * sum(ctx.counts))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, _many: bool, counts: tuple[int, ...], _kept: dict[str, Any], *tensors: Any
    ) -> Any:
        return _TouchedNorm.apply(True, counts, {}, *side_by_side(info.batch_size, in_dims[3:], tensors)), 0


def _readers(many: bool, tensors: Sequence[Any]) -> list[Reader]:
    """Ids ``[networks, n]``, column ``[networks, ids, tokens]``, empty where there is none, and whether 0 is no token."""
    readers: list[Reader] = []
    for ids, column, masked in zip(*[iter(tensors)] * 3, strict=True):
        tokens = NO_COLUMN
        if column is not None:
            tokens = array_of(many, column)
            tokens = tokens.reshape(*tokens.shape[:2], math.prod(tokens.shape[2:]))
        readers.append((array_of(many, ids), tokens, masked))
    return readers


def _run(
    backward: bool, averaged: int, tables: Sequence[Table], readers: Sequence[Reader], fields: Table, mean: Table
) -> None:
    """Fill fields and their mean, or add to ``tables`` what comes back if it is these that are given."""
    function = compiled(_look_up, "numpy")
    for field, (table, (ids, column, masked)) in enumerate(zip(tables, readers, strict=True)):
        share = 1 / averaged if field < averaged else 0.0
        if not function(backward, table, ids, column, masked, field, share, fields, mean):
            raise _no_row(table.shape[1])


def _look_up(
    backward: bool,
    table: Table,
    ids: Ids,
    column: Ids,
    masked: bool,
    field: int,
    share: float,
    fields: Table,
    mean: Table,
) -> bool:
    """One field of :func:`look_up`, or its way back; arrays of all networks. False where a row is none of a table's."""
    networks, samples, _, width = fields.shape
    rows, owners = table.shape[1], column.shape[1] if column.shape[2] > 0 else table.shape[1]
    many, part = column.shape[2], np.float32(share)
    vector = np.zeros(width, np.float32)
    for network in range(networks):
        for sample in range(samples):
            own = ids[network, sample]
            if own < 0 or own >= owners:
                return False
            count = 1
            if many > 0:
                count = many
                if masked:
                    count = 0
                    for position in range(many):
                        count += column[network, own, position] != 0
            scale = np.float32(1.0) / np.float32(max(count, 1))
            for x in range(width):
                vector[x] = 0.0
            if backward:
                for x in range(width):
                    vector[x] = scale * (fields[network, sample, field, x] + part * mean[network, sample, x])
            for position in range(max(many, 1)):
                row = column[network, own, position] if many > 0 else own
                if masked and row == 0:
                    continue
                if row < 0 or row >= rows:
                    return False
                if backward:
                    for x in range(width):
                        table[network, row, x] += vector[x]
                else:
                    for x in range(width):
                        vector[x] += scale * table[network, row, x]
            if not backward:
                for x in range(width):
                    fields[network, sample, field, x] = vector[x]
                    mean[network, sample, x] += part * vector[x]
    return True


def _touch(table: Table, ids: Ids, column: Ids, marks: Marks, total: Sums) -> None:
    """Mark the rows ``[networks, rows]`` that tokens read, and add the squares of those that were not marked yet."""
    many = column.shape[2]
    for network in range(len(ids)):
        squares = 0.0
        for sample in range(ids.shape[1]):
            own = ids[network, sample]
            for position in range(max(many, 1)):
                row = column[network, own, position] if many > 0 else own
                if not marks[network, row]:
                    marks[network, row] = True
                    for x in range(table.shape[2]):
                        squares += table[network, row, x] * table[network, row, x]
        total[network] += np.float32(squares)


def _decay(table: Table, marks: Marks, given: Sums, out: Table) -> None:
    """Fill ``out`` with the marked rows of ``table`` times ``given [networks]``, and zeros."""
    for network in range(len(table)):
        for row in range(table.shape[1]):
            # Of a row that is not touched, whatever it holds, nothing is asked: 0 times what is not a number is none.
            touched = marks[network, row]
            for x in range(table.shape[2]):
                out[network, row, x] = given[network] * table[network, row, x] if touched else np.float32(0.0)
