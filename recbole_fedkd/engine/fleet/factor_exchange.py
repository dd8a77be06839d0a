"""What the fleet's clients say of item factors, and what they hear: their sums made, encoded and added up at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.distillation.exchange import shortened
from recbole_fedkd.engine.base import FAILURES, ClientError, Round
from recbole_fedkd.engine.fleet.exchange import Downlink, Links
from recbole_fedkd.engine.fleet.factors import FactorFleetPopulation, FactorSamples, Mapped
from recbole_fedkd.engine.fleet.group import Base, ClientGroup
from recbole_fedkd.engine.fleet.heard import Heard
from recbole_fedkd.engine.fleet.messages import SharedTensors
from recbole_fedkd.engine.fleet.obstacle import is_of_packing
from recbole_fedkd.engine.fleet.training import Trained, Training
from recbole_fedkd.engine.fleet.uplink import Uplink
from recbole_fedkd.federated.aggregate import Sums
from recbole_fedkd.federated.clipping import ClipSettings
from recbole_fedkd.federated.codec import squared_error
from recbole_fedkd.federated.dialogue import answer, on_device, understood
from recbole_fedkd.federated.knowledge.factors import FactorKnowledge, exact_sums
from recbole_fedkd.federated.lengths import array_bytes
from recbole_fedkd.federated.message import Training as TrainedOn
from recbole_fedkd.federated.message import check_arrays
from recbole_fedkd.federated.row_codecs import Block, Seen, goes_row_by_row, seen_rows
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.stacked import lengths
from recbole_fedkd.federated.stage import Clip
from recbole_fedkd.federated.strategy import LocalResult


class FactorDownlink(Downlink):
    """Totals come down, the same for all; to a client that was left out they come again in the next round.

    Args:
        server: the server.
        groups: the clients, one group.
        links: the clients' ends of the wire.
        device: where their networks live.
        task: their rows.
        population: the clients' heads, which are told what each has heard.
        mapped: calls a function for some rows after others, maybe for several at a time.

    Attributes:
        received: totals of the stages so far.
        own: each client's part of them as the server has it, ``[pairs, ...]`` by stage.
    """

    def __init__(
        self,
        server: Server,
        groups: Sequence[ClientGroup],
        links: Links,
        device: torch.device,
        task: FactorSamples,
        population: FactorFleetPopulation,
        mapped: Mapped = map,
    ) -> None:
        super().__init__(server, groups, links, device)
        self.task, self.population, self.mapped = task, population, mapped
        self.received: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        self._heard = Heard()

    def _hear(self, chosen: Sequence[int], round_index: int) -> dict[int, int]:
        """One message for all; who was left out of a round before gets a longer one that says the same in the end."""
        payloads = {number: self.server.send(number, round_index) for number in chosen}
        payload = max(payloads.values(), key=len)
        try:
            message = self.links[chosen[0]].read(payload) if payload else None
            if message is not None:
                self.received = understood(self.links[chosen[0]], self.received, message, self.device)
                self._know()
                self.population.heard[[number for number, said in payloads.items() if said]] = self._stages()
                self._keep_earlier()
            self._heard = Heard(learns=self.server.strategy.learns(self.received))
        except FAILURES as error:  # what one cannot take in, nobody can
            self._failed = dict.fromkeys(chosen, error)
        return {number: len(said) for number, said in payloads.items()}

    def _stages(self) -> int:
        """Of how many stages totals have come down."""
        return self.server.strategy.knowledge.version(self.received)

    def _keep_earlier(self) -> None:
        """Who was left out, or sat out, lacks the latest totals, and serves its users by those that it has."""
        counts = torch.nonzero(torch.bincount(self.population.heard)).flatten().tolist()
        behind = [heard for heard in counts if 0 < heard < self._stages()]
        self.population.keep_earlier(exact_sums(self.received), behind)

    def _know(self) -> None:
        if "histogram" in self.received:
            self.task.know(self.groups[0], exact_sums(self.received), exact_sums(self.own), self.mapped)

    def alike(self, number: int) -> Hashable:
        """All are."""
        return self._heard.learns

    def heard(self, group_index: int, numbers: Sequence[int]) -> Heard:
        """Totals are in the rows' features already."""
        return self._heard

    def serve(self, round_index: int) -> list[int]:
        """Nobody takes in anything after a round."""
        return []

    def snapshot(self, number: int) -> Any:
        """What it has said, and what it has heard."""
        return int(self.population.heard[number]), super().snapshot(number)

    def restore(self, number: int, snapshot: Any) -> None:
        """It has said and heard what it had."""
        heard, said = snapshot
        super().restore(number, said)
        self.population.heard[number] = heard
        if heard not in (0, self._stages(), *self.population.earlier):
            self._keep_earlier()

    def state_dict(self) -> dict[str, Any]:
        """Totals, and own parts of them."""
        return {"received": dict(self.received), "own": dict(self.own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.received = on_device(state["received"], self.device)
        self.own = on_device(state["own"], self.device)
        self._know()


class FactorUplink(Uplink):
    """The sums of all clients, made, encoded and added up at once.

    Args:
        server: the server.
        downlink: what the clients have been told, and what they have said so far.
    """

    def __init__(self, server: Server, downlink: FactorDownlink) -> None:
        self.server, self.downlink = server, downlink

    @cached_property
    def knowledge(self) -> FactorKnowledge:
        """The kind of knowledge."""
        knowledge = self.server.strategy.knowledge
        assert isinstance(knowledge, FactorKnowledge)
        return knowledge

    def begin(self, current: Round) -> None:
        """All that the clients will say of this round at once, unless they have to say it one by one."""
        self._stage = self.knowledge.next_stage(self.downlink.received)
        stages, stack = [name for name, _ in self.server.codecs.stages], self.server.codecs.up
        # What lossy codecs lengthen again the server shortens, of each client's message.
        lengthened = Clip.name in stages and not stack.lossless
        by_rows = self._stage is None or goes_row_by_row(stack, [self._stage])
        self._alone = lengthened or not by_rows or stages not in (["codecs"], [Clip.name, "codecs"])
        self._silent()
        if self._stage is not None and not self._alone:
            try:
                self._say_at_once(self._stage, current.chosen, current.index)
            except Exception as error:  # somebody's numbers: who it is shows one by one
                if is_of_packing(error):
                    raise
                self._alone = True
                self._silent()

    def _silent(self) -> None:
        """Nobody has said anything of this round's stage."""
        self._totals = Sums()
        self._bytes: dict[int, int] = {}
        self._lost = (0.0, 0.0)
        if self._stage is not None:
            self.downlink.own.pop(self._stage, None)

    def _say_at_once(self, stage: str, clients: Sequence[int], round_index: int) -> None:
        """The sums of all clients, encoded and added up together."""
        task, downlink, stack = self.downlink.task, self.downlink, self.server.codecs.up
        chosen = torch.zeros(task.clients, dtype=torch.bool, device=task.owner.device)
        chosen[torch.tensor(clients, device=chosen.device)] = True
        clip = next((settings for name, settings in self.server.codecs.stages if name == Clip.name), None)
        exchange = task.exchange(chosen[task.owner])
        collected = exchange.answer(stage, exact_sums(downlink.received), by_user=clip is not None)
        if clip is not None:
            collected = self._clipped(clip, stage, collected)
        arrays = self.knowledge.upload(collected, False)
        check_arrays(arrays)
        values = np.ascontiguousarray(arrays.pop(stage), dtype=np.float32)
        counts = torch.bincount(task.pair_owner, minlength=task.clients).cpu().numpy()
        through = seen_rows(stack, stage, Block(values, counts, (task.rows.item_count, values.shape[1])))
        seen = through.values
        if stack.codecs:
            self._lost = squared_error({stage: values}, {stage: seen})
        downlink.own[stage] = own = torch.from_numpy(seen).to(downlink.device)
        total = own.new_zeros(task.rows.item_count, seen.shape[1], dtype=torch.double)
        total.index_add_(0, task.pair_item, own.double())
        self._totals.sums = {
            stage: total.float().cpu(),
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
        }
        self._bytes = self._sizes(through, arrays, clients, round_index)

    def _clipped(self, clip: ClipSettings, stage: str, collected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of all clients, each client's shortened as the stage of this name shortens a message.

        Args:
            clip: of the stage.
            stage: of the exchange.
            collected: its array by pair of client and item, those beside it by user.
        """
        task = self.downlink.task
        statistics = {
            name: value.new_zeros(task.clients, *value.shape[1:]).index_add_(0, task.client_of_user, value)
            for name, value in collected.items()
            if name != stage
        }
        statistics[stage] = collected[stage].float().double()  # as they travel
        return shortened(statistics, stage, task.pair_owner, task.clients, clip.norm_of)

    def _say_alone(self, stage: str, number: int, loss: float, current: Round) -> None:
        """The sums of one client by its own end of the wire."""
        task, downlink, link = self.downlink.task, self.downlink, self.downlink.links[number]
        mine, size = task.pair_owner == number, int(task.sizes[number])
        collected = task.exchange(task.owner == number).answer(stage, exact_sums(downlink.received))
        sums = collected[stage]
        collected[stage] = sums.new_zeros(task.rows.item_count, sums.shape[1])
        collected[stage][task.pair_item[mine]] = sums[mine]
        result = LocalResult(SharedTensors(dict, {}), link.sent_in is None, collected)
        message = answer(link, result, TrainedOn(size, size, loss), current.index)
        assert message is not None
        wire = link.encoded(message)
        current.report.bytes_up[number] = len(wire.to_bytes())
        current.intake.add_read(number, wire)
        current.count(loss, size, link.codec_error)
        seen = link.sent[stage].to(downlink.device)
        own = downlink.own.setdefault(stage, seen.new_zeros(len(task.pair_item), seen.shape[1]))
        own[mine] = seen[task.pair_item[mine]]

    def _sizes(self, seen: Seen, beside: Mapping[str, Any], clients: Sequence[int], round_index: int) -> dict[int, int]:
        """Bytes of every client's message."""
        size = sum(array_bytes(name, array.dtype.str[1:], array.shape) for name, array in beside.items())
        sizes, leaves = (seen.size + size)[clients], (seen.leaves + len(beside))[clients]
        return lengths("knowledge", round_index, clients, sizes, leaves, bool(self.server.codecs.up.codecs))

    def part(self, training: Training) -> None:
        """Nothing."""

    def say(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """What they would say is known; where it is not, each says its own."""
        refused = {}
        for number, loss, size in zip(trained.numbers, trained.losses.tolist(), trained.training.sizes, strict=True):
            if self._stage is None or not self._alone:
                current.count(loss, size)
                current.report.bytes_up[number] = self._bytes.get(number, 0)
                current.intake.answered[number] = number in self._bytes
                continue
            try:
                self._say_alone(self._stage, number, loss, current)
            except Exception as error:
                refused[number] = ClientError.of(f"client {number}", current.index, "sending", error)
        return refused

    def finish(self, current: Round) -> None:
        """The round's fold takes in the totals of those that have answered; there are none once the exchange is over."""
        answered = [number for number, spoke in current.intake.answered.items() if spoke]
        if self._stage is not None and not self._alone and len(answered) < len(current.chosen):
            self._silent()
            if answered:
                self._say_at_once(self._stage, answered, current.index)
        current.count(0.0, 0, self._lost)
        current.intake.fold.merge(self._totals)
