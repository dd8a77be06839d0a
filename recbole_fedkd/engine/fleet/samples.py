"""What clients side by side train on: their samples, in the order and with the negatives that each would draw by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_fedkd.engine.fleet.batching import for_client, seen_by_losses
from recbole_fedkd.engine.fleet.compiled import drawn_of_many
from recbole_fedkd.engine.fleet.draws import filled_up, taken_pairs
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.mapped import MappedTensors
from recbole_fedkd.engine.fleet.population import RecBoleFleetPopulation
from recbole_fedkd.engine.fleet.store import Pack, ragged
from recbole_fedkd.federated.draws import EpochDraws, KeyedDraws, KeyedEpoch
from recbole_fedkd.federated.task import AttentiveTask, Samples, Step, click_loss, handed_logits, is_click, total_loss
from recbole_fedkd.model.compiled import has_compiler

CONTEXT = "context "
"""What an epoch's fields begin with that are the context of a row: a column may be called ``users``."""


@dataclass(frozen=True)
class Epoch:
    """Samples of packed clients, in the order in which they are trained on.

    Attributes:
        fields: what a network reads, ``[c, size, ...]`` each.
        items: item ids ``[c, size]``.
        labels: label indices ``[c, size]``.
        weights: ``[c, size]``, 0 where a sample only fills up.
    """

    fields: Mapping[str, Tensor]
    items: Tensor
    labels: Tensor
    weights: Tensor

    def part(self, clients: slice, samples: slice) -> Epoch:
        """Some samples of some clients."""
        where = clients, samples
        fields = {name: values[where] for name, values in self.fields.items()}
        return Epoch(fields, self.items[where], self.labels[where], self.weights[where])

    def batches(self, batch_size: int, sizes: Sequence[int]) -> Iterator[Epoch]:
        """``batch_size`` samples at a time of every client that has any left; ``sizes`` fall, so those are the first."""
        for start in range(0, self.labels.shape[1], batch_size):
            left = sum(size > start for size in sizes)
            yield self.part(slice(0, left), slice(start, start + batch_size))


