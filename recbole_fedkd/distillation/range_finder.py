"""Leading directions of the Gram matrix of all residuals, from a few exchanges of k numbers per item (a range finder).

Notation as in ``factors.py``. Sources: Halko, Martinsson, Tropp, SIAM Review 53(2), 2011; Musco, Musco, NIPS 2015 (block Krylov
iteration).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recbole_fedkd.distillation.factors import Rows

RESOLVED = 1e-6
"""Share of a column's length below which what is left of it is rounding: sums travel in single precision."""


def first_basis(item_count: int, width: int, seed: int) -> Tensor:
    """``Q_1 [items, k]``: an orthonormal basis of a Gaussian matrix from a public seed, the same for everybody."""
    generator = torch.Generator().manual_seed(seed)
    return orthonormal(torch.randn(item_count, width, generator=generator, dtype=torch.double))


def orthonormal(matrix: Tensor, lengths: Tensor | None = None) -> Tensor:
    """``Q`` of the QR decomposition of ``[n, k]`` with positive diagonal of ``R``, so that it is unique.

    A column that the others before it explain is 0: what is left of it is rounding, in which no two machines agree.

    Args:
        matrix: ``[n, k]``.
        lengths: that its columns had before anything was taken off ``[k]``; None: as they are.
    """
    least = RESOLVED * (matrix.norm(dim=0) if lengths is None else lengths)
    kept = torch.arange(matrix.shape[1], device=matrix.device)
    while True:
        columns, upper = torch.linalg.qr(matrix[:, kept])
        dependent = (upper.diagonal().abs() <= least[kept[: len(upper)]]).nonzero()
        if not len(dependent):
            break
        kept = kept[torch.arange(len(kept), device=kept.device) != dependent[0]]
    basis = torch.zeros_like(matrix)
    basis[:, kept[: columns.shape[1]]] = columns * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return basis


def gram_product(rows: Rows, basis: Tensor) -> Tensor:
    """Additive statistic of a pass: ``X^T (X Q)`` ``[items, k]`` for a basis ``Q [items, k]``; ``X`` is never formed."""
    projected = rows.per_user(rows.values.unsqueeze(1) * basis[rows.items])
    return rows.per_item(rows.values.unsqueeze(1) * projected[rows.users])


def next_basis(product: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """``Q_{j+1} = qr((I - W W^T) Y_j)`` with ``W = [Q_1 .. Q_j]``: the block Krylov step (Musco and Musco 2015).

    Taken off twice, since once leaves rounding that a nearly dependent block would blow up.
    """
    known, lengths = torch.cat(list(bases), 1), product.norm(dim=0)
    for _ in range(2):
        product = product - known @ (known.T @ product)
    return orthonormal(product, lengths)


def nystroem_mixing(products: Sequence[Tensor], bases: Sequence[Tensor], width: int) -> Tensor:
    """What turns all products into leading columns of the Nystroem approximation of the Gram matrix ``G = X^T X``.

    With ``W`` all bases side by side, ``Y = G W`` all products and ``W^T Y = E L E^T``: ``F = Y E L^{-1/2}``, so that ``F F^T``
    is ``G`` itself where ``W`` spans its range; its best approximation of lower rank comes from the singular vectors of ``F``.

    Args:
        products: ``Y_j [items, k]`` of every pass.
        bases: ``Q_j [items, k]`` of every pass.
        width: number of columns to keep; fewer are returned where the spectrum ends before.

    Returns:
        ``M [passes * k, at most width]`` with ``F = Y M``, columns by falling eigenvalue.
    """
    known, product = torch.cat(list(bases), 1), torch.cat(list(products), 1)
    core = known.T @ product
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    # Directions without any weight would be divided by nearly nothing.
    kept = values > 1e-9 * values[-1].clamp(min=1e-300)
    mixing = vectors[:, kept] / values[kept].sqrt()
    left, _, right = torch.linalg.svd(product @ mixing, full_matrices=False)
    signs = torch.where(left.sum(0) < 0, -1.0, 1.0)
    leading: Tensor = (mixing @ right.T * signs)[:, :width]
    return leading


def shares_above_noise(factors: Tensor, item_counts: Tensor, variance: Tensor, users: int) -> Tensor:
    """What of each column of factors ``F [items, k]`` of the Gram matrix is more than noise would make, as shares ``[k]``.

    Residuals of variance ``s`` without any pattern have ``E[G] = s diag(n)``: along a direction ``f`` of length one that is
    ``d = s sum_i f_i^2 n_i``. Of what is drawn, the leading directions lie above it by up to ``2 sqrt(m / n)`` of
    it, with ``m`` rows a user (the edge of Marchenko and Pastur 1967, for few of them); half of that is taken off too.

    Args:
        factors: as of :func:`nystroem_mixing`, ``F F^T`` near ``G``.
        item_counts: ``n [items]``.
        variance: ``s``.
        users: how many users the rows are of.
    """
    squares = factors.square()
    weight = squares.sum(0).clamp(min=1e-300)
    counts = (squares * item_counts.unsqueeze(1)).sum(0) / weight
    rows_each = item_counts.sum() / max(users, 1)
    return (1 - variance * (counts + (rows_each * counts).sqrt()) / weight).clamp(min=0)


def scaled_factors(factors: Tensor, item_counts: Tensor, shrinkage: float) -> Tensor:
    """Item vectors ``V [items, k]`` for users with an identity prior, from factors of the Gram matrix.

    ``G_ij`` sums over the users that rated both; a row is divided by ``sqrt(n_i + shrinkage)``, so that ``v_i v_j`` is near
    the mean of ``x_ui x_uj`` and items of few rows lean to zero.
    """
    return factors / (item_counts + shrinkage).sqrt().unsqueeze(1)
