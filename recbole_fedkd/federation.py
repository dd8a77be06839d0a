"""A federation, put together: a server and clients, each from what is public and from nobody else's rows.

Everything that starts from the run's seed starts alike wherever it is built, so that clients and server agree on the first
network without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from typing import Any

import torch
from recbole.data.utils import get_dataloader
from recbole.utils import init_seed
from torch import Tensor, nn

from recbole_fedkd.compat import pickles_refused, recbole_warnings_silenced
from recbole_fedkd.data.dataset import client_dataset
from recbole_fedkd.data.rows import sampler_of
from recbole_fedkd.data.schema import ClientRows, DataSchema, all_rows, read_schema, rows_of_clients
from recbole_fedkd.engine import (
    FleetEngine,
    FleetPopulation,
    FleetTask,
    LabelledSamples,
    LocalEngine,
    RecBoleFleetPopulation,
    RecBoleSamples,
    batched_optimizer,
    disagreement,
    obstacle,
)
from recbole_fedkd.engine.fleet.threads import cores
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.client import Client, ClientSettings, streams_kept
from recbole_fedkd.federated.codec import WireCodecs
from recbole_fedkd.federated.knowledge import Sizes
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.strategy import STRATEGIES, Strategy
from recbole_fedkd.federated.task import AttentiveTask, FactorTask, MutualTask, RecBoleTask, Samples, Task, click_loss
from recbole_fedkd.model import (
    AttnFedKD,
    NetworkPopulation,
    RecBolePopulation,
    TeacherAndStudent,
    building,
    normalise_single_rows,
    with_attention,
)
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.model.learner import build_optimizer
from recbole_fedkd.model.population import (
    client_network,
    network_builders,
    recbole_shared_part,
    shared_part,
    whole_networks,
)
from recbole_fedkd.model.shared import SharedState, check_patterns, stateful

Population = FleetPopulation | RecBoleFleetPopulation | NetworkPopulation | RecBolePopulation


# One party


@recbole_warnings_silenced()
@pickles_refused()
def build_server(config: Any, schema: DataSchema) -> Server:
    """The server, with a network of its own from the run's seed.

    Args:
        config: the run's config.
        schema: what is public of the dataset.

    Raises:
        InputError: a strategy that distils, over a model without a click probability to distil; a mean of nothing.
    """
    with _from_the_seed(config, schema):
        networks = _seed_networks(config, schema)
    shared = [_shared(config, schema, network.to(config["device"])) for network in networks]
    check_private(config, networks, shared[0])
    return _server(config, build_strategy(config, schema, networks[0]), shared[0])


def build_client(config: Any, schema: DataSchema, rows: ClientRows, number: int) -> Client:
    """A client, of its own rows and what is public.

    Args:
        config: the run's config.
        schema: what is public of the dataset.
        rows: what the client holds.
        number: of the client, from 0.
    """
    return build_clients(config, schema, {number: rows})[0]


@recbole_warnings_silenced()
@pickles_refused()
def build_clients(config: Any, schema: DataSchema, parts: Mapping[int, ClientRows]) -> list[Client]:
    """Several clients in one place, by their numbers; arguments as of :func:`build_client`."""
    with _from_the_seed(config, schema):
        networks = _client_networks(config, schema, parts)
    device = config["device"]
    each = zip(parts.items(), networks, strict=True)
    return [client_of(config, schema, rows, number, network.to(device)) for (number, rows), network in each]


def client_of(config: Any, schema: DataSchema, rows: ClientRows, number: int, network: nn.Module) -> Client:
    """A client with a network that it has already; arguments as of :func:`build_client`."""
    task = build_task(config, schema, rows, network)
    return Client(
        number,
        task,
        partial(build_optimizer, config, name=f"client {number}"),
        build_strategy(config, schema, network),
        client_settings(config, schema.clients),
        config["device"],
        WireCodecs.of(config),
    )


@contextmanager
def _from_the_seed(config: Any, schema: DataSchema) -> Iterator[None]:
    """Random streams at the run's seed; the process gets its own back, but where a lone client goes on with the run's."""
    seed = config["seed"] + config["local_rank"]
    if schema.clients == 1:
        init_seed(seed, config["reproducibility"])
        yield
        return
    with streams_kept(config["device"]):
        init_seed(seed, config["reproducibility"])
        yield


def federated_class(config: Any) -> type:
    """The class of a config's model, with attention where that is asked for."""
    kind: type = config.model_class
    return with_attention(kind) if config["attention"] and not config.attentive else kind


