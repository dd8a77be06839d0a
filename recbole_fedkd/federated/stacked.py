"""What several clients say at once: messages of the same arrays, and what an end of the wire has dropped of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.federated.lengths import array_bytes, map_bytes
from recbole_fedkd.federated.message import Message, Schema, Training, all_taken
from recbole_fedkd.federated.row_codecs import Block, Floats, Seen

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Stacked:
    """Messages of several clients that hold arrays of the same names, shapes and types.

    Attributes:
        kind: of the messages.
        round: of the messages.
        training: client to what it has trained on, in the order of the arrays.
        blocks: what the float32 arrays of each name hold, or how they differ from ``common``.
        others: arrays of other types, ``[c, ...]``.
        common: arrays that all have in common but for the rows in ``blocks``; a name that is missing: zeros.
        encoded: what travels in place of the blocks, where codecs have gone over them; the blocks are what a reader sees.
        codec_error: as of a message ``[c, 2]``; None: nothing was taken.
    """

    kind: str
    round: int
    training: Mapping[int, Training]
    blocks: Mapping[str, Block]
    others: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    common: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    encoded: Mapping[str, Seen] | None = None
    codec_error: NDArray[np.float64] | None = None

    @property
    def tells_numbers(self) -> bool:
        """Whether losses and codec errors are numbers."""
        losses = [training.loss for training in self.training.values()]
        return bool(np.isfinite(losses).all() and (self.codec_error is None or np.isfinite(self.codec_error).all()))

    def is_within(self, bound: float) -> bool:
        """Whether no number of the float32 arrays is beyond a bound, or none at all."""
        arrays = [*(block.values for block in self.blocks.values()), *self.common.values()]
        floats: list[Any] = [array for array in arrays if array.size and array.dtype.kind == "f"]
        return all(float(array.min()) >= -bound and float(array.max()) <= bound for array in floats)

    def fits(self, schema: Schema) -> bool:
        """Whether a server that asked for this schema takes all of them."""
        if self.others or any(spec.counts for spec in schema.arrays.values()):
            return not self.common and all_taken(self.arrays(), schema, len(self.training))
        asked = {name: spec for name, spec in schema.arrays.items() if not spec.optional or name in self.blocks}
        held = {name: (block.shape, np.float32) for name, block in self.blocks.items()}
        due = {name: (spec.shape, spec.dtype) for name, spec in asked.items()}
        return held == due and self.is_within(schema.largest)

    def arrays(self) -> Arrays:
        """The arrays as their reader has them, ``[c, ...]``, where they have nothing in common."""
        assert not self.common
        return {**{name: block.arrays() for name, block in self.blocks.items()}, **self.others}

    def messages(self) -> Iterator[Message]:
        """Each by itself, as its reader has it."""
        of_blocks = {name: split(block) for name, block in self.blocks.items()}
        for slot, (client, training) in enumerate(self.training.items()):
            arrays: Arrays = {name: next(own).over(self.common.get(name)) for name, own in of_blocks.items()}
            arrays |= {name: array[slot] for name, array in self.others.items()}
            yield Message(self.kind, self.round, client, arrays, training)

    def lengths(self) -> dict[int, int]:
        """Bytes of every client's message on the wire, counted without one being made."""
        sizes: Any = sum(array_bytes(name, array.dtype.str[1:], array.shape[1:]) for name, array in self.others.items())
        leaves: Any = len(self.others)
        if self.encoded is None:
            sizes += sum(array_bytes(name, "f4", block.shape) for name, block in self.blocks.items())
            leaves += len(self.blocks)
        else:
            for seen in self.encoded.values():
                sizes, leaves = sizes + seen.size, leaves + seen.leaves
        clients = len(self.training)
        errors = np.zeros(clients, dtype=bool) if self.codec_error is None else self.codec_error.any(1)
        return lengths(self.kind, self.round, list(self.training), np.broadcast_to(sizes, clients), leaves, errors)


