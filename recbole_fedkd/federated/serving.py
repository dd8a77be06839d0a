"""What serves a client's users between rounds: the latest network, or a moving average of its networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recbole_fedkd.model.shared import forget_cached, stateful


class MovingAverage:
    """The moving average of a network over rounds (Polyak and Juditsky, SIAM J. Control Optim. 1992).

    What a high learning rate or an encoded message throws to one side in one round and to another in the next averages out,
    and no byte is sent for it. ``average <- b average + (1 - b) latest``, where ``b`` is the decay, or ``n / (n + 1)`` after
    fewer rounds: until then it is the mean.

    Args:
        network: holds the average while users are served, and the latest weights from :meth:`restore` on.
        decay: ``b``, in (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self.rounds = 0
        self.average: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}

    @torch.no_grad()
    def serve(self) -> None:
        """Take the network's weights into the average, and put that in their place."""
        self.restore()
        self.latest = {name: value.detach().clone() for name, value in stateful(self.network).items()}
        kept = min(self.decay, self.rounds / (self.rounds + 1))
        self.rounds += 1
        for name, value in self.latest.items():
            self.average[name] = torch.lerp(self.average.get(name, value), value, 1 - kept)
        self._put(self.average)

    def restore(self) -> None:
        """Put the latest weights back, to train on or to be overwritten by others."""
        if self.latest:
            self._put(self.latest)
            self.latest = {}

    def state_dict(self) -> dict[str, Any]:
        """Average, rounds and latest weights."""
        return {"rounds": self.rounds, "average": dict(self.average), "latest": dict(self.latest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        device = next(self.network.parameters()).device
        self.rounds = state["rounds"]
        self.average = {name: value.to(device) for name, value in state["average"].items()}
        self.latest = {name: value.to(device) for name, value in state["latest"].items()}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, tensor in stateful(self.network).items():
            tensor.copy_(values[name])
        forget_cached(self.network)
