"""Networks that hold rows of their users: the rows are on the device that the parameters are on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn


class WithRows(nn.Module):
    """A network with tensors that are neither parameters nor buffers, since no ``state_dict`` may hold them.

    Attributes:
        beside: names of what holds them: tensors, tuples and dataclasses of such.
    """

    beside: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self.beside:
            setattr(self, name, _applied(getattr(self, name), fn))
        return self


def _applied(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_applied(part, function) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _applied(getattr(value, field.name), function) for field in fields(value)})
    return value
