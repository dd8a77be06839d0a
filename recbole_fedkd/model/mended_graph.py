"""RecBole's models of graphs on small data and small batches."""

from __future__ import annotations

from typing import Any

import torch
from recbole.model import general_recommender, knowledge_aware_recommender
from torch import Tensor


class DGCF(general_recommender.DGCF):
    """RecBole draws as many users as items for its independence loss, also where there are fewer of one of them.

    Ends with a RecBole that draws no more than there are.
    """

    cor_batch_size: int

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.cor_batch_size = min(self.cor_batch_size, self.n_users, self.n_items)


class KTUP(knowledge_aware_recommender.KTUP):
    """RecBole pulls the items of a batch of triples to their entities; of no item, its mean is not a number.

    Ends with a RecBole that takes no mean of nothing.
    """

    def calculate_kg_loss(self, interaction: Any) -> tuple[Tensor, Tensor]:
        """RecBole's losses; without an item in the batch the second is 0."""
        fields = (self.HEAD_ENTITY_ID, self.TAIL_ENTITY_ID, self.NEG_TAIL_ENTITY_ID)
        loss, alignment = super().calculate_kg_loss(interaction)
        items = any((interaction[field] < self.n_items).any() for field in fields)
        return loss, alignment if items else torch.zeros_like(alignment)
