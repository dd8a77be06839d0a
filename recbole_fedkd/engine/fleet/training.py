"""Packed clients in training: the strategy's loss and the network's steps, called for many clients at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_fedkd.engine.base import ClientError
from recbole_fedkd.engine.fleet.by_hand import compiled_epoch, derived_by_hand, derives_by_hand
from recbole_fedkd.engine.fleet.draws import drawn_factors
from recbole_fedkd.engine.fleet.group import Base, ClientGroup
from recbole_fedkd.engine.fleet.heard import Heard, Received, selected
from recbole_fedkd.engine.fleet.memory import OptimizerMemory
from recbole_fedkd.engine.fleet.messages import SharedTensors
from recbole_fedkd.engine.fleet.optimizers import BatchedOptimizer, clip_norms
from recbole_fedkd.engine.fleet.samples import Epoch, FleetTask
from recbole_fedkd.engine.fleet.steps import drawing, stepped
from recbole_fedkd.engine.fleet.store import Pack, Weights
from recbole_fedkd.errors import listed
from recbole_fedkd.federated.aggregate import add_to
from recbole_fedkd.federated.client import ClientSettings
from recbole_fedkd.federated.draws import KeyedDraws, KeyedDropout
from recbole_fedkd.federated.strategy import Strategy
from recbole_fedkd.federated.task import Step
from recbole_fedkd.finite import NotFiniteError, all_finite, finite_clients, training_sentence
from recbole_fedkd.model.factorization import dense
from recbole_fedkd.model.shared import Rows

Clients = np.ndarray[Any, np.dtype[np.int64]]
"""Places of clients in their group ``[c]``."""


@dataclass(frozen=True)
class Training:
    """Packed clients while they train.

    Attributes:
        group: their group.
        network: the group's, for this thread alone.
        pack: who they are, and their item ids.
        weights: their parameters, changed in place.
        heard: what the server has said to them.
        memory: what their optimisers remember, in the shapes of ``weights``, changed in place.
        counters: of their optimisers.
        sizes: samples of an epoch of each.
        buffers: the buffers that differ from client to client, ``[c, ...]``.
        rates: learning rate of every column of the weights; None: the optimiser's own.
        start: the parameters that teach them, which are those that they started from; None without a teacher.
    """

    group: ClientGroup
    network: nn.Module
    pack: Pack
    weights: Weights
    heard: Heard
    memory: Sequence[Weights]
    counters: Tensor
    sizes: Sequence[int]
    buffers: Mapping[str, Tensor]
    rates: Sequence[Tensor] | None = None
    start: Weights | None = None

    def first(self, count: int) -> Training:
        """The first clients alone, in the same memory."""
        return self if count == len(self.sizes) else self.select(slice(count))

    def select(self, slots: Tensor | slice) -> Training:
        """Some of the clients; by numbers ``[n]`` in memory of their own."""
        return replace(
            self,
            pack=self.pack.select(slots),
            weights=self.weights.select(slots),
            heard=self.heard.select(slots),
            memory=[memory.select(slots) for memory in self.memory],
            counters=self.counters[slots],
            sizes=self.sizes[slots] if isinstance(slots, slice) else [self.sizes[slot] for slot in slots.tolist()],
            buffers=selected(self.buffers, slots),
            start=self.start.select(slots) if self.start is not None else None,
        )


@dataclass(frozen=True)
class Trained:
    """What packed clients leave behind when they have trained.

    Attributes:
        training: they themselves.
        numbers: of the clients.
        losses: of each, summed over the samples of the last epoch ``[c]``, in double precision.
        collected: what each knows, ``[c, ...]`` by name.
        part: what has been prepared of their answers.
    """

    training: Training
    numbers: Sequence[int]
    losses: Tensor
    collected: Mapping[str, Tensor]
    part: Any = None

    def with_part(self, part: Any) -> Trained:
        """The same clients with what has been prepared of their answers."""
        return replace(self, part=part)

    def select(self, slots: Tensor) -> Trained:
        """Some of the clients."""
        numbers = [self.numbers[slot] for slot in slots.tolist()]
        return Trained(self.training.select(slots), numbers, self.losses[slots], selected(self.collected, slots))


class _Twins(threading.local):
    """Networks by group, each thread's own."""

    def __init__(self) -> None:
        self.networks: dict[int, nn.Module] = {}


