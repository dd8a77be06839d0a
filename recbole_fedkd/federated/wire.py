"""The wire: what becomes of a message between its sender and its reader.

Between them stand stages, in one order at the sender's end and in the other at the reader's: with codecs a network travels as
what changed of it (:class:`Updates`), and any message in fewer bytes (:class:`Encoding`). Up: a client sends its network
minus the one it was given, plus what earlier encodings dropped (error feedback: Seide et al., Interspeech 2014; Karimireddy
et al., ICML 2019). Down: the server knows what its clients hold, since it knows what it has sent; it sends its network minus
that. What is dropped there is not said again, as the server's next network is made of theirs. Before the first round nothing
travels: every party builds the same network from the run's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.federated.codec import CodecStack, WireCodecs
from recbole_fedkd.federated.message import (
    LARGEST,
    SERVER,
    ArraySpec,
    Message,
    MessageError,
    Schema,
    check_kind,
    check_names,
    check_told,
    decoded,
)
from recbole_fedkd.federated.stacked import Stacked
from recbole_fedkd.federated.stage import Stage, Updates, difference, numbered, received_through, stages_of, updated
from recbole_fedkd.federated.strategy import ServerState, Strategy, to_tensors
from recbole_fedkd.finite import check_arrays as check_finite

Arrays = dict[str, NDArray[np.generic]]

UPDATE, NETWORK, VERSION = "update", "network", "version"
"""Kinds of a message, a difference to the version before and a whole one; and the array ``[1]`` that names the version."""


def travels_as_update(strategy: Strategy, codecs: WireCodecs) -> bool:
    """Whether networks travel as what changed of them: where one is shared and stages change something."""
    return strategy.shares_parameters and bool(codecs)


class ClientLink:
    """A client's end of the wire.

    Args:
        number: the client's.
        strategy: says what a message holds.
        codecs: how messages are encoded, the same on both sides.
        feedback: whether what encoding takes from an update is added to the next one.
        network: the state that the server starts from, by the strategy's names.
        follows: another client's end, whose network this one holds: it is kept there. None: its own.

    Attributes:
        stages: from the client to the wire.
        version: of the network that the client holds, where networks travel as updates.
        sent: the latest arrays of every name that the client has sent, as the server saw them; kept where the strategy
            wants to take them off what comes down.
        sent_in: round of the latest message; None: the client has never spoken.
        codec_error: squared norm of what encoding took from the last message, and of the message.
    """

    def __init__(
        self,
        number: int,
        strategy: Strategy,
        codecs: WireCodecs,
        feedback: bool,
        network: ServerState,
        follows: ClientLink | None = None,
    ) -> None:
        self.number, self.strategy, self.codecs, self.follows = number, strategy, codecs, follows
        self.schema = strategy.download_schema(network)
        self.updates: Updates | None = follows.updates if follows is not None else None
        if follows is None and travels_as_update(strategy, codecs):
            self.updates = Updates(_heard(strategy, network))
        built = stages_of(codecs, feedback and self.updates is not None)
        self.stages = [self.updates, *built] if self.updates is not None else built
        self.version = 0
        self.sent: dict[str, Tensor] = {}
        self.sent_in: int | None = None
        self.codec_error = (0.0, 0.0)

    def read(self, payload: bytes) -> Message | None:
        """The server's message; None where it says nothing that the client does not have.

        Raises:
            MessageError: it is not one of this federation's server, or not for the version that the client holds.
        """
        return self.taken(Message.from_bytes(payload))

    def taken(self, message: Message) -> Message | None:
        """As :meth:`read`, of a message that is no bytes any more."""
        if message.sender != SERVER:
            raise MessageError("sender", f"client {message.sender} speaks where the server should")
        if self.updates is None:
            return decoded(message, self.codecs.down, self.schema)
        arrays = dict(message.arrays)
        version = arrays.pop(VERSION, None)
        if version is None or version.shape != (1,) or version.dtype != np.int32:
            raise MessageError("version", "a network came that does not say which version it is")
        number = int(version[0])
        if number == self.version:
            return None
        reference, kind = self.updates.reference, message.kind
        expected = Schema(kind, _specs(reference) if kind == NETWORK else numbered(_specs(reference), reference))
        if kind == UPDATE and number != self.version + 1:
            raise MessageError(
                "version", f"update to version {number} came to a client that holds version {self.version}"
            )
        if kind not in (UPDATE, NETWORK):
            raise MessageError("kind", f"'{kind}' came where a network or an update was due")
        codecs = self.codecs.down if kind == UPDATE else CodecStack()
        arrays = dict(decoded(replace(message, arrays=arrays), codecs, expected).arrays)
        whole = updated(arrays, reference) if kind == UPDATE else arrays
        self.version, self.updates.reference = number, whole
        return replace(message, arrays=whole)

    def encoded(self, message: Message) -> Message:
        """The client's message as it goes over the wire; from now on it counts as sent."""
        wire = message
        for stage in self.stages:
            wire = stage.encode(wire)
        self.codec_error = wire.codec_error
        # What the server will see is what is taken off what it says.
        changed = self.codecs.changes_uploads and self.strategy.remembers_sent
        seen = received_through(self.stages, wire, None) if changed else message
        self.has_sent(to_tensors(seen.arrays) if self.strategy.remembers_sent else {}, message.round)
        return wire

    @staticmethod
    def encoded_by_many(links: Sequence[ClientLink], stacked: Stacked) -> tuple[Stacked, Callable[[], None]] | None:
        """As :meth:`encoded` of several clients' messages at once.

        Args:
            links: the clients'.
            stacked: their messages, which are finite.

        Returns:
            What the server has of them once they are decoded, and what has every link know that they count as sent; None: they
            have to go one by one.
        """
        remember = list[Callable[[], None]]()
        for ends in zip(*(link.stages for link in links), strict=True):
            passed = ends[0].encode_many(ends, stacked)
            if passed is None:
                return None
            stacked = passed.stacked
            remember.append(passed.remember)

        def count_as_sent() -> None:
            for stage in remember:
                stage()
            own: Any = stacked.arrays() if links[0].strategy.remembers_sent else {}
            errors = stacked.codec_error.tolist() if stacked.codec_error is not None else [(0.0, 0.0)] * len(links)
            for slot, (link, error) in enumerate(zip(links, errors, strict=True)):
                link.codec_error = tuple(error)
                link.has_sent(to_tensors({name: array[slot] for name, array in own.items()}), stacked.round)

        return stacked, count_as_sent

    def has_sent(self, tensors: Mapping[str, Tensor], round_index: int) -> None:
        """Remember what the client has sent in a round, as the server saw it."""
        self.sent = {**self.sent, **tensors}
        self.sent_in = round_index

    def heard_with(self, other: ClientLink) -> None:
        """Hold what another client's end does that held the same and has read the same; of the network there is one copy."""
        self.version = other.version
        if self.updates is not None and other.updates is not None:
            self.updates.reference = dict(other.updates.reference)

    @property
    def _own(self) -> list[Stage]:
        """The stages that remember what is its own."""
        return [stage for stage in self.stages if stage is not self.updates or self.follows is None]

    def snapshot(self) -> Any:
        """What it has said and heard, for :meth:`restore`; nothing is copied, and a residual has no more rows than before."""
        return self.version, self.sent, self.sent_in, [stage.snapshot() for stage in self._own]

    def restore(self, snapshot: Any) -> None:
        """It has said and heard what it had at the time of a snapshot."""
        self.version, self.sent, self.sent_in, of_stages = snapshot
        for stage, before in zip(self._own, of_stages, strict=True):
            stage.restore(before)

    def state_dict(self) -> dict[str, Any]:
        """What was last said and dropped, and which version was heard; plain values and tensors only."""
        return {
            "version": self.version,
            "reference": to_tensors(self.updates.reference) if self.updates and not self.follows else {},
            "sent": dict(self.sent),
            "sent_in": self.sent_in,
            "stages": {stage.name: stage.state_dict() for stage in self.stages if stage is not self.updates},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.version, self.sent, self.sent_in = state["version"], dict(state["sent"]), state["sent_in"]
        if self.updates is not None and self.follows is None:
            self.updates.reference = arrays_of(state["reference"])
        for stage in self.stages:
            if stage is not self.updates:
                stage.load_state_dict(state["stages"][stage.name])


@dataclass
class Broadcast:
    """The server's side of updates: what the clients hold, and how each gets to the latest version.

    Attributes:
        replica: the network as every client holds it that has the latest version.
        version: its number; 0 is the network that everybody builds from the seed.
        update: encoded difference from the version before, arrays by number; empty for version 0.
        acknowledged: latest version that each client is known to have taken in, 0 where it is not named.
    """

    replica: Arrays
    version: int = 0
    update: Arrays = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)

    def advance(self, arrays: Mapping[str, NDArray[np.generic]], codecs: CodecStack, round_index: int) -> None:
        """Make the next version, as near to ``arrays`` as the codecs allow."""
        self.update = codecs.encode(numbered(difference(arrays, self.replica), self.replica), round_index)
        self.replica = updated(codecs.decode(self.update), self.replica)
        self.version += 1

    def message(self, behind: int, round_index: int) -> Message | None:
        """What a client lacks that is so many versions behind: the update, after a longer absence the whole network."""
        if not behind:
            return None
        arrays = {**(self.update if behind == 1 else self.replica), VERSION: np.array([self.version], dtype=np.int32)}
        return Message(UPDATE if behind == 1 else NETWORK, round_index, SERVER, arrays)


