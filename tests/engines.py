"""What tests of engines share: the comparison of two, and a round of a server without any."""

import pytest
import torch

from recbole_fedkd.engine.base import ClientError
from recbole_fedkd.federated.message import Message, MessageError


def refused(server, payloads, index):
    """Have a server take in what clients have sent; why each message that it does not take was left out."""
    samples, faults = {}, {}
    for client, payload in payloads.items():
        try:
            samples[client] = Message.from_bytes(payload).training.samples if payload else 0
        except MessageError as error:
            faults[client] = error
    intake = server.intake(index, samples)
    for client in samples:
        try:
            intake.add(client, payloads[client])
        except MessageError as error:
            faults[client] = error
    intake.finish()
    return faults


def assert_same_round(local, fleet, index, state_of, tolerance=2e-4):
    """One round of each: the same bytes, loss and, as ``state_of(trainer, client)`` tells them, parameters."""
    one, other = local.engine.run_round(index), fleet.engine.run_round(index)
    assert other.bytes_down == one.bytes_down
    assert other.bytes_up == one.bytes_up
    assert other.loss == pytest.approx(one.loss, rel=1e-4)
    for client in range(len(local.engine.clients)):
        expected, found = state_of(local, client), state_of(fleet, client)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            told = f"round {index}, client {client}, {name}: "
            torch.testing.assert_close(
                found[name],
                value.detach(),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, t=told: t + m,
            )


def lose_at_the_end(monkeypatch, engine, number, rounds):
    """Have a client of a local engine train and answer in some rounds, and fail then."""
    run_client = engine._run_client

    def fails(client, told, current):
        if client.number == number and current.index in rounds:
            client.receive(told)
            client.train(current.index)
            client.send(current.index)
            raise ClientError("lost")
        run_client(client, told, current)

    monkeypatch.setattr(engine, "_run_client", fails)
