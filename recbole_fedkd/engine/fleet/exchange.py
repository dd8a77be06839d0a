"""What packed clients hear and say: by the strategy's own code and each client's end of the wire, as on the ``local`` engine.

Where all start from one network (:class:`CommonDownlink`) it is kept once, and where nothing but the weighted mean of whole
networks is asked for (:class:`MeanUplink`) that is computed of packed clients at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor

from recbole_fedkd.engine.base import ClientError, Round
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.heard import Heard
from recbole_fedkd.engine.fleet.messages import MeanOfClients, SharedTensors
from recbole_fedkd.engine.fleet.training import Trained, Training
from recbole_fedkd.federated.aggregate import MeanOfChangedRows, WeightedMean
from recbole_fedkd.federated.dialogue import answer, on_device, understood
from recbole_fedkd.federated.message import LARGEST, SERVER, Message, MessageError, check_arrays
from recbole_fedkd.federated.message import Training as TrainedOn
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.strategy import LocalResult
from recbole_fedkd.federated.strategy.federated_averaging import BUFFER, PARAMETER, FederatedAveraging
from recbole_fedkd.federated.wire import ClientLink
from recbole_fedkd.model.shared import Rows, SharedState

Base = tuple[Tensor, Tensor, Tensor]


class Links:
    """The clients' ends of the wire, each made when it is first needed.

    Args:
        server: whose.
        feedback: whether what encoding takes from an update is added to the next one.
        follows: the end of the wire whose network all of them hold; None: each holds one of its own.
    """

    def __init__(self, server: Server, feedback: bool, follows: ClientLink | None) -> None:
        self.server, self.feedback, self.follows = server, feedback, follows
        self.network = server.state
        self.of: dict[int, ClientLink] = {}

    def __getitem__(self, number: int) -> ClientLink:
        if number not in self.of:
            strategy, codecs = self.server.strategy, self.server.codecs
            self.of[number] = ClientLink(number, strategy, codecs, self.feedback, self.network, self.follows)
        return self.of[number]

    def state_dict(self) -> dict[int, Any]:
        """Of those that have been made, by client."""
        return {number: link.state_dict() for number, link in self.of.items()}

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.of = {}
        for number, saved in state.items():
            self[number].load_state_dict(saved)


class Sizes:
    """Bytes on the wire of messages of one round; those of one signature differ in the numbers that they hold alone."""

    def __init__(self) -> None:
        self._without_sender: dict[Hashable, int] = {}

    def __call__(self, message: Message) -> int:
        """Length of the message's bytes."""
        arrays = tuple((name, array.dtype, array.shape) for name, array in message.arrays.items())
        signature = message.kind, message.round, arrays, any(message.codec_error)
        sender = len(msgpack.packb(message.sender))
        if signature not in self._without_sender:
            self._without_sender[signature] = len(message.to_bytes()) - sender
        return self._without_sender[signature] + sender


