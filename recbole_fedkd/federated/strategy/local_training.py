"""``local``: every client trains alone; what the others cannot help with is measured against this."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.strategy.base import LocalResult, ServerState, Strategy
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.shared import SharedState


class LocalTraining(Strategy):
    """No exchange: no message in either direction, the network's own loss as objective."""

    name = "local"
    needs_each = None
    adds_nothing = True
    pads = True

    def download(self, state: ServerState, client: int, round_index: int) -> Message | None:
        """Nothing."""
        return None

    def loss(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """The network's own loss."""
        return step.loss

    def upload(self, result: LocalResult, client: int, round_index: int) -> Message | None:
        """Nothing."""
        return None

    def upload_schema(self, state: ServerState) -> None:
        """Nothing."""
