"""Codecs over many clients' arrays at once, where a codec treats an array row by row: the same numbers, the same bytes.

The arrays of one name are given as the rows that may be other than zero, client by client: what a codec makes of a row of zeros
is one. Nothing is made that nobody reads: what a reader sees is computed, and how many bytes would tell it. Stacks with a
codec that has no function here go message by message.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.federated.codec import HEADER_BYTES, CodecStack
from recbole_fedkd.federated.encoding import (
    LOWEST,
    Codec,
    EightBits,
    FourBits,
    HalfPrecision,
    RowSparse,
    Sign,
    steps_below,
)
from recbole_fedkd.federated.lengths import Count, array_bytes

Floats = NDArray[np.float32]
Shape = tuple[Count, ...]

OWN = -1
"""As the first axis of a shape: as many rows as a client has here."""


@dataclass(frozen=True)
class Block:
    """One float array of each of several clients, their rows behind each other; rows that are missing are zero.

    A row is all that belongs to one index of the first axis; a vector is one row.

    Attributes:
        values: ``[n, width]``.
        counts: rows of each client ``[c]``.
        shape: of every client's array; its first axis may be :data:`OWN`.
        row: place of every row in its client's array ``[n]``, ascending in each; None: all rows are here.
    """

    values: Floats
    counts: NDArray[np.int64]
    shape: tuple[int, ...]
    row: NDArray[np.int64] | None = None

    @staticmethod
    def of(arrays: NDArray[np.float32]) -> Block:
        """Whole arrays ``[c, ...]``."""
        count, shape = len(arrays), arrays.shape[1:]
        rows = shape[0] if len(shape) > 1 else 1
        return Block(arrays.reshape(count * rows, prod(shape) // max(rows, 1)), np.full(count, rows), shape)

    @cached_property
    def owner(self) -> NDArray[np.int64]:
        """Client of every row."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def rows(self) -> Any:
        """Rows of a client's whole array: as many of each, or ``[c]``."""
        return self.dimensions[0] if len(self.shape) > 1 else 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Numbers of every client's whole array ``[c]``."""
        return np.broadcast_to(self.rows * self.values.shape[1], self.counts.shape)

    @property
    def dimensions(self) -> Shape:
        """Shape of the clients' arrays; ``[c]`` where it is another one of each."""
        return (self.counts, *self.shape[1:]) if self.shape[:1] == (OWN,) else self.shape

    def select(self, clients: NDArray[np.bool_]) -> Block:
        """The arrays of some clients."""
        chosen = np.repeat(clients, self.counts)
        row = self.row[chosen] if self.row is not None else None
        return replace(self, values=self.values[chosen], counts=self.counts[clients], row=row)

    def largest(self, magnitudes: NDArray[Any]) -> NDArray[Any]:
        """The largest of some magnitudes ``[n]`` of every client; 0 without rows."""
        most, present = np.zeros(len(self.counts), dtype=magnitudes.dtype), self.counts > 0
        if len(magnitudes):
            most[present] = np.maximum.reduceat(magnitudes, (np.cumsum(self.counts) - self.counts)[present])
        return most

    def arrays(self) -> Floats:
        """Whole arrays ``[c, ...]``."""
        count = len(self.counts)
        if self.row is None:
            return self.values.reshape(count, *self.shape)
        whole = np.zeros((count, self.shape[0], self.values.shape[1]), dtype=np.float32)
        whole[self.owner, self.row] = self.values
        return whole.reshape(count, *self.shape)


@dataclass(frozen=True)
class Encoded:
    """What a codec makes of a block.

    Attributes:
        floats: parts that the codecs behind it may take.
        fixed: the other parts: type and shape.
        whole: the values ``[n, width]`` as their reader has them, given the float parts as he has those.
        refused: clients whose array the codec does not take ``[c]``.
    """

    floats: Mapping[str, Block]
    fixed: Mapping[str, tuple[str, Shape]]
    whole: Callable[[Mapping[str, Floats]], Floats]
    refused: Any = False


def _half(block: Block) -> Encoded:
    beyond = block.largest(np.abs(block.values).max(1)) > np.finfo(np.float16).max
    with np.errstate(over="ignore"):  # of those that are refused
        halves = block.values.astype(np.float16)
    return Encoded({}, {"half": ("f2", block.dimensions)}, lambda parts: halves.astype(np.float32), beyond)


