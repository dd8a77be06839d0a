"""Target attention: many softmax heads over one set of keys, averaged into one weight per key."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TargetAttention(nn.Module):
    """Multi-head target attention (AFD, section on feature attention encoding).

    AFD expands the query's weights over ``r`` features to ``m`` attention vectors, averages them to one vector
    ``a`` and outputs ``sum_i a_i V_i``. A linear expansion followed by a mean is the original weight vector times a
    scalar, so here every head is a bilinear form of its own with a softmax of its own, and only then comes the mean::

        a = 1/m sum_h softmax_i(sum_c head[h, c] q[c] k_i[c] / sqrt(d) + bias[h, i]),    output = sum_i a_i V_i

    Args:
        width: size ``d`` of queries, keys and values.
        heads: number ``m`` of attention vectors that are averaged.
        positions: number of key positions that get a learned bias per head (recency, for a history ordered by it);
            0 for keys without an order.
    """

    def __init__(self, width: int, heads: int, positions: int = 0) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.head = nn.Parameter(torch.randn(heads, width))
        self.position_bias = nn.Parameter(torch.zeros(heads, positions)) if positions else None

    def head_weights(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of every head, before the mean.

        Args:
            query: ``[batch, targets, d]``.
            keys: ``[batch, keys, d]``.
            mask: bool ``[batch, targets, keys]``, True where a key may be seen; None if all may.

        Returns:
            ``[batch, targets, heads, keys]``; every row sums to 1, or is 0 where the mask leaves no key.
        """
        batch, targets, width = query.shape
        heads = self.head.shape[0]
        expanded = self.query(query).unsqueeze(2) * (self.head / math.sqrt(width))
        scores = torch.bmm(expanded.view(batch, targets * heads, width), self.key(keys).transpose(1, 2))
        scores = scores.view(batch, targets, heads, keys.shape[1])
        if self.position_bias is not None:
            scores = scores + self.position_bias
        if mask is None:
            return scores.softmax(-1)
        hidden = ~mask.unsqueeze(2)
        # A finite filler keeps the softmax of a fully hidden row defined; the second fill then empties that row.
        return scores.masked_fill(hidden, -1e9).softmax(-1).masked_fill(hidden, 0.0)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend from each target to the keys.

        Args: see :meth:`head_weights`.

        Returns:
            The context ``[batch, targets, d]`` and the averaged weights ``[batch, targets, keys]``.
        """
        weights = self.head_weights(query, keys, mask).mean(2)
        return torch.bmm(weights, self.value(keys)), weights
