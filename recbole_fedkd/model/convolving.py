"""Convolutions along the fields of a sample and the dense layer behind them in machine code, forward and backward.

Samples lie one behind the other, a row of numbers a field, with a row of zeros between. Three neighbouring rows are then
one row of a matrix whose rows overlap, and a convolution is one product. All layers of some samples at a time stay in the
processor's cache. Nothing is kept for the way back but arguments and results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from recbole_fedkd.model.compiled import Table, compiled, has_compiler
from recbole_fedkd.model.function import DirectFunction, side_by_side
from recbole_fedkd.model.products import compile_products, lanes, product, transposed_product

SAMPLES = 32
"""Samples at a time."""

CHANNELS, DENSE = 128, 1 << 19
"""Channels and weights of the dense layer up to which this is faster than torch, which goes through matrices in blocks."""

ZERO, NONE = np.float32(0.0), np.float32(-np.inf)
"""What a rectifier's results are at least, and where there is no rectifier."""

Linear = tuple[Tensor, Tensor]
"""Weight and bias."""

Tables = tuple[Table, ...]


def convolves(fields: Tensor, convolutions: Sequence[Linear], dense: Linear) -> bool:
    """Whether :func:`convolve` can be asked this: single precision, on the processor, not empty, small enough for its cache."""
    tensors = [fields, *(parameter for layer in (*convolutions, dense) for parameter in layer)]
    fit = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() for tensor in tensors)
    small = all(max(weight.shape[:2]) <= CHANNELS for weight, _ in convolutions) and dense[0].numel() <= DENSE
    return fit and small and has_compiler() and not torch.is_autocast_enabled("cpu")


def convolve(fields: Tensor, convolutions: Sequence[Linear], dense: Linear) -> Tensor:
    """Convolutions of width 3 along the fields, then a dense layer, each with a rectifier behind; it is differentiable.

    Args:
        fields: ``[batch, fields, d]``; neighbours of the first and the last field are 0.
        convolutions: weight ``[outputs, inputs, 3]`` and bias ``[outputs]`` of each.
        dense: weight ``[h, outputs * fields]``, flattened fields last, and bias ``[h]``.

    Returns:
        ``[batch, h]``.
    """
    weights, biases = zip(*convolutions, dense, strict=True)
    out: Tensor = _Convolve.apply(False, fields, *weights, *biases)
    return out


