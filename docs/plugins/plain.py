"""A model of RecBole's kind: a score is the product of a user's and an item's vector, no more."""

from dataclasses import dataclass

from recbole.model.abstract_recommender import GeneralRecommender
from recbole.model.loss import BPRLoss
from recbole.utils import InputType
from torch import nn

from recbole_fedkd.extend import setting


@dataclass(frozen=True)
class PlainSettings:
    """Keys of its own, read as any other."""

    vector_size: int = setting(32, "in [1, 4096]", "Size of a user's and an item's vector.")


class Plain(GeneralRecommender):
    """``--model=Plain --vector_size=16`` by RecBole's trainer, with ``--strategy=fedavg --partition=user`` over clients."""

    input_type = InputType.PAIRWISE
    settings_type = PlainSettings

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.users = nn.Embedding(self.n_users, config["vector_size"])
        self.items = nn.Embedding(self.n_items, config["vector_size"])
        self.loss = BPRLoss()

    def predict(self, interaction):
        """Scores ``[batch]``."""
        return (self.users(interaction[self.USER_ID]) * self.items(interaction[self.ITEM_ID])).sum(-1)

    def calculate_loss(self, interaction):
        """A positive item is to score above a sampled one."""
        user, better = self.users(interaction[self.USER_ID]), self.items(interaction[self.ITEM_ID])
        return self.loss((user * better).sum(-1), (user * self.items(interaction[self.NEG_ITEM_ID])).sum(-1))
