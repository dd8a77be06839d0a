"""What the rows of a network's users say of a pair, as features of the network: fold-in, biases, histograms, item vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.distillation.exchange import FactorExchange, FactorSettings, item_tables
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.distillation.features import (
    KnownUsers,
    feature_count,
    middles,
    moments,
    normal_logits,
    standardised,
)
from recbole_fedkd.model.compiled import Ids, compiled, has_compiler
from recbole_fedkd.model.received import ReceivedTables, described_in_groups, groups_of
from recbole_fedkd.model.with_rows import WithRows


def exchange_of(settings: FactorSettings, schema: DataSchema, rows: ClientRows) -> FactorExchange:
    """What a client's users make of their rows in an exchange of item factors; rows by user, users by the client's numbers."""
    users, items = schema.own_numbers(rows), rows.interactions[schema.item_field]
    order = torch.argsort(users, stable=True)
    labels, values = schema.label_indices(rows)[order], torch.tensor(schema.label_values)
    known = Rows(users[order], items[order], values.double()[labels], len(rows.users) + 1, schema.item_num)
    return FactorExchange(replace(settings, users=max(1, schema.user_num - 1)), known, labels, values)


class KnownPairs(WithRows):
    """Features of pairs by the rows of a network's own users, and a head on them: a linear shortcut to the network's logits.

    The tables are those that the exchange of item factors comes to among ``GROUPS`` groups of the users. A pair that is among
    the rows is described as if it were not: by the user's other rows, and by the items' tables without the user's group.
    They are computed when they are first needed and never part of a ``state_dict``: they follow from the rows.

    Args:
        exchange: of the network's users: their rows.

    Attributes:
        width: numbers of :meth:`described`.
    """

    beside: ClassVar[tuple[str, ...]] = ("exchange",)
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
        self._pair_features: _PairFeatures | None = None

    @property
    def pair_features(self) -> _PairFeatures:
        """What is computed once."""
        if self._pair_features is None:
            with torch.no_grad():
                self._pair_features = self._compute()
        return self._pair_features

    def _compute(self) -> _PairFeatures:
        return _pair_features_in_groups(self.exchange)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._pair_features = None
        return super()._apply(fn, recurse)

    @contextmanager
    def of_somebody(self, items: Tensor, labels: Tensor) -> Iterator[None]:
        """As long as it lasts, local user 0 is somebody new with these rows: items and label indices ``[n]``."""
        kept = self.pair_features
        with torch.no_grad():
            self._pair_features = kept.of_somebody(self.exchange, items, labels)
        try:
            yield
        finally:
            self._pair_features = kept

    def described(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Where labels lie ``[n]`` (:func:`middles`) and standardised features ``[n, F]`` of local users and items ``[n]``."""
        return self.pair_features.of_pairs(users, items)

    def forward(self, middle: Tensor, features: Tensor) -> Tensor:
        """``-(v_t - a)^2 / (2 s^2)`` around ``a [n]`` plus a linear map of the features, at first zero: logits ``[n, T]``."""
        logits: Tensor = self.linear(features)
        return logits + normal_logits(self.values, middle, self.pair_features.spread * self.log_scale.exp())


