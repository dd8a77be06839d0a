"""Item factors of many clients at once: all their sums in one pass over all rows, each client's own part taken off after it.

A sum per item of one client is kept for the items that it has rows of: one number per *pair* of client and item.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor, nn

from recbole_fedkd.distillation.exchange import FactorExchange, item_tables
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.distillation.features import LEAST_DEVIATION, ItemTables, standardised
from recbole_fedkd.distillation.losses import label_cross_entropy
from recbole_fedkd.engine.base import ClientError, Round
from recbole_fedkd.engine.fleet.draws import Streams
from recbole_fedkd.engine.fleet.exchange import Base, Downlink, Links, Sizes, Uplink
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.heard import Heard
from recbole_fedkd.engine.fleet.messages import SharedTensors
from recbole_fedkd.engine.fleet.population import FleetPopulation
from recbole_fedkd.engine.fleet.row_codecs import Leaf, NotRowWiseError, seen_rows
from recbole_fedkd.engine.fleet.samples import Epoch, FleetTask
from recbole_fedkd.engine.fleet.store import Pack
from recbole_fedkd.engine.fleet.training import Trained, Training
from recbole_fedkd.federated.codec import squared_error
from recbole_fedkd.federated.dialogue import answer, on_device, understood
from recbole_fedkd.federated.knowledge.factors import FactorKnowledge
from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.message import Training as TrainedOn
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.strategy import LocalResult
from recbole_fedkd.federated.task import Step
from recbole_fedkd.finite import check_arrays
from recbole_fedkd.model.factor_head import FactorHead


@dataclass(frozen=True)
class PairedRows(Rows):
    """Rows of several clients, whose sums per item are sums per pair of client and item.

    Attributes:
        pairs: pair of every row ``[n]``.
        pair_count: number of pairs.
    """

    pairs: Tensor
    pair_count: int

    @property
    def answers(self) -> Tensor:
        """The pairs."""
        return self.pairs

    def per_item(self, values: Tensor) -> Tensor:
        """Sums of values ``[n, ...]`` over every pair's rows, ``[pairs, ...]``."""
        return values.new_zeros(self.pair_count, *values.shape[1:]).index_add_(0, self.pairs, values)


@dataclass(frozen=True)
class OthersTables(ItemTables):
    """Tables of pairs, each without its client's own part.

    Attributes:
        shares: of the labels among the other clients' rows, for every row that is asked for ``[n, T]``.
    """

    shares: Tensor

    @property
    def label_shares(self) -> Tensor:
        """As given."""
        return self.shares


