"""Item factors of many clients at once: all their sums in one pass over all rows, each client's own part taken off after it.

A sum per item of one client is kept for the items that it has rows of: one number per *pair* of client and item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recbole_fedkd.distillation.exchange import FactorExchange, TablesOfAll
from recbole_fedkd.distillation.factors import FoldedUsers, PairedRows, Rows
from recbole_fedkd.distillation.features import LEAST_DEVIATION, ItemTables, described_items, standardised
from recbole_fedkd.distillation.losses import label_cross_entropy
from recbole_fedkd.engine.fleet.compiled import of_other_rows
from recbole_fedkd.engine.fleet.draws import Streams, filled_up
from recbole_fedkd.engine.fleet.exchange import Base
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.population import FleetPopulation
from recbole_fedkd.engine.fleet.samples import Epoch, FleetTask
from recbole_fedkd.engine.fleet.store import Pack
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.compiled import has_compiler
from recbole_fedkd.model.factor_head import FactorHead

KNOWN_AT_A_TIME = 1 << 13
"""Rows of clients that are described at a time."""

Mapped = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""``map``, or what calls for several at a time."""


@dataclass(frozen=True)
class OthersTables(ItemTables):
    """Tables of pairs, each without its client's own part.

    Attributes:
        shares: of the labels among the other clients' rows, for every row that is asked for ``[n, T]``.
    """

    shares: Tensor

    @property
    def label_shares(self) -> Tensor:
        """As given."""
        return self.shares

    def described(self, items: Tensor | slice) -> Tensor:
        """As of every pair, by the shares of each row."""
        return described_items(self.histogram[items], self.shares)


class FactorSamples(FleetTask):
    """The rows of all clients, client by client, as heads are trained on them.

    Args:
        head: that of all users.
        client_of_user: ``[users]``, padding user 0: -1.
        batch_size: rows in a step.
        reg_weight: weight of the regulariser.
    """

    def __init__(self, head: FactorHead, client_of_user: Tensor, batch_size: int, reg_weight: float) -> None:
        self.head, self.batch_size, self.reg_weight = head, batch_size, reg_weight
        rows = head.exchange.rows
        self.client_of_user = client_of_user.clamp(min=0)  # of the padding, which has no row
        self.clients = int(client_of_user.max()) + 1
        owner = client_of_user[rows.users]
        order = torch.argsort(owner, stable=True)
        self.owner, self.rows = (
            owner[order],
            replace(rows, users=rows.users[order], items=rows.items[order], values=rows.values[order]),
        )
        self.labels = head.exchange.labels[order]
        self.sizes = torch.bincount(owner, minlength=self.clients)
        self._start = self.sizes.cumsum(0) - self.sizes
        keys, pairs = torch.unique(self.owner * rows.item_count + self.rows.items, return_inverse=True)
        self.pair_owner, self.pair_item, self.pairs = keys // rows.item_count, keys % rows.item_count, pairs
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of any row, as of a head that has been told nothing."""
        middle, width = self.head.known_scalars[0].float(), len(self.head.feature_mean)
        self.middle = middle.expand(len(self.labels))
        self.features = middle.new_zeros(1, width).expand(len(self.labels), -1)

    def exchange(self, part: Tensor) -> FactorExchange:
        """That of all clients of some rows, bool ``[n]``, as if they were one place with sums per pair."""
        rows, whole = self.rows, self.head.exchange
        paired = PairedRows(
            rows.users[part],
            rows.items[part],
            rows.values[part],
            rows.user_count,
            rows.item_count,
            self.pairs[part],
            len(self.pair_item),
        )
        return FactorExchange(whole.settings, paired, self.labels[part], whole.values)

    @torch.no_grad()
    def know(
        self, group: ClientGroup, totals: Mapping[str, Tensor], own: Mapping[str, Tensor], mapped: Mapped = map
    ) -> None:
        """Take in totals, of which ``own [pairs, ...]`` is each client's part; as ``FactorHead.know`` of every client.

        ``mapped`` calls a function for some clients after others, maybe for several at a time.
        """
        head, settings = self.head, self.head.exchange.settings
        head.know_items(totals)
        self._forget()
        if settings.stages[-1] not in totals:
            return
        tables = TablesOfAll(settings, totals, head.exchange.values)
        middles, features, *moments = zip(*mapped(partial(self._known, tables, own), self._blocks()), strict=True)
        group.keep_received(
            group.numbers, dict(zip(("feature_mean", "feature_scale"), map(torch.cat, moments), strict=True))
        )
        self.middle, self.features = torch.cat(middles), torch.cat(features)

    def _blocks(self) -> list[tuple[int, int]]:
        """Clients from one to before another, of so many rows at a time that what is made of them stays in a cache."""
        block = self._start // KNOWN_AT_A_TIME
        edges = [0, *(1 + torch.nonzero(block.diff()).flatten()).tolist(), self.clients]
        return list(pairwise(edges))

    def _known(
        self, tables: TablesOfAll, own: Mapping[str, Tensor], clients: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the labels of the rows of some clients lie, features, and mean and deviation of each client's features."""
        exchange, (begin, end) = self.head.exchange, clients
        rows = slice(int(self._start[begin]), int(self._start[end - 1] + self.sizes[end - 1]))
        first, last = torch.searchsorted(self.pair_owner, self.pair_owner.new_tensor([begin, end])).tolist()
        owner, pair_owner = self.owner[rows] - begin, self.pair_owner[first:last] - begin
        items = self.pair_item[first:last]
        others = tables.without({name: part[first:last] for name, part in own.items()}, items)
        shares = _label_shares(tables.tables.histogram, others.histogram, items, pair_owner, end - begin)
        users, local = torch.unique(self.rows.users[rows], return_inverse=True)
        known = Rows(local, self.pairs[rows] - first, self.rows.values[rows], len(users), last - first)
        apart = FactorExchange(exchange.settings, known, self.labels[rows], exchange.values)
        folded = of_other_rows if owner.device.type == "cpu" and has_compiler() else FoldedUsers.of_rows
        mean, features = apart.known_users(OthersTables(**vars(others), shares=shares[owner])).of_rows(folded)

        def per_client(values: Tensor) -> Tensor:
            summed = values.new_zeros(end - begin, values.shape[1]).index_add_(0, owner, values)
            return summed / self.sizes[begin:end].clamp(min=1).unsqueeze(1)

        centre = per_client(features)
        scale = per_client((features - centre[owner]).square()).sqrt().clamp(min=LEAST_DEVIATION)
        centre, scale = centre.float(), scale.float()
        return self.head.middles(mean), standardised(features, centre[owner], scale[owner]), centre, scale

    def draw(
        self, group: ClientGroup, numbers: Sequence[int], streams: Streams, epochs: int, clean: bool
    ) -> tuple[list[Epoch], Epoch | None]:
        """As :class:`~recbole_fedkd.federated.sum_tasks.FactorTask` draws them."""
        sizes, start = self.sizes[numbers], self._start[numbers].unsqueeze(1)
        position = torch.arange(int(sizes.max()), device=sizes.device).expand(len(numbers), -1)
        real = position < sizes.unsqueeze(1)

        def epoch(order: Tensor) -> Epoch:
            index = start + order.to(start.device)
            return Epoch({"rows": index}, torch.zeros_like(index), self.labels[index], real.float())

        drawn = (streams.own.epoch().orders(sizes.tolist()) for _ in range(epochs))
        shuffled = [epoch(filled_up(orders, sizes.tolist(), self.batch_size)) for orders in drawn]
        return shuffled, epoch(torch.where(real, position, 0)) if clean else None

    def needed(self, epoch: Epoch) -> Tensor:
        """None: a head has no item rows."""
        return epoch.items[:, :1]

    def arguments(self, group: ClientGroup, pack: Pack, batch: Epoch) -> tuple[Any, ...]:
        """Where labels lie ``[c, batch]``, features ``[c, batch, F]``, labels and weights ``[c, batch]``."""
        rows = batch.fields["rows"]
        return self.middle[rows], self.features[rows], batch.labels, batch.weights

    def step(self, network: nn.Module, with_logits: bool, *arguments: Any) -> Step:
        """As of :class:`~recbole_fedkd.federated.sum_tasks.FactorTask`."""
        assert isinstance(network, FactorHead)
        middle, features, labels, weights = arguments
        logits = network.logits(middle, features)
        loss = label_cross_entropy(logits, labels, weights)
        if self.reg_weight and torch.is_grad_enabled():
            loss = loss + self.reg_weight * network.squared_norm()
        return Step(loss, len(labels), logits, labels, weights=weights)

    def blank(self, count: int, device: torch.device) -> Epoch:
        """The first row of all."""
        index = torch.zeros(1, count, dtype=torch.long, device=device)
        return Epoch({"rows": index}, index, self.labels[index], torch.ones(1, count, device=device))


