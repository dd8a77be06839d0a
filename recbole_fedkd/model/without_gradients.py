"""RecBole's models that learn without gradients, where RecBole 1.2.1 is wrong about them.

All of them learn from the same thing: the interactions of the training split. An interaction counts whatever its label
says, as in RecBole's ``inter_matrix``; sampled negatives are no interactions; a pair that is there twice counts twice
(``rm_dup_inter`` removes it). ``ItemKNN``, ``AsymKNN``, ``EASE`` and ``SLIMElastic`` run as RecBole wrote them.

Ends with a RecBole in which ``Pop`` counts every row and no score is drawn anew at every look.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.model import general_recommender
from torch import Tensor

from recbole_fedkd.splitmix import keyed


def uniform_of_pairs(users: Tensor, items: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for every pair, the same whenever and in whatever company it is asked for.

    Args:
        users: user ids, of a shape that broadcasts with that of ``items``.
        items: item ids.
        seed: another one gives other numbers.

    Returns:
        float64 numbers of the broadcast shape, on the CPU.
    """
    ids = (part.cpu().numpy().astype(np.uint64) for part in (users, items))
    words = keyed(np.zeros(1, dtype=np.uint64), seed, *ids)
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)


class Pop(general_recommender.Pop):
    """Popularity: the number of an item's training interactions.

    RecBole counts in ``calculate_loss``: an item at most once a batch, and a sampled negative like an interaction.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        items = dataset.inter_feat[dataset.iid_field]
        self.item_cnt = torch.bincount(items, minlength=self.n_items).unsqueeze(1).to(self.device)
        self.max_cnt = self.item_cnt.max(dim=0)[0]

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Nothing is left to learn; the trainer wants a loss."""
        return torch.nn.Parameter(torch.zeros(1)).to(self.device)


class Random(general_recommender.Random):
    """Every user and item have a score of their own, the same at every look.

    RecBole gives all users of an evaluation batch one list, and every evaluation another one.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.seed = int(config["seed"])

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[rows]``."""
        return uniform_of_pairs(interaction[self.USER_ID], interaction[self.ITEM_ID], self.seed).to(self.device)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[users * items]``."""
        users, items = interaction[self.USER_ID], torch.arange(self.n_items)
        return uniform_of_pairs(users.unsqueeze(1), items, self.seed).flatten().to(self.device)


class ADMMSLIM(general_recommender.ADMMSLIM):
    """RecBole parts equal scores by noise of up to 1e-5, drawn anew at every look; here a pair's noise is always the same."""

    NOISE = 1e-5

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.seed = int(config["seed"])

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[rows]``."""
        users, rows = interaction[self.USER_ID].unique(return_inverse=True)
        return self._scores(users)[rows, interaction[self.ITEM_ID]]

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[users * items]``."""
        return self._scores(interaction[self.USER_ID]).flatten()

    def _scores(self, users: Tensor) -> Tensor:
        """Scores ``[users, items]``."""
        means = self.item_means if self.center_columns else 0.0
        history = self.interaction_matrix[users.cpu().numpy(), :].toarray()
        scores = torch.from_numpy((history - means) @ self.item_similarity + means)
        noise = uniform_of_pairs(users.unsqueeze(1), torch.arange(self.n_items), self.seed)
        return (scores + self.NOISE * noise).to(self.device)