class FactorSamples(FleetTask):
    """The rows of all clients, client by client, as heads are trained on them.

    Args:
        head: that of all users.
        client_of_user: ``[users]``, padding user 0: -1.
        batch_size: rows in a step.
        reg_weight: weight of the regulariser.
    """

    def __init__(self, head: FactorHead, client_of_user: Tensor, batch_size: int, reg_weight: float) -> None:
        self.head, self.batch_size, self.reg_weight = head, batch_size, reg_weight
        rows = head.exchange.rows
        self.clients = int(client_of_user.max()) + 1
        owner = client_of_user[rows.users]
        order = torch.argsort(owner, stable=True)
        self.owner, self.rows = (
            owner[order],
            replace(rows, users=rows.users[order], items=rows.items[order], values=rows.values[order]),
        )
        self.labels = head.exchange.labels[order]
        self.sizes = torch.bincount(owner, minlength=self.clients)
        self._start = self.sizes.cumsum(0) - self.sizes
        keys, pairs = torch.unique(self.owner * rows.item_count + self.rows.items, return_inverse=True)
        self.pair_owner, self.pair_item, self.pairs = keys // rows.item_count, keys % rows.item_count, pairs
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of any row, as of a head that has been told nothing."""
        middle, width = self.head.known_scalars[0].float(), len(self.head.feature_mean)
        self.mean = middle.expand(len(self.labels))
        self.features = torch.zeros(1, width).expand(len(self.labels), -1)

    def exchange(self, part: Tensor) -> FactorExchange:
        """That of all clients of some rows, bool ``[n]``, as if they were one place with sums per pair."""
        rows, whole = self.rows, self.head.exchange
        paired = PairedRows(
            rows.users[part],
            rows.items[part],
            rows.values[part],
            rows.user_count,
            rows.item_count,
            self.pairs[part],
            len(self.pair_item),
        )
        return FactorExchange(whole.settings, paired, self.labels[part], whole.values)

    @torch.no_grad()
    def know(self, group: ClientGroup, totals: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Take in totals, of which ``own [pairs, ...]`` is each client's part; as ``FactorHead.know`` of every client."""
        head, exchange = self.head, self.head.exchange
        head.know_items(totals)
        self._forget()
        if exchange.settings.stages[-1] not in totals:
            return
        tables = item_tables(exchange.settings, totals, own, exchange.values, self.pair_item)
        others = OthersTables(**vars(tables), shares=self._label_shares(totals["histogram"], tables.histogram))
        rows = replace(self.rows, items=self.pairs, item_count=len(self.pair_item))
        apart = FactorExchange(exchange.settings, rows, self.labels, exchange.values)
        mean, features = apart.known_users(others).of_rows()
        counts = self.sizes.clamp(min=1).unsqueeze(1)
        centre = self._per_client(features) / counts
        scale = (self._per_client((features - centre[self.owner]).square()) / counts).sqrt().clamp(min=LEAST_DEVIATION)
        told = {"feature_mean": centre.float(), "feature_scale": scale.float()}
        group.keep_told(group.numbers, told)
        self.mean = mean.float()
        self.features = standardised(features, *(value[self.owner] for value in told.values()))

    def _per_client(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.clients, values.shape[1]).index_add_(0, self.owner, values)

    def _label_shares(self, total: Tensor, others: Tensor) -> Tensor:
        """Label shares of the other clients' rows for every row ``[n, T]``, given totals and others' part of the pairs."""
        total = total.clamp(min=0)
        left = others - total[self.pair_item]
        of_clients = total.sum(0) + left.new_zeros(self.clients, left.shape[1]).index_add_(0, self.pair_owner, left)
        shares = of_clients / of_clients.sum(1, keepdim=True).clamp(min=1)
        return shares.clamp(min=1e-6)[self.owner]

    def draw(
        self, group: ClientGroup, numbers: Sequence[int], streams: Streams, epochs: int, clean: bool
    ) -> tuple[list[Epoch], Epoch | None]:
        """As :class:`~recbole_fedkd.federated.sum_tasks.FactorTask` draws them."""
        sizes, start = self.sizes[numbers], self._start[numbers].unsqueeze(1)
        position = torch.arange(int(sizes.max())).expand(len(numbers), -1)
        real = position < sizes.unsqueeze(1)

        def epoch(order: Tensor) -> Epoch:
            index = start + order
            return Epoch({"rows": index}, torch.zeros_like(index), self.labels[index], real.float())

        shuffled = [epoch(streams.orders(sizes.tolist(), self.batch_size)) for _ in range(epochs)]
        return shuffled, epoch(torch.where(real, position, 0)) if clean else None

    def needed(self, epoch: Epoch) -> Tensor:
        """None: a head has no item rows."""
        return epoch.items[:, :1]

    def arguments(self, group: ClientGroup, pack: Pack, batch: Epoch) -> tuple[Any, ...]:
        """Predicted labels ``[c, batch]``, features ``[c, batch, F]``, labels and weights ``[c, batch]``."""
        rows = batch.fields["rows"]
        return self.mean[rows], self.features[rows], batch.labels, batch.weights

    def step(self, network: nn.Module, with_logits: bool, *arguments: Any) -> Step:
        """As of :class:`~recbole_fedkd.federated.sum_tasks.FactorTask`."""
        assert isinstance(network, FactorHead)
        mean, features, labels, weights = arguments
        logits = network.logits(mean, features)
        loss = label_cross_entropy(logits, labels, weights)
        if self.reg_weight and torch.is_grad_enabled():
            loss = loss + self.reg_weight * network.squared_norm()
        return Step(loss, len(labels), logits, labels, weights=weights)

    def blank(self, count: int, device: torch.device) -> Epoch:
        """The first row of all."""
        index = torch.zeros(1, count, dtype=torch.long, device=device)
        return Epoch({"rows": index}, index, self.labels[index], torch.ones(1, count, device=device))


