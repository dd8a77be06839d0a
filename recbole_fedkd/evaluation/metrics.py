"""Metrics that RecBole lacks, registered the RecBole way: ``Accuracy``, ``NMAE``, ``LabelledNDCG``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from recbole.evaluator import register
from recbole.evaluator.base_metric import AbstractMetric, LossMetric
from recbole.utils import EvaluatorType


class Accuracy(LossMetric):
    """Share of held-out rows whose class is right.

    The class of an attentive model is the argmax of its label distribution; of a RecBole model, whose score is a
    probability, it is ``score >= 0.5``.
    """

    metric_need = ["rec.class", "data.label"]

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        """``{"accuracy": share}``."""
        right = dataobject.get("rec.class").numpy() == dataobject.get("data.label").numpy()
        return {"accuracy": round(float(np.mean(right)), self.decimal_place)}


class NMAE(LossMetric):
    """Mean absolute error over the range of the labels, 0..1: the "global mean error" of AFD on any rating scale."""

    metric_need = ["rec.score", "data.label", "data.label_range"]
    smaller = True

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        """``{"nmae": error}``."""
        predicted, true = self.used_info(dataobject)
        low, high = dataobject.get("data.label_range").tolist()
        error = np.abs(predicted.astype(np.float64) - true).mean() / (high - low)
        return {"nmae": round(float(error), self.decimal_place)}


class LabelledNDCG(AbstractMetric):
    """NDCG@k with graded relevance over each user's own held-out rows: whether liked items come before disliked ones.

    Gain ``2^label - 1``, discount ``1 / log2(1 + rank)``; rows with equal scores share the mean of their gains, so that a
    constant prediction gets what a random order is worth. Users with fewer than two held-out rows, or none with a gain,
    have no order to judge and are left out.
    """

    metric_type = EvaluatorType.VALUE
    metric_need = ["rec.score", "data.label", "data.user"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.topk = config["topk"]

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        """``{"labelledndcg@k": mean over users}`` for every k of ``topk``."""
        scores = dataobject.get("rec.score").numpy().astype(np.float64)
        labels = dataobject.get("data.label").numpy().astype(np.float64)
        users = dataobject.get("data.user").numpy()
        result: dict[str, float] = {}
        for k in self.topk:
            per_user = labelled_ndcg(scores, labels, users, k)
            value = float(per_user.mean()) if len(per_user) else float("nan")
            result[f"labelledndcg@{k}"] = round(value, self.decimal_place)
        return result


def labelled_ndcg(
    scores: NDArray[np.float64], labels: NDArray[np.float64], users: NDArray[np.integer], k: int
) -> NDArray[np.float64]:
    """NDCG@k of every user that can be judged, ``[judged users]``, ordered by user id; see :class:`LabelledNDCG`."""
    values = labelled_ndcg_of_users(scores, labels, users, k)
    return values[~np.isnan(values)]


def labelled_ndcg_of_users(
    scores: NDArray[np.float64], labels: NDArray[np.float64], users: NDArray[np.integer], k: int
) -> NDArray[np.float64]:
    """NDCG@k of every user that has a row, see :class:`LabelledNDCG`.

    Args:
        scores: predicted scores ``[n]``.
        labels: label values ``[n]``, the relevance.
        users: user of each row ``[n]``.
        k: cut-off.

    Returns:
        ``[users]``, ordered by user id; nan for a user who cannot be judged.
    """
    gains = np.exp2(labels) - 1.0
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
    """Add a metric to RecBole's registry, which is filled once, at import, from its own module."""
    name = metric.__name__.lower()
    register.metrics_dict[name] = metric
    register.metric_information[name] = metric.metric_need
    register.metric_types[name] = metric.metric_type
    if metric.smaller and name not in register.smaller_metrics:
        register.smaller_metrics.append(name)
    return metric


for _metric in (Accuracy, NMAE, LabelledNDCG):
    register_metric(_metric)
