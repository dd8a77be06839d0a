"""``local``: every client trains alone; what the others cannot help with is measured against this."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.strategy.base import LocalResult, ServerState, Strategy


class LocalTraining(Strategy):
    """No exchange: no message in either direction, the plain cross-entropy as objective."""

    name = "local"
    exchanges_knowledge = False

    def download(self, state: ServerState, client: int, round_index: int) -> Message | None:
        """Nothing."""
        return None

    def loss(self, logits: Tensor, labels: Tensor, received: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of the labels."""
        return functional.cross_entropy(logits, labels)

    def upload(self, result: LocalResult, client: int, round_index: int) -> Message | None:
        """Nothing."""
        return None

    def aggregate(self, state: ServerState, uploads: list[Message]) -> ServerState:
        """Nothing to aggregate."""
        return state
