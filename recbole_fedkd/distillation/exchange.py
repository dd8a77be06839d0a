"""The exchange of item factors: which sums a client sends in which round, and what it makes of their totals.

Label histograms, residual sums, one product per pass of the range finder, one gradient per step of
expectation-maximisation, a round each. Every answer is a sum over the client's users, so that a server needs totals alone, and
a client takes its own part off a total before it uses it on its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.distillation import factors, range_finder
from recbole_fedkd.distillation.factors import Curvature, PairedRows, Rows
from recbole_fedkd.distillation.features import ItemTables, KnownUsers
from recbole_fedkd.registry import setting

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class FactorSettings:
    """The keys of the exchange; ``seed`` is the run's, of the first basis, and as public as the number of ``users``.

    ``drawn``: item vectors start from small random ones of that seed, and not from the passes.
    """

    factor_size: int = setting(16, "in [1, 256]", "Width of the item vectors.")
    sketch_width: int = setting(
        16, "in [1, 256]", "Directions of one pass of the range finder: numbers per item and round."
    )
    sketch_passes: int = setting(3, "in [1, 32]", "Passes, a round each; all their directions are kept.")
    em_steps: int = setting(4, "in [0, 100]", "Steps of expectation-maximisation after them, a round each.")
    bias_shrinkage: float = setting(4.0, ">= 0", "Rows of residual zero that the bias of a user or an item leans on.")
    count_shrinkage: float = setting(20.0, "> 0", "Rows that an item's vector leans on before it counts in full.")
    vector_shrinkage: float = setting(
        60.0,
        "> 0",
        "Shrinkage of item vectors in the first step of expectation-maximisation, in users of a unit vector; later steps find "
        "their own.",
    )
    noise_share: float = setting(
        1.0, "> 0", "Variance of a residual around its prediction, as a share of that of all residuals."
    )
    seed: int = 2020
    drawn: bool = False
    users: int = 1
    head_size: int = setting(32, "in [1, 4096]", "Width of the head's perceptron.")

    @property
    def stages(self) -> list[str]:
        """Name of what goes up in every round of the exchange, one row per item."""
        passes = [f"product_{number}" for number in range(self.sketch_passes)]
        return ["histogram", "residuals", *passes, *(f"gradient_{number}" for number in range(self.em_steps))]

    def numbers(self, stage: str, labels: int, items: int) -> int:
        """Numbers per item of a stage, with ``T`` labels."""
        kinds = {
            "histogram": labels,
            "residuals": 1,
            "product": min(self.sketch_width, items),
            "gradient": self.factor_size + 1,
        }
        return kinds[stage.partition("_")[0]]

    def beside(self, stage: str) -> dict[str, tuple[int, int]]:
        """Arrays that go with a stage and are no item's, and their shapes."""
        if stage == "product_0":
            return {"squares": (1, 1)}
        kind, _, number = stage.partition("_")
        return {f"curvature_{number}": (self.factor_size + 1,) * 2} if kind == "gradient" else {}


