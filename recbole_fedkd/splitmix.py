"""Random words that depend on numbers alone, whoever asks and when: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
MIXING, LAST_SHIFT = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31
"""Of its output function."""


def mixed(words: Words) -> Words:
    """Its output function, in place."""
    for shift, factor in MIXING:
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(LAST_SHIFT)
    return words


def keyed(words: Words, *numbers: Words | int) -> Words:
    """Words ``[...]`` that depend on one number after the other as well; each a whole number or words of the same shape."""
    for number in numbers:
        own = number if isinstance(number, np.ndarray) else np.uint64(number % 2**64)
        words = mixed((words ^ own) + np.uint64(GOLDEN))
    return words
