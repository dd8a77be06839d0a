"""Strangers: clients that take part in no round (``holdout_clients``) and come when training is over.

Each has a network built from the seed, is told what the server knows, and fits the rest by its own training rows
(:mod:`recbole_fedkd.federated.newcomer`). They are judged on their test rows by the protocols of everybody else. Whatever
engine trained the others, these are built one by one: a stranger is a new client, no part of the federation before it comes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.checkpoint.reading import best_checkpoint
from recbole_fedkd.data.schema import read_schema, rows_of_clients
from recbole_fedkd.engine import ClientError
from recbole_fedkd.evaluation import EvaluationData
from recbole_fedkd.federated.newcomer import settle
from recbole_fedkd.federation.parties import build_clients, build_server
from recbole_fedkd.federation.together import population_of
from recbole_fedkd.trainer import FedKDTrainer


def owners_among(client_of_user: Tensor, numbers: list[int]) -> Tensor:
    """Place among ``numbers`` of every user's client ``[users]``; -1 for users of other clients."""
    places = torch.full_like(client_of_user, -1)
    for position, number in enumerate(numbers):
        places[client_of_user == number] = position
    return places


def judge_strangers(
    trainer: FedKDTrainer, train_dataset: Any, evaluation: EvaluationData, best: bool
) -> dict[str, Any]:
    """Have the strangers settle, and judge them.

    Args:
        trainer: of the federation, trained.
        train_dataset: the training split, of which each stranger gets its own rows.
        evaluation: the strangers' test rows.
        best: whether the server of the best round is asked, or that of the last.

    Returns:
        ``clients`` and ``users`` (how many), ``rounds`` (that they had to train), ``bytes_down`` (to all of them),
        ``test_result``, and ``user_metrics`` where the key of that name asks for them.
    """
    assert trainer.engine is not None
    config, numbers, homes = trainer.config, trainer.strangers, trainer.model.client_of_user.cpu()
    state, rounds = trainer.engine.server.state_dict(), len(trainer.rounds)
    if best:
        checkpoint = best_checkpoint(trainer.run_folder).state
        state, rounds = checkpoint["training"]["server"], checkpoint["epoch"] + 1
    schema = read_schema(train_dataset, int(homes.max()) + 1)
    parts = rows_of_clients(train_dataset, homes, numbers)
    clients = build_clients(config, schema, dict(zip(numbers, parts, strict=True)))
    server = build_server(config, schema)
    server.load_state_dict(state)
    moved = 0
    for client in clients:
        try:
            moved += settle(client, server, rounds)
        except Exception as error:
            raise ClientError(f"client {client.number}, held out and new to the server: {error}") from error
    kept = trainer.model, trainer.user_metrics
    networks = [client.task.network for client in clients]
    trainer.model = population_of(config, schema, networks, owners_among(homes, numbers)).eval()
    try:
        judged = trainer.evaluate(evaluation, load_best_model=False)
        users = trainer.user_metrics
    finally:
        trainer.model, trainer.user_metrics = kept
    return {
        "clients": len(numbers),
        "users": int(np.isin(homes.numpy(), numbers).sum()),
        "rounds": rounds,
        "bytes_down": moved,
        "test_result": {name: float(value) for name, value in (judged or {}).items()},
        "user_metrics": users,
    }
