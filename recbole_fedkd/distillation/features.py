"""What is known of a user and an item before any network has seen them: a predicted label and eighteen numbers.

Everything comes from the user's own rows and from tables per item that are sums over users (``distillation/factors.py``). For a
row that is trained on, the row itself is left out of what its user is known by; the items' tables without it are the caller's
affair, who takes its own part off the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.distillation.factors import Curvature, FoldedUsers, Rows, middle_of_mean

HISTOGRAM_STRENGTH = 5.0
"""Rows of the common label histogram that a user's or an item's own leans on."""

FEATURE_REACH = 5.0
"""Standardised features are cut here: an item that nobody else has rated must not throw a network off."""

LEAST_DEVIATION = 0.05
"""A feature that hardly varies among few rows must not be blown up."""


@dataclass(frozen=True)
class ItemTables:
    """What is known per item.

    Attributes:
        mean: mean label ``mu``, a scalar.
        bias: ``b_i [items]``.
        vectors: ``V [items, k]``.
        histogram: rows of each label ``[items, T]``.
        noise: variance of a residual around its prediction, a scalar.
        curvature: says how uncertain the vectors are, with one entry more for the bias; all zero: they are certain.
    """

    mean: Tensor
    bias: Tensor
    vectors: Tensor
    histogram: Tensor
    noise: Tensor
    curvature: Curvature

    @property
    def entries(self) -> Tensor:
        """Vectors and biases side by side, ``[items, k + 1]``."""
        return torch.cat([self.vectors, self.bias.unsqueeze(1)], 1)

    @property
    def label_shares(self) -> Tensor:
        """Shares of the labels among all rows ``[T]``, none of them zero."""
        totals = self.histogram.sum(0)
        return (totals / totals.sum().clamp(min=1)).clamp(min=1e-6)

    def described(self, items: Tensor | slice) -> Tensor:
        """Features of items ``[n]``, whoever is asked about them ``[n, 1 + T]``: logarithms of their rows and label shares."""
        return self._described[items]

    @cached_property
    def _described(self) -> Tensor:
        return described_items(self.histogram, self.label_shares)


def described_items(histogram: Tensor, common: Tensor) -> Tensor:
    """Logarithms of the rows of items and of their label shares over the common ones ``[n, 1 + T]``."""
    counts = histogram.sum(1)
    return torch.cat([(counts + 1).log().unsqueeze(1), _log_shares(histogram, counts, common)], 1)


def feature_count(labels: int) -> int:
    """Number of features with ``T`` labels."""
    return 8 + 2 * labels


def standardised(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Features ``[n, F]`` at mean 0 and deviation 1, within :data:`FEATURE_REACH`, in single precision.

    All is in single precision before the mean is taken off: of a lone row nothing is left then, and not what rounding leaves,
    of which an optimiser that divides by a gradient's size makes steps as large as of anything.
    """
    standard: Tensor = (features.float() - mean.float()) / scale.float()
    return standard.clamp(-FEATURE_REACH, FEATURE_REACH)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Means and deviations ``[F]`` of features ``[n, F]``; one that hardly varies among few rows must not be blown up."""
    if not len(features):
        return features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
    return features.mean(0), features.std(0, correction=0).clamp(min=LEAST_DEVIATION)


def normal_logits(values: Tensor, middle: Tensor, spread: Tensor) -> Tensor:
    """Logits ``[n, T]`` of a normal distribution cut into the label values ``[T]``, around ``[n]``.

    Without what the logits of a row have in common: the square of a middle far off, as noise or a codec makes it of totals,
    would leave nothing of their differences in single precision.
    """
    return (values * middle.unsqueeze(1) - values**2 / 2) / (spread * spread)


def middles(mean: Tensor, noise: Tensor, values: Tensor) -> Tensor:
    """Where :func:`normal_logits` of variance ``noise`` must lie to have predicted labels ``[n]`` for means, ``[n]``."""
    return middle_of_mean(mean.double(), float(noise.sqrt()), values.double()).float()


class KnownUsers:
    """What is known of users by their own rows, given the items' tables.

    Args:
        rows: the rows, with label values.
        labels: label index of every row ``[n]``.
        tables: of the items.
        values: label values ``[T]``, ascending.
        shrinkage: rows of residual zero that a user's bias leans on.
    """

    def __init__(self, rows: Rows, labels: Tensor, tables: ItemTables, values: Tensor, shrinkage: float) -> None:
        self.rows, self.tables, self.values, self.shrinkage = rows, tables, values.double(), shrinkage
        left = rows.values - tables.mean - tables.bias[rows.items]
        self.left = replace(rows, values=left)
        # The user's bias is one more entry of the user's vector, with the prior that shrinks it by so many rows.
        constant = (tables.noise / max(shrinkage, 1e-6)).sqrt().expand(rows.item_count, 1)
        self.vectors = torch.cat([tables.vectors, constant], 1)
        uncertainty = tables.curvature.uncertainty(tables.histogram.sum(1), tables.noise)
        self.fold = FoldedUsers(self.left, self.vectors, float(tables.noise), uncertainty)
        powers = torch.stack([torch.ones_like(left), left, left.square()], 1)
        self.own = torch.cat([powers, functional.one_hot(labels, len(values)).double()], 1)
        self.sums = rows.per_user(self.own)

    def of_pairs(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted labels ``[n]`` and features ``[n, 8 + 2 T]`` of pairs that are not among the rows."""
        return self._described(items, *self.fold.of_pairs(users, items), self._of_users[users])

    def of_user(self, user: int) -> tuple[Tensor, Tensor]:
        """The same of one user and every item."""
        of_user = self._of_users[user].expand(self.rows.item_count, -1)
        return self._described(slice(None), *self.fold.of_user(user, slice(None)), of_user)

    def of_rows(
        self, folded: Callable[[FoldedUsers], tuple[Tensor, Tensor]] = FoldedUsers.of_rows
    ) -> tuple[Tensor, Tensor]:
        """The same of the rows themselves: what :meth:`of_pairs` says of each once the row is gone.

        ``folded``: what the fold-in says of them.
        """
        others = self.sums[self.rows.users] - self.own
        return self._described(self.rows.items, *folded(self.fold), self._of_sums(others))

    @cached_property
    def _of_users(self) -> Tensor:
        return self._of_sums(self.sums)

    def _of_sums(self, sums: Tensor) -> Tensor:
        """Bias, deviation, and logarithms of rows and label shares ``[n, 3 + T]``, by a user's sums ``[n, 3 + T]``."""
        counts, total, squares, histogram = sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3:]
        bias = total / (counts + self.shrinkage).clamp(min=1e-6)
        around = squares - 2 * bias * total + counts * bias.square()
        deviation = ((around.clamp(min=0) + 2 * self.tables.noise) / (counts + 2)).sqrt()
        shares = _log_shares(histogram, counts, self.tables.label_shares)
        return torch.cat([torch.stack([bias, deviation, (counts + 1).log()], 1), shares], 1)

    def _described(
        self, items: Tensor | slice, fitted: Tensor, leverage: Tensor, of_users: Tensor
    ) -> tuple[Tensor, Tensor]:
        tables, low, high = self.tables, self.values[0], self.values[-1]
        user_bias, deviation, rows = of_users[:, 0], of_users[:, 1], of_users[:, 2]
        expected = tables.mean + tables.bias[items]
        mean = (expected + fitted).clamp(low, high)
        numbers = [
            mean - tables.mean,
            (expected + user_bias).clamp(low, high) - tables.mean,
            fitted - user_bias,
            leverage.clamp(0, 10).sqrt(),
            deviation,
            (mean - tables.mean) / (tables.noise * (1 + leverage.clamp(0, 5))),
            rows,
        ]
        return mean, torch.cat([torch.stack(numbers, 1), tables.described(items), of_users[:, 3:]], 1)


def _log_shares(histogram: Tensor, counts: Tensor, common: Tensor) -> Tensor:
    """Logarithm of smoothed label shares over the common ones, ``[n, T]``; 0 where nothing is known."""
    smoothed = (histogram + HISTOGRAM_STRENGTH * common) / (counts + HISTOGRAM_STRENGTH).unsqueeze(1)
    return smoothed.log() - common.log()
