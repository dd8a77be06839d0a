"""What packed clients leave for the next round: the memories of their optimisers, and their item rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recbole_fedkd.engine.fleet.group import ClientGroup, fill_rows
from recbole_fedkd.engine.fleet.optimizers import BatchedOptimizer
from recbole_fedkd.engine.fleet.store import Pack, RowStore, Weights


class OptimizerMemory(nn.Module):
    """What the optimiser of every client of a group remembers.

    Args:
        group: the clients.
        optimizer: says how much it remembers.
    """

    dense: Tensor
    users: Tensor
    counters: Tensor

    def __init__(self, group: ClientGroup, optimizer: BatchedOptimizer) -> None:
        super().__init__()
        clients, memories, device = len(group.numbers), optimizer.memories, group.numbers.device
        self.register_buffer("dense", torch.zeros(memories, clients, group.dense_base().numel(), device=device))
        self.register_buffer("users", torch.zeros(memories, *group.user_table().shape, device=device))
        self.register_buffer("counters", torch.zeros(clients, optimizer.counters, dtype=torch.float64, device=device))
        self.rows = RowStore(clients, memories * group.item_base().shape[1], group.item_count).to(device)

    def of(self, pack: Pack, weights: Weights) -> list[Weights]:
        """Memories of packed clients, in the shapes of their weights."""
        width = weights.rows.shape[2]
        rows = weights.rows.new_zeros(*weights.rows.shape[:2], self.rows.data.shape[1])
        fill_rows(rows, pack, self.rows, rows.shape[2])
        users = (
            self.users[:, pack.members] if self.users.shape[2] else [torch.zeros_like(weights.users)] * len(self.dense)
        )
        return [
            Weights(
                self.dense[number, pack.clients], rows[..., number * width : (number + 1) * width].contiguous(), own
            )
            for number, own in enumerate(users)
        ]

    def write(self, pack: Pack, memories: Sequence[Weights], counters: Tensor) -> None:
        """Keep the memories but for the item rows."""
        present = pack.members > 0
        for number, memory in enumerate(memories):
            self.dense[number, pack.clients] = memory.dense
            if self.users.shape[2]:
                self.users[number, pack.members[present]] = memory.users[present]
        self.counters[pack.clients] = counters


@dataclass(frozen=True)
class RowChanges:
    """Item rows that clients hold at the end of a round, for :meth:`RowStore.replace`.

    Attributes:
        clients: places in the group ``[c]``.
        counts: rows of each ``[c]``.
        items: item ids ``[rows]``, client by client.
        data: ``[rows, width]``.
    """

    clients: Tensor
    counts: Tensor
    items: Tensor
    data: Tensor

    @staticmethod
    def of(pack: Pack, rows: Tensor) -> RowChanges:
        """The rows ``[c, rows, width]`` of a pack."""
        present = torch.arange(rows.shape[1], device=rows.device) < pack.count.unsqueeze(1)
        filled = present.flatten().nonzero().flatten()
        return RowChanges(
            pack.clients, pack.count, pack.items.flatten()[filled], rows.flatten(0, 1).index_select(0, filled)
        )

    @staticmethod
    def apply(changes: list[RowChanges], store: RowStore) -> None:
        """Bring a store up to date with the rows of all packs, which are used up."""
        if changes:
            clients, counts, items = (
                torch.cat([getattr(change, name) for change in changes]) for name in ("clients", "counts", "items")
            )
            pieces = [change.data for change in changes]
            changes.clear()
            store.replace(clients, counts, items, pieces)
