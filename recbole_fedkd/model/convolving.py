"""Convolutions along the fields of a sample and the dense layer behind them in machine code, forward and backward.

Nothing is kept for the way back but arguments and results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_fedkd.model.compiled import Table, compiled, has_compiler
from recbole_fedkd.model.function import DirectFunction, array_of, side_by_side

CHANNELS, DENSE = 128, 1 << 19
"""Channels and weights of the dense layer up to which this is faster than torch, which goes through matrices in blocks."""

Linear = tuple[Tensor, Tensor]
"""Weight and bias."""

Tables = tuple[Table, ...]


def convolves(fields: Tensor, convolutions: Sequence[Linear], dense: Linear) -> bool:
    """Whether :func:`convolve` can be asked this: single precision, on the processor, not empty, small enough for its cache."""
    tensors = [fields, *(parameter for layer in (*convolutions, dense) for parameter in layer)]
    fit = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() for tensor in tensors)
    small = all(max(weight.shape[:2]) <= CHANNELS for weight, _ in convolutions) and dense[0].numel() <= DENSE
    return fit and small and has_compiler() and not torch.is_autocast_enabled("cpu")


def convolve(fields: Tensor, convolutions: Sequence[Linear], dense: Linear) -> Tensor:
    """Convolutions of width 3 along the fields, then a dense layer, each with a rectifier behind; it is differentiable.

    Args:
        fields: ``[batch, fields, d]``; neighbours of the first and the last field are 0.
        convolutions: weight ``[outputs, inputs, 3]`` and bias ``[outputs]`` of each.
        dense: weight ``[h, outputs * fields]``, flattened fields last, and bias ``[h]``.

    Returns:
        ``[batch, h]``.
    """
    weights, biases = zip(*convolutions, dense, strict=True)
    out: Tensor = _Convolve.apply(False, fields, *weights, *biases)
    return out


class _Convolve(DirectFunction):
    """:func:`convolve`; with ``many`` of many networks, the first axis of every tensor: fields, all weights, all biases."""

    @staticmethod
    def forward(many: bool, *tensors: Tensor) -> Tensor:
        fields, dense = tensors[0], tensors[len(tensors) // 2]
        out = fields.new_empty(*fields.shape[:-2], dense.shape[-2])
        from recbole_fedkd.model import convolution_loops

        compiled(convolution_loops.forward, "numpy")(*_arrays(many, tensors), array_of(many, out))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.many, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> Any:
        from recbole_fedkd.model import convolution_loops

        *tensors, out = ctx.saved_tensors
        gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        of_layer = *_arrays(ctx.many, tensors), array_of(ctx.many, out), array_of(ctx.many, given)
        compiled(convolution_loops.backward, "numpy")(*of_layer, *_arrays(ctx.many, gradients))
        return None, *gradients

    @staticmethod
    def vmap(info: Any, in_dims: Any, many: bool, *tensors: Tensor) -> Any:
        count = info.batch_size
        moved = side_by_side(count, in_dims[1:], tensors)
        if not many:
            return _Convolve.apply(True, *moved), 0
        return _Convolve.apply(True, *(tensor.flatten(0, 1) for tensor in moved)).unflatten(0, (count, -1)), 0


def _arrays(many: bool, tensors: Sequence[Tensor]) -> tuple[Table, Tables, Table, Tables, Table]:
    """Fields, weights of the convolutions, of the dense layer, and biases likewise."""
    fields, *others = (array_of(many, tensor) for tensor in tensors)
    layers = len(others) // 2
    return fields, tuple(others[: layers - 1]), others[layers - 1], tuple(others[layers:-1]), others[-1]