@dataclass(eq=False)
class FactorExchange:
    """A client's side of the exchange, or that of one place that has everything.

    Attributes:
        settings: the keys.
        rows: own rows, with label values.
        labels: label index of every row ``[n]``.
        values: label values ``[T]``, ascending, double.
    """

    settings: FactorSettings
    rows: Rows
    labels: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        self.values = self.values.double()

    def answer(self, stage: str, totals: Tensors, by_user: bool = False) -> dict[str, Tensor]:
        """What goes up in a round.

        Args:
            stage: one of ``settings.stages``.
            totals: of all stages before it, by the names of the arrays.
            by_user: whether what is no item's is told of every user by itself, ``[users, ...]``.

        Returns:
            Arrays in double precision: by the stage's name one row per item, and those of ``settings.beside``.
        """
        settings, rows = self.settings, self.rows
        if stage == "histogram":
            return {stage: rows.per_item(functional.one_hot(self.labels, len(self.values)).double())}
        if stage == "residuals":
            mean = _mean(totals["histogram"], self.values)
            first = item_biases(settings, totals, self.values, mean)
            user_bias = factors.user_biases(rows, mean, first, settings.bias_shrinkage)
            return {stage: factors.item_residual_sums(rows, mean, user_bias).unsqueeze(1)}
        kind, _, number = stage.partition("_")
        if kind == "product":
            left = self._left(totals)
            basis = bases(settings, totals, rows.item_count)[int(number)]
            arrays = {stage: range_finder.gram_product(left, basis)}
            squares = left.values.square()
            sums = rows.per_user(squares).view(-1, 1, 1) if by_user else squares.sum().view(1, 1)
            return arrays | ({"squares": sums} if number == "0" else {})
        fold = self.known_users(item_tables(settings, totals, None, self.values)).fold
        return dict(zip((stage, f"curvature_{number}"), factors.em_statistics(fold, by_user), strict=True))

    def in_one_place(self) -> dict[str, Tensor]:
        """Totals of all stages, where nobody else has a row."""
        totals: dict[str, Tensor] = {}
        for stage in self.settings.stages:
            totals.update(self.answer(stage, totals))
        return totals

    def answer_of_bounded_users(self, stage: str, totals: Tensors, unit: Callable[[str], float]) -> dict[str, Tensor]:
        """As :meth:`answer`, of users each shortened to norm 1 before they are added up.

        Args:
            stage: one of ``settings.stages``.
            totals: of all stages before it.
            unit: of the norm, by the name of an array.
        """
        rows, count = self.rows, self.rows.item_count
        keys, pairs = torch.unique(rows.users * count + rows.items, return_inverse=True)
        paired = PairedRows(rows.users, rows.items, rows.values, rows.user_count, count, pairs, len(keys))
        answers = FactorExchange(self.settings, paired, self.labels, self.values).answer(stage, totals, by_user=True)
        statistics = shortened(answers, stage, keys // count, rows.user_count, unit)
        of_pairs = statistics[stage]
        return {**statistics, stage: of_pairs.new_zeros(count, of_pairs.shape[1]).index_add_(0, keys % count, of_pairs)}

    def _left(self, totals: Tensors) -> Rows:
        mean = _mean(totals["histogram"], self.values)
        item_bias = item_biases(self.settings, totals, self.values, mean)
        user_bias = factors.user_biases(self.rows, mean, item_bias, self.settings.bias_shrinkage)
        return factors.residuals(self.rows, mean, user_bias, item_bias)

    def known_users(self, tables: ItemTables) -> KnownUsers:
        """What the client knows of its users, given what is known of the items."""
        return KnownUsers(self.rows, self.labels, tables, self.values, self.settings.bias_shrinkage)


def shortened(
    answers: Tensors, stage: str, owner: Tensor, count: int, unit: Callable[[str], float]
) -> dict[str, Tensor]:
    """What several owners say, each shortened to norm 1 over all its arrays, each of these in units of its own.

    Args:
        answers: by the stage's name ``[pairs, ...]``, other arrays by owner ``[count, ...]``.
        stage: of the exchange.
        owner: of every pair ``[pairs]``.
        count: number of owners.
        unit: of the norm, by the name of an array.

    Returns:
        The stage's array by pair; of the others the sum over the owners.
    """
    pairs = answers[stage]
    lengths = pairs.new_zeros(count).index_add_(0, owner, (pairs / unit(stage)).square().sum(1))
    beside = {name: value for name, value in answers.items() if name != stage}
    for name, value in beside.items():
        lengths = lengths + (value / unit(name)).square().flatten(1).sum(1)
    shares = lengths.sqrt().clamp(min=1.0).reciprocal()
    sums = {name: torch.einsum("k...,k->...", value, shares) for name, value in beside.items()}
    return {stage: pairs * shares[owner].unsqueeze(1), **sums}


def item_tables(settings: FactorSettings, totals: Tensors, own: Tensors | None, values: Tensor) -> ItemTables:
    """What totals say of every item, as far as the exchange has come, without the part ``own`` of who reads them.

    Args:
        settings: the keys.
        totals: of all stages so far.
        own: what is taken off them, a row per item; None: nothing.
        values: label values ``[T]``, ascending.
    """
    return TablesOfAll(settings, totals, values).without(own or {}, slice(None))


class TablesOfAll:
    """What totals say of every item, made once for all who take a part of their own off.

    The mean, the directions of the sketch, the curvature and the noise stay those of all: they are common to everybody, and no
    item's. Arguments as of :func:`item_tables`.
    """

    def __init__(self, settings: FactorSettings, totals: Tensors, values: Tensor) -> None:
        self.settings, self.totals, self.values = settings, totals, values.double()
        mean, noise = _mean(totals["histogram"], self.values), _noise(settings, totals, self.values)
        width = settings.factor_size
        bias = item_biases(settings, totals, self.values, mean)
        self.mixing = _mixing(settings, totals) if f"product_{settings.sketch_passes - 1}" in totals else None
        certain = Curvature(mean.new_zeros(width + 1, width + 1), mean.new_zeros(width + 1))
        self.tables = ItemTables(mean, bias, bias.new_zeros(len(bias), width), totals["histogram"], noise, certain)
        self.tables = replace(self.tables, vectors=self._vectors(totals, slice(None)))
        self.last = -1
        while f"gradient_{self.last + 1}" in totals and self.last + 1 < settings.em_steps:
            self.last, self.before = self.last + 1, self.tables
            gradient, curvature = (totals[f"{kind}_{self.last}"] for kind in ("gradient", "curvature"))
            self.tables = stepped(settings, self.before, gradient, curvature)

    def without(self, own: Tensors, items: Tensor | slice) -> ItemTables:
        """The tables of the others.

        Args:
            own: what is taken off, a row for each of ``items``.
            items: item of every row, of several readers behind each other.
        """
        settings, totals, tables = self.settings, self.totals, self.tables

        def of_others(name: str) -> Tensor:
            total = totals[name][items]
            return total - own[name] if name in own else total

        # Totals that travelled in few bits may be a little less than a client's own.
        histogram = of_others("histogram").clamp(min=0)
        if self.last >= 0:
            # The others' gradients were taken at the entries of all, so that is where their last step starts from.
            entries = self.before.entries[items]
            left = of_others(f"gradient_{self.last}") - _precision(settings, self.before) * entries
            entries = entries + tables.curvature.solved(histogram.sum(1), left)
            return replace(tables, bias=entries[:, -1], vectors=entries[:, :-1], histogram=histogram)
        left_over = {name: of_others(name) for name in settings.stages if name in totals} | {"histogram": histogram}
        bias = item_biases(settings, left_over, self.values, tables.mean)
        return replace(tables, bias=bias, vectors=self._vectors(left_over, items), histogram=histogram)

    def _vectors(self, totals: Tensors, items: Tensor | slice) -> Tensor:
        """Item vectors of the passes, a row for each of ``items``, of which the totals are; 0 before they are over."""
        if self.mixing is None:
            return self.tables.vectors[items]
        if self.settings.drawn:
            return _drawn_vectors(self.settings, self.tables)[items]
        return _first_vectors(self.settings, totals, self.mixing)


def stepped(settings: FactorSettings, tables: ItemTables, gradient: Tensor, curvature: Tensor) -> ItemTables:
    """The tables after a step of expectation-maximisation, given the sums of :func:`factors.em_statistics` over all rows.

    ``z_i + (n_i A + L)^{-1} (g_i - L z_i)`` with ``z`` a vector and its bias. Going further than it points (over-relaxation) is
    faster for three steps and overfits after six.
    """
    counts, precision, entries = tables.histogram.sum(1), _precision(settings, tables), tables.entries
    following = Curvature.of(curvature / counts.sum().clamp(min=1), precision)
    reached = entries + following.solved(counts, gradient - precision * entries)
    return replace(tables, bias=reached[:, -1], vectors=reached[:, :-1], curvature=following)


def _precision(settings: FactorSettings, tables: ItemTables) -> Tensor:
    """Prior precisions of vectors and bias, times the noise, ``[k + 1]``; the vectors' are their own once a step is done."""
    shrinkage = max(settings.bias_shrinkage, 1e-6)
    if not tables.curvature.root.any():
        return tables.mean.new_tensor([settings.vector_shrinkage] * settings.factor_size + [shrinkage])
    counts = tables.histogram.sum(1)
    uncertainty = tables.curvature.uncertainty(counts, tables.noise)
    precision = factors.prior_precision(tables.entries, uncertainty, counts, tables.noise)
    precision[-1] = shrinkage
    return precision


def item_biases(settings: FactorSettings, totals: Tensors, values: Tensor, mean: Tensor) -> Tensor:
    """``b_i [items]``: shrunk means of what the users' first biases leave, and before that is known of what the mean leaves."""
    counts = totals["histogram"].sum(1)
    sums = totals["residuals"].squeeze(1) if "residuals" in totals else totals["histogram"] @ values - mean * counts
    return factors.shrunk_mean(sums, counts, settings.bias_shrinkage)


def bases(settings: FactorSettings, totals: Tensors, items: int) -> list[Tensor]:
    """Bases ``Q_1 .. Q_j`` that follow from the products so far; everybody computes the same."""
    first = range_finder.first_basis(items, min(settings.sketch_width, items), settings.seed)
    bases = [first.to(totals["histogram"].device)]
    for number in range(settings.sketch_passes - 1):
        if f"product_{number}" not in totals:
            break
        bases.append(range_finder.next_basis(totals[f"product_{number}"], bases))
    return bases


def _mixing(settings: FactorSettings, totals: Tensors) -> Tensor:
    """What makes item vectors of all passes' products, ``[passes * directions, k]``; directions of noise are 0."""
    products = [totals[f"product_{number}"] for number in range(settings.sketch_passes)]
    mixing = range_finder.nystroem_mixing(products, bases(settings, totals, len(products[0])), settings.factor_size)
    counts, spanned = totals["histogram"].sum(1), torch.cat(products, 1) @ mixing
    variance = totals["squares"].squeeze() / counts.sum().clamp(min=1)
    mixing = mixing * range_finder.shares_above_noise(spanned, counts, variance, settings.users).sqrt()
    return functional.pad(mixing, (0, settings.factor_size - mixing.shape[1]))


def _first_vectors(settings: FactorSettings, totals: Tensors, mixing: Tensor) -> Tensor:
    """Item vectors ``[I, k]`` of the passes."""
    products = torch.cat([totals[f"product_{number}"] for number in range(settings.sketch_passes)], 1)
    return range_finder.scaled_factors(products @ mixing, totals["histogram"].sum(1), settings.count_shrinkage)


def _drawn_vectors(settings: FactorSettings, tables: ItemTables) -> Tensor:
    """Item vectors ``[I, k]`` a tenth as long as what is to be explained, from the public seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.randn(tables.vectors.shape, generator=generator, dtype=torch.double)
    return 0.1 * tables.noise.sqrt() * drawn.to(tables.vectors.device)


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
