"""What packed clients hold: rows of item tables per client, who is side by side, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_fedkd.engine.fleet.compiled import has_compiler, placed_by_many


class RowStore(nn.Module):
    """Rows of item tables per client, each client's in one piece behind another.

    Args:
        clients: number of clients.
        width: numbers in a row.
        items: number of items, padding included.
    """

    start: Tensor
    count: Tensor
    item: Tensor
    data: Tensor

    growing = ("item", "data")

    def __init__(self, clients: int, width: int, items: int) -> None:
        super().__init__()
        self.items = items
        self.register_buffer("start", torch.zeros(clients, dtype=torch.long))
        self.register_buffer("count", torch.zeros(clients, dtype=torch.long))
        self.register_buffer("item", torch.zeros(0, dtype=torch.long))
        self.register_buffer("data", torch.zeros(0, width))

    def of(self, clients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of the clients ``[c]``: place in ``clients``, item id and row of ``data``, each ``[rows]``."""
        count = self.count[clients]
        slot = torch.repeat_interleave(torch.arange(len(clients), device=count.device), count)
        offset = torch.arange(len(slot), device=count.device) - (count.cumsum(0) - count)[slot]
        row = self.start[clients][slot] + offset
        return slot, self.item[row], row

    def replace(self, clients: Tensor, count: Tensor, item: Tensor, pieces: list[Tensor]) -> None:
        """Give the clients ``[c]`` other rows: ``count`` ``[c]`` each, in their order ``item [rows]`` and their numbers.

        Args:
            clients: places of clients.
            count: rows of each.
            item: of every row.
            pieces: the rows, one piece behind another; emptied, so that no row is in memory twice.
        """
        others = torch.ones_like(self.count, dtype=torch.bool)
        others[clients] = False
        rest = torch.nonzero(others).flatten()
        order, counts = torch.cat([clients, rest]), torch.cat([count, self.count[rest]])
        _, kept_item, row = self.of(rest)
        if len(row):
            item = torch.cat([item, kept_item])
            pieces.append(self.data[row])
        self.item, self.data = item, self.data[:0]
        data, begin = self.data.new_empty(len(item), self.data.shape[1]), 0
        pieces.reverse()
        while pieces:
            piece = pieces.pop()
            data[begin : begin + len(piece)] = piece
            begin += len(piece)
        self.data = data
        self.count[order] = counts
        self.start[order] = counts.cumsum(0) - counts

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the tensors as they are, for the number of rows is part of what is saved; ValueError if they do not fit."""
        saved = {name: state_dict[f"{prefix}{name}"] for name in ("start", "count", "item", "data")}
        own = dict(self.named_buffers())
        for name, tensor in saved.items():
            shape = tensor.shape[1:] if name in self.growing else tensor.shape
            fits = shape == (own[name].shape[1:] if name in self.growing else own[name].shape)
            if not fits or tensor.dtype != own[name].dtype or tensor.layout != own[name].layout:
                raise ValueError(f"'{prefix}{name}' is {tuple(tensor.shape)} of {tensor.dtype}")
        if not self._consistent(**saved):
            raise ValueError(
                f"the rows of clients in '{prefix}item' are not one piece for each, of items that there are"
            )
        for name, tensor in saved.items():
            setattr(self, name, tensor.to(self.data.device, copy=True))

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

    def first(self, count: int) -> Pack:
        """The first clients alone."""
        return self.select(slice(count))

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

    def first(self, count: int) -> Weights:
        """The first clients alone, in the same memory."""
        return self.select(slice(count))

    def select(self, slots: Tensor | slice) -> Weights:
        """Some of the clients; by numbers ``[n]`` in memory of their own."""
        return Weights(self.dense[slots], self.rows[slots], self.users[slots])

    def zeros(self) -> Weights:
        """Zeros of the same shapes."""
        return Weights(torch.zeros_like(self.dense), torch.zeros_like(self.rows), torch.zeros_like(self.users))

    def tensors(self) -> list[Tensor]:
        """The three that hold anything."""
        return [part for part in (self.dense, self.rows, self.users) if part.numel()]