class _Convolve(DirectFunction):
    """:func:`convolve`; with ``many`` of many networks, the first axis of every tensor: fields, all weights, all biases."""

    @staticmethod
    def forward(many: bool, *tensors: Tensor) -> Tensor:
        fields, dense = tensors[0], tensors[len(tensors) // 2]
        out = fields.new_empty(*fields.shape[:-2], dense.shape[-2])
        compile_products()
        compiled(_forward, "numpy", *_HELPERS)(lanes(), *_arrays(many, tensors), _array(many, out))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.many, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> Any:
        *tensors, out = ctx.saved_tensors
        gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        compile_products()
        of_layer = *_arrays(ctx.many, tensors), _array(ctx.many, out), _array(ctx.many, given)
        compiled(_backward, "numpy", *_HELPERS)(lanes(), *of_layer, *_arrays(ctx.many, gradients))
        return None, *gradients

    @staticmethod
    def vmap(info: Any, in_dims: Any, many: bool, *tensors: Tensor) -> Any:
        count = info.batch_size
        moved = side_by_side(count, in_dims[1:], tensors)
        if not many:
            return _Convolve.apply(True, *moved), 0
        return _Convolve.apply(True, *(tensor.flatten(0, 1) for tensor in moved)).unflatten(0, (count, -1)), 0


def _array(many: bool, tensor: Tensor) -> Table:
    """A tensor with an axis of networks."""
    array: Table = tensor.detach().contiguous().numpy()
    return array if many else array[None]


def _arrays(many: bool, tensors: Sequence[Tensor]) -> tuple[Table, Tables, Table, Tables, Table]:
    """Fields, weights of the convolutions, of the dense layer, and biases likewise."""
    fields, *others = (_array(many, tensor) for tensor in tensors)
    layers = len(others) // 2
    return fields, tuple(others[: layers - 1]), others[layers - 1], tuple(others[layers:-1]), others[-1]


def _forward(width: int, fields: Table, weights: Tables, dense: Table, biases: Tables, bias: Table, out: Table) -> None:
    """Fill ``out [networks, batch, h]``; rows are filled up with zeros to a multiple of ``width``."""
    networks, samples, count, inputs = fields.shape
    rows = _rooms(width, count, inputs, weights)
    matrices, starts = _matrices(rows), [_zeros(1, room.shape[1]) for room in rows[1:]]
    channels, last = rows[-1].shape[1], _filled(bias.shape[1], width)
    flat = count * channels
    matrix, start, hidden = _zeros(flat, last), _zeros(1, last), _zeros(SAMPLES, last)
    for network in range(networks):
        for layer in range(len(weights)):
            _read(weights[layer][network], matrices[layer])
            _copy(biases[layer][network : network + 1], starts[layer])
        _read_dense(dense[network], count, channels, matrix)
        _copy(bias[network : network + 1], start)
        for first in range(0, samples, SAMPLES):
            size = min(SAMPLES, samples - first)
            _convolve(fields[network, first : first + size], matrices, starts, rows)
            of_samples = _view(rows[-1], 1, size, flat, flat + channels)
            product(
                _view(hidden, 0, size, last, last), _view(start, 0, size, last, 0), of_samples, _whole(matrix), ZERO
            )
            _copy(hidden[:size], out[network, first : first + size])


def _backward(
    width: int,
    fields: Table,
    weights: Tables,
    dense: Table,
    biases: Tables,
    bias: Table,
    out: Table,
    given: Table,
    d_fields: Table,
    d_weights: Tables,
    d_dense: Table,
    d_biases: Tables,
    d_bias: Table,
) -> None:
    """Fill all derivatives; arguments as of :func:`_forward`, and ``given`` by ``out``."""
    networks, samples, count, inputs = fields.shape
    rows, d_rows = _rooms(width, count, inputs, weights), _rooms(width, count, inputs, weights)
    matrices, starts = _matrices(rows), [_zeros(1, room.shape[1]) for room in rows[1:]]
    d_matrices, d_starts = _matrices(rows), [_zeros(1, room.shape[1]) for room in rows[1:]]
    ways_back = [_zeros(3 * rows[layer + 1].shape[1], rows[layer].shape[1]) for layer in range(len(weights))]
    channels, last = rows[-1].shape[1], _filled(bias.shape[1], width)
    flat = count * channels
    way_back, d_matrix, d_start, hidden = _zeros(last, flat), _zeros(flat, last), _zeros(1, last), _zeros(SAMPLES, last)
    ones, nothing = np.ones((len(rows[0]), 1), np.float32), _zeros(1, max(flat, rows[0].shape[1]))
    for network in range(networks):
        for layer in range(len(weights)):
            _read(weights[layer][network], matrices[layer])
            _read_back(weights[layer][network], ways_back[layer])
            _copy(biases[layer][network : network + 1], starts[layer])
            d_matrices[layer][:], d_starts[layer][:] = ZERO, ZERO
        _read_dense_back(dense[network], count, channels, way_back)
        d_matrix[:], d_start[:] = ZERO, ZERO
        for first in range(0, samples, SAMPLES):
            size = min(SAMPLES, samples - first)
            places = size * (count + 1)
            _convolve(fields[network, first : first + size], matrices, starts, rows)
            for sample in range(size):
                output, back, into = out[network, first + sample], given[network, first + sample], hidden[sample]
                for x in range(len(output)):
                    into[x] = ZERO if output[x] <= ZERO else back[x]
            d_hidden = _view(hidden, 0, size, last, last)
            _add_sums(_view(rows[-1], 1, size, flat, flat + channels), d_hidden, ones, d_matrix, d_start)
            d_samples = _view(d_rows[-1], 1, size, flat, flat + channels)
            product(d_samples, _view(nothing, 0, size, flat, 0), d_hidden, _whole(way_back), NONE)
            for layer in range(len(weights) - 1, -1, -1):
                narrow, wide = rows[layer].shape[1], rows[layer + 1].shape[1]
                _rectify_back(rows[layer + 1], d_rows[layer + 1], places)
                # Behind the last row of zeros is what another sample left there.
                neighbours = _view(rows[layer], 0, places - 1, 3 * narrow, narrow)
                d_above = _view(d_rows[layer + 1], 1, places - 1, wide, wide)
                _add_sums(neighbours, d_above, ones, d_matrices[layer], d_starts[layer])
                d_neighbours = _view(d_rows[layer + 1], 0, places, 3 * wide, wide)
                d_below = _view(d_rows[layer], 1, places, narrow, narrow)
                product(d_below, _view(nothing, 0, places, narrow, 0), d_neighbours, _whole(ways_back[layer]), NONE)
            for sample in range(size):
                begin = 1 + sample * (count + 1)
                _copy(d_rows[0][begin : begin + count], d_fields[network, first + sample])
        for layer in range(len(weights)):
            _write(d_matrices[layer], d_weights[layer][network])
            _copy(d_starts[layer], d_biases[layer][network : network + 1])
        _write_dense(d_matrix, count, channels, d_dense[network])
        _copy(d_start, d_bias[network : network + 1])


def _convolve(fields: Table, matrices: list[Table], starts: list[Table], rows: list[Table]) -> None:
    """Fill the rows of all layers, of samples ``[size, fields, d]``."""
    size, count, _ = fields.shape
    places = size * (count + 1)
    for sample in range(size):
        begin = 1 + sample * (count + 1)
        _copy(fields[sample], rows[0][begin : begin + count])
    for layer in range(len(matrices)):
        narrow, wide = rows[layer].shape[1], rows[layer + 1].shape[1]
        neighbours = _view(rows[layer], 0, places, 3 * narrow, narrow)
        above, start = _view(rows[layer + 1], 1, places, wide, wide), _view(starts[layer], 0, places, wide, 0)
        product(above, start, neighbours, _whole(matrices[layer]), ZERO)
        for sample in range(1, size + 1):
            between = rows[layer + 1][sample * (count + 1)]
            for x in range(wide):
                between[x] = ZERO


def _add_sums(left: Table, above: Table, ones: Table, d_matrix: Table, d_start: Table) -> None:
    """Add to the derivatives of a layer's matrix and of its bias what its rows and derivatives behind it say."""
    transposed_product(_whole(d_matrix), _whole(d_matrix), left, above, NONE)
    transposed_product(_whole(d_start), _whole(d_start), _view(ones, 0, len(left), 1, 1), above, NONE)


def _rectify_back(rows: Table, d_rows: Table, places: int) -> None:
    """Make derivatives 0 where a rectifier did so, and between samples."""
    values, back = rows[1 : places + 1].reshape(-1), d_rows[1 : places + 1].reshape(-1)
    for i in range(len(values)):
        back[i] = ZERO if values[i] <= ZERO else back[i]


def _filled(size: int, width: int) -> int:
    return (size + width - 1) // width * width


def _zeros(rows: int, columns: int) -> Table:
    return np.zeros((rows, columns), np.float32)


def _rooms(width: int, count: int, inputs: int, weights: Tables) -> list[Table]:
    """Rows of samples before the first convolution and behind each; there is a row of zeros before the first sample."""
    places = SAMPLES * (count + 1) + 2
    rows = [_zeros(places, _filled(inputs, width))]
    for weight in weights:
        rows.append(_zeros(places, _filled(weight.shape[1], width)))
    return rows


def _matrices(rows: list[Table]) -> list[Table]:
    """Room for the matrix ``[3 inputs, outputs]`` of each convolution."""
    return [_zeros(3 * rows[layer].shape[1], rows[layer + 1].shape[1]) for layer in range(len(rows) - 1)]


def _view(table: Table, first: int, rows: int, columns: int, step: int) -> Table:
    """Rows of a table's numbers, a row every ``step`` of them, from the table's row ``first`` on."""
    return as_strided(table[first:].reshape(-1), (rows, columns), (step * 4, 4))


def _whole(table: Table) -> Table:
    return _view(table, 0, table.shape[0], table.shape[1], table.shape[1])


def _copy(source: Table, into: Table) -> None:
    """Copy the columns that both have."""
    columns = min(source.shape[1], into.shape[1])
    for row in range(len(source)):
        a, b = source[row], into[row]
        for x in range(columns):
            b[x] = a[x]


def _read(weight: Table, matrix: Table) -> None:
    """Fill the matrix of a convolution ``[outputs, inputs, 3]``."""
    for neighbour in range(3):
        for x in range(weight.shape[1]):
            row = matrix[neighbour * (len(matrix) // 3) + x]
            for y in range(weight.shape[0]):
                row[y] = weight[y, x, neighbour]


def _read_back(weight: Table, matrix: Table) -> None:
    """Fill the matrix ``[3 outputs, inputs]`` of a convolution's way back."""
    for neighbour in range(3):
        for y in range(weight.shape[0]):
            row = matrix[neighbour * (len(matrix) // 3) + y]
            for x in range(weight.shape[1]):
                row[x] = weight[y, x, 2 - neighbour]


def _write(matrix: Table, weight: Table) -> None:
    """Fill what :func:`_read` reads."""
    for neighbour in range(3):
        for x in range(weight.shape[1]):
            row = matrix[neighbour * (len(matrix) // 3) + x]
            for y in range(weight.shape[0]):
                weight[y, x, neighbour] = row[y]


def _read_dense(weight: Table, count: int, channels: int, matrix: Table) -> None:
    """Fill the matrix ``[fields * channels, h]`` of a dense layer ``[h, outputs * fields]``."""
    for x in range(weight.shape[1]):
        row = matrix[x % count * channels + x // count]
        for y in range(weight.shape[0]):
            row[y] = weight[y, x]


def _read_dense_back(weight: Table, count: int, channels: int, matrix: Table) -> None:
    """Fill the matrix ``[h, fields * channels]`` of a dense layer's way back."""
    for y in range(weight.shape[0]):
        for field in range(count):
            row = matrix[y, field * channels :]
            for x in range(weight.shape[1] // count):
                row[x] = weight[y, x * count + field]


def _write_dense(matrix: Table, count: int, channels: int, weight: Table) -> None:
    """Fill what :func:`_read_dense` reads."""
    for x in range(weight.shape[1]):
        row = matrix[x % count * channels + x // count]
        for y in range(weight.shape[0]):
            weight[y, x] = row[y]


_HELPERS = (
    *(
        _filled,
        _zeros,
        _rooms,
        _matrices,
        _view,
        _whole,
        _copy,
        _read,
        _read_back,
        _write,
        _read_dense,
        _read_dense_back,
    ),
    *(_write_dense, _rectify_back, _add_sums, _convolve),
)
