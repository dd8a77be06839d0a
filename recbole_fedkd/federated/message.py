"""Messages: the only thing that crosses between client and server, and the bytes it takes on the wire.

The wire format is one MessagePack map ``{v: schema version, k: kind, r: round, s: sender, a: {name: [dtype, shape, bytes]}}``,
arrays little-endian in C order. A client's message also says ``t``, what it trained on (16 bytes, see :class:`Training`), and
``e``, what encoding took from it, where that is not 0. Nothing is pickled, so reading a message runs no code; and nothing is
allocated that the message does not hold.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.errors import printable
from recbole_fedkd.federated.codec import CodecStack

SCHEMA_VERSION = 2
SERVER = -1
"""Sender of the server's messages; clients are numbered from 0."""

LARGEST = 1e19
"""Larger numbers are not taken: single precision does not hold their squares."""

_ALLOWED = {"f4": "<f4", "f8": "<f8", "i4": "<i4", "i8": "<i8", "u1": "|u1", "b1": "|b1", "f2": "<f2", "i1": "|i1"}
_MOST_AXES, _MOST_ARRAYS = 32, 2**14
"""Of a message; room is made for all of its arrays before anybody holds their names against what was asked for."""
_TRAINING = struct.Struct("<IId")
_ERROR = struct.Struct("<dd")

Arrays = Mapping[str, NDArray[np.generic]]


class MessageError(ValueError):
    """A message that is not taken.

    Args:
        fault: what kind of fault it is, in a word or two: ``malformed``, ``sender``, ``round``, ``kind``, ``arrays``,
            ``not finite``, ``counts``, ``numbers``, ``version``, ``doubled`` or ``silent``.
        detail: what was found, and what was expected.
    """

    def __init__(self, fault: str, detail: str) -> None:
        self.fault = printable(fault)  # either may quote whoever has sent it
        super().__init__(f"{self.fault}: {printable(detail)}")


class Training(NamedTuple):
    """What a client has trained on.

    Attributes:
        samples: of an epoch of the client, by which a mean over clients is weighted.
        seen: samples of its last local epoch, drawn negatives included.
        loss: summed over them.
    """

    samples: int = 0
    seen: int = 0
    loss: float = 0.0


UNTRAINED = Training()


class ArraySpec(NamedTuple):
    """What one array of a message must be.

    Attributes:
        shape: its shape.
        dtype: its type.
        counts: whether it holds counts: none negative, and not all 0 unless ``empty``.
        empty: whether counts may all be 0.
        optional: whether it may be left out.
    """

    shape: tuple[int, ...]
    dtype: type[np.generic] = np.float32
    counts: bool = False
    optional: bool = False
    empty: bool = False


@dataclass(frozen=True)
class Schema:
    """What a message of one kind must hold, known to its reader before it comes.

    Attributes:
        kind: the message's.
        arrays: by name.
        largest: no number of theirs may be larger; what is added up may hold as many times less as there are parts.
    """

    kind: str
    arrays: Mapping[str, ArraySpec]
    largest: float = LARGEST

    @property
    def may_be_silent(self) -> bool:
        """Whether a sender may have nothing to say."""
        return all(spec.optional for spec in self.arrays.values())


