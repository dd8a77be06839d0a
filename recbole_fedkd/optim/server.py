"""Server optimisers: what becomes of the global parameters, given the mean of the clients'.

``d = mean - w`` plays the part of a negative gradient. FedAvgM: Hsu, Qi, Brown, arXiv:1909.06335. FedAdam: Reddi et al., ICLR
2021, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
ServerOptimizer = Callable[
    [Tensors, Tensors, Tensors, float, float, float, float], tuple[dict[str, Tensor], dict[str, Tensor]]
]
"""``(w, mean, memory, rate, momentum, beta2, tau)`` to the next ``w`` and the next memory; memory is empty at first."""


def fedavg(
    current: Tensors, mean: Tensors, memory: Tensors, rate: float, momentum: float, beta2: float, tau: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``w + rate * d``, which at rate 1 is the mean itself, to the last bit."""
    if rate == 1.0:
        return dict(mean), {}
    return {name: current[name] + rate * (value - current[name]) for name, value in mean.items()}, {}


def fedavgm(
    current: Tensors, mean: Tensors, memory: Tensors, rate: float, momentum: float, beta2: float, tau: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``v = momentum * v + d``, ``w + rate * v``."""
    moved, kept = {}, {}
    for name, value in mean.items():
        key = f"momentum:{name}"
        direction = value - current[name]
        kept[key] = momentum * memory[key] + direction if key in memory else direction
        moved[name] = current[name] + rate * kept[key]
    return moved, kept


def fedadam(
    current: Tensors, mean: Tensors, memory: Tensors, rate: float, momentum: float, beta2: float, tau: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``m = b1 m + (1 - b1) d``, ``v = b2 v + (1 - b2) d^2``, ``w + rate * m / (sqrt(v) + tau)``; ``v`` starts at ``tau^2``."""
    moved, kept = {}, {}
    for name, value in mean.items():
        first, second = f"momentum:{name}", f"second:{name}"
        direction = value - current[name]
        before = memory[second] if second in memory else torch.full_like(direction, tau**2)
        kept[first] = (1 - momentum) * direction + (momentum * memory[first] if first in memory else 0.0)
        kept[second] = beta2 * before + (1 - beta2) * direction**2
        moved[name] = current[name] + rate * kept[first] / (kept[second].sqrt() + tau)
    return moved, kept


SERVER_OPTIMIZERS: dict[str, ServerOptimizer] = {"fedavg": fedavg, "fedavgm": fedavgm, "fedadam": fedadam}
