"""What packed clients draw, brought into the shape of their batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recbole_fedkd.federated.draws import KeyedDropout


def drawn_factors(
    dropout: KeyedDropout,
    counts: Sequence[int],
    rows: int,
    layers: Sequence[tuple[float, tuple[int, ...]]],
    device: torch.device,
) -> list[Tensor]:
    """What a batch is multiplied by where something is dropped ``[c, rows, *shape]``, layer by layer.

    Args:
        dropout: draws.
        counts: samples of each client in the batch; of the first clients alone, where the others have none left.
        rows: of the packed batch.
        layers: share that is dropped, and shape of a sample, of each layer.
        device: where they are needed.
    """
    return [dropout.factors(counts, rows, shape, 1.0 - share, device) for share, shape in layers]


def filled_up(orders: Tensor, sizes: Sequence[int], batch_size: int) -> Tensor:
    """Orders of clients' samples ``[c, largest]``, where a sample of its last batch fills up behind a client's own."""
    size, position = torch.tensor(sizes).unsqueeze(1), torch.arange(orders.shape[1]).expand_as(orders)
    return orders.gather(1, torch.where(position < size, position, (size - 1) // batch_size * batch_size))


def taken_pairs(owner: Tensor, items: Tensor, item_count: int) -> Tensor:
    """Whether an item is no negative of an owner, ``owner * item_count + item`` ``[owners * item_count]``, on the processor.

    Args:
        owner: of each row ``[n]``, from 0.
        items: of each row ``[n]``.
        item_count: number of items, padding included.

    Raises:
        ValueError: an owner holds every item, so there is no negative.
    """
    taken = torch.zeros(int(owner.max()) + 1, item_count, dtype=torch.bool)
    taken[owner.cpu(), items.cpu()] = True
    if len(owner) >= item_count - 1 and taken[:, 1:].all(1).any():
        raise ValueError("a user has interacted with every item; no negative can be sampled")
    return taken.flatten()
