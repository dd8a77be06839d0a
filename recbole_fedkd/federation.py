"""A federation, put together: its clients' networks, their tasks, the server, and the engine that runs them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from recbole.data.utils import get_dataloader
from torch import nn

from recbole_fedkd.data.dataset import of_users
from recbole_fedkd.data.rows import sampler_of
from recbole_fedkd.engine import RecBoleFleetPopulation, RecBoleSamples, disagreement
from recbole_fedkd.federated.client import streams_kept
from recbole_fedkd.federated.task import RecBoleTask
from recbole_fedkd.model import RecBolePopulation
from recbole_fedkd.model.shared import SharedState


def fleet_of_recbole(
    config: Any, train_dataset: Any, client_of_user: torch.Tensor, model_class: type
) -> tuple[RecBoleFleetPopulation | None, str | None]:
    """All clients' instances of a RecBole model side by side, or why that cannot be.

    The process's random stream is then where one instance leaves it, as on the local engine; without a fleet it stays.
    """
    name = f"model '{config['model']}'"
    try:
        with streams_kept(config["device"]):
            population = RecBoleFleetPopulation(config, train_dataset, client_of_user, model_class)
            after = torch.get_rng_state()
        differs = _disagreement(config, train_dataset, client_of_user, model_class, population)
    except Exception as error:  # whatever a model of anybody's raises that is called in a way it was not written for
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "called random operation" in reason:
            reason = "it draws random numbers elsewhere than in dropout layers"
        return None, f"{name} cannot be called for many clients at once: {reason}"
    if differs is not None:
        return None, f"{name} is not the same for many clients at once: {differs}"
    torch.set_rng_state(after)
    return population, None


def _disagreement(
    config: Any,
    train_dataset: Any,
    client_of_user: torch.Tensor,
    model_class: type,
    population: RecBoleFleetPopulation,
) -> str | None:
    """What differs between a client by itself and among all: of the client with the most samples, and that with the fewest."""
    population.to(config["device"])
    task = RecBoleSamples(config, train_dataset, population)
    active = torch.nonzero(task.sizes).flatten()
    order = active[torch.argsort(task.sizes[active])].tolist()
    for number in dict.fromkeys([order[-1], order[0]]):
        part = of_users(train_dataset, client_of_user == number)
        with streams_kept(config["device"]):
            alone = RecBolePopulation(config, [part], client_of_user, model_class).to(config["device"]).networks[0]
        local = recbole_task(config, alone, SharedState(alone, dict), part)
        differs = disagreement(population, task, local, number, config["seed"])
        if differs is not None:
            return differs
    return None


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
