"""The ``fleet`` engine: the clients of a round train side by side, in tensors with a leading axis of clients.

Networks, losses, strategies and ends of the wire are those of the ``local`` engine, networks called for many clients at once by
``torch.func.vmap``; random draws are the same function, so that results differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.engine.base import FAILURES, ClientError, Engine, Round, serving
from recbole_fedkd.engine.fleet.exchange import (
    CommonDownlink,
    Downlink,
    Links,
    OwnDownlink,
)
from recbole_fedkd.engine.fleet.factor_exchange import FactorDownlink, FactorUplink
from recbole_fedkd.engine.fleet.factors import FactorFleetPopulation, FactorSamples
from recbole_fedkd.engine.fleet.group import Base
from recbole_fedkd.engine.fleet.memory import OptimizerMemory
from recbole_fedkd.engine.fleet.obstacle import is_of_packing
from recbole_fedkd.engine.fleet.optimizers import BatchedOptimizer
from recbole_fedkd.engine.fleet.packing import packed, places_of
from recbole_fedkd.engine.fleet.population import CompactPopulation
from recbole_fedkd.engine.fleet.samples import FleetTask, ManySizes
from recbole_fedkd.engine.fleet.serving import GroupAverage
from recbole_fedkd.engine.fleet.threads import SideBySide
from recbole_fedkd.engine.fleet.training import Clients, PackTraining, Trained
from recbole_fedkd.engine.fleet.uplink import MeanUplink, MessageUplink, Uplink
from recbole_fedkd.federated.client import ClientSettings
from recbole_fedkd.federated.message import SERVER
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.strategy import Strategy
from recbole_fedkd.federated.wire import ClientLink
from recbole_fedkd.model.shared import matching

_OF_EACH = ("understood", "audience")


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
        everybody: whether every client takes part in every round.
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
        everybody: bool = True,
    ) -> None:
        super().__init__(server, min_clients)
        self.population, self.task = population, task.kept(population.mapped)
        self.settings, self.optimizer, self.memory = settings, optimizer, memory
        task = self.task
        self.device = task.sizes.device
        self.groups = population.client_groups
        private = [population.private_rows(group_index) for group_index in range(len(self.groups))]
        strategy = server.strategy
        common = strategy.shares_parameters and strategy.same_for_all and not strategy.remembers_sent
        # Who overrides these may tell clients apart.
        common = common and all(getattr(type(strategy), name) is getattr(Strategy, name) for name in _OF_EACH)
        if not strategy.serves_aggregate:
            # Users are served by their client's own network: one that sits out keeps the tables of another round.
            common = common and everybody and bool((task.sizes > 0).all())
        column_rates: list[list[Tensor]] = []
        for group, stays in zip(self.groups, private, strict=True):
            group.keep(stays, not common, not (common and strategy.serves_aggregate))
            if rates:
                names = {name: group.origins.get(name, name) for name, _ in group.whole.named_parameters()}
                pattern_of = matching(names.values(), rates)
                named = {name: rates[pattern_of[origin]] for name, origin in names.items() if origin in pattern_of}
                column_rates.append(group.column_rates(named, optimizer.rate))
        self.memories = [] if settings.reset_optimizer else [OptimizerMemory(group, optimizer) for group in self.groups]
        self.averages = [GroupAverage(group, settings.serve_average) for group in self.groups if settings.serve_average]
        self.training = PackTraining(
            self.groups, private, task, strategy, settings, optimizer, column_rates, self.memories
        )
        self._sizes = self.training.sizes
        listener = ClientLink(SERVER, strategy, server.codecs, False, server.state) if common else None
        self.links = Links(server, settings.error_feedback, listener)
        self.downlink: Downlink = (CommonDownlink if common else OwnDownlink)(
            server, self.groups, self.links, self.device
        )
        self.uplink: Uplink = MessageUplink(server, self.groups, private, self.links)
        self._side_by_side = SideBySide(threads)
        if isinstance(task, FactorSamples):
            assert isinstance(population, FactorFleetPopulation)
            mapped = self._side_by_side.map
            self.downlink = FactorDownlink(server, self.groups, self.links, self.device, task, population, mapped)
            self.uplink = FactorUplink(server, self.downlink)
        elif common and len(self.groups) == 1 and MeanUplink.fits(server):
            self.uplink = MeanUplink(server, self.groups[0], private[0], self.links)
        self._plans: dict[int, tuple[list[list[int]], list[Clients]]] = {}
        self._trains: tuple[frozenset[int], ManySizes] | None = None
        self.padding = 0.0

    @property
    def sizes(self) -> dict[int, int]:
        """Samples of an epoch of every client, by its number."""
        return dict(enumerate(self._sizes))

    @property
    def samples(self) -> ManySizes:
        """As of :class:`Engine`, made once: of a million clients it takes longer than a round of a thousand."""
        if self._trains is None or self._trains[0] is not self.held_out:
            self._trains = self.held_out, ManySizes(self.task.sizes, self.held_out)
        return self._trains[1]

    @property
    def trained(self) -> Sequence[int]:
        """As of :class:`Engine`."""
        return self.samples.numbers

    def _run_clients(self, current: Round) -> Mapping[str, Tensor] | None:
        chosen, report = current.chosen, current.report
        for average in self.averages:
            average.restore()
        before = {number: self.downlink.snapshot(number) for number in chosen if self.min_clients is not None}
        report.bytes_down, failed = self.downlink.hear(chosen, current.index)
        report.bytes_up = dict.fromkeys(chosen, 0)
        missing = dict[int, ClientError]()
        for number in sorted(failed):
            missing[number] = ClientError.of(f"client {number}", current.index, "receiving", failed[number])
            if self.min_clients is None:
                raise missing[number]
        chosen = [number for number in chosen if number not in missing]
        self.uplink.begin(current)
        filled = 0
        for group_index, group in enumerate(self.groups):
            base = group.base()
            train = partial(self._train, group_index, current.index, base, missing)
            for packs in self._side_by_side.map(train, self._packs(group_index, chosen)):
                for trained in packs:
                    answered = self._answered(trained, base, current, missing)
                    self._keep(group_index, answered)
                    sizes = trained.training.sizes
                    filled += places_of(np.asarray(sizes), self.task.batch_size)
                    if current.on_step is not None:
                        current.on_step(sum(sizes) * self.settings.local_epochs)
            for store in [group.rows, *(memory.rows for memory in self.memories[group_index : group_index + 1])]:
                store.tidy()
        self.padding = 1.0 - current.seen / max(filled, 1)
        for number in sorted(missing):
            self._leave_out(current, number, missing[number])
            self.downlink.restore(number, before[number])
        if current.on_bytes is not None:
            current.on_bytes(report.total_bytes)
        return self.uplink.finish(current)

    def _answered(self, trained: Trained, base: Base, current: Round, missing: dict[int, ClientError]) -> Trained:
        """Those of packed clients whose answers are taken; the others are missing."""
        refused = self.uplink.say(trained, base, current)
        if not refused:
            return trained
        of_packing = (error for error in refused.values() if is_of_packing(error.__cause__))
        error = next(of_packing, refused[min(refused)])
        if self.min_clients is None or is_of_packing(error.__cause__):
            raise error from error.__cause__
        missing.update(refused)
        kept = [slot for slot, number in enumerate(trained.numbers) if number not in refused]
        return trained.select(torch.tensor(kept, dtype=torch.long))

    def _keep(self, group_index: int, trained: Trained) -> None:
        """Keep what outlives the round."""
        training, group = trained.training, self.groups[group_index]
        group.write(training.pack, training.weights)
        group.keep_received(training.pack.clients, training.heard.installed)
        if self.memories:
            self.memories[group_index].write(training.pack, training.memory, training.counters)

    def _serve(self, round_index: int) -> None:
        if self.server.strategy.serves_aggregate:
            with serving("all clients", round_index):
                fresh = self.downlink.serve(round_index + 1)
                for group_index in range(len(self.groups)):
                    self._install(group_index, [number for number in fresh if number % len(self.groups) == group_index])
        for average in self.averages:
            average.serve()

    @torch.no_grad()
    def _install(self, group_index: int, numbers: Sequence[int]) -> None:
        """Put what clients have been told into their networks, outside of any training."""
        group, base = self.groups[group_index], self.groups[group_index].base()
        for number in numbers:
            heard = self.downlink.heard(group_index, [number])
            client = torch.tensor([number // len(self.groups)], device=self.device)
            needed = torch.arange(group.item_count if heard.whole_tables else 1, device=self.device).unsqueeze(0)
            pack = group.pack(client, needed, [group.rows])
            weights, buffers = group.weights(pack, base), group.buffers_of(pack)
            group.install(heard.installed, pack, weights, buffers)
            group.write(pack, weights)
            group.keep_received(client, heard.installed)
        group.rows.tidy()

    def try_step(self) -> None:
        """Have a client hear the server and its loss be called once."""
        number = next(iter(self.samples))
        self.downlink.hear([number], 0)
        group_index = number % len(self.groups)
        self.training.bytes_of_sample(group_index, self.downlink.heard(group_index, [number]))

    # Packs

    def _packs(self, group_index: int, chosen: Sequence[int]) -> list[Clients]:
        """Places in a group of the clients of a round, pack by pack."""
        groups, pads = len(self.groups), self.server.strategy.pads
        alike: dict[Any, list[int]] = {}
        for number in chosen:
            if number % groups == group_index:
                key: Any = number  # by itself, where its training will say what is wrong with it
                with suppress(*FAILURES):
                    key = self.downlink.alike(number), 0 if pads else self._sizes[number]
                alike.setdefault(key, []).append(number)
        parts = list(alike.values())
        known = self._plans.get(group_index)
        if known is not None and known[0] == parts:
            return known[1]
        plan = [pack for numbers in parts for pack in self._packs_of(group_index, numbers)]
        self._plans[group_index] = (parts, plan)
        return plan

    def _packs_of(self, group_index: int, numbers: Sequence[int]) -> list[Clients]:
        """Packs of clients that can be packed together."""
        group, clients = self.groups[group_index], np.asarray(numbers, dtype=np.int64) // len(self.groups)
        try:
            heard = self.downlink.heard(group_index, numbers[:1])
            sample_bytes = self.training.bytes_of_sample(group_index, heard)
        except FAILURES:  # by the first one alone, maybe; its training says by what
            halves = [numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]]
            return [pack for half in halves for pack in self._packs_of(group_index, half)] if halves[0] else [clients]
        sizes = np.asarray([self._sizes[number] for number in numbers], dtype=np.int64)
        copies = 4 * (3 + self.optimizer.memories)
        dense = group.dense_base().numel() + group.user_table().shape[1]
        heard_bytes = sum(value.nbytes for known in (heard.own, heard.installed) for value in known.values())
        row_bytes = copies * group.item_base().shape[1] + 8
        if heard.whole_tables or not self.server.strategy.pads:
            heard_bytes += row_bytes * group.item_count
        parts = packed(
            sizes,
            self.task.batch_size,
            copies * dense + heard_bytes,
            row_bytes,
            sample_bytes,
            group.item_count,
            self.memory,
        )
        return [clients[part] for part in parts]

    def _train(
        self,
        group_index: int,
        round_index: int,
        base: Base,
        missing: dict[int, ClientError],
        clients: Clients,
    ) -> list[Trained]:
        """Train packed clients for a round; changes nothing that another pack reads.

        Args:
            group_index: which group they are of.
            round_index: from 0.
            base: what all clients of the group have in common.
            missing: takes the clients that fail; those packed with them are trained without them.
            clients: places in the group ``[c]``.

        Raises:
            ClientError: a client fails where all have to answer.
        """
        numbers = self.groups[group_index].numbers[torch.from_numpy(clients)].tolist()
        try:
            heard = self.downlink.heard(group_index, numbers)
            trained = self.training.train(group_index, round_index, base, heard, clients, numbers)
            return [trained.with_part(self.uplink.part(trained.training))]
        except FAILURES as error:
            if str(error).startswith("vmap:"):  # of a loss that does so in later rounds alone
                error.args = (f"{str(error).split('. ')[0]}; engine=local asks one client at a time",)
            who = f"clients {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"client {numbers[0]}"
            failed = ClientError.of(who, round_index, "training", error)
            if self.min_clients is None or is_of_packing(error):
                raise failed from failed.__cause__
            if len(numbers) == 1:
                missing[numbers[0]] = failed
                return []
            # Who of them it was is found by trying parts of them.
            halves = np.array_split(clients, 2)
            tried = (self._train(group_index, round_index, base, missing, half) for half in halves)
            return [trained for part in tried for trained in part]

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Server state, what clients have heard and said, and what they remember; the networks are saved with the model."""
        return {
            "server": self.server.state_dict(),
            "downlink": self.downlink.state_dict(),
            "links": self.links.state_dict(),
            "memories": [memory.state_dict() for memory in self.memories],
            "averages": [average.state_dict() for average in self.averages],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.server.load_state_dict(state["server"])
        self.downlink.load_state_dict(state["downlink"])
        self.links.load_state_dict(state["links"])
        for memory, saved in zip(self.memories, state["memories"], strict=True):
            memory.load_state_dict(saved)
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(saved)
