"""A client that comes when training is over: what it is told, and what it makes of that by its own samples.

Nothing goes up. What comes down is what the server would say to any client that has missed everything. Where that is a network,
it stays as it is, and the client fits what never leaves it (user rows, ``private_parameters``, a teacher of its own); where it
is knowledge, the client trains its whole network, taught as the others were; where it is nothing, it trains alone.
"""

from __future__ import annotations

from collections.abc import Callable

from recbole_fedkd.federated.client import Client
from recbole_fedkd.federated.server import Server


def settle(client: Client, server: Server, rounds: int) -> int:
    """Have a new client take in what the server knows, and train for as many rounds as the others did.

    Args:
        client: it has said and heard nothing yet.
        server: as it is when training is over; it does not change.
        rounds: of the training, those before there was anything to train by included.

    Returns:
        Bytes that it was told.
    """
    strategy, shared = server.strategy, client.task.shared
    payload = server.send(client.number, rounds)
    client.receive(payload)
    fits = not strategy.serves_aggregate or bool(shared.private)
    learned = rounds - strategy.exchange_rounds
    keep: Callable[[int], None] | None = None
    if strategy.shares_parameters:

        def keep(_size: int) -> None:
            shared.install(strategy.installed(client.received))

    for number in range(1, 1 + (learned if fits and len(client.task) else 0)):
        if keep is not None:
            keep(0)
        # A network that every client takes over after a round is the server's after every step, too.
        client.train(number, keep if strategy.serves_aggregate else None)
        client.serve()
    return len(payload)
