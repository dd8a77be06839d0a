"""Gaussian noise and choices out of the operating system's generator: no seed of a run says what they will be."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

_PARTS = 4
"""Normal numbers that are added up for one. The bits of a single one betray what it was added to (Mironov, CCS 2012); of a sum
of four they do not (Holohan, Braghin, DBSec 2021, as in opacus's secure mode)."""


def uniform(count: int) -> NDArray[np.float64]:
    """Numbers strictly between 0 and 1, ``[count]``, of 52 random bits each."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) / 2.0**52


def gaussian(shape: tuple[int, ...], deviation: float) -> NDArray[np.float64]:
    """Normal numbers of mean 0."""
    drawn = ndtri(uniform(_PARTS * int(np.prod(shape)))).reshape(_PARTS, *shape)
    return np.asarray(drawn.sum(0) * (deviation / _PARTS**0.5))
