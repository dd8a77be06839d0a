"""What a strategy is: four answers, written once and run by every engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.shared import SharedState

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
        proximal_weight: ``mu`` of FedProx.
        server_optimizer: what the server makes of the mean of the clients' parameters.
        server_learning_rate: its rate.
        server_momentum: its momentum, of ``fedadam`` the first moment's.
        server_beta2: the second moment's decay.
        server_tau: keeps the denominator of ``fedadam`` from zero.
    """

    clients: int
    labels: int
    gamma: float
    alpha: float
    temperature: float
    aggregation: str
    proximal_weight: float
    server_optimizer: str
    server_learning_rate: float
    server_momentum: float
    server_beta2: float
    server_tau: float


@dataclass
class LocalResult:
    """What a client has after local training, for the strategy to draw on.

    Attributes:
        samples: number of training samples.
        shared: the part of the trained network that may be sent.
        logit_sums: ``[T, T]``, logits of the client's training samples summed by label; None unless the strategy
            exchanges knowledge.
        label_counts: ``[T]``, samples per label; None like the sums.
    """

    samples: int
    shared: SharedState
    logit_sums: Tensor | None = None
    label_counts: Tensor | None = None


class Strategy(ABC):
    """How clients learn together. A subclass answers four questions; it holds settings and no state.

    Attributes:
        name: value of the config key ``strategy``.
        exchanges_knowledge: whether clients need logits: False spares them the pass that extracts knowledge.
        shares_parameters: whether users are served by what the server holds: every client then takes it in at the end
            of a round, chosen or not.
    """

    name: str
    exchanges_knowledge = False
    shares_parameters = False

    def __init__(self, settings: StrategySettings) -> None:
        self.settings = settings

    @abstractmethod
    def download(self, state: ServerState, client: int, round_index: int) -> Message | None:
        """What goes down to ``client`` at the start of a round; None if the server has nothing to say."""

    @abstractmethod
    def loss(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """The local objective of a batch, a scalar, from the network's own loss, what came down and what is shared."""

    @abstractmethod
    def upload(self, result: LocalResult, client: int, round_index: int) -> Message | None:
        """What goes up after local training; None if the client has nothing to say."""

    @abstractmethod
    def aggregate(self, state: ServerState, uploads: list[Message]) -> ServerState:
        """The server's next state from this round's uploads; clients that sent nothing keep their last word."""

    def initial_state(self, shared: SharedState) -> ServerState:
        """The server's state before the first round, given the network that every client starts from."""
        return {}

    def installed(self, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Parameters and buffers that a client takes over from a message before it trains."""
        return {}


def to_tensors(message: Message) -> dict[str, Tensor]:
    """Arrays of a message as tensors of their own memory."""
    return {name: torch.tensor(array) for name, array in message.arrays.items()}
