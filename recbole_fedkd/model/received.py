"""What comes down in an exchange of item factors, as a module holds it: the items' tables, and what is known of own users."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from recbole_fedkd.distillation.exchange import FactorExchange, item_tables
from recbole_fedkd.distillation.factors import Curvature
from recbole_fedkd.distillation.features import (
    ItemTables,
    KnownUsers,
    feature_count,
    middles,
    moments,
    standardised,
)
from recbole_fedkd.model.with_rows import WithRows

GROUPS = 8
"""Groups of users whose own part is taken off the items' tables where their rows are trained on, as clients do."""


class ReceivedTables(WithRows):
    """What is known of every item, as far as totals of an exchange have come down, and with it of the users who live here.

    Until anything is known of the items it predicts the labels' middle.

    Args:
        exchange: of the users that are served: their rows, and what they make of totals.

    Attributes:
        of_items: names of the buffers that hold what is known of every item.
    """

    beside: ClassVar[tuple[str, ...]] = ("exchange", "of_rows")
    of_items: ClassVar[tuple[str, ...]] = (
        "known_scalars",
        "item_bias",
        "item_vectors",
        "item_histogram",
        "curvature_root",
        "curvature_values",
    )
    known_scalars: Tensor
    item_bias: Tensor
    item_vectors: Tensor
    item_histogram: Tensor
    curvature_root: Tensor
    curvature_values: Tensor
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, exchange: FactorExchange) -> None:
        super().__init__()
        self.exchange = exchange
        for name, value in _nothing_known(exchange).items():
            self.register_buffer(name, value)
        self._users: KnownUsers | None = None
        self.of_rows: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(ReceivedTables._forget)

    @torch.no_grad()
    def know(self, totals: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Take in the totals of an exchange, as far as it has come.

        Args:
            totals: of all clients, by the names of :meth:`FactorExchange.answer`.
            own: the client's own part of them, which is taken off for its own rows.
        """
        exchange = self.exchange
        self.know_items(totals)
        if exchange.settings.stages[-1] not in totals:
            return  # nothing is trained before the exchange is over, and leaving every row out takes its time
        if own and own["histogram"].any() and torch.equal(own["histogram"], totals["histogram"]):
            # Nobody else has a row, and without its own part nothing would be left. Where a codec dropped all counts, that says
            # nothing.
            mean, features = described_in_groups(exchange, totals, None)
        else:
            others = exchange.known_users(item_tables(exchange.settings, totals, own, exchange.values))
            mean, features = others.of_rows()
        for kept, moment in zip((self.feature_mean, self.feature_scale), moments(features), strict=True):
            kept.copy_(moment)
        self.of_rows = self.middles(mean), self.standardised(features)

    @torch.no_grad()
    def know_items(self, totals: Mapping[str, Tensor]) -> None:
        """Take in what totals say of every item."""
        tables = item_tables(self.exchange.settings, totals, None, self.exchange.values)
        self.known_scalars.copy_(torch.stack([tables.mean, tables.noise]))
        self.item_bias.copy_(tables.bias)
        self.item_vectors.copy_(tables.vectors)
        self.item_histogram.copy_(tables.histogram)
        self.curvature_root.copy_(tables.curvature.root)
        self.curvature_values.copy_(tables.curvature.values)
        self._forget(None)

    @torch.no_grad()
    def tables_after(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The buffers that totals come to, of fewer stages maybe than it knows itself, which stays as it is."""
        other = self.untold()
        other.know_items(totals)
        return {name: other.get_buffer(name) for name in self.of_items}

    def untold(self) -> Self:
        """A module of the same parameters and rows, to which nothing has come down."""
        shared = {id(part): part for part in (self.exchange, *self.parameters())}
        for name, value in _nothing_known(self.exchange).items():
            known = self.get_buffer(name)
            shared[id(known)] = value.to(known.device)
        twin = copy.deepcopy(self, shared)
        twin._forget(None)
        return twin

    def middles(self, mean: Tensor) -> Tensor:
        """Where the label distributions of predicted labels ``[n]`` lie ``[n]``."""
        return middles(mean, self.known_scalars[1], self.exchange.values)

    @property
    def known_users(self) -> KnownUsers:
        """What is known of the users, given what is known of the items."""
        if self._users is None:
            self._users = self.exchange.known_users(self.tables)
        return self._users

    @property
    def tables(self) -> ItemTables:
        """What is known of every item."""
        mean, noise = self.known_scalars
        curvature = Curvature(self.curvature_root, self.curvature_values)
        return ItemTables(mean, self.item_bias, self.item_vectors, self.item_histogram, noise, curvature)

    def standardised(self, features: Tensor) -> Tensor:
        """Features ``[n, F]`` by the moments of those of the own rows."""
        return standardised(features, self.feature_mean, self.feature_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._users = None
        return super()._apply(fn, recurse)

    def _forget(self, _keys: object) -> None:
        self._users = None


def _nothing_known(exchange: FactorExchange) -> dict[str, Tensor]:
    """The buffers of :class:`ReceivedTables` before anything has come down."""
    labels, items, width = len(exchange.values), exchange.rows.item_count, exchange.settings.factor_size
    features = feature_count(labels)
    return {
        "known_scalars": torch.tensor([float(exchange.values.mean()), 1.0]).double(),
        "item_bias": torch.zeros(items).double(),
        "item_vectors": torch.zeros(items, width).double(),
        "item_histogram": torch.zeros(items, labels).double(),
        "curvature_root": torch.zeros(width + 1, width + 1).double(),
        "curvature_values": torch.zeros(width + 1).double(),
        "feature_mean": torch.zeros(features),
        "feature_scale": torch.ones(features),
    }


def described_in_groups(
    exchange: FactorExchange, totals: Mapping[str, Tensor], answers: Sequence[Mapping[str, Tensor]] | None
) -> tuple[Tensor, Tensor]:
    """Predicted labels and features of all rows of an exchange, each by the tables without the part of its user's group.

    Args:
        exchange: of all of them.
        totals: of all stages.
        answers: what each group has said of them; None: what it would say.
    """
    rows, (groups, members) = exchange.rows, groups_of(exchange)
    means = rows.values.new_zeros(len(rows.items))
    features = rows.values.new_zeros(len(rows.items), feature_count(len(exchange.values)))
    for number, (group, places) in enumerate(zip(groups, members, strict=True)):
        if answers is None:
            own = {stage: group.answer(stage, totals)[stage] for stage in exchange.settings.stages}
        tables = item_tables(exchange.settings, totals, own if answers is None else answers[number], exchange.values)
        means[places], features[places] = group.known_users(tables).of_rows()
    return means, features


def groups_of(exchange: FactorExchange) -> tuple[Sequence[FactorExchange], Sequence[Tensor]]:
    """The rows of every group of users, and their positions among all."""
    rows = exchange.rows
    number = rows.users % max(1, min(GROUPS, len(rows.users.unique())))
    members = [torch.nonzero(number == group).flatten() for group in number.unique().tolist()] or [number]
    groups = [
        FactorExchange(exchange.settings, rows.select(own), exchange.labels[own], exchange.values) for own in members
    ]
    return groups, members
