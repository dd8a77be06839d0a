"""The comparison of two engines that the tests of the fleet share."""

import pytest
import torch


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
