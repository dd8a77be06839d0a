"""Metrics of what is recommended at all: RecBole's of the same names, with what is wrong in them made right.

They look at recommended items: the ``k`` of highest score that each user may be recommended. Where a user has fewer
candidates than ``k``, RecBole fills the list with items that are masked (those in the user's history, and the padding item);
here such places stay empty, and a user's mean is over the items that there are. The catalogue is all items but the padding
item, which RecBole counts as one that is never recommended.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from recbole.evaluator.base_metric import AbstractMetric
from recbole.utils import EvaluatorType

EMPTY = 0
"""A place of a list that holds no item: the number of the padding item."""

Items = NDArray[np.int64]


class _OfCatalogue(AbstractMetric):
    """A metric of the recommended lists ``[users, max k]``; ``data.num_items`` counts the padding item."""

    metric_type = EvaluatorType.RANKING
    metric_need = ["rec.items", "data.num_items", "data.count_items"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.topk = config["topk"]

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        """Name with ``@k`` to value, for every k of ``topk``."""
        lists = dataobject.get("rec.items").numpy()
        counts = np.zeros(dataobject.get("data.num_items"), dtype=np.int64)
        for item, count in dict(dataobject.get("data.count_items")).items():
            counts[item] = count
        name = type(self).__name__.lower()
        return {f"{name}@{k}": round(self.of_lists(lists[:, :k], counts), self.decimal_place) for k in self.topk}

    def of_lists(self, lists: Items, counts: Items) -> float:
        """The value.

        Args:
            lists: recommended items ``[users, k]``, :data:`EMPTY` where there is none.
            counts: training interactions of every item, padding first, ``[items]``.
        """
        raise NotImplementedError


class ItemCoverage(_OfCatalogue):
    """Share of the catalogue that is recommended to anybody. RecBole's counts the padding item: 10 of 10 items are .9091."""

    def of_lists(self, lists: Items, counts: Items) -> float:
        """Distinct recommended items over all items."""
        return len(np.unique(lists[lists != EMPTY])) / (len(counts) - 1)


class AveragePopularity(_OfCatalogue):
    """Mean over users of the mean number of training interactions of the items that they are recommended."""

    smaller = True

    def of_lists(self, lists: Items, counts: Items) -> float:
        """In interactions."""
        return _mean_of_users(counts[lists].astype(np.float64), lists)


class ShannonEntropy(_OfCatalogue):
    """Entropy ``-sum_i p_i ln p_i`` of how often each item is recommended, in nats; the more even, the larger.

    RecBole documents the same, but divides it by the number of distinct items: ten items that are recommended alike get .23,
    two get .35, so that the more varied lists look worse.
    """

    def of_lists(self, lists: Items, counts: Items) -> float:
        """In nats."""
        shares = _frequencies(lists, counts) / max(1, int(np.count_nonzero(lists)))
        shares = shares[shares > 0]
        return float(abs((shares * np.log(shares)).sum()))


class GiniIndex(_OfCatalogue):
    """Gini index of how often the items of the catalogue are recommended: 0 all alike. RecBole's counts the padding item."""

    smaller = True

    def of_lists(self, lists: Items, counts: Items) -> float:
        """``sum_i (2 i - n - 1) P_i / (n sum_i P_i)``, ``P`` ascending over all ``n`` items."""
        frequencies = np.sort(_frequencies(lists, counts))
        items = len(frequencies)
        weights = 2 * np.arange(1, items + 1) - items - 1
        return float((weights * frequencies).sum() / (items * max(1, frequencies.sum())))


class TailPercentage(_OfCatalogue):
    """Mean over users of the share of long-tail items among those that they are recommended.

    The tail is the share ``tail_ratio`` of the catalogue (default .1, at least one item) with the fewest training
    interactions, or, where ``tail_ratio`` is larger than 1, the items with at most as many. Items without any are the end of
    the tail; RecBole's, which looks at the items of the training rows alone, takes them for popular.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        asked = config["tail_ratio"]
        self.tail = asked if asked is not None and asked > 0 else 0.1  # as in RecBole

    def of_lists(self, lists: Items, counts: Items) -> float:
        """A share."""
        of_items = counts[1:]
        in_tail = np.zeros(len(counts), dtype=bool)
        if self.tail > 1:
            in_tail[1:] = of_items <= self.tail
        else:
            taken = max(int(len(of_items) * self.tail + 1e-9), 1)  # .29 of 100 is 28.999999999999996
            in_tail[1 + np.argsort(of_items, kind="stable")[:taken]] = True
        return _mean_of_users(in_tail[lists].astype(np.float64), lists)


def _frequencies(lists: Items, counts: Items) -> Items:
    """How often every item is recommended, padding left out, ``[items - 1]``."""
    return np.bincount(lists.reshape(-1), minlength=len(counts))[1:].astype(np.int64)


def _mean_of_users(values: NDArray[np.float64], lists: Items) -> float:
    """Mean over users of the mean over their items; users without any are left out."""
    there = lists != EMPTY
    number = there.sum(1)
    judged = number > 0
    if not judged.any():
        return float("nan")
    return float(((values * there).sum(1)[judged] / number[judged]).mean())
