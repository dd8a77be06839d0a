"""Target attention: many softmax heads over one set of keys, averaged into one weight per key."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_fedkd.model.attending import attend, attends


@dataclass(frozen=True)
class Past:
    """Histories that targets attend to.

    Attributes:
        items: of every key ``[batch, keys]``, most recent first, 0 where there is none.
        table: vectors of all items ``[items, d]``.
        labels: of every key ``[batch, keys]``, and the vectors of all labels ``[labels, d]``.
        more: what is added to the keys ``[batch, keys, d]``; None: nothing.
    """

    items: Tensor
    table: Tensor
    labels: tuple[Tensor, Tensor]
    more: Tensor | None

    def keys(self) -> Tensor:
        """What attention sees ``[batch, keys, d]``."""
        labels, of_labels = self.labels
        # Of few labels a product: its gradient is several times cheaper than a scatter.
        one_hot = (labels.unsqueeze(2) == torch.arange(len(of_labels), device=labels.device)).to(of_labels.dtype)
        keys = functional.embedding(self.items, self.table) + one_hot @ of_labels
        return keys if self.more is None else keys + self.more

    def mask(self, targets: Tensor) -> Tensor:
        """Whether items ``[batch, targets]`` see a key ``[batch, targets, keys]``.

        The key that is the target itself is hidden: a row never sees its own label. Where no key is, the oldest is hidden
        instead, so that training and evaluation see equally long histories.
        """
        own = self.items.unsqueeze(1) == targets.unsqueeze(2)
        mask = (self.items != 0).unsqueeze(1) & ~own
        mask[..., -1] &= own.any(-1)
        return mask


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
        return self._head_weights(*self._asked(query), keys, mask).transpose(2, 3)

    def _asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(query), self.head / math.sqrt(query.shape[2])

    def _head_weights(self, projected: Tensor, heads: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Keys last, where a softmax over 30 of them is several times faster."""
        batch, targets, width = projected.shape
        expanded = (projected.unsqueeze(2) * heads).view(batch, targets * len(heads), width)
        scores = torch.bmm(expanded, keys.transpose(1, 2)).view(batch, targets, len(heads), keys.shape[1])
        if self.position_bias is not None:
            scores = scores + self.position_bias.T
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(2), -1e9)
        return scores.softmax(3)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend from each target to the keys.

        Args: see :meth:`head_weights`.

        Returns:
            The context ``[batch, targets, d]`` and the averaged weights ``[batch, targets, keys]``, both 0 where the mask
            leaves no key.
        """
        projected, heads = self._asked(query)
        if mask is None and attends(projected, heads, keys):
            pooled, weights = attend(projected, heads, self.position_bias, keys.reshape(-1, keys.shape[2]))
        else:
            weights = self._head_weights(projected, heads, keys, mask).mean(2)
            if mask is not None:
                weights = weights * mask
            pooled = torch.bmm(weights, keys)
        # W_v is applied to the pooled key: the sum of products is the product of the sum.
        return self.value(pooled), weights

    def over(self, query: Tensor, past: Past, items: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, over the histories of the targets ``items [batch, targets]``."""
        projected, heads = self._asked(query)
        if not attends(projected, heads, past.table):
            return self.forward(query, past.keys(), past.mask(items))
        seen = past.items, items
        if past.more is None:
            table, rows, labels = past.table, past.items, past.labels
            pooled, weights = attend(projected, heads, self.position_bias, table, rows, labels, seen)
        else:
            pooled, weights = attend(projected, heads, self.position_bias, past.keys().flatten(0, 1), past=seen)
        return self.value(pooled), weights
