"""The server: keeps the strategy's state, speaks and listens in bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.federated.aggregate import Fold
from recbole_fedkd.federated.codec import WireCodecs
from recbole_fedkd.federated.message import LARGEST, SERVER, Message, MessageError, all_taken
from recbole_fedkd.federated.stacked import Stacked
from recbole_fedkd.federated.strategy import ServerState, Strategy, to_tensors
from recbole_fedkd.federated.wire import ServerLink
from recbole_fedkd.finite import check_state
from recbole_fedkd.model.shared import SharedState

_CHOICE = 0x5A3D
"""Parts the seeds of the choice of clients from all other seeds of a run."""


class Release(ABC):
    """What a server lets out of a round, where that is not all that the uploads come to; see ``privacy/release.py``.

    Attributes:
        releases: rounds that something was let out of.
        spends: told the state before that is done, for a server that may be killed then; None: nobody.
    """

    releases: int
    spends: Callable[[dict[str, Any]], None] | None = None

    @abstractmethod
    def choose(self, clients: Sequence[int], round_index: int) -> list[int] | None:
        """Clients that take part in a round, in ascending order."""

    @abstractmethod
    def of_round(
        self,
        fold: Fold,
        statistics: Mapping[str, Tensor] | None,
        answers: int,
        link: ServerLink,
    ) -> Mapping[str, Tensor] | None:
        """What is let out of a round.

        Args:
            fold: that has taken in the uploads.
            statistics: what they come to; None: nobody has said anything.
            answers: how many have.
            link: the server's end of the wire, through which they came.
        """

    @abstractmethod
    def start(self, clients: int, rounds: int) -> int:
        """Before the first round: clients that train, rounds that are to let something out. Returns how many of them may."""

    @property
    @abstractmethod
    def samples(self) -> bool:
        """Whether who takes part is drawn, and secret."""

    @property
    @abstractmethod
    def epsilon(self) -> float:
        """Spent so far."""

    @property
    @abstractmethod
    def is_spent(self) -> bool:
        """Whether the budget has no room for a further release."""

    @property
    @abstractmethod
    def shortened_to(self) -> float | None:
        """Norm that updates of the latest round were shortened to, where it moves from round to round; else None."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with, plain values only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


Ask = Callable[[str, Mapping[int, bytes]], Mapping[int, bytes]]
"""Asks clients for a step, given what each is told in it; who falls silent is missing in what it returns."""


class Hidden(ABC):
    """Uploads of a round of which the server sees the sum alone; see ``privacy/secure_sum.py``.

    Attributes:
        traffic: client to the bytes that it has heard and said for it; nothing before :meth:`into`.
        ask: asks clients elsewhere; None: they are here.
        repeats: how often the protocol may be run again, with new keys, where it was broken off.
        run: what tells the run and its round from all others, which clients elsewhere sign with their keys.
        signers: public keys by which they do; None: nobody looks.
        faults: client to what was wrong with each answer of its that was not taken.
    """

    def __init__(self) -> None:
        self.traffic: dict[int, tuple[int, int]] = {}
        self.ask: Ask | None = None
        self.repeats = 0
        self.run, self.signers = b"", None  # type: bytes, Mapping[int, bytes] | None
        self.faults: dict[int, list[str]] = {}

    @abstractmethod
    def add(self, upload: Message) -> None:
        """Take one client's upload in, on its own side. Raises :class:`MessageError` for one that is not taken."""

    @abstractmethod
    def add_header(self, header: Message, blank: Message) -> None:
        """Know of an upload that stays where it is: what it says of itself, and a message of zeros of the same arrays."""

    @abstractmethod
    def into(self, fold: Fold) -> list[int]:
        """The fold takes in the sum; returns the clients that are in it."""

    @abstractmethod
    def arrays_seen(self) -> Mapping[int, Mapping[str, NDArray[np.generic]]]:
        """What the server has got of every client, once the sum is made, read as if nothing hid it, by array."""


