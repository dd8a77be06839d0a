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

from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.distillation.exchange import FactorExchange, TablesOfAll
from recbole_fedkd.distillation.factors import FoldedUsers, PairedRows, Rows
from recbole_fedkd.distillation.features import LEAST_DEVIATION, ItemTables, described_items, moments, standardised
from recbole_fedkd.distillation.losses import label_cross_entropy
from recbole_fedkd.engine.fleet.compiled import of_other_rows
from recbole_fedkd.engine.fleet.draws import filled_up
from recbole_fedkd.engine.fleet.group import Base, ClientGroup
from recbole_fedkd.engine.fleet.population import Asked, FleetPopulation, Where
from recbole_fedkd.engine.fleet.samples import Epoch, FleetTask
from recbole_fedkd.engine.fleet.store import Pack
from recbole_fedkd.federated.draws import KeyedDraws
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.compiled import has_compiler
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.model.population import local_ids
from recbole_fedkd.model.received import described_in_groups

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
        self.local_id = local_ids(client_of_user.cpu()).to(client_of_user.device)
        self.clients = int(client_of_user.max()) + 1
        owner = client_of_user[rows.users]
        order = torch.argsort(owner, stable=True)
        self.owner, self.rows = owner[order], rows.select(order)
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
        rows, whole = self.rows.select(part), self.head.exchange
        paired = PairedRows(**vars(rows), pairs=self.pairs[part], pair_count=len(self.pair_item))
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
        known = zip(*mapped(partial(self._known, tables, own), self._blocks()), strict=True)
        self.middle, self.features, mean, scale = map(torch.cat, known)
        alone = self._alone(totals["histogram"], own["histogram"])
        if alone is not None:
            part, exchange = self.owner == alone, self._exchange_of(alone)
            predicted, features = described_in_groups(exchange, totals, None)
            mean[alone], scale[alone] = moments(features)
            self.middle[part] = head.middles(predicted)
            self.features[part] = standardised(features, mean[alone], scale[alone])
        group.keep_received(group.numbers, {"feature_mean": mean, "feature_scale": scale})

    def _alone(self, total: Tensor, own: Tensor) -> int | None:
        """The client whose part of the histograms is all of them: without it nothing would be left. None: there is none."""
        said = own.any(1)
        speakers = self.pair_owner[said].unique()
        # Of items that it does not hold, a codec may have made something, too.
        return int(speakers) if len(speakers) == 1 and torch.equal(own[said], total[self.pair_item[said]]) else None

    def _exchange_of(self, client: int) -> FactorExchange:
        """That of a client by itself, as it numbers its users."""
        whole, part = self.head.exchange, self.owner == client
        rows = self.rows.select(part)
        number = self.local_id[rows.users]
        alone = replace(rows, users=number, user_count=int(number.max()) + 1)
        return FactorExchange(whole.settings, alone, self.labels[part], whole.values)

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
        self, group: ClientGroup, numbers: Sequence[int], draws: KeyedDraws, epochs: int, clean: bool
    ) -> tuple[list[Epoch], Epoch | None]:
        """As :class:`~recbole_fedkd.federated.sum_tasks.FactorTask` draws them."""
        sizes, start = self.sizes[numbers], self._start[numbers].unsqueeze(1)
        position = torch.arange(int(sizes.max()), device=sizes.device).expand(len(numbers), -1)
        real = position < sizes.unsqueeze(1)

        def epoch(order: Tensor) -> Epoch:
            index = start + order.to(start.device)
            return Epoch({"rows": index}, torch.zeros_like(index), self.labels[index], real.float())

        drawn = (draws.epoch().orders(sizes.tolist()) for _ in range(epochs))
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
    """Heads on item factors in compact form: what is known of users and items is computed once for all.

    Arguments as of the base class.

    Attributes:
        heard: of how many stages totals have come down to each client ``[clients]``; one to which none have, such as one
            without a training row, serves its users by the initial tables.
        earlier: tables of clients that lack the latest totals, by name, by the number of stages that they have heard.
    """

    heard: Tensor

    def __init__(self, config: Any, schema: DataSchema, rows: ClientRows, client_of_user: Tensor) -> None:
        super().__init__(config, schema, rows, client_of_user)
        self.register_buffer("heard", torch.zeros(self.clients, dtype=torch.long), persistent=False)
        self.earlier: dict[int, dict[str, Tensor]] = {}
        self._behind: dict[int, FactorHead] = {}  # no parts of this module: their parameters are those of the head

    @property
    def head(self) -> FactorHead:
        """That of all users, with all that has come down."""
        head = self.client_groups[0].whole
        assert isinstance(head, FactorHead)
        return head

    def head_of(self, heard: int) -> FactorHead:
        """The same as clients have it that have heard the totals of so many stages."""
        if heard and heard not in self.earlier:
            return self.head
        if heard not in self._behind:
            self._behind[heard] = behind = self.head.untold()
            for name, value in self.earlier.get(heard, {}).items():
                behind.get_buffer(name).copy_(value)
        return self._behind[heard]

    def keep_earlier(self, totals: Mapping[str, Tensor], counts: Iterable[int]) -> None:
        """Keep what these totals, in double precision, say of every item after so many stages, and of no others."""
        settings, known = self.head.exchange.settings, self.earlier
        self.earlier = {}
        for heard in counts:
            stages = settings.stages[:heard]
            names = [name for stage in stages for name in (stage, *settings.beside(stage))]
            self.earlier[heard] = known.get(heard) or self.head.tables_after({name: totals[name] for name in names})
        self._behind = {}

    def other_parameter(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside parameters: of earlier tables the stages that were heard, and each one's by name."""
        counts, tables = torch.tensor(list(self.earlier), dtype=torch.long), {}
        for name in self.head.of_items:
            latest = self.head.get_buffer(name)
            kept = [earlier[name] for earlier in self.earlier.values()]
            tables[f"earlier_{name}"] = torch.stack(kept) if kept else latest.new_empty(0, *latest.shape)
        return {"heard": self.heard, "earlier": counts, **tables}

    def load_other_parameter(self, para: Any) -> None:
        """Restore it; in checkpoints of 0.3.0, which lack it, whoever has a row has heard all."""
        rows, saved = self.head.exchange.rows, para or {}
        holds = torch.zeros_like(self.heard).index_fill_(0, self.client_of_user[rows.users], 1)
        self.heard.copy_(saved.get("heard", holds))
        counts = saved["earlier"].tolist() if "earlier" in saved else []
        self.earlier = {
            heard: {name: saved[f"earlier_{name}"][index] for name in self.head.of_items}
            for index, heard in enumerate(counts)
        }
        self._behind = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._behind = {}
        return super()._apply(fn, recurse)

    def network_of(self, client: int) -> nn.Module:
        """See the base class."""
        return self.head_of(int(self.heard[client]))

    def _score(self, group: ClientGroup, base: Base, clients: Tensor, where: Where, asked: Asked, out: Tensor) -> None:
        """Score the rows of packed clients; arguments as of the base class."""
        row, slot, column = where
        heard = self.heard[clients]
        for count in heard.unique().tolist():
            chosen = heard == count
            rows, slots = chosen[slot], chosen.cumsum(0) - 1
            part = row[rows], slots[slot[rows]], column[rows]
            self._score_by(self.head_of(count), group, base, clients[chosen], part, asked, out)

    def _score_by(
        self, head: FactorHead, group: ClientGroup, base: Base, clients: Tensor, where: Where, asked: Asked, out: Tensor
    ) -> None:
        """The same by the tables of a head."""
        (row, slot, column), (users, items, _) = where, asked
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
