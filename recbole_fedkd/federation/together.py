"""All parties in one process: their networks as one model, and the engine that runs them, with the one that steps in for it."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recbole_fedkd.data.dataset import client_dataset
from recbole_fedkd.data.schema import DataSchema, all_rows, read_schema, rows_of_clients
from recbole_fedkd.engine import FleetEngine, LocalEngine
from recbole_fedkd.engine.fleet.agreement import disagreement
from recbole_fedkd.engine.fleet.batching import NotBatchedError
from recbole_fedkd.engine.fleet.factors import FactorFleetPopulation, FactorSamples
from recbole_fedkd.engine.fleet.obstacle import batched_optimizer, obstacle
from recbole_fedkd.engine.fleet.population import FleetPopulation, RecBoleFleetPopulation
from recbole_fedkd.engine.fleet.samples import FleetTask, LabelledSamples, RecBoleSamples
from recbole_fedkd.engine.fleet.threads import cores
from recbole_fedkd.errors import reason_of
from recbole_fedkd.federated.client import streams_kept
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.federated.task import AttentiveTask, MutualTask
from recbole_fedkd.federation.parties import (
    build_server,
    check_private,
    client_networks,
    client_of,
    client_settings,
    federated_class,
    negatives_per_row,
    recbole_network,
    recbole_task,
    samples_of,
)
from recbole_fedkd.files import PARTITION, write_json
from recbole_fedkd.model import (
    AttnFedKD,
    NetworkPopulation,
    RecBolePopulation,
    TeacherAndStudent,
)
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.model.shared import SharedState, check_patterns

Population = FleetPopulation | RecBoleFleetPopulation | NetworkPopulation | RecBolePopulation


def build_population(config: Any, dataset: Any, client_of_user: Tensor) -> tuple[Population, str | None]:
    """All clients' networks, for the engine that the config asks for where it can run them, else for ``local``.

    Called where the random streams are at the run's seed; they are left where the construction of one network leaves them.

    Args:
        config: the run's config.
        dataset: the training split.
        client_of_user: ``[users]``, padding user 0: -1.

    Returns:
        The networks, untrained, as one model; and why ``engine=fleet`` cannot run them, so that ``local`` does, None where the
        engine asked for runs.
    """
    clients, hindrance = int(client_of_user.max()) + 1, None
    if config["engine"] == "fleet":
        try:
            with streams_kept(config["device"]):
                population = _fleet(config, dataset, client_of_user)
                after = torch.get_rng_state()
            torch.set_rng_state(after)
            return population, None
        except NotBatchedError as error:
            hindrance = str(error)
    schema, parts = read_schema(dataset, clients), rows_of_clients(dataset, client_of_user)
    networks = client_networks(config, schema, dict(enumerate(parts)))
    return population_of(config, schema, networks, client_of_user), hindrance


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


def save_federation(folder: Path, dataset: Any, client_of_user: Tensor) -> None:
    """Write which user, by the dataset's own token, lives on which client, and what is public of the data."""
    users, clients = dataset.field2id_token[dataset.uid_field][1:].tolist(), client_of_user[1:].tolist()
    write_json(dict(zip(users, clients, strict=True)), folder / PARTITION)
    read_schema(dataset, max(clients) + 1).save(folder)


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
    server = build_server(config, schema)
    task: FleetTask
    if isinstance(population, FleetPopulation):
        if isinstance(network, FactorHead):
            batch_size, reg_weight = config["train_batch_size"], config["reg_weight"]
            task = FactorSamples(network, population.client_of_user, batch_size, reg_weight)
        else:
            task = _labelled_samples(config, schema, population, dataset)
    else:
        task = RecBoleSamples(config, dataset, population)
    shared = SharedState(network, partial(population.private_rows, 0))
    check_private(
        config, [group.whole for group in population.client_groups if isinstance(group.whole, nn.Module)], shared
    )
    rates = config["learning_rates"]
    check_patterns("learning_rates", rates, [name for name, _ in network.named_parameters()])
    threads = config["fleet_threads"] or (1 if device.type == "cuda" else cores())
    settings, optimizer = client_settings(config, schema.clients), batched_optimizer(config)
    least, memory = config["min_clients"], population.memory
    everybody = not (config["clients_per_round"] or config["holdout_clients"] or least)
    return FleetEngine(server, population, task, settings, optimizer, memory, threads, rates, least, everybody)


