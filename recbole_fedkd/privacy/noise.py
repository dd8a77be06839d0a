"""Gaussian noise and choices out of the operating system's generator: no seed of a run says what they will be."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from recbole_fedkd.federated.clipping import ClipSettings
from recbole_fedkd.federated.message import Message, Schema, check_arrays
from recbole_fedkd.federated.stage import Arrays, Clip

_PARTS = 4
"""Normal numbers that are added up for one. The bits of a single one betray what it was added to (Mironov, CCS 2012); of a sum
of four they do not (Holohan, Braghin, DBSec 2021, as in opacus's secure mode)."""


def uniform(count: int) -> NDArray[np.float64]:
    """Numbers strictly between 0 and 1, ``[count]``, of 52 random bits each."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) / 2.0**52


def gaussian(shape: tuple[int, ...], deviation: float) -> NDArray[np.float64]:
    """Normal numbers of mean 0."""
    drawn = ndtri(uniform(_PARTS * math.prod(shape))).reshape(_PARTS, *shape)
    return np.asarray(drawn.sum(0) * (deviation / _PARTS**0.5))


def discrete_gaussian(count: int, deviation: float) -> NDArray[np.int64]:
    """Whole numbers ``[count]`` with probabilities that fall like ``exp(-x^2 / (2 deviation^2))``.

    Drawn from discrete Laplace numbers and taken by coins (Canonne, Kamath, Steinke, NeurIPS 2020, algorithm 3), with coins of
    52 bits. Sums of them are near to discrete Gaussian numbers (Kairouz, Liu, Steinke, ICML 2021), whatever is masked.
    """
    taken: list[NDArray[np.int64]] = []
    scale, left = int(deviation) + 1, count
    while left > 0 and deviation > 0:
        some = 2 * left + 16
        below = _below(scale, some)
        below = below[uniform(some) < np.exp(-below / scale)]
        whole = below + scale * np.floor(-np.log(uniform(len(below)))).astype(np.int64)
        negative = uniform(len(whole)) < 0.5
        whole = np.where(negative, -whole, whole)[~(negative & (whole == 0))]
        coins = uniform(len(whole))
        kept = whole[coins < np.exp(-((np.abs(whole) - deviation**2 / scale) ** 2) / (2 * deviation**2))][:left]
        taken.append(kept)
        left -= len(kept)
    return np.concatenate(taken) if taken else np.zeros(count, np.int64)


def _below(bound: int, count: int) -> NDArray[np.int64]:
    """Whole numbers from 0 to ``bound - 1``, each as probable as any other."""
    most = 2**63 // bound * bound
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        bits = (np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(1)).astype(np.int64)
        drawn = np.concatenate([drawn, bits[bits < most] % bound])
    return drawn[:count]


@dataclass(frozen=True)
class LocalSettings(ClipSettings):
    """What a client shortens its message to, and its noise in units of that."""

    noise_multiplier: float = 1.0


class LocalNoise(Clip):
    """A message no longer than a bound, and noise on it before it leaves its client; counts are rounded, and not below 0."""

    name = "local_noise"
    settings: LocalSettings

    def encode(self, message: Message) -> Message:
        """Shortened, with noise."""
        arrays: Arrays = {}
        for name, array in super().encode(message).arrays.items():
            arrays[name] = array
            if array.dtype.kind in "fiu":
                noise = gaussian(array.shape, self.settings.noise_multiplier * self.settings.norm_of(name))
                noised = array.astype(np.float64) + noise
                arrays[name] = (noised if array.dtype.kind == "f" else np.rint(noised).clip(0)).astype(array.dtype)
        return replace(message, arrays=arrays)

    def decode(self, message: Message, schema: Schema | None) -> Message:
        """As it came: noise makes a message longer than its bound, so that nobody can hold it against that."""
        check_arrays(message.arrays, schema)
        return message
