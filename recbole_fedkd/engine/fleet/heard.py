"""What packed clients have been told, as the strategy's loss reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor


class Received(Mapping[str, Tensor]):
    """What one client of a pack has been told, with the item rows that it holds.

    Args:
        arrays: by name.
        tables: names of what has a row per item of a network; only rows of the client's own are asked for.
        items: the client's items ``[rows]``.
    """

    def __init__(self, arrays: Mapping[str, Tensor], tables: frozenset[str], items: Tensor) -> None:
        self._arrays, self._tables, self._items = arrays, tables, items

    def __getitem__(self, name: str) -> Tensor:
        value = self._arrays[name]
        return value[self._items] if name in self._tables else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


@dataclass(frozen=True)
class Heard:
    """What packed clients have been told.

    Attributes:
        common: what all have been told alike, by name.
        own: what each has been told, ``[c, ...]``.
        tables: names of what has a row per item of a network.
        installed: parameters and buffers that each takes over of it, ``[c, ...]``.
        whole_tables: whether these hold item tables, of which a client then keeps every row.
        learns: whether the clients have something to train by; if not, their loss is only measured.
    """

    common: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    installed: Mapping[str, Tensor] = field(default_factory=dict)
    whole_tables: bool = False
    learns: bool = True

    def select(self, slots: Tensor | slice) -> Heard:
        """What some of the clients have been told."""
        return replace(self, own=selected(self.own, slots), installed=selected(self.installed, slots))


def selected(values: Mapping[str, Tensor], slots: Tensor | slice) -> dict[str, Tensor]:
    """Tensors of packed clients ``[c, ...]`` by name, of some of them."""
    return {name: value[slots] for name, value in values.items()}
