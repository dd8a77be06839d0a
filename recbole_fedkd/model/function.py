"""Functions with a way back of their own, of one network or of many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class DirectFunction(torch.autograd.Function):
    """A function of torch's whose call costs little: it is made for steps that take less time than torch's call of it.

    Torch binds arguments to the names of ``forward`` in Python at every call, which only default values need.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch's; there are no default values."""
        transformed = getattr(torch._C, "_are_functorch_transforms_active", None)
        if transformed is None or transformed():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept, of what has no way back."""


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
