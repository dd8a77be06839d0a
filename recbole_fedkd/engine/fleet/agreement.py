"""Whether a RecBole model called for many clients at once does what it does for one: tried before the first round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recbole_fedkd.engine.fleet.batching import ClientTable
from recbole_fedkd.engine.fleet.draws import drawn_factors
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.population import RecBoleFleetPopulation
from recbole_fedkd.engine.fleet.samples import Epoch, RecBoleSamples
from recbole_fedkd.engine.fleet.steps import drawing, stepped
from recbole_fedkd.engine.fleet.store import Weights
from recbole_fedkd.federated.client import own_streams
from recbole_fedkd.federated.draws import KeyedDraws, KeyedDropout
from recbole_fedkd.federated.task import RecBoleTask
from recbole_fedkd.model.dropout import HandedDropout, dropping_by


@dataclass(frozen=True)
class Tolerance:
    """How far two results may differ.

    Attributes:
        share: of the largest number of a result.
        floor: a result counts as at least this share of the loss and all gradients: what cancels out leaves only rounding.
    """

    share: float
    floor: float


TOLERANCES = {torch.float32: Tolerance(1e-4, 1e-2), torch.float64: Tolerance(1e-7, 1e-6)}
"""By the precision of what is computed."""

FILLED_UP = 3
"""Samples that are added to a batch and must not count."""


def disagreement(
    population: RecBoleFleetPopulation, task: RecBoleSamples, local: RecBoleTask, number: int, seed: int
) -> str | None:
    """What differs when one client's first batch is trained on by itself and side by side; None if nothing does.

    Samples, loss and gradients are compared: with dropout, and in double precision without, where a term as small as a
    regulariser's cannot hide. A model passes if its loss is a mean over samples that do not see each other, and if it looks
    its tables up row by row.

    Args:
        population: holds the model with replaced modules.
        task: all clients' samples.
        local: the model of one client on its samples.
        number: of that client.
        seed: the run's.
    """
    client_seed, device = KeyedDraws(seed, [number], 0).seeds[0], local.device
    local.draws = KeyedDraws(seed, [number], 0)
    with own_streams(client_seed, device):
        interaction = next(local.batches()).to(device)
    with own_streams(client_seed, device):
        population.batched.learn_dropout(interaction)
    (group,) = population.client_groups
    draws = KeyedDraws(seed, [number], 0)
    (epoch,), _ = task.draw(group, [number], draws, 1, False)
    batch = next(epoch.batches(task.batch_size, [int(task.sizes[number])]))
    for name in interaction.interaction:
        if name not in batch.fields or not torch.equal(batch.fields[name][0], interaction[name]):
            return f"the samples drawn differ in '{name}'"
    # One for both, so that what a model keeps from one call shows in the next.
    twin = group.twin()
    try:
        for precision, tolerance in TOLERANCES.items():
            dropping = precision == torch.float32
            for network in (group.whole, twin, local.network):
                network.to(precision).train()
                for layer in network.modules():
                    if isinstance(layer, nn.Dropout | nn.MultiheadAttention | HandedDropout):
                        layer.train(dropping)
            factors = KeyedDraws(seed, [number], 0).dropout.of_one
            with own_streams(client_seed, device), dropping_by(local.network, factors):
                alone = _alone(local, type(interaction)(_precise(interaction.interaction, precision)))
            among = _filled_up(batch, precision)
            among_all = _side_by_side(group, twin, task, among, number, draws.dropout if dropping else None)
            differs = _difference(_parted(group, alone), among_all, tolerance)
            if differs is not None:
                return differs
    finally:
        group.whole.to(torch.float32).train()
    return None


def _filled_up(batch: Epoch, precision: torch.dtype) -> Epoch:
    """The batch ``[1, size]`` with samples behind it that do not count."""
    size = batch.labels.shape[1]
    places = torch.cat([torch.arange(size), torch.arange(FILLED_UP) % size]).to(batch.labels.device)
    fields = {name: values[:, places] for name, values in _precise(batch.fields, precision).items()}
    weights = batch.weights[:, places].to(precision)
    weights[:, size:] = 0.0
    return Epoch(fields, batch.items[:, places], batch.labels[:, places], weights)


def _precise(columns: Mapping[str, Tensor], precision: torch.dtype) -> dict[str, Tensor]:
    return {name: column.to(precision) if column.is_floating_point() else column for name, column in columns.items()}


def _alone(local: RecBoleTask, interaction: Any) -> dict[str, Tensor]:
    """Loss, logits of a click model, and gradients of a model on a batch, as the local engine computes them."""
    step = local.step(interaction, local.is_click_model)
    local.network.zero_grad()
    step.loss.backward()
    said = {"loss": step.loss.detach()}
    if step.logits is not None and step.labels is not None:
        said |= {"logits": step.logits.detach(), "labels": step.labels}
    for name, parameter in local.network.named_parameters():
        said[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return said


def _side_by_side(
    group: ClientGroup,
    network: nn.Module,
    task: RecBoleSamples,
    batch: Epoch,
    number: int,
    dropout: KeyedDropout | None,
) -> dict[str, Tensor]:
    """The same for one client of a fleet; gradients of what clients hold only in part of all rows."""
    chosen = torch.tensor([number], device=batch.labels.device)
    pack = group.pack(chosen, task.needed(batch))
    base = group.base()
    weights = group.weights(pack, base)
    for leaf in weights.tensors():
        leaf.requires_grad_()
    size = batch.labels.shape[1]
    factors: list[Tensor] = []
    if dropout is not None:
        factors = drawn_factors(dropout, [size - FILLED_UP], size, drawing(network), chosen.device)
    clients = (group, network, pack, weights, group.buffers_of(pack))

    def said(step: Any, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (step.loss,) if step.logits is None else (step.loss, step.logits, step.labels)

    answers = stepped(task, clients, batch, factors, True, said)
    gradients = iter(torch.autograd.grad(answers[0].sum(), weights.tensors()))
    parts = (weights.dense, weights.rows, weights.users)
    named = group.named(Weights(*(next(gradients) if part.numel() else torch.zeros_like(part) for part in parts)))
    values = {"loss": answers[0][0].detach()}
    if len(answers) > 1:
        values |= {"logits": answers[1][0, :-FILLED_UP].detach(), "labels": answers[2][0, :-FILLED_UP]}
    for name, value in named.items():
        if name in group.dense_names:
            values[name] = value[0]
        else:
            rows = pack.items[0] if name in group.item_names else pack.members[0]
            whole = value.new_zeros(group.shapes[name])
            values[name] = whole.index_add(0, rows, value[0])
    return values


def _parted(group: ClientGroup, said: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a model by the names of the model with replaced modules."""
    parted = dict(said)
    for path, table in group.whole.named_modules():
        if isinstance(table, ClientTable):
            rest, own = table.parted(said[f"{path}.weight"])
            parted[f"{path}.weight"] = rest
            if table.users is not None:
                parted[f"{path}.users"] = own
    return parted


def _difference(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], tolerance: Tolerance) -> str | None:
    """What differs between two results of the same names."""
    largest = {name: float(value.abs().max()) for name, value in expected.items()}
    scale = max(value for name, value in largest.items() if name not in ("logits", "labels"))
    for name, value in expected.items():
        what = f"its {name}" if name in ("loss", "logits", "labels") else f"the gradient of '{name}'"
        if name not in actual or actual[name].shape != value.shape:
            return f"{what} cannot be compared"
        bound = tolerance.share * max(largest[name], tolerance.floor * scale)
        if not float((actual[name] - value).abs().max()) <= bound:
            return f"{what} would not be what it is on a client by itself"
    return None
