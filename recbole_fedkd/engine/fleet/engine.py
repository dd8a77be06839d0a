"""The ``fleet`` engine: the clients of a round train side by side, in tensors with a leading axis of clients.

Networks, losses and strategies are those of the ``local`` engine, called for many clients at once by ``torch.func.vmap``;
random draws come from the same streams, so that results differ by rounding only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_fedkd.engine.base import ClientError, Engine, Round, reason
from recbole_fedkd.engine.fleet.draws import Streams
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.memory import OptimizerMemory, RowChanges
from recbole_fedkd.engine.fleet.messages import MeanOfClients, MeanPart, SharedTensors, stacked, unstacked
from recbole_fedkd.engine.fleet.optimizers import BatchedOptimizer, clip_norms
from recbole_fedkd.engine.fleet.packing import packed, slots
from recbole_fedkd.engine.fleet.population import CompactPopulation
from recbole_fedkd.engine.fleet.samples import Epoch, FleetTask
from recbole_fedkd.engine.fleet.steps import drawing, stepped
from recbole_fedkd.engine.fleet.store import Pack, Weights
from recbole_fedkd.engine.fleet.threads import SideBySide, keep_freed_memory
from recbole_fedkd.errors import listed
from recbole_fedkd.federated.client import ClientSettings
from recbole_fedkd.federated.message import Message, sizes_by_sender
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.strategy import LocalResult, to_tensors
from recbole_fedkd.federated.strategy.federated_averaging import (
    BUFFER,
    PARAMETER,
    parameter_of,
)
from recbole_fedkd.federated.task import Step
from recbole_fedkd.finite import NotFiniteError, all_finite, finite_clients, training_sentence
from recbole_fedkd.model.shared import SharedState, matching


@dataclass(frozen=True)
class _Training:
    """Packed clients while they train.

    Attributes:
        group: their group.
        network: the group's, for this thread alone.
        pack: who they are, and their item ids.
        weights: their parameters, changed in place.
        received: what the server has said to them, ``[c, ...]`` each.
        memory: what their optimisers remember, in the shapes of ``weights``, changed in place.
        counters: of their optimisers.
        sizes: samples of an epoch of each.
        rates: learning rate of every column of the weights; None: the optimiser's own.
    """

    group: ClientGroup
    network: nn.Module
    pack: Pack
    weights: Weights
    received: Mapping[str, Tensor]
    memory: Sequence[Weights]
    counters: Tensor
    sizes: Sequence[int]
    rates: Sequence[Tensor] | None = None

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers that differ from client to client, ``[c, ...]``."""
        return self.group.buffers_of(self.pack)

    def first(self, count: int) -> _Training:
        """The first clients alone, in the same memory."""
        if count == len(self.sizes):
            return self
        part = replace(
            self,
            pack=self.pack.first(count),
            weights=self.weights.first(count),
            received={name: values[:count] for name, values in self.received.items()},
            memory=[each.first(count) for each in self.memory],
            counters=self.counters[:count],
            sizes=self.sizes[:count],
        )
        part.__dict__["buffers"] = {name: values[:count] for name, values in self.buffers.items()}
        return part


@dataclass(frozen=True)
class _Trained:
    """What packed clients leave behind when they have trained.

    Attributes:
        training: they themselves.
        loss: summed over the samples of the last epoch ``[]``, in double precision.
        rows: their item rows, where they keep any.
        memory_rows: what their optimisers remember of these, where they keep that.
        part: of the mean, where one is made.
        numbers: of the clients.
        messages: their own, where each has one.
    """

    training: _Training
    loss: Tensor
    rows: list[RowChanges]
    memory_rows: list[RowChanges]
    part: MeanPart | None
    numbers: Sequence[int]
    messages: list[Message | None]


class _Twins(threading.local):
    """Networks by group, each thread's own."""

    def __init__(self) -> None:
        self.networks: dict[int, nn.Module] = {}