class FactorFleetPopulation(FleetPopulation):
    """Heads on item factors in compact form: what is known of users and items is computed once for all."""

    def _score(
        self,
        group: ClientGroup,
        base: Base,
        clients: Tensor,
        place: tuple[Tensor, Tensor, Tensor],
        asked: tuple[Tensor, Tensor, Any],
        out: Tensor,
    ) -> None:
        """Score the rows of packed clients; arguments as of the base class."""
        (row, slot, column), (users, items, _), head = place, asked, group.whole
        assert isinstance(head, FactorHead)
        targets, width = items.shape[1], int(column.max()) + 1
        mean, features = head.known_users.of_pairs(users[row].repeat_interleave(targets), items[row].flatten())
        means = mean.new_zeros(len(clients), width, targets)
        described = features.new_zeros(*means.shape, features.shape[1])
        means[slot, column] = mean.view(-1, targets)
        described[slot, column] = features.view(-1, targets, features.shape[1])
        pack = group.pack(clients, torch.zeros_like(clients).unsqueeze(1))
        weights = group.weights(pack, base, serving=True)

        def score(network: nn.Module, parameters: Any, mean: Tensor, features: Tensor) -> Tensor:
            assert isinstance(network, FactorHead)
            return network.described(mean.flatten(), features)

        logits = group.called(head.eval(), score, weights, group.buffers_of(pack), means, described.flatten(1, 2))
        out[row] = logits.view(len(clients), width, targets, -1)[slot, column]


