"""RecBole's click models that cannot take a batch of one row: they squeeze its only dimension away."""

from __future__ import annotations

from typing import Any

from recbole.data.interaction import Interaction
from recbole.model import context_aware_recommender
from torch import Tensor


class DSSM(context_aware_recommender.DSSM):
    """Ends with a RecBole that squeezes the scores of DSSM no longer."""

    def forward(self, interaction: Any) -> Tensor:
        """Scores ``[rows]``."""
        scores: Tensor = super().forward(interaction)
        return scores.reshape(-1)


class KD_DAGFM(context_aware_recommender.KD_DAGFM):  # noqa: N801  (RecBole's name)
    """Ends with a RecBole that squeezes the labels of KD_DAGFM no longer."""

    def calculate_loss(self, interaction: Any) -> Tensor:
        """RecBole's loss; one label stays a list of one."""
        if len(interaction) == 1:
            column = interaction[self.LABEL].unsqueeze(-1)
            interaction = Interaction({**interaction.interaction, self.LABEL: column})
        loss: Tensor = super().calculate_loss(interaction)
        return loss
