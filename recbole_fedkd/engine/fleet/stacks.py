"""Networks of packed clients as messages of them all at once: of item tables the rows that a client holds itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from recbole_fedkd.engine.fleet.group import Base
from recbole_fedkd.engine.fleet.training import Training
from recbole_fedkd.federated.row_codecs import Block
from recbole_fedkd.federated.stacked import Arrays
from recbole_fedkd.model.shared import SharedState


@torch.no_grad()
def stacked_networks(
    training: Training, private: Mapping[str, tuple[int, int]], base: Base
) -> tuple[dict[str, Block], Arrays]:
    """Networks of packed clients: the rows that are their own, and what all others are, both by the name in the network.

    Args:
        training: the clients.
        private: names of the parameters and buffers that stay.
        base: what all clients of their group have in common.
    """
    group, pack, weights = training.group, training.pack, training.weights
    count, shapes = len(pack.clients), group.shapes
    blocks, common = dict[str, Block](), Arrays()
    dense = weights.dense.cpu().split([shapes[name].numel() for name in group.dense_names], 1)
    for name, part in zip(group.dense_names, dense, strict=True):
        if name not in private:
            blocks[name] = Block.of(part.reshape(count, *shapes[name]).numpy())
    held = torch.arange(pack.items.shape[1], device=pack.items.device) < pack.count.unsqueeze(1)
    counts, rows, column = pack.count.cpu().numpy(), pack.items[held].cpu().numpy(), 0
    for name in group.item_names:
        width = shapes[name][1:].numel()
        if name not in private:
            values = weights.rows[..., column : column + width][held].cpu().numpy()
            blocks[name] = Block(values, counts, tuple(shapes[name]), rows)
            common[name] = base[1][:, column : column + width].reshape(shapes[name]).cpu().numpy()
        column += width
    return blocks, common


@torch.no_grad()
def stacked_buffers(training: Training, private: Mapping[str, tuple[int, int]]) -> dict[str, Block]:
    """Float buffers of packed clients that are not private, by their name in the network."""
    count, blocks = len(training.pack.clients), dict[str, Block]()
    for name, value in SharedState(training.group.whole, lambda: private).buffers().items():
        own = training.buffers.get(name)
        of_all = own if own is not None and own.shape[1:] == value.shape else value.expand(count, *value.shape)
        blocks[name] = Block.of(of_all.detach().cpu().contiguous().numpy())
    return blocks