def _recbole_network(config: Any, schema: DataSchema, rows: ClientRows) -> nn.Module:
    """A RecBole model, built by its own constructor on what one client holds."""
    network: nn.Module = federated_class(config)(config, client_dataset(config, schema, rows))
    normalise_single_rows(network)
    return network


def _seed_networks(config: Any, schema: DataSchema) -> Sequence[nn.Module]:
    """What every client starts from, one network per architecture, without a row of anybody's."""
    if config.attentive:
        return whole_networks(config, schema, schema.everybody())
    with building(config):
        return [_recbole_network(config, schema, schema.everybody())]


def _client_networks(config: Any, schema: DataSchema, parts: Mapping[int, ClientRows]) -> list[nn.Module]:
    """Networks of clients, by their numbers; called where the random streams are at the run's seed."""
    networks: list[nn.Module] = []
    if config.attentive:
        builders, wholes = network_builders(config, schema), whole_networks(config, schema, schema.everybody())
        for number, rows in parts.items():
            place = number % len(builders)
            networks.append(client_network(builders[place], schema, rows, wholes[place]))
        return networks
    with building(config):
        *others, last = parts.values()
        for rows in others:
            with streams_kept(config["device"]):
                networks.append(_recbole_network(config, schema, rows))
        return [*networks, _recbole_network(config, schema, last)]


def _shared(config: Any, schema: DataSchema, network: nn.Module) -> SharedState:
    """What of a network a strategy may send."""
    patterns = config["private_parameters"]
    return shared_part(network, patterns) if config.attentive else recbole_shared_part(network, patterns, schema)


def build_task(config: Any, schema: DataSchema, rows: ClientRows, network: nn.Module) -> Task:
    """What a client trains: its network on its own rows."""
    shared = _shared(config, schema, network)
    if not config.attentive:
        return recbole_task(config, network, shared, client_dataset(config, schema, rows))
    batch_size, reg_weight, seed = config["train_batch_size"], config["reg_weight"], config["seed"]
    if isinstance(network, FactorHead):
        return FactorTask(network, shared, batch_size, reg_weight, seed)
    kind = MutualTask if isinstance(network, TeacherAndStudent) else AttentiveTask
    samples = _samples(schema, rows, schema.own_numbers(rows), config["device"])
    labels, negatives = len(schema.label_values), _negatives(config)
    return kind(network, shared, samples, labels, batch_size, reg_weight, negatives, schema.item_num, seed)


def _samples(schema: DataSchema, rows: ClientRows, users: Tensor, device: torch.device) -> Samples:
    """Training rows as labelled samples of users by their local numbers ``[n]``."""
    context = {name: values.to(device) for name, values in schema.context_of(rows).items()}
    items, labels = rows.interactions[schema.item_field], schema.label_indices(rows)
    return Samples(users.to(device), items.to(device), labels.to(device), context)


def _negatives(config: Any) -> int:
    """Sampled negatives per training row."""
    return int(config["train_neg_sample_args"]["sample_num"]) if config["label_mode"] == "implicit" else 0


def recbole_task(config: Any, network: nn.Module, shared: SharedState, dataset: Any) -> RecBoleTask:
    """A RecBole model on one client's part of the training split."""
    rows, item_field = len(dataset.inter_feat), config["ITEM_ID_FIELD"]
    build_loader = partial(_training_loader, config, dataset)
    return RecBoleTask(network, shared, build_loader, rows, item_field, config["device"], config["seed"])


def _training_loader(config: Any, dataset: Any, shuffle: bool) -> Any:
    """RecBole's loader of one client's rows, of which its own users' items alone are no negatives."""
    sampling = config["train_neg_sample_args"]
    sampler = None
    if sampling["distribution"] != "none":
        drawn = sampling["distribution"], sampling["alpha"]
        sampler = sampler_of(config, ["train"], dataset, [dataset], *drawn).set_phase("train")
    return get_dataloader(config, "train")(config, dataset, sampler, shuffle=shuffle)


def build_strategy(config: Any, schema: DataSchema, network: nn.Module) -> Strategy:
    """The config's strategy over a network.

    Raises:
        InputError: it distils what the network does not say, or averages what there is not.
    """
    kind = STRATEGIES[config["strategy"]]
    if not any(name != "dummy_param" for name, _ in network.named_parameters()):
        raise InputError(
            f"model '{config['model']}' learns nothing by gradient, so there is nothing for clients to train"
        )
    _check_distillable(config, config.attentive or click_loss(network) is not None)
    if kind.shares_parameters and config["row_mean"] == "changed" and WireCodecs.of(config).changes_uploads:
        raise InputError(
            "row_mean=changed sees which rows a client left as they were, which codecs and stages blur; unset one of them"
        )
    labels = len(schema.label_values) if config.attentive else RecBoleTask.labels
    return kind.of(config, Sizes(schema.clients, labels, schema.item_num))


