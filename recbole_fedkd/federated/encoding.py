"""Encodings: what a codec is, and those that there are, each an array in fewer bytes and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.federated.bits import bridged, one_of_two, two_a_byte
from recbole_fedkd.registry import NoSettings, Registry, setting

Arrays = dict[str, NDArray[np.generic]]


Parts = Mapping[str, NDArray[Any]]


class Codec(ABC):
    """Turns one float32 array into arrays that take fewer bytes, and back.

    Args:
        settings: of ``settings_type``; None: its defaults.
        arrays: shell-style pattern of the names of the arrays that it takes.

    Attributes:
        name: element of the config key ``codecs``.
        settings_type: dataclass of its keys.
        lossless: whether the way back gives the array to the last bit.
        parts: name to type of the arrays that it makes.
    """

    name: str
    settings_type: type = NoSettings
    lossless = False
    parts: Mapping[str, type[np.generic]]

    def __init__(self, settings: Any = None, arrays: str = "*") -> None:
        self.settings = settings if settings is not None else self.settings_type()
        self.arrays = arrays

    @abstractmethod
    def encode(self, array: NDArray[np.float32], round_index: int) -> Arrays | None:
        """Parts by name; None for an array that it cannot take. Whether they are worth it is the stack's affair.

        Args:
            array: of any shape.
            round_index: from 0, for what changes from round to round in a way that both ends know.
        """

    @abstractmethod
    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """The shape that parts decode to, read without making room for it; arguments as of :meth:`decode`.

        Raises:
            ValueError: the parts do not fit each other.
        """

    @abstractmethod
    def decode(self, parts: Parts) -> NDArray[np.float32]:
        """The array, of the shape it had; the parts are of the codec's types and :meth:`shape_of` has seen them."""

    def error_bound(self, array: NDArray[np.float32]) -> float:
        """L2 norm at most of what the way there and back takes from an array of round 0; infinite where nothing is promised."""
        return 0.0 if self.lossless else math.inf

    def checked(self, parts: Parts, limit: float) -> NDArray[np.float32]:
        """The array of parts that anybody may have sent.

        Args:
            parts: by name.
            limit: numbers that it may hold at most.

        Raises:
            ValueError: the parts are not this codec's, or the array would be larger.
        """
        if parts.keys() != self.parts.keys():
            raise ValueError(f"{self.name} makes {', '.join(self.parts)}; {', '.join(sorted(parts))} came")
        for name, dtype in self.parts.items():
            if parts[name].dtype != dtype:
                raise ValueError(f"'{name}' of {self.name} is of type {parts[name].dtype}")
        size = math.prod(self.shape_of(parts))
        if size > limit:
            raise ValueError(f"{self.name} declares {size} numbers where there can be {limit:g} at most")
        return self.decode(parts)


CODECS: Registry[type[Codec]] = Registry("codec", "codecs")
register_codec = CODECS.register


@register_codec
class HalfPrecision(Codec):
    """``fp16``: 2 bytes a number, 11 bits of it; an array that holds a number beyond 65504 stays as it is."""

    name = "fp16"
    parts = {"half": np.float16}

    def encode(self, array: NDArray[np.float32], round_index: int) -> Arrays | None:
        """``half``, of the same shape; None for numbers that would become another order of magnitude."""
        if array.size and float(np.abs(array).max()) > float(np.finfo(np.float16).max):
            return None
        return {"half": array.astype(np.float16)}

    def error_bound(self, array: NDArray[np.float32]) -> float:
        """Half of the last of 11 bits, or of the least number that there is."""
        return float(np.linalg.norm(np.abs(array.astype(np.float64)) * 2.0**-11 + 2.0**-25))

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """As it came."""
        return parts["half"].shape

    def decode(self, parts: Parts) -> NDArray[np.float32]:
        """The nearest floats."""
        return parts["half"].astype(np.float32)


@register_codec
class EightBits(Codec):
    """``int8``: 1 byte a number and one scale a row, ``x = code * scale`` with ``scale = max |x| / 127`` over the row.

    A row is what the last axis holds, such as one embedding; the error is at most half a scale.
    """

    name = "int8"
    parts = {"codes": np.int8, "scales": np.float32}

    def encode(self, array: NDArray[np.float32], round_index: int) -> Arrays | None:
        """``codes`` of the same shape and ``scales`` ``[..., 1]``."""
        if not array.ndim or not array.size:
            return None
        scales = np.abs(array).max(-1, keepdims=True) / np.float32(127)
        codes = np.rint(array / np.where(scales > 0, scales, np.float32(1)))
        return {"codes": codes.astype(np.int8), "scales": scales.astype(np.float32)}

    def error_bound(self, array: NDArray[np.float32]) -> float:
        """Half a scale a number."""
        halves = np.abs(array.astype(np.float64)).max(-1) / 254
        return float(np.linalg.norm(halves) * math.sqrt(array.shape[-1]) * (1 + 1e-5))

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """That of the codes."""
        codes, scales = parts["codes"], parts["scales"]
        fits(codes.ndim > 0 and scales.shape == (*codes.shape[:-1], 1))
        return codes.shape

    def decode(self, parts: Parts) -> NDArray[np.float32]:
        """Codes times scales."""
        return np.asarray(parts["codes"].astype(np.float32) * parts["scales"])


