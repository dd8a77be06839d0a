"""Item factors from sums over users: biases, an EM step, and the fold-in of a user; directions: ``range_finder.py``.

Every statistic here is a sum over users, and so over clients: what all clients' rows give together is the sum of what each
gives. From the totals everybody computes the same item vectors, and a user's own vector needs nothing but the user's rows.

Notation: rating ``r`` of user ``u`` and item ``i``; ``mu`` the mean rating, ``b_u`` and ``b_i`` offsets (biases), residual
``x = r - mu - b_u - b_i``; ``X [users, items]`` the residuals, zero where there is no row; width ``k``.

Sources: Salakhutdinov, Mnih, NIPS 2007 (probabilistic matrix factorisation); Lim, Teh, KDD Cup 2007 (its variational form, in
which item vectors are uncertain too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Self

import torch
from torch import Tensor

MARGIN = 0.01
"""Share of the labels' range that a predicted mean keeps from either end: no sum of biases is certain of a label."""

_CHUNK = 1 << 18
"""Numbers of one block of matrices, which then fits a processor's cache: twice as fast as ten megabytes."""


@dataclass(frozen=True)
class Rows:
    """Rows of some users, of a client or of everybody.

    Attributes:
        users: user of every row ``[n]``, from 0.
        items: item of every row ``[n]``, from 0.
        values: rating or residual of every row ``[n]``, double.
        user_count: number of users.
        item_count: number of items.
    """

    users: Tensor
    items: Tensor
    values: Tensor
    user_count: int
    item_count: int

    def select(self, rows: Tensor | slice) -> Self:
        """Some of the rows, of the same users and items."""
        return replace(self, users=self.users[rows], items=self.items[rows], values=self.values[rows])

    @property
    def answers(self) -> Tensor:
        """Which of the sums per item every row is part of ``[n]``."""
        return self.items

    def per_user(self, values: Tensor) -> Tensor:
        """Sums of values ``[n, ...]`` over every user's rows, ``[users, ...]``."""
        return _sums(self.users, values, self.user_count)

    def per_item(self, values: Tensor) -> Tensor:
        """Sums of values ``[n, ...]`` over every item's rows, ``[items, ...]``."""
        return _sums(self.items, values, self.item_count)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Rows of every user ``[users]`` and of every item ``[items]``."""
        ones = torch.ones_like(self.values)
        return self.per_user(ones), self.per_item(ones)


@dataclass(frozen=True)
class PairedRows(Rows):
    """Rows of several owners (clients, or users), whose sums per item are sums per pair of owner and item.

    Attributes:
        pairs: pair of every row ``[n]``.
        pair_count: number of pairs.
    """

    pairs: Tensor
    pair_count: int

    @property
    def answers(self) -> Tensor:
        """The pairs."""
        return self.pairs

    def per_item(self, values: Tensor) -> Tensor:
        """Sums of values ``[n, ...]`` over every pair's rows, ``[pairs, ...]``."""
        return _sums(self.pairs, values, self.pair_count)


def _sums(index: Tensor, values: Tensor, count: int) -> Tensor:
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, index, values)


# Biases: two exchanges of one number per item


def shrunk_mean(sums: Tensor, counts: Tensor, shrinkage: float) -> Tensor:
    """Means that lean to zero, as if ``shrinkage`` more rows of value zero were there: ``sum / (count + shrinkage)``."""
    return sums / (counts + shrinkage)


def user_biases(rows: Rows, mean: Tensor | float, item_bias: Tensor, shrinkage: float) -> Tensor:
    """``b_u`` ``[users]`` given the items': the shrunk mean of ``r - mu - b_i``; it needs the user's rows alone."""
    counts, _ = rows.counts()
    return shrunk_mean(rows.per_user(rows.values - mean - item_bias[rows.items]), counts, shrinkage)


def item_residual_sums(rows: Rows, mean: Tensor | float, user_bias: Tensor) -> Tensor:
    """Additive statistic behind ``b_i``: sums of ``r - mu - b_u`` per item, ``[items]``."""
    return rows.per_item(rows.values - mean - user_bias[rows.users])


def residuals(rows: Rows, mean: Tensor | float, user_bias: Tensor, item_bias: Tensor) -> Rows:
    """The same rows with ``x = r - mu - b_u - b_i`` for values."""
    return replace(rows, values=rows.values - mean - user_bias[rows.users] - item_bias[rows.items])


# Fold-in and EM


