"""Stages: what becomes of a client's message between what it says and the wire, and the way back at the server's end.

With more than nothing to do a network travels as what changed of it (:class:`Updates`); the codecs (:class:`Encoding`) make
fewer bytes of any message, and keep what they dropped for the next one (error feedback: Seide et al., Interspeech 2014;
Karimireddy et al., ICML 2019).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from recbole_fedkd.federated.clipping import ClipSettings, clipped
from recbole_fedkd.federated.codec import CodecStack, WireCodecs, WireSettings, squared_error
from recbole_fedkd.federated.message import (
    Message,
    Schema,
    check_arrays,
    decoded,
)
from recbole_fedkd.federated.row_codecs import Block, goes_row_by_row, seen_rows
from recbole_fedkd.federated.stacked import OwnRows, Stacked, added, split
from recbole_fedkd.registry import NoSettings, Registry, outdated

Arrays = dict[str, NDArray[np.generic]]


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


@dataclass(frozen=True)
class Passed:
    """Several clients' messages behind a stage.

    Attributes:
        stacked: they.
        remember: has each client's stage know that they are sent.
    """

    stacked: Stacked
    remember: Callable[[], None] = lambda: None


class Stage(ABC):
    """What stands between what a client says and the wire. Either end has one of its own; both know what it does.

    Args:
        settings: of ``settings_type``; None: its defaults.

    Attributes:
        name: element of the config key ``stages``.
        settings_type: dataclass of its keys.
        reads_numbers: whether it does something with an array's numbers, of which codecs before it would leave codes.
    """

    name: str
    settings_type: type = NoSettings
    reads_numbers: bool = False

    def __init_subclass__(cls) -> None:
        # What goes over many messages at once does not do what somebody else's methods do.
        if outdated(cls, "encode_many", "encode"):
            cls.encode_many = Stage.encode_many  # type: ignore[method-assign]
        if outdated(cls, "decode_many", "decode", "encode"):
            cls.decode_many = Stage.decode_many  # type: ignore[method-assign]
        if outdated(cls, "snapshot", "state_dict", "load_state_dict"):
            cls.snapshot, cls.restore = Stage.snapshot, Stage.restore  # type: ignore[method-assign]

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings if settings is not None else self.settings_type()

    @abstractmethod
    def encode(self, message: Message) -> Message:
        """The message as it goes on towards the wire."""

    def encode_many(self, ends: Sequence[Self], stacked: Stacked) -> Passed | None:
        """As :meth:`encode` of each of several clients; changes nothing.

        Args:
            ends: each client's stage.
            stacked: their messages, which are finite.

        Returns:
            None: each has to go through its own.
        """
        return None

    def decode_many(self, stacked: Stacked) -> Stacked | None:
        """As :meth:`decode` of stacked messages of this side of the wire, but that nobody looks at them; None: one by one."""
        return None

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

    def snapshot(self) -> Any:
        """What the stage remembers, for :meth:`restore` in the same process."""
        return self.state_dict()

    def restore(self, snapshot: Any) -> None:
        """Remember what it did at the time of a snapshot."""
        self.load_state_dict(snapshot)


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

    def encode_many(self, ends: Sequence[Self], stacked: Stacked) -> Passed | None:
        """Where all know one network, from which theirs differ in some rows."""
        reference = self.reference
        alike = all(end.reference is reference for end in ends) and not stacked.others
        if not alike or stacked.blocks.keys() != reference.keys():
            return None
        if not all(np.array_equal(array, reference[name]) for name, array in stacked.common.items()):
            return None
        blocks = {name: _moved(block, reference[name], np.subtract) for name, block in stacked.blocks.items()}
        return Passed(replace(stacked, blocks=numbered(blocks, reference), common={}))

    def decode_many(self, stacked: Stacked) -> Stacked:
        """The networks, as what is common and where they differ from it."""
        names = {str(number): name for number, name in enumerate(sorted(self.reference))}
        blocks = {names[number]: block for number, block in stacked.blocks.items()}
        moved = {name: _moved(block, self.reference[name], np.add) for name, block in blocks.items()}
        common = {name: self.reference[name] for name, block in moved.items() if block.row is not None}
        return replace(stacked, blocks=moved, common=common)

    def schema_behind(self, schema: Schema) -> Schema:
        """The arrays by number."""
        return replace(schema, arrays=numbered(schema.arrays, self.reference))

    def snapshot(self) -> Arrays:
        """The network, which nobody changes in place."""
        return self.reference

    def restore(self, snapshot: Arrays) -> None:
        """Hold what it did."""
        self.reference = snapshot


def _moved(block: Block, reference: NDArray[Any], by: Any) -> Block:
    """Rows of clients, by a difference or a sum, relative to those of a reference."""
    own = OwnRows.of(reference).values
    if block.row is None:
        values = by(block.values.reshape(-1, *own.shape), own).reshape(block.values.shape)
    else:
        values = by(block.values, own[block.row])
    return replace(block, values=values)


STAGES: Registry[type[Stage]] = Registry("stage", "stages")
register_stage = STAGES.register


@register_stage
class Encoding(Stage):
    """Codecs, and what they dropped.

    Args:
        codecs: of the sender.
        feedback: whether what encoding takes from a message is added to the next one; for messages of the same arrays.

    Attributes:
        dropped: what encoding took from the last message, by array.
    """

    name = "codecs"
    settings_type = WireSettings

    def __init__(self, codecs: CodecStack, feedback: bool = False) -> None:
        super().__init__()
        self.codecs, self.feedback = codecs, feedback
        self.dropped: dict[str, OwnRows] = {}

    @property
    def residual(self) -> Arrays:
        """What encoding took from the last message."""
        return {name: own.over() for name, own in self.dropped.items()}

    @residual.setter
    def residual(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        self.dropped = {name: OwnRows.of(array) for name, array in arrays.items()}

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

    def encode_many(self, ends: Sequence[Self], stacked: Stacked) -> Passed | None:
        """What a reader sees of them, where every codec goes row by row."""
        if not self.codecs.codecs:
            return Passed(stacked)
        if stacked.encoded is not None or stacked.common or not goes_row_by_row(self.codecs, stacked.blocks):
            return None
        whole = {name: added(block, [end.dropped.get(name) for end in ends]) for name, block in stacked.blocks.items()}
        encoded = {name: seen_rows(self.codecs, name, block) for name, block in whole.items()}
        seen = {name: replace(block, values=encoded[name].values) for name, block in whole.items()}
        lost = {name: replace(block, values=block.values - seen[name].values) for name, block in whole.items()}
        errors = np.stack([_squares(lost, len(ends)), _squares(whole, len(ends))], 1)

        def remember() -> None:
            if self.feedback:
                of_each = zip(*(split(block) for block in lost.values()), strict=True)
                for end, own in zip(ends, of_each, strict=True):
                    end.dropped = {name: rows.kept() for name, rows in zip(lost, own, strict=True)}

        return Passed(replace(stacked, blocks=seen, encoded=encoded, codec_error=errors), remember)

    def decode_many(self, stacked: Stacked) -> Stacked:
        """As they are: a reader's."""
        return stacked

    def schema_behind(self, schema: Schema) -> Schema | None:
        """Codecs make what arrays they like."""
        return None if self.codecs.codecs else schema

    def state_dict(self) -> dict[str, Any]:
        """What was dropped."""
        return {"residual": {name: torch.tensor(array) for name, array in self.residual.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.residual = {name: tensor.numpy() for name, tensor in state["residual"].items()}

    def snapshot(self) -> dict[str, OwnRows]:
        """What was dropped, the rows that hold anything alone; nobody changes it in place."""
        return self.dropped

    def restore(self, snapshot: dict[str, OwnRows]) -> None:
        """What had been dropped."""
        self.dropped = snapshot


def _squares(blocks: Mapping[str, Block], clients: int, norm_of: Callable[[str], float] = lambda name: 1.0) -> Any:
    """Squared L2 norm of every client's arrays, each in units of its own ``[c]``, in double precision."""
    total = np.zeros(clients)
    for name, block in blocks.items():
        of_rows = np.einsum("ij,ij->i", block.values, block.values, dtype=np.float64)
        total += np.bincount(block.owner, of_rows, minlength=clients) / norm_of(name) ** 2
    return total


@register_stage
class Clip(Stage):
    """A message no longer than a bound: what any one client can change, and what noise has to hide.

    Either end shortens: the client, so that codecs encode no more than is taken; the server, which trusts nobody.
    """

    name = "clip"
    settings_type = ClipSettings
    reads_numbers = True

    def encode(self, message: Message) -> Message:
        """No longer than the bound; of counts that do not fit others stay in every round and of every client."""
        return replace(message, arrays=clipped(message.arrays, self.settings, (message.round, message.sender + 1)))

    def decode(self, message: Message, schema: Schema | None) -> Message:
        """As the other end: whatever comes is no longer."""
        check_arrays(message.arrays, schema)
        return self.encode(message)

    def encode_many(self, ends: Sequence[Self], stacked: Stacked) -> Passed | None:
        """Where there are no counts, which are shortened in a way of their own."""
        shortened = self.decode_many(stacked) if stacked.encoded is None else None
        return Passed(shortened) if shortened is not None else None

    def decode_many(self, stacked: Stacked) -> Stacked | None:
        """No longer than the bound."""
        if stacked.others or stacked.common:
            return None
        lengths = np.sqrt(_squares(stacked.blocks, len(stacked.training), self.settings.norm_of))
        if not (lengths > 1).any():
            return stacked
        shares = 1.0 / np.maximum(lengths, 1.0)
        blocks = {
            name: replace(block, values=(block.values * shares[block.owner][:, None]).astype(np.float32))
            for name, block in stacked.blocks.items()
        }
        return replace(stacked, blocks=blocks)

    def taken(self, schema: Schema) -> Schema:
        """Counts that do not fit into the bound may be 0."""
        return replace(schema, arrays={name: spec._replace(empty=True) for name, spec in schema.arrays.items()})


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