class FactorDownlink(Downlink):
    """Totals come down, the same for all. Arguments as of the base.

    Args:
        server: the server.
        groups: the clients, one group.
        links: the clients' ends of the wire.
        device: where their networks live.
        task: their rows.

    Attributes:
        received: totals of the stages so far.
        own: each client's part of them as the server has it, ``[pairs, ...]`` by stage.
    """

    def __init__(
        self, server: Server, groups: Sequence[ClientGroup], links: Links, device: torch.device, task: FactorSamples
    ) -> None:
        super().__init__(server, groups, links, device)
        self.task = task
        self.received: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}

    def hear(self, chosen: Sequence[int], round_index: int) -> dict[int, int]:
        """One message for all: nobody has been away from an exchange."""
        payload = self.server.send(chosen[0], round_index)
        link = self.links[chosen[0]]
        message = link.read(payload) if payload else None
        if message is not None:
            self.received = understood(link, self.received, message, self.device)
            self._know()
        return dict.fromkeys(chosen, len(payload))

    def _know(self) -> None:
        if "histogram" in self.received:
            self.task.know(self.groups[0], _double(self.received), _double(self.own))

    def alike(self, number: int) -> Hashable:
        """All are."""
        return self.server.strategy.learns(self.received)

    def heard(self, group_index: int, numbers: Sequence[int]) -> Heard:
        """Totals are in the rows' features already."""
        return Heard(learns=self.server.strategy.learns(self.received))

    def serve(self, round_index: int) -> list[int]:
        """Nobody takes in anything after a round."""
        return []

    def snapshot(self, number: int) -> None:
        """Nothing of its own."""

    def restore(self, number: int, snapshot: Any) -> None:
        """Nothing of its own."""

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
        """All that the clients will say of this round."""
        self._statistics: dict[str, Tensor] | None = None
        self._bytes: dict[int, int] = {}
        stage = self.knowledge.next_stage(self.downlink.received)
        if stage is None:
            return
        try:
            if any(name != "codecs" for name, _ in self.server.codecs.stages):
                raise NotRowWiseError
            self._say_at_once(stage, current)
        except NotRowWiseError:
            for number in current.chosen:
                self._say_alone(stage, number, current)

    def _say_at_once(self, stage: str, current: Round) -> None:
        """The sums of all clients, encoded and added up together."""
        task, downlink, stack = self.downlink.task, self.downlink, self.server.codecs.up
        chosen = torch.zeros(task.clients, dtype=torch.bool)
        chosen[torch.tensor(current.chosen)] = True
        collected = task.exchange(chosen[task.owner]).answer(stage, _double(downlink.received))
        arrays = self.knowledge.upload(collected, False)
        check_arrays(arrays, "what clients say")
        values = np.ascontiguousarray(arrays.pop(stage), dtype=np.float32)
        counts, rows = torch.bincount(task.pair_owner, minlength=task.clients).numpy(), task.rows.item_count
        seen, leaves = seen_rows(stack, stage, values, counts, rows)
        if stack.codecs:
            current.count(0.0, 0, squared_error({stage: values}, {stage: seen}))
        downlink.own[stage] = own = torch.from_numpy(seen)
        total = torch.zeros(rows, seen.shape[1], dtype=torch.double).index_add_(0, task.pair_item, own.double())
        self._statistics = {stage: total.float(), **{name: torch.from_numpy(array) for name, array in arrays.items()}}
        self._sizes(leaves, arrays, current)

    def _say_alone(self, stage: str, number: int, current: Round) -> None:
        """The sums of one client by its own end of the wire."""
        task, downlink, link = self.downlink.task, self.downlink, self.downlink.links[number]
        mine, size = task.pair_owner == number, int(task.sizes[number])
        collected = task.exchange(task.owner == number).answer(stage, _double(downlink.received))
        sums = collected[stage]
        collected[stage] = sums.new_zeros(task.rows.item_count, sums.shape[1])
        collected[stage][task.pair_item[mine]] = sums[mine]
        result = LocalResult(SharedTensors({}, {}), link.sent_in is None, collected)
        message = answer(link, result, TrainedOn(size, size), current.index)
        assert message is not None
        wire = link.encoded(message)
        self._bytes[number] = len(wire.to_bytes())
        current.intake.add_read(number, wire)
        current.count(0.0, 0, link.codec_error)
        seen = link.sent[stage]
        own = downlink.own.setdefault(stage, seen.new_zeros(len(task.pair_item), seen.shape[1]))
        own[mine] = seen[task.pair_item[mine]]

    def _sizes(self, leaves: Sequence[Sequence[Leaf]], beside: Mapping[str, Any], current: Round) -> None:
        """Bytes of every client's message."""
        size_of = Sizes()
        known: dict[Hashable, int] = {}
        for number in current.chosen:
            key = tuple(leaves[number])
            if key not in known:
                arrays = {name: np.empty(shape, dtype=dtype) for name, dtype, shape in key}
                error = (1.0, 1.0) if self.server.codecs.up.codecs else (0.0, 0.0)
                message = Message("knowledge", current.index, 0, {**arrays, **beside}, TrainedOn(), error)
                known[key] = size_of(message) - 1
            self._bytes[number] = known[key] + len(msgpack.packb(number))

    def part(self, training: Training) -> None:
        """Nothing."""

    def say(self, trained: Trained, base: Base, current: Round) -> dict[int, ClientError]:
        """What they would say has been said."""
        current.count(float(trained.losses.sum()), sum(trained.training.sizes))
        for number in trained.numbers:
            current.report.bytes_up[number] = self._bytes.get(number, 0)
            current.intake.answered[number] = number in self._bytes
        return {}

    def finish(self, current: Round) -> Mapping[str, Tensor] | None:
        """The totals; nothing once the exchange is over."""
        return self._statistics


def _double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tensors.items()}
