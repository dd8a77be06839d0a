"""``sums``: clients send sums over their rows, and everybody computes the same model of the totals; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from recbole_fedkd.federated.knowledge import KNOWLEDGE, Sizes
from recbole_fedkd.federated.strategy.knowledge_exchange import AttentiveFederatedDistillation
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.registry import NoSettings


class SumExchange(AttentiveFederatedDistillation):
    """The exchange of the sums that a model is made of; the model says which (its ``sums``), and not the key ``knowledge``."""

    name = "sums"
    settings_type: type = NoSettings

    @property
    def remembers_sent(self) -> bool:  # type: ignore[override]
        """Where a client goes on with what it has been told, and takes its own part off for its own rows."""
        return self.knowledge.keeps

    @classmethod
    def of(cls, config: Any, sizes: Sizes) -> Self:
        """The exchange of the config's model."""
        model = config.model_class
        return cls(None, KNOWLEDGE[model.sums](model.sum_settings(config), sizes))

    def loss(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """The network's own, which is measured and not minimised."""
        return step.loss
