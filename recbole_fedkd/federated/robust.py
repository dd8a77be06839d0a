"""Robust means: what the server makes of the clients' networks where some of them may be wrong.

All need every client's own upload, so that none goes with masks. Median and trimmed mean: Yin et al., ICML 2018. Krum and
multi-Krum: Blanchard et al., NIPS 2017.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from recbole_fedkd.distillation.knowledge import krum_scores
from recbole_fedkd.federated.message import Message
from recbole_fedkd.registry import Registry

Tensors = dict[str, Tensor]


class RobustMean(ABC):
    """What stands for the clients' networks in place of their mean.

    Args:
        trim_ratio: share of the clients that may be wrong.

    Attributes:
        name: value of the config key ``robust_mean``.
    """

    name: str

    def __init__(self, trim_ratio: float) -> None:
        self.trim_ratio = trim_ratio

    @abstractmethod
    def of(self, uploads: Sequence[Message], start: Mapping[str, Tensor], weights: Sequence[float]) -> Tensors:
        """One network, by the names of the uploads' arrays.

        Args:
            uploads: of a round, at least one.
            start: what all of them have started from.
            weights: of the uploads in a mean.
        """

    def wrong(self, clients: int) -> int:
        """How many of so many clients may be wrong."""
        return int(clients * self.trim_ratio)

    def without_effect(self, clients: int) -> str | None:
        """What a setting does not do with so many clients; None: they all do something."""
        if self.wrong(clients):
            return None
        share = self.trim_ratio
        return f"trim_ratio={share} of {clients} client(s) is less than one: robust_mean={self.name} leaves nobody out"


ROBUST_MEANS: Registry[type[RobustMean]] = Registry("robust mean", "robust means")
register_robust_mean = ROBUST_MEANS.register


@register_robust_mean
class CoordinateMedian(RobustMean):
    """Each number by itself; of an even number of clients the mean of the middle two."""

    name = "median"

    def of(self, uploads: Sequence[Message], start: Mapping[str, Tensor], weights: Sequence[float]) -> Tensors:
        """Medians."""
        return _each(
            uploads, lambda values: values.sort(0).values[(len(values) - 1) // 2 : len(values) // 2 + 1].mean(0)
        )

    def without_effect(self, clients: int) -> None:
        """It knows no share."""


@register_robust_mean
class TrimmedMean(RobustMean):
    """Each number by itself: the mean without a share of the clients at each end."""

    name = "trimmed_mean"

    def of(self, uploads: Sequence[Message], start: Mapping[str, Tensor], weights: Sequence[float]) -> Tensors:
        """Means of what lies between."""
        cut = self.wrong(len(uploads))
        return _each(uploads, lambda values: values.sort(0).values[cut : len(values) - cut].mean(0))


@register_robust_mean
class Krum(RobustMean):
    """The network of the client whose change is nearest to those of the others."""

    name = "krum"

    def of(self, uploads: Sequence[Message], start: Mapping[str, Tensor], weights: Sequence[float]) -> Tensors:
        """That of the lowest score."""
        return mean_of([uploads[self._order(uploads, start)[0]]], [1.0])

    def _order(self, uploads: Sequence[Message], start: Mapping[str, Tensor]) -> list[int]:
        scores = krum_scores(squared_distances(uploads, start), self.wrong(len(uploads)))
        order: list[int] = scores.argsort(stable=True).tolist()
        return order


@register_robust_mean
class MultiKrum(Krum):
    """The mean of the clients of the lowest scores of Krum, all but as many as may be wrong."""

    name = "multi_krum"

    def of(self, uploads: Sequence[Message], start: Mapping[str, Tensor], weights: Sequence[float]) -> Tensors:
        """Their mean, weighted as ever."""
        kept = sorted(self._order(uploads, start)[: len(uploads) - self.wrong(len(uploads))])
        return mean_of([uploads[upload] for upload in kept], [weights[upload] for upload in kept])


@register_robust_mean
class Directions(RobustMean):
    """The mean of the clients whose changes point most the way the others' do, none longer than the median.

    What learns from wrong labels is no farther off than what learns from few, but it turns another way: cosines tell the two
    apart where distances do not (Yaldiz, Zhang, Avestimehr, arXiv:2304.00160). A long change turns nowhere, hence the bound.
    """

    name = "directions"

    def of(self, uploads: Sequence[Message], start: Mapping[str, Tensor], weights: Sequence[float]) -> Tensors:
        """Their mean, weighted as ever."""
        products = inner_products(uploads, start)
        lengths = products.diagonal().clamp(min=1e-300).sqrt()
        cosines = products / lengths / lengths.unsqueeze(1)
        agreement = cosines.sum(1) - cosines.diagonal()
        kept = agreement.argsort(descending=True, stable=True)[: len(uploads) - self.wrong(len(uploads))].sort().values
        shares = torch.tensor(weights, dtype=torch.float64)[kept]
        shares = shares / shares.sum() * (lengths.median() / lengths[kept]).clamp(max=1.0)
        tensors = {}
        for name, array in uploads[0].arrays.items():
            values = torch.stack(
                [torch.tensor(uploads[index].arrays[name], dtype=torch.float64) for index in kept.tolist()]
            )
            origin = start[name].double() if name in start else torch.zeros_like(values[0])
            moved = origin + torch.einsum("k...,k->...", values - origin, shares)
            tensors[name] = moved.to(torch.tensor(array).dtype)
        return tensors


def inner_products(uploads: Sequence[Message], start: Mapping[str, Tensor]) -> Tensor:
    """Inner products of uploads ``[K, K]``, of what changed since ``start``, which all have in common."""
    products = torch.zeros(len(uploads), len(uploads), dtype=torch.float64)
    for name in uploads[0].arrays:
        changes = torch.stack([torch.tensor(upload.arrays[name], dtype=torch.float64).flatten() for upload in uploads])
        if name in start:
            changes -= start[name].double().flatten()
        products += changes @ changes.T
    return products


def squared_distances(uploads: Sequence[Message], start: Mapping[str, Tensor]) -> Tensor:
    """Squared L2 distances ``[K, K]`` between uploads."""
    products = inner_products(uploads, start)
    squares = products.diagonal()
    return (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * products).clamp(min=0)


def mean_of(uploads: Sequence[Message], weights: Sequence[float]) -> Tensors:
    """Weighted mean of every array."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return _each(uploads, lambda values: torch.einsum("k...,k->...", values, shares))


def _each(uploads: Sequence[Message], function: Callable[[Tensor], Tensor]) -> Tensors:
    """A function of every array of all uploads ``[K, ...]``, in double precision; its type is that of the array."""
    tensors = {}
    for name, array in uploads[0].arrays.items():
        values = torch.stack([torch.tensor(upload.arrays[name], dtype=torch.float64) for upload in uploads])
        tensors[name] = function(values).to(torch.tensor(array).dtype)
    return tensors
