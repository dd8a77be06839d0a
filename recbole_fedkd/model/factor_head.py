"""A small head on what is known: item factors, biases and histograms in, a label distribution out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from recbole_fedkd.distillation.exchange import FactorExchange, item_tables
from recbole_fedkd.distillation.factors import Curvature
from recbole_fedkd.distillation.features import (
    ItemTables,
    KnownUsers,
    feature_count,
    moments,
    normal_logits,
    standardised,
)
from recbole_fedkd.model.network import NO_CONTEXT, Context


class FactorHead(nn.Module):
    """``-(v_t - mean)^2 / (2 s^2)`` plus a linear map and a perceptron of the features, as logits.

    At the start the maps are zero, so that the head is a discretised normal distribution around what the fold-in predicts.
    Until anything is known of the items it predicts the labels' middle.

    Args:
        exchange: of the users that the network serves: their rows, and what they make of totals.
        hidden: width of the perceptron.
    """

    user_rows: ClassVar[tuple[str, ...]] = ()
    item_rows: ClassVar[tuple[str, ...]] = ()
    told_buffers: ClassVar[tuple[str, ...]] = ("feature_mean", "feature_scale")
    known_scalars: Tensor
    item_bias: Tensor
    item_vectors: Tensor
    item_histogram: Tensor
    curvature_root: Tensor
    curvature_values: Tensor
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, exchange: FactorExchange, hidden: int) -> None:
        super().__init__()
        self.exchange = exchange
        labels, items = len(exchange.values), exchange.rows.item_count
        features = feature_count(labels)
        self.linear = nn.Linear(features, labels)
        last = nn.Linear(hidden, labels)
        self.perceptron = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), last)
        for layer in (self.linear, last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.log_scale = nn.Parameter(torch.zeros(1))
        width = exchange.settings.factor_size
        empty = {
            "known_scalars": torch.tensor([float(exchange.values.mean()), 1.0]).double(),
            "item_bias": torch.zeros(items).double(),
            "item_vectors": torch.zeros(items, width).double(),
            "item_histogram": torch.zeros(items, labels).double(),
            "curvature_root": torch.zeros(width + 1, width + 1).double(),
            "curvature_values": torch.zeros(width + 1).double(),
            "feature_mean": torch.zeros(features),
            "feature_scale": torch.ones(features),
        }
        for name, value in empty.items():
            self.register_buffer(name, value)
        self._users: KnownUsers | None = None
        self._of_rows: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(FactorHead._forget)

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
        others = exchange.known_users(item_tables(exchange.settings, totals, own, exchange.values))
        mean, features = others.of_rows()
        for kept, moment in zip((self.feature_mean, self.feature_scale), moments(features), strict=True):
            kept.copy_(moment)
        self._of_rows = mean.float(), self._standardised(features)

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
        self._users = None

    def rows(self, index: Tensor) -> Tensor:
        """Logits ``[n, T]`` of own rows, each as if it were not among them; before the exchange is over, all alike."""
        if self._of_rows is None:
            return self.logits(
                self.known_scalars[0].float().expand(len(index)),
                self.feature_mean.new_zeros(len(index), len(self.feature_mean)),
            )
        mean, features = self._of_rows
        return self.logits(mean[index], features[index])

    def forward(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Logits ``[batch, targets, T]`` of local users ``[batch]``, from 1, and items ``[batch, targets]``, in any context."""
        mean, features = self.known_users.of_pairs(users.repeat_interleave(items.shape[1]), items.flatten())
        return self.described(mean, features).view(*items.shape, -1)

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

    def described(self, mean: Tensor, features: Tensor) -> Tensor:
        """Logits ``[n, T]`` of pairs as :meth:`KnownUsers.of_pairs` describes them."""
        return self.logits(mean.float(), self._standardised(features))

    def squared_norm(self) -> Tensor:
        """``R(w)``: of the head's weights, all of which every batch touches."""
        return torch.stack([weight.square().sum() for weight in self.parameters()]).sum()

    def _standardised(self, features: Tensor) -> Tensor:
        return standardised(features, self.feature_mean, self.feature_scale)

    def logits(self, mean: Tensor, features: Tensor) -> Tensor:
        """Logits ``[n, T]`` given predicted labels ``[n]`` and standardised features ``[n, F]``."""
        spread = self.known_scalars[1].sqrt().float() * self.log_scale.exp()
        normal = normal_logits(self.exchange.values.float(), mean, spread)
        logits: Tensor = normal + self.linear(features) + self.perceptron(features)
        return logits

    def _forget(self, _keys: object) -> None:
        self._users = None
