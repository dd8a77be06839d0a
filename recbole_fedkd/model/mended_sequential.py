"""RecBole's sequential models that cannot run in one precision, or not on a batch with nothing to learn from."""

from __future__ import annotations

from typing import Any

from recbole.model import sequential_recommender
from recbole.model.sequential_recommender.dien import InterestExtractorNetwork
from torch import Tensor


class KSR(sequential_recommender.KSR):
    """RecBole multiplies its float32 network with the float64 vectors of the relations, which torch refuses.

    Ends with a RecBole whose preloaded weights are float32.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        vectors: Tensor = vars(self)["relation_Matrix"]
        self.relation_Matrix = vectors.float()


class BERT4Rec(sequential_recommender.BERT4Rec):
    """A small batch may hide no item at all, or only first ones, which RecBole does not learn from: 0 divided by 0.

    Ends with a RecBole whose loss of nothing is 0.
    """

    def calculate_loss(self, interaction: Any) -> Tensor:
        """RecBole's loss; 0 where nothing is hidden."""
        if not (interaction[self.MASK_INDEX] > 0).any():
            nothing: Tensor = 0 * self.item_embedding.weight.sum()
            return nothing
        loss: Tensor = super().calculate_loss(interaction)
        return loss


class DIEN(sequential_recommender.DIEN):
    """RecBole's auxiliary loss predicts the items after the first; of histories of one item it is 0 divided by 0.

    Ends with a RecBole whose loss of nothing is 0.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.interset_extractor.__class__ = _InterestExtractor


class _InterestExtractor(InterestExtractorNetwork):
    def auxiliary_loss(self, h_states: Tensor, click_seq: Tensor, noclick_seq: Tensor, keys_length: Tensor) -> Tensor:
        if not (keys_length > 0).any():
            return 0 * h_states.sum()
        loss: Tensor = super().auxiliary_loss(h_states, click_seq, noclick_seq, keys_length)
        return loss
