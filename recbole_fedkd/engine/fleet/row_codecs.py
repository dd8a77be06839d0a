"""Codecs over many clients' arrays at once, where a codec treats an array row by row: the same numbers, the same bytes.

The arrays of one name, all of one shape, are given as the rows that are not zero, client by client. With ``row_sparse`` in
front no other row is ever made; stacks that begin otherwise, and codecs that have no function here, go message by message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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

Floats = NDArray[np.float32]
Leaf = tuple[str, str, tuple[int, ...]]
"""An array as it travels: its name, type and shape."""


class NotRowWiseError(Exception):
    """A codec of the stack does not treat arrays row by row."""


@dataclass(frozen=True)
class Block:
    """One float array of each of several clients, their rows behind each other.

    Attributes:
        values: ``[rows, width]``.
        counts: rows of each client ``[c]``.
        vectors: whether a client's array is its only row, ``[width]``; otherwise ``[rows of the client, width]``.
    """

    values: Floats
    counts: NDArray[np.int64]
    vectors: bool = False

    @property
    def owner(self) -> NDArray[np.int64]:
        """Client of every row."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Numbers of every client."""
        return np.asarray(self.counts * self.values.shape[1])

    def shape(self, client: int) -> tuple[int, ...]:
        """Shape of a client's array."""
        width = self.values.shape[1]
        return (width,) if self.vectors else (int(self.counts[client]), width)

    def select(self, clients: NDArray[np.bool_]) -> Block:
        """The arrays of some clients."""
        return Block(self.values[np.repeat(clients, self.counts)], self.counts[clients], self.vectors)

    def largest(self, magnitudes: NDArray[Any]) -> NDArray[Any]:
        """The largest of some magnitudes ``[rows]`` of every client; 0 without rows."""
        most = np.zeros(len(self.counts), dtype=magnitudes.dtype)
        np.maximum.at(most, self.owner, magnitudes)
        return most


@dataclass(frozen=True)
class Encoded:
    """What a codec makes of a block.

    Attributes:
        floats: parts that the next codecs take, by name.
        fixed: all other parts: name to type and to the numbers of every client ``[c]``; a client's part is a vector, or of the
            shape of its array where the numbers are negative.
        whole: the values ``[rows, width]`` as their reader has them, given the float parts as he has those.
        refused: clients whose array the codec does not take ``[c]``.
    """

    floats: Mapping[str, Block]
    fixed: Mapping[str, tuple[str, NDArray[np.int64]]]
    whole: Callable[[Mapping[str, Floats]], Floats]
    refused: NDArray[np.bool_]


_SAME = -1


def _half(block: Block) -> Encoded:
    halves = block.values.astype(np.float16) if block.values.size else block.values
    beyond = block.largest(np.abs(block.values).max(1)) > np.finfo(np.float16).max
    same = np.full(len(block.counts), _SAME)
    return Encoded({}, {"half": ("f2", same)}, lambda parts: halves.astype(np.float32), beyond)


def _eight_bits(block: Block) -> Encoded:
    scales = np.abs(block.values).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(block.values / np.where(scales > 0, scales, np.float32(1))).astype(np.int8)
    same = np.full(len(block.counts), _SAME)
    parts = {"scales": Block(scales.astype(np.float32), block.counts, block.vectors)}
    whole = lambda seen: np.asarray(codes.astype(np.float32) * seen["scales"])  # noqa: E731
    return Encoded(parts, {"codes": ("i1", same)}, whole, block.counts == 0)


