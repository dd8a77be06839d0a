"""What packed clients draw, each what it draws by itself: the package's own draws, and from streams as RecBole's loaders do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recbole_fedkd.federated.draws import KeyedDraws, shuffled_order


class Streams:
    """What clients draw from in one round: the package's own draws, and a stream a client for RecBole's loaders.

    Args:
        seed: the run's seed.
        numbers: the clients.
        round_index: from 0.

    Attributes:
        own: the order of samples, and negatives, of the package's own networks; what all networks drop.
    """

    def __init__(self, seed: int, numbers: Sequence[int], round_index: int) -> None:
        self.own = KeyedDraws(seed, numbers, round_index)

    @cached_property
    def loaders(self) -> list[torch.Generator]:
        """The streams of RecBole's loaders, made where there are any."""
        return [torch.Generator().manual_seed(seed) for seed in self.own.seeds]

    def loader_orders(self, sizes: Sequence[int], batch_size: int) -> Tensor:
        """Order of an epoch of each client's loader ``[c, largest]``, see :func:`filled_up`."""
        drawn = (shuffled_order(size, stream) for size, stream in zip(sizes, self.loaders, strict=True))
        return filled_up(nn.utils.rnn.pad_sequence(list(drawn), batch_first=True), sizes, batch_size)

    def factors(
        self, counts: Sequence[int], rows: int, layers: Sequence[tuple[float, tuple[int, ...]]], device: torch.device
    ) -> list[Tensor]:
        """What a batch is multiplied by where something is dropped ``[c, rows, *shape]``, layer by layer.

        Args:
            counts: samples of each client in the batch; of the first clients alone, where the others have none left.
            rows: of the packed batch.
            layers: share that is dropped, and shape of a sample, of each layer.
            device: where they are needed.
        """
        dropout = self.own.dropout
        return [dropout.factors(counts, rows, shape, 1.0 - share, device) for share, shape in layers]

    def batch_negatives(
        self,
        slot: int,
        users: NDArray[np.int64],
        items: NDArray[np.int64],
        orders: Sequence[NDArray[np.int64]],
        positives: int,
        negatives: int,
        item_count: int,
    ) -> list[NDArray[np.int64]]:
        """Negatives of one client as RecBole's loader draws them: batch by batch, from numpy's stream.

        Args:
            slot: of the client among those of these streams.
            users: whose its training rows are ``[rows]``.
            items: of its training rows ``[rows]``.
            orders: in which it goes through its rows, epoch by epoch, ``[rows]`` each.
            positives: rows in a batch.
            negatives: per row.
            item_count: number of items, padding included.

        Returns:
            For each epoch ``[rows * negatives]``: of a batch the first negatives of all rows, then the second ones.

        Raises:
            ValueError: a user holds every item, so there is no negative.
        """
        stream = np.random.RandomState(self.own.seeds[slot])
        numbers, owner = np.unique(users, return_inverse=True)
        taken = np.zeros((len(numbers), item_count), dtype=bool)
        taken[owner, items] = True
        if (taken[:, 1:].sum(1) == item_count - 1).any():
            raise ValueError("a user has interacted with every item; no negative can be sampled")
        epochs = []
        for order in orders:
            sampled = np.empty(len(users) * negatives, dtype=np.int64)
            filled = 0
            for start in range(0, len(users), positives):
                whose = np.tile(owner[order[start : start + positives]], negatives)
                drawn = sampled[filled : filled + len(whose)]
                drawn[:] = stream.randint(1, item_count, len(whose))
                pending = np.flatnonzero(taken[whose, drawn])
                while len(pending):
                    drawn[pending] = again = stream.randint(1, item_count, len(pending))
                    pending = pending[taken[whose[pending], again]]
                filled += len(whose)
            epochs.append(sampled)
        return epochs


def filled_up(orders: Tensor, sizes: Sequence[int], batch_size: int) -> Tensor:
    """Orders of clients' samples ``[c, largest]``, where a sample of its last batch fills up behind a client's own."""
    size, position = torch.tensor(sizes).unsqueeze(1), torch.arange(orders.shape[1]).expand_as(orders)
    return orders.gather(1, torch.where(position < size, position, (size - 1) // batch_size * batch_size))
