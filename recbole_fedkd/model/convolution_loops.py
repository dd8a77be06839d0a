"""The compiled loops of convolutions, forward and backward; importing them needs numba.

Samples lie one behind the other, a row of numbers a field, with a row of zeros between. Three neighbouring rows are then
one row of a matrix whose rows overlap, and a convolution is one product. All layers of some samples at a time stay in the
processor's cache.
"""

from __future__ import annotations

import numpy as np

from recbole_fedkd.model.compiled import LANES, Table
from recbole_fedkd.model.products import NO_LEAST, product, transposed_product, view
from recbole_fedkd.model.vectors import part

SAMPLES = 32
"""Samples at a time."""

ZERO = np.float32(0.0)
"""What a rectifier's results are at least."""

Tables = tuple[Table, ...]


def forward(fields: Table, weights: Tables, dense: Table, biases: Tables, bias: Table, out: Table) -> None:
    """Fill ``out [networks, batch, h]``; rows are filled up with zeros to a multiple of LANES."""
    networks, samples, count, inputs = fields.shape
    rows = _rooms(count, inputs, weights)
    matrices, starts = _matrices(rows), [_zeros(1, room.shape[1]) for room in rows[1:]]
    channels, last = rows[-1].shape[1], _filled(bias.shape[1])
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
            of_samples = view(rows[-1], 1, size, flat, flat + channels)
            product(view(hidden, 0, size, last, last), view(start, 0, size, last, 0), of_samples, matrix, ZERO)
            _copy(hidden[:size], out[network, first : first + size])


