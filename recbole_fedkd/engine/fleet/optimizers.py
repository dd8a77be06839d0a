"""Optimisers of many networks at once: each step is that of torch's optimiser, for every network by itself.

Parameters are tensors ``[clients, ...]``. What an optimiser remembers of a parameter has the parameter's shape and starts at
zero; what it remembers of a network is a row of counters ``[clients, counters]`` in double precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from recbole_fedkd.engine.fleet.moments import step_of_many, steps_by_moments
from recbole_fedkd.model.factorization import RowSums
from recbole_fedkd.optim import trusted

Tensors = Sequence[Tensor]


class BatchedOptimizer(ABC):
    """One step for many networks.

    Args:
        rate: learning rate, of parameters that have none of their own.

    Attributes:
        memories: tensors that it remembers per parameter.
        counters: numbers that it remembers per network.
        adds: whether a step adds the gradient times a rate, so that rows without one need not be looked at.
    """

    memories = 0
    counters = 0
    adds = False

    def __init__(self, rate: float) -> None:
        self.rate = rate

    @abstractmethod
    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        memories: Sequence[Tensors],
        counters: Tensor,
        rates: Tensors | None = None,
    ) -> None:
        """Change parameters, memories and counters in place.

        Args:
            parameters: each ``[clients, ...]``.
            gradients: of the same shapes.
            memories: for each memory its tensors, of the same shapes.
            counters: ``[clients, counters]``.
            rates: of each parameter, for every column of its last axis; None: all learn at the optimiser's own.
        """


class BatchedSGD(BatchedOptimizer):
    """``torch.optim.SGD`` without momentum."""

    adds = True

    def step(
        self,
        parameters: Tensors,
        gradients: Sequence[Tensor | RowSums],
        memories: Sequence[Tensors],
        counters: Tensor,
        rates: Tensors | None = None,
    ) -> None:
        """``w - rate * g``."""
        for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if isinstance(gradient, RowSums):
                # Scaled before: a sum with a factor takes three times as long.
                factor = -self.rate if rates is None else -rates[number]
                replace(gradient, values=gradient.values * factor).added_to(parameter)
            elif rates is None:
                parameter.add_(gradient, alpha=-self.rate)
            else:
                parameter.addcmul_(gradient, rates[number], value=-1.0)


class BatchedAdam(BatchedOptimizer):
    """``torch.optim.Adam``. Memories: first and second moment; counter: steps.

    Args:
        rate: learning rate.

    Attributes:
        betas: decays of the moments.
        eps: keeps the denominator from zero.
    """

    memories = 2
    counters = 1
    betas = 0.9, 0.999
    eps = 1e-8

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        memories: Sequence[Tensors],
        counters: Tensor,
        rates: Tensors | None = None,
    ) -> None:
        """Kingma and Ba 2015, algorithm 1."""
        counters[:, 0] += 1
        size, second_scale = self._scales(counters[:, 0])
        for number, (parameter, gradient, first, second) in enumerate(
            zip(parameters, gradients, *memories, strict=True)
        ):
            if steps_by_moments(parameter, gradient, first, second):
                factors = rates[number] / self.rate if rates is not None else None
                tensors = parameter, gradient, first, second
                step_of_many(tensors, factors, (size, second_scale), None, self.betas, self.eps)
                continue
            self._remember(gradient, first, second)
            direction = first / self._denominator(second, second_scale)
            if rates is not None:
                direction *= rates[number] / self.rate
            parameter.addcmul_(direction, _per_client(-size, parameter))

    def _scales(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Step sizes and the factors of ``sqrt(v)``, ``[clients]``, from the numbers of steps ``[clients]``."""
        beta1, beta2 = self.betas
        return self.rate / (1 - beta1**steps), (1 - beta2**steps).rsqrt()

    def _remember(self, gradient: Tensor, first: Tensor, second: Tensor) -> None:
        beta1, beta2 = self.betas
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    def _denominator(self, second: Tensor, scale: Tensor) -> Tensor:
        return second.sqrt().mul_(_per_client(scale, second)).add_(self.eps)


