"""Item factors from sums over users: biases, a range finder, an EM step, and the fold-in of a user.

Every statistic here is a sum over users, and so over clients: what all clients' rows give together is the sum of what each
gives. From the totals everybody computes the same item vectors, and a user's own vector needs nothing but the user's rows.

Notation: rating ``r`` of user ``u`` and item ``i``; ``mu`` the mean rating, ``b_u`` and ``b_i`` offsets (biases), residual
``x = r - mu - b_u - b_i``; ``X [users, items]`` the residuals, zero where there is no row; width ``k``.

Sources: Halko, Martinsson, Tropp, SIAM Review 53(2), 2011 (range finder); Musco, Musco, NIPS 2015 (block Krylov iteration);
Salakhutdinov, Mnih, NIPS 2007 (probabilistic matrix factorisation; here by expectation-maximisation, users integrated out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MARGIN = 0.01
"""Share of the labels' range that a predicted mean keeps from either end: no sum of biases is certain of a label."""

_CHUNK = 1 << 22  # numbers of one outer-product block, which bounds its memory


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


# Range finder: a few exchanges of k numbers per item


def first_basis(item_count: int, width: int, seed: int) -> Tensor:
    """``Q_1 [items, k]``: an orthonormal basis of a Gaussian matrix from a public seed, the same for everybody."""
    generator = torch.Generator().manual_seed(seed)
    return orthonormal(torch.randn(item_count, width, generator=generator, dtype=torch.double))


def orthonormal(matrix: Tensor) -> Tensor:
    """``Q`` of the QR decomposition of ``[n, k]`` with positive diagonal of ``R``, so that it is unique."""
    basis, upper = torch.linalg.qr(matrix)
    signed: Tensor = basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return signed


def gram_product(rows: Rows, basis: Tensor) -> Tensor:
    """Additive statistic of a pass: ``X^T (X Q)`` ``[items, k]`` for a basis ``Q [items, k]``; ``X`` is never formed."""
    projected = rows.per_user(rows.values.unsqueeze(1) * basis[rows.items])
    return rows.per_item(rows.values.unsqueeze(1) * projected[rows.users])


