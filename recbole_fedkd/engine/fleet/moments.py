"""Adam of many networks in machine code: one pass through memory in place of a dozen."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.model.compiled import Table, compiled, has_compiler

Numbers = NDArray[np.float64]


def steps_by_moments(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether :func:`step_of_many` can be asked about these tensors: single precision, on the processor, in one piece."""
    tensors = parameter, gradient, first, second
    fit = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return fit and has_compiler() and all(tensor.is_contiguous() for tensor in (parameter, first, second))


def step_of_many(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    factors: Tensor | None,
    sizes: tuple[Tensor, Tensor],
    momentum: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Bring the moments of a parameter of many networks up to date, and take a step.

    Args:
        tensors: parameters, gradients, first and second moments ``[c, ...]``; all but gradients are changed in place.
        factors: of every number of the last axis, what its step is multiplied with; None: nothing.
        sizes: of each network's step, and the factor of ``sqrt(v)`` ``[c]``, in double precision.
        momentum: size of the step of a network that has gone over to SGD with momentum ``[c]``, whose first moment is the
            momentum; negative: it has not; None: none has.
        betas: decays of the moments.
        eps: keeps the denominator from zero.

    Returns:
        Of each network that has not gone over ``d . d`` and ``d . g`` of its step ``d`` and gradient ``g``, else 0 ``[c]``.
    """
    parameter, gradient, first, second = tensors
    clients, width = len(parameter), parameter.shape[-1]
    per_number = torch.ones(width) if factors is None else factors.float()
    arrays = [tensor.view(clients, -1).numpy() for tensor in (parameter, gradient.contiguous(), first, second)]
    repeated = per_number.repeat(arrays[0].shape[1] // max(width, 1)).numpy()
    before = momentum if momentum is not None else torch.full_like(sizes[0], -1.0)
    of_network = [values.double().numpy() for values in (*sizes, before)]
    squared, projected = torch.zeros(clients, dtype=torch.float64), torch.zeros(clients, dtype=torch.float64)
    compiled(_step, "numpy")(*arrays, repeated, *of_network, *betas, eps, squared.numpy(), projected.numpy())
    return squared, projected


def _step(
    parameters: Table,
    gradients: Table,
    firsts: Table,
    seconds: Table,
    factors: Table,
    sizes: Numbers,
    scales: Numbers,
    momentum: Numbers,
    beta1: float,
    beta2: float,
    eps: float,
    squared: Numbers,
    projected: Numbers,
) -> None:
    """See :func:`step_of_many`. Single precision throughout: a number in double would halve what is done at a time."""
    decay1, decay2, least = np.float32(beta1), np.float32(beta2), np.float32(eps)
    rest1, rest2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
    for network in range(len(parameters)):
        parameter, gradient = parameters[network], gradients[network]
        first, second = firsts[network], seconds[network]
        if momentum[network] >= 0.0:
            size = np.float32(momentum[network])
            for i in range(len(factors)):
                g = gradient[i]
                first[i] = decay1 * first[i] + g
                second[i] = decay2 * second[i] + rest2 * g * g
                parameter[i] -= size * first[i]
            continue
        size, scale = np.float32(-sizes[network]), np.float32(scales[network])
        taken, along = np.float32(0.0), np.float32(0.0)
        for i in range(len(factors)):
            g = gradient[i]
            m = first[i] + rest1 * (g - first[i])
            v = decay2 * second[i] + rest2 * g * g
            step = size * factors[i] * m / (np.sqrt(v) * scale + least)
            first[i], second[i] = m, v
            parameter[i] += step
            taken += step * step
            along += step * g
        squared[network], projected[network] = taken, along