class Downlink(ABC):
    """What the server says to clients, and what they make of it.

    Args:
        server: the server.
        groups: the clients.
        links: the clients' ends of the wire.
        device: where their networks live.
    """

    def __init__(self, server: Server, groups: Sequence[ClientGroup], links: Links, device: torch.device) -> None:
        self.server, self.groups, self.links, self.device = server, groups, links, device

    @abstractmethod
    def hear(self, chosen: Sequence[int], round_index: int) -> dict[int, int]:
        """The clients of a round take in what the server says; bytes by client."""

    @abstractmethod
    def alike(self, number: int) -> Hashable:
        """What clients that are packed together have in common."""

    @abstractmethod
    def heard(self, group_index: int, numbers: Sequence[int]) -> Heard:
        """What packed clients have been told."""

    @abstractmethod
    def serve(self, round_index: int) -> list[int]:
        """Every client takes in what it serves its users by; those that each put it into a network of their own."""

    @abstractmethod
    def snapshot(self, number: int) -> Any:
        """What a client has heard and said, for :meth:`restore`."""

    @abstractmethod
    def restore(self, number: int, snapshot: Any) -> None:
        """The client has heard and said what it had at the time of a snapshot."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What clients have heard, plain values and tensors only."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def _tables(self, received: Mapping[str, Tensor], installed: Mapping[str, Tensor]) -> frozenset[str]:
        """Names of what has been received that are item tables of a network."""
        tables = [id(installed[name]) for group in self.groups for name in group.item_names if name in installed]
        return frozenset(name for name, value in received.items() if id(value) in tables)


class CommonDownlink(Downlink):
    """The server says one thing to all, and what follows from it for the network is kept once. Arguments as of the base."""

    def __init__(self, server: Server, groups: Sequence[ClientGroup], links: Links, device: torch.device) -> None:
        super().__init__(server, groups, links, device)
        assert links.follows is not None
        self.link = links.follows
        updates = self.link.updates is not None
        self._take(dict(server.state) if updates else {}, installs=False)

    def _take(self, received: dict[str, Tensor], installs: bool = True) -> None:
        self.received = received
        installed = self.server.strategy.installed(received)
        self.common = Heard(received, tables=self._tables(received, installed))
        with torch.no_grad():
            for group in self.groups if installs else ():
                state = group.whole.state_dict(keep_vars=True)
                for name, value in installed.items():
                    state[name].copy_(value)

    def _read(self, payload: bytes) -> None:
        message = self.link.read(payload) if payload else None
        if message is not None:
            self._take(understood(self.link, self.received, message, self.device))

    def hear(self, chosen: Sequence[int], round_index: int) -> dict[int, int]:
        """One message; who has been away gets a longer one that says the same."""
        sizes = {number: len(self.server.send(number, round_index)) for number in chosen}
        self._read(self.server.serve(round_index))
        return sizes

    def alike(self, number: int) -> Hashable:
        """All are."""
        return None

    def heard(self, group_index: int, numbers: Sequence[int]) -> Heard:
        """The same for all."""
        return self.common

    def serve(self, round_index: int) -> list[int]:
        """The network of all."""
        self._read(self.server.serve(round_index))
        return []

    def snapshot(self, number: int) -> Any:
        """What it has said."""
        return self.links[number].state_dict()

    def restore(self, number: int, snapshot: Any) -> None:
        """It has said what it had."""
        self.links[number].load_state_dict(snapshot)

    def state_dict(self) -> dict[str, Any]:
        """The latest message."""
        return {"received": dict(self.received), "link": self.link.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.link.load_state_dict(state["link"])
        self._take(on_device(state["received"], self.device), installs=False)


class OwnDownlink(Downlink):
    """The server says something else to every client. Arguments as of the base."""

    def __init__(self, server: Server, groups: Sequence[ClientGroup], links: Links, device: torch.device) -> None:
        super().__init__(server, groups, links, device)
        self.received: dict[int, dict[str, Tensor]] = {}
        self._fresh: set[int] = set()

    def _read(self, number: int, message: Message | None) -> None:
        if message is not None:
            link, before = self.links[number], self.received.get(number, {})
            self.received[number] = understood(link, before, message, self.device)
            self._fresh.add(number)

    def hear(self, chosen: Sequence[int], round_index: int) -> dict[int, int]:
        """To each its own."""
        self._fresh = set()
        server, sizes, size_of = self.server, {}, Sizes()
        payload: bytes | None = None
        common = server.message_for(SERVER, round_index) if server.strategy.same_for_all and not server.codecs else None
        for number in chosen:
            if server.codecs:
                before, payload = payload, server.send(number, round_index)
                sizes[number] = len(payload)
                if payload is not before or self.links[number].updates is not None:
                    common = self.links[number].read(payload) if payload else None
                self._read(number, common)
            else:
                message = common if server.strategy.same_for_all else server.message_for(number, round_index)
                sizes[number] = size_of(message) if message is not None else 0
                self._read(number, message)
        return sizes

    def alike(self, number: int) -> Hashable:
        """Whether it has heard anything new, and what it knows."""
        received = self.received.get(number, {})
        known = tuple((name, value.shape) for name, value in received.items())
        return number in self._fresh, self.server.strategy.learns(received), known

    def heard(self, group_index: int, numbers: Sequence[int]) -> Heard:
        """What each knows; only what is new is put into its network."""
        group, strategy = self.groups[group_index], self.server.strategy
        received = [self.received.get(number, {}) for number in numbers]
        installed = [strategy.installed(known) for known in received] if numbers[0] in self._fresh else [{}]
        return Heard(
            own=_stacked(received),
            tables=self._tables(received[0], installed[0]),
            installed=_stacked(installed),
            whole_tables=bool(installed[0].keys() & set(group.item_names)),
            learns=strategy.learns(received[0]),
        )

    def serve(self, round_index: int) -> list[int]:
        """All of them."""
        payload = self.server.serve(round_index)
        self._fresh = set()
        everybody = sorted(number for group in self.groups for number in group.numbers.tolist())
        for number in everybody:
            self._read(number, self.links[number].read(payload) if payload else None)
        return sorted(self._fresh)

    def snapshot(self, number: int) -> Any:
        """What it knows and has said."""
        return self.received.get(number), self.links[number].state_dict()

    def restore(self, number: int, snapshot: Any) -> None:
        """It knows what it did."""
        received, link = snapshot
        self.links[number].load_state_dict(link)
        self.received.pop(number, None)
        if received is not None:
            self.received[number] = received

    def state_dict(self) -> dict[str, Any]:
        """What each knows."""
        return {"received": {number: dict(known) for number, known in self.received.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.received = {number: on_device(known, self.device) for number, known in state["received"].items()}


def _stacked(of_clients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([known[name] for known in of_clients]) for name in of_clients[0]}


class Uplink(ABC):
    """What clients say, and what becomes of it."""

    @abstractmethod
    def begin(self, current: Round) -> None:
        """A round begins; the clients have heard what there is to hear."""

    @abstractmethod
    def part(self, training: Training) -> Any:
        """What can be prepared of packed clients' answers while others are still in training."""

    @abstractmethod
    def say(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """Packed clients answer.

        Args:
            trained: they themselves.
            base: what all clients of their group have in common.
            current: the round, which is told bytes, losses and what encoding took.

        Returns:
            Why the answer of a client is not taken.
        """

    @abstractmethod
    def finish(self, current: Round) -> Mapping[str, Tensor] | None:
        """What the answers come to, where they were not taken in one by one."""


class MessageUplink(Uplink):
    """Every client's own message, made by the strategy of what the client has by itself.

    Args:
        server: the server.
        private: of each group, what never leaves its client.
        links: the clients' ends of the wire.
        epochs: local epochs of a round.
    """

    def __init__(self, server: Server, private: Sequence[Mapping[str, Rows]], links: Links) -> None:
        self.server, self.private, self.links = server, private, links

    def begin(self, current: Round) -> None:
        """Messages of a round have the same length where they hold arrays of the same shapes."""
        self._size_of = Sizes()

    def part(self, training: Training) -> None:
        """Nothing: an end of the wire remembers what it has said, and says it once."""

    def say(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """Each by itself."""
        refused, losses = {}, trained.losses.tolist()
        for slot, shared in enumerate(self._shared(trained, base)):
            number, size = trained.numbers[slot], trained.training.sizes[slot]
            link, stage = self.links[number], "sending"
            collected = {name: values[slot] for name, values in trained.collected.items()}
            result = LocalResult(shared, link.sent_in is None, collected)
            current.report.bytes_up[number] = 0
            try:
                message = answer(link, result, TrainedOn(size, size, losses[slot]), current.index)
                wire = link.encoded(message) if message is not None else None
                current.report.bytes_up[number] = self._size_of(wire) if wire is not None else 0
                stage = "answering"
                current.intake.add_read(number, wire)
            except Exception as error:
                refused[number] = ClientError(f"client {number}, round {current.index + 1}, {stage}: {error}")
                refused[number].__cause__ = error
                continue
            current.count(losses[slot], size, link.codec_error if message is not None else (0.0, 0.0))
        return refused

    def _shared(self, trained: Trained, base: Base) -> Iterator[SharedState]:
        """What of each client's network may be sent."""
        training, strategy = trained.training, self.server.strategy
        if not strategy.shares_parameters:
            yield from [SharedTensors({}, {})] * len(trained.numbers)
            return
        group, private = training.group, self.private[0]
        buffers = SharedState(group.whole, lambda: private).buffers()
        for slot in range(len(trained.numbers)):
            yield SharedTensors(group.unpacked(training.pack, training.weights, slot, base), private, buffers)

    def finish(self, current: Round) -> None:
        """Nothing: every answer has been taken in."""


class MeanUplink(Uplink):
    """The weighted mean of the clients' networks, all of one group. Arguments as of :class:`MessageUplink`."""

    def __init__(self, server: Server, group: ClientGroup, private: Mapping[str, Rows], links: Links) -> None:
        self.server, self.group, self.private, self.links = server, group, private, links

    @staticmethod
    def fits(server: Server) -> bool:
        """Whether the strategy asks for nothing but the mean of whole networks that nothing has been taken from."""
        strategy = server.strategy
        if not isinstance(strategy, FederatedAveraging) or server.codecs.changes_uploads:
            return False
        whole = type(strategy).upload is FederatedAveraging.upload
        return whole and type(strategy.empty(server.state, {0: 1})) in (WeightedMean, MeanOfChangedRows)

    def begin(self, current: Round) -> None:
        """Nobody has answered; what clients count for is the fold's affair."""
        fold = current.intake.fold
        assert isinstance(fold, WeightedMean)
        self._fold, self._answered = fold, 0.0
        self._mean = MeanOfClients(self.group, self.private, isinstance(fold, MeanOfChangedRows))
        # A client's message has the size of all others', whatever it has learned.
        result = LocalResult(SharedState(self.group.whole, lambda: self.private), first=False)
        message = answer(self.links[current.chosen[0]], result, TrainedOn(), current.index)
        assert message is not None
        self._example, self._size_of = self.links[current.chosen[0]].encoded(message), Sizes()

    def _share(self, size: int) -> float:
        return self._fold.weight_of(Message("", 0, 0, {}, TrainedOn(size))) / self._fold.expected

    def part(self, training: Training) -> Any:
        """What they add to the mean."""
        shares = [self._share(size) for size in training.sizes]
        weights = torch.tensor(shares, dtype=torch.float64, device=training.weights.dense.device)
        return self._mean.part(training.pack, training.weights, weights)

    def say(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """All at once."""
        refused = self._too_large(trained, base, current)
        if refused:
            kept = [slot for slot, number in enumerate(trained.numbers) if number not in refused]
            others = trained.select(torch.tensor(kept, dtype=torch.long))
            if kept:
                self.say(others.with_part(self.part(others.training)), base, current)
            return refused
        self._mean.add(trained.part)
        sizes = trained.training.sizes
        self._answered += sum(self._share(size) for size in sizes)
        current.count(float(trained.losses.sum()), sum(sizes))
        sender = len(msgpack.packb(self._example.sender))
        size = self._size_of(self._example) - sender
        for number in trained.numbers:
            current.report.bytes_up[number] = size + len(msgpack.packb(number))
            current.intake.answered[number] = True
            self.server.link.acknowledge(number)
        return {}

    def _too_large(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """The clients whose messages nobody would take, since their numbers are beyond what a message may hold."""
        least = min(map(self._share, trained.training.sizes))
        if self._mean.largest(trained.part) < LARGEST * least / 2:
            return {}
        refused = {}
        for slot, number in enumerate(trained.numbers):
            named = self.group.unpacked(trained.training.pack, trained.training.weights, slot, base)
            result = LocalResult(SharedTensors(named, self.private), first=False)
            message = self.server.strategy.upload(result, number, current.index)
            try:
                check_arrays(message.arrays if message is not None else {})
            except MessageError as error:
                refused[number] = ClientError(f"client {number}, round {current.index + 1}, answering: {error}")
                refused[number].__cause__ = error
        return refused

    def finish(self, current: Round) -> Mapping[str, Tensor] | None:
        """The mean, and the buffers, which clients of the package's own networks do not change."""
        if not current.intake.answered:
            return None
        everybody = len(current.intake.answered) == len(current.chosen)
        buffers = {name: value for name, value in self.server.state.items() if name.startswith(BUFFER)}
        return {**self._mean.state(PARAMETER, 1.0 if everybody else self._answered), **buffers}