class Server:
    """Holds what the strategy aggregates; it never sees a client, only the bytes that one sent.

    Args:
        strategy: what goes down, what comes up and how it is aggregated.
        seed: the run's seed; decides which clients take part in a round.
        clients_per_round: number of clients that take part in a round; None: all.
        codecs: how messages are encoded, the same on both sides.
        release: what is let out of a round; None: all.
        hides: makes what keeps a round's uploads from the server, of what makes an empty fold and the clients' samples; None:
            it sees every one.
    """

    def __init__(
        self,
        strategy: Strategy,
        seed: int = 0,
        clients_per_round: int | None = None,
        codecs: WireCodecs | None = None,
        release: Release | None = None,
        hides: Callable[[Callable[[], Fold], Mapping[int, int]], Hidden] | None = None,
    ) -> None:
        self.strategy, self.release, self.hides = strategy, release, hides
        self.codecs = codecs or WireCodecs()
        self.seed = seed
        self.clients_per_round = clients_per_round
        self.state: ServerState = {}

    @cached_property
    def link(self) -> ServerLink:
        """The server's end of the wire, of the state that it begins with."""
        return ServerLink(self.strategy, self.codecs, self.state)

    def as_started_from(self, state: ServerState) -> ServerState:
        """A state as the clients of a round have it: codecs downwards may leave their network short of the server's."""
        return {**state, **to_tensors(self.link.reference)}

    def choose(self, clients: Sequence[int], round_index: int) -> list[int]:
        """Numbers of the clients that take part in a round, drawn uniformly, in ascending order."""
        if self.release is not None and (drawn := self.release.choose(clients, round_index)) is not None:
            return drawn
        if self.clients_per_round is None or self.clients_per_round >= len(clients):
            return list(clients)
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, round_index, _CHOICE]))
        chosen: list[int] = generator.choice(np.asarray(clients), self.clients_per_round, replace=False).tolist()
        return sorted(chosen)

    def start(self, shared: SharedState) -> None:
        """Begin with the network that every client builds from the run's seed."""
        self.state = self.strategy.initial_state(shared)
        self.__dict__.pop("link", None)  # of another state

    def send(self, client: int, round_index: int) -> bytes:
        """Message for one client, serialised, once for all to whom the same is said; empty if there is nothing to say."""
        audience = self.strategy.audience(self.state, client)
        if audience is None:
            return self.link.write(self.message_for(client, round_index))
        return self.link.write_once(
            client, round_index, lambda: self.message_for(client, round_index), audience=audience
        )

    def serve(self, round_index: int, whole: bool = False) -> bytes:
        """What every client takes in to serve its users, the same for all, where the strategy shares parameters.

        Args:
            round_index: of the round that begins.
            whole: as of :meth:`ServerLink.write_once`.
        """
        return self.link.write_once(SERVER, round_index, lambda: self.message_for(SERVER, round_index), whole)

    def message_for(self, client: int, round_index: int) -> Message | None:
        """Message for one client, before it is encoded."""
        return self.strategy.download(self.state, client, round_index)

    def intake(self, round_index: int, samples: Mapping[int, int]) -> Intake:
        """What takes in the uploads of a round.

        Args:
            round_index: from 0.
            samples: samples of an epoch of every client that takes part.
        """
        return Intake(self, round_index, samples)

    def state_dict(self) -> dict[str, Any]:
        """The strategy's state, and what is known of the clients' copies; plain values and tensors only."""
        state = {"strategy": dict(self.state), "broadcast": self.link.state_dict()}
        return state | ({"release": self.release.state_dict()} if self.release is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        # Runs that began before versions were called `held` called them `told`.
        self.state = {"held" if name == "told" else name: value for name, value in state["strategy"].items()}
        self.link.load_state_dict(state["broadcast"])
        if self.release is not None:
            self.release.load_state_dict(state["release"])


class Intake:
    """The uploads of one round, checked and folded one by one; the server's state changes when it is finished.

    Args:
        server: whose.
        round_index: from 0.
        samples: samples of an epoch of every client that takes part.
    """

    def __init__(self, server: Server, round_index: int, samples: Mapping[int, int]) -> None:
        self.server, self.round_index, self.samples = server, round_index, samples
        empty = partial(server.strategy.empty, server.as_started_from(server.state), samples)
        self.fold = empty()
        self.hidden = server.hides(empty, samples) if server.hides is not None else None
        self.answered: dict[int, bool] = {}
        self._unmasked = False

    def add(self, client: int, payload: bytes) -> Message | None:
        """Take in what a client has sent.

        Args:
            client: whom the bytes came from.
            payload: the bytes; empty: it has nothing to say.

        Returns:
            The message; its arrays are folded already.

        Raises:
            MessageError: it is not taken, and nothing of it is counted.
        """
        self._check_due(client)
        return self.add_read(client, Message.from_bytes(payload) if payload else None)

    def add_read(self, client: int, message: Message | None) -> Message | None:
        """As :meth:`add`, of a message that is none of bytes any more, or never was."""
        self._check_due(client)
        message = self.server.link.read(client, message, self.round_index, len(self.samples))
        self._check_samples(client, message)
        self.take(client, message)
        self.server.link.acknowledge(client)
        return message

    def add_many(self, kind: str, samples: Mapping[int, int], arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """Take in several clients' messages that were made on this side of the wire, where nothing is wrong with any.

        Args:
            kind: of the messages.
            samples: client to the samples that it speaks for.
            arrays: what they hold, ``[clients, ...]`` by name, in the order of ``samples``.

        Returns:
            Whether they were taken; else none was, and :meth:`add_read` says what is wrong with whom.
        """
        link, schema = self.server.link, self.server.link.schema
        if (
            self.hidden is not None
            or self.server.codecs.changes_uploads
            or link.broadcast is not None
            or schema is None
        ):
            return False
        schema = replace(schema, largest=LARGEST / len(self.samples))
        if not self._are_due(samples) or kind != schema.kind or not all_taken(arrays, schema, len(samples)):
            return False
        if not self.fold.add_many(list(samples), arrays):
            return False
        self.answered.update(dict.fromkeys(samples, True))
        return True

    def add_stacked(self, stacked: Stacked) -> dict[int, Exception] | None:
        """Take in several clients' messages as the stages' readers have them, where nothing is wrong with any.

        Returns:
            Whose the fold has not taken, and why; None: nothing is taken, and :meth:`add_read` says what is wrong with whom.
        """
        own = {client: training.samples for client, training in stacked.training.items()}
        if self.hidden is not None or not self._are_due(own):
            return None
        read = self.server.link.read_many(stacked, len(self.samples))
        if read is None:
            return None
        refused = dict[int, Exception]()
        if not self.fold.add_stacked(read):
            for message in read.messages():
                try:
                    self.fold.add(message)
                except Exception as error:
                    refused[message.sender] = error
        for client in own.keys() - refused.keys():
            self.answered[client] = True
            self.server.link.acknowledge(client)
        return refused

    def _are_due(self, samples: Mapping[int, int]) -> bool:
        return all(client not in self.answered and self.samples.get(client) == of for client, of in samples.items())

    def add_header(self, client: int, payload: bytes) -> None:
        """Know of the upload of a client that keeps it, and adds it under masks.

        Raises:
            MessageError: as :meth:`add`, as far as what it says of itself tells.
        """
        self._check_due(client)
        assert self.hidden is not None
        header = Message.from_bytes(payload) if payload else None
        blank = self.server.link.blank(client, header, self.round_index)
        self._check_samples(client, header)
        if header is not None and blank is not None:
            self.hidden.add_header(header, blank)
        self.answered[client] = header is not None
        self.server.link.acknowledge(client)

    def unmask(self) -> list[int]:
        """Have the fold take in the sum of what is hidden; who is not in it has not answered, and is returned."""
        self._unmasked = True
        speakers = [client for client, spoke in self.answered.items() if spoke]
        if self.hidden is None or not speakers:
            return []
        summed = set(self.hidden.into(self.fold))
        missing = [client for client in speakers if client not in summed]
        for client in missing:
            del self.answered[client]
            self.server.link.forget(client)
        return missing

    def _check_samples(self, client: int, message: Message | None) -> None:
        if message is not None and message.training.samples != self.samples[client]:
            samples, known = message.training.samples, self.samples[client]
            raise MessageError("samples", f"it speaks for {samples} samples where it has {known}")

    def _check_due(self, client: int) -> None:
        if client not in self.samples:
            raise MessageError("sender", f"client {client} does not take part in the round")
        if client in self.answered:
            raise MessageError("doubled", "it has answered in this round already")

    def take(self, client: int, message: Message | None) -> None:
        """Take in the answer of a client, checked or made on this side of the wire; None: it has nothing to say."""
        if message is not None:
            (self.fold if self.hidden is None else self.hidden).add(message)
        self.answered[client] = message is not None

    def finish(self, statistics: Mapping[str, Tensor] | None = None) -> None:
        """Make the server's next state; clients that said nothing change nothing.

        Args:
            statistics: what the uploads come to, where they were not taken in one by one.

        Raises:
            NotFiniteError: what it makes of them is not finite; the state is that of before.
        """
        server, strategy, answers = self.server, self.server.strategy, sum(self.answered.values())
        state = strategy.delivered(server.state, list(self.answered))
        if statistics is None and answers:
            if not self._unmasked:
                self.unmask()
            statistics = self.fold.finish()
            if not server.codecs.up.lossless:
                statistics = strategy.possible(statistics)
        if server.release is not None:
            released = server.release.of_round(self.fold, statistics, answers, server.link)
            statistics = strategy.possible(released) if released is not None else None
        if statistics is not None:
            state = strategy.step(server.as_started_from(state), statistics)
        check_state(state, f"round {self.round_index + 1}")
        server.state = state
        server.link.advance(lambda: server.message_for(SERVER, self.round_index), self.round_index)
