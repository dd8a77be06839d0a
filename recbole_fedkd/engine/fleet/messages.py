"""What the ``fleet`` engine exchanges: the messages of many clients at once, from what clients hold in compact form.

Of the item rows that it has not touched a client holds what all have in common, so that means of whole networks follow from
those that clients have touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.engine.fleet.compiled import add_changes, changes_of_many, touched_by_many
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.store import Pack, Weights
from recbole_fedkd.federated.strategy.base import ServerState
from recbole_fedkd.model.compiled import has_compiler
from recbole_fedkd.model.shared import SharedState


class SharedTensors(SharedState):
    """Shared parameters given as tensors, one client of many under ``torch.func``.

    Args:
        tensors: gives them by name.
        private: names of those that stay.
        buffers: gives what else is shared, by name.
    """

    def __init__(
        self,
        tensors: Callable[[], Mapping[str, Tensor]],
        private: Mapping[str, tuple[int, int]],
        buffers: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        self._tensors, self._private, self._buffers = tensors, private, buffers

    @cached_property
    def _shared(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._tensors().items() if name not in self._private}

    def parameters(self) -> dict[str, Tensor]:
        """As given, without those that stay."""
        return self._shared

    def buffers(self) -> dict[str, Tensor]:
        """As given."""
        return self._buffers()


@dataclass(frozen=True)
class MeanPart:
    """What packed clients add to a :class:`MeanOfClients`.

    Attributes:
        dense: ``sum_k share_k (w_k - base)`` of what every sample touches ``[P]``.
        items: ids of the item rows that follow; None: all of them.
        rows: the same of the item rows ``[items, D]``.
        dense_changed: sum of the shares of those that changed a number ``[P]``; None where all count.
        rows_changed: the same of the item rows.
    """

    dense: Tensor
    items: Tensor | None
    rows: Tensor
    dense_changed: Tensor | None
    rows_changed: Tensor | None


class MeanOfClients:
    """The weighted mean of the clients' networks, from packs of them: ``base + sum_k share_k (w_k - base)``.

    Args:
        group: the clients' group; its base is what the round starts from.
        private: names of the parameters that stay.
        of_changed: whether the mean of a parameter's row (along its first axis) is that of the clients that changed it, in
            place of all.
    """

    def __init__(self, group: ClientGroup, private: Mapping[str, tuple[int, int]], of_changed: bool) -> None:
        self.group, self.private, self.of_changed = group, private, of_changed
        self.dense_base, self.item_base = group.dense_base(), group.item_base()
        self.dense = torch.zeros_like(self.dense_base, dtype=torch.float64)
        self.rows = torch.zeros_like(self.item_base, dtype=torch.float64)
        self.dense_changed, self.rows_changed = torch.zeros_like(self.dense), torch.zeros_like(self.rows)

    def part(self, pack: Pack, weights: Weights, shares: Tensor) -> MeanPart:
        """What packed clients add; ``shares`` ``[c]`` in double precision, 1 in sum over all clients of the round."""
        touched = None
        if has_compiler() and self.item_base.device.type == "cpu":
            # Of a large catalogue few clients touch little.
            (touched, *_), _ = touched_by_many(pack.items.view(1, -1), len(self.item_base))
            base, places = self.item_base[touched], torch.zeros(len(self.item_base), dtype=torch.long)
            places[touched] = torch.arange(len(touched))
            rows = torch.zeros_like(base)
            add_changes(places[pack.items], pack.count, weights.rows, base, shares, rows)
            dense = changes_of_many(weights.dense, self.dense_base, shares)
        else:
            dense = shares @ (weights.dense - self.dense_base).double()
            rows = torch.zeros_like(self.item_base)
            items, share = pack.items.flatten(), shares.to(rows.dtype).view(-1, 1)
            # sum_k share_k w_k and sum_k share_k of every row: cheaper than to look the base up for every row of every client.
            rows.index_add_(0, items, (weights.rows * share.unsqueeze(2)).flatten(0, 1))
            counted = rows.new_zeros(len(rows)).index_add_(0, items, share.expand_as(pack.items).flatten())
            rows.addcmul_(self.item_base, counted.unsqueeze(1), value=-1.0)
        changed = self._changed(pack, weights, shares) if self.of_changed else (None, None)
        return MeanPart(dense, touched, rows, *changed)

    def add(self, part: MeanPart) -> None:
        """Add what packed clients add."""
        self.dense += part.dense
        if part.items is None:
            self.rows += part.rows
        else:
            self.rows.index_add_(0, part.items, part.rows.double())
        if part.dense_changed is not None and part.rows_changed is not None:
            self.dense_changed += part.dense_changed
            self.rows_changed += part.rows_changed

    @staticmethod
    def largest(part: MeanPart) -> float:
        """The largest magnitude among what packed clients add."""
        return max(float(values.abs().max()) for values in (part.dense, part.rows) if values.numel())

    def _changed(self, pack: Pack, weights: Weights, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of the clients that changed a row, for every number of it: ``[P]`` and ``[items, D]``."""
        shapes, of_dense, of_rows = self.group.shapes, [], []
        moved, column = weights.dense - self.dense_base, 0
        for name in self.group.dense_names:
            size = shapes[name].numel()
            rows = shapes[name][0] if shapes[name] else 1
            changed = (moved[:, column : column + size].view(len(moved), rows, -1) != 0).any(2)
            of_dense.append((shares @ changed.double()).repeat_interleave(size // rows))
            column += size
        differs, column = weights.rows != functional.embedding(pack.items, self.item_base), 0
        for name in self.group.item_names:
            width = shapes[name][1:].numel()
            counted = differs[..., column : column + width].any(2) * shares.unsqueeze(1)
            summed = counted.new_zeros(len(self.rows)).index_add_(0, pack.items.flatten(), counted.flatten())
            of_rows.append(summed.unsqueeze(1).expand(-1, width))
            column += width
        return torch.cat([shares[:0], *of_dense]), torch.cat(of_rows, 1) if of_rows else torch.zeros_like(self.rows)

    def state(self, prefix: str, answered: float = 1.0) -> ServerState:
        """The mean of every shared parameter, its name behind ``prefix``; ``answered``: what the shares come to."""
        for total, changed in ((self.dense, self.dense_changed), (self.rows, self.rows_changed)):
            if self.of_changed:
                total.div_(torch.where(changed > 0, changed, 1.0))
            elif answered != 1.0:
                total.div_(answered)
        dense = (self.dense_base + self.dense).to(self.dense_base.dtype)
        rows = (self.item_base + self.rows).to(self.item_base.dtype)
        shapes = self.group.shapes
        dense_sizes = [shapes[name].numel() for name in self.group.dense_names]
        row_sizes = [shapes[name][1:].numel() for name in self.group.item_names]
        mean = dict(zip(self.group.dense_names, dense.split(dense_sizes), strict=True))
        mean.update(zip(self.group.item_names, rows.split(row_sizes, 1) if row_sizes else (), strict=True))
        return {
            prefix + name: value.reshape(shapes[name]).cpu() for name, value in mean.items() if name not in self.private
        }