def backward(
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
    """Fill all derivatives; arguments as of :func:`forward`, and ``given`` by ``out``."""
    networks, samples, count, inputs = fields.shape
    rows, d_rows = _rooms(count, inputs, weights), _rooms(count, inputs, weights)
    matrices, starts = _matrices(rows), [_zeros(1, room.shape[1]) for room in rows[1:]]
    d_matrices, d_starts = _matrices(rows), [_zeros(1, room.shape[1]) for room in rows[1:]]
    ways_back = [_zeros(3 * rows[layer + 1].shape[1], rows[layer].shape[1]) for layer in range(len(weights))]
    channels, last = rows[-1].shape[1], _filled(bias.shape[1])
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
            d_hidden = view(hidden, 0, size, last, last)
            _add_sums(view(rows[-1], 1, size, flat, flat + channels), d_hidden, ones, d_matrix, d_start)
            d_samples = view(d_rows[-1], 1, size, flat, flat + channels)
            product(d_samples, view(nothing, 0, size, flat, 0), d_hidden, way_back, NO_LEAST)
            for layer in range(len(weights) - 1, -1, -1):
                narrow, wide = rows[layer].shape[1], rows[layer + 1].shape[1]
                _rectify_back(rows[layer + 1], d_rows[layer + 1], places)
                # Behind the last row of zeros is what another sample left there.
                neighbours = view(rows[layer], 0, places - 1, 3 * narrow, narrow)
                d_above = view(d_rows[layer + 1], 1, places - 1, wide, wide)
                _add_sums(neighbours, d_above, ones, d_matrices[layer], d_starts[layer])
                d_neighbours = view(d_rows[layer + 1], 0, places, 3 * wide, wide)
                d_below = view(d_rows[layer], 1, places, narrow, narrow)
                product(d_below, view(nothing, 0, places, narrow, 0), d_neighbours, ways_back[layer], NO_LEAST)
            for sample in range(size):
                begin = 1 + sample * (count + 1)
                _copy(d_rows[0][begin : begin + count], d_fields[network, first + sample])
        for layer in range(len(weights)):
            _write(d_matrices[layer], d_weights[layer][network])
            _copy(d_starts[layer], d_biases[layer][network : network + 1])
        _write_dense(d_matrix, count, channels, d_dense[network])
        _copy(d_start, d_bias[network : network + 1])


@part
def _convolve(fields: Table, matrices: list[Table], starts: list[Table], rows: list[Table]) -> None:
    """Fill the rows of all layers, of samples ``[size, fields, d]``."""
    size, count, _ = fields.shape
    places = size * (count + 1)
    for sample in range(size):
        begin = 1 + sample * (count + 1)
        _copy(fields[sample], rows[0][begin : begin + count])
    for layer in range(len(matrices)):
        narrow, wide = rows[layer].shape[1], rows[layer + 1].shape[1]
        neighbours = view(rows[layer], 0, places, 3 * narrow, narrow)
        above, start = view(rows[layer + 1], 1, places, wide, wide), view(starts[layer], 0, places, wide, 0)
        product(above, start, neighbours, matrices[layer], ZERO)
        for sample in range(1, size + 1):
            between = rows[layer + 1][sample * (count + 1)]
            for x in range(wide):
                between[x] = ZERO


@part
def _add_sums(left: Table, above: Table, ones: Table, d_matrix: Table, d_start: Table) -> None:
    """Add to the derivatives of a layer's matrix and of its bias what its rows and derivatives behind it say."""
    transposed_product(d_matrix, d_matrix, left, above, NO_LEAST)
    transposed_product(d_start, d_start, view(ones, 0, len(left), 1, 1), above, NO_LEAST)


@part
def _rectify_back(rows: Table, d_rows: Table, places: int) -> None:
    """Make derivatives 0 where a rectifier did so, and between samples."""
    values, back = rows[1 : places + 1].reshape(-1), d_rows[1 : places + 1].reshape(-1)
    for i in range(len(values)):
        back[i] = ZERO if values[i] <= ZERO else back[i]


@part
def _filled(size: int) -> int:
    return (size + LANES - 1) // LANES * LANES


@part
def _zeros(rows: int, columns: int) -> Table:
    return np.zeros((rows, columns), np.float32)


@part
def _rooms(count: int, inputs: int, weights: Tables) -> list[Table]:
    """Rows of samples before the first convolution and behind each; there is a row of zeros before the first sample."""
    places = SAMPLES * (count + 1) + 2
    rows = [_zeros(places, _filled(inputs))]
    for weight in weights:
        rows.append(_zeros(places, _filled(weight.shape[1])))
    return rows


@part
def _matrices(rows: list[Table]) -> list[Table]:
    """Room for the matrix ``[3 inputs, outputs]`` of each convolution."""
    return [_zeros(3 * rows[layer].shape[1], rows[layer + 1].shape[1]) for layer in range(len(rows) - 1)]


@part
def _copy(source: Table, into: Table) -> None:
    """Copy the rows and columns that both have."""
    columns = min(source.shape[1], into.shape[1])
    for row in range(min(len(source), len(into))):
        a, b = source[row], into[row]
        for x in range(columns):
            b[x] = a[x]


@part
def _read(weight: Table, matrix: Table) -> None:
    """Fill the matrix of a convolution ``[outputs, inputs, 3]``."""
    for neighbour in range(3):
        _copy(weight[:, :, neighbour].T, matrix[neighbour * (len(matrix) // 3) :])


@part
def _read_back(weight: Table, matrix: Table) -> None:
    """Fill the matrix ``[3 outputs, inputs]`` of a convolution's way back."""
    for neighbour in range(3):
        _copy(weight[:, :, 2 - neighbour], matrix[neighbour * (len(matrix) // 3) :])


@part
def _write(matrix: Table, weight: Table) -> None:
    """Fill what :func:`_read` reads."""
    for neighbour in range(3):
        _copy(matrix[neighbour * (len(matrix) // 3) :], weight[:, :, neighbour].T)


@part
def _read_dense(weight: Table, count: int, channels: int, matrix: Table) -> None:
    """Fill the matrix ``[fields * channels, h]`` of a dense layer ``[h, outputs * fields]``."""
    for field in range(count):
        _copy(weight[:, field::count].T, matrix[field * channels :])


@part
def _read_dense_back(weight: Table, count: int, channels: int, matrix: Table) -> None:
    """Fill the matrix ``[h, fields * channels]`` of a dense layer's way back."""
    for field in range(count):
        _copy(weight[:, field::count], matrix[:, field * channels :])


@part
def _write_dense(matrix: Table, count: int, channels: int, weight: Table) -> None:
    """Fill what :func:`_read_dense` reads."""
    for field in range(count):
        _copy(matrix[field * channels :], weight[:, field::count].T)
