"""The exchange of item factors: which sums a client sends in which round, and what it makes of their totals.

Six rounds with the default settings: label histograms, residual sums, one product per pass of the range finder, moments of an
EM step. Every answer is a sum over the client's users, so that a server needs totals alone, and a client takes its own part off
a total before it uses it on its own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.distillation import factors
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.distillation.features import ItemTables, KnownUsers

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class FactorSettings:
    """The keys of the exchange, see ``properties/overall.yaml``.

    Attributes:
        factor_size: width of item vectors.
        sketch_width: directions of a pass.
        sketch_passes: number of passes.
        em_steps: steps of expectation-maximisation after them.
        bias_shrinkage: rows of residual zero that a bias leans on.
        count_shrinkage: rows that an item's vector leans on.
        vector_shrinkage: shrinkage of vectors in an EM step.
        noise_share: noise as a share of the residuals' variance.
        seed: of the first basis, public.
    """

    factor_size: int
    sketch_width: int
    sketch_passes: int
    em_steps: int
    bias_shrinkage: float
    count_shrinkage: float
    vector_shrinkage: float
    noise_share: float
    seed: int

    @property
    def stages(self) -> list[str]:
        """Name of what goes up in every round of the exchange."""
        passes = [f"product_{number}" for number in range(self.sketch_passes)]
        return ["histogram", "residuals", *passes, *(f"moments_{number}" for number in range(self.em_steps))]

    def numbers(self, stage: str, labels: int, items: int) -> int:
        """Numbers per item of a stage, with ``T`` labels."""
        kinds = {
            "histogram": labels,
            "residuals": 1,
            "product": min(self.sketch_width, items),
            "moments": self.factor_size * (self.factor_size + 3) // 2,
        }
        return kinds[stage.partition("_")[0]]


def packed(second: Tensor, cross: Tensor) -> Tensor:
    """Moments ``A [I, k, k]``, symmetric, and ``h [I, k]`` in one array ``[I, k (k + 1) / 2 + k]``."""
    row, column = torch.triu_indices(second.shape[1], second.shape[1])
    return torch.cat([second[:, row, column], cross], 1)


def unpacked(moments: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What :func:`packed` has put together."""
    row, column = torch.triu_indices(width, width)
    second = moments.new_zeros(len(moments), width, width)
    second[:, row, column] = moments[:, : len(row)]
    second[:, column, row] = moments[:, : len(row)]
    return second, moments[:, len(row) :]


class FactorExchange:
    """A client's side of the exchange, or that of one place that has everything.

    Args:
        settings: the keys.
        rows: own rows, with label values.
        labels: label index of every row ``[n]``.
        values: label values ``[T]``, ascending.
    """

    def __init__(self, settings: FactorSettings, rows: Rows, labels: Tensor, values: Tensor) -> None:
        self.settings, self.rows, self.labels, self.values = settings, rows, labels, values.double()

    def answer(self, stage: str, totals: Tensors) -> dict[str, Tensor]:
        """What goes up in a round.

        Args:
            stage: one of ``settings.stages``.
            totals: of all stages before it, by the names of the arrays.

        Returns:
            Arrays in double precision: by the stage's name one row per item; beside the first product ``squares [1, 1]``.
        """
        settings, rows = self.settings, self.rows
        if stage == "histogram":
            return {stage: rows.per_item(functional.one_hot(self.labels, len(self.values)).double())}
        if stage == "residuals":
            mean = _mean(totals["histogram"], self.values)
            first = item_biases(settings, totals, self.values, mean)
            user_bias = factors.user_biases(rows, mean, first, settings.bias_shrinkage)
            return {stage: factors.item_residual_sums(rows, mean, user_bias).unsqueeze(1)}
        left = self._left(totals)
        kind, _, number = stage.partition("_")
        if kind == "product":
            basis = bases(settings, totals, rows.item_count)[int(number)]
            arrays = {stage: factors.gram_product(left, basis)}
            return arrays | ({"squares": left.values.square().sum().view(1, 1)} if number == "0" else {})
        vectors = item_vectors(settings, totals, int(number), totals)
        posterior = factors.fold_in(left, vectors, float(_noise(settings, totals, self.values)))
        return {stage: packed(*factors.em_statistics(left, posterior))}

    def _left(self, totals: Tensors) -> Rows:
        mean = _mean(totals["histogram"], self.values)
        item_bias = item_biases(self.settings, totals, self.values, mean)
        user_bias = factors.user_biases(self.rows, mean, item_bias, self.settings.bias_shrinkage)
        return factors.residuals(self.rows, mean, user_bias, item_bias)

    def known_users(self, tables: ItemTables) -> KnownUsers:
        """What the client knows of its users, given what is known of the items."""
        return KnownUsers(self.rows, self.labels, tables, self.values, self.settings.bias_shrinkage)


