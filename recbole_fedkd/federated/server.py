"""The server: keeps the strategy's state, speaks and listens in bytes."""

from __future__ import annotations

from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.strategy import ServerState, Strategy


class Server:
    """Holds what the strategy aggregates; it never sees a client, only the bytes that one sent.

    Args:
        strategy: what goes down, what comes up and how it is aggregated.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.state: ServerState = {}

    def send(self, client: int, round_index: int) -> bytes:
        """Message for one client, serialised; empty if there is nothing to say."""
        message = self.strategy.download(self.state, client, round_index)
        return message.to_bytes() if message is not None else b""

    def aggregate(self, payloads: list[bytes]) -> None:
        """Take in the uploads of a round; empty ones are clients without a word."""
        messages = [Message.from_bytes(payload) for payload in payloads if payload]
        self.state = self.strategy.aggregate(self.state, messages)
