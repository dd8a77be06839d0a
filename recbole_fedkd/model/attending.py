"""Target attention over rows of tables in machine code, forward and backward, in one pass through the processor's cache.

What torch does in thirty steps, each of which reads and writes the keys of a batch or a number for each head and key, is done
for :data:`LANES` samples at a time, which lie side by side on the last axis. Nothing is kept for the way back but arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.model.compiled import HIDDEN, Ids, Table, compiled, exponential, has_compiler
from recbole_fedkd.model.function import DirectFunction

LANES, VECTOR = 64, 32
"""Samples at a time, and what they are filled up to a multiple of."""

Tensors = tuple[Tensor, ...]


def attends(*tensors: Tensor) -> bool:
    """Whether :func:`attend` can be asked about these tensors: single precision, on the processor, not empty."""
    fit = all(each.dtype == torch.float32 and each.device.type == "cpu" and each.numel() for each in tensors)
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
    nothing, nobody = table.new_empty(0, 0), torch.empty(0, 0, dtype=torch.long)
    kinds, of_kinds = labels if labels is not None else (nobody, nothing)
    items, own = past if past is not None else (nobody, nobody)
    learned = projected.reshape(-1, width), heads, bias if bias is not None else nothing, table, of_kinds
    looked_up = rows if rows is not None else nobody, kinds, items, own.reshape(1, -1)
    arguments = (each.unsqueeze(0) for each in (*learned, *looked_up))
    pooled, weights = _Attend.apply(batch, keys, *arguments)
    return pooled.view(batch, targets, width), weights.view(batch, targets, keys)


class _Attend(DirectFunction):
    """:func:`attend` of many networks, the first axis of every tensor."""

    @staticmethod
    def forward(batch: int, keys: int, *tensors: Tensor) -> Tensors:
        projected = tensors[0]
        out = torch.empty_like(projected), projected.new_empty(*projected.shape[:2], keys)
        _run(batch, [each.detach().contiguous() for each in tensors], out, [])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.batch, ctx.keys, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *given: Tensor) -> Any:
        tensors = [each.contiguous() for each in ctx.saved_tensors]
        gradients = [torch.zeros_like(each) for each in tensors[:5]]
        _run(ctx.batch, tensors, tuple(each.contiguous() for each in given), gradients)
        return None, None, *gradients, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, batch: int, keys: int, *tensors: Tensor) -> Any:
        count = info.batch_size
        moved = [
            each.movedim(dim, 0) if dim is not None else each.expand(count, *each.shape)
            for each, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        out = _Attend.apply(batch, keys, *(each.flatten(0, 1) for each in moved))
        return tuple(each.unflatten(0, (count, -1)) for each in out), (0, 0)


def _run(batch: int, tensors: list[Tensor], out: Tensors, gradients: list[Tensor]) -> None:
    """Fill ``out``, or add to ``gradients`` what comes back if it is ``out`` that is given."""
    arrays = [each.numpy() for each in (*tensors, *out, *(gradients or tensors[:5]))]
    helpers = exponential, _load, _unload, _weigh, _back
    compiled(_attend, "numpy", *helpers)(batch, bool(gradients), *arrays)


def _attend(
    batch: int,
    backward: bool,
    projected: Table,
    heads: Table,
    bias: Table,
    table: Table,
    of_kinds: Table,
    rows: Ids,
    kinds: Ids,
    past: Ids,
    items: Ids,
    out: Table,
    mean: Table,
    d_projected: Table,
    d_heads: Table,
    d_bias: Table,
    d_table: Table,
    d_of_kinds: Table,
) -> None:
    """Arrays of all networks. Lanes are filled up to whole :data:`VECTOR` with anything, widths to fours with zeros."""
    networks, samples, width = projected.shape
    count, slots, targets = heads.shape[1], mean.shape[2], samples // batch
    wide = (width + 3) // 4 * 4
    keys, seen = np.zeros((slots, wide, LANES), np.float32), np.zeros((slots, LANES), np.float32)
    query, products = np.zeros((wide, LANES), np.float32), np.zeros((wide, LANES), np.float32)
    given, sums = np.zeros((wide, LANES), np.float32), np.zeros((wide, LANES), np.float32)
    weights, scores = np.zeros((count, wide), np.float32), np.zeros((count, slots, LANES), np.float32)
    shares, total = np.zeros((slots, LANES), np.float32), np.zeros((2, LANES), np.float32)
    numbers = np.zeros((slots, LANES), np.int64)
    for network in range(networks):
        for head in range(count):
            for x in range(width):
                weights[head, x] = heads[network, head, x]
        for first in range(0, samples, LANES):
            size = min(LANES, samples - first)
            lanes = (size + VECTOR - 1) // VECTOR * VECTOR
            for lane in range(size):
                entry = (first + lane) // targets
                for x in range(width):
                    query[x, lane] = projected[network, first + lane, x]
                for key in range(slots):
                    numbers[key, lane] = rows[network, entry, key] if rows.shape[1] > 0 else entry * slots + key
                    seen[key, lane] = 0.0  # on the way back it holds derivatives of the lanes before
                if past.shape[1] > 0:
                    item, own = items[network, 0, first + lane], False
                    for key in range(slots):
                        other = past[network, entry, key]
                        own |= other == item
                        seen[key, lane] = HIDDEN if other in (item, 0) else 0.0
                    if not own:
                        seen[slots - 1, lane] = HIDDEN
            # Where all lanes have the same keys, one of them is enough.
            apart = 1 if first // targets == (first + size - 1) // targets else size
            _load(apart, numbers, table[network], keys, False)
            if kinds.shape[1] > 0:
                for lane in range(apart):
                    for key in range(slots):
                        numbers[key, lane] = kinds[network, (first + lane) // targets, key]
                _load(apart, numbers, of_kinds[network], keys, True)
            if apart < size:
                for key in range(slots):
                    for x in range(width):
                        for i in range(1, lanes):
                            keys[key, x, i] = keys[key, x, 0]
            _weigh(lanes, query, keys, weights, bias[network], seen, products, scores, shares, total)
            for x in range(width):
                for i in range(lanes):
                    sums[x, i] = 0.0
            if not backward:
                for key in range(slots):
                    for x in range(width):
                        for i in range(lanes):
                            sums[x, i] += shares[key, i] * keys[key, x, i]
                for lane in range(size):
                    for x in range(width):
                        out[network, first + lane, x] = sums[x, lane]
                    for key in range(slots):
                        mean[network, first + lane, key] = shares[key, lane]
                continue
            for lane in range(size):
                for x in range(width):
                    given[x, lane] = out[network, first + lane, x]
                for key in range(slots):
                    seen[key, lane] = mean[network, first + lane, key]
            d_of = d_heads[network], d_bias[network]
            _back(size, query, keys, weights, given, scores, shares, seen, total[0], products, sums, *d_of)
            for lane in range(size):
                for x in range(width):
                    d_projected[network, first + lane, x] = sums[x, lane]
            if apart < size:
                for key in range(slots):
                    for x in range(width):
                        for i in range(1, size):
                            keys[key, x, 0] += keys[key, x, i]
            if kinds.shape[1] > 0:
                _unload(apart, numbers, keys, d_of_kinds[network])
                for lane in range(apart):
                    for key in range(slots):
                        numbers[key, lane] = rows[network, (first + lane) // targets, key]
            _unload(apart, numbers, keys, d_table[network])


def _load(lanes: int, numbers: Ids, table: Table, keys: Table, adds: bool) -> None:
    """Fill ``keys [slots, d, lanes]`` with the rows ``numbers [slots, lanes]`` of a table ``[rows, d]``, or add them."""
    for key in range(len(keys)):
        for lane in range(lanes):
            row = numbers[key, lane]
            for x in range(table.shape[1]):
                keys[key, x, lane] = keys[key, x, lane] + table[row, x] if adds else table[row, x]


def _unload(lanes: int, numbers: Ids, keys: Table, table: Table) -> None:
    """Add ``keys`` to the rows of a table; arguments as of :func:`_load`."""
    for key in range(len(keys)):
        for lane in range(lanes):
            row = numbers[key, lane]
            for x in range(table.shape[1]):
                table[row, x] += keys[key, x, lane]


def _weigh(
    lanes: int,
    query: Table,
    keys: Table,
    weights: Table,
    bias: Table,
    seen: Table,
    products: Table,
    scores: Table,
    shares: Table,
    room: Table,
) -> None:
    """Attention of every head ``[heads, slots, lanes]`` divided by their number, and its sum ``[slots, lanes]``."""
    count, slots, most, total = len(scores), len(keys), room[0], room[1]
    for key in range(slots):
        for x in range(len(query)):
            for i in range(lanes):
                products[x, i] = query[x, i] * keys[key, x, i]
        for head in range(count):
            more = bias[key, head] if len(bias) > 0 else np.float32(0.0)
            for i in range(lanes):
                scores[head, key, i] = seen[key, i] + more
            for x in range(0, len(query), 4):
                a, b, c, d = weights[head, x], weights[head, x + 1], weights[head, x + 2], weights[head, x + 3]
                for i in range(lanes):
                    more = a * products[x, i] + b * products[x + 1, i]
                    scores[head, key, i] += more + c * products[x + 2, i] + d * products[x + 3, i]
    for head in range(count):
        for i in range(lanes):
            most[i], total[i] = HIDDEN, 0.0
        for key in range(slots):
            for i in range(lanes):
                most[i] = max(most[i], scores[head, key, i])
        for key in range(slots):
            for i in range(lanes):
                power = exponential(scores[head, key, i] - most[i])
                scores[head, key, i] = 0.0 if scores[head, key, i] <= 0.1 * HIDDEN else power
                total[i] += scores[head, key, i]
        for i in range(lanes):
            total[i] = 0.0 if total[i] == 0.0 else 1.0 / (total[i] * count)
        for key in range(slots):
            for i in range(lanes):
                scores[head, key, i] *= total[i]
    for key in range(slots):
        for i in range(lanes):
            shares[key, i] = scores[0, key, i]
        for head in range(1, count):
            for i in range(lanes):
                shares[key, i] += scores[head, key, i]


def _back(
    size: int,
    query: Table,
    keys: Table,
    weights: Table,
    given: Table,
    scores: Table,
    shares: Table,
    d_shares: Table,
    total: Table,
    products: Table,
    d_query: Table,
    d_heads: Table,
    d_bias: Table,
) -> None:
    """Turn ``scores`` and ``keys``, as :func:`_weigh` knows them, into their derivatives, and add to those of the rest.

    Args:
        given: derivatives by the sum of keys ``[d, lanes]``.
        d_shares: by the shares ``[slots, lanes]``, overwritten.
    """
    count, slots, lanes = len(scores), len(keys), (size + VECTOR - 1) // VECTOR * VECTOR
    for key in range(slots):
        for x in range(len(query)):
            for i in range(lanes):
                d_shares[key, i] += given[x, i] * keys[key, x, i]
    # Of a softmax p it is p (d - sum p d).
    for head in range(count):
        for i in range(lanes):
            total[i] = 0.0
        for key in range(slots):
            for i in range(lanes):
                total[i] += count * scores[head, key, i] * d_shares[key, i]
        for key in range(slots):
            for i in range(lanes):
                scores[head, key, i] *= d_shares[key, i] - total[i]
            if len(d_bias) > 0:
                d_more = np.float32(0.0)
                for i in range(size):
                    d_more += scores[head, key, i]
                d_bias[key, head] += d_more
    for key in range(slots):
        for x in range(d_heads.shape[1]):
            for i in range(lanes):
                products[x, i] = query[x, i] * keys[key, x, i]
            for head in range(count):
                d_weight = np.float32(0.0)
                for i in range(size):
                    d_weight += scores[head, key, i] * products[x, i]
                d_heads[head, x] += d_weight
            for i in range(lanes):
                products[x, i] = 0.0
            for head in range(count):
                for i in range(lanes):
                    products[x, i] += weights[head, x] * scores[head, key, i]
            for i in range(lanes):
                d_query[x, i] += products[x, i] * keys[key, x, i]
                keys[key, x, i] = products[x, i] * query[x, i] + shares[key, i] * given[x, i]
