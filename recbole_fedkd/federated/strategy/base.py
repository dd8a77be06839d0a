"""What a strategy is: four answers, written once and run by every engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.errors import InputError, TrainingError, shown
from recbole_fedkd.federated.aggregate import EveryUpload, Fold
from recbole_fedkd.federated.knowledge import KNOWLEDGE, Knowledge, Sizes
from recbole_fedkd.federated.message import Message, Schema
from recbole_fedkd.federated.task import Step, Task
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.registry import NoSettings, outdated, read_settings

ServerState = dict[str, Tensor]
"""What the server remembers between rounds: named tensors, saved with every checkpoint."""


@dataclass
class LocalResult:
    """What a client has after local training, for the strategy to draw on.

    Attributes:
        shared: the part of the trained network that may be sent.
        first: whether the client has never spoken before.
        collected: knowledge of the client's samples, as the kind of knowledge collects it; empty unless the strategy
            exchanges knowledge.
        uploaded: what the kind of knowledge makes of it for an upload; None: it has not been asked yet.
    """

    shared: SharedState
    first: bool
    collected: dict[str, Tensor] = field(default_factory=dict)
    uploaded: dict[str, NDArray[np.generic]] | None = None


class Strategy(ABC):
    """How clients learn together. A subclass answers four questions; it holds settings and no state.

    What becomes of the uploads is said by :meth:`aggregate`, of all of them at once; or, so that none needs to be kept, by
    :meth:`empty`, which folds them one by one, and :meth:`step`.

    What methods are given, wherever it is not said anew: ``state`` is what the server remembers, ``statistics`` what a round's
    uploads have come to, ``client`` the number of one client, ``clients`` their count or their numbers, ``round_index`` the
    round, from 0. On a client ``received`` holds what came down by name, ``shared`` the network as far as it may be sent,
    ``step`` a batch, ``result`` what training has left, ``task`` the network and the client's samples.

    Args:
        settings: of ``settings_type``; None: its defaults.
        knowledge: what clients exchange, where they do.

    Attributes:
        name: value of the config key ``strategy``.
        settings_type: dataclass of its keys.
        exchanges_knowledge: whether clients need logits: False spares them the pass that extracts knowledge.
        shares_parameters: whether clients send their networks.
        trains_teacher: whether every client keeps a larger network that never leaves it beside the one that travels.
        taught_by_received: whether the network that came down teaches the one that is trained; needs ``AttentiveTask``.
        distils_on_server: whether the server trains on pairs that it makes up; needs ``AttentiveTask``.
        remembers_sent: whether clients keep what they have sent, to take it off what comes down.
        same_for_all: whether the server says the same to every client of a round.
        adds_nothing: whether the local objective is the network's own loss.
        elementwise: whether :meth:`understood`, and what the kind of knowledge uploads, are the same for many clients at once.
        pads: whether :meth:`loss` leaves rows of weight 0 out (``step.weights``), and reads of the item tables what a batch
            touches alone, so that clients of all sizes can be trained side by side by parts of them. What overrides it has to
            say so anew; else those of one size are, by the whole.
    """

    name: str
    settings_type: type = NoSettings
    exchanges_knowledge = False
    shares_parameters = False
    trains_teacher = False
    taught_by_received = False
    distils_on_server = False
    remembers_sent = False
    same_for_all = False
    adds_nothing = False
    elementwise = False
    pads = False

    def __init_subclass__(cls) -> None:
        # What a base says of its methods is not said of others'.
        if outdated(cls, "pads", "loss", "objective"):
            cls.pads = False
        if outdated(cls, "adds_nothing", "loss", "objective"):
            cls.adds_nothing = False
        if outdated(cls, "elementwise", "understood", "upload"):
            cls.elementwise = False

    def __init__(self, settings: Any = None, knowledge: Knowledge | None = None) -> None:
        self.settings = settings if settings is not None else self.settings_type()
        self._knowledge = knowledge

    @classmethod
    def of(cls, config: Any, sizes: Sizes) -> Self:
        """The strategy as a config has it, over a federation of these sizes."""
        knowledge = KNOWLEDGE[config["knowledge"]].of(config, sizes) if cls.exchanges_knowledge else None
        return cls(read_settings(cls.settings_type, config), knowledge)

    @property
    def knowledge(self) -> Knowledge:
        """What clients exchange, where they do."""
        assert self._knowledge is not None
        return self._knowledge

    def audience(self, state: ServerState, client: int) -> int | None:
        """A number that all clients share to whom the server says the same as to this one; None: it is told its own."""
        return 0 if self.same_for_all else None

    @property
    def serves_aggregate(self) -> bool:
        """Whether every client takes over what the server holds at the end of a round, to serve its users by it."""
        return self.shares_parameters

    @abstractmethod
    def download(self, state: ServerState, client: int, round_index: int) -> Message | None:
        """What goes down to ``client`` at the start of a round; None if the server has nothing to say."""

    @abstractmethod
    def loss(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """The local objective of a batch, a scalar, from the network's own loss, what came down and what is shared.

        Args:
            step: the batch.
            received: arrays of the server's message, by name.
            shared: of the trained network; ``shared.parameters()`` gives its tensors by name.
        """

    def objective(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """:meth:`loss`; raises :class:`TrainingError` where that gives no scalar tensor."""
        loss = self.loss(step, received, shared)
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else shown(loss)
            raise TrainingError(
                f"the loss of strategy '{self.name}' is {what}; it must be a tensor that holds one number"
            )
        return loss

    @abstractmethod
    def upload(self, result: LocalResult, client: int, round_index: int) -> Message | None:
        """What goes up after local training; None if the client has nothing to say."""

    @property
    def needs_each(self) -> str | None:
        """What needs every client's own upload; None: sums over the clients are all that the server needs."""
        return f"strategy={self.name}"

    def without_effect(self, clients: int, in_round: int) -> str | None:
        """What a setting does not do with so many clients, ``in_round`` of them in a round; None: they all do something."""
        return None

    def aggregate(self, state: ServerState, uploads: list[Message]) -> ServerState:
        """The server's next state from this round's uploads; clients that sent nothing keep their last word."""
        raise NotImplementedError(f"strategy '{self.name}' neither aggregates nor folds")

    def empty(self, state: ServerState, samples: Mapping[int, int]) -> Fold:
        """A fold of a round's uploads that has taken in none.

        Args:
            state: the server's.
            samples: samples of an epoch of every client that takes part.
        """
        return EveryUpload(lambda uploads: self.aggregate(state, uploads))

    def step(self, state: ServerState, statistics: Mapping[str, Tensor]) -> ServerState:
        """The server's next state, given what the uploads of a round have come to."""
        return dict(statistics)

    def possible(self, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Statistics that noise was added to or codecs took from, as near as they can be to some that uploads might come to."""
        return self.knowledge.possible(statistics) if self.exchanges_knowledge else statistics

    @abstractmethod
    def upload_schema(self, state: ServerState) -> Schema | None:
        """What an upload must hold, given the state that the server starts from; None: clients say nothing."""

    def download_schema(self, state: ServerState) -> Schema | None:
        """What the server's message must hold, given the state that it starts from; None: any finite arrays."""
        return None

    def initial_state(self, shared: SharedState) -> ServerState:
        """The server's state before the first round, given the network that every client starts from."""
        return {}

    def delivered(self, state: ServerState, clients: Sequence[int]) -> ServerState:
        """The server's state once clients have answered its message, before what they answer is taken in."""
        return state

    def understood(self, received: Mapping[str, Tensor], own: Mapping[str, Tensor], fresh: bool) -> dict[str, Tensor]:
        """What a client makes of a message and keeps as ``received``.

        Args:
            received: the message's arrays.
            own: the latest arrays of every name that the client has sent.
            fresh: whether the client sent something in the round before, so that it is part of what the server says now.
        """
        return dict(received)

    @property
    def collects(self) -> bool:
        """Whether clients collect knowledge of what their trained networks say."""
        return self.exchanges_knowledge and self.knowledge.of_network

    @property
    def reads_hidden(self) -> bool:
        """Whether what clients collect is of hidden states."""
        return self.exchanges_knowledge and self.knowledge.reads_hidden

    @property
    def accumulates(self) -> bool:
        """Whether a message adds to what a client has been told before."""
        return self.exchanges_knowledge and self.knowledge.accumulates

    @property
    def keeps(self) -> bool:
        """Whether a client keeps what it has been told."""
        return not self.exchanges_knowledge or self.knowledge.keeps

    @property
    def exchange_rounds(self) -> int:
        """Rounds before there is anything to train by."""
        return self.knowledge.exchange_rounds if self.exchanges_knowledge else 0

    def learns(self, received: Mapping[str, Tensor]) -> bool:
        """Whether a client has something to train by, given what it has been told; if not, its loss is only measured."""
        return not self.exchanges_knowledge or self.knowledge.learns(received)

    def statistics(self, task: Task, received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a client's samples add to what is collected of its network."""
        return self.knowledge.statistics(task, received) if self.exchanges_knowledge else {}

    def taken_in(self, task: Task, received: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """What a client makes of all that it has been told, of which ``own`` it has said itself; also after a resume."""
        if self.exchanges_knowledge:
            self.knowledge.taken_in(task, received, own)

    def installed(self, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Parameters and buffers that a client takes over from what it understood, before it trains."""
        return {}


def check_additive(strategy: Strategy, asked: str) -> None:
    """Raise :class:`InputError` if a strategy needs every client's own upload, where ``asked`` lets sums alone through."""
    if strategy.needs_each is not None:
        raise InputError(
            f"{asked} tells the server sums over the clients and nothing else, but {strategy.needs_each} needs every client's "
            "own; unset one of them"
        )


def to_tensors(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
    """Arrays as tensors of their own memory."""
    return {name: torch.tensor(array) for name, array in arrays.items()}
