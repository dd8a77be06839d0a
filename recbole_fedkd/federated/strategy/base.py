"""What a strategy is: four answers, written once and run by every engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_fedkd.federated.message import Message

ServerState = dict[str, Tensor]
"""What the server remembers between rounds: named tensors, saved with every checkpoint."""


@dataclass(frozen=True)
class StrategySettings:
    """The strategy's keys of the config, see ``properties/overall.yaml``.

    Attributes:
        clients: number of clients ``K``.
        labels: number of labels ``T``.
        gamma: weight of the cross-entropy to the teacher.
        alpha: weight of the reverse divergence to the teacher.
        temperature: ``tau`` of both.
        aggregation: how the server averages knowledge.
    """

    clients: int
    labels: int
    gamma: float
    alpha: float
    temperature: float
    aggregation: str


@dataclass
class LocalResult:
    """What a client has after local training, for the strategy to draw on.

    Attributes:
        logit_sums: ``[T, T]``, logits of the client's training samples summed by label.
        label_counts: ``[T]``, samples per label.
    """

    logit_sums: Tensor
    label_counts: Tensor


class Strategy(ABC):
    """How clients learn together. A subclass answers four questions; it holds settings and no state.

    Attributes:
        name: value of the config key ``strategy``.
        exchanges_knowledge: False if nothing is ever sent, so that clients need not extract any knowledge.
    """

    name: str
    exchanges_knowledge = True

    def __init__(self, settings: StrategySettings) -> None:
        self.settings = settings

    @abstractmethod
    def download(self, state: ServerState, client: int, round_index: int) -> Message | None:
        """What goes down to ``client`` at the start of a round; None if the server has nothing to say."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, received: Mapping[str, Tensor]) -> Tensor:
        """The local objective of a batch: logits ``[batch, T]``, label indices ``[batch]``, and what came down."""

    @abstractmethod
    def upload(self, result: LocalResult, client: int, round_index: int) -> Message | None:
        """What goes up after local training; None if the client has nothing to say."""

    @abstractmethod
    def aggregate(self, state: ServerState, uploads: list[Message]) -> ServerState:
        """The server's next state from this round's uploads; clients that sent nothing keep their last word."""


def to_tensors(message: Message) -> dict[str, Tensor]:
    """Arrays of a message as tensors of their own memory."""
    return {name: torch.tensor(array) for name, array in message.arrays.items()}
