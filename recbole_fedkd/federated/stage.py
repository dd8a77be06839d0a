"""Stages: what becomes of a client's message between what it says and the wire, and the way back at the server's end.

With more than nothing to do a network travels as what changed of it (:class:`Updates`); the codecs (:class:`Encoding`) make
fewer bytes of any message, and keep what they dropped for the next one (error feedback: Seide et al., Interspeech 2014;
Karimireddy et al., ICML 2019).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recbole_fedkd.federated.codec import CodecStack, WireCodecs, WireSettings, squared_error
from recbole_fedkd.federated.message import (
    Message,
    Schema,
    check_arrays,
    decoded,
)
from recbole_fedkd.registry import NoSettings, Registry, setting

Arrays = dict[str, NDArray[np.generic]]

ROUNDING = 1e-9
"""By so much a sum of squares that is 1 may miss it."""


def difference(arrays: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """Arrays minus those of the same name in ``reference``; what has no reference stays as it is."""
    return {
        name: np.asarray(array - reference[name]) if name in reference else array  # type: ignore[operator]
        for name, array in arrays.items()
    }


def applied(arrays: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """Arrays plus those of the same name in ``reference``; what has no reference stays as it is."""
    return {
        name: np.asarray(reference[name] + array) if name in reference else array  # type: ignore[operator]
        for name, array in arrays.items()
    }


def numbered(arrays: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays under the number of their name among those of ``reference``, which both sides know: a few bytes each."""
    numbers = {name: str(number) for number, name in enumerate(sorted(reference))}
    return {numbers.get(name, name): array for name, array in arrays.items()}


