"""Rows of item tables on their way between what clients keep and packs, in machine code: each is copied once.

Whoever calls these loops has another way where :func:`moves_rows` says no.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.model.compiled import Ids, Table, compiled, has_compiler


def moves_rows(device: torch.device) -> bool:
    """Whether the loops can be asked about tensors of a device."""
    return device.type == "cpu" and has_compiler()


def fill(
    tables: list[Tensor],
    items: Tensor,
    count: Tensor,
    item_count: int,
    piece: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Overwrite rows of packed tables by what clients have stored; of items that a pack does not hold nothing is taken.

    Args:
        tables: ``[c, rows, D]`` each, changed in place; what is stored of an item is of one table behind the other.
        items: of the packed rows ``[c, rows]``.
        count: how many each client holds ``[c]``.
        item_count: number of items, padding included.
        piece: clients by their place in the pack, where their rows begin, and how many they are ``[n]``, and of all rows the
            items ``[m]`` and numbers ``[m, at least all D]``.
    """
    slots, starts, counts, of_items, data = (part.numpy() for part in piece)
    places, column = np.full(item_count, -1, np.int64), 0
    for table in tables:
        arrays = table.numpy(), items.numpy(), count.numpy(), slots, starts, counts, of_items, data
        compiled(_fill)(*arrays, column, places)
        column += table.shape[2]


def _fill(
    table: Table,
    items: Ids,
    count: Ids,
    slots: Ids,
    starts: Ids,
    counts: Ids,
    of_items: Ids,
    data: Table,
    column: int,
    places: Ids,
) -> None:
    """See :func:`fill`; ``places``: of each item in the pack's rows, -1 between clients."""
    width = table.shape[2]
    for number in range(len(slots)):
        client, start = slots[number], starts[number]
        for position in range(count[client]):
            places[items[client, position]] = position
        for row in range(start, start + counts[number]):
            position = places[of_items[row]]
            if position >= 0:
                for x in range(width):
                    table[client, position, x] = data[row, column + x]
        for position in range(count[client]):
            places[items[client, position]] = -1


def joined(tables: list[Tensor], width: int, count: Tensor) -> Tensor:
    """The first ``count [c]`` rows of packed tables ``[c, rows, D]``, one table behind the other, up to a width.

    Returns:
        ``[sum of count, width]``, of the tables' type.
    """
    data = torch.empty(int(count.sum()), width, dtype=tables[0].dtype)
    column = 0
    for table in tables:
        compiled(_join)(table.numpy(), count.numpy(), data.numpy(), column)
        column += table.shape[2]
    return data


def _join(table: NDArray[Any], count: Ids, data: NDArray[Any], column: int) -> None:
    """See :func:`joined`."""
    width, row = min(table.shape[2], data.shape[1] - column), 0
    for client in range(len(table)):
        for position in range(count[client]):
            for x in range(width):
                data[row, column + x] = table[client, position, x]
            row += 1
