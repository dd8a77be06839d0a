"""Floors: models of a few sums that a network has to beat before it is worth anybody's time.

``Bias`` predicts a rating from what users and items are given on average, ``FoldIn`` adds item vectors from the leading
directions of all residuals and folds every user in, ``MFEM`` finds the vectors by expectation-maximisation. All are computed
once, when the model is built; there is nothing to train by gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.distillation import factors
from recbole_fedkd.distillation.exchange import FactorExchange, FactorSettings, item_tables
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.model.known import exchange_of
from recbole_fedkd.model.network import NO_CONTEXT, Context
from recbole_fedkd.model.student import LabelledRecommender
from recbole_fedkd.registry import read_settings


def spread_of(errors: Tensor) -> Tensor:
    """Deviation of errors ``[n]``; none (every row predicted exactly) would make a distribution of one label."""
    return errors.square().mean().sqrt().clamp(min=1e-3)


SPREAD_ROWS = 20
"""Rows of the common deviation that a client's own leans on."""

BIAS_SWEEPS = 5
"""Alternations of user and item biases; they stand still to the fourth digit after two."""


class FloorHead(FactorHead):
    """A floor over clients: the users' predicted means as label distributions of exactly these means; nothing is learned.

    Args:
        exchange: of the users that the network serves.
        alone: whether it knows their rows and no others; else it waits for totals.
    """

    spread: Tensor

    def __init__(self, exchange: FactorExchange, alone: bool) -> None:
        super().__init__(exchange, 1)
        self.register_buffer("spread", torch.ones(1).double())
        if alone:
            self.know(exchange.in_one_place(), {})

    @torch.no_grad()
    def know(self, totals: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """As of a head; the deviation is that of the own rows, each predicted without itself, leaning on everybody's."""
        super().know(totals, own)
        squares, noise = self.known_scalars.new_zeros(0), self.known_scalars[1]
        if self.of_rows is not None:
            squares = (self.of_rows[0].double() - self.exchange.rows.values).square()
        self.spread.copy_(((squares.sum() + SPREAD_ROWS * noise) / (len(squares) + SPREAD_ROWS)).sqrt().clamp(min=1e-3))

    def middles(self, mean: Tensor) -> Tensor:
        """The predicted labels themselves: the deviation, which says where they lie, is the client's own."""
        return mean.float()

    def logits(self, middle: Tensor, features: Tensor) -> Tensor:
        """Logits ``[n, T]`` of distributions with exactly the predicted labels ``[n]`` for means."""
        distribution = factors.distribution_of_mean(middle.double(), float(self.spread), self.exchange.values)
        return distribution.clamp(min=1e-12).log().float()


class FloorBuilder:
    """Builds the floors of clients, each of the rows of its own users."""

    def __init__(self, config: Any, schema: DataSchema) -> None:
        self.schema, self.settings = schema, config.model_class.sum_settings(config)
        self.alone = config["strategy"] == "local"

    def build(self, rows: ClientRows) -> FloorHead:
        """The floor of a client's users."""
        return FloorHead(exchange_of(self.settings, self.schema, rows), self.alone)


class Bias(LabelledRecommender):
    """``mu + b_u + b_i``, both biases shrunk to zero; a cold user or item has none.

    Its score is that mean, within the labels. Its label distribution is the one of that mean and the deviation of the training
    rows around it (:func:`recbole_fedkd.distillation.factors.distribution_of_mean`).

    Attributes:
        score_mean: mean rating, a scalar.
        user_bias: ``b_u [users]``.
        item_bias: ``b_i [items]``.
        user_vectors: ``p_u [users, k]``, of models that have any: their mean is ``mu + b_u + b_i + v_i p_u``.
        item_vectors: ``v_i [items, k]``.
        spread: deviation of a rating around its prediction, a scalar.
    """

    embeds_features = False
    builder = FloorBuilder
    sums: ClassVar[str] = "factors"
    reads: ClassVar[frozenset[str]] = frozenset({"bias_shrinkage"})
    score_mean: Tensor
    user_bias: Tensor
    item_bias: Tensor
    user_vectors: Tensor
    item_vectors: Tensor
    spread: Tensor

    @classmethod
    def sum_settings(cls, config: Any) -> FactorSettings:
        """The exchange over clients: label histograms and the items' residuals, and no vectors."""
        return replace(read_settings(FactorSettings, config), sketch_passes=0, em_steps=0)

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.dummy_param = nn.Parameter(torch.zeros(1))  # RecBole's trainer wants something to optimise
        users, items = dataset.inter_feat[dataset.uid_field], dataset.inter_feat[dataset.iid_field]
        labels = dataset.label_indices()
        values = self.label_values.double()[labels]
        rows = Rows(users, items, values, dataset.user_num, dataset.item_num)
        for name, value in self._predictors(config, rows, labels).items():
            self.register_buffer(name, value.clone())  # two are parts of one tensor

    def _predictors(self, config: Any, rows: Rows, labels: Tensor) -> dict[str, Tensor]:
        """What predicts a rating, by the names of the attributes."""
        mean, user_bias, item_bias = _biases(rows, config["bias_shrinkage"])
        left = factors.residuals(rows, mean, user_bias, item_bias).values
        nothing = left.new_zeros
        return {
            "score_mean": mean,
            "user_bias": user_bias,
            "item_bias": item_bias,
            "user_vectors": nothing(rows.user_count, 0),
            "item_vectors": nothing(rows.item_count, 0),
            "spread": spread_of(left),
        }

    def means(self, users: Tensor, items: Tensor) -> Tensor:
        """Predicted label values ``[batch, targets]`` of users ``[batch]`` and items ``[batch, targets]``, unbounded."""
        products = (self.user_vectors[users].unsqueeze(1) * self.item_vectors[items]).sum(-1)
        return self.score_mean + self.user_bias[users].unsqueeze(1) + self.item_bias[items] + products

    def logits(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """See :meth:`LabelledRecommender.logits`; alike in every context."""
        means = self.means(users, items)
        distribution = factors.distribution_of_mean(means.flatten(), float(self.spread), self.label_values.double())
        return distribution.clamp(min=1e-12).log().view(*means.shape, -1).float()

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Zero: nothing is learned by gradient."""
        return self.dummy_param.sum() * 0


def _biases(rows: Rows, shrinkage: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biases of users ``[users]`` and of items ``[items]``."""
    mean = rows.values.mean()
    user_bias = rows.values.new_zeros(rows.user_count)
    _, item_counts = rows.counts()
    for _ in range(BIAS_SWEEPS):
        sums = factors.item_residual_sums(rows, mean, user_bias)
        item_bias = factors.shrunk_mean(sums, item_counts, shrinkage)
        user_bias = factors.user_biases(rows, mean, item_bias, shrinkage)
    return mean, user_bias, item_bias


def own_floor(config: Any, schema: DataSchema, own: ClientRows, judged: ClientRows) -> Tensor:
    """What ``Bias`` of a client's own rows says of held-out rows of it: label distributions ``[n, T]``.

    Args:
        config: the run's config.
        schema: what is public.
        own: the client's training rows.
        judged: its held-out rows.
    """
    values = torch.tensor(schema.label_values, dtype=torch.double)
    columns = schema.user_field, schema.item_field
    users, items = (own.interactions[name] for name in columns)
    if not len(users):
        return torch.full((len(judged.interactions[schema.item_field]), len(values)), 1 / len(values))
    rows = Rows(users, items, values[schema.label_indices(own)], schema.user_num, schema.item_num)
    mean, *biases = _biases(rows, config["bias_shrinkage"])
    spread = spread_of(factors.residuals(rows, mean, *biases).values)
    means = mean + sum(bias[judged.interactions[name]] for name, bias in zip(columns, biases, strict=True))
    return factors.distribution_of_mean(means, float(spread), values).float()


class FoldIn(Bias):
    """``Bias`` plus a ridge regression of every user's residuals on item vectors from the leading directions of all of them.

    It is the exchange of item factors (:mod:`recbole_fedkd.distillation.exchange`) in one place that has all rows: passes of a
    block-Krylov range finder over the Gram matrix of the residuals, then ``em_steps`` steps of expectation-maximisation.
    """

    reads = frozenset(field.name for field in fields(FactorSettings)) - {"head_size"}

    @classmethod
    def sum_settings(cls, config: Any) -> FactorSettings:
        """The whole exchange."""
        return read_settings(FactorSettings, config)

    def _predictors(self, config: Any, rows: Rows, labels: Tensor) -> dict[str, Tensor]:
        settings = replace(self.sum_settings(config), users=max(1, rows.user_count - 1))
        exchange = FactorExchange(settings, rows, labels, self.label_values)
        tables = item_tables(exchange.settings, exchange.in_one_place(), None, self.label_values)
        known = exchange.known_users(tables)
        self.tables = tables  # for users who come later
        users = known.fold.posterior.mean
        return {
            "score_mean": tables.mean,
            "user_bias": users[:, -1] * known.vectors[0, -1],
            "item_bias": tables.bias,
            "user_vectors": users[:, :-1],
            "item_vectors": tables.vectors,
            "spread": spread_of(known.left.values - known.fold.of_rows()[0]),
        }


class MFEM(FoldIn):
    """Probabilistic matrix factorisation of the residuals by expectation-maximisation from small random item vectors."""

    reads = FoldIn.reads - {"sketch_width", "sketch_passes"}

    @classmethod
    def sum_settings(cls, config: Any) -> FactorSettings:
        """Of the passes one number an item, for the squares of the residuals that go with it."""
        return replace(super().sum_settings(config), sketch_width=1, sketch_passes=1, drawn=True)
