"""Metrics that RecBole lacks, or has and gets wrong, registered the RecBole way.

``Accuracy``, ``NMAE``, ``LabelledNDCG`` are ours. ``AUC`` and ``GAUC`` replace RecBole's where nothing is defined; those of
what is recommended at all are in :mod:`recbole_fedkd.evaluation.catalogue_metrics`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from recbole.evaluator import metrics as recbole_metrics
from recbole.evaluator import register
from recbole.evaluator.base_metric import AbstractMetric, LossMetric
from recbole.utils import EvaluatorType

from recbole_fedkd.evaluation import catalogue_metrics

UNDEFINED = {
    "auc": "all judged rows have one label",
    "gauc": "no user has both a relevant item and another candidate",
    "labelledndcg": "no user has two judged rows of which one has a gain",
}
"""Why a metric has no value, by its name without ``@k``."""


class Accuracy(LossMetric):
    """Share of held-out rows whose class is right.

    The class of an attentive model is the argmax of its label distribution; of a RecBole model it is the label nearest to its
    score, which for a probability is ``score >= 0.5``.
    """

    metric_need = ["rec.class", "data.label"]

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        """``{"accuracy": share}``."""
        right = dataobject.get("rec.class").numpy() == dataobject.get("data.label").numpy()
        return {"accuracy": round(float(np.mean(right)), self.decimal_place)}


class NMAE(LossMetric):
    """Mean absolute error over the range of the labels, 0..1: the "global mean error" of AFD on any rating scale."""

    metric_need = ["rec.score", "data.label", "data.label_set"]
    smaller = True

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        """``{"nmae": error}``."""
        predicted, true = self.used_info(dataobject)
        labels = dataobject.get("data.label_set")
        low, high = float(labels.min()), float(labels.max())
        error = np.abs(predicted.astype(np.float64) - true).mean() / (high - low)
        return {"nmae": round(float(error), self.decimal_place)}


class LabelledNDCG(AbstractMetric):
    """NDCG@k with graded relevance over each user's own held-out rows: whether liked items come before disliked ones.

    Gain ``2^r - 1`` with the rank ``r`` of the label among all labels of the dataset, so that any scale can be judged: 1..T, or
    from 0 where the lowest label is not above 0. That is the label itself for 1..5, 0..10 and clicks. Discount
    ``1 / log2(1 + position)``; rows with equal scores share the mean of their gains, so that a
    constant prediction gets what a random order is worth. Users with fewer than two held-out rows, or none with a gain,
    have no order to judge and are left out.
    """

    metric_type = EvaluatorType.VALUE
    metric_need = ["rec.score", "data.label", "data.user", "data.label_set"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.topk = config["topk"]

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        """``{"labelledndcg@k": mean over users}`` for every k of ``topk``."""
        scores = dataobject.get("rec.score").numpy().astype(np.float64)
        ranks = label_ranks(dataobject.get("data.label").numpy(), dataobject.get("data.label_set").numpy())
        users = dataobject.get("data.user").numpy()
        result: dict[str, float] = {}
        for k in self.topk:
            per_user = labelled_ndcg(scores, ranks, users, k)
            value = float(per_user.mean()) if len(per_user) else float("nan")
            result[f"labelledndcg@{k}"] = round(value, self.decimal_place)
        return result


def label_ranks(labels: NDArray[np.floating], label_set: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks of labels ``[n]`` in the set of all labels, from 1; from 0 where the lowest is not above 0."""
    known = np.union1d(label_set.astype(labels.dtype), labels)
    return (np.searchsorted(known, labels) + int(known[0] > 0)).astype(np.float64)


def labelled_ndcg(
    scores: NDArray[np.float64], ranks: NDArray[np.float64], users: NDArray[np.integer], k: int
) -> NDArray[np.float64]:
    """NDCG@k of every user that can be judged, ``[judged users]``, ordered by user id; see :class:`LabelledNDCG`."""
    values = labelled_ndcg_of_users(scores, ranks, users, k)
    return values[~np.isnan(values)]