def lengths(
    kind: str, round_index: int, clients: Sequence[int], sizes: Any, leaves: Any, errors: Any
) -> dict[int, int]:
    """Bytes of messages on the wire.

    Args:
        kind: of the messages.
        round_index: of the messages.
        clients: who says them.
        sizes: bytes of the arrays of each ``[c]``.
        leaves: how many arrays they are, the same of each or ``[c]``.
        errors: whether each says what encoding took ``[c]``.
    """
    known: dict[tuple[int, bool], int] = {}
    inside, length = np.broadcast_to(sizes + map_bytes(leaves), len(clients)).tolist(), {}
    for client, own, error in zip(clients, inside, np.broadcast_to(errors, len(clients)).tolist(), strict=True):
        key = client.bit_length(), error  # numbers of as many bits take as many bytes
        if key not in known:
            empty = Message(kind, round_index, client, {}, Training(), (float(error), float(error)))
            known[key] = len(empty.to_bytes()) - int(map_bytes(0))
        length[client] = known[key] + own
    return length


class OwnRows(NamedTuple):
    """One client's array as the rows that may be other than zero, each of which stands for all of an index of the first axis.

    Attributes:
        shape: of the array.
        row: places of the rows, ascending; None: all are here.
        values: ``[n, width]``.
    """

    shape: tuple[int, ...]
    row: NDArray[np.int64] | None
    values: Floats

    @staticmethod
    def of(array: NDArray[Any]) -> OwnRows:
        """All rows of an array, in its own memory."""
        rows = array.shape[0] if array.ndim > 1 else 1
        return OwnRows(array.shape, None, array.reshape(rows, prod(array.shape) // max(rows, 1)))

    def over(self, common: NDArray[np.generic] | None = None) -> NDArray[np.generic]:
        """The array; what is not here is that of another, or 0."""
        if self.row is None:
            return self.values.reshape(self.shape)
        whole = np.zeros(self.shape, dtype=np.float32) if common is None else np.array(common)
        whole.reshape(self.shape[0], -1)[self.row] = self.values
        return whole

    def kept(self) -> OwnRows:
        """The same in memory of its own."""
        return OwnRows(self.shape, self.row.copy() if self.row is not None else None, self.values.copy())

    def sparse(self) -> OwnRows:
        """The rows that are not zero."""
        if self.row is not None:
            return self
        row = np.flatnonzero(self.values.any(1))
        return OwnRows(self.shape, row, self.values[row])


def split(block: Block) -> Iterator[OwnRows]:
    """Each client's own, in the block's memory."""
    begin = 0
    for count in block.counts.tolist():
        held = slice(begin, begin + count)
        yield OwnRows(block.shape, block.row[held] if block.row is not None else None, block.values[held])
        begin += count


def added(block: Block, more: Sequence[OwnRows | None]) -> Block:
    """The clients' arrays plus what each has besides; None: nothing."""
    if all(own is None for own in more):
        return block
    width = block.values.shape[1]
    if block.row is None:
        blank = np.zeros((block.values.shape[0] // len(more), width), dtype=np.float32)
        tables = [blank if own is None else own.over().reshape(blank.shape) for own in more]
        return Block(np.asarray(np.concatenate(tables) + block.values), block.counts, block.shape)
    nothing = OwnRows(block.shape, np.zeros(0, dtype=np.int64), np.zeros((0, width), dtype=np.float32))
    sparse = [nothing if own is None else own.sparse() for own in more]
    counts = np.array([len(own.values) for own in sparse])
    row = np.concatenate([own.row for own in sparse if own.row is not None])
    rest = np.concatenate([own.values for own in sparse])
    if np.array_equal(counts, block.counts) and np.array_equal(row, block.row):
        return Block(rest + block.values, block.counts, block.shape, block.row)
    ours = block.owner * block.shape[0] + block.row
    theirs = np.repeat(np.arange(len(counts)), counts) * block.shape[0] + row
    union = np.union1d(ours, theirs)
    values = np.zeros((len(union), width), dtype=np.float32)
    values[np.searchsorted(union, theirs)] = rest
    values[np.searchsorted(union, ours)] += block.values
    owner, row = np.divmod(union, block.shape[0])
    return Block(values, np.bincount(owner, minlength=len(more)), block.shape, row)
