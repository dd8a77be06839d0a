"""Target attention over rows of tables in machine code, forward and backward, in one pass through the processor's cache.

What torch does in thirty steps, each of which reads and writes the keys of a batch or a number for each head and key, is done
for a few samples at a time. Nothing is kept for the way back but arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.model.compiled import LANES, ROWS, compiled, has_compiler
from recbole_fedkd.model.function import DirectFunction, side_by_side

LEARNED = 5
"""Of the tensors, so many have gradients."""

NO_NUMBERS, NO_IDS = np.empty((1, 0, 0), np.float32), np.empty((1, 0, 0), np.int64)

Sizes = tuple[int, int, int, int]


def attends(*tensors: Tensor) -> bool:
    """Whether :func:`attend` can be asked about these tensors: single precision, on the processor, not empty."""
    fit = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() for tensor in tensors)
    return fit and has_compiler()


def attend(
    projected: Tensor,
    heads: Tensor,
    bias: Tensor | None,
    table: Tensor,
    rows: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys summed up by attention, a softmax of each head averaged over the heads; both are differentiable.

    Args:
        projected: queries ``[batch, targets, d]``; all targets of an entry attend to the same keys.
        heads: what each multiplies the products of query and key with ``[heads, d]``.
        bias: added to the scores ``[keys, heads]``; None: nothing.
        table: what keys are made of ``[rows, d]``.
        rows: the row of each key ``[batch, keys]``; None: the keys of one entry are the rows behind those of the one before.
        labels: rows of a second table ``[batch, keys]``, which are added, and that table ``[labels, d]``.
        past: the item of each key ``[batch, keys]`` and of each target ``[batch, targets]``. A target sees no key of its own
            item, none of item 0, and the last key only if one is its own. None: all see all.

    Returns:
        ``[batch, targets, d]``, and the weights ``[batch, targets, keys]``; both 0 for a target that sees no key.
    """
    batch, targets, width = projected.shape
    keys = rows.shape[1] if rows is not None else len(table) // batch
    kinds, of_kinds = labels if labels is not None else (None, None)
    items, own = past if past is not None else (None, None)
    learned = _filled(projected, width), _filled(heads, width, len(heads)), bias, _filled(table, width)
    of_labels = None if of_kinds is None else _filled(of_kinds, width)
    sizes = 1, targets, len(heads), keys
    pooled, weights = _Attend.apply(sizes, *learned, of_labels, rows, kinds, items, own)
    return _cut(pooled, width), _cut(weights, keys)


def _filled(vectors: Tensor, width: int, rows: int = 0) -> Tensor:
    """With zeros behind their numbers, and rows of zeros behind the rows."""
    more = -width % LANES, -rows % ROWS
    return functional.pad(vectors, (0, more[0], 0, more[1])) if any(more) else vectors


def _cut(filled: Tensor, width: int) -> Tensor:
    return filled if filled.shape[-1] == width else filled[..., :width]


class _Attend(DirectFunction):
    """:func:`attend` of one network or, with an axis more in front of every tensor, of many.

    ``sizes``: networks, targets of an entry, heads, keys.
    """

    @staticmethod
    def forward(sizes: Sizes, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        projected = tensors[0]
        assert projected is not None
        long = sizes[3] + -sizes[3] % LANES
        out = projected.new_empty(projected.shape), projected.new_empty((*projected.shape[:-1], long))
        _run(sizes, tensors, out, ())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.sizes, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *given: Tensor) -> Any:
        tensors = ctx.saved_tensors
        projected, heads, bias, table, of_kinds = tensors[:LEARNED]
        gradients = (
            projected.new_empty(projected.shape),
            heads.new_zeros(heads.shape),
            None if bias is None else bias.new_empty(bias.shape),
            # Without numbers of rows every row is one key of one entry, and filled.
            table.new_empty(table.shape) if tensors[LEARNED] is None else table.new_zeros(table.shape),
            None if of_kinds is None else of_kinds.new_empty(of_kinds.shape),
        )
        _run(ctx.sizes, tensors, given, gradients)
        return None, *gradients, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, sizes: Sizes, *tensors: Tensor | None) -> Any:
        moved = side_by_side(info.batch_size, in_dims[1:], tensors)
        return _Attend.apply((info.batch_size * sizes[0], *sizes[1:]), *moved), (0, 0)


def _run(
    sizes: Sizes, tensors: Sequence[Tensor | None], out: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> None:
    """Fill ``out``, or ``gradients`` with what comes back if it is ``out`` that is given."""
    from recbole_fedkd.model import attention_loops

    numbers = [_array(tensor, sizes[0], NO_NUMBERS) for tensor in tensors[:LEARNED]]
    ids = [_array(tensor, sizes[0], NO_IDS) for tensor in tensors[LEARNED:]]
    results = [_array(tensor, sizes[0], NO_NUMBERS) for tensor in (*out, *gradients)]
    loops = compiled(attention_loops.attend, "numpy")
    loops(bool(gradients), sizes[1:], *numbers, *ids, *results, *([] if gradients else numbers))


def _array(tensor: Tensor | None, networks: int, nothing: Any) -> Any:
    """The rows of all networks ``[networks, rows, numbers of a row]``."""
    if tensor is None:
        return nothing
    return tensor.detach().contiguous().numpy().reshape(networks, -1, tensor.shape[-1])