def labelled_ndcg_of_users(
    scores: NDArray[np.float64], ranks: NDArray[np.float64], users: NDArray[np.integer], k: int
) -> NDArray[np.float64]:
    """NDCG@k of every user that has a row, see :class:`LabelledNDCG`.

    Args:
        scores: predicted scores ``[n]``.
        ranks: ranks of the labels ``[n]``, the relevance, see :func:`label_ranks`.
        users: user of each row ``[n]``.
        k: cut-off.

    Returns:
        ``[users]``, ordered by user id; nan for a user who cannot be judged.
    """
    # Of each user's largest rank, so that no number of labels is too large; what is far below it is worth nothing.
    ids, index = np.unique(users, return_inverse=True)
    largest = np.full(len(ids), -np.inf)
    np.maximum.at(largest, index, ranks)
    gains = np.exp2(ranks - largest[index]) - np.exp2(-largest[index])
    order = np.lexsort((-scores, users))
    ideal_order = np.lexsort((-gains, users))
    sorted_users, sorted_scores, sorted_gains = users[order], scores[order], gains[order]
    starts_user = np.r_[True, sorted_users[1:] != sorted_users[:-1]]
    starts_tie = starts_user | np.r_[True, sorted_scores[1:] != sorted_scores[:-1]]
    tie = np.cumsum(starts_tie) - 1
    shared_gains = (np.bincount(tie, sorted_gains) / np.bincount(tie))[tie]
    user = np.cumsum(starts_user) - 1
    rank = np.arange(len(users)) - np.flatnonzero(starts_user)[user]
    discount = np.where(rank < k, 1.0 / np.log2(rank + 2.0), 0.0)
    achieved = np.bincount(user, shared_gains * discount)
    ideal = np.bincount(user, gains[ideal_order] * discount)
    judged = (np.bincount(user) >= 2) & (ideal > 0)
    return np.where(judged, achieved / np.where(judged, ideal, 1.0), np.nan)


def register_metric(metric: type[AbstractMetric]) -> type[AbstractMetric]:
    """Add a metric to RecBole's registry, which is filled once, at import, from its own module.

    Args:
        metric: a class of RecBole's kind, which the keys ``metrics`` and ``valid_metric`` then know by its name.
    """
    name = metric.__name__.lower()
    register.metrics_dict[name] = metric
    register.metric_information[name] = metric.metric_need
    register.metric_types[name] = metric.metric_type
    if metric.smaller and name not in register.smaller_metrics:
        register.smaller_metrics.append(name)
    return metric


class AUC(recbole_metrics.AUC):
    """RecBole's; of rows of one label it is nan, where RecBole's hands nan to scikit-learn."""

    def metric_info(self, preds: NDArray[np.floating], trues: NDArray[np.floating]) -> float:
        """Area under the curve; rows with equal scores count half."""
        positive = trues == 1
        if positive.all() or not positive.any():
            return float("nan")
        return float(super().metric_info(preds, trues))


class GAUC(recbole_metrics.GAUC):
    """RecBole's: each user's AUC, weighted by the user's relevant items; nan where no user has one."""

    def metric_info(self, pos_rank_sum: NDArray[Any], user_len_list: NDArray[Any], pos_len_list: NDArray[Any]) -> float:
        """Arguments as in RecBole, whose ranks are float32."""
        judged = (pos_len_list > 0) & (pos_len_list < user_len_list)
        if not judged.any():
            return float("nan")
        parts = (sums[judged].astype(np.float64) for sums in (pos_rank_sum, user_len_list, pos_len_list))
        return float(super().metric_info(*parts))


for _metric in (
    Accuracy,
    NMAE,
    LabelledNDCG,
    AUC,
    GAUC,
    catalogue_metrics.ItemCoverage,
    catalogue_metrics.AveragePopularity,
    catalogue_metrics.ShannonEntropy,
    catalogue_metrics.GiniIndex,
    catalogue_metrics.TailPercentage,
):
    register_metric(_metric)
