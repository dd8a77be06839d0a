"""Random draws of packed clients, from the streams that each client draws from by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from recbole_fedkd.federated.client import client_round_seed
from recbole_fedkd.federated.task import shuffled_order


class Streams:
    """The streams of clients in one round: one for orders and negatives, one for dropout.

    Args:
        seed: the run's seed.
        numbers: the clients.
        round_index: from 0.
    """

    def __init__(self, seed: int, numbers: Sequence[int], round_index: int) -> None:
        seeds = [client_round_seed(seed, number, round_index) for number in numbers]
        self.order = [torch.Generator().manual_seed(each) for each in seeds]
        self._seeds = seeds

    @cached_property
    def dropout(self) -> list[torch.Generator]:
        """The streams for dropout, made where something is dropped."""
        return [torch.Generator().manual_seed(each) for each in self._seeds]

    def orders(self, sizes: Sequence[int], batch_size: int) -> Tensor:
        """Order of an epoch of each client ``[c, largest]``; a sample of its last batch fills up behind a client's own."""
        drawn = torch.cat([shuffled_order(size, each) for size, each in zip(sizes, self.order, strict=True)])
        size = torch.tensor(sizes).unsqueeze(1)
        start = (size.cumsum(0) - size).expand(-1, max(sizes))
        position = torch.arange(max(sizes)).expand_as(start)
        return drawn[start + torch.where(position < size, position, (size - 1) // batch_size * batch_size)]

    def masks(self, counts: Sequence[int], rows: int, layers: Sequence[tuple[float, int]]) -> list[Tensor]:
        """Dropout masks of a batch ``[c, rows, width]`` per layer, which draw one after the other.

        Args:
            counts: samples of each client in the batch; of the first clients alone, where the others have none left.
            rows: of the packed batch.
            layers: share that is dropped, and width, of each layer.
        """
        drawn = [torch.ones(len(counts), rows, width) for _, width in layers]
        if not layers:
            return drawn
        for place, (generator, count) in enumerate(zip(self.dropout, counts, strict=False)):
            for mask, (share, _) in zip(drawn, layers, strict=True):
                mask[place, :count].bernoulli_(1.0 - share, generator=generator)
        return drawn

    def negatives(self, owner: Tensor, counts: Sequence[int], taken: Tensor, item_count: int) -> Tensor:
        """Items that are no training positives, as :func:`~recbole_fedkd.federated.task.sample_negatives` draws them.

        Args:
            owner: whose each item is ``[n]``, client by client.
            counts: items of each client.
            taken: bool ``[owners, items]``, who holds which item; nobody holds all.
            item_count: number of items, padding included.

        Returns:
            Items ``[n]``.
        """
        slot = torch.repeat_interleave(torch.tensor(counts))
        items = torch.empty_like(owner)
        pending = torch.arange(len(owner))
        while len(pending):
            counts = torch.bincount(slot[pending], minlength=len(self.order)).tolist()
            drawn = torch.cat([
                torch.randint(1, item_count, (count,), generator=generator)
                for generator, count in zip(self.order, counts, strict=True)
                if count
            ])  # fmt: skip
            items[pending] = drawn
            pending = pending[taken[owner[pending], drawn]]
        return items