class FleetEngine(Engine):
    """Runs the rounds of a federation, many clients at a time.

    Args:
        server: the server.
        population: the clients' networks.
        task: their samples.
        settings: how to train; with a seed.
        optimizer: of every client.
        memory: bytes that clients side by side may take.
        threads: packs that are trained at a time; decides nothing but how long it takes.
        rates: pattern of parameter names to learning rate; empty: all learn at the optimiser's own.
        min_clients: as of :class:`Engine`.
    """

    name = "fleet"

    def __init__(
        self,
        server: Server,
        population: CompactPopulation,
        task: FleetTask,
        settings: ClientSettings,
        optimizer: BatchedOptimizer,
        memory: float,
        threads: int = 1,
        rates: Mapping[str, float] | None = None,
        min_clients: int | None = None,
    ) -> None:
        super().__init__(server, min_clients)
        self.population, self.task = population, task
        self.settings, self.optimizer, self.memory = settings, optimizer, memory
        self.device = task.sizes.device
        self.groups = population.client_groups
        self.private = [population.private_rows(place) for place in range(len(self.groups))]
        strategy = server.strategy
        own = not strategy.shares_parameters
        self.rates: list[list[Tensor]] = []
        for group, private in zip(self.groups, self.private, strict=True):
            group.keep(private, own, not strategy.serves_aggregate)
            if rates:
                names = {name: group.origins.get(name, name) for name, _ in group.whole.named_parameters()}
                found = matching(names.values(), rates)
                named = {name: rates[found[origin]] for name, origin in names.items() if origin in found}
                self.rates.append(group.column_rates(named, optimizer.rate))
        self.memories = [] if settings.reset_optimizer else [OptimizerMemory(group, optimizer) for group in self.groups]
        self.received: dict[str, Tensor] = {}
        self._sizes: list[int] = task.sizes.tolist()
        self._sample_bytes: dict[int, int] = {}
        self._plans: dict[int, tuple[list[int], list[np.ndarray[Any, np.dtype[np.int64]]]]] = {}
        self.padding = 0.0
        keep_freed_memory()
        self._side_by_side = SideBySide(threads)
        self._twins = _Twins()

    @property
    def sizes(self) -> dict[int, int]:
        """Samples of an epoch of every client, by its number."""
        return dict(enumerate(self._sizes))

    def _run_clients(self, current: Round) -> Mapping[str, Tensor] | None:
        strategy, chosen, report = self.server.strategy, current.chosen, current.report
        report.bytes_down = self._receive(chosen, current.index)
        total = sum(self._sizes[number] for number in chosen)
        averaging = strategy.shares_parameters
        of_changed = averaging and strategy.settings.row_mean == "changed"
        uniform = averaging and strategy.settings.client_weights == "uniform"
        share = (lambda size: 1 / len(chosen)) if uniform else (lambda size: size / total)
        example: Message | None = None
        mean: MeanOfClients | None = None
        filled, missing = 0, dict[int, ClientError]()
        for place, group in enumerate(self.groups):
            if strategy.shares_parameters:
                mean = MeanOfClients(group, self.private[place], of_changed)
            train = partial(self._train, place, current.index, group.base(), mean, share, missing)
            rows: list[RowChanges] = []
            memory_rows: list[RowChanges] = []
            for packs in self._side_by_side.map(train, self._packs(place, chosen)):
                for trained in packs:
                    sizes = trained.training.sizes
                    self._keep(place, trained.training)
                    rows += trained.rows
                    memory_rows += trained.memory_rows
                    for number, message in zip(trained.numbers, trained.messages, strict=True):
                        current.intake.take(number, message)
                        example = message
                    if mean is not None and trained.part is not None:
                        mean.add(trained.part)
                    current.count(float(trained.loss), sum(sizes))
                    filled += sum(slots(size, sizes[0], self.task.batch_size) for size in sizes)
                    if current.on_step is not None:
                        current.on_step(sum(sizes) * self.settings.local_epochs)
            RowChanges.apply(rows, group.rows)
            for memory in self.memories[place : place + 1]:
                RowChanges.apply(memory_rows, memory.rows)
        self.padding = 1.0 - current.seen / max(filled, 1)
        if mean is not None:
            example = self._example(mean, chosen, current.index)
        for number, size in zip(
            chosen, sizes_by_sender(example, chosen) if example else [0] * len(chosen), strict=True
        ):
            report.bytes_up[number] = 0 if number in missing else size
        for number in sorted(missing):
            self._leave_out(current, number, reason(missing[number]), missing[number])
        if current.on_bytes is not None:
            current.on_bytes(report.total_bytes)
        if mean is None or len(missing) == len(chosen):
            return None
        answered = sum(share(self._sizes[number]) for number in chosen if number not in missing) if missing else 1.0
        # Clients change no buffer of the package's own networks.
        buffers = {name: value for name, value in self.server.state.items() if name.startswith(BUFFER)}
        return {**mean.state(PARAMETER, answered), **buffers}

    def _serve(self, round_index: int) -> None:
        if self.server.strategy.serves_aggregate:
            self._install(round_index + 1)

    # Messages

    def _receive(self, chosen: Sequence[int], round_index: int) -> dict[int, int]:
        """What the server says to the clients of a round; bytes by client."""
        strategy = self.server.strategy
        if strategy.shares_parameters:
            return dict.fromkeys(chosen, self._install(round_index))
        found = {number: self.server.message_for(number, round_index) for number in chosen}
        told = {number: message for number, message in found.items() if message is not None}
        sizes = dict.fromkeys(chosen, 0)
        if told:
            # Messages to different clients differ in the numbers alone.
            sizes.update(dict.fromkeys(told, len(next(iter(told.values())).to_bytes())))
            arrays = strategy.understood(stacked(list(told.values()), self.device), {}, False)
            numbers = torch.tensor(list(told), device=self.device)
            for name, values in arrays.items():
                if name not in self.received:
                    self.received[name] = values.new_zeros(len(self._sizes), *values.shape[1:])
                self.received[name][numbers] = values
        return sizes

    def _install(self, round_index: int) -> int:
        """Take over the server's network, the same for all; its bytes."""
        strategy = self.server.strategy
        message = self.server.message_for(0, round_index)
        assert message is not None
        self.received = {name: value.to(self.device) for name, value in to_tensors(message.arrays).items()}
        values = strategy.installed(strategy.understood(self.received, {}, False))
        with torch.no_grad():
            state = self.groups[0].whole.state_dict(keep_vars=True)
            for name, value in values.items():
                state[name].copy_(value)
        return len(message.to_bytes())

    def _example(self, mean: MeanOfClients, chosen: Sequence[int], round_index: int) -> Message | None:
        """A client's upload as the strategy makes it of the network that all start from: it has the size of all others."""
        result = LocalResult(SharedState(self.groups[0].whole, lambda: mean.private), first=False)
        return self.server.strategy.upload(result, chosen[0], round_index)

    # Training

    def _packs(self, place: int, chosen: Sequence[int]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """Places in a group of the clients of a round, pack by pack."""
        groups = len(self.groups)
        mine = [number for number in chosen if number % groups == place]
        known = self._plans.get(place)
        if known is not None and known[0] == mine:
            return known[1]
        group, batch_size = self.groups[place], self.task.batch_size
        clients = np.asarray(mine, dtype=np.int64) // groups
        sizes = np.asarray([self._sizes[number] for number in mine], dtype=np.int64)
        copies = 4 * (3 + self.optimizer.memories)
        dense = group.dense_base().numel() + group.user_table().shape[1]
        row_bytes = copies * group.item_base().shape[1] + 8
        sample_bytes = self._bytes_of_sample(place)
        parts = packed(sizes, batch_size, copies * dense, row_bytes, sample_bytes, group.item_count, self.memory)
        plan = [clients[part] for part in parts]
        self._plans[place] = (mine, plan)
        return plan

    def _bytes_of_sample(self, place: int) -> int:
        """What autograd keeps of one sample, measured on two of a client."""
        if place not in self._sample_bytes:
            group = self.groups[place]
            clients = torch.zeros(1, dtype=torch.long, device=self.device)
            pack = group.pack(clients, clients.unsqueeze(1))
            base = group.base()
            kept: dict[int, list[int]] = {}

            def keep(tensor: Tensor) -> Tensor:
                kept.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor.untyped_storage().nbytes())
                return tensor

            totals = []
            for count in (2, 34):
                kept.clear()
                weights = group.weights(pack, base)
                received = self._received_by(group, pack, weights, clients)
                for leaf in weights.tensors():
                    leaf.requires_grad_()
                batch = self.task.blank(count, self.device)
                network = self._network(place).train()
                masks = [torch.ones(1, count, *shape, device=self.device) for _, shape in drawing(network)]
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    training = _Training(group, network, pack, weights, received, [], clients, [count])
                    self._step(training, batch, masks)
                totals.append(sum(max(sizes) for sizes in kept.values()))
            self._sample_bytes[place] = max(1, (totals[1] - totals[0]) // 32)
        return self._sample_bytes[place]

    def _network(self, place: int) -> nn.Module:
        """A group's network for this thread alone: being called for packed clients changes a module."""
        networks = self._twins.networks
        if place not in networks:
            networks[place] = self.groups[place].twin()
        return networks[place]

    def _train(
        self,
        place: int,
        round_index: int,
        base: tuple[Tensor, Tensor, Tensor],
        mean: MeanOfClients | None,
        share: Callable[[int], float],
        missing: dict[int, ClientError],
        clients: np.ndarray[Any, np.dtype[np.int64]],
    ) -> list[_Trained]:
        """Train packed clients for a round; changes nothing that another pack reads.

        Args:
            place: of the group.
            round_index: from 0.
            base: what all clients of the group have in common.
            mean: says what the clients add to the mean of all; None where none is made.
            share: weight of a client in that mean, by its samples.
            missing: takes the clients that fail; those packed with them are trained without them.
            clients: places in the group ``[c]``.

        Raises:
            ClientError: a client fails where all have to answer.
        """
        numbers = self.groups[place].numbers[torch.from_numpy(clients)].tolist()
        try:
            return [self._train_pack(place, round_index, base, mean, share, clients, numbers)]
        except Exception as error:
            who = f"clients {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"client {numbers[0]}"
            failed = ClientError(f"{who}, round {round_index + 1}, training: {error}")
            failed.__cause__ = error
            if isinstance(error, ClientError):
                failed = error
            if self.min_clients is None:
                raise failed from failed.__cause__
            if len(numbers) == 1:
                missing[numbers[0]] = failed
                return []
            # Who of them it was is found by trying parts of them.
            halves = np.array_split(clients, 2)
            tried = (self._train(place, round_index, base, mean, share, missing, half) for half in halves)
            return [trained for each in tried for trained in each]

    def _train_pack(
        self,
        place: int,
        round_index: int,
        base: tuple[Tensor, Tensor, Tensor],
        mean: MeanOfClients | None,
        share: Callable[[int], float],
        clients: np.ndarray[Any, np.dtype[np.int64]],
        numbers: Sequence[int],
    ) -> _Trained:
        """The packed clients when they have trained."""
        chosen = torch.from_numpy(clients).to(self.device)
        training, loss, knowledge = self._trained(place, round_index, base, chosen, numbers)
        group, pack, weights = training.group, training.pack, training.weights
        width = group.rows.data.shape[1]
        rows = [RowChanges.of(pack, weights.rows[..., :width])] if width else []
        memory_rows = []
        if self.memories and training.memory:
            memory_rows = [RowChanges.of(pack, torch.cat([each.rows for each in training.memory], 2))]
        if mean is None:
            messages = self._messages(training.sizes, numbers, round_index, knowledge)
            return _Trained(training, loss, rows, memory_rows, None, numbers, messages)
        shares = torch.tensor([share(size) for size in training.sizes], dtype=torch.float64, device=self.device)
        part = mean.part(pack, weights, shares)
        return _Trained(training, loss, rows, memory_rows, part, numbers, [None] * len(numbers))

    def _trained(
        self,
        place: int,
        round_index: int,
        base: tuple[Tensor, Tensor, Tensor],
        chosen: Tensor,
        numbers: Sequence[int],
    ) -> tuple[_Training, Tensor, dict[str, Tensor]]:
        """Packed clients after their epochs, their summed loss in the last one, and what they know, ``[c, ...]`` each."""
        group, settings, strategy = self.groups[place], self.settings, self.server.strategy
        assert settings.seed is not None
        streams = Streams(settings.seed, numbers, round_index)
        needs_clean = strategy.exchanges_knowledge and settings.clean_pass
        epochs, clean = self.task.draw(group, numbers, streams, settings.local_epochs, needs_clean)
        needed = torch.cat([self.task.needed(epoch) for epoch in [*epochs, *([clean] if clean is not None else [])]], 1)
        # Rows that start from what all have in common need not be those of the round before.
        stores = [group.rows] * bool(group.rows_resumed) + [each.rows for each in self.memories[place : place + 1]]
        pack = group.pack(chosen, needed, stores)
        weights = group.weights(pack, base)
        received = self._received_by(group, pack, weights, chosen)
        memory, counters = self._remembered(place, pack, weights)
        sizes = [self._sizes[number] for number in numbers]
        rates = self.rates[place] if self.rates else None
        network = self._network(place)
        training = _Training(group, network, pack, weights, received, memory, counters, sizes, rates)
        network.train()
        knowledge: dict[str, Tensor] = {}
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, epoch in enumerate(epochs):
            last = number == len(epochs) - 1
            told = []
            for step, batch in enumerate(epoch.batches(self.task.batch_size, sizes)):
                counts = self._left(sizes, step)
                losses, logits = self._trained_on(training.first(len(counts)), batch, counts, streams)
                told.append(losses)
                if last:
                    loss += (losses.double() * batch.weights.sum(1)).sum()
                if last and strategy.exchanges_knowledge and not settings.clean_pass:
                    self._collect(knowledge, batch, logits, len(sizes))
            self._check_trained(training, told, numbers, round_index)
        if clean is not None:
            network.eval()
            with torch.no_grad():
                for batch in clean.batches(self.task.batch_size, sizes):
                    _, logits = self._step(training.first(len(batch.labels)), batch, [])
                    self._collect(knowledge, batch, logits, len(sizes))
        if knowledge and not (finite := finite_clients(knowledge.values())).all():
            raise _of_clients(numbers, ~finite, round_index, "sending", "its message is not finite")
        return training, loss, knowledge

    def _check_trained(
        self, training: _Training, losses: Sequence[Tensor], numbers: Sequence[int], round_index: int
    ) -> None:
        """Raise :class:`ClientError` for packed clients whose loss or parameters are not finite after an epoch.

        Args:
            training: the clients.
            losses: of every step ``[clients that have samples left]``.
            numbers: of the clients.
            round_index: from 0.
        """
        total = losses[0].new_zeros(len(numbers))
        for each in losses:
            total[: len(each)] += each
        finite = finite_clients([total.unsqueeze(1), *training.weights.tensors()])
        if bool(finite.all()):
            return
        worst = min((~finite).nonzero().flatten().tolist(), key=lambda place: numbers[place])
        named, origins = training.group.named(training.weights), training.group.origins
        broken = [origins.get(name, name) for name, values in named.items() if not all_finite([values[worst]])]
        learner = (
            f"learner {type(self.optimizer).__name__.removeprefix('Batched')}, learning_rate {self.optimizer.rate:g}"
        )
        sentence = training_sentence(float(total[worst]), broken, learner)
        raise _of_clients(numbers, ~finite, round_index, "training", sentence)

    def _messages(
        self, sizes: Sequence[int], numbers: Sequence[int], round_index: int, knowledge: dict[str, Tensor]
    ) -> list[Message | None]:
        """What packed clients upload, where each has a message of its own."""
        result = LocalResult(SharedTensors({}, {}), first=False, collected=knowledge)
        message = self.server.strategy.upload(result, numbers[0], round_index)
        return [*unstacked(message, numbers)] if message is not None else [None] * len(numbers)

    def _left(self, sizes: Sequence[int], step: int) -> list[int]:
        """Samples in a step of every packed client that has any left; those are the first."""
        left = (min(size - step * self.task.batch_size, self.task.batch_size) for size in sizes)
        return [count for count in left if count > 0]

    def _trained_on(
        self, training: _Training, batch: Epoch, counts: Sequence[int], streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """One step of every packed client; losses ``[c]`` and logits ``[c, size, T]`` before it."""
        masks = streams.masks(counts, batch.labels.shape[1], drawing(training.network))
        masks = [mask.to(self.device) for mask in masks]
        leaves = training.weights.tensors()
        for leaf in leaves:
            leaf.requires_grad_()
        with self.settings.precision(self.device):
            losses, logits = self._step(training, batch, masks)
        gradients = list(torch.autograd.grad(losses.sum(), leaves))
        for leaf in leaves:
            leaf.requires_grad_(False)
        if self.settings.clip_grad_norm:
            clip_norms(gradients, self.settings.clip_grad_norm["max_norm"])
        memories = [each.tensors() for each in training.memory]
        self.optimizer.step(leaves, gradients, memories, training.counters, training.rates)
        return losses.detach(), logits.detach().float()

    def _remembered(self, place: int, pack: Pack, weights: Weights) -> tuple[list[Weights], Tensor]:
        """What the optimisers of packed clients remember, and their counters."""
        if self.memories:
            return self.memories[place].of(pack, weights), self.memories[place].counters[pack.clients]
        counters = weights.dense.new_zeros(len(pack.clients), self.optimizer.counters, dtype=torch.float64)
        return [weights.zeros() for _ in range(self.optimizer.memories)], counters

    def _keep(self, place: int, training: _Training) -> None:
        """Keep what outlives the round but for the item rows, which are stored together."""
        training.group.write(training.pack, training.weights)
        if self.memories:
            self.memories[place].write(training.pack, training.memory, training.counters)

    def _received_by(self, group: ClientGroup, pack: Pack, weights: Weights, chosen: Tensor) -> dict[str, Tensor]:
        """What the server has said to packed clients, ``[c, ...]`` each."""
        strategy = self.server.strategy
        if not strategy.shares_parameters:
            return {name: values[group.numbers[chosen]] for name, values in self.received.items()}
        if not strategy.settings.proximal_weight:
            return {}
        # A client starts from what it has received; of the item tables it needs the rows that it holds.
        started = group.named(Weights(weights.dense.clone(), weights.rows.clone(), weights.users.clone()))
        return {name: started[parameter_of(name)] for name in self.received if parameter_of(name) in started}

    def _step(self, training: _Training, batch: Epoch, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The strategy's loss of a batch ``[c]``, and its logits ``[c, size, T]``; without them ``[c, 0, 0]``."""
        strategy, private = self.server.strategy, self.private[0]
        clean, with_logits = not torch.is_grad_enabled(), strategy.exchanges_knowledge

        def said(step: Step, parameters: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            loss = step.loss if clean else strategy.loss(step, received, SharedTensors(parameters, private))
            return loss, step.logits if step.logits is not None else loss.new_zeros(0, 0)

        losses, logits = stepped(
            self.task,
            (training.group, training.network, training.pack, training.weights, training.buffers),
            batch,
            masks,
            with_logits,
            said,
            dict(training.received),
        )
        assert isinstance(losses, Tensor) and isinstance(logits, Tensor)
        return losses, logits

    def _collect(self, knowledge: dict[str, Tensor], batch: Epoch, logits: Tensor, clients: int) -> None:
        """Add a batch to what packed clients know; it may hold the first of them alone."""
        real = batch.weights > 0
        slot = torch.nonzero(real)[:, 0]
        step = Step(logits.new_zeros(()), len(slot), logits[real], batch.labels[real], batch.items[real])
        parts = self.server.strategy.knowledge.collect_of_many(step, slot, clients)
        for name, part in parts.items():
            knowledge[name] = knowledge[name] + part if name in knowledge else part

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Server state, what clients have received, and the optimisers' memories; the networks are saved with the model."""
        return {
            "server": self.server.state_dict(),
            "received": dict(self.received),
            "memories": [memory.state_dict() for memory in self.memories],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.server.load_state_dict(state["server"])
        self.received = {name: values.to(self.device) for name, values in state["received"].items()}
        for memory, saved in zip(self.memories, state["memories"], strict=True):
            memory.load_state_dict(saved)


def _of_clients(numbers: Sequence[int], which: Tensor, round_index: int, stage: str, sentence: str) -> ClientError:
    """The error of some of packed clients ``which [c]``, by their numbers, in ascending order."""
    own = sorted(number for number, of_it in zip(numbers, which.tolist(), strict=True) if of_it)
    error = ClientError(f"client{'s' * (len(own) > 1)} {listed(own, 10)}, round {round_index + 1}, {stage}: {sentence}")
    error.__cause__ = NotFiniteError(sentence)
    return error
