"""What there is to say about judged rows beside metrics: how many are of somebody unknown, and how predictions vary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLAT = 0.1
"""Predictions that vary less than this share of what the labels do are told: a constant would do as well."""


_SPREAD = ("predicted", "predicted squared", "labels", "labels squared")


class JudgedRows:
    """Sums over the rows of a sweep that carry labels.

    Args:
        known_users: bool ``[users]``, who has a training row.
        known_items: bool ``[items]``, likewise.
    """

    def __init__(self, known_users: Tensor, known_items: Tensor) -> None:
        self.known = known_users, known_items
        self.rows, self.cold_users, self.cold_items, self.cold = 0, 0, 0, 0
        self.cold_error = 0.0
        self._sums = torch.zeros(len(_SPREAD), dtype=torch.double)

    def add(self, scores: Tensor, labels: Tensor, users: Tensor, items: Tensor) -> None:
        """Take in a batch: predictions and labels ``[n]``, and whom and what they are about ``[n]``."""
        scores, labels = scores.flatten().cpu().double(), labels.cpu().double()
        user_cold, item_cold = ~self.known[0][users.cpu()], ~self.known[1][items.cpu()]
        cold = user_cold | item_cold
        self.rows += len(scores)
        self.cold_users += int(user_cold.sum())
        self.cold_items += int(item_cold.sum())
        self.cold += int(cold.sum())
        self.cold_error += float((scores - labels)[cold].abs().sum())
        self._sums += torch.stack([scores.sum(), scores.square().sum(), labels.sum(), labels.square().sum()])

    def numbers(self) -> dict[str, float]:
        """All sums, to be added to those of others and read by :meth:`of`."""
        counts = {"rows": self.rows, "cold": self.cold, "cold users": self.cold_users, "cold items": self.cold_items}
        sums = {"cold absolute": self.cold_error, **dict(zip(_SPREAD, self._sums.tolist(), strict=True))}
        return {name: float(value) for name, value in {**counts, **sums}.items()}

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> JudgedRows:
        """Sums as of :meth:`numbers`."""
        nobody = torch.zeros(0, dtype=torch.bool)
        read = cls(nobody, nobody)
        read.rows, read.cold = int(numbers["rows"]), int(numbers["cold"])
        read.cold_users, read.cold_items = int(numbers["cold users"]), int(numbers["cold items"])
        read.cold_error = numbers["cold absolute"]
        read._sums = torch.tensor([numbers[name] for name in _SPREAD], dtype=torch.double)
        return read

    def cold_summary(self) -> dict[str, Any]:
        """``rows`` with a cold user or item, those with either, and the mean absolute error of them; None without any."""
        error = self.cold_error / self.cold if self.cold else None
        return {"rows": self.cold, "user_rows": self.cold_users, "item_rows": self.cold_items, "mae": error}

    def spread(self) -> dict[str, Any]:
        """Standard deviations of ``predictions`` and ``labels``, and whether the first is ``flat`` beside the second."""
        score, score_square, label, label_square = (self._sums / max(self.rows, 1)).tolist()
        predicted, true = (
            math.sqrt(max(variance, 0.0)) for variance in (score_square - score**2, label_square - label**2)
        )
        return {"predictions": predicted, "labels": true, "flat": predicted < FLAT * true}


def known_rows(train_data: Any) -> JudgedRows:
    """Empty sums, given the training loader."""
    dataset = train_data._dataset
    known = []
    for field in (dataset.uid_field, dataset.iid_field):
        mask = torch.zeros(dataset.num(field), dtype=torch.bool)
        mask[dataset.inter_feat[field]] = True
        known.append(mask)
    return JudgedRows(known[0], known[1])