def _label_shares(total: Tensor, others: Tensor, items: Tensor, owner: Tensor, clients: int) -> Tensor:
    """Label shares of the other clients' rows for every client ``[c, T]``.

    Args:
        total: histograms of all ``[I, T]``.
        others: without the client's own part, for every pair of client and item ``[pairs, T]``.
        items: of the pairs.
        owner: of the pairs.
        clients: number of clients.
    """
    total = total.clamp(min=0)
    left = others - total[items]
    of_clients = total.sum(0) + left.new_zeros(clients, left.shape[1]).index_add_(0, owner, left)
    return (of_clients / of_clients.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-6)


class FactorFleetPopulation(FleetPopulation):
    """Heads on item factors in compact form: what is known of users and items is computed once for all."""

    def _score(
        self,
        group: ClientGroup,
        base: Base,
        clients: Tensor,
        where: tuple[Tensor, Tensor, Tensor],
        asked: tuple[Tensor, Tensor, Any],
        out: Tensor,
    ) -> None:
        """Score the rows of packed clients; arguments as of the base class."""
        (row, slot, column), (users, items, _), head = where, asked, group.whole
        assert isinstance(head, FactorHead)
        targets, width = items.shape[1], int(column.max()) + 1
        mean, features = head.known_users.of_pairs(users[row].repeat_interleave(targets), items[row].flatten())
        middles = features.new_zeros(len(clients), width, targets, dtype=torch.float)
        described = features.new_zeros(*middles.shape, features.shape[1])
        middles[slot, column] = head.middles(mean).view(-1, targets)
        described[slot, column] = features.view(-1, targets, features.shape[1])
        pack = group.pack(clients, torch.zeros_like(clients).unsqueeze(1))
        weights = group.weights(pack, base, serving=True)

        def score(network: nn.Module, parameters: Any, middle: Tensor, features: Tensor) -> Tensor:
            assert isinstance(network, FactorHead)
            return network.described(middle.flatten(), features)

        logits = group.called(head.eval(), score, weights, group.buffers_of(pack), middles, described.flatten(1, 2))
        out[row] = logits.view(len(clients), width, targets, -1)[slot, column]
