"""Envelopes: what is written around a message where parties are asked over a network, and may be asked twice.

A request says which run, operation and round it is of, and up to which round the server has counted what this party said; an
answer repeats the first three and names the request by its digest, so that what is late, doubled or replayed is known as that.
Both are one MessagePack map; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import msgpack

from recbole_fedkd.errors import printable
from recbole_fedkd.federated.message import MessageError

ENVELOPE_VERSION = 1
TRAIN, MASK, JUDGE, BEST, HELLO = "train", "mask", "judge", "best", "hello"
OPERATIONS = (HELLO, TRAIN, MASK, JUDGE, BEST)
NEVER = -1
"""The round up to which a party is counted that never was."""

MOST = 2**32 - 1
"""The largest count that is taken; messages carry no larger one."""

_LONGEST_TEXT = 500


class _Envelope:
    """Reading and writing, the same for both directions."""

    def to_bytes(self) -> bytes:
        """Serialise."""
        content = {part.name: getattr(self, part.name) for part in fields(self)}  # type: ignore[arg-type]
        packed: bytes = msgpack.packb({"v": ENVELOPE_VERSION, **content}, use_bin_type=True)
        return packed

    @classmethod
    def from_bytes(cls, packed: bytes) -> Self:
        """Read; raises :class:`MessageError` for anything that :meth:`to_bytes` did not write."""
        try:
            content = msgpack.unpackb(packed, raw=False, max_array_len=64, max_ext_len=0)
            if not isinstance(content, dict) or content.pop("v", None) != ENVELOPE_VERSION:
                raise ValueError(f"it is of no version that is read here, which is {ENVELOPE_VERSION}")
            if content.keys() != {part.name for part in fields(cls)}:  # type: ignore[arg-type]
                raise ValueError("it has not the parts that it must have")
            read = cls(**content)
            read._check()
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
            reason = str(error) or type(error).__name__
            raise MessageError("malformed", f"{len(packed)} bytes are no envelope: {reason[:200]}") from error
        return read

    def _check(self) -> None:
        raise NotImplementedError


def _is(value: Any, *kinds: type) -> bool:
    return type(value) in kinds


@dataclass(frozen=True)
class Request(_Envelope):
    """What the server asks one party.

    Attributes:
        run: of the run; a later one sorts behind an earlier one.
        operation: one of :data:`OPERATIONS`.
        round: from 0.
        counted: the latest round of which the server has counted this party's answer; :data:`NEVER`: none.
        message: the server's message; empty: it says nothing new.
        phase: rows that are to be judged, ``valid`` or ``test``; empty: none, the party only takes in what it is told.
    """

    run: str
    operation: str
    round: int
    counted: int = NEVER
    message: bytes = b""
    phase: str = ""

    def _check(self) -> None:
        texts = (self.run, self.operation, self.phase)
        if not all(_is(text, str) and len(text) <= _LONGEST_TEXT for text in texts) or self.operation not in OPERATIONS:
            raise ValueError("run, operation or phase is none")
        if not all(_is(number, int) for number in (self.round, self.counted)) or not self.counted >= NEVER:
            raise ValueError("round is none")
        if self.round < 0 or not _is(self.message, bytes):
            raise ValueError("round is negative, or the message is none")


@dataclass(frozen=True)
class Answer(_Envelope):
    """What a party answers.

    Attributes:
        party: its number.
        run: of the request.
        operation: of the request.
        round: of the request.
        request: digest of the request's bytes; empty where they could not be read.
        said: the client's message; empty: it has nothing to say.
        numbers: by name: who comes says ``samples``, ``users``, and its rows to judge by as ``valid`` and ``test``; after
            training ``seen`` (samples behind the loss), ``loss`` (summed over them), ``dropped`` and ``whole`` (squared norms,
            of what encoding took and of what was encoded); after judging sums of metrics.
        fault: why it did not do what it was asked; empty: it did. A kind of :class:`MessageError`, ``not finite`` or
            ``failed``, of which nothing more is told: the words of an error may quote a party's data.
        detail: half a sentence on the fault.
    """

    party: int
    run: str
    operation: str
    round: int
    request: bytes
    said: bytes = b""
    numbers: dict[str, float] | None = None
    fault: str = ""
    detail: str = ""

    def _check(self) -> None:
        texts = (self.run, self.operation, self.fault, self.detail)
        if not all(_is(text, str) and len(text) <= _LONGEST_TEXT for text in texts):
            raise ValueError("a text of it is none")
        if (
            not _is(self.party, int)
            or not _is(self.round, int)
            or not _is(self.request, bytes)
            or not _is(self.said, bytes)
        ):
            raise ValueError("party, round or message is none")
        numbers = self.numbers if self.numbers is not None else {}
        if not isinstance(numbers, dict) or not all(_is(name, str) for name in numbers):
            raise ValueError("its numbers have no names")
        if not all(_is(value, int, float) and math.isfinite(value) for value in numbers.values()):
            raise ValueError("its numbers are none")


PART_ROUNDING = 1e-4
"""Share by which a sum of single-precision numbers may be beyond what exact ones could come to."""


def check_numbers(
    numbers: Mapping[str, float] | None,
    counts: Mapping[str, float],
    sums: Mapping[str, tuple[float, float]],
    parts: Iterable[tuple[str, str]] = (),
) -> dict[str, float]:
    """The numbers of an answer, where they are those that are due and no others.

    Args:
        numbers: by name.
        counts: whole numbers from 0 that are due, to the most that each may be.
        sums: other numbers that are due, to the least and the most that each may be.
        parts: names of a part and of the whole that it is of, where both are due.

    Raises:
        MessageError: one is missing, was not asked for, is out of its range, or larger than the whole that it is a part of.
    """
    given, due = dict(numbers or {}), {**{name: (0.0, most) for name, most in counts.items()}, **sums}
    for name in sorted(given.keys() ^ due.keys()):
        raise MessageError("numbers", f"'{shortened(name)}' {'was not asked for' if name in given else 'is missing'}")
    for name, value in given.items():
        least, most = due[name]
        if not least <= value <= most or (name in counts and value != int(value)):
            kind = "a count" if name in counts else "a number"
            raise MessageError("numbers", f"'{name}' is {value:g}, where {kind} from {least:g} to {most:g} is due")
    for part, whole in parts:
        if part in given and whole in given and given[part] > given[whole] + PART_ROUNDING * abs(given[whole]):
            raise MessageError(
                "numbers", f"'{part}' is {given[part]:g}, and '{whole}', of which it is a part, {given[whole]:g}"
            )
    return given


DECLARED = ("samples", "users", "valid", "test")
"""What a party says of itself when it comes: samples of an epoch, users, and rows that it judges by.

