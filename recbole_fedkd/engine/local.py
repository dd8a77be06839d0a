"""The ``local`` engine: every client in turn, in this process."""

from __future__ import annotations

from typing import Any

from recbole_fedkd.engine.base import FAILURES, ClientError, Engine, Round, serving
from recbole_fedkd.federated.client import Client
from recbole_fedkd.federated.server import Server


class LocalEngine(Engine):
    """Runs the rounds of a federation in one process, one client after the other.

    Args:
        server: the server.
        clients: all clients; those without a training sample train in no round, but are served.
        min_clients: as of :class:`Engine`.
    """

    name = "local"

    def __init__(self, server: Server, clients: list[Client], min_clients: int | None = None) -> None:
        super().__init__(server, min_clients)
        self.clients = clients

    @property
    def sizes(self) -> dict[int, int]:
        """Samples of an epoch of every client, by its number."""
        return {client.number: len(client.task) for client in self.clients}

    def _run_clients(self, current: Round) -> None:
        by_number = {client.number: client for client in self.clients}
        for number in current.chosen:
            before = by_number[number].snapshot() if self.min_clients is not None else None
            payload = self.server.send(number, current.index)
            current.report.bytes_down[number], current.report.bytes_up[number] = len(payload), 0
            try:
                self._run_client(by_number[number], payload, current)
            except ClientError as error:
                self._leave_out(current, number, error)
                if before is not None:
                    by_number[number].restore(before)

    def _run_client(self, client: Client, payload: bytes, current: Round) -> None:
        """One client's part of a round. Raises :class:`ClientError`, of which the cause is what happened."""
        stage = "receiving"
        try:
            client.receive(payload)
            stage = "training"
            training = client.train(current.index, current.on_step)
            stage = "sending"
            answer = client.send(current.index)
            current.report.bytes_up[client.number] = len(answer)
            stage = "answering"
            current.intake.add(client.number, answer)
        except FAILURES as error:
            raise ClientError.of(f"client {client.number}", current.index, stage, error) from error
        finally:
            if current.on_bytes is not None:
                current.on_bytes(len(payload) + current.report.bytes_up[client.number])
        current.count(training.loss, training.seen, client.link.codec_error if answer else (0.0, 0.0))

    def _serve(self, round_index: int) -> None:
        if self.server.strategy.serves_aggregate:
            payload = self.server.serve(round_index + 1)
            for client in self.clients:
                with serving(f"client {client.number}", round_index):
                    client.receive(payload)
        for client in self.clients:
            client.serve()

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
