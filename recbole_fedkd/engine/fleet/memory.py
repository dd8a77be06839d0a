"""What packed clients leave for the next round: the memories of their optimisers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recbole_fedkd.engine.fleet.group import ClientGroup
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
        mapped, dense = group.mapped, group.dense_base().numel()
        zeros = {
            "dense": mapped.zeros(memories, clients, dense, device=device),
            "users": mapped.zeros(memories, *group.user_table().shape, device=device),
            "counters": mapped.zeros(clients, optimizer.counters, dtype=torch.float64, device=device),
        }
        for name, values in zeros.items():
            self.register_buffer(name, mapped.kept(values))
        self.rows = RowStore(clients, memories * group.item_base().shape[1], group.item_count, mapped).to(device)

    def of(self, pack: Pack, weights: Weights) -> list[Weights]:
        """Memories of packed clients, in the shapes of their weights."""
        rows = [torch.zeros_like(weights.rows) for _ in self.dense]
        if self.rows.width:
            self.rows.fill_pack(pack, rows)
        users = (
            self.users[:, pack.members] if self.users.shape[2] else [torch.zeros_like(weights.users)] * len(self.dense)
        )
        return [
            Weights(dense.index_select(0, pack.clients), own_rows, own)
            for dense, own_rows, own in zip(self.dense, rows, users, strict=True)
        ]

    def write(self, pack: Pack, memories: Sequence[Weights], counters: Tensor) -> None:
        """Keep the memories."""
        present = pack.members > 0
        for number, memory in enumerate(memories):
            self.dense[number, pack.clients] = memory.dense
            if self.users.shape[2]:
                self.users[number, pack.members[present]] = memory.users[present]
        self.counters[pack.clients] = counters
        if self.rows.width:
            self.rows.put_pack(pack, [memory.rows for memory in memories])
