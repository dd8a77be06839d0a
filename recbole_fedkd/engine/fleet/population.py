"""A population in compact form: what all clients have in common once, and of each client only what is its own.

A client's network is that of all users and items, with the rows of its own users and, of the item tables, the rows that it has
touched. For computing, clients are packed: item ids are renumbered per client, and tables become ``[clients, rows, width]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from recbole_fedkd.model.catalogue import KEPT, rank_items, ranks_chosen, ranks_side_by_side
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


def _called(network: nn.Module, state: Mapping[str, Tensor], function: Callable[..., Any]) -> Any:
    """A function of a network with a client's own parameters."""
    return Caller(network, function).by(state)


def _ranked(network: nn.Module, users: Tensor, context: Context, items: int, made: list[Any] | None) -> Tensor:
    """Rank by a client's network; ``made`` takes in its catalogue, so that further users of the client need none."""
    if made is not None and not made:
        made.append(network.catalogue())  # type: ignore[operator]
    return rank_items(network, users, context, items, made[0] if made else None)


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
        owners = self.client_of_user[users]
        out = torch.empty(*items.shape, len(self.label_values), device=items.device)
        for group_index, group in enumerate(self.client_groups):
            base = group.base()
            mine = torch.nonzero(owners % len(self.groups) == group_index).flatten()
            mine = mine[torch.argsort(owners[mine], stable=True)]
            clients, counts = torch.unique_consecutive(owners[mine] // len(self.groups), return_counts=True)
            starts = counts.cumsum(0) - counts
            for chosen in self._parts(group, counts, items.shape[1]):
                slot, column = ragged(counts[chosen])
                rows = starts[chosen][slot] + column
                self._score(group, base, clients[chosen], (mine[rows], slot, column), (users, items, context), out)
        return out

    @torch.no_grad()
    def rank(self, users: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Every user by the network of the client it lives on; see :meth:`LabelledRecommender.rank`."""
        owners = self.client_of_user[users]
        out = torch.empty(len(users), len(self.label_values), self.item_num, device=users.device).transpose(1, 2)
        for index, group in enumerate(self.client_groups):
            rows = torch.nonzero(owners % len(self.groups) == index).flatten()
            if group.single_users and ranks_side_by_side(group.whole):
                self._rank_side_by_side(group, owners[rows] // len(self.groups), rows, context, out)
            else:
                self._rank_one_by_one(group, index, rows, users, context, out)
        return out

    def _rank_side_by_side(
        self, group: ClientGroup, clients: Tensor, rows: Tensor, context: Context, out: Tensor
    ) -> None:
        """Fill rows ``[n]`` of ``out`` with what clients ``[n]`` of one user each make of it."""

        def rank(network: nn.Module, parameters: Any, users: Tensor, context: Context) -> Tensor:
            return rank_items(network, users, context, self.item_num)

        # Tables of all items and logits, each made and then copied once.
        width = 2 * (group.item_base().shape[1] + len(self.label_values))
        for part, called in self._by_all_items(group, clients, width):
            own = {name: values[rows[part]].unsqueeze(1) for name, values in context.items()}
            out[rows[part]] = called(rank, own)[:, 0]

    def _by_all_items(
        self, group: ClientGroup, clients: Tensor, width: int
    ) -> Iterator[tuple[Tensor, Callable[..., Any]]]:
        """Packs of clients ``[n]`` of one user each with every item, each of ``width`` numbers at a time.

        Yields:
            Their places, and what calls a function of the network, its parameters, its user ``[1]`` and more of each client
            ``[c, ...]``, for all of them at once.
        """
        base = group.base()
        group.whole.eval()
        at_once = max(1, int(self.memory / (4 * self.item_num * max(1, width))))
        for part in torch.arange(len(clients)).split(at_once) if len(clients) else ():
            pack = group.pack_of_all_items(clients[part])
            buffers, weights = group.buffers_of(pack, renumbered=False), group.weights(pack, base, serving=True)
            users = torch.ones_like(part)[:, None]

            def called(
                function: Callable[..., Any],
                *more: Any,
                weights: Any = weights,
                buffers: Any = buffers,
                users: Tensor = users,
            ) -> Any:
                return group.called(group.whole, function, weights, buffers, users, *more)

            yield part, called

    @property
    def screens(self) -> bool:
        """See :meth:`LabelledRecommender.screens`."""
        side_by_side = all(group.single_users and ranks_side_by_side(group.whole) for group in self.client_groups)
        return (side_by_side or self.clients <= KEPT) and all(ranks_chosen(group.whole) for group in self.client_groups)

    @torch.no_grad()
    def scored_again(self, users: Tensor) -> Scored:
        """See :meth:`LabelledRecommender.scored_again`; what clients' networks make of their items is kept."""
        owners, bases = self.client_of_user[users], dict[int, Any]()
        parts: list[tuple[Tensor, AskedAgain]] = []
        for index, group in enumerate(self.client_groups):
            rows = torch.nonzero(owners % len(self.groups) == index).flatten()
            if group.single_users:
                # Tables are kept however many are made at a time.
                width = group.item_base().shape[1]
                for part, called in self._by_all_items(group, owners[rows] // len(self.groups), width):
                    parts.append((rows[part], AskedAgain(group.whole, called)))
                continue
            for client, mine in homes(owners[rows]):
                own, _ = self._kept_of(client, bases)
                by = partial(_called, self.network_of(client).eval(), own)
                parts.append((rows[mine], AskedAgain.of_one(group.whole, users[rows[mine]], by=by)))
        return scored_by(parts, self.expected)

    def _rank_one_by_one(
        self, group: ClientGroup, index: int, rows: Tensor, users: Tensor, context: Context, out: Tensor
    ) -> None:
        """Fill rows ``[n]`` of ``out``, whose users live on clients of a group."""
        owners = self.client_of_user[users]
        bases: dict[int, Any] = {}
        for client in owners[rows].unique().tolist():
            mine = rows[owners[rows] == client]
            own, made = self._kept_of(client, bases)
            of_rows = {name: values[mine] for name, values in context.items()}
            caller = Caller(self.network_of(client).eval(), _ranked)
            out[mine] = caller.by(own, users[mine], of_rows, self.item_num, made)

    def _kept_of(self, client: int, bases: dict[int, Any]) -> tuple[dict[str, Tensor], list[Any] | None]:
        """As :meth:`_served`, from what is kept."""
        served = partial(self._served, client, bases)
        return served() if self.kept is None else self.kept.of(client, served)

    def _served(self, client: int, bases: dict[int, Any]) -> tuple[dict[str, Tensor], list[Any] | None]:
        """The network that serves a client's users, by its parameters, and room for what a ranking makes of them; None: none.

        ``bases``: what a group's clients have in common, by the group, as far as it is known.
        """
        slot, index = divmod(client, len(self.groups))
        group = self.client_groups[index]
        if index not in bases:
            bases[index] = group.base()
        own = group.served_by(torch.tensor(slot, device=self.client_of_user.device), bases[index])
        if self.kept is None or not getattr(group.whole, "ranks", False):
            return own, None
        return own, []

    def _parts(self, group: ClientGroup, counts: Tensor, targets: int) -> list[Tensor]:
        """Clients with about as many rows each, ``fleet_memory`` at a time, by their places in ``counts`` ``[c]``."""
        width = sum(table.shape[1] for table in (group.item_base(), group.user_table())) + 1
        order = torch.argsort(counts, descending=True)
        parts = []
        while len(order):
            rows = int(counts[order[0]]) * targets
            taken = max(1, int(self.memory / (4 * (group.item_count + 64 * width * rows))))
            parts.append(order[:taken])
            order = order[taken:]
        return parts

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
