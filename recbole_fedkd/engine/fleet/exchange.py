"""What packed clients hear: by the strategy's own code and each client's end of the wire, as on the ``local`` engine.

Where all start from one network (:class:`CommonDownlink`) it is kept once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor

from recbole_fedkd.engine.base import FAILURES
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.heard import Heard
from recbole_fedkd.federated.dialogue import heard_alike, on_device, understood, understood_by_many
from recbole_fedkd.federated.message import SERVER, Message
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.strategy import to_tensors
from recbole_fedkd.federated.wire import ClientLink

TOGETHER = 64
"""Clients of which what they make of a message is computed at a time."""


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
        return self.by_sender(message, [message.sender])[message.sender]

    def by_sender(self, message: Message, senders: Iterable[int]) -> dict[int, int]:
        """Length of the bytes of messages of its signature, by sender."""
        arrays = tuple((name, array.dtype, array.shape) for name, array in message.arrays.items())
        signature = message.kind, message.round, message.sender == SERVER, arrays, any(message.codec_error)
        if signature not in self._without_sender:
            self._without_sender[signature] = len(message.to_bytes()) - len(msgpack.packb(message.sender))
        return {sender: self._without_sender[signature] + len(msgpack.packb(sender)) for sender in senders}


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
        self._failed: dict[int, BaseException] = {}

    def hear(self, chosen: Sequence[int], round_index: int) -> tuple[dict[int, int], dict[int, BaseException]]:
        """The clients of a round take in what the server says.

        Returns:
            Bytes by client, and what went wrong in those that could not take it in.
        """
        self._failed = {}
        return self._hear(chosen, round_index), self._failed

    @abstractmethod
    def _hear(self, chosen: Sequence[int], round_index: int) -> dict[int, int]:
        """As :meth:`hear`, where those that fail stand in ``_failed``."""

    @abstractmethod
    def alike(self, number: int) -> Hashable:
        """What clients that are packed together have in common."""

    @abstractmethod
    def heard(self, group_index: int, numbers: Sequence[int]) -> Heard:
        """What packed clients have been told."""

    @abstractmethod
    def serve(self, round_index: int) -> list[int]:
        """Every client takes in what it serves its users by; those that each put it into a network of their own."""

    def snapshot(self, number: int) -> Any:
        """What a client has said, and heard by itself, for :meth:`restore`."""
        return self.links[number].snapshot()

    def restore(self, number: int, snapshot: Any) -> None:
        """The client has said what it had at the time of a snapshot, and heard what it had by itself."""
        self.links[number].restore(snapshot)

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
        updates = self.link.updates
        self._take(to_tensors(updates.reference) if updates is not None else {}, installs=False)

    def _take(self, received: dict[str, Tensor], installs: bool = True) -> None:
        self.received = received
        installed = self.server.strategy.installed(received)
        learns = self.server.strategy.learns(received)
        self.common = Heard(received, tables=self._tables(received, installed), learns=learns)
        with torch.no_grad():
            for group in self.groups if installs else ():
                state = group.whole.state_dict(keep_vars=True)
                for name, value in installed.items():
                    state[name].copy_(value)

    def _read(self, payload: bytes) -> None:
        message = self.link.read(payload) if payload else None
        if message is not None:
            self._take(understood(self.link, self.received, message, self.device))

    def _hear(self, chosen: Sequence[int], round_index: int) -> dict[int, int]:
        """One message; who has been away gets a longer one that says the same."""
        if self.server.link.broadcast is None and chosen:  # nobody's depends on what it holds
            sizes = dict.fromkeys(chosen, len(self.server.send(chosen[0], round_index)))
        else:
            sizes = {number: len(self.server.send(number, round_index)) for number in chosen}
        payload = self.server.serve(round_index)
        try:
            self._read(payload)
        except FAILURES as error:  # what one cannot take in, nobody can
            self._failed = dict.fromkeys(chosen, error)
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

    def state_dict(self) -> dict[str, Any]:
        """The latest message."""
        return {"received": dict(self.received), "link": self.link.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.link.load_state_dict(state["link"])
        self._take(on_device(state["received"], self.device), installs=False)


class _Readings:
    """What clients read of what is said to several: bytes that come to one version of a network are decoded once."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int], tuple[ClientLink, Message | None]] = {}

    def read(self, link: ClientLink, payload: bytes) -> Message | None:
        """As :meth:`ClientLink.read`; None where there is nothing to read."""
        if not payload:
            return None
        key = payload, link.version
        if key not in self._known:
            self._known[key] = link, link.read(payload)
        first, message = self._known[key]
        if link is not first:
            link.heard_with(first)
        return message


