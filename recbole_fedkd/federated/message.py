"""Messages: the only thing that crosses between client and server, and the bytes it takes on the wire.

The wire format is one MessagePack map ``{v: schema version, k: kind, r: round, s: sender, a: {name: [dtype, shape, bytes]}}``,
arrays little-endian in C order. Nothing is pickled, so reading a message runs no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgpack
import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.federated.codec import CodecStack

SCHEMA_VERSION = 1
SERVER = -1
"""Sender of the server's messages; clients are numbered from 0."""

_ALLOWED = {"f4": "<f4", "f8": "<f8", "i4": "<i4", "i8": "<i8", "u1": "|u1", "b1": "|b1", "f2": "<f2", "i1": "|i1"}

Arrays = Mapping[str, NDArray[np.generic]]


class MessageError(ValueError):
    """Bytes that are not a message of this schema, or an array that a message cannot carry."""


@dataclass(frozen=True)
class Message:
    """A typed set of named arrays.

    Attributes:
        kind: what the arrays mean, such as ``label_knowledge``.
        round: communication round, from 0.
        sender: client number, or ``SERVER``.
        arrays: name to array; the names and shapes are the strategy's contract for the kind.
    """

    kind: str
    round: int
    sender: int
    arrays: Arrays

    def to_bytes(self) -> bytes:
        """Serialise. Raises :class:`MessageError` for an array whose dtype the schema does not carry."""
        packed = {}
        for name, array in self.arrays.items():
            code = array.dtype.str[1:]
            if code not in _ALLOWED:
                raise MessageError(f"array '{name}' has dtype {array.dtype}; a message carries {', '.join(_ALLOWED)}")
            little_endian = np.ascontiguousarray(array, dtype=_ALLOWED[code])
            packed[name] = [code, list(array.shape), little_endian.tobytes()]
        content = {"v": SCHEMA_VERSION, "k": self.kind, "r": self.round, "s": self.sender, "a": packed}
        payload: bytes = msgpack.packb(content, use_bin_type=True)
        return payload

    @staticmethod
    def from_bytes(payload: bytes) -> Message:
        """Read a message. Raises :class:`MessageError` for anything that :meth:`to_bytes` did not write."""
        try:
            content = msgpack.unpackb(payload, raw=False)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise MessageError(f"{len(payload)} bytes are not a message: {error}") from error
        if not isinstance(content, dict) or "v" not in content:
            raise MessageError("the bytes hold no message: the schema version is missing")
        if content["v"] != SCHEMA_VERSION:
            raise MessageError(f"message has schema version {content['v']}; this version reads {SCHEMA_VERSION}")
        try:
            arrays = {}
            for name, (code, shape, raw) in content["a"].items():
                arrays[name] = np.frombuffer(raw, dtype=_ALLOWED[code]).reshape(shape)
            return Message(content["k"], content["r"], content["s"], arrays)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MessageError(f"message is malformed: {error}") from error


def sizes_by_sender(message: Message, senders: Sequence[int]) -> list[int]:
    """Bytes on the wire of messages that differ from ``message`` in the sender and in the numbers that arrays hold."""
    without_sender = len(message.to_bytes()) - len(msgpack.packb(message.sender))
    return [without_sender + len(msgpack.packb(sender)) for sender in senders]


def decoded(message: Message, codecs: CodecStack) -> Message:
    """A message as it was before its sender encoded it.

    Raises:
        MessageError: the arrays are not what these codecs make.
    """
    try:
        return replace(message, arrays=codecs.decode(message.arrays))
    except (KeyError, IndexError, ValueError) as error:
        raise MessageError(f"message '{message.kind}' cannot be decoded: {error}") from error