@dataclass(frozen=True)
class Uncertainty:
    """Covariances of item vectors: ``S_i = root diag(scales_i) root^T``.

    Attributes:
        root: ``[k, r]``.
        scales: ``[items, r]``.
    """

    root: Tensor
    scales: Tensor


@dataclass(frozen=True)
class UserPosterior:
    """What a user's rows say of the user's vector: a normal distribution.

    Attributes:
        mean: ``m_u [users, k]``.
        covariance: ``C_u [users, k, k]``.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def second(self) -> Tensor:
        """``E[p p^T] = C_u + m_u m_u^T`` ``[users, k, k]``."""
        return self.covariance + self.mean.unsqueeze(2) * self.mean.unsqueeze(1)


class FoldedUsers:
    """User vectors by their rows: ``C_u = (I + sum E[v v^T] / s)^{-1}``, ``m_u = C_u sum v x / s``, prior N(0, I).

    Args:
        rows: residuals.
        vectors: expected item vectors ``V [items, k]``.
        noise: variance ``s`` of a residual around ``v_i p_u``.
        uncertainty: of the item vectors, ``E[v v^T] = v v^T + S_i``; None: they are certain.
    """

    def __init__(self, rows: Rows, vectors: Tensor, noise: float, uncertainty: Uncertainty | None = None) -> None:
        self.rows, self.vectors, self.noise = rows, vectors, noise
        width = vectors.shape[1]
        self.uncertainty = uncertainty or Uncertainty(vectors.new_zeros(width, 0), vectors.new_zeros(len(vectors), 0))
        outer = vectors.new_zeros(rows.user_count, width, width)
        order, present, counts = self.by_user
        for user, own_vectors in zip(present.tolist(), vectors[rows.items[order]].split(counts), strict=True):
            outer[user] = own_vectors.T @ own_vectors
        scales, root = rows.per_user(self.uncertainty.scales[rows.items]), self.uncertainty.root
        covariances = (root * scales.unsqueeze(1)) @ root.T
        self.precision = torch.eye(width, dtype=vectors.dtype, device=vectors.device) + (outer + covariances) / noise
        self.weighted = rows.per_user(vectors[rows.items] * rows.values.unsqueeze(1)) / noise
        covariance = torch.linalg.inv(self.precision)
        self.posterior = UserPosterior((covariance @ self.weighted.unsqueeze(2)).squeeze(2), covariance)

    def of_pairs(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Expected residual ``v_i m_u`` and its variance as a share of the noise, both ``[n]``, of users and items ``[n]``."""
        runs, counts = torch.unique_consecutive(users, return_counts=True)
        if len(runs) * 16 > len(users):
            posterior, vectors, scales = self.posterior, self.vectors[items], self.uncertainty.scales[items]
            drawn = torch.einsum("nij,nj->ni", posterior.covariance[users], vectors)
            mean, along = posterior.mean[users], self._along_users[users]
            return (vectors * mean).sum(1), ((drawn * vectors).sum(1) + (along * scales).sum(1)) / self.noise
        # A ranking asks for many items of a user in a row: one product, in place of a matrix for every pair.
        parts = zip(runs.tolist(), items.split(counts.tolist()), strict=True)
        means, variances = zip(*(self.of_user(user, part) for user, part in parts), strict=True)
        return torch.cat(means), torch.cat(variances)

    def of_user(self, user: int, items: Tensor | slice) -> tuple[Tensor, Tensor]:
        """:meth:`of_pairs` of one user; a slice of items is not copied."""
        vectors, along = self.vectors[items], self._along_users[user]
        drawn = vectors @ self.posterior.covariance[user]
        variance = (drawn * vectors).sum(1) + self.uncertainty.scales[items] @ along
        return vectors @ self.posterior.mean[user], variance / self.noise

    def of_rows(self) -> tuple[Tensor, Tensor]:
        """The same of every row ``[n]`` by the user's *other* rows, exactly: what the row adds is taken off its user's sums."""
        means, leverages = zip(*map(self._of_part, self.parts()), strict=True)
        return torch.cat(means), torch.cat(leverages)

    def _of_part(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`of_rows` of some rows.

        With ``L L^T`` the precision without the row, ``w`` the weighted sum and ``v`` the vector, the mean ``v m`` and the
        variances along ``v`` and along every direction of the uncertainty are products of columns of
        ``L^{-1} [w, v, root diag(scales)^{1/2}]``.
        """
        users, items, root = self.rows.users[part], self.rows.items[part], self.uncertainty.root
        vectors, scales = self.vectors[items], self.uncertainty.scales[items]
        outer = (root.T.unsqueeze(2) * root.T.unsqueeze(1)).flatten(1)
        left = self.precision.flatten(1)[users].addmm_(scales, outer, alpha=-1 / self.noise)
        left = left.unflatten(1, self.precision.shape[1:])
        left.addcmul_(vectors.unsqueeze(2), vectors.unsqueeze(1), value=-1 / self.noise)
        columns = vectors.new_empty(*vectors.shape, 2 + root.shape[1])
        columns[:, :, 0] = self.weighted[users] - vectors * (self.rows.values[part] / self.noise).unsqueeze(1)
        columns[:, :, 1] = vectors
        torch.mul(root, scales.sqrt().unsqueeze(1), out=columns[:, :, 2:])
        # Not checked: what is left is the prior and more, and were that lost in rounding, so is what is asked for.
        lower, _ = torch.linalg.cholesky_ex(left)
        solved = torch.linalg.solve_triangular(lower, columns, upper=False)
        along_sum = (solved[:, :, :1].mT @ solved).squeeze(1)
        spread = torch.linalg.vector_norm(solved[:, :, 1:], dim=(1, 2)).square()
        return along_sum[:, 1], (spread + along_sum[:, 2:].square().sum(1)) / self.noise

    @cached_property
    def _along_users(self) -> Tensor:
        """``root^T E[p p^T] root``, of which the diagonal ``[users, r]``."""
        root = self.uncertainty.root
        return ((self.posterior.second @ root) * root).sum(1)

    def parts(self) -> Sequence[Tensor]:
        """Numbers of rows, as many at a time as bounds the memory of a matrix for each."""
        width = self.vectors.shape[1]
        parts: Sequence[Tensor] = torch.arange(len(self.rows.items)).split(max(1, _CHUNK // max(1, width * width)))
        return parts

    @cached_property
    def by_user(self) -> tuple[Tensor, Tensor, list[int]]:
        """The rows' order user by user ``[n]``, the users that have any, and how many each has."""
        present, counts = torch.unique(self.rows.users, return_counts=True)
        return torch.argsort(self.rows.users, stable=True), present, counts.tolist()


def em_statistics(fold: FoldedUsers, by_user: bool = False) -> tuple[Tensor, Tensor]:
    """Additive statistics of a step of expectation-maximisation, in item vectors and item biases at once.

    The last entry of every vector is a constant, so that the last of a user's is the user's bias. With ``a = [p, 1]``, ``p`` a
    user's vector without it, and ``e = x - v m_u`` of a row: the gradient of an item's expected log-likelihood (times ``s``).

    Returns:
        ``g_i = sum_u (E[a] e - [C_u v, 0])`` ``[items, k]``, without the constant's entry and with the bias's in its place; and
        ``A = sum_rows E[a a^T]`` ``[k, k]``, of all items together; or of every user by itself ``[users, k, k]``.
    """
    rows, posterior = fold.rows, fold.posterior
    mean, second = posterior.mean.clone(), posterior.second
    mean[:, -1] = 1
    second[:, -1, :], second[:, :, -1] = mean, mean
    left = rows.values - (fold.vectors[rows.items] * posterior.mean[rows.users]).sum(1)
    gradient = rows.per_item(mean[rows.users] * left.unsqueeze(1))
    order, present, of_users = fold.by_user
    parts = zip(fold.vectors[rows.items[order]].split(of_users), posterior.covariance[present], strict=True)
    drawn = torch.cat([posterior.mean[:0], *(vectors @ covariance for vectors, covariance in parts)])
    drawn[:, -1] = 0
    gradient.index_add_(0, rows.answers[order], drawn, alpha=-1)
    counts, _ = rows.counts()
    curvatures = second * counts.view(-1, 1, 1)
    return gradient, curvatures if by_user else curvatures.sum(0)


@dataclass(frozen=True)
class Curvature:
    """``P_i = (n_i A + L)^{-1}`` for any number of rows ``n_i``, by one decomposition: ``root diag(1 / (n_i d + 1)) root^T``.

    ``A`` is the mean of ``E[a a^T]`` over rows and stands for that of an item's own rows: a preconditioner, which decides how
    fast steps arrive and not where. It is why a step costs ``k`` numbers an item and not ``k (k + 3) / 2``.

    Attributes:
        root: ``[k, k]``.
        values: ``d [k]``.
    """

    root: Tensor
    values: Tensor

    @staticmethod
    def of(mean: Tensor, precision: Tensor) -> Curvature:
        """Of ``A [k, k]`` and the prior precisions ``L [k]``, all above 0."""
        scale = precision.rsqrt()
        values, vectors = torch.linalg.eigh(mean * scale.unsqueeze(1) * scale)
        return Curvature(scale.unsqueeze(1) * vectors, values.clamp(min=0))

    def solved(self, counts: Tensor, right: Tensor) -> Tensor:
        """``P_i y_i`` ``[items, k]`` of counts ``[items]`` and ``y [items, k]``."""
        return (right @ self.root) * self.shares(counts) @ self.root.T

    def shares(self, counts: Tensor) -> Tensor:
        """``1 / (n_i d + 1)`` ``[items, k]``."""
        return 1 / (counts.unsqueeze(1) * self.values + 1)

    def uncertainty(self, counts: Tensor, noise: Tensor | float) -> Uncertainty:
        """Covariances ``s P_i`` of item vectors; the last entry, the bias's, gives way to the constant, which is certain."""
        root = self.root.clone()
        root[-1] = 0
        return Uncertainty(root, noise * self.shares(counts))


def prior_precision(vectors: Tensor, uncertainty: Uncertainty, counts: Tensor, noise: Tensor | float) -> Tensor:
    """Precision of every entry of the item vectors, times ``s``, as the vectors have it themselves (empirical Bayes)."""
    rated = (counts > 0).double()
    second = vectors.square() + uncertainty.scales @ uncertainty.root.square().T
    mean = (second * rated.unsqueeze(1)).sum(0) / rated.sum().clamp(min=1)
    return noise / mean.clamp(min=1e-6)


# From a predicted mean to labels


def distribution_of_mean(mean: Tensor, spread: float, values: Tensor) -> Tensor:
    """Label distributions ``[n, T]`` that look like a normal one and have exactly the given means.

    With two labels a distribution is the mean itself, read as a probability. Arguments as of :func:`middle_of_mean`.
    """
    values = values.to(mean.dtype)
    return _tilted(middle_of_mean(mean, spread, values), spread, values)


def middle_of_mean(mean: Tensor, spread: float, values: Tensor) -> Tensor:
    """Middles ``a [n]`` of normal distributions that have exactly the given means once they are cut into labels.

    ``p_t`` is proportional to ``exp(-(v_t - a)^2 / (2 spread^2))`` with ``a`` such that ``sum_t p_t v_t`` is the mean; with the
    mean itself for ``a`` it would be pulled inwards.

    Args:
        mean: predicted label values ``[n]``; they are kept a hundredth of the labels' range inside, so that nothing is certain.
        spread: standard deviation of a label around its prediction, above 0.
        values: label values ``[T]``, ascending.
    """
    values = values.to(mean.dtype)
    margin = MARGIN * (values[-1] - values[0])
    mean = mean.clamp(values[0] + margin, values[-1] - margin)
    grid, reached = _means_of_middles(spread, tuple(values.tolist()), mean.dtype, mean.device)
    index = torch.searchsorted(reached, mean.contiguous()).clamp(1, len(grid) - 1)
    low, high = reached[index - 1], reached[index]
    share = ((mean - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    return grid[index - 1] + share * (grid[index] - grid[index - 1])


@lru_cache(maxsize=8)
def _means_of_middles(
    spread: float, labels: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Middles and the means that they come to, both ascending ``[8193]``; a ranking asks for the same ones user by user."""
    values = torch.tensor(labels, dtype=dtype, device=device)
    middle, reach = (values[0] + values[-1]) / 2, (values[-1] - values[0]) / 2
    # sinh puts grid points where they are needed: close inside the labels, sparse far outside.
    steps = torch.linspace(-1, 1, 8193, dtype=dtype, device=device)
    grid = middle + torch.sinh(steps * 6) / torch.sinh(steps.new_tensor(6.0)) * (
        reach + 16 * spread * spread / torch.diff(values).min() + 8 * spread
    )
    return grid, _tilted(grid, spread, values) @ values


def _tilted(location: Tensor, spread: float, values: Tensor) -> Tensor:
    return (-((location.unsqueeze(1) - values) ** 2) / (2 * spread * spread)).softmax(1)
