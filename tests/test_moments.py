"""Adam in machine code takes the steps that torch's operators take in double precision, which machine code does not take."""

import pytest
import torch
from conftest import needs_numba

from recbole_fedkd.engine.fleet.moments import steps_by_moments
from recbole_fedkd.engine.fleet.optimizers import BatchedAdam, BatchedAdamToSGD

pytestmark = needs_numba
SHAPES = (5, 1031), (5, 33, 3), (5, 1, 1)
"""Of what five networks hold: a number of numbers that no vector register divides, a table, and a single number."""


def taken(optimizer, rates, dtype, steps=40):
    """Parameters, memories and counters after some steps down bowls, of which each network's is as much steeper."""
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    steep = [torch.arange(1, 6).view(-1, *[1] * (len(shape) - 1)) for shape in SHAPES]
    bowls = [torch.rand(shape, generator=generator) * times for shape, times in zip(SHAPES, steep, strict=True)]
    memories = [[torch.zeros_like(own) for own in parameters] for _ in range(optimizer.memories)]
    counters = torch.zeros(5, optimizer.counters, dtype=torch.float64)
    for step in range(steps):
        # In the last steps three networks alone have samples left.
        left = 5 if step < steps - 5 else 3
        own, *known = ([tensor[:left] for tensor in tensors] for tensors in (parameters, *memories))
        gradients = [bowl[:left].to(dtype) * tensor for bowl, tensor in zip(bowls, own, strict=True)]
        # Autograd hands over gradients that do not lie in one piece.
        gradients[1] = gradients[1].transpose(1, 2).contiguous().transpose(1, 2)
        assert steps_by_moments(own[1], gradients[1], known[0][1], known[1][1]) == (dtype == torch.float32)
        optimizer.step(own, gradients, known, counters[:left], rates)
    return [*parameters, *memories[0], *memories[1], counters]


@pytest.mark.parametrize("own_rates", [False, True])
def test_adam_in_machine_code_is_adam(own_rates):
    rates = [torch.linspace(0.0, 0.1, shape[-1]) for shape in SHAPES] if own_rates else None
    ours, exact = (taken(BatchedAdam(0.05), rates, dtype) for dtype in (torch.float32, torch.float64))
    for own, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_networks_go_over_to_sgd_where_they_do_by_torchs_operators():
    optimizer = BatchedAdamToSGD(0.05, "relative", 0.1, 2.0)
    ours, exact = (taken(optimizer, None, dtype) for dtype in (torch.float32, torch.float64))
    switched = exact[-1][:, 3]
    assert bool((switched > 0).any()) and torch.equal(ours[-1][:, 3], switched)
    for own, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5, check_dtype=False)
