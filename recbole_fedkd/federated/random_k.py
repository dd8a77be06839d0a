"""A codec at places that a public draw picks, the same of every client, so that what clients send adds up place by place."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.federated.encoding import Arrays, Codec, Parts, fits, register_codec, sent_shape
from recbole_fedkd.registry import setting
from recbole_fedkd.splitmix import keyed


@dataclass(frozen=True)
class RandomKSettings:
    """The key of :class:`RandomK`."""

    random_k_share: float = setting(
        0.1,
        "in (0, 1]",
        "Codec random_k: share of an array's numbers that are sent, at random places that all clients share.",
    )

    def places(self, size: int, round_index: int) -> NDArray[np.int64]:
        """Places of an array of so many numbers, ascending, that every client sends in a round; drawn by the round alone."""
        return common_places(size, math.ceil(self.random_k_share * size), round_index)


def common_places(size: int, kept: int, round_index: int) -> NDArray[np.int64]:
    """``kept`` of ``size`` places, ascending: those of the least words of a public draw."""
    words = keyed(np.arange(size, dtype=np.uint64), round_index)
    return np.sort(np.argpartition(words, kept - 1)[:kept]) if 0 < kept < size else np.arange(kept)


@register_codec
class RandomK(Codec):
    """``random_k``: the numbers at places that a public draw of the round picks, the same of every client; all others 0.

    Nobody needs to say where they are, and what clients send adds up place by place, also under masks. What is left out waits
    for its turn by error feedback (Stich, Cordonnier, Jaggi, NeurIPS 2018).
    """

    name = "random_k"
    settings_type = RandomKSettings
    parts = {"values": np.float32, "shape": np.int32, "round": np.int32}

    def encode(self, array: NDArray[np.float32], round_index: int) -> Arrays | None:
        """``values`` by ascending place, ``shape`` and ``round``, which tells the places."""
        if not array.ndim or not array.size:
            return None
        return {
            "values": array.reshape(-1)[self.settings.places(array.size, round_index)],
            "shape": np.array(array.shape, dtype=np.int32),
            "round": np.array([round_index], dtype=np.int32),
        }

    def error_bound(self, array: NDArray[np.float32]) -> float:
        """All of it, where the places are not those that count."""
        return float(np.linalg.norm(array.astype(np.float64)))

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """As it was sent; there is a place for every number."""
        values, shape = parts["values"], sent_shape(parts)
        fits(values.ndim == 1 and parts["round"].shape == (1,) and 0 < len(values) <= math.prod(shape))
        return shape

    def decode(self, parts: Parts) -> NDArray[np.float32]:
        """Zeros where nothing was sent."""
        shape, values = parts["shape"].tolist(), parts["values"]
        array = np.zeros(math.prod(shape), dtype=np.float32)
        array[common_places(array.size, len(values), int(parts["round"][0]))] = values
        return array.reshape(shape)