def _check_distillable(config: Any, has_logits: bool) -> None:
    if not STRATEGIES[config["strategy"]].exchanges_knowledge:
        return
    if not has_logits:
        raise InputError(
            f"strategy '{config['strategy']}' distils the click probability of a model with a binary cross-entropy, "
            f"which model '{config['model']}' does not minimise; use fedavg or local"
        )
    uses_prior = config["knowledge"] == "item" and config["knowledge_use"] != "distil"
    if uses_prior and not issubclass(config.model_class, AttnFedKD):
        raise InputError(
            f"knowledge_use is '{config['knowledge_use']}', but only AttnFedKD adds a log-prior to its logits; model "
            f"'{config['model']}' takes knowledge_use=distil"
        )


def check_private(config: Any, networks: Sequence[nn.Module], shared: SharedState) -> None:
    """Raise :class:`InputError` for a private pattern that fits nothing, and for a mean that has nothing left."""
    names = [name for network in networks for name in stateful(network)]
    check_patterns("private_parameters", config["private_parameters"], names)
    if STRATEGIES[config["strategy"]].shares_parameters and not shared.parameters():
        raise InputError("private_parameters leaves nothing that could be averaged; use strategy=local")


def client_settings(config: Any, clients: int) -> ClientSettings:
    """The client's keys of the config, in a federation of so many."""
    return ClientSettings(
        local_epochs=config["local_epochs"],
        clean_pass=config["knowledge_pass"] == "clean",
        reset_optimizer=config["reset_optimizer"],
        # A lone client draws from the run's streams: a federation of one is RecBole's own training.
        seed=config["seed"] if clients > 1 else None,
        clip_grad_norm=config["clip_grad_norm"],
        error_feedback=config["error_feedback"],
        enable_amp=config["enable_amp"],
        serve_average=config["serve_average"],
    )


def _server(config: Any, strategy: Strategy, shared: SharedState) -> Server:
    """The server of a strategy, which starts with a network of the run's seed."""
    server = Server(strategy, config["seed"], config["clients_per_round"], WireCodecs.of(config))
    server.start(shared)
    return server


# All parties in one process


@dataclass(frozen=True)
class Built:
    """All clients' networks, and what runs them.

    Attributes:
        population: the networks, untrained, as one model.
        fallback: why ``engine=fleet`` cannot run them, so that ``local`` does; None where the engine asked for runs.
    """

    population: Population
    fallback: str | None = None


def build_population(config: Any, dataset: Any, client_of_user: Tensor) -> Built:
    """All clients' networks, for the engine that the config asks for where it can run them, else for ``local``.

    Called where the random streams are at the run's seed; they are left where the construction of one network leaves them.

    Args:
        config: the run's config.
        dataset: the training split.
        client_of_user: ``[users]``, padding user 0: -1.
    """
    clients = int(client_of_user.max()) + 1
    hindrance = obstacle(config, clients) if config["engine"] == "fleet" else None
    fleet: FleetPopulation | RecBoleFleetPopulation | None = None
    if config["engine"] == "fleet" and hindrance is None:
        if config.attentive:
            fleet = FleetPopulation(config, read_schema(dataset, clients), all_rows(dataset), client_of_user)
        else:
            fleet, hindrance = _fleet_of_recbole(config, dataset, client_of_user)
    if fleet is not None:
        return Built(fleet.to(config["device"]))
    if hindrance is not None:
        getLogger().warning(f"engine fleet cannot run this, engine local does: {hindrance}")
    schema, parts = read_schema(dataset, clients), rows_of_clients(dataset, client_of_user)
    networks = _client_networks(config, schema, dict(enumerate(parts)))
    return Built(population_of(config, schema, networks, client_of_user), hindrance)


def population_of(
    config: Any, schema: DataSchema, networks: Sequence[nn.Module], client_of_user: Tensor
) -> NetworkPopulation | RecBolePopulation:
    """Networks as one model; ``client_of_user [users]`` is the place among them, -1 for users of none."""
    kind: type[NetworkPopulation | RecBolePopulation] = RecBolePopulation
    if config.attentive:
        kind = config.model_class if issubclass(config.model_class, AttnFedKD) else NetworkPopulation
    population = kind(config, schema, networks, client_of_user)
    population.to(config["device"])
    return population


