"""Steps of packed clients whose gradient is two lines: without autograd, and without calling networks one in many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_fedkd.engine.fleet.compiled import steps_of_many
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.optimizers import BatchedOptimizer, BatchedSGD, Tensors
from recbole_fedkd.engine.fleet.samples import Epoch, FleetTask, LabelledSamples
from recbole_fedkd.engine.fleet.store import Pack, Weights
from recbole_fedkd.federated.strategy import Strategy
from recbole_fedkd.federated.task import AttentiveTask
from recbole_fedkd.model.compiled import has_compiler
from recbole_fedkd.model.factorization import Factors, RowSums, looked_up

Gradients = Callable[[Tensor], dict[str, Tensor | RowSums]]
"""Makes of a loss's derivatives by scores ``[c, n]`` those by all parameters, by name."""


def derives_by_hand(task: FleetTask, strategy: Strategy, network: nn.Module) -> bool:
    """Whether clients minimise nothing but the cross-entropy of clicks, by a network that is nothing but factors."""
    plain = (
        isinstance(task, LabelledSamples) and task.kind is AttentiveTask and not task.reg_weight and task.labels == 2
    )
    # Who changes what a network says has to say what its scores are made of, too.
    says = next(base for base in type(network).__mro__ if "forward" in vars(base))
    return plain and strategy.adds_nothing and "factors" in vars(says)


def scores_of_many(
    factors: Factors, parameters: Mapping[str, Tensor], users: Tensor, items: Tensor
) -> tuple[Tensor, Gradients]:
    """Scores ``[c, n]`` of many networks, and their gradients.

    Args:
        factors: what a score is made of.
        parameters: by name ``[c, ...]``.
        users: of each network ``[c, n]``, or one of each ``[c, 1]``.
        items: ``[c, n]``.
    """
    rows = parameters[factors.user].shape[1]
    users = users if rows > 1 else torch.zeros_like(users[:, :1])
    sides = ((factors.user, factors.user_bias, users), (factors.item, factors.item_bias, items))
    (user_vectors, item_vectors) = (looked_up(parameters[name], ids) for name, _, ids in sides)
    one = user_vectors.shape[1] == 1
    scores = (item_vectors @ user_vectors.mT).squeeze(2) if one else (user_vectors * item_vectors).sum(2)
    for name, bias, ids in sides:
        if bias is not None:
            table = parameters[bias].view(*parameters[name].shape[:2], 1)
            scores = scores + looked_up(table, ids).squeeze(2)

    def gradients(errors: Tensor) -> dict[str, Tensor | RowSums]:
        of_scores, gradients = errors.unsqueeze(2), dict[str, Tensor | RowSums]()
        for (name, bias, ids), others in zip(sides, (item_vectors, user_vectors), strict=True):
            alone = ids.shape[1] < errors.shape[1]
            values = errors.unsqueeze(1) @ others if alone else of_scores * others
            gradients[name] = RowSums(ids, values, parameters[name].shape[1])
            if bias is not None:
                values = of_scores.sum(1, keepdim=True) if alone else of_scores
                gradients[bias] = RowSums(ids, values, parameters[name].shape[1])
        return gradients

    return scores, gradients


@torch.no_grad()
def derived_by_hand(
    task: FleetTask, group: ClientGroup, network: nn.Module, pack: Pack, weights: Weights, batch: Epoch
) -> tuple[Tensor, list[Tensor | RowSums]]:
    """Losses ``[c]`` of packed clients, and their gradients in the shapes of ``weights``; see :func:`derives_by_hand`.

    With ``s = -1`` for a click and 1 for none, ``CE = softplus(s z)`` of a score ``z``, and its derivative ``s sigmoid(s z)``.
    """
    users, items, labels, counted, _, _ = task.arguments(group, pack, batch)
    scores, gradients = scores_of_many(network.factors, group.named(weights), users, items.flatten(1))  # type: ignore[arg-type]
    sign, share = 1.0 - 2.0 * labels, counted / counted.sum(1, keepdim=True)
    margins = scores * sign
    losses = (functional.softplus(margins) * share).sum(1)
    return losses, group.joined(gradients(margins.sigmoid_() * sign * share))


def compiled_epoch(
    optimizer: BatchedOptimizer,
    rates: Tensors | None,
    clients: tuple[ClientGroup, nn.Module, Pack, Weights],
    batch_size: int,
    sizes: Sequence[int],
    epoch: Epoch,
) -> Tensor | None:
    """Take all steps of an epoch in compiled code, where there is any and it knows the optimiser.

    Args:
        optimizer: of the clients.
        rates: as of :meth:`BatchedOptimizer.step`.
        clients: their group, their network, who they are, and their parameters, which are changed in place.
        batch_size: samples in a step.
        sizes: samples of each client.
        epoch: the samples; clients minimise what :func:`derives_by_hand` says.

    Returns:
        Loss of each client, summed over its samples ``[c]``; None: nothing has been done.
    """
    group, network, pack, weights = clients
    factors: Factors = network.factors  # type: ignore[assignment]
    if type(optimizer) is not BatchedSGD or weights.rows.device.type != "cpu" or not has_compiler():
        return None
    tables = weights.tensors()
    rates = rates if rates is not None else [torch.full(table.shape[-1:], optimizer.rate) for table in tables]
    of_user = weights.users if factors.user in group.user_names else weights.dense.unsqueeze(1)
    user_rates = rates[-1] if factors.user in group.user_names else rates[0]
    item_rates = rates[-2] if factors.user in group.user_names else rates[-1]
    user, item, user_bias, item_bias = (
        group.column(name) if name is not None else -1
        for name in (factors.user, factors.item, factors.user_bias, factors.item_bias)
    )
    places = user, item, user_bias, item_bias, group.shapes[factors.item][1]
    users = epoch.fields["users"] if of_user.shape[1] > 1 else torch.zeros_like(epoch.items[:, :1])
    return steps_of_many(
        of_user,
        weights.rows,
        (user_rates, item_rates),
        places,
        users,
        pack.places(epoch.items),
        epoch.labels,
        sizes,
        batch_size,
    )
