"""A population in compact form: what all clients have in common once, and of each client only what is its own.

A client's network is that of all users and items, with the rows of its own users and, of the item tables, the rows that it has
touched. For computing, clients are packed: item ids are renumbered per client, and tables become ``[clients, rows, width]``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.model.abstract_recommender import AbstractRecommender
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from recbole_fedkd.model.batching import BatchedModel
from recbole_fedkd.model.network import NO_CONTEXT, Context
from recbole_fedkd.model.pair import names_of
from recbole_fedkd.model.population import local_ids, rows_that_stay, whole_networks
from recbole_fedkd.model.shared import Rows, forget_cached
from recbole_fedkd.model.student import LabelledRecommender

MEGABYTE = 2**20


class RowStore(nn.Module):
    """Rows of item tables per client, each client's in one piece behind another.

    Args:
        clients: number of clients.
        width: numbers in a row.
        items: number of items, padding included.
    """

    start: Tensor
    count: Tensor
    item: Tensor
    data: Tensor

    growing = ("item", "data")

    def __init__(self, clients: int, width: int, items: int) -> None:
        super().__init__()
        self.items = items
        self.register_buffer("start", torch.zeros(clients, dtype=torch.long))
        self.register_buffer("count", torch.zeros(clients, dtype=torch.long))
        self.register_buffer("item", torch.zeros(0, dtype=torch.long))
        self.register_buffer("data", torch.zeros(0, width))

    def of(self, clients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of the clients ``[c]``: place in ``clients``, item id and row of ``data``, each ``[rows]``."""
        count = self.count[clients]
        slot = torch.repeat_interleave(torch.arange(len(clients), device=count.device), count)
        offset = torch.arange(len(slot), device=count.device) - (count.cumsum(0) - count)[slot]
        place = self.start[clients][slot] + offset
        return slot, self.item[place], place

    def replace(self, clients: Tensor, count: Tensor, item: Tensor, data: Tensor) -> None:
        """Give the clients ``[c]`` other rows: ``count`` ``[c]`` each, in their order ``item`` ``[rows]`` and ``data``."""
        others = torch.ones_like(self.count, dtype=torch.bool)
        others[clients] = False
        rest = torch.nonzero(others).flatten()
        order, counts = torch.cat([clients, rest]), torch.cat([count, self.count[rest]])
        _, kept_item, place = self.of(rest)
        if len(place):
            item, data = torch.cat([item, kept_item]), torch.cat([data, self.data[place]])
        self.item, self.data = item, data
        self.count[order] = counts
        self.start[order] = counts.cumsum(0) - counts

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the tensors as they are, for the number of rows is part of what is saved; ValueError if they do not fit."""
        saved = {name: state_dict[f"{prefix}{name}"] for name in ("start", "count", "item", "data")}
        own = dict(self.named_buffers())
        for name, tensor in saved.items():
            shape = tensor.shape[1:] if name in self.growing else tensor.shape
            fits = shape == (own[name].shape[1:] if name in self.growing else own[name].shape)
            if not fits or tensor.dtype != own[name].dtype or tensor.layout != own[name].layout:
                raise ValueError(f"'{prefix}{name}' is {tuple(tensor.shape)} of {tensor.dtype}")
        if not self._consistent(**saved):
            raise ValueError(
                f"the rows of clients in '{prefix}item' are not one piece for each, of items that there are"
            )
        for name, tensor in saved.items():
            setattr(self, name, tensor.to(self.data.device, copy=True))

    def _consistent(self, start: Tensor, count: Tensor, item: Tensor, data: Tensor) -> bool:
        """Whether the pieces lie behind each other and fill the rows, and every client has an item at most once."""
        # Bounded before anything is summed or repeated as often as they say.
        if len(item) != len(data) or bool(((count < 0) | (count > len(item))).any()) or int(count.sum()) != len(item):
            return False
        if len(item) and not 0 <= int(item.min()) <= int(item.max()) < self.items:
            return False
        order = torch.from_numpy(np.lexsort((count.cpu().numpy(), start.cpu().numpy()))).to(count.device)
        held = count[order]
        if not torch.equal(start[order], held.cumsum(0) - held):
            return False
        owner = torch.repeat_interleave(order, held)
        return len(torch.unique(owner * self.items + item)) == len(item)


@dataclass(frozen=True)
class Pack:
    """Clients side by side, with item ids of their own: 0 is padding, as everywhere.

    Attributes:
        clients: places in the group ``[c]``.
        members: user ids ``[c, 1 + users]``, each client's behind a padding user; 0 where a client has fewer.
        items: item ids ``[c, rows]``, 0 where a client has fewer.
        count: rows of each client ``[c]``.
        local: ``[c, items]``, the client's own id of each item; 0 where it has none.
        known: bool ``[c, items]``, which items have one.
    """

    clients: Tensor
    members: Tensor
    items: Tensor
    count: Tensor
    local: Tensor
    known: Tensor

    def first(self, count: int) -> Pack:
        """The first clients alone."""
        parts = (self.clients, self.members, self.items, self.count, self.local, self.known)
        clients, members, items, counts, local, known = (each[:count] for each in parts)
        return Pack(clients, members, items, counts, local, known)


@dataclass(frozen=True)
class Weights:
    """Parameters of packed clients as three tensors: a network's parameters lie side by side on the last axis.

    Attributes:
        dense: ``[c, P]``, what every sample touches.
        rows: ``[c, rows, D]``, item tables.
        users: ``[c, 1 + users, U]``, user tables.
    """

    dense: Tensor
    rows: Tensor
    users: Tensor

    def first(self, count: int) -> Weights:
        """The first clients alone, in the same memory."""
        return Weights(self.dense[:count], self.rows[:count], self.users[:count])

    def zeros(self) -> Weights:
        """Zeros of the same shapes."""
        return Weights(torch.zeros_like(self.dense), torch.zeros_like(self.rows), torch.zeros_like(self.users))

    def tensors(self) -> list[Tensor]:
        """The three that hold anything."""
        return [each for each in (self.dense, self.rows, self.users) if each.numel()]


class ClientGroup(nn.Module):
    """Clients with networks of one architecture.

    Its state: the network of all users, whose user rows are the clients' own and whose other weights are those that clients
    share or start from; and per client what it has of its own.

    Args:
        whole: the network of all users.
        numbers: the clients ``[K]``.
        client_of_user: ``[users]``.
    """

    numbers: Tensor
    member: Tensor
    first_member: Tensor
    member_count: Tensor
    own: Tensor

    def __init__(self, whole: nn.Module, numbers: Tensor, client_of_user: Tensor) -> None:
        super().__init__()
        self.whole = whole
        order = torch.argsort(client_of_user, stable=True)
        counts = torch.bincount(client_of_user + 1)
        starts = counts.cumsum(0) - counts
        for name, value in (
            ("numbers", numbers),
            ("member", order),
            ("first_member", starts[numbers + 1]),
            ("member_count", counts[numbers + 1]),
        ):
            self.register_buffer(name, value, persistent=False)
        parameters, buffers = dict(whole.named_parameters()), dict(whole.named_buffers())
        self.user_names = [name for name in names_of(whole, "user_rows") if name in parameters]
        self.item_names = [name for name in names_of(whole, "item_rows") if name in parameters]
        self.item_buffers = [name for name in names_of(whole, "item_rows") if name in buffers]
        self.user_buffers = [name for name in names_of(whole, "user_buffers") if name in buffers]
        self.item_references = names_of(whole, "item_references")
        self.dense_names = [name for name in parameters if name not in {*self.user_names, *self.item_names}]
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.origins: Mapping[str, str] = getattr(whole, "origins", {})
        self.item_count = len((parameters | buffers)[names_of(whole, "item_rows")[0]])
        self.single_users = bool((self.member_count <= 1).all())
        self.keep((), True, True)

    def keep(self, private: Collection[str], resumed: bool, kept: bool) -> None:
        """Say what of a client outlives a round; forgets what has been stored.

        Args:
            private: parameters that are never shared.
            resumed: whether a client goes on with what it has also of the others, not with what all have in common.
            kept: whether a client keeps what it has made of the others.
        """
        for names in (self.dense_names, self.item_names):
            names.sort(key=lambda name: name not in private)

        def widths(names: list[str], first_axis: int) -> tuple[int, int]:
            sizes = {name: self.shapes[name][first_axis:].numel() for name in names}
            of_private = sum(size for name, size in sizes.items() if name in private)
            total = sum(sizes.values())
            return total if resumed else of_private, total if kept else of_private

        self.dense_resumed, dense_kept = widths(self.dense_names, 0)
        self.rows_resumed, rows_kept = widths(self.item_names, 1)
        device = self.numbers.device
        self.register_buffer("own", self.dense_base()[:dense_kept].repeat(len(self.numbers), 1))
        self.rows = RowStore(len(self.numbers), rows_kept, self.item_count).to(device)

    @torch.no_grad()
    def dense_base(self) -> Tensor:
        """Weights that all have in common ``[P]``, without those of items and users."""
        parameters = dict(self.whole.named_parameters())
        nothing = torch.zeros(0, device=self.numbers.device)
        return torch.cat([nothing, *(parameters[name].flatten() for name in self.dense_names)])

    @torch.no_grad()
    def item_base(self) -> Tensor:
        """Item tables that all have in common, side by side: ``[items, D]``."""
        return self._tables(self.item_names)

    def _tables(self, names: list[str]) -> Tensor:
        parameters = dict(self.whole.named_parameters())
        if not names:
            return torch.zeros(1, 0, device=self.numbers.device)
        return torch.cat([parameters[name].flatten(1) for name in names], 1)

    @torch.no_grad()
    def user_table(self) -> Tensor:
        """User tables side by side: ``[users, U]``."""
        return self._tables(self.user_names)

    def base(self) -> tuple[Tensor, Tensor, Tensor]:
        """What all have in common: :meth:`dense_base`, :meth:`item_base` and :meth:`user_table`."""
        return self.dense_base(), self.item_base(), self.user_table()

    def pack(self, clients: Tensor, needed: Tensor, stores: Sequence[RowStore] = ()) -> Pack:
        """Put clients side by side.

        Args:
            clients: places in the group ``[c]``.
            needed: items of each ``[c, n]`` that are needed beside those of the histories and the padding item.
            stores: all rows of the clients that are stored in these are needed too.
        """
        device = clients.device
        counts = self.member_count[clients]
        users = torch.arange(int(counts.max()), device=device)
        present = users < counts.unsqueeze(1)
        place = self.first_member[clients].unsqueeze(1) + users
        members = torch.where(present, self.member[place.clamp(max=len(self.member) - 1)], 0)
        members = torch.cat([torch.zeros_like(clients).unsqueeze(1), members], 1)
        known = torch.zeros(len(clients), self.item_count, dtype=torch.bool, device=device)
        known[:, 0] = True
        known.scatter_(1, needed, True)
        buffers = dict(self.whole.named_buffers())
        for name in self.item_references:
            known.scatter_(1, buffers[name][members].flatten(1), True)
        for store in stores:
            own_slot, own_item, _ = store.of(clients)
            known[own_slot, own_item] = True
        known_slot, known_item = known.nonzero(as_tuple=True)
        count = torch.bincount(known_slot, minlength=len(clients))
        place = torch.arange(len(known_slot), device=device) - (count.cumsum(0) - count)[known_slot]
        items = torch.zeros(len(clients), int(count.max()), dtype=torch.long, device=device)
        items[known_slot, place] = known_item
        local = torch.zeros(known.shape, dtype=torch.int32, device=device)
        local[known_slot, known_item] = place.int()
        return Pack(clients, members, items, count, local, known)

    def weights(self, pack: Pack, base: tuple[Tensor, Tensor, Tensor], serving: bool = False) -> Weights:
        """Parameters of packed clients, in memory of their own.

        Args:
            pack: the clients.
            base: what all have in common, see :meth:`base`.
            serving: as the clients serve their users, not as they start a round.
        """
        dense_base, item_base, user_table = base
        dense = dense_base.repeat(len(pack.clients), 1)
        dense_from = self.own.shape[1] if serving else self.dense_resumed
        if dense_from:
            dense[:, :dense_from] = self.own[pack.clients, :dense_from]
        rows = functional.embedding(pack.items, item_base) if self.item_names else dense.new_zeros(*pack.items.shape, 0)
        rows_from = self.rows.data.shape[1] if serving else self.rows_resumed
        if rows_from:
            fill_rows(rows, pack, self.rows, rows_from)
        users = user_table[pack.members] if self.user_names else dense.new_zeros(*pack.members.shape, 0)
        return Weights(dense, rows, users)

    @torch.no_grad()
    def write(self, pack: Pack, weights: Weights) -> None:
        """Keep what is the clients' own but for the item rows, which :meth:`RowStore.replace` takes for a whole round."""
        if self.own.shape[1]:
            self.own[pack.clients] = weights.dense[:, : self.own.shape[1]]
        present = pack.members > 0
        owners = pack.members[present]
        parameters, column = dict(self.whole.named_parameters()), 0
        for name in self.user_names:
            width = parameters[name][0].numel()
            values = weights.users[present][:, column : column + width]
            parameters[name][owners] = values.view(-1, *parameters[name].shape[1:])
            column += width

    def named(self, weights: Weights) -> dict[str, Tensor]:
        """The parameters by name, ``[c, ...]``, part of the autograd graph."""
        shapes, named = self.shapes, {}
        parts = weights.dense.split([shapes[name].numel() for name in self.dense_names], 1)
        for name, part in zip(self.dense_names, parts, strict=True):
            named[name] = part.view(len(part), *shapes[name])
        for names, table in ((self.item_names, weights.rows), (self.user_names, weights.users)):
            widths = [shapes[name][1:].numel() for name in names]
            pieces = table.split(widths, 2) if len(names) > 1 else [table] * len(names)
            for name, piece in zip(names, pieces, strict=True):
                named[name] = piece.reshape(*piece.shape[:2], *shapes[name][1:])
        return named

    @torch.no_grad()
    def served_by(self, client: Tensor, base: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        """Parameters of the network of all users and items as one client serves it; arguments as of :meth:`weights`."""
        dense, rows = base[0].clone(), base[1].clone()
        dense[: self.own.shape[1]] = self.own[client]
        _, item, place = self.rows.of(client.unsqueeze(0))
        width = self.rows.data.shape[1]
        rows[item, :width] = self.rows.data[place]
        named = self.named(Weights(*(part.unsqueeze(0) for part in (dense, rows, base[2]))))
        return {name: value[0] for name, value in named.items()}

    def column_rates(self, rates: Mapping[str, float], default: float) -> list[Tensor]:
        """Learning rate of every column of :meth:`Weights.tensors`; the default where ``rates`` does not name a parameter."""
        found = []
        for names, per_row in ((self.dense_names, 0), (self.item_names, 1), (self.user_names, 1)):
            sizes = [self.shapes[name][per_row:].numel() for name in names]
            columns = [torch.full((size,), rates.get(name, default)) for name, size in zip(names, sizes, strict=True)]
            if columns:
                found.append(torch.cat(columns).to(self.numbers.device))
        return found

    def buffers_of(self, pack: Pack) -> dict[str, Tensor]:
        """The buffers that differ from client to client, ``[c, ...]``."""
        whole = dict(self.whole.named_buffers())
        found = {name: whole[name][pack.items] for name in self.item_buffers}
        for name in self.user_buffers:
            values = whole[name][pack.members]
            if name in self.item_references:
                values = pack.local.gather(1, values.flatten(1)).long().view_as(values)
            found[name] = values
        return found

    def twin(self) -> nn.Module:
        """A network that shares all memory with :attr:`whole`: while one is being called, its parameters are others."""
        tensors = [*self.whole.parameters(), *self.whole.buffers()]
        return copy.deepcopy(self.whole, {id(tensor): tensor for tensor in tensors})

    def called(
        self,
        network: nn.Module,
        function: Callable[..., Any],
        weights: Weights,
        buffers: Mapping[str, Tensor],
        *packed: Any,
    ) -> Any:
        """Call a function of a network for every packed client at once.

        Args:
            network: :attr:`whole`, or a :meth:`twin` where several threads call.
            function: called as ``function(network, parameters, *of the client)``.
            weights: of the clients.
            buffers: of the clients.
            packed: tensors ``[c, ...]``, or containers of such.
        """
        caller = _Caller(network, function)

        def of_client(parameters: dict[str, Tensor], others: dict[str, Tensor], *arguments: Any) -> Any:
            state = {f"network.{name}": value for name, value in {**parameters, **others}.items()}
            return functional_call(caller, state, (parameters, *arguments))

        return vmap(of_client)(self.named(weights), dict(buffers), *packed)


class _Caller(nn.Module):
    """A function of a network as a module: ``torch.func`` swaps the parameters of modules."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *arguments: Any) -> Any:
        """Call it."""
        return self.function(self.network, *arguments)


def fill_rows(rows: Tensor, pack: Pack, store: RowStore, width: int) -> None:
    """Overwrite the first ``width`` columns of packed rows ``[c, rows, D]`` by what the clients have stored."""
    slot, item, place = store.of(pack.clients)
    if len(slot):
        needed = pack.known[slot, item]
        slot, item, place = slot[needed], item[needed], place[needed]
        rows[slot, pack.local[slot, item].long(), :width] = store.data[place, :width]


class CompactPopulation(nn.Module):
    """Clients in compact form, whatever their networks are.

    Attributes:
        groups: clients of one architecture each; with several, clients are dealt out in turn.
        clients: their number.
        memory: bytes that clients side by side may take.
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
        self.memory = float(config["fleet_memory"]) * MEGABYTE
        numbers = torch.arange(self.clients)
        groups = (ClientGroup(each, numbers[place :: len(wholes)], client_of_user) for place, each in enumerate(wholes))
        self.groups = nn.ModuleList(groups)
        self.register_buffer("client_of_user", client_of_user, persistent=False)
        self.register_buffer("local_id", local_ids(client_of_user), persistent=False)

    @property
    def client_groups(self) -> list[ClientGroup]:
        """The groups, as what they are."""
        return list(self.groups)  # type: ignore[arg-type]

    def private_rows(self, group: int) -> dict[str, Rows]:
        """What of the network of all users no strategy may send."""
        return rows_that_stay(self.client_groups[group].whole, self.private_parameters)


class FleetPopulation(CompactPopulation, LabelledRecommender):
    """The population of :class:`~recbole_fedkd.model.AttnFedKD` in compact form; arguments as there."""

    def __init__(self, config: Any, dataset: Any, client_of_user: Tensor) -> None:
        super().__init__(config, dataset)
        self.settle(config, whole_networks(config, dataset, len(self.label_values)), client_of_user)

    @torch.no_grad()
    def logits(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Every user by the network of the client it lives on; see :meth:`LabelledRecommender.logits`."""
        owners = self.client_of_user[users]
        out = torch.empty(*items.shape, len(self.label_values), device=items.device)
        for place, group in enumerate(self.client_groups):
            base = group.base()
            mine = torch.nonzero(owners % len(self.groups) == place).flatten()
            mine = mine[torch.argsort(owners[mine], stable=True)]
            clients, counts = torch.unique_consecutive(owners[mine] // len(self.groups), return_counts=True)
            starts = counts.cumsum(0) - counts
            for chosen in self._parts(group, counts, items.shape[1]):
                rows, slot, column = _ragged(starts[chosen], counts[chosen])
                self._score(group, base, clients[chosen], (mine[rows], slot, column), (users, items, context), out)
        return out

    def _parts(self, group: ClientGroup, counts: Tensor, targets: int) -> list[Tensor]:
        """Clients with about as many rows each, ``fleet_memory`` at a time, by their places in ``counts`` ``[c]``."""
        width = sum(each.shape[1] for each in (group.item_base(), group.user_table())) + 1
        order = torch.argsort(counts, descending=True)
        parts = []
        while len(order):
            rows = int(counts[order[0]]) * targets
            taken = max(1, int(self.memory / (4 * width * (group.item_count + 64 * rows))))
            parts.append(order[:taken])
            order = order[taken:]
        return parts

    def _score(
        self,
        group: ClientGroup,
        base: tuple[Tensor, Tensor, Tensor],
        clients: Tensor,
        place: tuple[Tensor, Tensor, Tensor],
        asked: tuple[Tensor, Tensor, Context],
        out: Tensor,
    ) -> None:
        """Score the rows of packed clients; ``place``: row of what is asked, client and column of each, ``[n]``."""
        row, slot, column = place
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
        own_items = pack.local.gather(1, own_items.flatten(1)).long().view_as(own_items)
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


class RecBoleFleetPopulation(CompactPopulation, AbstractRecommender):
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

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[batch]``, as the model's own."""
        return self._routed(interaction, "predict")

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of every item, ``[batch * items]``; not implemented where the model's own is not."""
        return self._routed(interaction, "full_sort_predict")

    def load_other_parameter(self, para: Any) -> None:
        """RecBole calls this after loading weights: what was computed from others is forgotten."""
        forget_cached(self.batched.model)

    @torch.no_grad()
    def _routed(self, interaction: Any, method: str) -> Tensor:
        (group,) = self.client_groups
        group.whole.eval()
        scores: Tensor
        if not group.own.shape[1] and not group.rows.data.shape[1]:
            # But for user rows, of which it has everybody's, the network of all users is everybody's.
            scores = getattr(group.whole, method)(interaction)
            return scores.flatten()
        owners = self.client_of_user[interaction[self.user_field]]
        base = group.base()
        out: Tensor | None = None
        for client in owners.unique():
            rows = torch.nonzero(owners == client).flatten()
            own = {f"network.{name}": value for name, value in group.served_by(client, base).items()}
            caller = _Caller(group.whole, lambda network, part: getattr(network, method)(part))
            scores = functional_call(caller, own, (interaction[rows],)).view(len(rows), -1)
            if out is None:
                out = scores.new_empty(len(owners), scores.shape[1])
            out[rows] = scores
        assert out is not None
        return out.flatten()


def _ragged(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of a list: the numbers of their entries, the piece and the place in it of each, ``[entries]``."""
    piece = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    place = torch.arange(len(piece), device=counts.device) - (counts.cumsum(0) - counts)[piece]
    return starts[piece] + place, piece, place