def build_engine(config: Any, population: Population, dataset: Any) -> LocalEngine | FleetEngine:
    """The engine that runs a population.

    Args:
        config: the run's config.
        population: all clients' networks.
        dataset: the training split.

    Raises:
        InputError: a strategy that distils, over a model without a click probability to distil.
    """
    clients = int(population.client_of_user.max()) + 1
    schema = read_schema(dataset, clients)
    if isinstance(population, FleetPopulation | RecBoleFleetPopulation):
        return _fleet_engine(config, schema, population, dataset)
    server = build_server(config, schema)
    parts = rows_of_clients(dataset, population.client_of_user)
    built = [
        client_of(config, schema, rows, number, network)
        for number, (rows, network) in enumerate(zip(parts, population.networks, strict=True))
    ]
    return LocalEngine(server, built, config["min_clients"])


def _fleet_engine(
    config: Any, schema: DataSchema, population: FleetPopulation | RecBoleFleetPopulation, dataset: Any
) -> FleetEngine:
    """The engine that runs all clients side by side."""
    device = config["device"]
    network = population.client_groups[0].whole
    strategy = build_strategy(config, schema, network)
    task: FleetTask
    if isinstance(population, FleetPopulation):
        task = _labelled_samples(config, schema, population, dataset)
    else:
        task = RecBoleSamples(config, dataset, population)
    shared = SharedState(network, partial(population.private_rows, 0))
    check_private(
        config, [each.whole for each in population.client_groups if isinstance(each.whole, nn.Module)], shared
    )
    server = _server(config, strategy, shared)
    rates = config["learning_rates"]
    check_patterns("learning_rates", rates, [name for name, _ in network.named_parameters()])
    threads = config["fleet_threads"] or (1 if device.type == "cuda" else cores())
    settings, optimizer = client_settings(config, schema.clients), batched_optimizer(config)
    least, memory = config["min_clients"], population.memory
    return FleetEngine(server, population, task, settings, optimizer, memory, threads, rates, least)


def _labelled_samples(config: Any, schema: DataSchema, population: FleetPopulation, dataset: Any) -> LabelledSamples:
    """Samples client by client, users by their local numbers."""
    rows = all_rows(dataset)
    users = rows.interactions[schema.user_field].to(config["device"])
    # One stable sort by client instead of one scan of all samples per client.
    owner = population.client_of_user[users]
    samples = _samples(schema, rows, population.local_id[users], config["device"])
    samples = samples.select(torch.argsort(owner, stable=True))
    kind = MutualTask if isinstance(population.client_groups[0].whole, TeacherAndStudent) else AttentiveTask
    held, labels = torch.bincount(owner, minlength=schema.clients), len(schema.label_values)
    batch_size, reg_weight, negatives = config["train_batch_size"], config["reg_weight"], _negatives(config)
    return LabelledSamples(kind, samples, held, labels, batch_size, reg_weight, negatives, schema.item_num)


def _fleet_of_recbole(
    config: Any, dataset: Any, client_of_user: Tensor
) -> tuple[RecBoleFleetPopulation | None, str | None]:
    """All clients' instances of a RecBole model side by side, or why that cannot be.

    The process's random stream is then where one instance leaves it, as on the local engine; without a fleet it stays.
    """
    name = f"model '{config['model']}'"
    try:
        with streams_kept(config["device"]):
            population = RecBoleFleetPopulation(config, dataset, client_of_user, federated_class(config))
            after = torch.get_rng_state()
        differs = _disagreement(config, dataset, client_of_user, population)
    except Exception as error:  # whatever a model of anybody's raises that is called in a way it was not written for
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "called random operation" in reason:
            reason = "it draws random numbers elsewhere than in dropout layers"
        return None, f"{name} cannot be called for many clients at once: {reason}"
    if differs is not None:
        return None, f"{name} is not the same for many clients at once: {differs}"
    torch.set_rng_state(after)
    return population, None


def _disagreement(config: Any, dataset: Any, client_of_user: Tensor, population: RecBoleFleetPopulation) -> str | None:
    """What differs between a client by itself and among all: of the client with the most samples, and that with the fewest."""
    population.to(config["device"])
    task = RecBoleSamples(config, dataset, population)
    active = torch.nonzero(task.sizes).flatten()
    order = active[torch.argsort(task.sizes[active])].tolist()
    numbers = list(dict.fromkeys([order[-1], order[0]]))
    schema = read_schema(dataset, population.clients)
    for number, rows in zip(numbers, rows_of_clients(dataset, client_of_user, numbers), strict=True):
        with streams_kept(config["device"]):
            alone = _recbole_network(config, schema, rows).to(config["device"])
        local = recbole_task(config, alone, SharedState(alone, dict), client_dataset(config, schema, rows))
        differs = disagreement(population, task, local, number, config["seed"])
        if differs is not None:
            return differs
    return None
