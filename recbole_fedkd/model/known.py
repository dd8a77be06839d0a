"""What the rows of a network's users say of a pair, as features of the network: fold-in, biases, histograms, item vectors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.distillation.exchange import FactorExchange, FactorSettings, item_tables
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.distillation.features import feature_count, moments, normal_logits, standardised

GROUPS = 8
"""Groups of users whose own part is taken off the items' tables where their rows are trained on, as clients do."""


def exchange_of(settings: FactorSettings, schema: DataSchema, rows: ClientRows) -> FactorExchange:
    """What a client's users make of their rows in an exchange of item factors; rows by user, users by the client's numbers."""
    users, items = schema.own_numbers(rows), rows.interactions[schema.item_field]
    order = torch.argsort(users, stable=True)
    labels, values = schema.label_indices(rows)[order], torch.tensor(schema.label_values)
    known = Rows(users[order], items[order], values.double()[labels], len(rows.users) + 1, schema.item_num)
    return FactorExchange(settings, known, labels, values)


class KnownPairs(nn.Module):
    """Features of pairs by the rows of a network's own users, and a head on them: a linear shortcut to the network's logits.

    The tables are those that the exchange of item factors comes to among ``GROUPS`` groups of the users. A pair that is among
    the rows is described as if it were not: by the user's other rows, and by the items' tables without the user's group.
    They are computed when they are first needed and never part of a ``state_dict``: they follow from the rows.

    Args:
        exchange: of the network's users: their rows.

    Attributes:
        width: numbers of :meth:`described`.
    """

    values: Tensor

    def __init__(self, exchange: FactorExchange) -> None:
        super().__init__()
        self.exchange = exchange
        labels = len(exchange.values)
        self.width = feature_count(labels)
        self.linear = nn.Linear(self.width, labels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("values", exchange.values.float(), persistent=False)
        self._found: _Found | None = None

    @property
    def found(self) -> _Found:
        """What is computed once."""
        if self._found is None:
            with torch.no_grad():
                self._found = _Found(self.exchange)
        return self._found

    @contextmanager
    def of_somebody(self, items: Tensor, labels: Tensor) -> Iterator[None]:
        """As long as it lasts, local user 0 is somebody new with these rows: items and label indices ``[n]``."""
        kept = self.found
        with torch.no_grad():
            self._found = kept.of_somebody(self.exchange, items, labels)
        try:
            yield
        finally:
            self._found = kept

    def described(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted labels ``[n]`` and standardised features ``[n, F]`` of local users and items ``[n]``."""
        mean, features = self.found.of_pairs(users.cpu(), items.cpu())
        return mean.to(users.device), features.to(users.device)

    def vectors(self, items: Tensor) -> Tensor:
        """Item vectors ``[..., k]`` of items."""
        return self.found.vectors[items.cpu()].to(items.device)

    def forward(self, mean: Tensor, features: Tensor) -> Tensor:
        """``-(v_t - mean)^2 / (2 s^2)`` plus a linear map of the features, which starts at zero: logits ``[n, T]``."""
        logits: Tensor = self.linear(features)
        return logits + normal_logits(self.values, mean, self.found.spread * self.log_scale.exp())


class _Found:
    """Tables of one place, and the features of its rows, each without itself; arguments as of :class:`KnownPairs`."""

    def __init__(self, exchange: FactorExchange) -> None:
        rows = exchange.rows
        groups, members = _groups(exchange)
        totals: dict[str, Tensor] = {}
        said: list[dict[str, Tensor]] = [{} for _ in groups]
        for stage in exchange.settings.stages:
            for own, group in zip(said, groups, strict=True):
                own.update(group.answer(stage, totals))
            totals.update(
                {name: torch.stack([own[name] for own in said]).sum(0) for name in said[0] if name not in totals}
            )
        tables = item_tables(exchange.settings, totals, None, exchange.values)
        self.tables, self.users = tables, exchange.known_users(tables)
        self.vectors, self.spread = tables.vectors.float(), tables.noise.sqrt().float()
        means = rows.values.new_zeros(len(rows.items))
        features = rows.values.new_zeros(len(rows.items), feature_count(len(exchange.values)))
        for own, group, places in zip(said, groups, members, strict=True):
            others = item_tables(exchange.settings, totals, own, exchange.values)
            means[places], features[places] = group.known_users(others).of_rows()
        self.moments = moments(features)
        self._take(rows, means, features)

    def _take(self, rows: Rows, means: Tensor, features: Tensor) -> None:
        self.means, self.features = means.float(), standardised(features, *self.moments)
        self.keys, self.order = torch.sort(rows.users * rows.item_count + rows.items, stable=True)

    def of_somebody(self, exchange: FactorExchange, items: Tensor, labels: Tensor) -> _Found:
        """The same tables for one user, 0, of these rows, which are no part of the tables."""
        other = copy.copy(self)
        rows = Rows(torch.zeros_like(items), items, exchange.values[labels], 1, exchange.rows.item_count)
        alone = FactorExchange(exchange.settings, rows, labels, exchange.values)
        other.users = alone.known_users(self.tables)
        other._take(rows, *other.users.of_rows())
        return other

    def of_pairs(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        mean, features = self.users.of_pairs(users, items)
        means, features_of_rows = mean.float(), standardised(features, *self.moments)
        if len(self.keys):
            wanted = users * self.users.rows.item_count + items
            entry = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
            known = torch.nonzero(self.keys[entry] == wanted).flatten()
            rows = self.order[entry[known]]
            means[known], features_of_rows[known] = self.means[rows], self.features[rows]
        return means, features_of_rows


def _groups(exchange: FactorExchange) -> tuple[Sequence[FactorExchange], Sequence[Tensor]]:
    """The rows of every group of users, and their places among all."""
    rows = exchange.rows
    number = rows.users % max(1, min(GROUPS, len(rows.users.unique())))
    places = [torch.nonzero(number == group).flatten() for group in number.unique().tolist()] or [number]
    parts = [
        Rows(rows.users[place], rows.items[place], rows.values[place], rows.user_count, rows.item_count)
        for place in places
    ]
    groups = [
        FactorExchange(exchange.settings, part, exchange.labels[each], exchange.values)
        for part, each in zip(parts, places, strict=True)
    ]
    return groups, places