@register_codec
class FourBits(Codec):
    """``int4``: 4 bits a number, ``x = code * magnitude / 7``, and 4 bits a row for a bound on its largest magnitude.

    A row is as for :class:`Sign`; the error is at most half a step, a fourteenth of the bound.
    """

    name = "int4"
    parts = {"codes": np.uint8, "steps": np.uint8, "largest": np.float32, "shape": np.int32}

    def encode(self, array: NDArray[np.float32], round_index: int) -> Arrays | None:
        """``codes`` (two numbers a byte, each plus 8), ``steps`` and ``largest`` (see :func:`stepped`) and ``shape``."""
        if not array.ndim or not array.size:
            return None
        rows = _rows(array)
        parts = stepped(np.abs(rows).max(1).astype(np.float64), np.floor)
        magnitudes = magnitudes_of(parts, len(rows))[:, None]
        codes = np.rint(rows / np.where(magnitudes > 0, magnitudes, np.float32(np.inf)) * 7).clip(-7, 7)
        return {
            "codes": two_a_byte((codes.reshape(-1) + 8).astype(np.uint8)),
            **parts,
            "shape": np.array(array.shape, dtype=np.int32),
        }

    def error_bound(self, array: NDArray[np.float32]) -> float:
        """A fourteenth of a bound that is up to sqrt(2) too large a number; rows far below the largest become 0."""
        rows = _rows(array).astype(np.float64)
        most, norms = np.abs(rows).max(1), np.linalg.norm(rows, axis=1)
        steps = most * math.sqrt(2) / 14 * math.sqrt(rows.shape[1])
        return float(
            np.linalg.norm(np.where(most < most.max() * 2.0**-7, np.maximum(steps, norms), steps)) * (1 + 1e-5)
        )

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """As it was sent; there is half a byte for every number and a step for every row."""
        return _shape_with_steps(parts, parts["codes"], 2)

    def decode(self, parts: Parts) -> NDArray[np.float32]:
        """Codes times a seventh of the bound of their row."""
        shape = parts["shape"].tolist()
        magnitudes = magnitudes_of(parts, shape[0] if len(shape) > 1 else 1)
        codes = one_of_two(parts["codes"], math.prod(shape)).astype(np.float32) - 8
        return np.asarray((codes.reshape(len(magnitudes), -1) * (magnitudes[:, None] / 7)).reshape(shape))