@dataclass(frozen=True)
class Message:
    """A typed set of named arrays.

    Attributes:
        kind: what the arrays mean, such as ``label_knowledge``.
        round: communication round, from 0.
        sender: client number, or ``SERVER``.
        arrays: name to array; the names and shapes are the strategy's contract for the kind.
        training: what a client has trained on; the server's messages do not say it.
        codec_error: squared L2 norm of what encoding took from the arrays, and of the arrays themselves.
    """

    kind: str
    round: int
    sender: int
    arrays: Arrays
    training: Training = UNTRAINED
    codec_error: tuple[float, float] = (0.0, 0.0)

    def to_bytes(self) -> bytes:
        """Serialise. Raises :class:`MessageError` for an array whose dtype the schema does not carry."""
        packed = {}
        for name, array in self.arrays.items():
            code = array.dtype.str[1:]
            if code not in _ALLOWED:
                raise MessageError(
                    "arrays", f"'{name}' has dtype {array.dtype}; a message carries {', '.join(_ALLOWED)}"
                )
            little_endian = np.ascontiguousarray(array, dtype=_ALLOWED[code])
            packed[name] = [code, list(array.shape), little_endian.tobytes()]
        content: dict[str, Any] = {"v": SCHEMA_VERSION, "k": self.kind, "r": self.round, "s": self.sender, "a": packed}
        if self.sender != SERVER:
            content["t"] = _TRAINING.pack(*self.training)
            if any(self.codec_error):
                content["e"] = _ERROR.pack(*self.codec_error)
        payload: bytes = msgpack.packb(content, use_bin_type=True)
        return payload

    @staticmethod
    def from_bytes(payload: bytes) -> Message:
        """Read a message of a ``payload``; its arrays are views of these bytes.

        Raises:
            MessageError: anything that :meth:`to_bytes` did not write; no other error, whatever the bytes are.
        """
        try:
            content = msgpack.unpackb(
                payload,
                raw=False,
                object_pairs_hook=_distinct,
                # Room is made for a list before its elements are read, inside of each other up to a thousand times.
                max_array_len=_MOST_AXES,
                # An array takes nine bytes at least, and maps lie inside of each other as lists do.
                max_map_len=min(_MOST_ARRAYS, max(16, _length(payload) // 8)),
                max_ext_len=0,
            )
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
            reason = str(error) or type(error).__name__
            raise MessageError("malformed", f"{_length(payload)} bytes are not a message: {reason}") from error
        if not isinstance(content, dict) or "v" not in content:
            raise MessageError("malformed", "the bytes hold no message: the schema version is missing")
        if type(content["v"]) is not int or content["v"] != SCHEMA_VERSION:
            version = content["v"] if type(content["v"]) is int else f"of type {type(content['v']).__name__}"
            raise MessageError(
                "malformed", f"message has schema version {version}; this version reads {SCHEMA_VERSION}"
            )
        try:
            return _read(content)
        except MessageError:
            raise
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise MessageError("malformed", f"message is malformed: {error}") from error


def _length(payload: object) -> int:
    return len(payload) if isinstance(payload, bytes | bytearray | memoryview) else 0


def _distinct(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands twice in it")
    return content


def _read(content: dict[str, Any]) -> Message:
    """The message of an unpacked map; raises what comes for one that is not as :meth:`Message.to_bytes` writes it."""
    extra = content.keys() - {"v", "k", "r", "s", "a", "t", "e"}
    if extra:
        raise ValueError("it has parts that no message has")
    kind, number, sender, packed = content["k"], content["r"], content["s"], content["a"]
    if type(kind) is not str or type(number) is not int or type(sender) is not int or not isinstance(packed, dict):
        raise ValueError("kind, round, sender or arrays are of another type")
    if number < 0 or sender < SERVER:
        raise ValueError("round or sender is negative")
    training, error = UNTRAINED, (0.0, 0.0)
    if sender != SERVER:
        training = Training(*_TRAINING.unpack(_raw(content["t"])))
        if "e" in content:
            error = _ERROR.unpack(_raw(content["e"]))
        check_told(training, error)
    elif "t" in content or "e" in content:
        raise ValueError("the server trains on nothing")
    return Message(kind, number, sender, {name: _array(name, entry) for name, entry in packed.items()}, training, error)


def _raw(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("bytes are missing")
    return value


def _array(name: Any, entry: Any) -> NDArray[np.generic]:
    code, shape, raw = entry
    if type(name) is not str or type(code) is not str or code not in _ALLOWED or type(shape) is not list:
        raise ValueError("an array has no name, no type or no shape")
    if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise ValueError(f"array '{name}' has a shape that is none")
    dtype = np.dtype(_ALLOWED[code])
    if math.prod(shape) * dtype.itemsize != len(_raw(raw)):
        raise ValueError(f"array '{name}' has {len(raw)} bytes for shape {shape} of {dtype}")
    if code == "b1" and raw.translate(None, b"\0\1"):
        raise ValueError(f"array '{name}' holds truth values that are neither")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def without_arrays(message: Message) -> Message:
    """What a message says of itself: its arrays' names alone."""
    return replace(message, arrays={name: np.zeros(0, np.int8) for name in message.arrays})


def check_told(training: Training, codec_error: tuple[float, float]) -> None:
    """Raise :class:`MessageError` for a loss or a codec error that is none; arguments as of :class:`Message`."""
    if not np.isfinite([training.loss, *codec_error]).all() or min(codec_error) < 0:
        raise MessageError("not finite", f"loss {training.loss}, codec error {codec_error}")


def check_kind(message: Message, schema: Schema | None) -> None:
    """Raise :class:`MessageError` for a message of another kind than was asked for."""
    if schema is not None and message.kind != schema.kind:
        raise MessageError("kind", f"'{_shortened(message.kind)}' came where '{schema.kind}' was due")


def decoded(message: Message, codecs: CodecStack, schema: Schema | None = None) -> Message:
    """A message as it was before its sender encoded it.

    Args:
        message: as it came.
        codecs: its sender's.
        schema: what it must be; None: not known, then an array may unfold to a few thousand times its bytes at most.

    Raises:
        MessageError: the arrays are not what these codecs make, or not what was asked for.
    """
    check_kind(message, schema)
    if codecs.codecs:
        sizes = None if schema is None else {name: math.prod(spec.shape) for name, spec in schema.arrays.items()}
        try:
            with np.errstate(all="ignore"):
                message = replace(message, arrays=codecs.decode(message.arrays, sizes))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            detail = f"message '{_shortened(message.kind)}' cannot be decoded: {error}"
            raise MessageError("arrays", detail) from error
    check_arrays(message.arrays, schema)
    return message


def check_arrays(arrays: Arrays, schema: Schema | None = None, largest: float = LARGEST) -> None:
    """Raise :class:`MessageError` for arrays that are not what the schema asks for, or that are not finite when squared.

    Args:
        arrays: by name.
        schema: what they must be; None: not known.
        largest: as of a schema, where none is known.
    """
    specs, bound = (schema.arrays, schema.largest) if schema is not None else ({}, largest)
    if schema is not None:
        check_names(arrays, schema)
    for name, array in arrays.items():
        spec = specs.get(name)
        if spec is not None and (array.shape != spec.shape or array.dtype != spec.dtype):
            due = f"{list(spec.shape)} of {np.dtype(spec.dtype)}"
            raise MessageError("arrays", f"'{name}' is {list(array.shape)} of {array.dtype}; {due} was asked for")
        if array.size and array.dtype.kind == "f":
            # The least and the largest are NaN if any number is.
            least, most = float(array.min()), float(array.max())
            if not (least >= -bound and most <= bound):
                extreme = least if math.isnan(least) or least < -bound else most
                what = "NaN" if math.isnan(extreme) else f"{extreme:g}"
                if math.isfinite(extreme):
                    what += ", of which single precision does not hold the square of the sum over clients"
                raise MessageError("not finite", f"'{_shortened(name)}' holds {what}")
        if spec is not None and spec.counts:
            if array.size and (least := array.min()) < 0:
                raise MessageError("counts", f"'{name}' holds {least}, and a count is not negative")
            if not spec.empty and not array.any():
                raise MessageError("counts", f"'{name}' sums to 0, of which no mean can be taken")


def check_names(names: Collection[str], schema: Schema) -> None:
    """Raise :class:`MessageError` where these are not the names of the arrays that were asked for."""
    for name, spec in schema.arrays.items():
        if not spec.optional and name not in names:
            raise MessageError("arrays", f"'{name}' is missing")
    for name in names:
        if name not in schema.arrays:
            raise MessageError("arrays", f"'{_shortened(name)}' was not asked for")


def all_taken(arrays: Arrays, schema: Schema, count: int) -> bool:
    """Whether :func:`check_arrays` takes every one of ``count`` clients' arrays, given as ``[count, ...]`` by name."""
    of_all = {name: spec._replace(shape=(count, *spec.shape)) for name, spec in schema.arrays.items()}
    try:
        check_arrays(arrays, replace(schema, arrays=of_all))
    except MessageError:
        return False
    means = [arrays[name] for name, spec in of_all.items() if spec.counts and not spec.empty and name in arrays]
    return all(array.any(tuple(range(1, array.ndim))).all() for array in means)


def _shortened(text: str) -> str:
    """A name out of somebody else's message, fit to be quoted."""
    return printable(text) if len(text) <= 40 else printable(text[:40]) + "..."