def _labelled_samples(config: Any, schema: DataSchema, population: FleetPopulation, dataset: Any) -> LabelledSamples:
    """Samples client by client, users by their local numbers."""
    rows = all_rows(dataset)
    users = rows.interactions[schema.user_field].to(config["device"])
    # One stable sort by client instead of one scan of all samples per client.
    owner = population.client_of_user[users]
    samples = samples_of(schema, rows, population.local_id[users], config["device"])
    samples = samples.select(torch.argsort(owner, stable=True))
    kind = MutualTask if isinstance(population.client_groups[0].whole, TeacherAndStudent) else AttentiveTask
    held, labels = torch.bincount(owner, minlength=schema.clients), len(schema.label_values)
    batch_size, reg_weight, negatives = config["train_batch_size"], config["reg_weight"], negatives_per_row(config)
    return LabelledSamples(kind, samples, held, labels, batch_size, reg_weight, negatives, schema.item_num)


def _fleet(config: Any, dataset: Any, client_of_user: Tensor) -> FleetPopulation | RecBoleFleetPopulation:
    """All clients' networks side by side; random streams are then where one network leaves them.

    Raises:
        NotBatchedError: they cannot be.
    """
    clients = int(client_of_user.max()) + 1
    if hindrance := obstacle(config, clients):
        raise NotBatchedError(hindrance)
    population: FleetPopulation | RecBoleFleetPopulation
    if config.attentive:
        kind = FactorFleetPopulation if config.learns_factors else FleetPopulation
        population = kind(config, read_schema(dataset, clients), all_rows(dataset), client_of_user)
    else:
        population = _fleet_of_recbole(config, dataset, client_of_user)
    population.to(config["device"])
    _check_loss(config, dataset, population)
    return population


def _fleet_of_recbole(config: Any, dataset: Any, client_of_user: Tensor) -> RecBoleFleetPopulation:
    """All clients' instances of a RecBole model side by side; raises as :func:`_fleet`."""
    name = f"model '{config['model']}'"
    try:
        with streams_kept(config["device"]):
            population = RecBoleFleetPopulation(config, dataset, client_of_user, federated_class(config))
            after = torch.get_rng_state()
        differs = _disagreement(config, dataset, client_of_user, population)
    except NotBatchedError as error:
        raise NotBatchedError(f"{name} cannot be called for many clients at once: {error}") from error
    except Exception as error:
        if not _came_out_of(error, federated_class(config)):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "called random operation" in reason:
            reason = "it draws random numbers elsewhere than in dropout layers"
        raise NotBatchedError(f"{name} cannot be called for many clients at once: {reason}") from error
    if differs is not None:
        raise NotBatchedError(f"{name} is not the same for many clients at once: {differs}")
    torch.set_rng_state(after)
    return population


def _check_loss(config: Any, dataset: Any, population: FleetPopulation | RecBoleFleetPopulation) -> None:
    """Raise :class:`NotBatchedError` where a loss of somebody's own cannot be called, in a first batch, for many at once."""
    strategy = STRATEGIES[config["strategy"]]
    if all(getattr(strategy, name).__module__.startswith("recbole_fedkd.") for name in ("loss", "objective")):
        return
    with streams_kept(config["device"]):
        tried = deepcopy(population)  # hearing the server changes the networks
        try:
            _fleet_engine(config, read_schema(dataset, population.clients), tried, dataset).try_step()
        except Exception as error:
            if not _came_out_of(error, strategy):
                raise
            raise NotBatchedError(
                f"the loss of strategy '{strategy.name}' cannot be called for many clients at once: {reason_of(error)}"
            ) from error


def _came_out_of(error: Exception, model_class: type) -> bool:
    """Whether an error is that of a model, or a strategy, called in a way it was not written for, or of torch's calls of it.

    Whatever a model of anybody's raises has passed one of its functions; what vmap and autograd find wrong on the way back is
    raised by torch's own Python code. All else is a fault of this package, which nobody must take for the model's; so is what
    a line of this package raises that a model calls, but for a tensor operation, which raises for what the model gave it.
    """
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_model = {
        parent.__module__ for parent in model_class.__mro__ if not parent.__module__.startswith(("torch.", "builtins"))
    }
    if modules[-1].startswith(("torch._functorch", "torch.autograd")):
        return True
    raised_in = next(name for name in reversed(modules) if not name.startswith("torch."))
    ours = raised_in.startswith("recbole_fedkd.") and raised_in not in of_model
    return bool(of_model & set(modules)) and (not ours or isinstance(error, RuntimeError | IndexError))


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
            alone = recbole_network(config, schema, rows).to(config["device"])
        local = recbole_task(config, alone, SharedState(alone, dict), client_dataset(config, schema, rows))
        differs = disagreement(population, task, local, number, config["seed"])
        if differs is not None:
            return differs
    return None
