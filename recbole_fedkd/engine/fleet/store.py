"""What packed clients hold: rows of item tables per client, who is side by side, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_fedkd.engine.fleet.compiled import placed_by_many
from recbole_fedkd.engine.fleet.mapped import MappedTensors
from recbole_fedkd.engine.fleet.moving import fill, joined, moves_rows
from recbole_fedkd.model.compiled import has_compiler

SMALL = 2**20
"""Bytes of a piece that is joined with others where there are any."""


class RowStore(nn.Module):
    """Rows of item tables per client: those that were put down together are one piece, which nobody changes.

    A piece goes when no client holds rows of it any more, so that where packs of clients come again round after round there
    is no row twice, but for those of a pack.

    Args:
        clients: number of clients.
        width: numbers in a row.
        items: number of items, padding included.
        mapped: says where rows lie.

    Attributes:
        piece: which piece each client's rows are in ``[clients]``.
        start: where in it they begin ``[clients]``.
        count: how many they are ``[clients]``.
        pieces: items ``[rows]`` and numbers ``[rows, width]`` of each.
    """

    piece: Tensor
    start: Tensor
    count: Tensor

    growing = ("item", "data")

    def __init__(self, clients: int, width: int, items: int, mapped: MappedTensors | None = None) -> None:
        super().__init__()
        self.width, self.items, self.mapped = width, items, mapped or MappedTensors()
        for name in ("piece", "start", "count"):
            values = self.mapped.kept(self.mapped.zeros(clients, dtype=torch.long))
            self.register_buffer(name, values, persistent=False)
        self.pieces: dict[int, tuple[Tensor, Tensor]] = {}
        self._live: dict[int, int] = {}
        self._next = 0

    def _pieces(self, clients: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Of clients ``[c]`` by piece: which of them, where in it their rows begin, and how many they are, and the piece."""
        count, start, piece = self.count[clients], self.start[clients], self.piece[clients]
        for number in piece[count > 0].unique().tolist():
            of_piece = ((piece == number) & (count > 0)).nonzero().flatten()
            yield of_piece, start[of_piece], count[of_piece], *self.pieces[number]

    def _parts(self, clients: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Rows of clients ``[c]``, by piece: place in ``clients``, among the client's rows and in the piece, and the piece."""
        for of_piece, start, count, item, data in self._pieces(clients):
            owner, offset = ragged(count)
            yield of_piece[owner], offset, start[owner] + offset, item, data

    def items_of(self, clients: Tensor) -> Tensor:
        """Items of the clients' rows ``[c, most]``, 0 where one has fewer."""
        items = torch.zeros(len(clients), int(self.count[clients].max()), dtype=torch.long, device=clients.device)
        for slot, offset, row, item, _ in self._parts(clients):
            items[slot, offset] = item[row]
        return items

    def fill_pack(self, pack: Pack, tables: list[Tensor]) -> None:
        """Overwrite packed rows ``[c, rows, D]`` by what the clients have stored, one table behind the other.

        What is stored beyond the columns of the tables stays where it is.
        """
        if moves_rows(pack.items.device):
            for piece in self._pieces(pack.clients):
                fill(tables, pack.items, pack.count, pack.item_count, piece)
            return
        slot, item, own = self.of(pack.clients, sum(table.shape[2] for table in tables))
        needed = pack.known[slot, item]
        slot, item = slot[needed], item[needed]
        places, column = pack.local[slot, item].long(), 0
        for table in tables:
            table[slot, places] = own[needed, column : column + table.shape[2]]
            column += table.shape[2]

    def of(self, clients: Tensor, columns: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the clients ``[c]``: place in ``clients``, item ``[rows]`` and first ``columns`` ``[rows, n]`` of each."""
        device = clients.device
        parts = [(torch.zeros(0, dtype=torch.long, device=device),) * 2 + (torch.zeros(0, columns, device=device),)]
        for slot, _, row, item, data in self._parts(clients):
            parts.append((slot, item[row], data[row, :columns] if columns else parts[0][2]))
        slots, items, rows = (side_by_side(list(column), 0) for column in zip(*parts[len(parts) > 1 :], strict=True))
        return slots, items, rows

    def put(self, clients: Tensor, count: Tensor, item: Tensor, data: Tensor) -> None:
        """Give the clients ``[c]`` other rows, a piece: ``count [c]`` each, in their order ``item [rows]`` and ``data``."""
        left, freed = self.piece[clients].unique(return_inverse=True)
        freed = torch.zeros_like(left).index_add(0, freed, self.count[clients])
        number, self._next = self._next, self._next + 1
        self.pieces[number], self._live[number] = (
            (self.mapped.of_rows.kept(item), self.mapped.of_rows.kept(data)),
            len(item),
        )
        self.piece[clients], self.count[clients], self.start[clients] = number, count, count.cumsum(0) - count
        for before, rows in zip([*left.tolist(), number], [*freed.tolist(), 0], strict=True):
            if before in self._live:
                self._live[before] -= rows
                if not self._live[before]:
                    self._forget(before)

    def _forget(self, number: int) -> None:
        for tensor in self.pieces.pop(number):
            self.mapped.of_rows.let_go(tensor)
        del self._live[number]

    def put_pack(self, pack: Pack, tables: list[Tensor]) -> None:
        """The same for packed rows ``[c, rows, D]``, one table behind the other; columns beyond the store's are left out."""
        if moves_rows(pack.items.device):
            items = joined([pack.items.unsqueeze(2)], 1, pack.count).flatten()
            self.put(pack.clients, pack.count, items, joined(tables, self.width, pack.count))
            return
        rows = side_by_side(tables, 2)
        present = torch.arange(rows.shape[1], device=rows.device) < pack.count.unsqueeze(1)
        filled = present.flatten().nonzero().flatten()
        data = rows[..., : self.width].flatten(0, 1).index_select(0, filled)
        self.put(pack.clients, pack.count, pack.items.flatten()[filled], data)

    def tidy(self) -> None:
        """Copy what is left of pieces that hold more rows of before than of now, or few at all; not while others read."""
        few = SMALL / (8 + 4 * self.width)
        rare = [number for number, live in self._live.items() if live < max(few, len(self.pieces[number][0]) / 2)]
        if len(rare) > 1 or (rare and len(self.pieces[rare[0]][0]) > self._live[rare[0]]):
            left = torch.isin(self.piece, torch.tensor(rare, device=self.piece.device)) & (self.count > 0)
            clients = left.nonzero().flatten()
            self.put(clients, self.count[clients], *self._joined(clients))

    def _joined(self, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Items ``[rows]`` and numbers ``[rows, width]`` of the clients, one behind another."""
        count = self.count[clients]
        begin, total = count.cumsum(0) - count, int(count.sum())
        items = self.mapped.of_rows.zeros(total, dtype=torch.long, device=count.device)
        rows = self.mapped.of_rows.zeros(total, self.width, device=count.device)
        for slot, offset, row, item, data in self._parts(clients):
            joined = begin[slot] + offset
            items[joined], rows[joined] = item[row], data[row]
        return items, rows

    def joined(self) -> dict[str, Tensor]:
        """All rows, client by client: ``start`` and ``count`` ``[clients]``, ``item [rows]`` and ``data [rows, width]``."""
        item, data = self._joined(torch.arange(len(self.count), device=self.count.device))
        return {"start": self.count.cumsum(0) - self.count, "count": self.count.clone(), "item": item, "data": data}

    def fill(self, data: Tensor) -> None:
        """Give all rows other numbers ``[rows, width]``, in the order of :meth:`joined`."""
        rows = self.joined()
        self.put(torch.arange(len(self.count), device=self.count.device), rows["count"], rows["item"], data)

    def _apply(self, function: Any, recurse: bool = True) -> RowStore:
        super()._apply(function, recurse)
        self.pieces = {number: (function(item), function(data)) for number, (item, data) in self.pieces.items()}
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({f"{prefix}{name}": value for name, value in self.joined().items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the tensors as they are, for the number of rows is part of what is saved; ValueError if they do not fit."""
        saved = {name: state_dict[f"{prefix}{name}"] for name in ("start", "count", "item", "data")}
        shapes: dict[str, tuple[int, ...]] = {"item": (), "data": (self.width,)}
        for name, tensor in saved.items():
            grows, dtype = name in self.growing, torch.float32 if name == "data" else torch.long
            fits = tensor.dim() and tuple(tensor.shape[grows:]) == shapes.get(name, tuple(self.count.shape))
            if not fits or tensor.dtype != dtype or tensor.layout != torch.strided:
                raise ValueError(f"'{prefix}{name}' is {tuple(tensor.shape)} of {tensor.dtype}")
        if not self._consistent(**saved):
            raise ValueError(
                f"the rows of clients in '{prefix}item' are not one piece for each, of items that there are"
            )
        for number in list(self.pieces):
            self._forget(number)
        self.start.copy_(saved["start"])
        self.count.copy_(saved["count"])
        self.piece.zero_()
        device = self.count.device
        item, data = (self.mapped.of_rows.kept(saved[name].to(device, copy=True)) for name in ("item", "data"))
        self.pieces, self._live, self._next = {0: (item, data)}, {0: len(item)}, 1

    def _consistent(self, start: Tensor, count: Tensor, item: Tensor, data: Tensor) -> bool:
        """Whether the pieces lie behind each other and fill the rows, and every client has an item at most once."""
        # Bounded before anything is summed or repeated as often as they say.
        if len(item) != len(data) or bool(((count < 0) | (count > len(item))).any()) or int(count.sum()) != len(item):
            return False
        if len(item) and not 0 <= int(item.min()) <= int(item.max()) < self.items:
            return False
        order = torch.from_numpy(np.lexsort((count.cpu().numpy(), start.cpu().numpy()))).to(count.device)
        held = count[order]
        if not torch.equal(start[order], held.cumsum(0) - held):
            return False
        owner = torch.repeat_interleave(order, held)
        return len(torch.unique(owner * self.items + item)) == len(item)


def ragged(count: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces of ``count [n]`` entries each, one behind another: piece, and place in it, of every entry."""
    piece = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    return piece, torch.arange(len(piece), device=count.device) - (count.cumsum(0) - count)[piece]


def side_by_side(parts: list[Tensor], axis: int) -> Tensor:
    """The parts along an axis; one alone is not copied."""
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Pack:
    """Clients side by side, with item ids of their own: 0 is padding, as everywhere.

    Attributes:
        clients: places in the group ``[c]``.
        members: user ids ``[c, 1 + users]``, each client's behind a padding user; 0 where a client has fewer.
        items: item ids ``[c, rows]``, 0 where a client has fewer.
        count: rows of each client ``[c]``.
        item_count: number of all items.
    """

    clients: Tensor
    members: Tensor
    items: Tensor
    count: Tensor
    item_count: int

    @cached_property
    def local(self) -> Tensor:
        """The client's own id of each item ``[c, items]``; 0 where it has none."""
        local = torch.zeros(len(self.items), self.item_count, dtype=torch.int32, device=self.items.device)
        # What a client has less than the largest is padding's, which is written last and has place 0.
        places = torch.arange(self.items.shape[1], dtype=torch.int32, device=self.items.device)
        local.scatter_(1, self.items, places.where(self.items > 0, 0))
        return local

    @cached_property
    def known(self) -> Tensor:
        """Which items have one: bool ``[c, items]``."""
        known = torch.zeros(len(self.items), self.item_count, dtype=torch.bool, device=self.items.device)
        return known.scatter_(1, self.items, True)

    def places(self, items: Tensor) -> Tensor:
        """Each client's own ids of its items ``[c, n]``."""
        if has_compiler() and items.device.type == "cpu":
            return placed_by_many(self.items, self.count, items, self.item_count)
        return self.local.gather(1, items).long()

    def select(self, slots: Tensor | slice) -> Pack:
        """Some of the clients."""
        return Pack(self.clients[slots], self.members[slots], self.items[slots], self.count[slots], self.item_count)


@dataclass(frozen=True)
class Weights:
    """Parameters of packed clients as three tensors: a network's parameters lie side by side on the last axis.

    Attributes:
        dense: ``[c, P]``, what every sample touches.
        rows: ``[c, rows, D]``, item tables.
        users: ``[c, 1 + users, U]``, user tables.
    """

    dense: Tensor
    rows: Tensor
    users: Tensor

    def select(self, slots: Tensor | slice) -> Weights:
        """Some of the clients; by numbers ``[n]`` in memory of their own."""
        return Weights(self.dense[slots], self.rows[slots], self.users[slots])

    def zeros(self) -> Weights:
        """Zeros of the same shapes."""
        return Weights(torch.zeros_like(self.dense), torch.zeros_like(self.rows), torch.zeros_like(self.users))

    def tensors(self) -> list[Tensor]:
        """The three that hold anything."""
        return [part for part in (self.dense, self.rows, self.users) if part.numel()]
