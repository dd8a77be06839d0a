"""Numbers that are not finite: found where they arise, and told as what they are, before anybody makes something of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.errors import TrainingError, listed

_TOLD = 3
"""Names that a sentence lists; of more it gives the number."""


class NotFiniteError(TrainingError):
    """A loss, parameter, message, score or metric is nan or infinite."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors hold neither nan nor infinity.

    A sum over such a number is not finite either, and costs a fraction of a look at every number. A sum of large numbers
    may overflow, so that only where one is not finite each number is looked at.
    """
    checked = [tensor.detach() for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    checked = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in checked]
    if not checked:
        return True
    sums = torch.stack([tensor.sum().double() for tensor in checked])
    return bool(torch.isfinite(sums).all()) or all(bool(torch.isfinite(tensor).all()) for tensor in checked)


def finite_clients(tensors: Iterable[Tensor]) -> Tensor:
    """Which clients' numbers are all finite, bool ``[c]``, from tensors ``[c, ...]``; costs what :func:`all_finite` does."""
    finite: Tensor | None = None
    for tensor in tensors:
        flat = tensor.detach().flatten(1)
        rows = torch.isfinite(flat.sum(1))  # whole numbers are
        if not bool(rows.all()):
            rows = torch.isfinite(flat).all(1)
        finite = rows if finite is None else finite & rows
    assert finite is not None
    return finite


def not_finite(named: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a nan or an infinity."""
    return [] if all_finite(named.values()) else [name for name, tensor in named.items() if not all_finite([tensor])]


def not_finite_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> list[str]:
    """Names of the arrays that hold a nan or an infinity."""
    floats = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
    with np.errstate(over="ignore", invalid="ignore"):
        suspect = [name for name, array in floats.items() if not math.isfinite(array.sum(dtype=np.float64))]
    return [name for name in suspect if not np.isfinite(floats[name]).all()]


def check_trained(loss: float, named: Mapping[str, Tensor], learner: str) -> None:
    """What training leaves behind is finite.

    Args:
        loss: summed over the samples.
        named: the network's parameters.
        learner: what trained it, for the sentence.

    Raises:
        NotFiniteError: it is not.
    """
    broken = not_finite(named)
    if broken or not np.isfinite(loss):
        raise NotFiniteError(training_sentence(loss, broken, learner))


def training_sentence(loss: float, broken: Sequence[str], learner: str) -> str:
    """What is not finite after training, and by what it was trained."""
    problems = [f"training loss is {loss}"] if not np.isfinite(loss) else []
    problems += [f"not finite after training: {listed(broken, _TOLD)}"] if broken else []
    return f"{'; '.join(problems)} ({learner}; a lower learning_rate or clip_grad_norm may help, if its data are sound)"


def check_arrays(arrays: Mapping[str, NDArray[np.generic]], subject: str) -> None:
    """The arrays of a message are finite; ``subject`` names it.

    Raises:
        NotFiniteError: one is not.
    """
    broken = not_finite_arrays(arrays)
    if broken:
        bad = sum(int((~np.isfinite(arrays[name])).sum()) for name in broken)
        raise NotFiniteError(f"{subject} holds {bad} number(s) that are not finite, in {listed(broken, _TOLD)}")


def check_state(state: Mapping[str, Tensor], subject: str) -> None:
    """What the server has made of a round is finite; ``subject`` names round and rule.

    Raises:
        NotFiniteError: it is not.
    """
    broken = not_finite(state)
    if broken:
        raise NotFiniteError(f"{subject}: what the server holds is not finite, in {listed(broken, _TOLD)}")


def learner_of(optimizer: torch.optim.Optimizer) -> str:
    """Half a sentence that names an optimiser and its rates."""
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    return f"learner {type(optimizer).__name__}, learning_rate {', '.join(f'{rate:g}' for rate in rates)}"