def _with_steps(block: Block, steps: NDArray[Any], largest: NDArray[np.float64]) -> tuple[Block, dict[str, Any]]:
    """The parts that tell the magnitude of every row; see :func:`~recbole_fedkd.federated.encoding.stepped`."""
    ones = np.ones(len(block.counts), dtype=np.int64)
    axes = np.full(len(block.counts), 1 if block.vectors else 2)
    fixed = {"steps": ("u1", -(-block.counts // 2)), "shape": ("i4", axes)}
    return Block(largest.astype(np.float32).reshape(-1, 1), ones, vectors=True), fixed


def _magnitudes(block: Block, steps: NDArray[Any], largest: Floats) -> Floats:
    magnitudes = largest.reshape(-1)[block.owner] * 2.0 ** (-steps.astype(float) / 2)
    return np.where(steps == LOWEST, 0.0, magnitudes).astype(np.float32)[:, None]


def _four_bits(block: Block) -> Encoded:
    magnitudes = np.abs(block.values).max(1).astype(np.float64)
    largest = block.largest(magnitudes)
    steps = steps_below(magnitudes, largest[block.owner], np.floor)
    part, fixed = _with_steps(block, steps, largest)
    bounds = _magnitudes(block, steps, part.values)
    codes = np.rint(block.values / np.where(bounds > 0, bounds, np.float32(np.inf)) * 7).clip(-7, 7)
    fixed["codes"] = ("u1", -(-block.sizes // 2))
    whole = lambda seen: np.asarray(codes * (_magnitudes(block, steps, seen["largest"]) / 7), dtype=np.float32)  # noqa: E731
    return Encoded({"largest": part}, fixed, whole, block.counts == 0)


def _sign(block: Block) -> Encoded:
    magnitudes = np.abs(block.values).mean(1, dtype=np.float64)
    largest = block.largest(magnitudes)
    steps = steps_below(magnitudes, largest[block.owner], np.rint)
    part, fixed = _with_steps(block, steps, largest)
    signs = np.where(block.values > 0, np.float32(1), np.float32(-1))
    fixed["signs"] = ("u1", -(-block.sizes // 8))
    return Encoded(
        {"largest": part},
        fixed,
        lambda seen: np.asarray(signs * _magnitudes(block, steps, seen["largest"])),
        block.counts == 0,
    )


ROW_WISE: dict[type[Codec], Callable[[Block], Encoded]] = {
    HalfPrecision: _half,
    EightBits: _eight_bits,
    FourBits: _four_bits,
    Sign: _sign,
}


def seen_rows(
    stack: CodecStack, name: str, values: Floats, counts: NDArray[np.int64], rows: int
) -> tuple[Floats, list[list[Leaf]]]:
    """What readers see of the arrays ``[rows, width]`` of many clients, and what travels of each.

    Args:
        stack: the codecs.
        name: of the array.
        values: the rows that may be other than zero ``[n, width]``, client by client.
        counts: number of them of each client ``[c]``.
        rows: of every array.

    Raises:
        NotRowWiseError: they have to go one by one.
    """
    width = values.shape[1]
    if not stack.codecs:
        return values, [[(name, "f4", (rows, width))] for _ in counts]
    if type(stack.codecs[0]) is not RowSparse or not fnmatchcase(name, stack.codecs[0].arrays):
        raise NotRowWiseError
    present = (np.ascontiguousarray(values).view(np.uint32) != 0).any(1)
    owner = np.repeat(np.arange(len(counts)), counts)
    block = Block(values[present], np.bincount(owner[present], minlength=len(counts)))
    travels = 4 * block.sizes + -(-rows // 8) + 4 + 3 * HEADER_BYTES
    if (travels >= 4 * rows * width + HEADER_BYTES).any():
        raise NotRowWiseError
    whole, leaves = _through(stack.codecs, 1, name, f"{name}|0.values", block)
    seen = np.zeros_like(values)
    seen[present] = whole
    beside: list[Leaf] = [(f"{name}|0.present", "u1", (-(-rows // 8),)), (f"{name}|0.count", "i4", (1,))]
    return seen, [[*beside, *of_client] for of_client in leaves]


def _through(
    codecs: Sequence[Codec], position: int, root: str, name: str, block: Block
) -> tuple[Floats, list[list[Leaf]]]:
    """A block through all codecs from ``position`` on."""
    while position < len(codecs) and not fnmatchcase(root, codecs[position].arrays):
        position += 1
    if position == len(codecs) or not len(block.counts):
        return block.values, [[(name, "f4", block.shape(client))] for client in range(len(block.counts))]
    if type(codecs[position]) not in ROW_WISE:
        raise NotRowWiseError
    made = ROW_WISE[type(codecs[position])](block)
    travels = sum(4 * part.sizes + HEADER_BYTES for part in made.floats.values())
    for dtype, numbers in made.fixed.values():
        travels = travels + np.where(numbers < 0, block.sizes, numbers) * int(dtype[1]) + HEADER_BYTES
    taken = ~made.refused & (travels < 4 * block.sizes + HEADER_BYTES)
    if not taken.any():
        return _through(codecs, position + 1, root, name, block)
    if not taken.all():
        seen, leaves = np.empty_like(block.values), [list[Leaf]()] * len(taken)
        for chosen, begin in ((taken, position), (~taken, position + 1)):
            part, of_part = _through(codecs, begin, root, name, block.select(chosen))
            seen[np.repeat(chosen, block.counts)] = part
            for client, of_client in zip(np.flatnonzero(chosen), of_part, strict=True):
                leaves[client] = of_client
        return seen, leaves
    leaves = [
        [
            (f"{name}|{position}.{key}", dtype, block.shape(client) if numbers[client] < 0 else (int(numbers[client]),))
            for key, (dtype, numbers) in made.fixed.items()
        ]
        for client in range(len(taken))
    ]
    read: dict[str, Floats] = {}
    for key, float_block in made.floats.items():
        read[key], of_part = _through(codecs, position + 1, root, f"{name}|{position}.{key}", float_block)
        leaves = [[*own, *more] for own, more in zip(leaves, of_part, strict=True)]
    return made.whole(read), leaves