def next_basis(product: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """``Q_{j+1} = qr((I - W W^T) Y_j)`` with ``W = [Q_1 .. Q_j]``: the block Krylov step (Musco and Musco 2015).

    Taken off twice, since once leaves rounding that a nearly dependent block would blow up.
    """
    known = torch.cat(list(bases), 1)
    for _ in range(2):
        product = product - known @ (known.T @ product)
    return orthonormal(product)


def nystroem_factors(products: Sequence[Tensor], bases: Sequence[Tensor], width: int) -> Tensor:
    """Leading columns of the Nystroem approximation of the Gram matrix ``G = X^T X`` from all passes.

    With ``W`` all bases side by side, ``Y = G W`` all products and ``W^T Y = E L E^T``: ``F = Y E L^{-1/2}``, so that ``F F^T``
    is ``G`` itself where ``W`` spans its range; its best approximation of lower rank comes from the singular vectors of ``F``.

    Args:
        products: ``Y_j [items, k]`` of every pass.
        bases: ``Q_j [items, k]`` of every pass.
        width: number of columns to keep; fewer are returned where the spectrum ends before.

    Returns:
        ``F [items, at most width]``, columns by falling eigenvalue.
    """
    known, product = torch.cat(list(bases), 1), torch.cat(list(products), 1)
    core = known.T @ product
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    # Directions without any weight would be divided by nearly nothing.
    kept = values > 1e-9 * values[-1].clamp(min=1e-300)
    left, scale, _ = torch.linalg.svd(product @ vectors[:, kept] / values[kept].sqrt(), full_matrices=False)
    signs = torch.where(left.sum(0) < 0, -1.0, 1.0)
    leading: Tensor = (left * scale * signs)[:, :width]
    return leading


def scaled_factors(factors: Tensor, item_counts: Tensor, shrinkage: float) -> Tensor:
    """Item vectors ``V [items, k]`` for users with an identity prior, from factors of the Gram matrix.

    ``G_ij`` sums over the users that rated both; a row is divided by ``sqrt(n_i + shrinkage)``, so that ``v_i v_j`` is near
    the mean of ``x_ui x_uj`` and items of few rows lean to zero.
    """
    return factors / (item_counts + shrinkage).sqrt().unsqueeze(1)


# Fold-in and EM


@dataclass(frozen=True)
class UserPosterior:
    """What a user's rows say of the user's vector: a normal distribution.

    Attributes:
        mean: ``m_u [users, k]``.
        covariance: ``C_u [users, k, k]``.
    """

    mean: Tensor
    covariance: Tensor


def fold_in(rows: Rows, vectors: Tensor, noise: float) -> UserPosterior:
    """Posterior of user vectors with prior N(0, I): ``C_u = (I + sum v v^T / s)^{-1}``, ``m_u = C_u sum v x / s``.

    Args:
        rows: residuals.
        vectors: item vectors ``V [items, k]``.
        noise: variance ``s`` of a residual around ``v_i m_u``.
    """
    width = vectors.shape[1]
    outer = vectors.new_zeros(rows.user_count, width, width)
    for part in torch.arange(len(rows.items)).split(max(1, _CHUNK // max(1, width * width))):
        found = vectors[rows.items[part]]
        outer.index_add_(0, rows.users[part], found.unsqueeze(2) * found.unsqueeze(1))
    covariance = torch.linalg.inv(torch.eye(width, dtype=vectors.dtype) + outer / noise)
    weighted = rows.per_user(vectors[rows.items] * rows.values.unsqueeze(1)) / noise
    return UserPosterior((covariance @ weighted.unsqueeze(2)).squeeze(2), covariance)


def predict(posterior: UserPosterior, vectors: Tensor, users: Tensor, items: Tensor) -> Tensor:
    """Expected residual ``v_i m_u`` ``[n]`` of users and items ``[n]``."""
    return (vectors[items] * posterior.mean[users]).sum(1)


def leave_one_out(rows: Rows, posterior: UserPosterior, vectors: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Prediction of every row's residual by the user's *other* rows, and the row's leverage, both ``[n]``.

    With ``f = v m`` and leverage ``h = v^T C v / s`` it is exactly ``(f - h x) / (1 - h)``: no user is folded in twice.
    """
    found = vectors[rows.items]
    leverage = ((posterior.covariance[rows.users] @ found.unsqueeze(2)).squeeze(2) * found).sum(1) / noise
    fitted = predict(posterior, vectors, rows.users, rows.items)
    return (fitted - leverage * rows.values) / (1 - leverage), leverage


def em_statistics(rows: Rows, posterior: UserPosterior) -> tuple[Tensor, Tensor]:
    """Additive statistics of an EM step.

    Returns:
        ``A_i = sum_u (C_u + m_u m_u^T)`` ``[items, k, k]`` and ``h_i = sum_u m_u x`` ``[items, k]``, over every item's users.
    """
    mean = posterior.mean
    second = posterior.covariance + mean.unsqueeze(2) * mean.unsqueeze(1)
    width = mean.shape[1]
    sums = mean.new_zeros(rows.item_count, width, width)
    for part in torch.arange(len(rows.items)).split(max(1, _CHUNK // max(1, width * width))):
        sums.index_add_(0, rows.items[part], second[rows.users[part]])
    return sums, rows.per_item(mean[rows.users] * rows.values.unsqueeze(1))


def em_vectors(second: Tensor, cross: Tensor, shrinkage: float) -> Tensor:
    """``V_i = (A_i + shrinkage I)^{-1} h_i`` ``[items, k]`` from the totals of :func:`em_statistics`."""
    eye = torch.eye(second.shape[1], dtype=second.dtype)
    solved: Tensor = torch.linalg.solve(second + shrinkage * eye, cross.unsqueeze(2))
    return solved.squeeze(2)


# From a predicted mean to labels


def distribution_of_mean(mean: Tensor, spread: float, values: Tensor) -> Tensor:
    """Label distributions ``[n, T]`` that look like a normal one and have exactly the given means.

    ``p_t`` is proportional to ``exp(-(v_t - a)^2 / (2 spread^2))`` with ``a`` such that ``sum_t p_t v_t`` is the mean, which a
    normal distribution cut into labels would pull inwards. With two labels it is the mean itself, read as a probability.

    Args:
        mean: predicted label values ``[n]``; they are kept a hundredth of the labels' range inside, so that nothing is certain.
        spread: standard deviation of a label around its prediction, above 0.
        values: label values ``[T]``, ascending.
    """
    values = values.to(mean.dtype)
    margin = MARGIN * (values[-1] - values[0])
    mean = mean.clamp(values[0] + margin, values[-1] - margin)
    middle, reach = (values[0] + values[-1]) / 2, (values[-1] - values[0]) / 2
    # sinh puts grid points where they are needed: close inside the labels, sparse far outside.
    steps = torch.linspace(-1, 1, 8193, dtype=mean.dtype)
    grid = middle + torch.sinh(steps * 6) / torch.sinh(torch.tensor(6.0, dtype=mean.dtype)) * (
        reach + 16 * spread * spread / torch.diff(values).min() + 8 * spread
    )
    reached = _tilted(grid, spread, values) @ values
    index = torch.searchsorted(reached, mean.contiguous()).clamp(1, len(grid) - 1)
    low, high = reached[index - 1], reached[index]
    share = ((mean - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    return _tilted(grid[index - 1] + share * (grid[index] - grid[index - 1]), spread, values)


def _tilted(location: Tensor, spread: float, values: Tensor) -> Tensor:
    return (-((location.unsqueeze(1) - values) ** 2) / (2 * spread * spread)).softmax(1)
