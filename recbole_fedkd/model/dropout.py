"""Dropout whose masks somebody else draws: clients drop by draws of their own, alone and side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Factors = Callable[[Sequence[int], float, torch.device], Tensor]
"""What values of a shape, the leading axis that of samples, are multiplied by where a share stays: 0, or one over the share."""


def drawn_mask(values: Tensor, kept: float) -> Tensor:
    """1 where an entry of ``values`` stays, else 0; from torch's own stream.

    On the processor by a number in double precision an entry, whoever made the processor.
    """
    if values.device.type != "cpu":
        return torch.empty_like(values).bernoulli_(kept)
    return torch.empty(values.shape, dtype=torch.float64).uniform_().lt(kept).to(values.dtype)


def dropped(values: Tensor, probability: float, factors: Factors | None) -> Tensor:
    """``values [batch, ...]`` of which a share is 0; what stays is scaled up, so that the mean stays.

    Args:
        values: any.
        probability: share of the entries that are set to 0.
        factors: draws; None: torch's own stream does.
    """
    kept = 1.0 - probability
    if factors is None:
        return values * drawn_mask(values, kept).div(kept)
    return values * factors(values.shape, kept, values.device).to(values.dtype)


class HandedDropout(nn.Module):
    """Dropout that can be handed what it multiplies by: who trains many networks at once draws for each by itself.

    Args:
        probability: share of the entries that are set to 0.
        width: size of the last axis of what it is applied to; None: not known yet.

    Attributes:
        shapes: of what it is applied to in a pass, without the leading axis of samples, by the place of the call among the
            calls of all layers of a network; layers of the same place are called in the order in which they were made.
        handed: factors of the next calls, of the input's shape.
        factors: draws where nothing is handed; None: torch's own stream does.
    """

    def __init__(self, probability: float, width: int | None) -> None:
        super().__init__()
        self.probability = probability
        self.shapes: dict[int, tuple[int, ...]] = {} if width is None else {0: (width,)}
        self.handed: list[Tensor] = []
        self.factors: Factors | None = None

    def forward(self, values: Tensor) -> Tensor:
        """``[batch, ...]`` to the same shape; what stays is scaled up, so that the mean stays."""
        if not self.training or not self.probability:
            return values
        return values * self.handed.pop(0) if self.handed else dropped(values, self.probability, self.factors)


class HandedAttention(nn.Module):
    """An ``nn.MultiheadAttention`` with a :class:`HandedDropout`; parameters have the names that they have there.

    Args:
        attention: what it replaces.

    Raises:
        ValueError: it attends to more than it is called with, or its parts have several widths.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.bias_k is not None or attention.add_zero_attn or attention.in_proj_weight is None:
            raise ValueError("it has an attention with keys of its own, or of several widths")
        self.heads, self.batch_first = attention.num_heads, attention.batch_first
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.dropout = HandedDropout(attention.dropout, None)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attend, without masks, from ``[batch, targets, d]`` to ``[batch, keys, d]`` twice, or with the batch second.

        Returns:
            The same shape as of the targets, and the mean of the heads' weights ``[batch, targets, keys]``.
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        parts = []
        for values, weight, bias in zip((query, key, value), weights, biases, strict=True):
            projected = functional.linear(values if self.batch_first else values.transpose(0, 1), weight, bias)
            parts.append(projected.unflatten(2, (self.heads, -1)).transpose(1, 2))
        queries, keys, heads = parts
        scores = (queries / math.sqrt(queries.shape[3])) @ keys.transpose(2, 3)
        attended = self.dropout(scores.softmax(3))
        out: Tensor = self.out_proj((attended @ heads).transpose(1, 2).flatten(2))
        return out if self.batch_first else out.transpose(0, 1), attended.mean(1)


@contextmanager
def dropping_by(network: nn.Module, factors: Factors) -> Iterator[None]:
    """For a while a network's layers drop by draws of its own, torch's layers as well.

    What torch drops elsewhere, by a function, or in an attention that is called with more than its three tensors, goes on
    coming from torch's stream.
    """
    changed: list[nn.Module] = []
    try:
        for layer in list(network.modules()):
            if isinstance(layer, HandedDropout):
                layer.factors = factors
            elif type(layer) in (nn.Dropout, nn.MultiheadAttention) and "forward" not in vars(layer):
                layer.forward = _forward_of(layer, factors)
            else:
                continue
            changed.append(layer)
        yield
    finally:
        for layer in changed:
            if isinstance(layer, HandedDropout):
                layer.factors = None
            else:
                del layer.forward


def _forward_of(layer: nn.Module, factors: Factors) -> Callable[..., Any]:
    """What a layer of torch is called as while it drops by ``factors``."""
    own = layer.forward
    if isinstance(layer, nn.Dropout):
        dropout = layer
        return lambda values: dropped(values, dropout.p, factors) if dropout.training and dropout.p else own(values)
    assert isinstance(layer, nn.MultiheadAttention)
    attention = layer
    try:
        handed = HandedAttention(attention)
    except ValueError:
        return own
    handed.dropout.factors = factors

    def forward(*arguments: Any, **options: Any) -> Any:
        plain = attention.training and attention.dropout and len(arguments) == 3 and not options
        return handed(*arguments) if plain else own(*arguments, **options)

    return forward
