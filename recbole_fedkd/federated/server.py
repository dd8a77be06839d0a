"""The server: keeps the strategy's state, speaks and listens in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from recbole_fedkd.federated.codec import CodecStack
from recbole_fedkd.federated.message import Message, decoded
from recbole_fedkd.federated.strategy import ServerState, Strategy

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
        codecs: CodecStack | None = None,
    ) -> None:
        self.strategy = strategy
        self.codecs = codecs or CodecStack()
        self.seed = seed
        self.clients_per_round = clients_per_round
        self.state: ServerState = {}

    def choose(self, clients: Sequence[int], round_index: int) -> list[int]:
        """Numbers of the clients that take part in a round, drawn uniformly, in ascending order."""
        if self.clients_per_round is None or self.clients_per_round >= len(clients):
            return list(clients)
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, round_index, _CHOICE]))
        chosen: list[int] = generator.choice(np.asarray(clients), self.clients_per_round, replace=False).tolist()
        return sorted(chosen)

    def send(self, client: int, round_index: int) -> bytes:
        """Message for one client, serialised; empty if there is nothing to say."""
        message = self.strategy.download(self.state, client, round_index)
        if message is None:
            return b""
        self.state = self.strategy.delivered(self.state, client)
        return replace(message, arrays=self.codecs.encode(message.arrays)).to_bytes()

    def aggregate(self, payloads: list[bytes]) -> None:
        """Take in the uploads of a round; empty ones are clients without a word."""
        messages = [decoded(Message.from_bytes(payload), self.codecs) for payload in payloads if payload]
        self.state = self.strategy.aggregate(self.state, messages)