class ServerLink:
    """The server's end of the wire, the same for all clients.

    Args:
        strategy: says what a message holds.
        codecs: how messages are encoded, the same on both sides.
        network: the state that every client starts from.

    Attributes:
        broadcast: versions of the network, where it travels as updates.
    """

    def __init__(self, strategy: Strategy, codecs: WireCodecs, network: ServerState) -> None:
        self.strategy, self.codecs = strategy, codecs
        updates = travels_as_update(strategy, codecs)
        self.broadcast = Broadcast(_heard(strategy, network)) if updates else None
        self.schema = strategy.upload_schema(network)
        self.stages = stages_of(codecs)
        for stage in self.stages:
            self.schema = stage.taken(self.schema) if self.schema is not None else None
        self._written: dict[tuple[int, int, int], bytes] = {}

    @property
    def reference(self) -> Arrays:
        """The network that clients say what changed of; empty where none travels as an update."""
        return self.broadcast.replica if self.broadcast is not None else {}

    def write(self, message: Message | None) -> bytes:
        """What goes down to one client alone; nothing where there is nothing to say."""
        if message is None:
            return b""
        return replace(message, arrays=self.codecs.down.encode(message.arrays, message.round)).to_bytes()

    def write_once(
        self,
        client: int,
        round_index: int,
        message: Callable[[], Message | None],
        whole: bool = False,
        audience: int = 0,
    ) -> bytes:
        """What goes down to clients alike, but for the version of a network that each holds; made for the first of them.

        Args:
            client: the client; ``SERVER``: all of them at the end of a round, when each holds the version before.
            round_index: the round.
            message: says the strategy's message.
            whole: whether it is for a client of which nobody knows what it holds.
            audience: to whom the strategy says the same.
        """
        behind = 2 if whole else 1
        if self.broadcast is not None and client != SERVER:
            behind = min(self.broadcast.version - self.broadcast.acknowledged.get(client, 0), 2)
        key = behind, audience, round_index
        if key not in self._written:
            if self.broadcast is None:
                self._written[key] = self.write(message())
            else:
                network = self.broadcast.message(behind, round_index)
                self._written[key] = network.to_bytes() if network is not None else b""
        return self._written[key]

    def read(self, client: int, message: Message | None, round_index: int, clients: int = 1) -> Message | None:
        """A client's message as it was before it was encoded; None if it has nothing to say.

        Args:
            client: whom it came from.
            message: as it came over the wire.
            round_index: the round.
            clients: that may answer in it.

        Raises:
            MessageError: it is not what this client may say in this round.
        """
        if not self._is_said(client, message, round_index):
            return None
        assert message is not None and self.schema is not None
        updates = [Updates(self.broadcast.replica)] if self.broadcast is not None else []
        schema = replace(self.schema, largest=LARGEST / clients)
        return received_through([*updates, *self.stages], message, schema)

    def read_many(self, stacked: Stacked, clients: int = 1) -> Stacked | None:
        """As :meth:`read` of several clients' messages made on this side of the wire; None: they have to go one by one.

        Args:
            stacked: as the stages' readers have them.
            clients: that may answer in the round.
        """
        if self.schema is None or stacked.kind != self.schema.kind or not stacked.tells_numbers:
            return None
        bound = LARGEST / clients
        updates = [Updates(self.broadcast.replica)] if self.broadcast is not None else []
        for stage in reversed([*updates, *self.stages]):
            if not stacked.is_within(bound) or (read := stage.decode_many(stacked)) is None:
                return None
            stacked = read
        return stacked if stacked.fits(replace(self.schema, largest=bound)) else None

    def blank(self, client: int, header: Message | None, round_index: int) -> Message | None:
        """A message of zeros of the arrays that a client's message holds, of which it says the names alone.

        Args:
            client: whom the header came from.
            header: what came; see :func:`~recbole_fedkd.federated.message.without_arrays`.
            round_index: the round.

        Raises:
            MessageError: it is not what this client may say in this round.
        """
        if not self._is_said(client, header, round_index):
            return None
        assert header is not None and self.schema is not None
        check_names(header.arrays, self.schema)
        specs = self.schema.arrays
        return replace(header, arrays={name: np.zeros(specs[name].shape, specs[name].dtype) for name in header.arrays})

    def _is_said(self, client: int, message: Message | None, round_index: int) -> bool:
        """Whether a client has said anything; raises :class:`MessageError` where it says what it may not in this round."""
        if message is None:
            if self.schema is not None and not self.schema.may_be_silent:
                raise MessageError("silent", f"it says nothing where '{self.schema.kind}' was due")
            return False
        if message.sender != client:
            raise MessageError("sender", f"it says that it is {_name(message.sender)}")
        if message.round != round_index:
            raise MessageError("round", f"its message is of round {message.round + 1}")
        if self.schema is None:
            raise MessageError("kind", f"it says '{message.kind[:40]}' where nothing was asked for")
        check_kind(message, self.schema)
        check_told(message.training, message.codec_error)
        return True

    def acknowledge(self, client: int) -> None:
        """A client whose answer counts has taken in what it was told."""
        if self.broadcast is not None:
            self.broadcast.acknowledged[client] = self.broadcast.version

    def forget(self, client: int) -> None:
        """What a client holds is not known any more: the next time it is told the whole network."""
        if self.broadcast is not None:
            self.broadcast.acknowledged[client] = self.broadcast.version - 2

    def advance(self, message: Callable[[], Message | None], round_index: int) -> None:
        """After a round: what the strategy says now is the next version."""
        self._written = {}
        if self.broadcast is not None and (network := message()) is not None:
            self.broadcast.advance(network.arrays, self.codecs.down, round_index)
            check_finite(self.broadcast.replica, f"round {round_index + 1}: the server's encoded network")

    def state_dict(self) -> dict[str, Any] | None:
        """What is known of the clients' copies; plain values and tensors only. None where they hold none."""
        if self.broadcast is None:
            return None
        return {
            "replica": to_tensors(self.broadcast.replica),
            "update": to_tensors(self.broadcast.update),
            "version": self.broadcast.version,
            "acknowledged": dict(self.broadcast.acknowledged),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._written = {}
        if state is not None:
            replica, update = arrays_of(state["replica"]), arrays_of(state["update"])
            self.broadcast = Broadcast(replica, state["version"], update, dict(state["acknowledged"]))


def arrays_of(tensors: Mapping[str, Tensor]) -> Arrays:
    """Tensors as arrays of a message; on the processor they share memory."""
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _heard(strategy: Strategy, network: ServerState) -> Arrays:
    """What clients hear of the state that the server begins with; the rest is the server's own."""
    message = strategy.download(network, SERVER, 0)
    return arrays_of({name: value for name, value in network.items() if message is None or name in message.arrays})


def _specs(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, ArraySpec]:
    return {name: ArraySpec(array.shape, array.dtype.type) for name, array in arrays.items()}


def _name(sender: int) -> str:
    return "the server" if sender == SERVER else f"client {sender}"