class OwnDownlink(Downlink):
    """The server says something else to every client. Arguments as of the base."""

    def __init__(self, server: Server, groups: Sequence[ClientGroup], links: Links, device: torch.device) -> None:
        super().__init__(server, groups, links, device)
        self.received: dict[int, dict[str, Tensor]] = {}
        # Before anything has come down, what travels as an update is known as everybody begins with it.
        self._begun = on_device(to_tensors(server.link.reference), device)
        self._fresh: set[int] = set()

    def _known(self, number: int) -> dict[str, Tensor]:
        """What a client knows."""
        return self.received.get(number, self._begun)

    def _read(self, messages: Mapping[int, Message | None]) -> None:
        """What clients make of what each of them has heard."""
        strategy, alike = self.server.strategy, dict[Hashable, list[int]]()
        self._fresh = set()
        for number, message in messages.items():
            if message is not None:
                link = self.links[number]
                joined = strategy.elementwise or not (link.sent or strategy.accumulates)
                alike.setdefault(heard_alike(link, message) if joined else number, []).append(number)
        for together in alike.values():
            # Of several that are not taken elementwise none has anything of its own that goes into it: it is kept once.
            at_a_time = TOGETHER if strategy.elementwise else len(together)
            for begin in range(0, len(together), at_a_time):
                self._understand(together[begin : begin + at_a_time], messages)

    def _understand(self, numbers: Sequence[int], messages: Mapping[int, Message | None]) -> None:
        """What clients that are alike make of it; who of them fails is found by asking one after the other."""
        message, links = messages[numbers[0]], [self.links[number] for number in numbers]
        before = [self._known(number) for number in numbers]
        assert message is not None
        try:
            if self.server.strategy.elementwise:
                known = understood_by_many(links, before, message, self.device)
            else:
                known = [understood(links[0], before[0], message, self.device)] * len(numbers)
        except FAILURES as error:
            if len(numbers) == 1:
                self._failed[numbers[0]] = error
                return
            for number in numbers:
                self._understand([number], messages)
            return
        self.received.update(zip(numbers, known, strict=True))
        self._fresh.update(numbers)

    def _hear(self, chosen: Sequence[int], round_index: int) -> dict[int, int]:
        """To each its own; what is said to several is read once by those that hold one version of a network."""
        server, sizes, size_of, readings = self.server, {}, Sizes(), _Readings()
        messages: dict[int, Message | None] = {}
        for number in chosen:
            audience, link = server.strategy.audience(server.state, number), self.links[number]
            payload, said = b"", None
            if audience is None and not server.codecs:
                said = server.message_for(number, round_index)
                sizes[number] = size_of(said) if said is not None else 0
            else:
                payload = server.send(number, round_index)
                sizes[number] = len(payload)
            try:
                if audience is not None:
                    messages[number] = readings.read(link, payload)
                else:
                    messages[number] = link.read(payload) if payload else link.taken(said) if said is not None else None
            except FAILURES as error:
                self._failed[number] = error
        self._read(messages)
        return sizes

    def alike(self, number: int) -> Hashable:
        """Whether it has heard anything new, and what it knows."""
        received = self._known(number)
        known = tuple((name, value.shape) for name, value in received.items())
        return number in self._fresh, self.server.strategy.learns(received), known

    def heard(self, group_index: int, numbers: Sequence[int]) -> Heard:
        """What each knows; only what is new is put into its network."""
        group, strategy = self.groups[group_index], self.server.strategy
        received = [self._known(number) for number in numbers]
        installed = [strategy.installed(known) for known in received] if numbers[0] in self._fresh else [{}]
        return Heard(
            own=_stacked(received),
            tables=self._tables(received[0], strategy.installed(received[0])),
            installed=_stacked(installed),
            whole_tables=bool(installed[0].keys() & set(group.item_names)),
            learns=strategy.learns(received[0]),
        )

    def serve(self, round_index: int) -> list[int]:
        """All of them."""
        payload, readings = self.server.serve(round_index), _Readings()
        everybody = sorted(number for group in self.groups for number in group.numbers.tolist())
        self._read({number: readings.read(self.links[number], payload) for number in everybody})
        for error in self._failed.values():
            raise error
        return sorted(self._fresh)

    def snapshot(self, number: int) -> Any:
        """What it knows and has said."""
        return self.received.get(number), super().snapshot(number)

    def restore(self, number: int, snapshot: Any) -> None:
        """It knows what it did."""
        received, said = snapshot
        super().restore(number, said)
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
    first, *others = of_clients
    if all(known is first for known in others):
        return {name: value.expand(len(of_clients), *value.shape) for name, value in first.items()}
    return {name: torch.stack([known[name] for known in of_clients]) for name in first}
