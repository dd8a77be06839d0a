"""Codes of four bits, two a byte, and gaps that fit a few bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def two_a_byte(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes ``[n]`` below 16, the first of a pair in the upper half; an odd one is followed by 0."""
    padded = np.zeros(len(codes) + len(codes) % 2, dtype=np.uint8)
    padded[: len(codes)] = codes
    return np.asarray(padded[::2] * np.uint8(16) + padded[1::2], dtype=np.uint8)


def one_of_two(packed: NDArray[np.generic], count: int) -> NDArray[np.uint8]:
    """The way back from :func:`two_a_byte`: ``count`` codes."""
    codes: NDArray[np.uint8] = np.stack(np.divmod(packed.astype(np.uint8), np.uint8(16)), 1).reshape(-1)
    return codes[:count]


def bridged(places: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Ascending places with as few more in between as keep every gap (the first one from -1) within ``longest``."""
    before = np.concatenate([[-1], places[:-1]])
    missing = (places - before - 1) // longest
    start = np.repeat(before, missing)
    number = np.arange(missing.sum()) - np.repeat(np.cumsum(missing) - missing, missing) + 1
    return np.sort(np.concatenate([places, start + number * longest]))
