"""The server: keeps the strategy's state, speaks and listens in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from recbole_fedkd.federated.codec import WireCodecs
from recbole_fedkd.federated.message import SERVER, Message, decoded
from recbole_fedkd.federated.strategy import ServerState, Strategy, travels_as_update
from recbole_fedkd.federated.update import UPDATE, VERSION, Arrays, Broadcast, updated
from recbole_fedkd.finite import check_arrays, check_state
from recbole_fedkd.model.shared import SharedState

_CHOICE = 0x5A3D
"""Parts the seeds of the choice of clients from all other seeds of a run."""


class Server:
    """Holds what the strategy aggregates; it never sees a client, only the bytes that one sent.

    Args:
        strategy: what goes down, what comes up and how it is aggregated.
        seed: the run's seed; decides which clients take part in a round.
        clients_per_round: number of clients that take part in a round; None: all.
        codecs: how messages are encoded, the same on both sides.
    """

    def __init__(
        self,
        strategy: Strategy,
        seed: int = 0,
        clients_per_round: int | None = None,
        codecs: WireCodecs | None = None,
    ) -> None:
        self.strategy = strategy
        self.codecs = codecs or WireCodecs()
        self.seed = seed
        self.clients_per_round = clients_per_round
        self.state: ServerState = {}
        self.broadcast: Broadcast | None = None

    def choose(self, clients: Sequence[int], round_index: int) -> list[int]:
        """Numbers of the clients that take part in a round, drawn uniformly, in ascending order."""
        if self.clients_per_round is None or self.clients_per_round >= len(clients):
            return list(clients)
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, round_index, _CHOICE]))
        chosen: list[int] = generator.choice(np.asarray(clients), self.clients_per_round, replace=False).tolist()
        return sorted(chosen)

    def start(self, shared: SharedState) -> None:
        """Begin with the network that every client builds from the run's seed."""
        self.state = self.strategy.initial_state(shared)
        if travels_as_update(self.strategy, self.codecs):
            self.broadcast = Broadcast(self._network(0))

    def send(self, client: int, round_index: int) -> bytes:
        """Message for one client, serialised; empty if there is nothing to say."""
        if self.broadcast is not None:
            lacking = self.broadcast.for_client(client)
            if lacking is None:
                return b""
            self.broadcast.told[client] = self.broadcast.version
            return Message(lacking[0], round_index, SERVER, lacking[1]).to_bytes()
        message = self.message_for(client, round_index)
        if message is None:
            return b""
        return replace(message, arrays=self.codecs.down.encode(message.arrays, round_index)).to_bytes()

    def message_for(self, client: int, round_index: int) -> Message | None:
        """Message for one client, before it is encoded; from then on the client counts as told."""
        message = self.strategy.download(self.state, client, round_index)
        if message is not None:
            self.state = self.strategy.delivered(self.state, client)
        return message

    def serve(self, round_index: int) -> bytes:
        """What every client takes in to serve its users, the same for all, where the strategy shares parameters."""
        if self.broadcast is not None:
            arrays = {**self.broadcast.update, VERSION: np.array([self.broadcast.version], dtype=np.int32)}
            return Message(UPDATE, round_index, SERVER, arrays).to_bytes()
        message = self.strategy.download(self.state, SERVER, round_index)
        return b"" if message is None else message.to_bytes()

    def aggregate(self, payloads: list[bytes], round_index: int) -> None:
        """Take in the uploads of a round; empty ones are clients without a word.

        Raises:
            NotFiniteError: an upload, or what the server makes of all, is not finite; the state is that of before.
        """
        messages = [decoded(Message.from_bytes(payload), self.codecs.up) for payload in payloads if payload]
        if self.broadcast is not None:
            replica = self.broadcast.replica
            messages = [replace(each, arrays=updated(each.arrays, replica)) for each in messages]
        for message in messages:
            check_arrays(message.arrays, f"client {message.sender}, round {round_index + 1}: its message")
        state = self.strategy.aggregate(self.state, messages)
        check_state(state, f"round {round_index + 1}")
        self.state = state
        if self.broadcast is not None:
            self.broadcast.advance(self._network(round_index), self.codecs.down, round_index)
            check_arrays(self.broadcast.replica, f"round {round_index + 1}: the server's encoded network")

    def state_dict(self) -> dict[str, Any]:
        """The strategy's state, and what is known of the clients' copies; plain values and tensors only."""
        state: dict[str, Any] = {"strategy": dict(self.state), "broadcast": None}
        if self.broadcast is not None:
            state["broadcast"] = {
                "replica": {name: torch.tensor(array) for name, array in self.broadcast.replica.items()},
                "update": {name: torch.tensor(array) for name, array in self.broadcast.update.items()},
                "version": self.broadcast.version,
                "told": dict(self.broadcast.told),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.state = dict(state["strategy"])
        if state["broadcast"] is not None:
            told = state["broadcast"]
            replica = {name: tensor.numpy() for name, tensor in told["replica"].items()}
            update = {name: tensor.numpy() for name, tensor in told["update"].items()}
            self.broadcast = Broadcast(replica, told["version"], update, dict(told["told"]))

    def _network(self, round_index: int) -> Arrays:
        message = self.strategy.download(self.state, SERVER, round_index)
        assert message is not None
        return dict(message.arrays)