@register_codec
class RowSparse(Codec):
    """``row_sparse``: rows that are all zero are left out, such as items that a client has not met. Lossless."""

    name = "row_sparse"
    lossless = True
    parts = {"present": np.uint8, "values": np.float32, "count": np.int32}

    def encode(self, array: NDArray[np.float32], round_index: int) -> Arrays | None:
        """``present`` (a bit a row, packed), ``values`` and ``count`` (of all rows); None for a vector."""
        if array.ndim < 2 or not array.size:
            return None
        # A negative zero is a number too.
        present = (array.reshape(len(array), -1).view(np.uint32) != 0).any(1)
        count = np.array([len(array)], dtype=np.int32)
        return {"present": np.packbits(present), "values": array[present], "count": count}

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """As many rows as were counted, as long as those that came."""
        present, values = parts["present"], parts["values"]
        fits(parts["count"].shape == (1,) and values.ndim > 1 and present.ndim == 1)
        count = int(parts["count"][0])
        fits(count >= 0 and len(present) == -(-count // 8))
        fits(len(values) == int(np.unpackbits(present, count=count).sum()))
        return (count, *values.shape[1:])

    def decode(self, parts: Parts) -> NDArray[np.float32]:
        """Zeros where a row was left out."""
        array = np.zeros(shape := self.shape_of(parts), dtype=np.float32)
        array[np.unpackbits(parts["present"], count=shape[0]).astype(bool)] = parts["values"]
        return array


@dataclass(frozen=True)
class LowRankSettings:
    """The keys of :class:`LowRank`."""

    low_rank_start: float = setting(
        0.9, "in (0, 1]", "Codec low_rank: share of the energy that it keeps in the first round."
    )
    low_rank_end: float = setting(0.98, "in (0, 1]", "Codec low_rank: the share from round low_rank_rounds on.")
    low_rank_rounds: int = setting(20, ">= 1", "Codec low_rank: rounds in which the share goes from start to end.")


@register_codec
class LowRank(Codec):
    """``low_rank``: the leading singular vectors of a matrix, as many as hold a share of its energy (FedKD, eq. 8-9).

    The share grows over the rounds, ``T(t) = T_start + (T_end - T_start) t``: updates are large and simple first, small and
    varied later. An array of more axes is a matrix of its first axis by all others.
    """

    name = "low_rank"
    settings_type = LowRankSettings
    parts = {"left": np.float32, "right": np.float32, "shape": np.int32}

    def encode(self, array: NDArray[np.float32], round_index: int) -> Arrays | None:
        """``left`` ``[n, r]`` (times the singular values), ``right`` ``[r, m]`` and ``shape``; None for a vector."""
        # Of a matrix with an infinity the decomposition never ends; as it is, whoever reads it refuses it.
        if array.ndim < 2 or not array.size or not np.isfinite(array).all():
            return None
        matrix = array.reshape(len(array), -1)
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        rank = energy_rank(values, self.energy(round_index))
        return {
            "left": np.ascontiguousarray(left[:, :rank] * values[:rank]),
            "right": np.ascontiguousarray(right[:rank]),
            "shape": np.array(array.shape, dtype=np.int32),
        }

    def error_bound(self, array: NDArray[np.float32]) -> float:
        """What the first round's share of the energy leaves out."""
        return float(np.linalg.norm(array.astype(np.float64)) * math.sqrt(1 - self.energy(0) + 1e-5))

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """As it was sent; the product of the factors has as many numbers."""
        left, right, shape = parts["left"], parts["right"], sent_shape(parts)
        fits(left.ndim == 2 and right.ndim == 2 and left.shape[1] == right.shape[0] and len(shape) > 1)
        fits((len(left), right.shape[1]) == (shape[0], math.prod(shape[1:])))
        return shape

    def decode(self, parts: Parts) -> NDArray[np.float32]:
        """The product."""
        product: NDArray[np.float32] = parts["left"] @ parts["right"]
        return product.reshape(parts["shape"].tolist())

    def energy(self, round_index: int) -> float:
        """The share ``T`` of a round."""
        settings = self.settings
        passed = min(1.0, round_index / max(1, settings.low_rank_rounds - 1))
        return float(settings.low_rank_start + (settings.low_rank_end - settings.low_rank_start) * passed)


def energy_rank(values: NDArray[np.floating], share: float) -> int:
    """The fewest leading singular values whose squares hold ``share`` of the sum of all squares; 0 if that is 0."""
    energy = np.cumsum(values.astype(np.float64) ** 2)
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1 if energy[-1] > 0 else 0


@dataclass(frozen=True)
class TopKSettings:
    """The key of :class:`TopK`."""

    top_k_share: float = setting(
        0.05, "in (0, 1]", "Codec top_k: share of an array's numbers that are sent, those of largest magnitude."
    )


@register_codec
class TopK(Codec):
    """``top_k``: the numbers of largest magnitude, all others 0.

    Where they stand is told by gaps of one byte; a longer gap is bridged by sending a number in between as well.
    """

    name = "top_k"
    settings_type = TopKSettings
    parts = {"gaps": np.uint8, "values": np.float32, "shape": np.int32}

    def encode(self, array: NDArray[np.float32], round_index: int) -> Arrays | None:
        """``gaps`` (places from one number to the next), ``values`` and ``shape``."""
        if not array.ndim or not array.size:
            return None
        flat = array.reshape(-1)
        kept = int(np.ceil(self.settings.top_k_share * flat.size))
        places = np.sort(np.argpartition(np.abs(flat), flat.size - kept)[flat.size - kept :])
        places = bridged(places, 255)
        gaps = np.diff(places, prepend=-1).astype(np.uint8)
        return {"gaps": gaps, "values": flat[places], "shape": np.array(array.shape, dtype=np.int32)}

    def error_bound(self, array: NDArray[np.float32]) -> float:
        """The largest numbers hold at least their share of the energy."""
        return float(np.linalg.norm(array.astype(np.float64)) * math.sqrt(1 - self.settings.top_k_share + 1e-9))

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """As it was sent; every place is one of it, and no place comes twice."""
        gaps, shape = parts["gaps"], sent_shape(parts)
        fits(gaps.ndim == 1 and gaps.shape == parts["values"].shape and bool(gaps.all()))
        fits(int(gaps.sum(dtype=np.int64)) <= math.prod(shape))
        return shape

    def decode(self, parts: Parts) -> NDArray[np.float32]:
        """Zeros where nothing was sent."""
        shape = parts["shape"].tolist()
        array = np.zeros(math.prod(shape), dtype=np.float32)
        array[np.cumsum(parts["gaps"].astype(np.int64)) - 1] = parts["values"]
        return array.reshape(shape)


@register_codec
class Sign(Codec):
    """``sign``: 1 bit a number, its sign, and 4 bits a row for its mean magnitude (scaled sign: Karimireddy et al., ICML 2019).

    A row is all that belongs to one index of the first axis, such as one embedding; a vector is one row.
    """

    name = "sign"
    parts = {"signs": np.uint8, "steps": np.uint8, "largest": np.float32, "shape": np.int32}

    def encode(self, array: NDArray[np.float32], round_index: int) -> Arrays | None:
        """``signs`` (bits, packed), ``steps`` and ``largest`` (see :func:`stepped`) and ``shape``."""
        if not array.ndim or not array.size:
            return None
        rows = _rows(array)
        return {
            "signs": np.packbits(rows > 0),
            **stepped(np.abs(rows).mean(1, dtype=np.float64), np.rint),
            "shape": np.array(array.shape, dtype=np.int32),
        }

    def error_bound(self, array: NDArray[np.float32]) -> float:
        """A number of a row's mean magnitude, or up to a fifth off it, is no farther from the row than 0 is."""
        return float(np.linalg.norm(array.astype(np.float64)) * (1 + 1e-5))

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """As it was sent; there is a bit for every number and a step for every row."""
        return _shape_with_steps(parts, parts["signs"], 8)

    def decode(self, parts: Parts) -> NDArray[np.float32]:
        """Every number of a row is its magnitude, up or down."""
        shape = parts["shape"].tolist()
        magnitudes = magnitudes_of(parts, shape[0] if len(shape) > 1 else 1)
        bits = np.unpackbits(parts["signs"], count=math.prod(shape))
        signs = bits.astype(np.float32) * 2 - 1
        return np.asarray((signs.reshape(len(magnitudes), -1) * magnitudes[:, None]).reshape(shape))


LOWEST = 15
"""The step that stands for a magnitude of 0."""


def stepped(magnitudes: NDArray[np.float64], rounding: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Arrays:
    """Magnitudes ``[n]`` in 4 bits each: how many steps of ``sqrt(2)`` each is below the largest.

    Args:
        magnitudes: not negative; one that is more than 14 steps below the largest counts as 0.
        rounding: makes whole steps of fractions of one; ``floor`` never tells less than what is.

    Returns:
        ``steps`` (two a byte) and ``largest`` ``[1]``.
    """
    largest = magnitudes.max()
    steps = steps_below(magnitudes, largest, rounding)
    return {"steps": two_a_byte(steps), "largest": np.array([largest], dtype=np.float32)}


def steps_below(
    magnitudes: NDArray[np.float64], largest: Any, rounding: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.uint8]:
    """Steps of ``sqrt(2)`` that magnitudes ``[n]`` are below the largest, one or ``[n]``; at most :data:`LOWEST`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        below = rounding(-2 * np.log2(magnitudes / largest))
    return np.where(below < LOWEST, below, LOWEST).astype(np.uint8)  # nan and infinity are not less


def magnitudes_of(parts: Parts, count: int) -> NDArray[np.float32]:
    """The way back from :func:`stepped`: magnitudes ``[count]``."""
    steps = one_of_two(parts["steps"], count).astype(float)
    largest: np.float32 = parts["largest"][0]
    return np.where(steps == LOWEST, 0.0, largest * 2.0 ** (-steps / 2)).astype(np.float32)


def fits(true: bool) -> None:
    """Raise :class:`ValueError` for parts of which something is not true."""
    if not true:
        raise ValueError("its parts do not fit each other")


def sent_shape(parts: Parts) -> tuple[int, ...]:
    """The shape that a codec has sent along."""
    shape = parts["shape"]
    fits(shape.ndim == 1 and 0 < len(shape) <= 32 and bool((shape >= 0).all()))
    return tuple(shape.tolist())


def _shape_with_steps(parts: Parts, codes: NDArray[Any], codes_a_byte: int) -> tuple[int, ...]:
    """The shape sent along, if there are as many codes and steps as it asks for."""
    shape, largest, steps = sent_shape(parts), parts["largest"], parts["steps"]
    size, rows = math.prod(shape), shape[0] if len(shape) > 1 else 1
    fits(largest.shape == (1,) and codes.shape == (-(-size // codes_a_byte),) and steps.shape == (-(-rows // 2),))
    fits(size > 0)
    return shape


def _rows(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return array.reshape(len(array) if array.ndim > 1 else 1, -1)
