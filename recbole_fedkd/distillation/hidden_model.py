"""A model that the server keeps to itself, learned from what clients predict: matrix factorisation with a vector per label.

PTF-FedRec: Yuan et al., Hide Your Model: A Parameter Transmission-free Federated Recommender System, ICDE 2024.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BATCH = 4096
"""Predictions in a step of the server."""


def started(clients: int, items: int, labels: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The model before it has learned: ``clients`` ``[K, d]``, ``items`` ``[I, T, d]`` and ``biases`` ``[I, T]``."""
    return {
        "clients": torch.randn(clients, width, generator=generator) * 0.1,
        "items": torch.randn(items, labels, width, generator=generator) * 0.1,
        "biases": torch.zeros(items, labels),
    }


def logits_of(model: Mapping[str, Tensor], clients: Tensor, items: Tensor) -> Tensor:
    """Logits ``[pairs, T]`` of clients ``[pairs]`` and items ``[pairs]``."""
    return torch.einsum("pd,ptd->pt", model["clients"][clients], model["items"][items]) + model["biases"][items]


def learned(
    model: Mapping[str, Tensor], predictions: Tensor, epochs: int, rate: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The model after some passes over what clients predict, by the cross-entropy to it (PTF-FedRec, its central training).

    Args:
        model: as of :func:`started`.
        predictions: label distributions ``[K, I, T]``; a row of zeros: the client has predicted nothing.
        epochs: passes over them.
        rate: of Adam, which starts anew.
        generator: decides their order.
    """
    clients, items = (predictions.sum(-1) > 0).nonzero(as_tuple=True)
    weights = {name: value.clone().requires_grad_() for name, value in model.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(clients), generator=generator).split(BATCH):
            who, what = clients[rows], items[rows]
            loss = -(predictions[who, what] * logits_of(weights, who, what).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: value.detach() for name, value in weights.items()}


@torch.no_grad()
def said_to(model: Mapping[str, Tensor], client: int, known: Tensor, count: int) -> Tensor:
    """What the model says to a client, label distributions ``[I, T]``, zeros for items that it says nothing of.

    Half of ``count`` are the items that most clients have predicted, where the model is confident; the other half those that
    the model likes most for this client, which are hard to tell from what it holds (PTF-FedRec, section III-E).

    Args:
        model: as of :func:`started`.
        client: whose.
        known: clients that have predicted each item ``[I]``.
        count: items.
    """
    items = torch.arange(1, len(known))  # not the padding
    probabilities = logits_of(model, torch.full_like(items, client), items).softmax(-1)
    liked = probabilities @ torch.arange(probabilities.shape[1], dtype=probabilities.dtype)
    confident = torch.argsort(known[1:], descending=True, stable=True)[: (count + 1) // 2]
    liked[confident] = -1.0
    hard = torch.argsort(liked, descending=True, stable=True)[: count // 2]
    chosen = torch.cat([confident, hard])
    table = torch.zeros(len(known), probabilities.shape[1])
    table[items[chosen]] = probabilities[chosen]
    return table
