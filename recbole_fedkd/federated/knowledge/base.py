"""What a kind of knowledge is: what of a trained network is collected, what of it travels, and which teacher a sample gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.federated.aggregate import Fold, Sums
from recbole_fedkd.federated.message import ArraySpec
from recbole_fedkd.federated.task import Step, Task
from recbole_fedkd.registry import NoSettings, Registry, outdated, read_settings

Tensors = Mapping[str, Tensor]
Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Sizes:
    """What everybody knows of a federation before it begins.

    Attributes:
        clients: number of clients ``K``.
        labels: number of labels ``T``.
        items: number of items ``I``, padding included.
        everybody: whether every client answers in every round.
        user_unit: what a single user on a client is shortened to before the client adds its users up, by the name of an array;
            None: users are not bounded.
        hidden: width ``h`` of a network's last hidden layer; 0 where it tells none.
        seed: the run's.
    """

    clients: int
    labels: int
    items: int
    everybody: bool = True
    hidden: int = 0
    user_unit: Callable[[str], float] | None = None
    seed: int = 0


class Knowledge(ABC):
    """One kind of knowledge; it holds settings and no state.

    What methods are given, wherever it is not said anew, is as of :class:`~recbole_fedkd.federated.strategy.Strategy`:
    ``state``, ``statistics``, ``client``, ``clients``, ``round_index``, ``received``, ``step``, ``task``; ``collected`` is what
    the batches have added up to, ``arrays`` an upload, ``understood`` what :meth:`understood` gives.

    Args:
        settings: of ``settings_type``.
        sizes: of the federation.

    Attributes:
        name: value of the config key ``knowledge``.
        settings_type: dataclass of its keys.
        of_network: whether it is collected of what a trained network says, batch by batch.
        reads_hidden: whether it needs the network's hidden states beside its logits.
        accumulates: whether a message adds to what the client has been told before.
        exchange_rounds: rounds before there is anything to train by.
        elementwise: whether :meth:`upload` and :meth:`understood` make of arrays with a leading axis of clients what they make
            of each client's own.
        differs_first: whether a client's first upload holds other arrays than those of clients that have spoken before.
        same_for_all: whether the server says the same to all clients that hold the same version of what it has said before.
        keeps: whether a client keeps what it is told; if not, its network has what it needs once that is taken in.
        pads: whether :meth:`penalty` leaves out rows of weight 0, as of a strategy.
    """

    name: str
    settings_type: type = NoSettings
    of_network = True
    reads_hidden = False
    accumulates = False
    elementwise = False
    differs_first = False
    same_for_all = False
    exchange_rounds = 0
    keeps = True
    pads = True

    def __init_subclass__(cls) -> None:
        # What a base says of its methods is not said of others'.
        if outdated(cls, "elementwise", "upload", "understood"):
            cls.elementwise = False
        if outdated(cls, "collect_of_many", "collect"):
            cls.collect_of_many = Knowledge.collect_of_many  # type: ignore[method-assign]
        if outdated(cls, "pads", "penalty"):
            cls.pads = False

    def __init__(self, settings: Any, sizes: Sizes) -> None:
        self.settings, self.sizes = settings, sizes

    @classmethod
    def of(cls, config: Any, sizes: Sizes) -> Self:
        """The kind of knowledge as a config has it."""
        return cls(read_settings(cls.settings_type, config), sizes)

    @property
    def needs_each(self) -> str | None:
        """What needs every client's own upload; None: sums over the clients are all that the server needs."""
        return f"knowledge={self.name}"

    def without_effect(self, clients: int) -> str | None:
        """What a setting does not do with so many clients; None: they all do something."""
        return None

    def audience(self, state: Tensors, client: int) -> int | None:
        """As of a strategy: clients that hold the same version."""
        if not self.same_for_all:
            return None
        return int(state["held"][client]) if "held" in state else 0

    @abstractmethod
    def collect(self, step: Step) -> dict[str, Tensor]:
        """What a batch adds; the sums of all batches are what a client knows."""

    def collect_of_many(self, step: Step, clients: Tensor, count: int) -> dict[str, Tensor]:
        """What a batch of several clients' samples adds, with a leading axis of clients.

        Args:
            step: of all samples together.
            clients: whose each sample is ``[size]``, from 0.
            count: number of clients.
        """
        of_clients = [self.collect(step.select(clients == client)) for client in range(count)]
        return {name: torch.stack([collected[name] for collected in of_clients]) for name in of_clients[0]}

    @abstractmethod
    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """What goes up; ``first``: the client has never spoken before."""

    def disguised(self, arrays: Arrays, client: int, round_index: int) -> Arrays:
        """What of an upload a client tells in a round, where that is not all of it."""
        return arrays

    @abstractmethod
    def upload_arrays(self) -> dict[str, ArraySpec]:
        """What an upload holds."""

    @abstractmethod
    def empty(self, state: Tensors) -> Fold:
        """A fold of a round's uploads that has taken in none."""

    @abstractmethod
    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """The server's next state, given what the uploads of a round have come to."""

    def possible(self, statistics: Tensors) -> Tensors:
        """Statistics that noise was added to or codecs took from, as near as they can be to some that uploads might come to."""
        return statistics

    @abstractmethod
    def download_arrays(self) -> dict[str, ArraySpec]:
        """What a download may hold."""

    @abstractmethod
    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """What goes down to a client; nothing if the server knows nothing new."""

    def version(self, state: Tensors) -> int:
        """What the server has to say, as a number that grows with it; ``held [K]`` of its state is what each client has."""
        return 0

    def delivered(self, state: Tensors, clients: Sequence[int]) -> dict[str, Tensor]:
        """The server's state once clients have answered its message: they have what there was to say."""
        if "held" not in state:
            return dict(state)
        versions = state["held"].index_fill(0, torch.tensor(clients, dtype=torch.long), self.version(state))
        return {**state, "held": versions}

    def versions_of(self, state: Tensors) -> Tensor:
        """``held [K]``; 0 of clients that have nothing."""
        return state.get("held", torch.zeros(self.sizes.clients, dtype=torch.int64))

    @abstractmethod
    def teacher(self, received: Tensors, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """Teacher's logits ``[batch, T]`` and mask ``[batch]`` of a batch; None without one."""

    def penalty(self, received: Tensors, step: Step) -> Tensor | None:
        """What is added to the loss of a batch beside the teacher's terms, a scalar; None: nothing."""
        return None

    def understood(self, received: Tensors, own: Tensors, fresh: bool) -> dict[str, Tensor]:
        """What a client makes of a message: ``own`` is what it has sent so far, ``fresh`` whether in the round before."""
        return dict(received)

    def installed(self, understood: Tensors) -> dict[str, Tensor]:
        """Buffers of the network that follow from it."""
        return {}

    def learns(self, received: Tensors) -> bool:
        """Whether there is something to train by, given what the client has been told."""
        return True

    def statistics(self, task: Task, received: Tensors) -> dict[str, Tensor]:
        """What a client's samples add that no network needs to be asked for."""
        return {}

    def taken_in(self, task: Task, received: Tensors, own: Tensors) -> None:  # noqa: B027
        """Tell the network what the client has been told, of which ``own`` it has said itself; most need not know."""


KNOWLEDGE: Registry[type[Knowledge]] = Registry("knowledge", "knowledge")
register_knowledge = KNOWLEDGE.register


class StagedSums(Knowledge):
    """Sums over clients in stages, a round each (``settings.stages``); the network is not asked."""

    needs_each = None
    of_network = False
    same_for_all = True

    @property
    def exchange_rounds(self) -> int:  # type: ignore[override]
        """One per stage."""
        return len(self.settings.stages)

    def collect(self, step: Step) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def empty(self, state: Tensors) -> Fold:
        """Totals of the stage."""
        return Sums()

    def teacher(self, received: Tensors, step: Step) -> tuple[None, None]:
        """None: nobody is taught; what is known, the network knows."""
        return None, None


class SumsByClass(Knowledge):
    """Sums over the samples of every class, an item or a label; for several clients, every pair of both is a class."""

    @abstractmethod
    def classes_of(self, step: Step) -> tuple[Tensor, int]:
        """Class of every sample ``[size]``, and the number ``P`` of classes."""

    @abstractmethod
    def sums(self, step: Step, classes: Tensor, count: int) -> dict[str, Tensor]:
        """Sums over the samples of each of ``count`` classes, ``[count, ...]``."""

    def collect(self, step: Step) -> dict[str, Tensor]:
        """Sums by class ``[P, ...]``."""
        return self.sums(step, *self.classes_of(step))

    def collect_of_many(self, step: Step, clients: Tensor, count: int) -> dict[str, Tensor]:
        """The same ``[count, P, ...]``."""
        classes, number = self.classes_of(step)
        summed = self.sums(step, clients * number + classes, count * number)
        return {name: value.view(count, number, *value.shape[1:]) for name, value in summed.items()}


class SumsByItem(SumsByClass):
    """Sums by item; logits ``teacher`` ``[I, T]`` come down of those that are ``known`` ``[I]``."""

    def classes_of(self, step: Step) -> tuple[Tensor, int]:
        """Items."""
        assert step.items is not None
        return step.items, self.sizes.items

    def teacher(self, received: Tensors, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """The row of the sample's item."""
        if "teacher" not in received or step.items is None:
            return None, None
        return received["teacher"][step.items], received["known"][step.items]
