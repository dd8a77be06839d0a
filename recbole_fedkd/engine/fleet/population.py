"""A population in compact form: what all clients have in common once, and of each client only what is its own.

A client's network is that of all users and items, with the rows of its own users and, of the item tables, the rows that it has
touched. For computing, clients are packed: item ids are renumbered per client, and tables become ``[clients, rows, width]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.engine.fleet.batching import BatchedModel
from recbole_fedkd.engine.fleet.group import Base, Caller, ClientGroup
from recbole_fedkd.engine.fleet.mapped import MappedTensors
from recbole_fedkd.engine.fleet.store import ragged
from recbole_fedkd.model.asked_again import AskedAgain, Scored, scored_by
from recbole_fedkd.model.catalogue import rank_items, ranks_chosen, ranks_side_by_side
from recbole_fedkd.model.network import NO_CONTEXT, Context
from recbole_fedkd.model.population import RoutedPopulation, homes, local_ids, rows_that_stay, whole_networks
from recbole_fedkd.model.shared import Rows, forget_cached
from recbole_fedkd.model.student import LabelledRecommender

Where = tuple[Tensor, Tensor, Tensor]
"""Of rows that packed clients score: which of what is asked, the client, and the column in its pack, ``[n]`` each."""

Asked = tuple[Tensor, Tensor, Context]
"""Users ``[rows]``, items ``[rows, targets]`` and context of what is asked."""

MEGABYTE = 2**20

IN_PLACE = 64.0 * MEGABYTE
"""Bytes from which files hold what stays in its place."""


def pack_bytes(megabytes: float | None, device: torch.device) -> float:
    """What clients side by side may take; where nobody says it, what was fastest on such a device (docs/performance.md)."""
    return MEGABYTE * (megabytes or (512.0 if device.type == "cuda" else 64.0))


class CompactPopulation(nn.Module):
    """Clients in compact form, whatever their networks are.

    Attributes:
        groups: clients of one architecture each; with several, clients are dealt out in turn.
        clients: their number.
        memory: bytes that clients side by side may take.
        mapped: says where lies what clients keep.
    """

    client_of_user: Tensor
    local_id: Tensor
    groups: nn.ModuleList

    def settle(self, config: Any, wholes: Sequence[nn.Module], client_of_user: Tensor) -> None:
        """Make the groups.

        Args:
            config: the run's config.
            wholes: the network of all users of each group.
            client_of_user: ``[users]``, padding user 0: -1.
        """
        self.private_parameters = config["private_parameters"]
        self.clients = int(client_of_user.max()) + 1
        self.memory = pack_bytes(config["fleet_memory"], torch.device(config["device"]))
        folder, limit = Path(config["checkpoint_dir"]), MEGABYTE * config["fleet_kept_memory"]
        self.mapped = MappedTensors(folder, min(limit, IN_PLACE), limit)
        numbers = torch.arange(self.clients)
        groups = (
            ClientGroup(whole, numbers[group_index :: len(wholes)], client_of_user, self.mapped)
            for group_index, whole in enumerate(wholes)
        )
        self.groups = nn.ModuleList(groups)
        self.register_buffer("client_of_user", self.mapped.kept(client_of_user), persistent=False)
        self.register_buffer("local_id", self.mapped.kept(local_ids(client_of_user)), persistent=False)

    @property
    def client_groups(self) -> list[ClientGroup]:
        """The groups, as what they are."""
        return list(self.groups)  # type: ignore[arg-type]

    def network_of(self, client: int) -> nn.Module:
        """The module that is called with a client's own parameters."""
        return self.client_groups[client % len(self.groups)].whole

    def private_rows(self, group: int) -> dict[str, Rows]:
        """What of the network of all users no strategy may send."""
        return rows_that_stay(self.client_groups[group].whole, self.private_parameters)


def _scored(items: int, width: int, rows: int) -> float:
    """Numbers that a client of ``items`` takes when it scores ``rows`` rows, each of which takes ``width``."""
    return items + width * rows


@dataclass(frozen=True)
class _AllItems:
    """Clients of a group side by side, with every item by its own number.

    Attributes:
        where: of all users theirs.
        users: local ids, 0 where there is none ``[c, m]``.
        call: calls a function of the clients' networks, see :meth:`ClientGroup.called`.
        packed: what every call is given.
    """

    where: Where
    users: Tensor
    call: Callable[..., Any]
    packed: tuple[Any, ...]

    def called(self, function: Callable[..., Any], *more: Any) -> Any:
        """Call a function of a network, its parameters, its users ``[m]`` and more of each client, for all at once."""
        return self.call(function, *self.packed, *more)


