"""AdamToSGD: Adam before the switch, SGD after it, and a switch that comes when it should."""

import copy
import logging
import pickle

import pytest
import torch

from recbole_fedkd.engine.fleet.optimizers import BatchedAdamToSGD
from recbole_fedkd.optim import AdamToSGD


def problem(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    inputs, targets = torch.randn(64, 4), torch.randn(64, 2)
    return model, lambda network: (network(inputs) - targets).pow(2).mean()


def step(model, optimizer, loss):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_before_the_switch_it_is_adam(weight_decay):
    model, loss = problem()
    reference = copy.deepcopy(model)
    ours = AdamToSGD(model.parameters(), lr=0.01, weight_decay=weight_decay, switch_threshold=1e-30)
    adam = torch.optim.Adam(reference.parameters(), lr=0.01, weight_decay=weight_decay)
    for _ in range(30):
        step(model, ours, loss)
        step(reference, adam, loss)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert ours.switched_at is None


def test_a_parameter_without_a_gradient_stands_still_and_takes_its_own_steps_later():
    model, loss = problem()
    reference = copy.deepcopy(model)
    ours = AdamToSGD(model.parameters(), lr=0.01, switch_threshold=1e-30)
    adam = torch.optim.Adam(reference.parameters(), lr=0.01)
    for turn in range(6):
        for network, optimizer in ((model, ours), (reference, adam)):
            optimizer.zero_grad()
            loss(network).backward()
            if turn in (0, 3):
                network[2].weight.grad = None
            optimizer.step()
    assert [ours.state[parameter]["step"] for parameter in model.parameters()] == [6, 6, 4, 6]
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_what_is_saved_of_a_parameter_holds_no_more_than_its_own_moments():
    model, loss = problem()
    optimizer = AdamToSGD(model.parameters(), lr=0.01)
    step(model, optimizer, loss)
    for parameter, kept in zip(model.parameters(), optimizer.state_dict()["state"].values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert kept[name].untyped_storage().nbytes() == 4 * parameter.numel()


@pytest.mark.parametrize("threshold", [1e-30, 1e9])
def test_one_that_was_pickled_goes_on_as_it_would_have_and_takes_no_more_than_its_own_moments(threshold):
    model, loss = problem()
    optimizer = AdamToSGD(model.parameters(), lr=0.01, switch_threshold=threshold, switch_reach=float("inf"))
    for _ in range(4):
        step(model, optimizer, loss)
    again, pickled_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    assert (optimizer.switched_at is None) == (threshold < 1)
    kept = [value for own in pickled_optimizer.state.values() for value in own.values() if torch.is_tensor(value)]
    assert kept and all(value.untyped_storage().nbytes() == 4 * value.numel() for value in kept)
    for _ in range(3):
        step(model, optimizer, loss)
        step(again, pickled_optimizer, loss)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert pickled_optimizer.state_dict()["switch"] == optimizer.state_dict()["switch"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_after_the_switch_it_is_sgd_with_momentum_at_the_found_rate(weight_decay):
    model, loss = problem()
    ours = AdamToSGD(model.parameters(), lr=0.01, weight_decay=weight_decay, switch_threshold=1e9)
    for _ in range(3):
        step(model, ours, loss)
    assert ours.switched_at == 2  # k > 1, then the huge threshold holds
    reference = copy.deepcopy(model)
    # One step has been taken by SGD: its momentum is the gradient of that step, so SGD is replayed from there.
    momentum = [ours.state[parameter]["momentum"].clone() for parameter in model.parameters()]
    sgd = torch.optim.SGD(
        reference.parameters(), lr=(1 - 0.9) * ours.sgd_learning_rate, momentum=0.9, weight_decay=weight_decay
    )
    for parameter, buffer in zip(reference.parameters(), momentum, strict=True):
        sgd.state[parameter]["momentum_buffer"] = buffer
    for _ in range(20):
        step(model, ours, loss)
        step(reference, sgd, loss)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_first_estimate_equals_the_projection_by_hand():
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = AdamToSGD([weight], lr=0.1, switch_threshold=1e-30)
    before = weight.detach().clone()
    (weight.pow(2) * torch.tensor([1.0, 3.0])).sum().backward()
    gradient = weight.grad.clone()
    optimizer.step()
    taken = weight.detach() - before
    rate = float(taken.dot(taken) / -taken.dot(gradient))
    assert optimizer.smoothed == pytest.approx((1 - 0.999) * rate, rel=1e-4)
    assert optimizer.smoothed_count == 1


@pytest.mark.parametrize("test", ["relative", "published"])
def test_it_switches_on_a_quadratic_and_converges(test, caplog):
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    curvature = torch.tensor([1.0, 0.5])
    threshold = {"relative": 0.05, "published": 1e-3}[test]
    optimizer = AdamToSGD([weight], lr=0.05, switch_test=test, switch_threshold=threshold, name="client 3")
    with caplog.at_level(logging.INFO):
        for _ in range(3000):
            optimizer.zero_grad()
            (0.5 * curvature * weight.pow(2)).sum().backward()
            optimizer.step()
    assert optimizer.switched_at is not None and optimizer.sgd_learning_rate > 0
    assert f"client 3: switched from Adam to SGD after iteration {optimizer.switched_at}" in caplog.text
    assert weight.abs().max() < 1e-3


def test_the_relative_test_does_not_depend_on_the_scale_of_the_loss():
    def switched_at(scale: float) -> int | None:
        weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = AdamToSGD([weight], lr=0.05, eps=0.0, switch_threshold=0.02)
        for _ in range(500):
            optimizer.zero_grad()
            (scale * 0.5 * weight.pow(2) * torch.tensor([1.0, 0.5])).sum().backward()
            optimizer.step()
        return optimizer.switched_at

    assert switched_at(1.0) is not None
    assert switched_at(1.0) == switched_at(1024.0)


VALLEYS = torch.tensor([[1e4, *[1.0] * 9], [1.0] * 10])
"""Curvatures of two quadratics: Adam holds the steep direction of the first back, SGD does not."""

IN_THEM = torch.tensor([1e-3, *[1.0] * 9])


def down_a_valley(reach: float, curvature: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    weight = torch.nn.Parameter(IN_THEM.clone())
    optimizer = AdamToSGD([weight], lr=0.02, switch_threshold=0.1, switch_reach=reach)
    for _ in range(300):
        weight.grad = curvature * weight.detach()
        optimizer.step()
    return weight.detach(), optimizer.switched_at


def test_a_rate_at_which_training_would_diverge_is_not_switched_to():
    left, switched = down_a_valley(float("inf"), VALLEYS[0])
    assert switched is not None and not left.abs().max() < 1e3
    left, switched = down_a_valley(2.0, VALLEYS[0])
    assert switched is None and left.abs().max() < 0.1


def test_a_switch_that_steps_as_far_as_adam_is_the_same_with_and_without_the_bound():
    bounded, unbounded = (down_a_valley(reach, VALLEYS[1]) for reach in (2.0, float("inf")))
    assert bounded[1] == unbounded[1] is not None and torch.equal(bounded[0], unbounded[0])


def test_of_many_networks_those_switch_that_would_alone():
    together = IN_THEM.repeat(2, 1)
    batched = BatchedAdamToSGD(0.02, "relative", 0.1, 2.0)
    memories = [[torch.zeros_like(together)] for _ in range(batched.memories)]
    counters = torch.zeros(2, batched.counters, dtype=torch.float64)
    for _ in range(300):
        batched.step([together], [VALLEYS * together], memories, counters)
    for number, curvature in enumerate(VALLEYS):
        alone, switched = down_a_valley(2.0, curvature)
        torch.testing.assert_close(together[number], alone, rtol=1e-4, atol=1e-6)
        assert int(counters[number, 3]) == (switched or 0)


@pytest.mark.parametrize("threshold", [1e-30, 1e9])
def test_state_dict_continues_bit_for_bit_in_either_phase(threshold):
    model, loss = problem()
    optimizer = AdamToSGD(model.parameters(), lr=0.01, switch_threshold=threshold)
    for _ in range(5):
        step(model, optimizer, loss)
    twin = copy.deepcopy(model)
    restored = AdamToSGD(twin.parameters(), lr=0.01, switch_threshold=threshold)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (restored.switched_at, restored.sgd_learning_rate) == (optimizer.switched_at, optimizer.sgd_learning_rate)
    for _ in range(5):
        step(model, optimizer, loss)
        step(twin, restored, loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1}, {"betas": (1.0, 0.9)}, {"switch_test": "sometimes"}, {"switch_threshold": 0.0}, {"switch_reach": 0.0}],
)
def test_a_bad_argument_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdamToSGD([torch.nn.Parameter(torch.zeros(1))], **bad)