def item_tables(settings: FactorSettings, totals: Tensors, own: Tensors | None, values: Tensor) -> ItemTables:
    """What totals say of every item, as far as the exchange has come, without the part ``own`` of who reads them.

    The mean, the directions of the sketch and the noise stay those of all: they are common to everybody, and no item's.
    """
    values = values.double()
    own = own or {}
    others = {name: total - own[name] if name in own else total for name, total in totals.items()}
    # Totals that travelled in few bits may be a little less than a client's own.
    others["histogram"] = others["histogram"].clamp(min=0)
    mean = _mean(totals["histogram"], values)
    if f"product_{settings.sketch_passes - 1}" in others:
        steps = sum(f"moments_{number}" in others for number in range(settings.em_steps))
        vectors = item_vectors(settings, others, steps, totals)
    else:
        vectors = mean.new_zeros(len(others["histogram"]), 0)
    return ItemTables(
        mean,
        item_biases(settings, others, values, mean),
        vectors,
        others["histogram"],
        _noise(settings, totals, values),
    )


def item_biases(settings: FactorSettings, totals: Tensors, values: Tensor, mean: Tensor) -> Tensor:
    """``b_i [items]``: shrunk means of what the users' first biases leave, and before that is known of what the mean leaves."""
    counts = totals["histogram"].sum(1)
    sums = totals["residuals"].squeeze(1) if "residuals" in totals else totals["histogram"] @ values - mean * counts
    return factors.shrunk_mean(sums, counts, settings.bias_shrinkage)


def bases(settings: FactorSettings, totals: Tensors, items: int) -> list[Tensor]:
    """Bases ``Q_1 .. Q_j`` that follow from the products so far; everybody computes the same."""
    found = [factors.first_basis(items, min(settings.sketch_width, items), settings.seed)]
    for number in range(settings.sketch_passes - 1):
        if f"product_{number}" not in totals:
            break
        found.append(factors.next_basis(totals[f"product_{number}"], found))
    return found


def item_vectors(settings: FactorSettings, totals: Tensors, steps: int, common: Tensors) -> Tensor:
    """Item vectors ``[I, k]`` after so many EM steps; after none, those of the passes.

    Args:
        settings: the keys.
        totals: what the vectors are made of.
        steps: number of EM steps.
        common: the totals of all, from which the bases follow.
    """
    if steps:
        moments = totals[f"moments_{steps - 1}"]
        return factors.em_vectors(*unpacked(moments, settings.factor_size), settings.vector_shrinkage)
    products = [totals[f"product_{number}"] for number in range(settings.sketch_passes)]
    basis = bases(settings, common, len(totals["histogram"]))
    found = factors.nystroem_factors(products, basis, settings.factor_size)
    scaled = factors.scaled_factors(found, totals["histogram"].sum(1), settings.count_shrinkage)
    return functional.pad(scaled, (0, settings.factor_size - scaled.shape[1]))


def _mean(histogram: Tensor, values: Tensor) -> Tensor:
    return (histogram @ values).sum() / histogram.sum(1).sum().clamp(min=1)


def _noise(settings: FactorSettings, totals: Tensors, values: Tensor) -> Tensor:
    """Variance of a residual around its prediction: a share of the residuals' own, or before they are known of the labels'."""
    histogram = totals["histogram"].sum(0)
    count = histogram.sum().clamp(min=1)
    if "squares" in totals:
        variance = totals["squares"].squeeze() / count
    else:
        variance = histogram @ values.square() / count - (histogram @ values / count) ** 2
    return (settings.noise_share * variance).clamp(min=1e-6)