class FleetPopulation(CompactPopulation, LabelledRecommender):
    """The population of :class:`~recbole_fedkd.model.AttnFedKD` in compact form.

    Args:
        config: the run's config.
        schema: what is public of the dataset.
        rows: the rows of all clients together.
        client_of_user: ``[users]``, padding user 0: -1.
    """

    def __init__(self, config: Any, schema: DataSchema, rows: ClientRows, client_of_user: Tensor) -> None:
        super().__init__(config, schema)
        self.settle(config, whole_networks(config, schema, rows), client_of_user)

    @torch.no_grad()
    def logits(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Every user by the network of the client it lives on; see :meth:`LabelledRecommender.logits`."""
        out = torch.empty(*items.shape, len(self.label_values), device=items.device)
        for group, rows in self._by_group(users):
            base = group.base()
            width = 64 * (1 + base[1].shape[1] + base[2].shape[1]) * items.shape[1]
            taken = partial(_scored, group.item_count, width)
            for clients, (row, slot, column) in self._packs(group, users[rows], taken):
                self._score(group, base, clients, (rows[row], slot, column), (users, items, context), out)
        return out

    @torch.no_grad()
    def rank(self, users: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Every user by the network of the client it lives on; see :meth:`LabelledRecommender.rank`."""
        out = torch.empty(len(users), len(self.label_values), self.item_num, device=users.device).transpose(1, 2)
        for group, rows in self._by_group(users):
            if ranks_side_by_side(group.whole):
                self._rank_side_by_side(group, rows, users, context, out)
            else:
                self._rank_one_by_one(group, rows, users, context, out)
        return out

    def _by_group(self, users: Tensor) -> Iterator[tuple[ClientGroup, Tensor]]:
        """Every group, with the places of the users that live on its clients."""
        owners = self.client_of_user[users]
        for index, group in enumerate(self.client_groups):
            yield group, torch.nonzero(owners % len(self.groups) == index).flatten()

    def _rank_side_by_side(
        self, group: ClientGroup, rows: Tensor, users: Tensor, context: Context, out: Tensor
    ) -> None:
        """Fill rows ``[n]`` of ``out``, whose users live on clients of a group that can be asked at once."""

        def rank(network: nn.Module, parameters: Any, users: Tensor, context: Context) -> Tensor:
            return rank_items(network, users, context, self.item_num)

        for pack in self._by_all_items(group, users[rows], len(self.label_values)):
            row, slot, column = pack.where
            asked, own = rows[row], dict[str, Tensor]()
            for name, values in context.items():
                own[name] = values.new_zeros(*pack.users.shape, *values.shape[1:])
                own[name][slot, column] = values[asked]
            out[asked] = pack.called(rank, own)[slot, column]

    def _by_all_items(self, group: ClientGroup, users: Tensor, labels: int) -> Iterator[_AllItems]:
        """Users ``[n]`` of a group, packs of its clients with every item at a time.

        ``labels``: of how many each user gets a number for every item, beside the tables of its client.
        """
        base = group.base()
        width = base[1].shape[1]
        group.whole.eval()

        # Tables of all items and logits, each made and then copied once; tables that are kept are not copied.
        def taken(most: int) -> float:
            return self.item_num * max(1, width if not labels else 2 * (width + most * labels))

        for clients, (row, slot, column) in self._packs(group, users, taken):
            local = torch.zeros(len(clients), 1 + int(column.max()), dtype=torch.long, device=users.device)
            local[slot, column] = self.local_id[users[row]]
            pack = group.pack_of_all_items(clients)
            buffers, weights = group.buffers_of(pack, renumbered=False), group.weights(pack, base, serving=True)
            packed = weights, buffers, local
            yield _AllItems((row, slot, column), local, partial(group.called, group.whole), packed)

    @property
    def screens(self) -> bool:
        """See :meth:`LabelledRecommender.screens`."""
        return all(ranks_chosen(group.whole) for group in self.client_groups)

    @torch.no_grad()
    def scored_again(self, users: Tensor) -> Scored:
        """See :meth:`LabelledRecommender.scored_again`; what clients' networks make of their items is kept."""
        parts = []
        for group, rows in self._by_group(users):
            for pack in self._by_all_items(group, users[rows], 0):
                row, slot, column = pack.where
                places = slot * pack.users.shape[1] + column
                parts.append((rows[row], places, AskedAgain(group.whole, pack.called)))
        return scored_by(parts, self.expected)

    def _rank_one_by_one(self, group: ClientGroup, rows: Tensor, users: Tensor, context: Context, out: Tensor) -> None:
        """Fill rows ``[n]`` of ``out``, whose users live on clients of a group."""
        base = group.base()
        for client, places in homes(self.client_of_user[users[rows]]):
            own = group.served_by(torch.tensor(client // len(self.groups), device=rows.device), base)
            mine = rows[places]
            of_rows = {name: values[mine] for name, values in context.items()}
            # Every network is that of all users, by their numbers among all.
            caller = Caller(self.network_of(client).eval(), rank_items)
            out[mine] = caller.by(own, users[mine], of_rows, self.item_num)

    def _packs(
        self, group: ClientGroup, users: Tensor, taken: Callable[[int], float]
    ) -> Iterator[tuple[Tensor, Where]]:
        """Clients of a group with about as many of the users ``[n]`` each, ``fleet_memory`` at a time, and where those are.

        None has less than half as many as another of its pack. ``taken``: numbers that a client takes, given how many users.
        """
        owners = self.client_of_user[users] // len(self.groups)
        order = torch.argsort(owners, stable=True)
        clients, counts = torch.unique_consecutive(owners[order], return_counts=True)
        starts, left = counts.cumsum(0) - counts, torch.argsort(counts, descending=True, stable=True)
        while len(left):
            most = int(counts[left[0]])
            alike = int((2 * counts[left] >= most).sum())
            pack, left = left.tensor_split([min(alike, max(1, int(self.memory / (4 * taken(most)))))])
            slot, column = ragged(counts[pack])
            yield clients[pack], (order[starts[pack][slot] + column], slot, column)

    def _score(self, group: ClientGroup, base: Base, clients: Tensor, where: Where, asked: Asked, out: Tensor) -> None:
        """Score the rows of packed clients."""
        row, slot, column = where
        users, items, context = asked
        targets = items.shape[1]
        width = int(column.max()) + 1
        own_users = torch.zeros(len(clients), width, dtype=torch.long, device=users.device)
        own_items = torch.zeros(len(clients), width, targets, dtype=torch.long, device=users.device)
        own_users[slot, column] = self.local_id[users[row]]
        own_items[slot, column] = items[row]
        own_context = {}
        for name, values in context.items():
            own_context[name] = values.new_zeros(len(clients), width, *values.shape[1:])
            own_context[name][slot, column] = values[row]
        pack = group.pack(clients, own_items.flatten(1))
        own_items = pack.places(own_items.flatten(1)).view_as(own_items)
        if group.single_users and targets == 1:
            own_users, own_items = own_users[:, :1], own_items.transpose(1, 2)
            own_context = {name: values.transpose(1, 2) for name, values in own_context.items()}
        group.whole.eval()
        weights = group.weights(pack, base, serving=True)

        def score(network: nn.Module, parameters: Any, users: Tensor, items: Tensor, context: Context) -> Tensor:
            logits: Tensor = network(users, items, context)
            return logits

        logits = group.called(group.whole, score, weights, group.buffers_of(pack), own_users, own_items, own_context)
        out[row] = logits.reshape(len(clients), width, targets, -1)[slot, column]


class RecBoleFleetPopulation(CompactPopulation, RoutedPopulation):
    """The population of :class:`~recbole_fedkd.model.RecBolePopulation` in compact form.

    Args:
        config: the run's config.
        dataset: the training split.
        client_of_user: ``[users]``, padding user 0: -1.
        model_class: a POINTWISE or PAIRWISE model.

    Raises:
        NotBatchedError: the model cannot be brought into this form.
    """

    def __init__(self, config: Any, dataset: Any, client_of_user: Tensor, model_class: type) -> None:
        super().__init__()
        self.type = config["MODEL_TYPE"]  # type: ignore[method-assign]
        self.input_type = config["MODEL_INPUT_TYPE"]
        self.user_field, item_field = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
        self.item_num = dataset.item_num
        self.batched = BatchedModel(
            model_class(config, dataset),
            self.user_field,
            item_field,
            config["NEG_PREFIX"],
            dataset.item_num,
            local_ids(client_of_user),
        )
        self.settle(config, [self.batched.model], client_of_user)

    def load_other_parameter(self, para: Any) -> None:
        """RecBole calls this after loading weights: what was computed from others is forgotten."""
        forget_cached(self.batched.model)

    @torch.no_grad()
    def _routed(self, interaction: Any, method: str) -> Tensor:
        (group,) = self.client_groups
        group.whole.eval()
        scores: Tensor
        if not group.own.shape[1] and not group.rows.width:
            # But for user rows, of which it has everybody's, the network of all users is everybody's.
            scores = getattr(group.whole, method)(interaction)
            return scores.flatten()
        base, caller = group.base(), Caller(group.whole, lambda network, part: getattr(network, method)(part))

        def of_client(client: int, part: Any) -> Tensor:
            served = group.served_by(torch.tensor(client, device=base[0].device), base)
            said: Tensor = caller.by(served, part)
            return said

        return self._parted(interaction, of_client)
