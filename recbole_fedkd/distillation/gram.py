"""Ranking from sums of interactions: the Gram matrix ``G = X^T X``, and the item-item weights that follow from it.

``X [users, items]`` holds a one for every interaction. ``G`` is a sum over users, and so over clients; it is never formed, but
met as products ``G Q`` with a few directions (:mod:`recbole_fedkd.distillation.factors`). From those everybody who ranks needs
``F [items, k]`` with ``F F^T`` near ``G``, and the diagonal of ``G``: how many interactions an item has.

Sources: Steck, WWW 2019 (EASE); Cremonesi, Koren, Turrin, RecSys 2010 (PureSVD); Halko, Martinsson, Tropp, SIAM Review 53(2),
2011 (range finder).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.distillation.range_finder import first_basis, gram_product, next_basis, nystroem_mixing, orthonormal
from recbole_fedkd.registry import setting

_first_basis = lru_cache(maxsize=4)(first_basis)  # everybody's, once for all clients of a process

_LEVELS = 127
"""Numbers of a direction are whole multiples of a 127th of the row's largest: codec int8 carries them as they are."""


@dataclass(frozen=True)
class GramSettings:
    """The keys of the exchange; ``seed`` is the run's, of the first directions and public."""

    sketch_width: int = 16
    sketch_passes: int = 3
    seed: int = 2020
    gram_size: int = setting(32, "in [1, 1024]", "Columns of the item vectors whose products stand for common users.")
    gram_shrinkage: float = setting(250.0, "> 0", "GramEASE: lambda, interactions that the weights of an item lean on.")
    recent_half_life: float | None = setting(
        None,
        ">= 0",
        "Later interactions after which one counts half in its user's scores, but for a lasting quarter; 0: all alike. Not "
        "set: 10 where splits are by time (order: TO), else 0.",
    )

    @property
    def stages(self) -> list[str]:
        """Name of what goes up in every round of the exchange, one row per item."""
        return [f"product_{number}" for number in range(self.sketch_passes)]

    def width(self, items: int) -> int:
        """Directions of a pass."""
        return min(self.sketch_width, items)


@dataclass(frozen=True)
class ItemMap:
    """Scores of all items that are linear in a user's interactions ``x``: ``score_j = x_j own_j + (sum_i x_i into_i) . out_j``.

    Attributes:
        own: ``[items]``.
        into: ``[items, k]``.
        out: ``[items, k]``.
    """

    own: Tensor
    into: Tensor
    out: Tensor

    def scores(self, folded: Tensor, items: Tensor, seen: Tensor) -> Tensor:
        """Scores ``[..., n]`` of items ``[..., n]`` for users ``folded [..., k]``; ``seen``: whether they have met the item."""
        return (self.out[items] * folded.unsqueeze(-2)).sum(-1) + seen * self.own[items]


def directions(settings: GramSettings, items: int, products: Sequence[Tensor], known: Sequence[Tensor]) -> Tensor:
    """The directions ``[items, width]`` of the next pass, given the products so far and the directions that they belong to.

    The first are drawn from the public seed; the others are a block-Krylov step, rounded to what eight bits a number hold.
    """
    if not products:
        return _first_basis(items, settings.width(items), settings.seed)
    basis = next_basis(products[-1], [orthonormal(torch.cat(list(known), 1))])
    scale = (basis.abs().amax(1, keepdim=True) / _LEVELS).clamp(min=1e-30)
    rounded: Tensor = (basis / scale).round() * scale
    return rounded


def answer(stage: str, rows: Rows, basis: Tensor) -> dict[str, Tensor]:
    """What goes up in a round: ``X^T (X Q)``; with the first also the diagonal of the Gram matrix ``[items, 1]``."""
    sums = {stage: gram_product(rows, basis)}
    return sums | ({"counts": rows.counts()[1].unsqueeze(1)} if stage == "product_0" else {})


def recency(users: Tensor, times: Tensor, half_life: float) -> Tensor:
    """What each interaction counts for in its user's scores ``[n]``: ``1/4 + 3/4 2^(-later / half_life)``; 0: one, all alike.

    ``later`` is how many interactions of the user came after it; of equal times the order of the rows decides.

    Args:
        users: ``[n]``.
        times: ``[n]``.
        half_life: in interactions.
    """
    if not half_life:
        return torch.ones(len(users), dtype=torch.double)
    order = torch.argsort(times, stable=True)
    order = order[torch.argsort(users[order], stable=True)]
    ends = torch.bincount(users).cumsum(0)
    later = torch.empty(len(users), dtype=torch.double)
    later[order] = (ends[users[order]] - 1 - torch.arange(len(users))).double()
    return _LASTING + (1 - _LASTING) * torch.exp2(-later / half_life)


_LASTING = 0.25

HALF_LIFE = 10.0
"""Of a user's interactions where the next ones are asked for: found on the validation rows of ml-100k."""


def exchanged(settings: GramSettings, rows: Rows) -> tuple[Tensor, Tensor]:
    """The exchange in one place that has all rows: ``F`` and the diagonal of the Gram matrix."""
    totals: dict[str, Tensor] = {}
    bases: list[Tensor] = []
    for stage in settings.stages:
        bases.append(directions(settings, rows.item_count, products_of(settings, totals), bases))
        totals.update(answer(stage, rows, bases[-1]))
    return gram_factors(settings, products_of(settings, totals), bases), totals["counts"].squeeze(1)


def products_of(settings: GramSettings, totals: Mapping[str, Tensor]) -> list[Tensor]:
    """The products among the totals, in the order of their passes."""
    return [totals[stage].double() for stage in settings.stages if stage in totals]


def gram_factors(settings: GramSettings, products: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
    """``F [items, gram_size]`` with ``F F^T`` near ``G``, from products ``G W`` and directions ``W``; zeros beyond its rank."""
    directions = torch.cat(list(products), 1) @ nystroem_mixing(products, bases, settings.gram_size)
    return functional.pad(directions, (0, settings.gram_size - directions.shape[1]))


def ease_map(factors: Tensor, diagonal: Tensor, shrinkage: float) -> ItemMap:
    """EASE's weights ``B = I - P diag(P)^{-1}`` with ``P = (G + lambda I)^{-1}`` (Steck, eq. 8), for ``G = F F^T + D``.

    ``D`` is what the diagonal of ``G`` has beyond ``F F^T``, none of it negative. ``P`` comes by Woodbury's identity, so that
    nothing larger than ``[items, k]`` is formed; where ``F F^T`` is ``G`` it is EASE itself.

    Args:
        factors: ``F [items, k]``.
        diagonal: of ``G``, ``[items]``.
        shrinkage: ``lambda``, above 0.
    """
    rest = (diagonal - factors.square().sum(1)).clamp(min=0) + shrinkage
    scaled = factors / rest.unsqueeze(1)
    inner = torch.linalg.inv(
        torch.eye(factors.shape[1], dtype=factors.dtype, device=factors.device) + factors.T @ scaled
    )
    carried = scaled @ inner
    of_item = 1 / rest - (carried * scaled).sum(1)  # diagonal of P
    return ItemMap(1 - 1 / (rest * of_item), scaled, carried / of_item.unsqueeze(1))


def svd_map(factors: Tensor, width: int) -> ItemMap:
    """PureSVD's ``x V V^T`` with the leading eigenvectors ``V [items, width]`` of ``G = F F^T``, columns of ``F`` by weight."""
    lengths = factors.square().sum(0).sqrt()
    vectors = factors[:, :width] / lengths[:width].clamp(min=1e-300)
    return ItemMap(torch.zeros_like(factors[:, 0]), vectors, vectors)
