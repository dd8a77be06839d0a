"""Populations: all clients' networks, seen by RecBole as one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from recbole.model.abstract_recommender import AbstractRecommender
from torch import Tensor, nn

from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.distillation.exchange import FactorSettings
from recbole_fedkd.distillation.losses import MutualWeights
from recbole_fedkd.errors import InputError
from recbole_fedkd.model.asked_again import AskedAgain, Scored, scored_by
from recbole_fedkd.model.catalogue import KEPT, rank_items, ranks_chosen
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.model.known import exchange_of
from recbole_fedkd.model.network import NO_CONTEXT, AttentiveNetwork, Context
from recbole_fedkd.model.pair import TeacherAndStudent, names_of
from recbole_fedkd.model.shared import Rows, SharedState, forget_cached, private_slices
from recbole_fedkd.model.student import LabelledRecommender, NetworkBuilder, attentive_network, read_architecture
from recbole_fedkd.registry import read_settings


class NetworkPopulation(LabelledRecommender):
    """One network per client; every user is served by the network of the client the user lives on.

    Each network holds the tables, histories and user rows of its own users only, see :func:`client_network`. The population
    is trained by ``FedKDTrainer``, not by ``calculate_loss``.

    Args:
        config: the run's config.
        schema: what is public of the dataset.
        networks: of the clients in turn.
        client_of_user: ``[users]``, padding user 0: -1.
    """

    client_of_user: Tensor
    local_id: Tensor
    networks: nn.ModuleList

    def __init__(self, config: Any, schema: DataSchema, networks: Sequence[nn.Module], client_of_user: Tensor) -> None:
        super().__init__(config, schema)
        self.private_parameters = config["private_parameters"]
        self.networks = nn.ModuleList(networks)
        self.register_buffer("client_of_user", client_of_user, persistent=False)
        self.register_buffer("local_id", local_ids(client_of_user), persistent=False)

    def private_rows(self, client: int) -> dict[str, Rows]:
        """What of a client's network no strategy may send: user rows, and what ``private_parameters`` names."""
        return dict(self.shared(client).private)

    def shared(self, client: int) -> SharedState:
        """What of a client's network a strategy may send; it knows that network alone."""
        return shared_part(self.networks[client], self.private_parameters)

    def logits(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Route each user to the network of its client; see :meth:`LabelledRecommender.logits`."""
        out = torch.empty(*items.shape, len(self.label_values), device=items.device)
        for client, rows in homes(self.client_of_user[users]):
            own = {name: values[rows] for name, values in context.items()}
            out[rows] = self.networks[client](self.local_id[users[rows]], items[rows], own)
        return out

    def rank(self, users: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Route each user to the network of its client; see :meth:`LabelledRecommender.rank`."""
        return self._ranked(users, context, None)

    @property
    def ranks_chosen(self) -> bool:
        """See :meth:`LabelledRecommender.ranks_chosen`; of many clients, what each makes of its items would cost more."""
        return len(self.networks) <= KEPT and all(map(ranks_chosen, self.networks))

    def rank_chosen(self, users: Tensor, items: Tensor) -> Tensor:
        """Route each user to the network of its client; see :meth:`LabelledRecommender.rank_chosen`."""
        return self._ranked(users, NO_CONTEXT, items)

    @property
    def screens(self) -> bool:
        """See :meth:`LabelledRecommender.screens`."""
        return all(map(ranks_chosen, self.networks))

    @torch.no_grad()
    def scored_again(self, users: Tensor) -> Scored:
        """Route each user to the network of its client; see :meth:`LabelledRecommender.scored_again`."""
        parts = []
        for client, rows in homes(self.client_of_user[users]):
            network, own = self.networks[client], self.local_id[users[rows]]
            asked = AskedAgain.of_one(network, own, self.catalogue_of(network, client))
            parts.append((rows, torch.arange(len(rows)), asked))
        return scored_by(parts, self.expected)

    def _ranked(self, users: Tensor, context: Context, chosen: Tensor | None) -> Tensor:
        """Logits ``[n, items, T]`` of all items, or of those that are chosen for every user ``[n, items]``."""
        items = self.item_num if chosen is None else chosen.shape[1]
        out = torch.empty(len(users), len(self.label_values), items, device=users.device).transpose(1, 2)
        for client, rows in homes(self.client_of_user[users]):
            own = {name: values[rows] for name, values in context.items()}
            network, asked = self.networks[client], self.local_id[users[rows]]
            catalogue, of_rows = self.catalogue_of(network, client), None if chosen is None else chosen[rows]
            out[rows] = rank_items(network, asked, own, self.item_num, catalogue, of_rows)
        return out


def homes(owners: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every client among the owners ``[n]``, with the places of what is its."""
    for client in owners.unique().tolist():
        yield client, torch.nonzero(owners == client).flatten()


def local_ids(client_of_user: Tensor) -> Tensor:
    """Every user's number on its client, from 1 ``[users]``, given the clients ``[users]``; padding user 0: 0."""
    order = torch.argsort(client_of_user, stable=True)
    counts = torch.bincount(client_of_user + 1)
    local_id = torch.zeros_like(client_of_user)
    local_id[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[client_of_user[order] + 1] + 1
    local_id[0] = 0
    return local_id


class AttnFedKD(NetworkPopulation):
    """One attentive student per client; ``student_pool`` deals several sizes out to the clients in turn."""


def rows_that_stay(network: nn.Module, patterns: Sequence[str]) -> dict[str, Rows]:
    """What of one of the package's networks stays on its client: the rows of its users, and what a pattern matches."""
    if isinstance(network, TeacherAndStudent):
        rows = network.private_rows
    else:
        rows = {name: (0, len(network.get_parameter(name))) for name in names_of(network, "user_rows")}
    return private_slices(network, rows, patterns)


def shared_part(network: nn.Module, patterns: Sequence[str]) -> SharedState:
    """What of one of the package's networks may be sent."""
    return SharedState(network, partial(rows_that_stay, network, patterns))


class _Builder:
    """Builds clients' networks of one architecture."""

    def __init__(self, config: Any, schema: DataSchema, different: Mapping[str, Any]) -> None:
        self.schema, self.architecture = schema, read_architecture(config, len(schema.label_values), different)

    def build(self, rows: ClientRows) -> AttentiveNetwork:
        """The network of a client's users."""
        return attentive_network(self.architecture, self.schema, rows)


class _HeadBuilder:
    """Builds clients' heads on item factors, each with the rows of its own users."""

    def __init__(self, config: Any, schema: DataSchema) -> None:
        self.schema, self.settings = schema, read_settings(FactorSettings, config)

    def build(self, rows: ClientRows) -> FactorHead:
        """The head of a client's users; rows by user."""
        return FactorHead(exchange_of(self.settings, self.schema, rows), self.settings.head_size)


class _PairBuilder:
    """Builds the student and the teacher of a client; arguments as of ``TeacherAndStudent``, builders in place of networks."""

    def __init__(self, student: _Builder, teacher: _Builder, serve: str, fixed: MutualWeights | None) -> None:
        self.student, self.teacher, self.serve, self.fixed = student, teacher, serve, fixed

    def build(self, rows: ClientRows) -> TeacherAndStudent:
        """Both networks of a client's users."""
        return TeacherAndStudent(self.student.build(rows), self.teacher.build(rows), self.serve, self.fixed)


def network_builders(config: Any, schema: DataSchema) -> Sequence[NetworkBuilder]:
    """Builders of the package's networks that are dealt out to the clients in turn."""
    if config.learns_factors:
        return [_HeadBuilder(config, schema)]
    if hasattr(config.model_class, "builder"):
        return [config.model_class.builder(config, schema)]
    students = [_Builder(config, schema, different) for different in config["student_pool"] or [{}]]
    if not config.trains_teacher:
        return students
    teacher = _Builder(config, schema, config["teacher"])
    fixed = read_settings(MutualWeights, config) if config.learns_mutually else None
    return [_PairBuilder(student, teacher, config["serve"], fixed) for student in students]


def whole_networks(config: Any, schema: DataSchema, rows: ClientRows) -> list[nn.Module]:
    """One network of all users per architecture: what clients start from.

    Args:
        config: the run's config.
        schema: what is public of the dataset.
        rows: of everybody, or :meth:`DataSchema.everybody`, who start from the same weights.
    """
    return [builder.build(rows) for builder in network_builders(config, schema)]


@torch.no_grad()
def client_network(builder: NetworkBuilder, schema: DataSchema, rows: ClientRows, whole: nn.Module) -> nn.Module:
    """A client's network: every weight of the network of all users, of the user tables the rows of its own.

    Users without a row keep the expected vector, as of :func:`~recbole_fedkd.model.network.expect_unknown`.
    """
    # What is drawn here is overwritten, and must not move anybody else's draws.
    with torch.random.fork_rng([]):
        network = builder.build(rows)
    weights, of_users = dict(whole.named_parameters()), names_of(network, "user_rows")
    own, known = torch.cat([rows.users.new_zeros(1), rows.users]), schema.known_users(rows)
    for name, weight in network.named_parameters():
        if name in of_users:
            weight.copy_(weights[name][own] * known.view(-1, *[1] * (weight.dim() - 1)))
        else:
            weight.copy_(weights[name])
    return network


class RoutedPopulation(AbstractRecommender):
    """Instances of a RecBole model, one per client, as one model: every user is served by the client's that the user lives on.

    Attributes:
        client_of_user: ``[users]``, padding user 0: -1.
        user_field: name of the user id field.
    """

    client_of_user: Tensor
    user_field: str

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[batch]``, as the model's own."""
        return self._routed(interaction, "predict")

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of every item, ``[batch * items]``; not implemented where the model's own is not."""
        return self._routed(interaction, "full_sort_predict")

    def _routed(self, interaction: Any, method: str) -> Tensor:
        """What a method of the instances says, each of its own users."""
        raise NotImplementedError

    def _parted(self, interaction: Any, of_client: Callable[[int, Any], Tensor]) -> Tensor:
        """What a function says of every client's part of an interaction, put together."""
        owners = self.client_of_user[interaction[self.user_field]]
        out: Tensor | None = None
        for client, rows in homes(owners):
            part = of_client(client, interaction[rows]).view(len(rows), -1)
            if out is None:
                out = part.new_empty(len(owners), part.shape[1])
            out[rows] = part
        assert out is not None
        return out.flatten()


class RecBolePopulation(RoutedPopulation):
    """One instance of a RecBole model per client; every user is served by the instance of the client the user lives on.

    Each instance is built by the model's own constructor on its client's rows, all from the same random stream, so that all
    start from the same weights. A graph model sees its client's graph. Training goes through the clients.

    Args:
        config: the run's config.
        schema: what is public of the dataset.
        networks: POINTWISE or PAIRWISE models of the clients in turn.
        client_of_user: ``[users]``, padding user 0: -1.
    """

    def __init__(self, config: Any, schema: DataSchema, networks: Sequence[nn.Module], client_of_user: Tensor) -> None:
        super().__init__()
        self.type, self.input_type = config["MODEL_TYPE"], config["MODEL_INPUT_TYPE"]
        self.schema, self.user_field = schema, schema.user_field
        self.user_num, self.item_num = schema.user_num, schema.item_num
        self.private_parameters = config["private_parameters"]
        self.networks = nn.ModuleList(networks)
        self.register_buffer("client_of_user", client_of_user, persistent=False)

    def private_rows(self, client: int) -> dict[str, Rows]:
        """What of a client's instance no strategy may send: user rows, and what ``private_parameters`` names."""
        return dict(self.shared(client).private)

    def shared(self, client: int) -> SharedState:
        """What of a client's instance a strategy may send; it knows that instance alone."""
        return recbole_shared_part(self.networks[client], self.private_parameters, self.schema)

    def load_other_parameter(self, para: Any) -> None:
        """RecBole calls this after loading weights: what was computed from others is forgotten."""
        for network in self.networks:
            forget_cached(network)

    def _routed(self, interaction: Any, method: str) -> Tensor:
        return self._parted(interaction, lambda client, part: getattr(self.networks[client], method)(part))


def recbole_shared_part(network: nn.Module, patterns: Sequence[str], schema: DataSchema) -> SharedState:
    """What of a RecBole model may be sent: all but :func:`user_rows`, and what a pattern matches."""
    return SharedState(
        network, partial(_rows_of_model, network, patterns, schema.user_field, schema.user_num, schema.item_num)
    )


def _rows_of_model(
    model: nn.Module, patterns: Sequence[str], user_field: str, user_num: int, item_num: int
) -> dict[str, Rows]:
    return private_slices(model, user_rows(model, user_field, user_num, item_num), patterns)


def user_rows(model: nn.Module, user_field: str, user_num: int, item_num: int) -> dict[str, Rows]:
    """Rows of a RecBole model's parameters and buffers that belong to single users.

    Context-aware models keep all token fields in one table and say which slice is the users' (``FMEmbedding``; by side in
    ``ContextSeqEmbLayer``; one table per field in FFM). Everywhere else a user table is an embedding with one row per user,
    or any other tensor of that length whose name says ``user``.

    Args:
        model: the model.
        user_field: name of the user id field.
        user_num: number of users, padding included.
        item_num: number of items, padding included.

    Returns:
        Name in the model's state to the slice of rows.

    Raises:
        InputError: a tensor has as many rows or columns as there are users, or users and items, and nothing says that they
            are none: it would be sent to others.
    """
    private: dict[str, Rows] = {}
    joint = set()
    for name, fields, offsets in joint_tables(model):
        joint.add(name)
        if user_field in fields:
            start = int(offsets[list(fields).index(user_field)])
            private[name] = (start, start + user_num)
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name, tensor in model.state_dict().items():
        if name in joint or not tensor.is_floating_point():
            continue
        says_user, says_item = "user" in name.lower(), "item" in name.lower() and user_num == item_num
        if tensor.dim() and len(tensor) == user_num and (says_user or (name in embeddings and not says_item)):
            private[name] = (0, user_num)
        elif {user_num, user_num + item_num} & set(tensor.shape) and not says_item:
            shape = " x ".join(map(str, tensor.shape))
            raise InputError(
                f"'{name}' of model '{type(model).__name__}' ({shape}) seems to hold something of every user, of which there "
                f"are {user_num} with padding, and cannot be parted into what is a user's and what is not; choose another "
                "size if that is a coincidence, or another model"
            )
    return private


def joint_tables(model: nn.Module) -> Iterator[tuple[str, Sequence[str], Sequence[int]]]:
    """Tables that hold several token fields: the weight's name, the fields, and the first row of each."""
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        names, offsets = getattr(module, "token_field_names", None), getattr(module, "token_field_offsets", None)
        if hasattr(module, "token_embedding_table") and names is not None and offsets is not None:
            if not isinstance(names, dict):
                yield f"{path}token_embedding_table.embedding.weight", names, offsets
                continue
            for side, fields in names.items():
                if fields:
                    yield f"{path}token_embedding_table.{side}.embedding.weight", fields, offsets[side]
        if hasattr(module, "token_feature_names") and hasattr(module, "token_offsets"):  # FFM
            for number in range(len(module.token_embeddings)):
                yield f"{path}token_embeddings.{number}.weight", module.token_feature_names, module.token_offsets
