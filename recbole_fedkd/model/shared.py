"""What of a network may leave its client: everything but the rows that belong to single users."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

Rows = tuple[int, int]
"""First row of a slice, and the row behind its last."""


class SharedState:
    """A network's parameters and float buffers without the private rows.

    Args:
        network: the network.
        private_rows: gives the name in the network's state to the slice of rows that never leaves the client; a slice of
            all rows keeps the whole tensor. Asked when something is to be sent: a network that cannot be parted may
            still be trained without.
    """

    def __init__(self, network: nn.Module, private_rows: Callable[[], Mapping[str, Rows]]) -> None:
        self.network = network
        self._private_rows = private_rows

    @cached_property
    def private(self) -> Mapping[str, Rows]:
        """The slices that stay."""
        return self._private_rows()

    def parameters(self) -> dict[str, Tensor]:
        """Shared part of every parameter, still part of the autograd graph; name to ``[shared rows, ...]``."""
        return self._without_private(dict(self.network.named_parameters()))

    def buffers(self) -> dict[str, Tensor]:
        """Shared part of every saved float buffer, such as the running means of a batch normalisation."""
        saved = self.network.state_dict(keep_vars=True).keys()
        buffers = {name: buffer for name, buffer in self.network.named_buffers() if name in saved}
        return self._without_private({name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()})

    @torch.no_grad()
    def install(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite shared parts by ``values``; private rows and what is not named stay as they are."""
        state = self.network.state_dict(keep_vars=True)
        for name, value in values.items():
            start, stop = self.private.get(name, (0, 0))
            if start == stop:
                state[name].copy_(value)
            else:
                state[name][:start], state[name][stop:] = value[:start], value[start:]
        # Graph models keep propagated embeddings between evaluations; RecBole names them in `other_parameter_name`.
        forget_cached(self.network)

    def _without_private(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shared = {}
        for name, tensor in tensors.items():
            start, stop = self.private.get(name, (0, 0))
            if start == stop:
                shared[name] = tensor
            elif stop - start < len(tensor):
                shared[name] = torch.cat([tensor[:start], tensor[stop:]])
        return shared


def forget_cached(model: nn.Module) -> None:
    """Drop what a RecBole model keeps between evaluations and computes anew when it is missing."""
    for name in getattr(model, "other_parameter_name", None) or []:
        if isinstance(getattr(model, name, None), Tensor):
            setattr(model, name, None)
