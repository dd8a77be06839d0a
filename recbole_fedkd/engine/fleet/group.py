"""Clients with networks of one architecture, in compact form: packed for computing, put away after it."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from recbole_fedkd.engine.fleet.compiled import touched_by_many
from recbole_fedkd.engine.fleet.mapped import MappedTensors
from recbole_fedkd.engine.fleet.moving import moves_rows
from recbole_fedkd.engine.fleet.store import Pack, RowStore, Weights, ragged, side_by_side
from recbole_fedkd.model.factorization import RowSums, dense
from recbole_fedkd.model.pair import names_of

Base = tuple[Tensor, Tensor, Tensor]
"""What all clients of a group have in common, as :meth:`ClientGroup.base` has it."""


class ClientGroup(nn.Module):
    """Clients with networks of one architecture.

    Its state: the network of all users, whose user rows are the clients' own and whose other weights are those that clients
    share or start from; and per client what it has of its own.

    Args:
        whole: the network of all users.
        numbers: the clients ``[K]``.
        client_of_user: ``[users]``.
        mapped: says where lies what is the clients' own.
    """

    numbers: Tensor
    member: Tensor
    first_member: Tensor
    member_count: Tensor
    own: Tensor
    rows: RowStore

    def __init__(
        self, whole: nn.Module, numbers: Tensor, client_of_user: Tensor, mapped: MappedTensors | None = None
    ) -> None:
        super().__init__()
        self.whole, self.mapped = whole, mapped or MappedTensors()
        order = torch.argsort(client_of_user, stable=True)
        counts = torch.bincount(client_of_user + 1)
        starts = counts.cumsum(0) - counts
        for name, value in (
            ("numbers", numbers),
            ("member", order),
            ("first_member", starts[numbers + 1]),
            ("member_count", counts[numbers + 1]),
        ):
            self.register_buffer(name, self.mapped.kept(value), persistent=False)
        parameters, buffers = dict(whole.named_parameters()), dict(whole.named_buffers())
        self.user_names = [name for name in names_of(whole, "user_rows") if name in parameters]
        self.item_names = [name for name in names_of(whole, "item_rows") if name in parameters]
        self.item_buffers = [name for name in names_of(whole, "item_rows") if name in buffers]
        self.user_buffers = [name for name in names_of(whole, "user_buffers") if name in buffers]
        self.item_references = names_of(whole, "item_references")
        self.received_buffers = names_of(whole, "received_buffers")
        for number, name in enumerate(self.received_buffers):
            self.register_buffer(f"received_{number}", self.mapped.repeated(buffers[name], len(numbers)))
        for tensor in [parameters[name] for name in self.user_names] + [buffers[name] for name in self.user_buffers]:
            tensor.data = self.mapped.kept(tensor.data)
        # Looking for weights of two names takes a walk through all modules, whenever a network is called.
        every = [whole.named_parameters(remove_duplicate=False), whole.named_buffers(remove_duplicate=False)]
        self.tied = sum(len(list(tensors)) for tensors in every) > len(parameters) + len(buffers)
        self.dense_names = [name for name in parameters if name not in {*self.user_names, *self.item_names}]
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.origins: Mapping[str, str] = getattr(whole, "origins", {})
        # A network without item rows has the padding item alone.
        tables = [*(parameters[name] for name in self.item_names), *(buffers[name] for name in self.item_buffers)]
        self.item_count = max([1, *map(len, tables)])
        self.single_users = bool((self.member_count <= 1).all())
        self.keep((), False, False)

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
        if "own" in self._buffers:
            for tensor in (self.own, *self.rows.buffers()):
                self.mapped.let_go(tensor)
        self.register_buffer("own", self.mapped.repeated(self.dense_base()[:dense_kept], len(self.numbers)))
        self.rows = RowStore(len(self.numbers), rows_kept, self.item_count, self.mapped).to(device)

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
        """User tables side by side: ``[users, U]``; one alone is not copied."""
        if len(self.user_names) == 1:
            return self.whole.get_parameter(self.user_names[0]).detach().flatten(1)
        return self._tables(self.user_names)

    def base(self) -> Base:
        """What all have in common: :meth:`dense_base`, :meth:`item_base` and :meth:`user_table`."""
        return self.dense_base(), self.item_base(), self.user_table()

    def pack(self, clients: Tensor, needed: Tensor, stores: Sequence[RowStore] = ()) -> Pack:
        """Put clients side by side.

        Args:
            clients: places in the group ``[c]``.
            needed: items of each ``[c, n]`` that are needed beside those of the histories and the padding item.
            stores: all rows of the clients that are stored in these are needed too.
        """
        members = self._members(clients)
        return Pack(clients, members, *self._touched(clients, members, needed, stores), self.item_count)

    def pack_of_all_items(self, clients: Tensor) -> Pack:
        """Clients ``[c]`` side by side, with every item by its own number."""
        items = torch.arange(self.item_count, device=clients.device).repeat(len(clients), 1)
        count = torch.full_like(clients, self.item_count)
        return Pack(clients, self._members(clients), items, count, self.item_count)

    def _members(self, clients: Tensor) -> Tensor:
        """User ids of clients ``[c, 1 + users]``, as of :class:`Pack`."""
        device, counts = clients.device, self.member_count[clients]
        users = torch.arange(int(counts.max()), device=device)
        present = users < counts.unsqueeze(1)
        entry = self.first_member[clients].unsqueeze(1) + users
        members = torch.where(present, self.member[entry.clamp(max=len(self.member) - 1)], 0)
        return torch.cat([torch.zeros_like(clients).unsqueeze(1), members], 1)

    def _touched(
        self, clients: Tensor, members: Tensor, needed: Tensor, stores: Sequence[RowStore]
    ) -> tuple[Tensor, Tensor]:
        """Items that packed clients need ``[c, rows]``, padding first, and how many ``[c]``; arguments as of :meth:`pack`."""
        device, buffers = clients.device, dict(self.whole.named_buffers())
        references = [buffers[name][members].flatten(1) for name in self.item_references]
        if moves_rows(device):
            stored = [store.items_of(clients) for store in stores if store.pieces]
            return touched_by_many(side_by_side([needed, *references, *stored], 1), self.item_count)
        known = torch.zeros(len(clients), self.item_count, dtype=torch.bool, device=device)
        known[:, 0] = True
        for asked in (needed, *references):
            known.scatter_(1, asked, True)
        for store in stores:
            own_slot, own_item, _ = store.of(clients)
            known[own_slot, own_item] = True
        known_slot, known_item = known.nonzero(as_tuple=True)
        count = torch.bincount(known_slot, minlength=len(clients))
        _, column = ragged(count)
        items = torch.zeros(len(clients), int(count.max()), dtype=torch.long, device=device)
        items[known_slot, column] = known_item
        return items, count

    def weights(self, pack: Pack, base: Base, serving: bool = False) -> Weights:
        """Parameters of packed clients, in memory of their own.

        Args:
            pack: the clients.
            base: what all have in common, see :meth:`base`.
            serving: as the clients serve their users, not as they start a round.
        """
        dense_base, item_base, user_table = base
        dense_from = self.own.shape[1] if serving else self.dense_resumed
        if 0 < dense_from == len(dense_base):
            dense = self.own.index_select(0, pack.clients).to(dense_base.dtype)
        else:
            dense = dense_base.repeat(len(pack.clients), 1)
            dense[:, :dense_from] = self.own[pack.clients, :dense_from]
        rows = functional.embedding(pack.items, item_base) if self.item_names else dense.new_zeros(*pack.items.shape, 0)
        rows_from = self.rows.width if serving else self.rows_resumed
        if rows_from:
            self.rows.fill_pack(pack, [rows[..., :rows_from]])
        users = user_table[pack.members] if self.user_names else dense.new_zeros(*pack.members.shape, 0)
        return Weights(dense, rows, users)

    @torch.no_grad()
    def write(self, pack: Pack, weights: Weights) -> None:
        """Keep what is the clients' own."""
        if self.rows.width:
            self.rows.put_pack(pack, [weights.rows])
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

    @torch.no_grad()
    def install(self, values: Mapping[str, Tensor], pack: Pack, weights: Weights, buffers: dict[str, Tensor]) -> None:
        """Overwrite parameters and buffers of packed clients by what they have been told, ``[c, ...]`` each by name."""
        column = 0
        for name in self.dense_names:
            size = self.shapes[name].numel()
            if name in values:
                weights.dense[:, column : column + size] = values[name].flatten(1)
            column += size
        column, slots = 0, torch.arange(len(pack.items), device=pack.items.device).unsqueeze(1)
        for name in self.item_names:
            width = self.shapes[name][1:].numel()
            if name in values:
                weights.rows[..., column : column + width] = values[name][slots, pack.items].flatten(2)
            column += width
        for name in values.keys() & set(self.received_buffers):
            buffers[name] = values[name][slots, pack.items] if name in self.item_buffers else values[name]

    @torch.no_grad()
    def keep_received(self, clients: Tensor, values: Mapping[str, Tensor]) -> None:
        """Keep the buffers among what clients ``[c]`` have been told."""
        for number, name in enumerate(self.received_buffers):
            if name in values:
                self.get_buffer(f"received_{number}")[clients] = values[name]

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

    def column(self, name: str) -> int:
        """Where a parameter begins on the last axis of :class:`Weights`."""
        for names, first_axis in ((self.dense_names, 0), (self.item_names, 1), (self.user_names, 1)):
            if name in names:
                return sum(self.shapes[before][first_axis:].numel() for before in names[: names.index(name)])
        raise KeyError(name)

    def joined(self, named: Mapping[str, Tensor | RowSums]) -> list[Tensor | RowSums]:
        """The way back from :meth:`named`, as :meth:`Weights.tensors` has them."""
        tensors: list[Tensor | RowSums] = []
        for names, axis in ((self.dense_names, 1), (self.item_names, 2), (self.user_names, 2)):
            parts = [named[name] for name in names]
            sparse = [part for part in parts if isinstance(part, RowSums)]
            if axis == 2 and sparse and len(sparse) == len(parts) and all(part.ids is sparse[0].ids for part in sparse):
                tensors.append(replace(sparse[0], values=side_by_side([part.values for part in sparse], 2)))
            elif parts:
                tensors.append(side_by_side([dense(part).flatten(axis) for part in parts], axis))
        return tensors

    @torch.no_grad()
    def unpacked(self, pack: Pack, weights: Weights, slot: int, base: Base) -> dict[str, Tensor]:
        """Parameters of one of packed clients with all item rows but no user rows, in the order of the network's."""
        rows = base[1].clone()
        held = slice(0, int(pack.count[slot]))
        rows[pack.items[slot, held]] = weights.rows[slot, held]
        named = self.named(Weights(weights.dense[slot : slot + 1], rows.unsqueeze(0), weights.users[:0]))
        return {name: named[name][0] for name in self.shapes if name not in self.user_names}

    @torch.no_grad()
    def served_by(self, client: Tensor, base: Base) -> dict[str, Tensor]:
        """State of the network of all users and items as one client serves it, with what it has received.

        Arguments as of :meth:`weights`.
        """
        dense, rows = base[0].clone(), base[1].clone()
        dense[: self.own.shape[1]] = self.own[client]
        _, item, own = self.rows.of(client.unsqueeze(0), self.rows.width)
        rows[item, : self.rows.width] = own
        named = self.named(Weights(*(part.unsqueeze(0) for part in (dense, rows, base[2]))))
        received = {name: self.get_buffer(f"received_{number}") for number, name in enumerate(self.received_buffers)}
        return {name: value[0] for name, value in named.items()} | {
            name: kept[client] for name, kept in received.items()
        }

    def column_rates(self, rates: Mapping[str, float], default: float) -> list[Tensor]:
        """Learning rate of every column of :meth:`Weights.tensors`; the default where ``rates`` does not name a parameter."""
        tables = []
        for names, per_row in ((self.dense_names, 0), (self.item_names, 1), (self.user_names, 1)):
            sizes = [self.shapes[name][per_row:].numel() for name in names]
            columns = [torch.full((size,), rates.get(name, default)) for name, size in zip(names, sizes, strict=True)]
            if columns:
                tables.append(torch.cat(columns).to(self.numbers.device))
        return tables

    def buffers_of(self, pack: Pack, renumbered: bool = True) -> dict[str, Tensor]:
        """The buffers that differ from client to client, ``[c, ...]``; those of items do where these are renumbered."""
        whole = dict(self.whole.named_buffers())
        of_items = [name for name in self.item_buffers if name not in self.received_buffers] if renumbered else []
        own = {name: whole[name][pack.items] for name in of_items}
        for number, name in enumerate(self.received_buffers):
            kept = self.get_buffer(f"received_{number}")
            by_item = name in self.item_buffers
            own[name] = kept[pack.clients.unsqueeze(1), pack.items] if by_item else kept[pack.clients]
        for name in self.user_buffers:
            values = whole[name][pack.members]
            if name in self.item_references and renumbered:
                values = pack.places(values.flatten(1)).view_as(values)
            own[name] = values
        return own

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
        caller = Caller(network, function)

        def of_client(parameters: dict[str, Tensor], others: dict[str, Tensor], *arguments: Any) -> Any:
            return caller.by({**parameters, **others}, parameters, *arguments, tied=self.tied)

        return vmap(of_client)(self.named(weights), dict(buffers), *packed)


class Caller(nn.Module):
    """A function of a network as a module: ``torch.func`` swaps the parameters of modules."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *arguments: Any) -> Any:
        """Call it."""
        return self.function(self.network, *arguments)

    def by(self, state: Mapping[str, Tensor], *arguments: Any, tied: bool = True) -> Any:
        """Call it with some of the network's parameters or buffers replaced; ``tied``: whether one may have two names."""
        return functional_call(
            self, {f"network.{name}": value for name, value in state.items()}, arguments, tie_weights=tied
        )
