"""Cost of secure aggregation by itself: seconds of a client and of the server, and bytes, for some clients and numbers."""

import argparse
from time import process_time

import numpy as np

from recbole_fedkd.privacy.identity import new_identities
from recbole_fedkd.privacy.masking import MaskingClient, MaskingServer


def measured(count: int, length: int, lost_share: float) -> dict[str, float]:
    """Processor seconds of the slowest client and of the server, bytes per client; some clients are lost before they send."""
    generator = np.random.default_rng(0)
    server = MaskingServer(length)
    identities = new_identities(range(count))
    clients = {number: MaskingClient(number, identity=identities[number], round_of=b"round") for number in range(count)}
    vectors = generator.integers(-(2**40), 2**40, (count, length))
    lost = set(generator.choice(count, int(count * lost_share), replace=False).tolist())
    spent, up, down = dict.fromkeys(clients, 0.0), dict.fromkeys(clients, 0), dict.fromkeys(clients, 0)
    server_spent = 0.0

    def clients_answer(step, requests):
        answers = {}
        for number, request in requests.items():
            started = process_time()
            answers[number] = step(clients[number], number, request)
            spent[number] += process_time() - started
            up[number] += len(answers[number])
            down[number] += len(request)
        return answers

    def server_answers(step, answers):
        nonlocal server_spent
        started = process_time()
        answered = step(answers)
        server_spent += process_time() - started
        return answered

    requests = server_answers(
        server.keys, clients_answer(lambda client, number, request: client.keys(), dict.fromkeys(clients, b""))
    )
    requests = server_answers(
        server.shares, clients_answer(lambda client, number, request: client.shares(request), requests)
    )
    requests = {number: request for number, request in requests.items() if number not in lost}
    requests = server_answers(
        server.masked, clients_answer(lambda client, number, request: client.masked(request, vectors[number]), requests)
    )
    total = server_answers(
        server.unmasked, clients_answer(lambda client, number, request: client.unmasking(request), requests)
    )
    there = sorted(set(clients) - lost)
    assert np.array_equal(total, vectors[there].sum(0))
    return {
        "client s": max(spent.values()),
        "server s": server_spent,
        "up bytes": max(up.values()),
        "down bytes": max(down.values()),
        "plain bytes (float32)": 4 * length,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--numbers", type=int, default=100_000)
    parser.add_argument("--lost", type=float, default=0.1)
    arguments = parser.parse_args()
    for name, value in measured(arguments.clients, arguments.numbers, arguments.lost).items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()
