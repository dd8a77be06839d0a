"""A model of RecBole's kind: a score is the product of a user's and an item's vector, no more."""

from recbole.model.abstract_recommender import GeneralRecommender
from recbole.model.loss import BPRLoss
from recbole.utils import InputType
from torch import nn


class Plain(GeneralRecommender):
    """``--model=Plain`` by RecBole's trainer, ``--model=Plain --strategy=fedavg --partition=user`` over clients."""

    input_type = InputType.PAIRWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size = config["embedding_size"] or 32
        self.users = nn.Embedding(self.n_users, size)
        self.items = nn.Embedding(self.n_items, size)
        self.loss = BPRLoss()

    def predict(self, interaction):
        """Scores ``[batch]``."""
        return (self.users(interaction[self.USER_ID]) * self.items(interaction[self.ITEM_ID])).sum(-1)

    def calculate_loss(self, interaction):
        """A positive item is to score above a sampled one."""
        user, better = self.users(interaction[self.USER_ID]), self.items(interaction[self.ITEM_ID])
        return self.loss((user * better).sum(-1), (user * self.items(interaction[self.NEG_ITEM_ID])).sum(-1))

    def full_sort_predict(self, interaction):
        """Scores of all items ``[users * items]``."""
        return (self.users(interaction[self.USER_ID]) @ self.items.weight.T).flatten()
