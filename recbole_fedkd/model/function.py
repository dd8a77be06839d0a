"""Functions with a way back of their own, of one network or of many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched
from torch._functorch.autograd_function import VmapInfo
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter


class DirectFunction(torch.autograd.Function):
    """A function of torch's whose call costs little: it is made for steps that take less time than torch's call of it.

    Torch binds arguments to the names of ``forward`` in Python at every call, which only default values need.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch's; there are no default values."""
        transformed = getattr(torch._C, "_are_functorch_transforms_active", None)
        if transformed is None:
            return super().apply(*args)
        if not transformed():
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
        interpreter = retrieve_current_functorch_interpreter()
        return cls._of_many(interpreter, args) if isinstance(interpreter, VmapInterpreter) else super().apply(*args)

    @classmethod
    def _of_many(cls, interpreter: VmapInterpreter, args: Sequence[Any]) -> Any:
        """As torch's own call of a function inside ``vmap``, which looks for tensors in all arguments, again and again."""
        level = interpreter.level()
        values, dims = zip(*(_apart(value, level) for value in args), strict=True)
        with interpreter.lower():
            if dims.count(None) == len(dims):
                return cls.apply(*args)
            out, of_out = cls.vmap(VmapInfo(interpreter.batch_size(), interpreter.randomness()), dims, *values)
        if isinstance(out, Tensor):
            return _add_batch_dim(out, of_out, level)
        return tuple(_add_batch_dim(tensor, dim, level) for tensor, dim in zip(out, of_out, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept, of what has no way back."""


def _apart(value: Any, level: int) -> tuple[Any, int | None]:
    """What ``vmap`` has made of a value, and its axis of networks; None: it has none."""
    return _unwrap_batched(value, level) if isinstance(value, Tensor) else (value, None)


def array_of(many: bool, tensor: Tensor) -> Any:
    """The memory of a tensor that lies in one piece, else a copy, with an axis of networks in front, ``many`` or one."""
    array = tensor.detach().contiguous().numpy()
    return array if many else array[None]


def side_by_side(count: int, dims: Sequence[int | None], tensors: Sequence[Any]) -> list[Any]:
    """What ``vmap`` hands over, with the axis of ``count`` networks in front; what is of all of them alike is repeated."""
    return [
        tensor
        if not isinstance(tensor, Tensor)
        else tensor.movedim(dim, 0)
        if dim is not None
        else tensor.expand(count, *tensor.shape)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