class PackTraining:
    """Trains packs of clients; calls for different packs may run at the same time.

    Args:
        groups: the clients.
        private: of each group, what never leaves its client.
        task: their samples.
        strategy: says their loss.
        settings: how to train; with a seed.
        optimizer: of every client.
        rates: of each group, the learning rate of every column; empty: all learn at the optimiser's own.
        memories: of each group, what the optimisers remember; empty: nothing outlives a round.
    """

    def __init__(
        self,
        groups: Sequence[ClientGroup],
        private: Sequence[Mapping[str, Rows]],
        task: FleetTask,
        strategy: Strategy,
        settings: ClientSettings,
        optimizer: BatchedOptimizer,
        rates: Sequence[Sequence[Tensor]],
        memories: Sequence[OptimizerMemory],
    ) -> None:
        self.groups, self.private, self.task, self.strategy = groups, private, task, strategy
        self.settings, self.optimizer, self.rates, self.memories = settings, optimizer, rates, memories
        self.device = task.sizes.device
        self.sizes: Sequence[int] = task.sizes.cpu().numpy().data
        self._sample_bytes: dict[int, int] = {}
        self._twins = _Twins()

    def train(
        self,
        group_index: int,
        round_index: int,
        base: Base,
        heard: Heard,
        clients: Clients,
        numbers: Sequence[int],
    ) -> Trained:
        """Train packed clients for a round; changes nothing that another pack reads.

        Args:
            group_index: which group they are of.
            round_index: from 0.
            base: what all clients of the group have in common.
            heard: what they have been told.
            clients: places in the group ``[c]``.
            numbers: of the clients.

        Raises:
            ClientError: numbers are not finite, naming the clients.
        """
        settings, strategy, task = self.settings, self.strategy, self.task
        assert settings.seed is not None
        draws = KeyedDraws(settings.seed, numbers, round_index)
        extracts = strategy.collects and settings.clean_pass
        count = settings.local_epochs if heard.learns else 0
        epochs, clean = task.draw(self.groups[group_index], numbers, draws, count, extracts or not heard.learns)
        drawn = [*epochs, *([clean] if clean is not None else [])]
        needed = torch.cat([task.needed(epoch) for epoch in drawn], 1)
        training = self._begin(group_index, base, heard, clients, numbers, needed, round_index)
        training.network.train()
        collected: dict[str, Tensor] = {}
        losses = torch.zeros(len(numbers), dtype=torch.float64, device=self.device)
        for number, epoch in enumerate(epochs):
            done = self._compiled_epoch(training, epoch)
            if done is not None:
                losses = done
                self._check_trained(training, [losses], numbers, round_index)
                continue
            last = number == len(epochs) - 1
            of_steps = []
            for step, batch in enumerate(epoch.batches(task.batch_size, training.sizes)):
                counts = self._left(training.sizes, step)
                of_step, logits, hidden = self._trained_on(training.first(len(counts)), batch, counts, draws.dropout)
                of_steps.append(of_step)
                if last:
                    losses[: len(counts)] += of_step.double() * batch.weights.sum(1)
                if last and strategy.collects and not settings.clean_pass:
                    self._collect(collected, batch, logits, hidden, len(numbers))
            self._check_trained(training, of_steps, numbers, round_index)
        if clean is not None:
            training.network.eval()
            with torch.no_grad():
                for batch in clean.batches(task.batch_size, training.sizes):
                    of_step, logits, hidden = self._step(training.first(len(batch.labels)), batch, [])
                    if not heard.learns:
                        losses[: len(of_step)] += of_step.double() * batch.weights.sum(1)
                    if extracts:
                        self._collect(collected, batch, logits, hidden, len(numbers))
        if collected and not (finite := finite_clients(collected.values())).all():
            raise _of_clients(numbers, ~finite, round_index, "sending", "its message is not finite")
        return Trained(training, numbers, losses, collected)

    def _begin(
        self,
        group_index: int,
        base: Base,
        heard: Heard,
        clients: Clients,
        numbers: Sequence[int],
        needed: Tensor,
        round_index: int,
    ) -> Training:
        """Packed clients as they start into a round."""
        group = self.groups[group_index]
        chosen = torch.from_numpy(clients).to(self.device)
        # Rows that start from what all have in common need not be those of the round before.
        stores = [group.rows] * bool(group.rows_resumed)
        stores += [memory.rows for memory in self.memories[group_index : group_index + 1]]
        if heard.whole_tables or not self.strategy.pads:
            needed = torch.arange(group.item_count, device=self.device).expand(len(numbers), -1)
        pack = group.pack(chosen, needed, stores)
        weights = group.weights(pack, base)
        buffers = group.buffers_of(pack)
        group.install(heard.installed, pack, weights, buffers)
        memory, counters = self._remembered(group_index, pack, weights)
        sizes = [self.sizes[number] for number in numbers]
        rates = self.rates[group_index] if self.rates else None
        taught = self.strategy.taught_by_received and round_index > 0  # what comes down first knows nothing
        start = weights.select(torch.arange(len(numbers))) if taught else None
        network = self._network(group_index)
        return Training(group, network, pack, weights, heard, memory, counters, sizes, buffers, rates, start)

    def _remembered(self, group_index: int, pack: Pack, weights: Weights) -> tuple[list[Weights], Tensor]:
        """What the optimisers of packed clients remember, and their counters."""
        if self.memories:
            memory = self.memories[group_index]
            return memory.of(pack, weights), memory.counters[pack.clients]
        counters = weights.dense.new_zeros(len(pack.clients), self.optimizer.counters, dtype=torch.float64)
        return [weights.zeros() for _ in range(self.optimizer.memories)], counters

    def _left(self, sizes: Sequence[int], step: int) -> list[int]:
        """Samples in a step of every packed client that has any left; those are the first."""
        left = (min(size - step * self.task.batch_size, self.task.batch_size) for size in sizes)
        return [count for count in left if count > 0]

    def _by_hand(self, training: Training) -> bool:
        return not self.settings.enable_amp and derives_by_hand(self.task, self.strategy, training.network)

    def _compiled_epoch(self, training: Training, epoch: Epoch) -> Tensor | None:
        """Losses of packed clients ``[c]`` that have trained in compiled code; None where that cannot be."""
        if self.settings.clip_grad_norm or not self._by_hand(training):
            return None
        clients = training.group, training.network, training.pack, training.weights
        return compiled_epoch(self.optimizer, training.rates, clients, self.task.batch_size, training.sizes, epoch)

    def _trained_on(
        self, training: Training, batch: Epoch, counts: Sequence[int], dropout: KeyedDropout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of every packed client; losses ``[c]``, logits ``[c, size, T]`` and hidden states before it."""
        factors = drawn_factors(dropout, counts, batch.labels.shape[1], drawing(training.network), self.device)
        leaves = training.weights.tensors()
        if self._by_hand(training):
            clients = training.group, training.network, training.pack, training.weights
            losses, made = derived_by_hand(self.task, *clients, batch)
            adds = self.optimizer.adds and not self.settings.clip_grad_norm
            gradients: list[Any] = made if adds else [dense(gradient) for gradient in made]
            logits = hidden = losses.new_zeros(len(losses), 0, 0)
        else:
            with self.settings.precision(self.device):
                teacher = self._taught(training, batch)
                for leaf in leaves:
                    leaf.requires_grad_()
                losses, logits, hidden = self._step(training, batch, factors, teacher)
            gradients = list(torch.autograd.grad(losses.sum(), leaves))
            for leaf in leaves:
                leaf.requires_grad_(False)
        if self.settings.clip_grad_norm:
            clip_norms(gradients, self.settings.clip_grad_norm["max_norm"])
        memories = [memory.tensors() for memory in training.memory]
        self.optimizer.step(leaves, gradients, memories, training.counters, training.rates)
        return losses.detach(), logits.detach().float(), hidden.detach().float()

    @torch.no_grad()
    def _taught(self, training: Training, batch: Epoch) -> Tensor | None:
        """Logits ``[c, size, T]`` of what packed clients started from, without dropout; None without such a teacher."""
        if training.start is None:
            return None
        training.network.eval()
        _, logits, _ = self._step(replace(training, weights=training.start), batch, [])
        training.network.train()
        return logits

    def _step(
        self, training: Training, batch: Epoch, factors: Sequence[Tensor], teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The strategy's loss of a batch ``[c]``, its logits ``[c, size, T]`` and hidden states; without them ``[c, 0, 0]``."""
        strategy, heard, private = self.strategy, training.heard, self.private[self.groups.index(training.group)]
        clean = not torch.is_grad_enabled()

        def said(
            step: Step, parameters: Mapping[str, Tensor], own: Mapping[str, Tensor], items: Tensor, taught: list[Tensor]
        ) -> tuple[Tensor, Tensor, Tensor]:
            step = replace(step, teacher=taught[0]) if taught else step
            received = Received({**heard.common, **own}, heard.tables, items)
            loss = (
                step.loss if clean else strategy.objective(step, received, SharedTensors(lambda: parameters, private))
            )
            hidden = step.hidden if strategy.reads_hidden else None
            nothing = loss.new_zeros(0, 0)
            return loss, step.logits if step.logits is not None else nothing, hidden if hidden is not None else nothing

        losses, logits, hidden = stepped(
            self.task,
            (training.group, training.network, training.pack, training.weights, training.buffers),
            batch,
            factors,
            strategy.exchanges_knowledge or strategy.taught_by_received,
            said,
            dict(heard.own),
            training.pack.items,
            [teacher] if teacher is not None else [],
        )
        assert isinstance(losses, Tensor) and isinstance(logits, Tensor) and isinstance(hidden, Tensor)
        return losses, logits, hidden

    def _collect(
        self, collected: dict[str, Tensor], batch: Epoch, logits: Tensor, hidden: Tensor, clients: int
    ) -> None:
        """Add a batch to what packed clients know; it may hold the first of them alone."""
        real = batch.weights > 0
        slot = torch.nonzero(real)[:, 0]
        step = Step(logits.new_zeros(()), len(slot), logits[real], batch.labels[real], batch.items[real])
        step = replace(step, hidden=hidden[real]) if hidden.numel() else step
        add_to(collected, self.strategy.knowledge.collect_of_many(step, slot, clients))

    def _check_trained(
        self, training: Training, losses: Sequence[Tensor], numbers: Sequence[int], round_index: int
    ) -> None:
        """Raise :class:`ClientError` for packed clients whose loss or parameters are not finite after an epoch.

        Args:
            training: the clients.
            losses: of every step ``[clients that have samples left]``.
            numbers: of the clients.
            round_index: from 0.
        """
        total = losses[0].new_zeros(len(numbers))
        for of_step in losses:
            total[: len(of_step)] += of_step
        finite = finite_clients([total.unsqueeze(1), *training.weights.tensors()])
        if bool(finite.all()):
            return
        worst = min((~finite).nonzero().flatten().tolist(), key=lambda slot: numbers[slot])
        named, origins = training.group.named(training.weights), training.group.origins
        broken = [origins.get(name, name) for name, values in named.items() if not all_finite([values[worst]])]
        learner = (
            f"learner {type(self.optimizer).__name__.removeprefix('Batched')}, learning_rate {self.optimizer.rate:g}"
        )
        sentence = training_sentence(float(total[worst]), broken, learner)
        raise _of_clients(numbers, ~finite, round_index, "training", sentence)

    def bytes_of_sample(self, group_index: int, heard: Heard) -> int:
        """What autograd keeps of one sample, measured on two of the group's first client, which has heard ``heard``."""
        if group_index not in self._sample_bytes:
            group = self.groups[group_index]
            clients = torch.zeros(1, dtype=torch.long, device=self.device)
            base = group.base()
            kept: dict[int, list[int]] = {}

            def keep(tensor: Tensor) -> Tensor:
                kept.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor.untyped_storage().nbytes())
                return tensor

            totals = []
            for count in (2, 34):
                kept.clear()
                pack = group.pack(clients, clients.unsqueeze(1))
                weights = group.weights(pack, base)
                for leaf in weights.tensors():
                    leaf.requires_grad_()
                batch = self.task.blank(count, self.device)
                network = self._network(group_index).train()
                factors = [torch.ones(1, count, *shape, device=self.device) for _, shape in drawing(network)]
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    buffers = group.buffers_of(pack)
                    training = Training(group, network, pack, weights, heard, [], clients, [count], buffers)
                    self._step(training, batch, factors)
                totals.append(sum(max(sizes) for sizes in kept.values()))
            self._sample_bytes[group_index] = max(1, (totals[1] - totals[0]) // 32)
        return self._sample_bytes[group_index]

    def _network(self, group_index: int) -> nn.Module:
        """A group's network for this thread alone: being called for packed clients changes a module."""
        networks = self._twins.networks
        if group_index not in networks:
            networks[group_index] = self.groups[group_index].twin()
        return networks[group_index]


def _of_clients(numbers: Sequence[int], which: Tensor, round_index: int, stage: str, sentence: str) -> ClientError:
    """The error of some of packed clients ``which [c]``, by their numbers, in ascending order."""
    own = sorted(number for number, of_it in zip(numbers, which.tolist(), strict=True) if of_it)
    error = ClientError(f"client{'s' * (len(own) > 1)} {listed(own, 10)}, round {round_index + 1}, {stage}: {sentence}")
    error.__cause__ = NotFiniteError(sentence)
    return error
