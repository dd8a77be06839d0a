"""Populations: all clients' networks, seen by RecBole as one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from recbole.model.abstract_recommender import AbstractRecommender
from torch import Tensor, nn

from recbole_fedkd.distillation.exchange import FactorExchange, FactorSettings
from recbole_fedkd.distillation.factors import Rows as InteractionRows
from recbole_fedkd.errors import InputError
from recbole_fedkd.model.batch_norm import normalise_single_rows
from recbole_fedkd.model.catalogue import rank_items
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.model.factorization import FactorizationRecommender
from recbole_fedkd.model.network import NO_CONTEXT, AttentiveNetwork, Context
from recbole_fedkd.model.pair import TeacherAndStudent, names_of
from recbole_fedkd.model.shared import Rows, SharedState, forget_cached, private_slices
from recbole_fedkd.model.student import LabelledRecommender, NetworkBuilder, read_architecture, read_tables
from recbole_fedkd.registry import read_settings


class NetworkPopulation(LabelledRecommender):
    """One network per client; every user is served by the network of the client the user lives on.

    Each network holds the tables, histories and user rows of its own users only. All of one architecture start from one
    network of all users, of which each client has the rows of its own users; several architectures are dealt out to the
    clients in turn. The population is trained by ``FedKDTrainer``, not by ``calculate_loss``.

    Args:
        config: the run's config.
        dataset: the training split, a ``FedKDDataset``.
        client_of_user: ``[users]``, padding user 0 and users of no client: -1.
        numbers: of the clients in the whole federation, where these are some of them.
    """

    client_of_user: Tensor
    local_id: Tensor
    networks: nn.ModuleList

    def __init__(self, config: Any, dataset: Any, client_of_user: Tensor, numbers: Sequence[int] | None = None) -> None:
        super().__init__(config, dataset)
        self.private_parameters = config["private_parameters"]
        builders = _builders(config, dataset, len(self.label_values))
        wholes = [builder.build(torch.arange(1, len(client_of_user))) for builder in builders]
        self.networks = nn.ModuleList()
        # What the clients' networks draw is overwritten, and must not move anybody else's draws.
        with torch.random.fork_rng([]):
            for client in range(int(client_of_user.max()) + 1):
                members = torch.nonzero(client_of_user == client).flatten()
                kind = (client if numbers is None else numbers[client]) % len(builders)
                network = builders[kind].build(members)
                _copy_weights(wholes[kind], network, members)
                self.networks.append(network)
        self.register_buffer("client_of_user", client_of_user, persistent=False)
        self.register_buffer("local_id", local_ids(client_of_user), persistent=False)

    def private_rows(self, client: int) -> dict[str, Rows]:
        """What of a client's network no strategy may send: user rows, and what ``private_parameters`` names."""
        return dict(self.shared(client).private)

    def shared(self, client: int) -> SharedState:
        """What of a client's network a strategy may send; it knows that network alone."""
        network = self.networks[client]
        return SharedState(network, partial(rows_that_stay, network, self.private_parameters))

    def logits(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Route each user to the network of its client; see :meth:`LabelledRecommender.logits`."""
        owners = self.client_of_user[users]
        out = torch.empty(*items.shape, len(self.label_values), device=items.device)
        for client in owners.unique().tolist():
            rows = torch.nonzero(owners == client).flatten()
            own = {name: values[rows] for name, values in context.items()}
            out[rows] = self.networks[client](self.local_id[users[rows]], items[rows], own)
        return out

    def rank(self, users: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Route each user to the network of its client; see :meth:`LabelledRecommender.rank`."""
        owners = self.client_of_user[users]
        out = torch.empty(len(users), len(self.label_values), self.item_num, device=users.device).transpose(1, 2)
        for client in owners.unique().tolist():
            rows = torch.nonzero(owners == client).flatten()
            own = {name: values[rows] for name, values in context.items()}
            out[rows] = rank_items(self.networks[client], self.local_id[users[rows]], own, self.item_num)
        return out


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


class _Builder:
    """Builds clients' networks of one architecture; the tables are read once."""

    def __init__(self, config: Any, dataset: Any, labels: int, different: Mapping[str, Any]) -> None:
        self.architecture = read_architecture(config, labels, different)
        self.tables = read_tables(dataset, self.architecture.history_length)

    def build(self, members: Tensor) -> AttentiveNetwork:
        """The network of a client with the users ``members``."""
        return self.tables.network(self.architecture, members)


class _HeadBuilder:
    """Builds clients' heads on item factors, each with the rows of its own users."""

    def __init__(self, config: Any, dataset: Any) -> None:
        self.settings = read_settings(FactorSettings, config)
        self.hidden = self.settings.head_size
        self.values = torch.tensor(dataset.label_values)
        self.users, self.items = dataset.inter_feat[dataset.uid_field], dataset.inter_feat[dataset.iid_field]
        self.labels = dataset.label_indices()
        self.user_count, self.item_count = dataset.user_num, dataset.item_num
        order = torch.argsort(self.users, stable=True)
        self.order, self.starts = order, torch.searchsorted(self.users[order], torch.arange(self.user_count + 1))

    def build(self, members: Tensor) -> FactorHead:
        """The head of a client with the users ``members``, whom it knows as 1 to n."""
        own = [self.order[self.starts[user] : self.starts[user + 1]] for user in members.tolist()]
        rows = torch.cat(own) if own else self.order[:0]
        users = torch.arange(1, len(members) + 1).repeat_interleave(
            torch.tensor([len(each) for each in own], dtype=torch.long)
        )
        labels = self.labels[rows]
        values = self.values.double()[labels]
        known = InteractionRows(users, self.items[rows], values, len(members) + 1, self.item_count)
        return FactorHead(FactorExchange(self.settings, known, labels, self.values), self.hidden)


class _PairBuilder:
    """Builds the student and the teacher of a client; arguments as of ``TeacherAndStudent``, builders in place of networks."""

    def __init__(self, student: _Builder, teacher: _Builder, serve: str) -> None:
        self.student, self.teacher, self.serve = student, teacher, serve

    def build(self, members: Tensor) -> TeacherAndStudent:
        """Both networks of a client with the users ``members``."""
        return TeacherAndStudent(self.student.build(members), self.teacher.build(members), self.serve)


def _builders(config: Any, dataset: Any, labels: int) -> Sequence[NetworkBuilder]:
    """Builders of the networks that are dealt out to the clients in turn."""
    if config.learns_factors:
        return [_HeadBuilder(config, dataset)]
    if issubclass(config.model_class, FactorizationRecommender):
        return [config.model_class.builder(config, dataset)]
    students = [_Builder(config, dataset, labels, each) for each in config["student_pool"] or [{}]]
    if not config.trains_teacher:
        return students
    teacher = _Builder(config, dataset, labels, config["teacher"])
    return [_PairBuilder(student, teacher, config["serve"]) for student in students]


def whole_networks(config: Any, dataset: Any, labels: int) -> list[nn.Module]:
    """One network of all users per architecture: what clients start from."""
    everybody = torch.arange(1, dataset.user_num)
    return [builder.build(everybody) for builder in _builders(config, dataset, labels)]


@torch.no_grad()
def _copy_weights(whole: nn.Module, target: nn.Module, members: Tensor) -> None:
    """Copy every weight, of the user tables the padding row and the rows of ``members``."""
    weights = dict(whole.named_parameters())
    of_users = names_of(target, "user_rows")
    rows = torch.cat([members.new_zeros(1), members])
    for name, weight in target.named_parameters():
        weight.copy_(weights[name][rows] if name in of_users else weights[name])


class RecBolePopulation(AbstractRecommender):
    """One instance of a RecBole model per client; every user is served by the instance of the client the user lives on.

    Each instance is built by the model's own constructor on its client's rows, all from the same random stream, so that all
    start from the same weights. A graph model sees its client's graph. Training goes through the clients.

    Args:
        config: the run's config.
        datasets: each client's part of the training split.
        client_of_user: ``[users]``, padding user 0: -1.
        model_class: a POINTWISE or PAIRWISE model.

    Attributes:
        datasets: as given.
    """

    client_of_user: Tensor

    def __init__(self, config: Any, datasets: Sequence[Any], client_of_user: Tensor, model_class: type) -> None:
        super().__init__()
        self.type, self.input_type = config["MODEL_TYPE"], config["MODEL_INPUT_TYPE"]
        self.user_field = config["USER_ID_FIELD"]
        self.user_num, self.item_num = len(client_of_user), datasets[0].item_num
        self.private_parameters = config["private_parameters"]
        self.datasets = list(datasets)
        self.networks = nn.ModuleList()
        stream = torch.get_rng_state()
        for dataset in datasets:
            torch.set_rng_state(stream)
            self.networks.append(model_class(config, dataset))
        normalise_single_rows(self)
        self.register_buffer("client_of_user", client_of_user, persistent=False)

    def private_rows(self, client: int) -> dict[str, Rows]:
        """What of a client's instance no strategy may send: user rows, and what ``private_parameters`` names."""
        return dict(self.shared(client).private)

    def shared(self, client: int) -> SharedState:
        """What of a client's instance a strategy may send; it knows that instance alone."""
        network, sizes = self.networks[client], (self.user_num, self.item_num)
        return SharedState(
            network, partial(recbole_rows_that_stay, network, self.private_parameters, self.user_field, *sizes)
        )

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[batch]``, as the model's own."""
        return self._routed(interaction, "predict")

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of every item, ``[batch * items]``; not implemented where the model's own is not."""
        return self._routed(interaction, "full_sort_predict")

    def load_other_parameter(self, para: Any) -> None:
        """RecBole calls this after loading weights: what was computed from others is forgotten."""
        for network in self.networks:
            forget_cached(network)

    def _routed(self, interaction: Any, method: str) -> Tensor:
        owners = self.client_of_user[interaction[self.user_field]]
        present = owners.unique().tolist()
        if len(present) == 1:
            scores: Tensor = getattr(self.networks[present[0]], method)(interaction)
            return scores.flatten()
        out: Tensor | None = None
        for client in present:
            rows = torch.nonzero(owners == client).flatten()
            part = getattr(self.networks[client], method)(interaction[rows]).view(len(rows), -1)
            if out is None:
                out = part.new_empty(len(owners), part.shape[1])
            out[rows] = part
        assert out is not None
        return out.flatten()


def recbole_rows_that_stay(
    model: nn.Module, patterns: Sequence[str], user_field: str, user_num: int, item_num: int
) -> dict[str, Rows]:
    """What of a RecBole model stays on its client: :func:`user_rows`, and what a pattern matches."""
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
    found: dict[str, Rows] = {}
    joint = set()
    for name, fields, offsets in joint_tables(model):
        joint.add(name)
        if user_field in fields:
            start = int(offsets[list(fields).index(user_field)])
            found[name] = (start, start + user_num)
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name, tensor in model.state_dict().items():
        if name in joint or not tensor.is_floating_point():
            continue
        says_user, says_item = "user" in name.lower(), "item" in name.lower() and user_num == item_num
        if tensor.dim() and len(tensor) == user_num and (says_user or (name in embeddings and not says_item)):
            found[name] = (0, user_num)
        elif {user_num, user_num + item_num} & set(tensor.shape) and not says_item:
            shape = " x ".join(map(str, tensor.shape))
            raise InputError(
                f"'{name}' of model '{type(model).__name__}' ({shape}) seems to hold something of every user, of which there "
                f"are {user_num} with padding, and cannot be parted into what is a user's and what is not; choose another "
                "size if that is a coincidence, or another model"
            )
    return found


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