def _eight_bits(block: Block) -> Encoded:
    last = block.shape[-1] if block.shape else 1
    of_rows = block.values.reshape(len(block.values), block.values.shape[1] // max(last, 1), last)
    scales = np.abs(of_rows).max(2, keepdims=True) / np.float32(127)
    codes = np.rint(of_rows / np.where(scales > 0, scales, np.float32(1))).astype(np.int8)
    part = replace(block, values=scales.reshape(scales.shape[:2]), shape=(*block.shape[:-1], 1))

    def whole(seen: Mapping[str, Floats]) -> Floats:
        return np.asarray((codes.astype(np.float32) * seen["scales"].reshape(scales.shape)).reshape(block.values.shape))

    return Encoded({"scales": part}, {"codes": ("i1", block.dimensions)}, whole, not block.shape)


def _with_steps(block: Block, largest: NDArray[np.float64]) -> tuple[Block, dict[str, tuple[str, Shape]]]:
    """The parts that tell the magnitude of every row; see :func:`~recbole_fedkd.federated.encoding.stepped`."""
    ones = np.ones(len(block.counts), dtype=np.int64)
    fixed: dict[str, tuple[str, Shape]] = {
        "steps": ("u1", (-(-block.rows // 2),)),
        "shape": ("i4", (len(block.shape),)),
    }
    return Block(largest.astype(np.float32).reshape(-1, 1), ones, (1,)), fixed


def _magnitudes(block: Block, steps: NDArray[Any], largest: Floats) -> Floats:
    magnitudes = largest.reshape(-1)[block.owner] * 2.0 ** (-steps.astype(float) / 2)
    return np.where(steps == LOWEST, 0.0, magnitudes).astype(np.float32)[:, None]


def _four_bits(block: Block) -> Encoded:
    magnitudes = np.abs(block.values).max(1).astype(np.float64)
    largest = block.largest(magnitudes)
    steps = steps_below(magnitudes, largest[block.owner], np.floor)
    part, fixed = _with_steps(block, largest)
    bounds = _magnitudes(block, steps, part.values)
    codes = np.rint(block.values / np.where(bounds > 0, bounds, np.float32(np.inf)) * 7).clip(-7, 7)
    fixed["codes"] = ("u1", (-(-block.sizes // 2),))
    return Encoded(
        {"largest": part},
        fixed,
        lambda seen: np.asarray(codes * (_magnitudes(block, steps, seen["largest"]) / 7), dtype=np.float32),
        not block.shape,
    )


def _sign(block: Block) -> Encoded:
    magnitudes = np.abs(block.values).mean(1, dtype=np.float64)
    largest = block.largest(magnitudes)
    steps = steps_below(magnitudes, largest[block.owner], np.rint)
    part, fixed = _with_steps(block, largest)
    signs = np.where(block.values > 0, np.float32(1), np.float32(-1))
    fixed["signs"] = ("u1", (-(-block.sizes // 8),))
    return Encoded(
        {"largest": part},
        fixed,
        lambda seen: np.asarray(signs * _magnitudes(block, steps, seen["largest"])),
        not block.shape,
    )


def _row_sparse(block: Block) -> Encoded:
    present = (np.ascontiguousarray(block.values).view(np.uint32) != 0).any(1)
    count = np.bincount(block.owner[present], minlength=len(block.counts))
    part = Block(block.values[present], count, (OWN, *block.shape[1:]))

    def whole(seen: Mapping[str, Floats]) -> Floats:
        values = np.zeros_like(block.values)
        values[present] = seen["values"]
        return values

    fixed: dict[str, tuple[str, Shape]] = {"present": ("u1", (-(-block.rows // 8),)), "count": ("i4", (1,))}
    return Encoded({"values": part}, fixed, whole, len(block.shape) < 2)


ROW_WISE: dict[type[Codec], Callable[[Block], Encoded]] = {
    HalfPrecision: _half,
    EightBits: _eight_bits,
    FourBits: _four_bits,
    RowSparse: _row_sparse,
    Sign: _sign,
}


@dataclass(frozen=True)
class Seen:
    """What comes of the arrays of one name behind codecs.

    Attributes:
        values: ``[n, width]``, as their reader has them.
        leaves: arrays that travel in place of each client's ``[c]``.
        size: bytes that these take in a message ``[c]``.
    """

    values: Floats
    leaves: NDArray[np.int64]
    size: NDArray[np.int64]


def goes_row_by_row(stack: CodecStack, names: Collection[str]) -> bool:
    """Whether all codecs of arrays of these names treat them row by row; else clients have to go one by one."""
    asked = (codec for codec in stack.codecs if any(fnmatchcase(name, codec.arrays) for name in names))
    return all(type(codec) in ROW_WISE for codec in asked)


def seen_rows(stack: CodecStack, name: str, block: Block) -> Seen:
    """What readers see of the arrays of many clients behind codecs, and what travels of each; see :func:`goes_row_by_row`."""
    return _through(stack.codecs, 0, name, name, block)


def _through(codecs: Sequence[Codec], position: int, root: str, name: str, block: Block) -> Seen:
    """A block through all codecs from ``position`` on."""
    while position < len(codecs) and not fnmatchcase(root, codecs[position].arrays):
        position += 1
    clients = len(block.counts)
    if position == len(codecs) or not clients or not block.values.shape[1]:
        size = np.broadcast_to(array_bytes(name, "f4", block.dimensions), (clients,))
        return Seen(block.values, np.ones(clients, dtype=np.int64), size)
    made = ROW_WISE[type(codecs[position])](block)
    travels: Any = sum(4 * part.sizes + HEADER_BYTES for part in made.floats.values())
    for dtype, shape in made.fixed.values():
        travels = travels + np.dtype(dtype).itemsize * prod(shape) + HEADER_BYTES
    taken = ~np.broadcast_to(made.refused, (clients,)) & (block.sizes > 0)
    taken &= travels < 4 * block.sizes + HEADER_BYTES
    if not taken.any():
        return _through(codecs, position + 1, root, name, block)
    if not taken.all():
        seen = Seen(np.empty_like(block.values), np.empty(clients, np.int64), np.empty(clients, np.int64))
        for chosen, begin in ((taken, position), (~taken, position + 1)):
            part = _through(codecs, begin, root, name, block.select(chosen))
            seen.values[np.repeat(chosen, block.counts)] = part.values
            seen.leaves[chosen], seen.size[chosen] = part.leaves, part.size
        return seen
    leaves, size = np.full(clients, len(made.fixed)), np.zeros(clients, dtype=np.int64)
    for key, (dtype, shape) in made.fixed.items():
        size += array_bytes(f"{name}|{position}.{key}", dtype, shape)
    read: dict[str, Floats] = {}
    for key, of_floats in made.floats.items():
        through = _through(codecs, position + 1, root, f"{name}|{position}.{key}", of_floats)
        read[key], leaves, size = through.values, leaves + through.leaves, size + through.size
    return Seen(made.whole(read), leaves, size)