def named(arrays: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """The way back from :func:`numbered`."""
    names = {str(number): name for number, name in enumerate(sorted(reference))}
    return {names.get(number, number): array for number, array in arrays.items()}


def updated(update: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """``reference`` moved on by a decoded update, whose arrays are numbered."""
    return applied(named(update, reference), reference)


class Stage(ABC):
    """What stands between what a client says and the wire. Either end has one of its own; both know what it does.

    Args:
        settings: of ``settings_type``; None: its defaults.

    Attributes:
        name: element of the config key ``stages``.
        settings_type: dataclass of its keys.
    """

    name: str
    settings_type: type = NoSettings

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings if settings is not None else self.settings_type()

    @abstractmethod
    def encode(self, message: Message) -> Message:
        """The message as it goes on towards the wire."""

    @abstractmethod
    def decode(self, message: Message, schema: Schema | None) -> Message:
        """The way back.

        Args:
            message: as it came; anybody may have made it.
            schema: what the message must be then.

        Raises:
            MessageError: no sender of the same stages makes this message.
        """

    def schema_behind(self, schema: Schema) -> Schema | None:
        """What :meth:`encode` makes of a message of this schema; None: nobody can tell before it is there."""
        return schema

    def taken(self, schema: Schema) -> Schema:
        """What the server takes, where a message of this schema may come out of the stage with less in it."""
        return schema

    def state_dict(self) -> dict[str, Any]:
        """What the stage remembers between rounds, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the ``state`` that :meth:`state_dict` returned."""
        assert not state


class Updates(Stage):
    """A network as what changed of it.

    Attributes:
        reference: the network that both ends hold, and what a change is a change of.
    """

    def __init__(self, reference: Arrays) -> None:
        super().__init__()
        self.reference = reference

    def encode(self, message: Message) -> Message:
        """The network minus the reference, arrays by number."""
        arrays = numbered(difference(message.arrays, self.reference), self.reference)
        return replace(message, arrays=arrays)

    def decode(self, message: Message, schema: Schema | None) -> Message:
        """The whole network."""
        return replace(message, arrays=updated(message.arrays, self.reference))

    def schema_behind(self, schema: Schema) -> Schema:
        """The arrays by number."""
        return replace(schema, arrays=numbered(schema.arrays, self.reference))


STAGES: Registry[type[Stage]] = Registry("stage", "stages")
register_stage = STAGES.register


@register_stage
class Encoding(Stage):
    """Codecs, and what they dropped.

    Args:
        codecs: of the sender.
        feedback: whether what encoding takes from a message is added to the next one; for messages of the same arrays.

    Attributes:
        residual: what encoding took from the last message.
    """

    name = "codecs"
    settings_type = WireSettings

    def __init__(self, codecs: CodecStack, feedback: bool = False) -> None:
        super().__init__()
        self.codecs, self.feedback = codecs, feedback
        self.residual: Arrays = {}

    def encode(self, message: Message) -> Message:
        """Fewer bytes; the message says what they lack."""
        if not self.codecs.codecs:
            return message
        whole = applied(message.arrays, self.residual)
        encoded = self.codecs.encode(whole, message.round)
        seen = self.codecs.decode(encoded)
        if self.feedback:
            self.residual = difference(whole, seen)
        return replace(message, arrays=encoded, codec_error=squared_error(whole, seen))

    def decode(self, message: Message, schema: Schema | None) -> Message:
        """The arrays, but for what encoding took from them."""
        return decoded(message, self.codecs, schema)

    def schema_behind(self, schema: Schema) -> Schema | None:
        """Codecs make what arrays they like."""
        return None if self.codecs.codecs else schema

    def state_dict(self) -> dict[str, Any]:
        """What was dropped."""
        return {"residual": {name: torch.tensor(array) for name, array in self.residual.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.residual = {name: tensor.numpy() for name, tensor in state["residual"].items()}


@dataclass(frozen=True)
class ClipSettings:
    """The key of :class:`Clip`.

    Attributes:
        clip_norm: of all arrays that no pattern of ``norms`` matches.
        norms: pattern of array names to their own norm. What is bounded by 1 is the norm of all arrays together, each in units
            of its own.
    """

    clip_norm: float = setting(
        1.0,
        "> 0",
        "Stage clip: largest L2 norm of all numbers of a client's message, of a network of what changed of it; a longer "
        "message is shortened to it.",
    )
    norms: Mapping[str, float] = field(default_factory=dict)

    def norm_of(self, name: str) -> float:
        """The bound of one array: that of the first pattern that its name matches, else ``clip_norm``."""
        return next((norm for pattern, norm in self.norms.items() if fnmatchcase(name, pattern)), self.clip_norm)

    def empties(self, schema: Schema) -> str | None:
        """Why messages of this schema come to nothing: the bound does not hold the counts of one sample; None: it does."""
        arrays = schema.arrays.items()
        counts = [name for name, spec in arrays if spec.counts and np.issubdtype(spec.dtype, np.integer)]
        one = sum(self.norm_of(name) ** -2 for name in counts) ** 0.5
        if one <= 1 + ROUNDING:
            return None
        return (
            f"Clients send zeros: the counts of one sample ({', '.join(counts)}) are {one:.3g} times as long as their bound "
            "lets a message be; raise privacy.clip, or clip_norm of stage clip"
        )


@register_stage
class Clip(Stage):
    """A message no longer than a bound: what any one client can change, and what noise has to hide.

    Either end shortens: the client, so that codecs encode no more than is taken; the server, which trusts nobody.
    """

    name = "clip"
    settings_type = ClipSettings

    def encode(self, message: Message) -> Message:
        """No longer than the bound; of counts that do not fit others stay in every round and of every client."""
        return replace(message, arrays=clipped(message.arrays, self.settings, (message.round, message.sender + 1)))

    def decode(self, message: Message, schema: Schema | None) -> Message:
        """As the other end: whatever comes is no longer."""
        check_arrays(message.arrays, schema)
        return self.encode(message)

    def taken(self, schema: Schema) -> Schema:
        """Counts that do not fit into the bound may be 0."""
        return replace(schema, arrays={name: spec._replace(empty=True) for name, spec in schema.arrays.items()})


def clipped(arrays: Mapping[str, NDArray[np.generic]], settings: ClipSettings, seeds: Sequence[int] = (0,)) -> Arrays:
    """Arrays whose joint L2 norm, each in units of its bound, is within 1.

    Whole numbers come first, since a count times a factor is none: where they fit they stay, and the others are shortened to
    what is left. Where they do not fit, there are fewer of them (:func:`_fewer`).

    Args:
        arrays: of a message.
        settings: bounds.
        seeds: of which counts are kept that do not fit all.
    """
    units = {name: settings.norm_of(name) for name, array in arrays.items() if array.dtype.kind in "fiu"}
    exact = {name: arrays[name].astype(np.float64) for name in units}
    whole = {name: unit for name, unit in units.items() if arrays[name].dtype.kind != "f"}
    changed = set[str]()
    if _norm(exact, whole) > 1 + ROUNDING:
        norm = _norm(exact, units)  # of numbers that are none, which others refuse, counts are not to become any
        norm = norm if np.isfinite(norm) else _norm(exact, whole)
        exact = _fewer(exact, whole, norm, np.random.default_rng(seeds))
        changed = set(units)
    others = {name: unit for name, unit in units.items() if name not in whole}
    room, norm = float(np.sqrt(max(1.0 - _norm(exact, whole) ** 2, 0.0))), _norm(exact, others)
    if norm > room:
        exact |= {name: exact[name] * (room / norm) for name in others}
        changed |= set(others)
    return {name: exact[name].astype(array.dtype) if name in changed else array for name, array in arrays.items()}


def _fewer(
    exact: Mapping[str, NDArray[np.float64]], whole: Mapping[str, float], norm: float, generator: np.random.Generator
) -> dict[str, NDArray[np.float64]]:
    """Counts that fit, and with them what belongs to them.

    All would be divided by the norm, if counts could be: each is divided and rounded down, and then drawn rows (an item's or a
    label's place along the first axis, the same of all arrays) are rounded up, as many as have room in the counts' part of the
    bound; one at least, if the whole bound holds one. Other arrays of as many rows keep of each row the share that its counts
    keep, so that a sum over a count stays what it was.

    Args:
        exact: arrays of a message.
        whole: units of those of counts, which do not fit.
        norm: of all arrays, in units, above 1.
        generator: draws the rows.
    """
    counts = {name: np.atleast_1d(exact[name]) for name in whole if exact[name].size}
    rows = max(map(len, counts.values()))
    tables = [array.reshape(len(array), -1) for array in counts.values()]
    widths = [table.shape[1] for table in tables]
    stacked = np.hstack([np.pad(table, ((0, rows - len(table)), (0, 0))) for table in tables])
    units = np.repeat([whole[name] for name in counts], widths)

    down, up = np.trunc(stacked / norm), np.copysign(np.ceil(np.abs(stacked) / norm), stacked)
    costs = ((up**2 - down**2) / units**2).sum(1)
    room = _norm(exact, whole) ** 2 / norm**2 - ((down / units) ** 2).sum() + ROUNDING
    drawn = generator.permutation(np.flatnonzero(costs))
    fits = drawn[costs[drawn] <= room]
    raised = fits[np.cumsum(costs[fits]) <= room]
    if not down.any() and not len(raised):
        raised = drawn[np.argsort(costs[drawn], kind="stable")][:1]
        raised = raised[costs[raised] <= 1 + ROUNDING]
    kept = down.copy()
    kept[raised] = up[raised]

    arrays = dict(exact)
    for name, part in zip(counts, np.split(kept, np.cumsum(widths)[:-1], axis=1), strict=True):
        arrays[name] = part[: len(counts[name])].reshape(exact[name].shape)
    squares = (stacked**2).sum(1)
    shares = np.divide((kept * stacked).sum(1), squares, out=np.ones(rows), where=squares > 0)
    for name in exact.keys() - whole.keys():
        if rows > 1 and exact[name].shape[:1] == (rows,):
            arrays[name] = (exact[name].T * shares).T
    return arrays


def _norm(exact: Mapping[str, NDArray[Any]], units: Mapping[str, float]) -> float:
    """Joint L2 norm of the arrays that have a unit, in these."""
    return float(np.sqrt(sum((exact[name] ** 2).sum() / unit**2 for name, unit in units.items())))


def length(arrays: Mapping[str, NDArray[np.generic]], settings: ClipSettings) -> float:
    """Joint L2 norm of arrays, each in units of its bound; :func:`clipped` leaves what is within 1 as it is."""
    exact = {name: array.astype(np.float64) for name, array in arrays.items() if array.dtype.kind in "fiu"}
    return _norm(exact, {name: settings.norm_of(name) for name in exact})


def received_through(stages: Sequence[Stage], message: Message, schema: Schema | None) -> Message:
    """A message as its sender had it before these stages.

    Raises:
        MessageError: it is not what they make of a message of this schema.
    """
    schemas = [schema]
    for stage in stages[:-1]:
        known = schemas[-1]
        schemas.append(stage.schema_behind(known) if known is not None else None)
    for stage, expected in zip(reversed(stages), reversed(schemas[: len(stages)]), strict=True):
        message = stage.decode(message, expected)
    if len(stages) != 1 or not isinstance(stages[0], Encoding):  # which has looked at them
        check_arrays(message.arrays, schema)
    return message


def stages_of(codecs: WireCodecs, feedback: bool = False) -> list[Stage]:
    """One end's stages of a client's messages, from the client to the wire."""
    return [
        Encoding(codecs.up, feedback)
        if stage == Encoding.name
        else (STAGES[stage] if isinstance(stage, str) else stage)(settings)
        for stage, settings in codecs.stages
    ]
