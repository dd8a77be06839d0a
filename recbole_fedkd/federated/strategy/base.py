"""What a strategy is: four answers, written once and run by every engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recbole_fedkd.federated.codec import WireCodecs
from recbole_fedkd.federated.knowledge import KNOWLEDGE, KnowledgeSettings
from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.shared import SharedState

ServerState = dict[str, Tensor]
"""What the server remembers between rounds: named tensors, saved with every checkpoint."""


@dataclass(frozen=True)
class StrategySettings:
    """The strategy's keys of the config, see ``properties/overall.yaml``.

    Attributes:
        knowledge: what is distilled.
        knowledge_settings: how it is collected, averaged and used.
        gamma: weight of the cross-entropy to the teacher.
        alpha: weight of the reverse divergence to the teacher.
        temperature: ``tau`` of both.
        proximal_weight: ``mu`` of FedProx.
        server_optimizer: what the server makes of the mean of the clients' parameters.
        server_learning_rate: its rate.
        server_momentum: its momentum, of ``fedadam`` the first moment's.
        server_beta2: the second moment's decay.
        server_tau: keeps the denominator of ``fedadam`` from zero.
        client_weights: ``samples`` or ``uniform``, what a client counts for in the server's mean.
        row_mean: ``all`` or ``changed``, which clients the mean of a parameter's row is taken over.
        serve_after: ``aggregation`` or ``training``, when a client's network is what serves its users.
    """

    knowledge: str
    knowledge_settings: KnowledgeSettings
    gamma: float
    alpha: float
    temperature: float
    proximal_weight: float
    server_optimizer: str
    server_learning_rate: float
    server_momentum: float
    server_beta2: float
    server_tau: float
    client_weights: str
    row_mean: str
    serve_after: str


@dataclass
class LocalResult:
    """What a client has after local training, for the strategy to draw on.

    Attributes:
        samples: number of training samples.
        shared: the part of the trained network that may be sent.
        first: whether the client has never spoken before.
        collected: knowledge of the client's samples, as the kind of knowledge collects it; empty unless the strategy
            exchanges knowledge.
    """

    samples: int
    shared: SharedState
    first: bool
    collected: dict[str, Tensor] = field(default_factory=dict)


class Strategy(ABC):
    """How clients learn together. A subclass answers four questions; it holds settings and no state.

    Attributes:
        name: value of the config key ``strategy``.
        exchanges_knowledge: whether clients need logits: False spares them the pass that extracts knowledge.
        shares_parameters: whether clients send their networks.
        trains_teacher: whether every client keeps a larger network that never leaves it beside the one that travels.
        taught_by_received: whether the network that came down teaches the one that is trained; needs ``AttentiveTask``.
        remembers_sent: whether clients keep what they have sent, to take it off what comes down.
    """

    name: str
    exchanges_knowledge = False
    shares_parameters = False
    trains_teacher = False
    taught_by_received = False
    remembers_sent = False

    def __init__(self, settings: StrategySettings) -> None:
        self.settings = settings
        self.knowledge = KNOWLEDGE[settings.knowledge](settings.knowledge_settings)

    @property
    def serves_aggregate(self) -> bool:
        """Whether every client takes over what the server holds at the end of a round, to serve its users by it."""
        return self.shares_parameters and self.settings.serve_after == "aggregation"

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

    def delivered(self, state: ServerState, client: int) -> ServerState:
        """The server's state once a client has its message."""
        return state

    def understood(self, received: Mapping[str, Tensor], own: Mapping[str, Tensor], fresh: bool) -> dict[str, Tensor]:
        """What a client makes of a message and keeps as ``received``.

        Args:
            received: the message's arrays.
            own: the latest arrays of every name that the client has sent.
            fresh: whether the client sent something in the round before, so that it is part of what the server says now.
        """
        return dict(received)

    def installed(self, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Parameters and buffers that a client takes over from what it understood, before it trains."""
        return {}


def travels_as_update(strategy: Strategy, codecs: WireCodecs) -> bool:
    """Whether networks travel as what changed of them: where one is shared and codecs are set, which may drop something."""
    return strategy.shares_parameters and bool(codecs)


def to_tensors(message: Message) -> dict[str, Tensor]:
    """Arrays of a message as tensors of their own memory."""
    return {name: torch.tensor(array) for name, array in message.arrays.items()}
