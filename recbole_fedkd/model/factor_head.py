"""A small head on what is known: item factors, biases and histograms in, a label distribution out."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from recbole_fedkd.distillation.exchange import FactorExchange
from recbole_fedkd.distillation.features import feature_count, normal_logits
from recbole_fedkd.model.network import NO_CONTEXT, Context
from recbole_fedkd.model.received import ReceivedTables


class FactorHead(ReceivedTables):
    """``-(v_t - a)^2 / (2 s^2)`` plus a linear map and a perceptron of the features, as logits.

    At the start the maps are zero, so that the head is a discretised normal distribution, whose mean is what the fold-in
    predicts.

    Args:
        exchange: as of the base class.
        hidden: width of the perceptron.
    """

    user_rows: ClassVar[tuple[str, ...]] = ()
    item_rows: ClassVar[tuple[str, ...]] = ()
    received_buffers: ClassVar[tuple[str, ...]] = ("feature_mean", "feature_scale")

    def __init__(self, exchange: FactorExchange, hidden: int) -> None:
        super().__init__(exchange)
        labels = len(exchange.values)
        features = feature_count(labels)
        self.linear = nn.Linear(features, labels)
        last = nn.Linear(hidden, labels)
        self.perceptron = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), last)
        for layer in (self.linear, last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def rows(self, index: Tensor) -> Tensor:
        """Logits ``[n, T]`` of own rows, each as if it were not among them; before the exchange is over, all alike."""
        if self.of_rows is None:
            return self.logits(
                self.known_scalars[0].float().expand(len(index)),
                self.feature_mean.new_zeros(len(index), len(self.feature_mean)),
            )
        middle, features = self.of_rows
        return self.logits(middle[index], features[index])

    def forward(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Logits ``[batch, targets, T]`` of local users ``[batch]``, from 1, and items ``[batch, targets]``, in any context."""
        mean, features = self.known_users.of_pairs(users.repeat_interleave(items.shape[1]), items.flatten())
        return self.described(self.middles(mean), features).view(*items.shape, -1)

    def described(self, middle: Tensor, features: Tensor) -> Tensor:
        """Logits ``[n, T]`` of pairs as :meth:`KnownUsers.of_pairs` describes them, given the :meth:`middles`."""
        return self.logits(middle, self.standardised(features))

    def squared_norm(self) -> Tensor:
        """``R(w)``: of the head's weights, all of which every batch touches."""
        return torch.stack([weight.square().sum() for weight in self.parameters()]).sum()

    def logits(self, middle: Tensor, features: Tensor) -> Tensor:
        """Logits ``[n, T]`` given :meth:`middles` ``[n]`` and standardised features ``[n, F]``."""
        spread = self.known_scalars[1].sqrt().float() * self.log_scale.exp()
        normal = normal_logits(self.exchange.values.float(), middle, spread)
        logits: Tensor = normal + self.linear(features) + self.perceptron(features)
        return logits
