"""Packing: which clients train side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_PADDING = 0.1
"""Largest share of the samples of a pack that may be padding, where it is more than a few."""

FEW_PADDING = 700
"""Samples of padding that cost less than another pack: the calls that a pack takes last as long as a thousand samples."""

MAX_ROW_PADDING = 0.2
"""Largest share of the item rows of a pack that may be padding, were every sample of an item of its own."""


def slots(size: int, largest: int, batch_size: int) -> int:
    """Places that a client with ``size`` samples takes, padding included, beside one with ``largest``.

    In every step the clients that still have samples get as many places as the largest of them needs.
    """
    return min(largest, -(-size // batch_size) * batch_size)


def places_of(sizes: NDArray[np.int64], batch_size: int) -> int:
    """Places that packed clients with so many samples take, the largest first, padding included."""
    return int(np.minimum(sizes[:1], -(-sizes // batch_size) * batch_size).sum())


def packed(
    sizes: NDArray[np.int64],
    batch_size: int,
    client_bytes: int,
    row_bytes: int,
    sample_bytes: int,
    item_count: int,
    memory: float,
) -> list[NDArray[np.int64]]:
    """Deal clients to packs of about equal size.

    Args:
        sizes: samples of each client ``[K]``, at least 1.
        batch_size: samples in a step.
        client_bytes: what a client takes, whatever the number of its samples.
        row_bytes: what an item takes that a client has touched.
        sample_bytes: what a sample of a batch takes.
        item_count: number of items.
        memory: bytes of a pack; a client that takes more is a pack of its own.

    Returns:
        Places in ``sizes`` of each pack's clients, the largest first.
    """
    order = np.argsort(-sizes, kind="stable")
    packs: list[NDArray[np.int64]] = []
    begin, largest, rows, each_bytes = 0, 0, 0, 0.0
    real = filled = touched = 0
    for end, size in enumerate(sizes[order].tolist()):
        own_rows, own_slots = min(size, item_count), slots(size, largest, batch_size)
        clients = end - begin + 1
        padding = filled + own_slots - real - size
        full = end > begin and (
            padding > max(FEW_PADDING, MAX_PADDING * (filled + own_slots))
            or touched + own_rows < (1 - MAX_ROW_PADDING) * clients * rows
            or clients * each_bytes > memory
        )
        if full:
            packs.append(order[begin:end])
        if full or end == begin:
            begin, largest, rows, own_slots = end, size, own_rows, size
            real = filled = touched = 0
            each_bytes = client_bytes + row_bytes * rows + sample_bytes * min(size, batch_size)
        real, filled, touched = real + size, filled + own_slots, touched + own_rows
    if len(order):
        packs.append(order[begin:])
    return packs
