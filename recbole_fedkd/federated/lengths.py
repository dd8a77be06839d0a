"""How many bytes arrays take in a message, of many clients at once, without a message being made."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Count = int | NDArray[np.int64]
"""A number, the same of every client, or ``[c]``."""


def array_bytes(name: str, code: str, shape: Sequence[Count]) -> Any:
    """Bytes of an array's entry ``name: [code, shape, bytes]`` in the MessagePack map of a message, of each or ``[c]``.

    Args:
        name: of the array.
        code: of its type, two letters.
        shape: its axes.
    """
    content: Any = np.dtype(code).itemsize * prod(shape, start=1)
    text, of_code = len(name.encode()), 1 + len(code)
    return (
        _at(text, (32, 1), (2**8, 2), (2**16, 3))
        + text
        + 1  # a list of three
        + of_code
        + map_bytes(len(shape))
        + sum(_at(axis, (2**7, 1), (2**8, 2), (2**16, 3)) for axis in shape)
        + _at(content, (2**8, 2), (2**16, 3))
        + content
    )


def map_bytes(entries: Count) -> Any:
    """Bytes that say how many entries follow in a map, or in a list."""
    return _at(entries, (16, 1), (2**16, 3))


def _at(number: Count, *steps: tuple[int, int]) -> Any:
    """The bytes of the first step that a number is below; beyond all of them, 5."""
    size: Any = 5
    for below, takes in reversed(steps):
        size = np.where(number < below, takes, size)
    return size
