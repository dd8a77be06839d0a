"""Steps of packed clients whose gradient is two lines: without autograd, and without calling networks one in many."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.samples import Epoch, FleetTask, LabelledSamples
from recbole_fedkd.engine.fleet.store import Pack, Weights
from recbole_fedkd.federated.strategy import Strategy
from recbole_fedkd.federated.task import AttentiveTask
from recbole_fedkd.model.factorization import RowSums


def derives_by_hand(task: FleetTask, strategy: Strategy, network: nn.Module) -> bool:
    """Whether clients minimise nothing but the cross-entropy of clicks, by a network that knows its own gradient."""
    plain = (
        isinstance(task, LabelledSamples) and task.kind is AttentiveTask and not task.reg_weight and task.labels == 2
    )
    # Who changes what a network says has to say how it is derived, too.
    says = next(each for each in type(network).__mro__ if "forward" in vars(each))
    return plain and strategy.adds_nothing and "scores_of_many" in vars(says)


@torch.no_grad()
def derived_by_hand(
    task: FleetTask, group: ClientGroup, network: nn.Module, pack: Pack, weights: Weights, batch: Epoch
) -> tuple[Tensor, list[Tensor | RowSums]]:
    """Losses ``[c]`` of packed clients, and their gradients in the shapes of ``weights``; see :func:`derives_by_hand`.

    With ``s = -1`` for a click and 1 for none, ``CE = softplus(s z)`` of a score ``z``, and its derivative ``s sigmoid(s z)``.
    """
    users, items, labels, counted, _, _ = task.arguments(group, pack, batch)
    scores, gradients = network.scores_of_many(group.named(weights), users, items.flatten(1))  # type: ignore[operator]
    sign, share = 1.0 - 2.0 * labels, counted / counted.sum(1, keepdim=True)
    margins = scores * sign
    losses = (functional.softplus(margins) * share).sum(1)
    return losses, group.joined(gradients(margins.sigmoid_() * sign * share))
