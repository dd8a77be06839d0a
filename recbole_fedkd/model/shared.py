"""What of a network may leave its client: everything but the rows that belong to single users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor, nn

from recbole_fedkd.errors import InputError, listed, nearest

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
            # What never leaves may still be told: a log-prior per item comes from the server.
            if start == stop or value.shape == state[name].shape:
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
            elif tensor.dim() and stop - start < len(tensor):
                shared[name] = torch.cat([tensor[:start], tensor[stop:]])
        return shared


def matching(names: Iterable[str], patterns: Iterable[str]) -> dict[str, str]:
    """Each name that a shell-style pattern matches (``*``, ``?``, ``[seq]``; upper and lower case differ) to the first such."""
    pattern_of: dict[str, str] = {}
    patterns = list(patterns)
    for name in names:
        for pattern in patterns:
            if fnmatchcase(name, pattern):
                pattern_of[name] = pattern
                break
    return pattern_of


def check_patterns(key: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise :class:`InputError`, naming the config key, for the first pattern that matches none of the names."""
    names = list(dict.fromkeys(names))
    for pattern in patterns:
        if not matching(names, [pattern]):
            hint = nearest(pattern.strip("*"), names) or f"; there are {listed(names)}"
            raise InputError(f"{key}: no parameter of the network matches '{pattern}'{hint}")


def stateful(network: nn.Module) -> dict[str, Tensor]:
    """A network's parameters and saved float buffers: what could be sent of it."""
    return {name: tensor for name, tensor in network.state_dict(keep_vars=True).items() if tensor.is_floating_point()}


def private_slices(network: nn.Module, rows: Mapping[str, Rows], patterns: Iterable[str]) -> dict[str, Rows]:
    """What stays on a client: ``rows`` of single users, and every parameter and buffer that a pattern matches, as a whole."""
    tensors = stateful(network)
    whole = matching(tensors, patterns)
    return {**rows, **{name: (0, len(tensors[name]) if tensors[name].dim() else 1) for name in whole}}


def forget_cached(model: nn.Module) -> None:
    """Drop what a RecBole model keeps between evaluations and computes anew when it is missing."""
    for name in getattr(model, "other_parameter_name", None) or []:
        if isinstance(getattr(model, name, None), Tensor):
            setattr(model, name, None)
