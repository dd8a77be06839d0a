"""RecBole's DGCF on small data."""

from __future__ import annotations

from typing import Any

from recbole.model import general_recommender


class DGCF(general_recommender.DGCF):
    """RecBole draws as many users as items for its independence loss, also where there are fewer of one of them.

    Ends with a RecBole that draws no more than there are.
    """

    cor_batch_size: int

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.cor_batch_size = min(self.cor_batch_size, self.n_users, self.n_items)