class ReceivedPairs(KnownPairs):
    """The same by the tables that came down in an exchange: they are of everybody's rows, and part of a ``state_dict``.

    What is left out of them for the own rows is the client's own part, which only the client that trains has at hand.
    """

    def __init__(self, exchange: FactorExchange) -> None:
        super().__init__(exchange)
        self.received = ReceivedTables(exchange)
        self.register_load_state_dict_post_hook(ReceivedPairs._forget)

    def know(self, totals: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """As of :class:`ReceivedTables`."""
        self.received.know(totals, own)
        self._forget(None)

    def teacher(self, users: Tensor, items: Tensor) -> Tensor:
        """Label logits ``[n, T]`` of the fold-in, of local users and items ``[n]``; of own rows each without itself."""
        middle, _ = self.described(users, items)
        return normal_logits(self.values, middle, self.pair_features.spread)

    def _compute(self) -> _PairFeatures:
        received = self.received
        empty = received.feature_mean.new_zeros(0), received.feature_mean.new_zeros(0, self.width)
        rows = self.exchange.rows
        if received.of_rows is None:
            rows = rows.select(slice(0))
        return _PairFeatures(
            received.known_users, (received.feature_mean, received.feature_scale), rows, *(received.of_rows or empty)
        )

    def _forget(self, _keys: object) -> None:
        self._pair_features = None


class _PairFeatures:
    """What is known of users, and the rows that are described without themselves.

    Args:
        users: who are known, with the tables.
        moments: of the features, mean and deviation.
        rows: that are described.
        middle: where the label of each lies ``[n]``.
        features: standardised ``[n, F]``.
    """

    def __init__(
        self, users: KnownUsers, moments: tuple[Tensor, Tensor], rows: Rows, middle: Tensor, features: Tensor
    ) -> None:
        self.users, self.tables, self.moments = users, users.tables, moments
        self.vectors, self.spread = self.tables.vectors.float(), self.tables.noise.sqrt().float()
        self.middle, self.features = middle, features
        keys, order = torch.sort(rows.users * self.tables.vectors.shape[0] + rows.items, stable=True)
        first = torch.diff(keys, prepend=keys.new_full((1,), -1)) != 0
        self.keys, self.order = keys[first], order[first]
        bounds = torch.arange(rows.user_count + 1, device=keys.device) * len(self.vectors)
        self.starts = torch.searchsorted(self.keys, bounds)

    def of_somebody(self, exchange: FactorExchange, items: Tensor, labels: Tensor) -> _PairFeatures:
        """The same tables for one user, 0, of these rows, which are no part of the tables."""
        rows = Rows(torch.zeros_like(items), items, exchange.values[labels], 1, exchange.rows.item_count)
        users = FactorExchange(exchange.settings, rows, labels, exchange.values).known_users(self.tables)
        mean, features = users.of_rows()
        middle = middles(mean, self.tables.noise, exchange.values)
        return _PairFeatures(users, self.moments, rows, middle, standardised(features, *self.moments))

    def of_user(self, user: int) -> tuple[Tensor, Tensor]:
        """:meth:`of_pairs` of one user and every item."""
        mean, features = self.users.of_user(user)
        middle, features = middles(mean, self.tables.noise, self.users.values), standardised(features, *self.moments)
        key = user * len(self.vectors)
        begin, end = torch.searchsorted(self.keys, self.keys.new_tensor([key, key + len(self.vectors)])).tolist()
        items, rows = self.keys[begin:end] - key, self.order[begin:end]
        middle[items], features[items] = self.middle[rows], self.features[rows]
        return middle, features

    def of_pairs(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        row = self._rows(users, items)
        known = row >= 0
        if known.all():
            return self.middle.index_select(0, row), self.features.index_select(0, row)
        rows = row[known]
        (others,) = torch.where(~known)
        mean, features = self.users.of_pairs(users[others], items[others])
        middle, features = middles(mean, self.tables.noise, self.users.values), standardised(features, *self.moments)
        if not len(rows):
            return middle, features
        of_all, described = self.middle.new_empty(len(users)), self.features.new_empty(len(users), features.shape[1])
        (places,) = torch.where(known)
        of_all[places], described[places] = self.middle[rows], self.features[rows]
        of_all[others], described[others] = middle, features
        return of_all, described

    def _rows(self, users: Tensor, items: Tensor) -> Tensor:
        """The row of every pair ``[n]``, -1 where it is none."""
        rows = torch.full_like(users, -1)
        if users.device.type == "cpu" and has_compiler():
            pairs = users.contiguous().numpy(), items.contiguous().numpy(), len(self.vectors)
            compiled(_find)(*(tensor.numpy() for tensor in (self.keys, self.starts, self.order)), *pairs, rows.numpy())
        elif len(self.keys):
            wanted = users * len(self.vectors) + items
            entry = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
            rows = torch.where(self.keys[entry] == wanted, self.order[entry], rows)
        return rows


def _find(keys: Ids, starts: Ids, order: Ids, users: Ids, items: Ids, item_count: int, rows: Ids) -> None:
    """Fill in the row of every pair whose key ``user * item_count + item`` is among the ascending ones, user by user."""
    for pair in range(len(users)):
        if users[pair] < 0 or users[pair] + 1 >= len(starts):
            continue  # a user who is none has no row; lookups say that it is none
        wanted, low, high = users[pair] * item_count + items[pair], starts[users[pair]], starts[users[pair] + 1]
        end = high
        while low < high:
            middle = (low + high) // 2
            if keys[middle] < wanted:
                low = middle + 1
            else:
                high = middle
        if low < end and keys[low] == wanted:
            rows[pair] = order[low]


def _pair_features_in_groups(exchange: FactorExchange) -> _PairFeatures:
    """Tables of one place, and the features of its rows, each without itself; the argument as of :class:`KnownPairs`."""
    rows = exchange.rows
    groups, _ = groups_of(exchange)
    totals: dict[str, Tensor] = {}
    said: list[dict[str, Tensor]] = [{} for _ in groups]
    for stage in exchange.settings.stages:
        for own, group in zip(said, groups, strict=True):
            own.update(group.answer(stage, totals))
        totals.update({name: torch.stack([own[name] for own in said]).sum(0) for name in said[0] if name not in totals})
    tables = item_tables(exchange.settings, totals, None, exchange.values)
    means, features = described_in_groups(exchange, totals, said)
    scale, middle = moments(features), middles(means, tables.noise, exchange.values)
    return _PairFeatures(exchange.known_users(tables), scale, rows, middle, standardised(features, *scale))
