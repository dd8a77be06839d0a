"""RecBole's KSR in one precision."""

from __future__ import annotations

from typing import Any

from recbole.model import sequential_recommender
from torch import Tensor


class KSR(sequential_recommender.KSR):
    """RecBole multiplies its float32 network with the float64 vectors of the relations, which torch refuses.

    Ends with a RecBole whose preloaded weights are float32.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        vectors: Tensor = vars(self)["relation_Matrix"]
        self.relation_Matrix = vectors.float()