class ManySizes(Mapping[int, int]):
    """Samples of clients that train, by their numbers, in 16 bytes a client: a dictionary takes a hundred.

    Args:
        sizes: samples of each client ``[K]``.
        without: numbers of clients that do not train, beside those without samples.

    Attributes:
        numbers: of the clients that do, in ascending order.
    """

    def __init__(self, sizes: Tensor, without: Collection[int]) -> None:
        of_each = sizes.cpu().clone()
        of_each[list(without)] = 0
        self._sizes = of_each.numpy().data
        self.numbers: Sequence[int] = of_each.nonzero().flatten().numpy().data

    def __getitem__(self, number: int) -> int:
        if not 0 <= number < len(self._sizes) or not self._sizes[number]:
            raise KeyError(number)
        return self._sizes[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class FleetTask(ABC):
    """The training samples of all clients, and how they are trained on.

    Attributes:
        sizes: samples of an epoch of each client ``[K]``, negatives included.
        batch_size: samples in a step.
    """

    sizes: Tensor
    batch_size: int

    def kept(self, mapped: MappedTensors) -> FleetTask:
        """The same task, of samples that lie where those that clients keep do."""
        return self

    @abstractmethod
    def draw(
        self, group: ClientGroup, numbers: Sequence[int], draws: KeyedDraws, epochs: int, clean: bool
    ) -> tuple[list[Epoch], Epoch | None]:
        """The samples of every epoch of packed clients, and those of the clean pass where there is one.

        Args:
            group: the clients' group.
            numbers: the clients, the one with the most samples first.
            draws: what they draw.
            epochs: number of epochs.
            clean: whether a pass without gradients follows.
        """

    @abstractmethod
    def needed(self, epoch: Epoch) -> Tensor:
        """Rows of the item tables that the clients touch ``[c, n]``."""

    @abstractmethod
    def arguments(self, group: ClientGroup, pack: Pack, batch: Epoch) -> tuple[Any, ...]:
        """Arguments of :meth:`step` for every packed client, tensors ``[c, ...]`` or containers of such."""

    @abstractmethod
    def step(self, network: nn.Module, with_logits: bool, *arguments: Any) -> Step:
        """What the network of one client says of a batch."""

    @abstractmethod
    def blank(self, count: int, device: torch.device) -> Epoch:
        """``count`` samples of one client, of any content."""


@dataclass(frozen=True)
class LabelledSamples(FleetTask):
    """Labelled samples for the package's own networks.

    Attributes:
        kind: says what a step is.
        samples: client by client; users by their local ids.
        rows: samples of each client ``[K]``, without negatives.
        labels: number of labels ``T``.
        batch_size: samples in a step.
        reg_weight: weight of the regulariser.
        negatives: sampled negatives per sample and epoch.
        item_count: number of items, padding included.
    """

    kind: type[AttentiveTask]
    samples: Samples
    rows: Tensor
    labels: int
    batch_size: int
    reg_weight: float
    negatives: int
    item_count: int

    def kept(self, mapped: MappedTensors) -> LabelledSamples:
        """As of the base class; a tensor that stands for two is kept once."""
        columns = [
            self.samples.users,
            self.samples.items,
            self.samples.labels,
            *self.samples.context.values(),
            self.rows,
        ]
        known = {id(column): column for column in columns}
        moved = {number: mapped.kept(column) for number, column in known.items()}
        users, items, labels, *context, rows = (moved[id(column)] for column in columns)
        samples = Samples(users, items, labels, dict(zip(self.samples.context, context, strict=True)))
        task = replace(self, samples=samples, rows=rows)
        task.__dict__.update(sizes=mapped.kept(task.sizes), _start=mapped.kept(task._start))
        return task

    @cached_property
    def sizes(self) -> Tensor:  # type: ignore[override]
        """Samples of an epoch of each client ``[K]``, negatives included."""
        return self.rows * (1 + self.negatives)

    @cached_property
    def _start(self) -> Tensor:
        return self.rows.cumsum(0) - self.rows

    def draw(
        self, group: ClientGroup, numbers: Sequence[int], draws: KeyedDraws, epochs: int, clean: bool
    ) -> tuple[list[Epoch], Epoch | None]:
        """As :class:`~recbole_fedkd.federated.task.AttentiveTask` draws them."""
        samples, device = self.samples, self.rows.device
        held, start = self.rows[numbers], self._start[numbers]
        compiled = self.negatives and group.single_users and device.type == "cpu" and has_compiler()
        if compiled and int(held.max()) < self.item_count - 1:
            drawn = [self._compiled(held, start, draws.epoch(), epoch < epochs) for epoch in range(epochs + clean)]
            return drawn[:epochs], drawn[-1] if clean else None
        whole = held * (1 + self.negatives)
        first, sizes = whole.cumsum(0) - whole, whole.tolist()
        position = torch.arange(max(sizes), device=device).expand(len(numbers), -1)
        real = (position < whole.unsqueeze(1)).float()
        # All samples of all clients, one client's behind another's, the positives of each first.
        items = torch.empty(sum(sizes), dtype=torch.long, device=device)
        items[runs(first, held)] = samples.items[runs(start, held)]
        drawn_at = runs(first + held, held * self.negatives)
        negatives = self._negatives(numbers, held, start)

        def epoch(shuffle: bool) -> Epoch:
            of_it, order = draws.epoch(), position
            of_epoch = items.index_copy(0, drawn_at, negatives(of_it).to(device)) if self.negatives else items
            if shuffle:
                order = filled_up(of_it.orders(sizes), sizes, self.batch_size).to(device)
            # Of a sample that fills up, anything may be said.
            order = torch.minimum(order, (whole - 1).unsqueeze(1))
            rows = start.unsqueeze(1) + (order.remainder(held.unsqueeze(1)) if self.negatives else order)
            labels = samples.labels[rows]
            if self.negatives:
                labels = torch.where(order < held.unsqueeze(1), labels, 0)
            return Epoch(self._read(rows), of_epoch[first.unsqueeze(1) + order], labels, real)

        return [epoch(True) for _ in range(epochs)], epoch(False) if clean else None

    def _compiled(self, held: Tensor, start: Tensor, draws: KeyedEpoch, shuffle: bool) -> Epoch:
        """An epoch of clients of one user each, in compiled code."""
        samples, whole = self.samples, held * (1 + self.negatives)
        position = torch.arange(int(whole.max()))
        orders = draws.orders(whole.tolist()) if shuffle else position.repeat(len(held), 1)
        items, labels, rows = drawn_of_many(
            draws.negative_keys,
            orders,
            (start, held),
            self.batch_size,
            (samples.items, samples.labels),
            self.negatives,
            self.item_count,
        )
        return Epoch(self._read(rows), items, labels, (position < whole.unsqueeze(1)).float())

    def _read(self, rows: Tensor) -> dict[str, Tensor]:
        """What a network reads of rows ``[c, size]`` beside their items."""
        context = {f"{CONTEXT}{name}": values[rows] for name, values in self.samples.context.items()}
        return {"users": self.samples.users[rows], **context}

    def _negatives(self, numbers: Sequence[int], held: Tensor, start: Tensor) -> Callable[[EpochDraws], Tensor]:
        """Draws the negatives of packed clients, one client's behind another's, of an epoch."""
        counts, samples = (held * self.negatives).tolist(), self.samples
        if not self.negatives:
            return lambda draws: samples.items[:0]
        positive = runs(start, held)
        slots, users = torch.repeat_interleave(held), samples.users[positive]
        # Who a sample belongs to, among all users of all packed clients.
        owner = slots * (int(users.max()) + 1) + users
        pairs = taken_pairs(owner, samples.items[positive], self.item_count)
        # The users of a client's samples, again and again.
        again = runs(held.cumsum(0) - held, held, self.negatives).cpu()
        begin = owner.cpu()[again] * self.item_count

        def is_taken(places: Tensor, items: Tensor) -> Tensor:
            return pairs.index_select(0, begin.index_select(0, places) + items)

        return lambda draws: draws.negatives(counts, self.item_count, is_taken)

    def needed(self, epoch: Epoch) -> Tensor:
        """The items."""
        return epoch.items

    def arguments(self, group: ClientGroup, pack: Pack, batch: Epoch) -> tuple[Any, ...]:
        """Users ``[c, batch]``, own items, context ``[c, batch, targets]``, labels, weights, items ``[c, batch * targets]``."""
        items, users = pack.places(batch.items), batch.fields["users"]
        axis = 1 if group.single_users else 2
        context = {name: batch.fields[f"{CONTEXT}{name}"].unsqueeze(axis) for name in self.samples.context}
        users = users[:, :1] if group.single_users else users
        return users, items.unsqueeze(axis), batch.labels, batch.weights, context, batch.items

    def step(self, network: nn.Module, with_logits: bool, *arguments: Any) -> Step:
        """See :meth:`AttentiveTask.of_batch`; the items of the step are those of everybody."""
        users, items, labels, weights, context, known_as = arguments
        step = self.kind.of_batch(network, users, items, labels, self.reg_weight, weights, context)
        return replace(step, items=known_as)

    def blank(self, count: int, device: torch.device) -> Epoch:
        """Item 0 of user 1, in no context."""
        items, ones = torch.zeros(1, count, dtype=torch.long, device=device), torch.ones(1, count, device=device)
        context = {
            f"{CONTEXT}{name}": values.new_zeros(1, count, *values.shape[1:])
            for name, values in self.samples.context.items()
        }
        return Epoch({"users": ones.long(), **context}, items, items, ones)


class RecBoleSamples(FleetTask):
    """Rows of a training split for a RecBole model, in the batches of RecBole's training loader.

    Args:
        config: the run's config.
        dataset: the training split.
        population: holds the model with replaced modules.
    """

    def __init__(self, config: Any, dataset: Any, population: RecBoleFleetPopulation) -> None:
        client_of_user, batched = population.client_of_user, population.batched
        device = client_of_user.device
        sampling = config["train_neg_sample_args"]
        self.sampled = 0 if sampling["distribution"] == "none" else int(sampling["sample_num"])
        self.pairwise = config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE
        self.user_field, self.item_field = dataset.uid_field, dataset.iid_field
        self.label_field, self.prefix = config["LABEL_FIELD"], config["NEG_PREFIX"]
        self.item_count, self.sources = dataset.item_num, batched.sources
        self.click = click_loss(batched.model)
        owner = client_of_user[dataset.inter_feat[self.user_field].to(device)]
        order = torch.argsort(owner, stable=True)
        self.rows = torch.bincount(owner, minlength=int(client_of_user.max()) + 1)
        self.fields = _columns(dataset.inter_feat, device)
        self.fields = {name: values[order] for name, values in self.fields.items()}
        self.of_user, self.of_item = _columns(dataset.user_feat, device), _columns(dataset.item_feat, device)
        # A positive and its negatives are never parted: the loader deals positives out, a whole number to a batch.
        times = self.sampled + (not self.pairwise) if self.sampled else 1
        self.positives = max(config["train_batch_size"] // times, 1) if self.sampled else config["train_batch_size"]
        self.times, self.batch_size = times, self.positives * times
        self.sizes = self.rows * times
        self._start = self.rows.cumsum(0) - self.rows

    def kept(self, mapped: MappedTensors) -> RecBoleSamples:
        """As of the base class."""
        task = copy(self)
        task.fields = {name: mapped.kept(values) for name, values in self.fields.items()}
        return task

    def draw(
        self, group: ClientGroup, numbers: Sequence[int], draws: KeyedDraws, epochs: int, clean: bool
    ) -> tuple[list[Epoch], Epoch | None]:
        """As the loader of training rows draws them for a client."""
        device = self.rows.device
        held, start = self.rows[numbers].unsqueeze(1), self._start[numbers].unsqueeze(1)
        rows = held.flatten().tolist()
        # A batch is its positives, once each with the first negatives, once each with the second ones, and so on.
        entry = torch.arange(max(rows) * self.times, device=device).expand(len(rows), -1)
        real = entry < held * self.times
        batch, in_batch = entry // self.batch_size, entry % self.batch_size
        positives = (held - batch * self.positives).clamp(1, self.positives)
        repeat = torch.where(real, in_batch // positives, 0)
        row = torch.where(real, batch * self.positives + in_batch % positives, 0)
        drawn = (real & ((repeat > 0) | self.pairwise)).flatten().nonzero().flatten()
        negatives = self._negatives(start, held, drawn)
        unshuffled = torch.arange(max(rows), device=device).expand(len(rows), -1)

        def epoch(shuffle: bool) -> Epoch:
            of_it, order = draws.epoch(), unshuffled
            if shuffle:
                order = filled_up(of_it.orders(rows), rows, self.positives).to(device)
            index = start + order.gather(1, row)
            return self._epoch(index, negatives(of_it, index), drawn, repeat, real)

        return [epoch(True) for _ in range(epochs)], epoch(False) if clean else None

    def _negatives(self, start: Tensor, held: Tensor, drawn: Tensor) -> Callable[[EpochDraws, Tensor], Tensor | None]:
        """Draws the items of entries ``drawn`` of an epoch of rows ``index [c, size]``, client by client; None: there are none.

        Args:
            start: the first row of each client ``[c, 1]``.
            held: rows of each ``[c, 1]``.
            drawn: entries among those of all clients, one client's behind another's.
        """
        if not self.sampled:
            return lambda draws, index: None
        own, users = runs(start.flatten(), held.flatten()), self.fields[self.user_field]
        numbers, owner = torch.unique(users[own], return_inverse=True)
        place_of = torch.zeros(int(numbers.max()) + 1, dtype=torch.long, device=users.device)
        place_of[numbers] = torch.arange(len(numbers), device=users.device)
        pairs = taken_pairs(owner, self.fields[self.item_field][own], self.item_count)
        counts = (held.flatten() * self.sampled).tolist()

        def negatives(draws: EpochDraws, index: Tensor) -> Tensor:
            begin = place_of[users[index.flatten()[drawn]]].cpu() * self.item_count

            def is_taken(places: Tensor, items: Tensor) -> Tensor:
                return pairs.index_select(0, begin.index_select(0, places) + items)

            return draws.negatives(counts, self.item_count, is_taken)

        return negatives

    def _epoch(self, index: Tensor, sampled: Tensor | None, drawn: Tensor, repeat: Tensor, real: Tensor) -> Epoch:
        """What RecBole joins to the rows ``index [c, size]``; ``sampled``: sampled items for the entries ``drawn``."""
        fields = {name: values[index] for name, values in self.fields.items()}
        items = fields[self.item_field]
        others: dict[str, Tensor] = {}
        if sampled is not None:
            drawn_items = items.flatten().index_copy(0, drawn, sampled.to(items.device)).view_as(items)
            if self.pairwise:
                others = {self.item_field: drawn_items, **self._joined(self.of_item, drawn_items)}
                others = {self.prefix + name: values for name, values in others.items()}
            else:
                items = fields[self.item_field] = drawn_items
        fields |= self._joined(self.of_user, fields[self.user_field])
        fields |= self._joined(self.of_item, items)
        if sampled is not None and not self.pairwise:
            fields[self.label_field] = (repeat == 0).float()
        labels = fields[self.label_field].long() if self.label_field in fields else torch.zeros_like(items)
        return Epoch({**fields, **others}, items, labels, real.float())

    @staticmethod
    def _joined(columns: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        return {name: values[ids] for name, values in columns.items()}

    def needed(self, epoch: Epoch) -> Tensor:
        """The rows that any of the fields names."""
        rows = [epoch.fields[name].flatten(1) + shift for name, shift in self.sources.items() if name in epoch.fields]
        return torch.cat(rows, 1)

    def arguments(self, group: ClientGroup, pack: Pack, batch: Epoch) -> tuple[Any, ...]:
        """The fields, the number of every row on each client, and the samples' weights."""
        return dict(batch.fields), pack.local, batch.weights

    def step(self, network: nn.Module, with_logits: bool, *arguments: Any) -> Step:
        """The model's own loss; logits and labels of a click model, as of ``RecBoleTask``."""
        fields, local, weights = arguments
        with for_client(network, local, weights):
            loss = total_loss(network, Interaction(fields))
            if not with_logits or self.click is None:
                return Step(loss, len(weights), weights=weights)
            # A network of another thread has another loss.
            seen = seen_by_losses(network)
            scores, labels = (part.flatten() for module, given in seen.items() for part in given if is_click(module))
        logits = handed_logits(self.click, scores)
        return Step(loss, len(weights), logits, labels.long(), fields[self.item_field], weights)

    def blank(self, count: int, device: torch.device) -> Epoch:
        """The first row of all."""
        index = torch.zeros(1, count, dtype=torch.long, device=device)
        sampled = index.flatten() if self.sampled else None
        return self._epoch(index, sampled, torch.arange(count, device=device), index, torch.ones_like(index))


def runs(starts: Tensor, lengths: Tensor, times: int = 1) -> Tensor:
    """``start, start + 1, ...`` of every run, ``times`` times, one run behind another."""
    run, within = ragged(lengths * times)
    if times > 1:
        within = within.remainder(lengths[run])
    return within + starts[run]


def _columns(features: Any, device: torch.device) -> dict[str, Tensor]:
    """Columns of a table of RecBole's; none where there is no table."""
    return {name: values.to(device) for name, values in features.interaction.items()} if features is not None else {}
