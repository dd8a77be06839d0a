"""Codecs: float arrays of a message in fewer bytes. They stack in the order of the config, on any strategy's messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.federated import random_k as _random_k  # noqa: F401  (registers its codec)
from recbole_fedkd.federated.encoding import CODECS, Arrays, Codec
from recbole_fedkd.registry import read_settings, registries, setting

UNFOLDED = 4096
"""Numbers that a byte may stand for where nobody knows how large an array is."""

HEADER_BYTES = 24


@dataclass(frozen=True)
class WireSettings:
    """The keys of the wire."""

    codecs: list[str] = setting(
        [],
        "each, if any, one of <codecs>",
        "Encodings of messages, stacked in this order; fp16, int8 (one scale a row), row_sparse (lossless), int4 (half a byte "
        "a number), low_rank, top_k, sign (1 bit a number), random_k (at places that all clients share). With any, a network "
        "travels as what changed of it.",
        roles="said",
    )
    broadcast_codecs: list[str] | None = setting(
        None,
        "each, if any, one of <codecs>",
        "Encodings of what the server says; not set: those of codecs.",
    )
    codec_arrays: dict[str, str] = setting(
        {},
        "",
        "Which arrays a codec takes, a shell-style pattern of their names, such as {int4: 'product_*'}; codecs that are not "
        "named take any.",
    )
    stages: list[str] = setting(
        ["codecs"],
        "each, if any, one of <stages>",
        "What a client's message passes on its way to the wire, in this order. With more than the codecs, a network travels as "
        "what changed of it.",
        roles="said students",
    )
    error_feedback: bool = setting(True, "", "What encoding takes from a client's update is added to its next one.")


@dataclass(frozen=True)
class CodecStack:
    """Codecs one after the other: each takes what float32 arrays the one before has left.

    Attributes:
        codecs: in the order of encoding.
    """

    codecs: tuple[Codec, ...] = ()

    @staticmethod
    def of(names: Sequence[str], config: Any) -> CodecStack:
        """The stack of some codecs, with their keys in a config or any mapping."""
        arrays = read_settings(WireSettings, config).codec_arrays
        kinds = [CODECS[name] for name in names]
        return CodecStack(
            tuple(kind(read_settings(kind.settings_type, config), arrays.get(kind.name, "*")) for kind in kinds)
        )

    @property
    def lossless(self) -> bool:
        """Whether the way back gives all arrays to the last bit."""
        return all(codec.lossless for codec in self.codecs)

    def encode(self, arrays: Mapping[str, NDArray[np.generic]], round_index: int) -> Arrays:
        """Float32 arrays become ``<name>|<position in the stack>.<part>``; all others stay."""
        encoded = dict(arrays)
        for position, codec in enumerate(self.codecs):
            following: Arrays = {}
            for name, array in encoded.items():
                taken = array.dtype == np.float32 and fnmatchcase(name.partition("|")[0], codec.arrays)
                parts = codec.encode(array, round_index) if taken else None  # type: ignore[arg-type]
                if parts is not None and _bytes(parts.values()) < _bytes([array]):
                    following.update({f"{name}|{position}.{part}": value for part, value in parts.items()})
                else:
                    following[name] = array
            encoded = following
        return encoded

    def decode(self, arrays: Mapping[str, NDArray[np.generic]], sizes: Mapping[str, int] | None = None) -> Arrays:
        """The way back.

        Args:
            arrays: as :meth:`encode` made them, or anything that somebody has sent.
            sizes: the numbers in each array, before it was encoded; None: not known.

        Raises:
            ValueError: the arrays are not what the stack makes, or larger; nothing larger is allocated.
        """
        # Codecs keep parts that take fewer bytes, so that no part has more numbers than the whole.
        unknown = UNFOLDED * sum(array.nbytes for array in arrays.values())
        decoded = dict(arrays)
        for position in reversed(range(len(self.codecs))):
            parts: dict[str, Arrays] = {}
            following: Arrays = {}
            for name, array in decoded.items():
                whole, mark, part = name.rpartition(f"|{position}.")
                if mark and "|" not in part:
                    parts.setdefault(whole, {})[part] = array
                else:
                    following[name] = array
            for whole, own in parts.items():
                root = whole.partition("|")[0]
                if sizes is not None and root not in sizes:
                    raise ValueError("an array came that was not asked for")
                if whole in following:
                    raise ValueError("an array came twice")
                limit = sizes[root] if sizes is not None else unknown
                following[whole] = self.codecs[position].checked(own, limit)
            decoded = following
        return {name: decoded[name] for name in sorted(decoded)} if self.codecs else decoded


@dataclass(frozen=True)
class WireCodecs:
    """What both ends of the wire know of the messages between them.

    Attributes:
        up: codecs of what clients say.
        down: of what the server says.
        stages: what a client's message passes, by name or as a class, with its settings; the stage ``codecs`` is ``up``.
    """

    up: CodecStack = CodecStack()
    down: CodecStack = CodecStack()
    stages: tuple[tuple[Any, Any], ...] = (("codecs", None),)

    @staticmethod
    def of(config: Any) -> WireCodecs:
        """What a config names."""
        wire, known = read_settings(WireSettings, config), registries()["stages"].settings
        down = wire.codecs if wire.broadcast_codecs is None else wire.broadcast_codecs
        stages: tuple[tuple[str, Any], ...] = tuple((name, read_settings(known[name], config)) for name in wire.stages)
        return WireCodecs(CodecStack.of(wire.codecs, config), CodecStack.of(down, config), stages)

    @property
    def changes_uploads(self) -> bool:
        """Whether anything happens to a message between a client and the wire."""
        return bool(self.up.codecs) or any(name != "codecs" for name, _ in self.stages)

    def __bool__(self) -> bool:
        """Whether anything happens to a message between a client and the server, in either direction."""
        return bool(self.down.codecs) or self.changes_uploads


def _bytes(arrays: Iterable[NDArray[np.generic]]) -> int:
    """What arrays take in a message, with about what their names, types and shapes do."""
    return sum(array.nbytes + HEADER_BYTES for array in arrays)


_AT_A_TIME = 1 << 16


def squared_error(
    before: Mapping[str, NDArray[np.generic]], after: Mapping[str, NDArray[np.generic]]
) -> tuple[float, float]:
    """Squared L2 norm of what the way there and back changed in float arrays, and of the arrays themselves."""
    lost, whole = 0.0, 0.0
    for name, array in before.items():
        if array.dtype == np.float32:
            # Parts that stay in the processor's cache: three times as fast as double copies of millions of numbers.
            for begin in range(0, array.size, _AT_A_TIME):
                exact, seen = (
                    values.reshape(-1)[begin : begin + _AT_A_TIME].astype(np.float64) for values in (array, after[name])
                )
                lost += float(((seen - exact) ** 2).sum())
                whole += float((exact**2).sum())
    return lost, whole