class BatchedAdamToSGD(BatchedAdam):
    """:class:`~recbole_fedkd.optim.AdamToSGD` for many networks, each of which switches by itself.

    Memories: first and second moment, the first being the momentum behind the switch. Counters: iterations, smoothed rate,
    smoothed iterations, iteration of the switch (0: none yet) and SGD's rate.

    Args:
        rate: Adam's learning rate.
        switch_test: ``relative`` or ``published``.
        switch_threshold: ``xi``.
        switch_reach: how many times as long as Adam's step SGD's may be at the switch.
    """

    counters = 5

    def __init__(self, rate: float, switch_test: str, switch_threshold: float, switch_reach: float) -> None:
        super().__init__(rate)
        self.switch_test, self.switch_threshold, self.switch_reach = switch_test, switch_threshold, switch_reach

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        memories: Sequence[Tensors],
        counters: Tensor,
        rates: Tensors | None = None,
    ) -> None:
        """Adam where the switch has not come, SGD with momentum where it has; all parameters learn at one rate."""
        assert rates is None
        counters[:, 0] += 1
        switched = counters[:, 3] > 0
        size, second_scale = self._scales(counters[:, 0])
        size = torch.where(switched, 0.0, size)
        momentum_size = torch.where(switched, (1 - self.betas[0]) * counters[:, 4], 0.0)
        any_switched = bool(switched.any())
        squared, projected = torch.zeros_like(size), torch.zeros_like(size)
        for tensors in zip(parameters, gradients, *memories, strict=True):
            parameter, gradient, first, second = tensors
            if steps_by_moments(*tensors):
                behind = torch.where(switched, momentum_size, -1.0)
                own = step_of_many(tensors, None, (size, second_scale), behind, self.betas, self.eps)
                squared, projected = squared + own[0], projected + own[1]
                continue
            if any_switched:
                behind = _per_client(switched, parameter)
                momentum = torch.where(behind, self.betas[0] * first + gradient, 0.0)
            self._remember(gradient, first, second)
            taken = (first / self._denominator(second, second_scale)).mul_(_per_client(-size, parameter))
            squared += _dots(taken, taken)
            projected += _dots(taken, gradient)
            if any_switched:
                first.copy_(torch.where(behind, momentum, first))
                taken -= _per_client(momentum_size, parameter) * momentum
            parameter.add_(taken)
        now = self._estimate(squared, projected, counters)
        if now.any():
            lengths = sum((second.flatten(1).sum(1) for second in memories[1]), torch.zeros_like(size))
            now &= trusted(counters[:, 4], squared, lengths * second_scale**2, self.switch_reach)
            counters[:, 3] = torch.where(now, counters[:, 0], counters[:, 3])
            counters[:, 4] = torch.where(counters[:, 3] > 0, counters[:, 4], 0.0)
            for memory in memories:
                for tensor in memory:
                    tensor[now] = 0.0

    def _estimate(self, squared: Tensor, projected: Tensor, counters: Tensor) -> Tensor:
        """Bring the estimate of SGD's rate up to date; bool ``[clients]``: whose has settled."""
        beta2 = self.betas[1]
        rate = squared / -projected
        counted = (counters[:, 3] == 0) & (projected != 0) & (rate >= 0)
        counters[:, 1] = torch.where(counted, beta2 * counters[:, 1] + (1 - beta2) * rate, counters[:, 1])
        counters[:, 2] += counted
        corrected = counters[:, 1] / (1 - beta2 ** counters[:, 2])
        scale = corrected if self.switch_test == "relative" else 1.0
        now = counted & (counters[:, 2] > 1) & ((corrected - rate).abs() < self.switch_threshold * scale)
        counters[:, 4] = torch.where(now, corrected, counters[:, 4])
        return now


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of two tensors per network, ``[clients, ...]`` twice to ``[clients]``, without their product in memory."""
    return torch.bmm(one.flatten(1).unsqueeze(1), other.flatten(1).unsqueeze(2)).flatten()


def _per_client(values: Tensor, like: Tensor) -> Tensor:
    """``[clients]`` in shape and precision to multiply ``[clients, ...]``; booleans stay what they are."""
    shaped = values.view(-1, *[1] * (like.dim() - 1))
    return shaped if values.dtype == torch.bool else shaped.to(like.dtype)


def clip_norms(gradients: Tensors, max_norm: float) -> None:
    """Scale each network's gradients in place to an L2 norm of at most ``max_norm``, as torch's ``clip_grad_norm_`` does.

    Args:
        gradients: each ``[clients, ...]``.
        max_norm: of all gradients of a network together.
    """
    squared = sum(gradient.flatten(1).pow(2).sum(1) for gradient in gradients)
    assert isinstance(squared, Tensor)
    factor = (max_norm / (squared.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(_per_client(factor, gradient))
