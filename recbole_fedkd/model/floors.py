"""Floors: models of a few sums that a network has to beat before it is worth anybody's time.

``Bias`` predicts a rating from what users and items are given on average, ``FoldIn`` adds item vectors from the leading
directions of all residuals and folds every user in, ``MFEM`` finds the vectors by expectation-maximisation. All are computed
once, when the model is built; there is nothing to train by gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recbole_fedkd.distillation import factors
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.errors import InputError
from recbole_fedkd.model.network import NO_CONTEXT, Context
from recbole_fedkd.model.student import LabelledRecommender

BIAS_SWEEPS = 5
"""Alternations of user and item biases; they stand still to the fourth digit after two."""


class Bias(LabelledRecommender):
    """``mu + b_u + b_i``, both biases shrunk to zero; a cold user or item has none.

    Its score is that mean, within the labels. Its label distribution is the one of that mean and the deviation of the training
    rows around it (:func:`recbole_fedkd.distillation.factors.distribution_of_mean`).
    """

    embeds_features = False
    score_mean: Tensor
    user_bias: Tensor
    item_bias: Tensor
    user_vectors: Tensor
    item_vectors: Tensor
    spread: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        if config["label_mode"] == "implicit":
            raise InputError(
                f"model '{config['model']}' predicts ratings, and label_mode=implicit has none; use label_mode=rating or "
                "threshold, or the models Pop and EASE"
            )
        self.dummy_param = nn.Parameter(torch.zeros(1))  # RecBole's trainer wants something to optimise
        users, items = dataset.inter_feat[dataset.uid_field], dataset.inter_feat[dataset.iid_field]
        values = self.label_values.double()[dataset.label_indices()]
        rows = Rows(users, items, values, dataset.user_num, dataset.item_num)
        mean, user_bias, item_bias = self._biases(config, rows)
        left = factors.residuals(rows, mean, user_bias, item_bias)
        user_vectors, item_vectors, without_itself = self._vectors(config, left)
        computed = {
            "score_mean": mean,
            "user_bias": user_bias,
            "item_bias": item_bias,
            "user_vectors": user_vectors,
            "item_vectors": item_vectors,
            # A spread of zero (every row predicted exactly) would make a distribution of one label.
            "spread": (left.values - without_itself).square().mean().sqrt().clamp(min=1e-3),
        }
        for name, value in computed.items():
            self.register_buffer(name, value)

    def _biases(self, config: Any, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        mean = rows.values.mean()
        user_bias = rows.values.new_zeros(rows.user_count)
        _, item_counts = rows.counts()
        for _ in range(BIAS_SWEEPS):
            sums = factors.item_residual_sums(rows, mean, user_bias)
            item_bias = factors.shrunk_mean(sums, item_counts, config["bias_shrinkage"])
            user_bias = factors.user_biases(rows, mean, item_bias, config["bias_shrinkage"])
        return mean, user_bias, item_bias

    def _vectors(self, config: Any, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """What predicts residuals, here nothing.

        Returns:
            User vectors ``[users, k]``, item vectors ``[items, k]``, and what every row ``[n]`` is predicted without itself.
        """
        nothing = rows.values.new_zeros
        return nothing(rows.user_count, 0), nothing(rows.item_count, 0), torch.zeros_like(rows.values)

    def means(self, users: Tensor, items: Tensor) -> Tensor:
        """Predicted label values ``[batch, targets]`` of users ``[batch]`` and items ``[batch, targets]``, unbounded."""
        products = (self.user_vectors[users].unsqueeze(1) * self.item_vectors[items]).sum(-1)
        return self.score_mean + self.user_bias[users].unsqueeze(1) + self.item_bias[items] + products

    def logits(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """See :meth:`LabelledRecommender.logits`; alike in every context."""
        means = self.means(users, items)
        found = factors.distribution_of_mean(means.flatten(), float(self.spread), self.label_values.double())
        return found.clamp(min=1e-12).log().view(*means.shape, -1).float()

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Zero: nothing is learned by gradient."""
        return self.dummy_param.sum() * 0


class FoldIn(Bias):
    """``Bias`` plus a ridge regression of every user's residuals on item vectors from the leading directions of all of them.

    The vectors are those of :mod:`recbole_fedkd.distillation.factors`: passes of a block-Krylov range finder over the Gram
    matrix of the residuals, then ``em_steps`` steps of expectation-maximisation.
    """

    def _vectors(self, config: Any, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        vectors = self._first_vectors(config, rows)
        noise = config["noise_share"] * float(rows.values.square().mean().clamp(min=1e-6))
        for _ in range(config["em_steps"]):
            posterior = factors.fold_in(rows, vectors, noise)
            vectors = factors.em_vectors(*factors.em_statistics(rows, posterior), config["vector_shrinkage"])
        posterior = factors.fold_in(rows, vectors, noise)
        return posterior.mean, vectors, factors.leave_one_out(rows, posterior, vectors, noise)[0]

    def _first_vectors(self, config: Any, rows: Rows) -> Tensor:
        _, item_counts = rows.counts()
        bases, products = [factors.first_basis(rows.item_count, config["sketch_width"], config["seed"])], []
        for number in range(config["sketch_passes"]):
            products.append(factors.gram_product(rows, bases[number]))
            if number + 1 < config["sketch_passes"]:
                bases.append(factors.next_basis(products[-1], bases))
        found = factors.nystroem_factors(products, bases, config["factor_size"])
        return factors.scaled_factors(found, item_counts, config["count_shrinkage"])


class MFEM(FoldIn):
    """Probabilistic matrix factorisation of the residuals by expectation-maximisation from small random item vectors."""

    def _first_vectors(self, config: Any, rows: Rows) -> Tensor:
        generator = torch.Generator().manual_seed(config["seed"])
        deviation = rows.values.square().mean().sqrt()
        drawn = torch.randn(rows.item_count, config["factor_size"], generator=generator, dtype=torch.double)
        return 0.1 * deviation * drawn
