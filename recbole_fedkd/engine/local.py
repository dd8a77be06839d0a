"""The ``local`` engine: every client in turn, in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recbole_fedkd.errors import TrainingError
from recbole_fedkd.federated.client import Client
from recbole_fedkd.federated.server import Server


@dataclass
class RoundReport:
    """What one communication round cost.

    Attributes:
        loss: mean training loss over all samples of the last local epoch.
        bytes_down: client to bytes received from the server.
        bytes_up: client to bytes sent to the server.
        codec_error: what encoding took from the uploads, as a share of their L2 norm; 0 without codecs.
    """

    loss: float
    bytes_down: dict[int, int] = field(default_factory=dict)
    bytes_up: dict[int, int] = field(default_factory=dict)
    codec_error: float = 0.0

    @property
    def total_bytes(self) -> int:
        """Bytes of the round in both directions."""
        return sum(self.bytes_down.values()) + sum(self.bytes_up.values())


class ClientError(TrainingError):
    """An error inside a client, with the client, the round and the stage it happened in."""


class LocalEngine:
    """Runs the rounds of a federation in one process.

    Args:
        server: the server.
        clients: all clients; those without a training sample train in no round, but are served.
    """

    name = "local"

    def __init__(self, server: Server, clients: list[Client]) -> None:
        self.server = server
        self.clients = clients

    @property
    def samples(self) -> dict[int, int]:
        """Samples of an epoch of every client that has any, by its number."""
        return {client.number: len(client.task) for client in self.clients if len(client.task)}

    def run_round(
        self,
        round_index: int,
        on_step: Callable[[int], None] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> RoundReport:
        """One communication round.

        1. The server chooses the clients of the round and sends each its message.
        2. Each trains on its own samples.
        3. Each sends its message.
        4. The server aggregates what arrived.
        5. Where users are served by what the server holds, every client takes it in. Its bytes are not counted: a
           client that takes part in the next round gets the same message then.
        6. Where a moving average of a client's networks serves, it takes in the latest.

        Args:
            round_index: from 0.
            on_step: told the number of samples after each training step.
            on_bytes: told the number of bytes after each message.

        Raises:
            ClientError: an error inside a client, naming client, round and stage.
        """
        report = RoundReport(0.0)
        loss, samples = 0.0, 0
        lost, whole = 0.0, 0.0
        uploads = []
        by_number = {client.number: client for client in self.clients}
        for number in self.server.choose(list(self.samples), round_index):
            client = by_number[number]
            stage = "receiving"
            try:
                payload = self.server.send(client.number, round_index)
                client.receive(payload)
                stage = "training"
                trained = client.train(round_index, on_step)
                stage = "sending"
                upload = client.send(round_index)
            except Exception as error:
                raise ClientError(f"client {client.number}, round {round_index + 1}, {stage}: {error}") from error
            loss += trained.loss
            samples += trained.samples
            report.bytes_down[client.number] = len(payload)
            report.bytes_up[client.number] = len(upload)
            lost, whole = lost + client.codec_error[0], whole + client.codec_error[1]
            uploads.append(upload)
            if on_bytes is not None:
                on_bytes(len(payload) + len(upload))
        self.server.aggregate(uploads, round_index)
        if self.server.strategy.serves_aggregate:
            payload = self.server.serve(round_index + 1)
            for client in self.clients:
                client.receive(payload)
        for client in self.clients:
            client.serve()
        report.loss = loss / samples
        report.codec_error = (lost / whole) ** 0.5 if whole else 0.0
        return report

    def state_dict(self) -> dict[str, Any]:
        """Server state and every client's, plain values and tensors only."""
        return {
            "server": self.server.state_dict(),
            "clients": {client.number: client.state_dict() for client in self.clients},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.server.load_state_dict(state["server"])
        for client in self.clients:
            client.load_state_dict(state["clients"][client.number])