Users may be more than samples: those of whom the split holds every row out are served, too.
"""


def read_hello(packed: bytes, manifest: bytes, parties: int, greeted: Mapping[int, Answer]) -> Answer:
    """Who comes, and how much it has.

    Args:
        packed: what it says.
        manifest: digest that it must name.
        parties: how many there are.
        greeted: what each said of itself when it came last.

    Raises:
        MessageError: it is none of these parties.
    """
    hello = Answer.from_bytes(packed)
    if hello.operation != HELLO or hello.round or not 0 <= hello.party < parties or hello.said or hello.fault:
        raise MessageError("kind", "it does not say who it is")
    if hello.request != manifest:
        raise MessageError("manifest", f"client {hello.party} has another manifest")
    check_numbers(hello.numbers, dict.fromkeys(DECLARED, MOST), {})
    before = greeted.get(hello.party)
    if before is not None and before.numbers != hello.numbers:
        raise MessageError(
            "numbers", f"client {hello.party} came with other rows before; do two folders have its number?"
        )
    return hello


def digest(packed: bytes) -> bytes:
    """What names a request in its answer, 16 bytes."""
    return hashlib.blake2b(packed, digest_size=16).digest()


def masked_as(run: str, round_index: int) -> bytes:
    """What tells a run's round under masks from all others."""
    return f"{run}\0{round_index}\0".encode()


def shortened(text: str) -> str:
    """A text as it fits into an envelope."""
    return printable(text)[:_LONGEST_TEXT]


def new_run() -> str:
    """Name of a run, that sorts behind those of all earlier ones."""
    return f"{int(time.time() * 1000):014d}-{uuid.uuid4().hex[:8]}"
