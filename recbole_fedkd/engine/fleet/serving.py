"""What serves the users of packed clients between rounds: moving averages of networks in compact form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.federated.serving import MovingAverage


class GroupAverage(MovingAverage):
    """The moving average of all networks of a group, see :class:`~recbole_fedkd.federated.serving.MovingAverage`.

    Rows that a client begins to hold were those of all before, and count as such in its average.

    Args:
        group: the clients; holds the averages while users are served.
        decay: as of the base class.
    """

    network: ClientGroup

    def serve(self) -> None:
        """Take the networks into the averages, and put those in their place."""
        self.restore()
        if "rows.data" in self.average:
            self.average["rows.data"] = self._aligned()
        self._layout = self._rows_of_clients()
        super().serve()

    def _put(self, values: dict[str, Tensor]) -> None:
        super()._put(values)
        if self.network.rows.width:
            self.network.rows.fill(values["rows.data"])

    def _rows_of_clients(self) -> tuple[Tensor, Tensor]:
        """Client and item of every row that is stored ``[rows]``, as one number each, and the order of these numbers."""
        rows = self.network.rows.joined()
        clients = torch.repeat_interleave(rows["count"])
        keys = clients * self.network.rows.items + rows["item"]
        return keys, torch.argsort(keys)

    def _aligned(self) -> Tensor:
        """The averages of the rows that clients now hold."""
        before, order = self._layout
        keys, _ = self._rows_of_clients()
        store = self.network.rows
        rows = self.network.item_base()[keys % store.items, : store.width]
        if len(before):
            entry = torch.searchsorted(before[order], keys).clamp(max=len(before) - 1)
            held = before[order][entry] == keys
            rows[held] = self.average["rows.data"][order[entry[held]]]
        return rows

    def state_dict(self) -> dict[str, Any]:
        """As of the base class, and whose the rows are."""
        return {**super().state_dict(), "layout": self._layout[0] if self.rounds else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        if state["layout"] is not None:
            keys = state["layout"].to(self.network.numbers.device)
            self._layout = keys, torch.argsort(keys)
