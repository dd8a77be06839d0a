"""What packed clients say: each its own message, or where nothing else is asked for the weighted mean of their networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.engine.base import ClientError, Round
from recbole_fedkd.engine.fleet.exchange import Links, Sizes
from recbole_fedkd.engine.fleet.group import Base, ClientGroup
from recbole_fedkd.engine.fleet.messages import MeanOfClients, SharedTensors
from recbole_fedkd.engine.fleet.obstacle import is_of_packing
from recbole_fedkd.engine.fleet.stacks import stacked_buffers, stacked_networks
from recbole_fedkd.engine.fleet.training import Trained, Training
from recbole_fedkd.federated.aggregate import MeanOfChangedRows, WeightedMean
from recbole_fedkd.federated.dialogue import answer
from recbole_fedkd.federated.knowledge import Knowledge
from recbole_fedkd.federated.knowledge.base import Arrays
from recbole_fedkd.federated.message import LARGEST, Message, MessageError, check_arrays
from recbole_fedkd.federated.message import Training as TrainedOn
from recbole_fedkd.federated.row_codecs import Block
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.stacked import Stacked
from recbole_fedkd.federated.strategy import LocalResult, to_tensors
from recbole_fedkd.federated.strategy.federated_averaging import BUFFER, PARAMETER, FederatedAveraging
from recbole_fedkd.federated.strategy.knowledge_exchange import AttentiveFederatedDistillation
from recbole_fedkd.federated.wire import ClientLink
from recbole_fedkd.model.shared import Rows, SharedState


class Uplink(ABC):
    """What clients say, and what becomes of it."""

    @abstractmethod
    def begin(self, current: Round) -> None:
        """A round begins; the clients have heard what there is to hear."""

    @abstractmethod
    def part(self, training: Training) -> Any:
        """What can be prepared of packed clients' answers while others are still in training."""

    @abstractmethod
    def say(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """Packed clients answer.

        Args:
            trained: they themselves.
            base: what all clients of their group have in common.
            current: the round, which is told bytes, losses and what encoding took.

        Returns:
            Why the answer of a client is not taken.
        """

    @abstractmethod
    def finish(self, current: Round) -> Mapping[str, Tensor] | None:
        """What the answers come to, where they were not taken in one by one."""


class MessageUplink(Uplink):
    """Every client's own message, made by the strategy of what the client has by itself.

    Args:
        server: the server.
        groups: the clients.
        private: of each group, what never leaves its client.
        links: the clients' ends of the wire.
    """

    def __init__(
        self, server: Server, groups: Sequence[ClientGroup], private: Sequence[Mapping[str, Rows]], links: Links
    ) -> None:
        self.server, self.groups, self.private, self.links = server, groups, private, links

    def begin(self, current: Round) -> None:
        """Messages of a round have the same length where they hold arrays of the same shapes."""
        self._size_of = Sizes()

    def part(self, training: Training) -> None:
        """Nothing: an end of the wire remembers what it has said, and says it once."""

    def say(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """All at once where nothing is wrong with any, else each by itself."""
        parts = self._made(trained)
        stacked = self._stacked(trained, base, parts, current)
        at_once = self._say_at_once(trained, stacked, current) if stacked is not None else None
        if at_once is not None:
            return at_once
        refused, losses = dict[int, ClientError](), trained.losses.tolist()
        if len(parts) == 1 and self._taken(trained, parts[0][1], current):
            for size, loss in zip(trained.training.sizes, losses, strict=True):
                current.count(loss, size)
            return {}
        made = {
            slot: {name: array[row] for name, array in arrays.items()}
            for slots, arrays in parts
            for row, slot in enumerate(slots)
        }
        for slot, shared in enumerate(self._shared(trained, base)):
            number, size = trained.numbers[slot], trained.training.sizes[slot]
            link, stage = self.links[number], "sending"
            collected = {name: values[slot] for name, values in trained.collected.items()}
            result = LocalResult(shared, link.sent_in is None, collected, made.get(slot))
            current.report.bytes_up[number] = 0
            try:
                message = answer(link, result, TrainedOn(size, size, losses[slot]), current.index)
                wire = link.encoded(message) if message is not None else None
                current.report.bytes_up[number] = self._size_of(wire) if wire is not None else 0
                stage = "answering"
                current.intake.add_read(number, wire)
            except Exception as error:
                refused[number] = ClientError.of(f"client {number}", current.index, stage, error)
                continue
            current.count(losses[slot], size, link.codec_error if message is not None else (0.0, 0.0))
        return refused

    def _say_at_once(self, trained: Trained, stacked: Stacked, current: Round) -> dict[int, ClientError] | None:
        """What :meth:`say` does, where stages and codecs go over all packed clients' messages at once; None: they do not."""
        links = [self.links[number] for number in trained.numbers]
        # A codec may make a number of what is none, and whose it is shows one by one.
        encoded = ClientLink.encoded_by_many(links, stacked) if stacked.is_within(LARGEST) else None
        refused = current.intake.add_stacked(encoded[0]) if encoded is not None else None
        if encoded is None or refused is None:
            return None
        encoded[1]()
        current.report.bytes_up.update(encoded[0].lengths())
        losses = trained.losses.tolist()
        for number, link, size, loss in zip(trained.numbers, links, trained.training.sizes, losses, strict=True):
            if number not in refused:
                current.count(loss, size, link.codec_error)
        return {
            number: ClientError.of(f"client {number}", current.index, "answering", error)
            for number, error in refused.items()
        }

    def _stacked(
        self, trained: Trained, base: Base, parts: Sequence[tuple[list[int], Arrays]], current: Round
    ) -> Stacked | None:
        """Messages of packed clients before their stages, where these change them and the strategy says what it holds as it is.

        Arguments as of :meth:`say`; ``parts`` as :meth:`_made` returns them.
        """
        upload, training = type(self.server.strategy).upload, trained.training
        if not self.server.codecs.changes_uploads:
            return None
        of_each = zip(trained.numbers, training.sizes, trained.losses.tolist(), strict=True)
        trained_on = {number: TrainedOn(size, size, loss) for number, size, loss in of_each}
        if upload is FederatedAveraging.upload:
            return Stacked("model", current.index, trained_on, *self._networks(trained, base))
        if len(parts) != 1 or not parts[0][1] or not self._says_all:
            return None
        floats: dict[str, Any] = {name: array for name, array in parts[0][1].items() if array.dtype == np.float32}
        others = {name: array for name, array in parts[0][1].items() if name not in floats}
        blocks = {name: Block.of(array) for name, array in floats.items()}
        return Stacked("knowledge", current.index, trained_on, blocks, others=others)

    @property
    def _says_all(self) -> bool:
        """Whether the strategy sends what its kind of knowledge makes of a client, as it is."""
        strategy = self.server.strategy
        says_all = type(strategy).upload is AttentiveFederatedDistillation.upload
        return says_all and type(strategy.knowledge).disguised is Knowledge.disguised

    def _networks(self, trained: Trained, base: Base) -> tuple[dict[str, Block], dict[str, Any], Arrays]:
        """Packed clients' networks as :meth:`FederatedAveraging.upload` names what they hold, and what all have in common."""
        training, private = trained.training, self.private[self.groups.index(trained.training.group)]
        parameters, common = stacked_networks(training, private, base)
        blocks = {PARAMETER + name: block for name, block in parameters.items()}
        blocks |= {BUFFER + name: block for name, block in stacked_buffers(training, private).items()}
        return blocks, {}, {PARAMETER + name: array for name, array in common.items()}

    def _taken(self, trained: Trained, arrays: Arrays, current: Round) -> bool:
        """Whether the server has taken what all packed clients say, ``[c, ...]`` by name, at once."""
        strategy, numbers = self.server.strategy, trained.numbers
        if not self._says_all:
            return False
        result = LocalResult(SharedTensors(dict, {}), False, {}, {name: array[0] for name, array in arrays.items()})
        example = strategy.upload(result, numbers[0], current.index)
        samples = dict(zip(numbers, trained.training.sizes, strict=True))
        if example is None or not current.intake.add_many(example.kind, samples, arrays):
            return False
        current.report.bytes_up.update(self._size_of.by_sender(example, numbers))
        for slot, number in enumerate(numbers):  # each keeps its own alone, whatever becomes of the others'
            own = {name: array[slot] for name, array in arrays.items()} if strategy.remembers_sent else {}
            self.links[number].has_sent(to_tensors(own), current.index)
        return True

    def _made(self, trained: Trained) -> list[tuple[list[int], Arrays]]:
        """What the kind of knowledge makes of what packed clients have collected, where that is done at once.

        Those that have never spoken before are apart: their slots, and what they say ``[slots, ...]`` by name.
        """
        strategy, made = self.server.strategy, list[tuple[list[int], Arrays]]()
        if not (strategy.elementwise and trained.collected):
            return made
        spoken = [self.links[number].sent_in is not None for number in trained.numbers]
        for before in sorted(set(spoken)):
            slots = [slot for slot, has_spoken in enumerate(spoken) if has_spoken == before]
            collected = {name: values[slots] for name, values in trained.collected.items()}
            try:
                arrays = strategy.knowledge.upload(collected, not before)
            except Exception as error:  # one by one shows whose fault it is
                if is_of_packing(error):
                    raise
                return []
            made.append((slots, arrays))
        return made

    def _shared(self, trained: Trained, base: Base) -> Iterator[SharedState]:
        """What of each client's network may be sent, made when it is asked for."""
        training = trained.training
        group, private = training.group, self.private[self.groups.index(training.group)]

        def buffers(slot: int) -> dict[str, Tensor]:
            whole = SharedState(group.whole, lambda: private).buffers()
            own = {name: values[slot] for name, values in training.buffers.items() if name in whole}
            return whole | {name: value for name, value in own.items() if value.shape == whole[name].shape}

        for slot in range(len(trained.numbers)):
            named = partial(group.unpacked, training.pack, training.weights, slot, base)
            yield SharedTensors(named, private, partial(buffers, slot))

    def finish(self, current: Round) -> None:
        """Nothing: every answer has been taken in."""


class MeanUplink(Uplink):
    """The weighted mean of the clients' networks, all of one group. Arguments as of :class:`MessageUplink`."""

    def __init__(self, server: Server, group: ClientGroup, private: Mapping[str, Rows], links: Links) -> None:
        self.server, self.group, self.private, self.links = server, group, private, links

    @staticmethod
    def fits(server: Server) -> bool:
        """Whether the strategy asks for nothing but the mean of whole networks that nothing has been taken from."""
        strategy = server.strategy
        if not isinstance(strategy, FederatedAveraging) or server.codecs.changes_uploads:
            return False
        asked = ("upload", "upload_schema", "empty")
        if any(getattr(FederatedAveraging, name) is not getattr(type(strategy), name) for name in asked):
            return False
        return type(strategy.empty(server.state, {0: 1})) in (WeightedMean, MeanOfChangedRows)

    def begin(self, current: Round) -> None:
        """Nobody has answered; what clients count for is the fold's affair."""
        fold = current.intake.fold
        assert isinstance(fold, WeightedMean)
        self._fold, self._answered = fold, 0.0
        self._shares: dict[int, float] = {}
        self._mean = MeanOfClients(self.group, self.private, isinstance(fold, MeanOfChangedRows))
        # A client's message has the size of all others', whatever it has learned.
        result = LocalResult(SharedState(self.group.whole, lambda: self.private), first=False)
        message = answer(self.links[current.chosen[0]], result, TrainedOn(), current.index)
        assert message is not None
        self._example, self._size_of = self.links[current.chosen[0]].encoded(message), Sizes()

    def _share(self, size: int) -> float:
        if size not in self._shares:
            self._shares[size] = self._fold.weight_of(Message("", 0, 0, {}, TrainedOn(size))) / self._fold.expected
        return self._shares[size]

    def part(self, training: Training) -> Any:
        """What they add to the mean."""
        shares = [self._share(size) for size in training.sizes]
        weights = torch.tensor(shares, dtype=torch.float64, device=training.weights.dense.device)
        return self._mean.part(training.pack, training.weights, weights)

    def say(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """All at once."""
        refused = self._too_large(trained, base, current)
        if refused:
            kept = [slot for slot, number in enumerate(trained.numbers) if number not in refused]
            others = trained.select(torch.tensor(kept, dtype=torch.long))
            if kept:
                self.say(others.with_part(self.part(others.training)), base, current)
            return refused
        self._mean.add(trained.part)
        sizes = trained.training.sizes
        self._answered += sum(self._share(size) for size in sizes)
        current.count(float(trained.losses.sum()), sum(sizes))
        current.report.bytes_up.update(self._size_of.by_sender(self._example, trained.numbers))
        current.intake.answered.update(dict.fromkeys(trained.numbers, True))
        if self.server.link.broadcast is not None:
            for number in trained.numbers:
                self.server.link.acknowledge(number)
        return {}

    def _too_large(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """The clients whose messages nobody would take, since their numbers are beyond what a message may hold."""
        least, largest = min(map(self._share, trained.training.sizes)), LARGEST / len(current.chosen)
        if self._mean.largest(trained.part) < largest * least / 2:
            return {}
        refused = {}
        for slot, number in enumerate(trained.numbers):
            named = partial(self.group.unpacked, trained.training.pack, trained.training.weights, slot, base)
            result = LocalResult(SharedTensors(named, self.private), first=False)
            message = self.server.strategy.upload(result, number, current.index)
            try:
                check_arrays(message.arrays if message is not None else {}, largest=largest)
            except MessageError as error:
                refused[number] = ClientError.of(f"client {number}", current.index, "answering", error)
        return refused

    def finish(self, current: Round) -> Mapping[str, Tensor] | None:
        """The mean, and the buffers, which clients of the package's own networks do not change."""
        if not current.intake.answered:
            return None
        everybody = len(current.intake.answered) == len(current.chosen)
        buffers = {name: value for name, value in self.server.state.items() if name.startswith(BUFFER)}
        return {**self._mean.state(PARAMETER, 1.0 if everybody else self._answered), **buffers}
