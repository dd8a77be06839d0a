"""What a checkpoint holds of a running process: parameters and random streams, put back only where they fit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_fedkd.errors import InputError


@contextmanager
def restored(file: str | Path) -> Iterator[None]:
    """While a checkpoint's values are put back: whatever does not fit is one sentence."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".strip()
        raise InputError(f"checkpoint '{file}' does not fit this run: {' '.join(reason.split())[:300]}") from error


def load_parameters(model: nn.Module, state: Mapping[str, Any], file: str | Path) -> None:
    """Put the parameters of a checkpoint into a model.

    Args:
        model: the model, as its config builds it.
        state: fields of the checkpoint.
        file: what the sentences call it.

    Raises:
        InputError: a name, shape or type that the model does not have, or a number that is none.
    """
    own, saved = model.state_dict(), state["state_dict"]
    with restored(file):
        for name in sorted(own.keys() ^ saved.keys()):
            where = "is missing" if name in own else "is not one of the model's"
            raise InputError(f"checkpoint '{file}' does not fit this run: parameter '{name}' {where}")
        # A store of rows takes as many as there are, and checks them itself.
        growing = {f"{path}.{name}" for path, part in model.named_modules() for name in getattr(part, "growing", ())}
        for name, tensor in own.items():
            other = saved[name]
            fits = tensor.shape == other.shape or (name in growing and tensor.shape[1:] == other.shape[1:])
            if not fits or tensor.dtype != other.dtype or tensor.layout != other.layout:
                raise InputError(
                    f"checkpoint '{file}' does not fit this run: parameter '{name}' is {_kind(other)} there and "
                    f"{_kind(tensor)} here"
                )
            # A constant of the model, such as a mask, may hold infinity; what was learned may not.
            if not _finite(other) and not torch.equal(other, tensor.cpu()):
                raise InputError(
                    f"checkpoint '{file}' cannot be used: parameter '{name}' holds values that are not finite"
                )
        model.load_state_dict(saved)
        if state["other_parameter"].keys() - model.other_parameter().keys():  # type: ignore[operator]
            raise InputError(
                f"checkpoint '{file}' does not fit this run: it has parameters that the model does not have"
            )
        model.load_other_parameter(state["other_parameter"])  # type: ignore[operator]


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def check_optimizer(optimizer: torch.optim.Optimizer, file: str | Path) -> None:
    """Raise :class:`InputError` for memories that do not have their parameter's shape, or that are not finite."""
    for parameter, memories in optimizer.state.items():
        for name, value in memories.items():
            if not isinstance(value, Tensor):
                continue
            if value.dim() and value.shape != parameter.shape:
                raise InputError(
                    f"checkpoint '{file}' does not fit this run: the optimiser's '{name}' is {_kind(value)} for a parameter "
                    f"of {_kind(parameter)}"
                )
            if not _finite(value):
                raise InputError(f"checkpoint '{file}' cannot be used: the optimiser's '{name}' is not finite")


def random_state(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """States of all random streams of the process, and of some generators, as plain values and tensors."""
    numpy_state: Any = np.random.get_state()
    python_state = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(numpy_state[0]), torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
        "python": [python_state[0], list(python_state[1]), python_state[2]],
        "loaders": [generator.get_state() for generator in generators],
    }


def restore_random(state: Mapping[str, Any], generators: Sequence[torch.Generator]) -> None:
    """Put all streams, and as many generators as there were, where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    for generator, saved in zip(generators, state["loaders"], strict=True):
        generator.set_state(saved)
