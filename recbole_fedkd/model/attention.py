"""Target attention: many softmax heads over one set of keys, averaged into one weight per key."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MANY_KEYS = 20
"""From so many keys on, one target is served faster by batched products of small matrices; of fewer they take twice as long."""


class TargetAttention(nn.Module):
    """Multi-head target attention (AFD, section on feature attention encoding).

    AFD expands the query's weights over ``r`` features to ``m`` attention vectors, averages them to one vector
    ``a`` and outputs ``sum_i a_i V_i``. A linear expansion followed by a mean is the original weight vector times a
    scalar, so here every head is a bilinear form of its own with a softmax of its own, and only then comes the mean::

        a = 1/m sum_h softmax_i(sum_c head[h, c] (W_q q)[c] k_i[c] / sqrt(d) + bias[h, i]),  output = sum_i a_i W_v k_i

    Args:
        width: size ``d`` of queries, keys and output.
        heads: number ``m`` of attention vectors that are averaged.
        positions: number of key positions that get a learned bias per head (recency, for a history ordered by it);
            0 for keys without an order.
    """

    def __init__(self, width: int, heads: int, positions: int = 0) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.head = nn.Parameter(torch.randn(heads, width))
        self.position_bias = nn.Parameter(torch.zeros(positions, heads)) if positions else None

    def head_weights(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of every head, before the mean.

        Args:
            query: ``[batch, targets, d]``.
            keys: ``[batch, keys, d]``.
            mask: bool ``[batch, targets, keys]``, True where a key may be seen; None if all may.

        Returns:
            ``[batch, targets, keys, heads]``; the weights of a head sum to 1, also where the mask leaves no key (they
            are then meaningless, and :meth:`forward` drops them).
        """
        projected, heads = self.query(query), self.head / math.sqrt(query.shape[2])
        if not _one_of_few(query, keys):
            return self._weights_by_batches(projected, keys, heads, mask)
        scores = ((projected * keys) @ heads.T).unsqueeze(1)
        if self.position_bias is not None:
            scores = scores + self.position_bias
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(3), -1e9)
        weights: Tensor = scores.softmax(2)
        return weights

    def _weights_by_batches(self, projected: Tensor, keys: Tensor, heads: Tensor, mask: Tensor | None) -> Tensor:
        """The same for many targets or keys: keys last, where a softmax over 30 of them is several times faster."""
        batch, targets, width = projected.shape
        expanded = (projected.unsqueeze(2) * heads).view(batch, targets * len(heads), width)
        scores = torch.bmm(expanded, keys.transpose(1, 2)).view(batch, targets, len(heads), -1)
        if self.position_bias is not None:
            scores = scores + self.position_bias.T
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(2), -1e9)
        return scores.softmax(3).transpose(2, 3)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend from each target to the keys.

        Args: see :meth:`head_weights`.

        Returns:
            The context ``[batch, targets, d]`` and the averaged weights ``[batch, targets, keys]``, both 0 where the mask
            leaves no key.
        """
        weights = self.head_weights(query, keys, mask).mean(3)
        if mask is not None:
            weights = weights * mask
        few = _one_of_few(query, keys)
        pooled = (weights.transpose(1, 2) * keys).sum(1, keepdim=True) if few else torch.bmm(weights, keys)
        # W_v is applied to the pooled key: the sum of products is the product of the sum.
        return self.value(pooled), weights


def _one_of_few(query: Tensor, keys: Tensor) -> bool:
    """Whether one target sees fewer than :data:`MANY_KEYS`."""
    return query.shape[1] == 1 and keys.shape[1] < MANY_KEYS
