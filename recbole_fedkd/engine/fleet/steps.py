"""One step of packed clients: the network called for many at once, each with its own draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.engine.fleet.samples import Epoch, FleetTask
from recbole_fedkd.engine.fleet.store import Pack, Weights
from recbole_fedkd.model.dropout import HandedDropout


def stepped(
    task: FleetTask,
    clients: tuple[ClientGroup, nn.Module, Pack, Weights, Mapping[str, Tensor]],
    batch: Epoch,
    factors: Sequence[Tensor],
    with_logits: bool,
    function: Callable[..., Any],
    *packed: Any,
) -> Any:
    """What packed clients say of a batch.

    Args:
        task: says what a step is.
        clients: their group, its network for this thread, who they are, their parameters and buffers.
        batch: ``[c, size]``.
        factors: what the layers that drop multiply by ``[c, size, ...]``; none in a pass without dropout.
        with_logits: whether the step needs them.
        function: called for every client as ``function(step, parameters, *of the client)``.
        packed: tensors ``[c, ...]``, or containers of such.
    """
    group, network, pack, weights, buffers = clients
    calls = _dropouts(network)

    def of_client(
        network: nn.Module, parameters: Mapping[str, Tensor], factors: Sequence[Tensor], arguments: Any, *of_client: Any
    ) -> Any:
        for (layer, _), own in zip(calls, factors, strict=bool(factors)):
            layer.handed.append(own)
        return function(task.step(network, with_logits, *arguments), parameters, *of_client)

    try:
        arguments = task.arguments(group, pack, batch)
        return group.called(network, of_client, weights, buffers, list(factors), arguments, *packed)
    finally:
        for layer, _ in calls:
            layer.handed.clear()


def drawing(network: nn.Module) -> list[tuple[float, tuple[int, ...]]]:
    """Share that is dropped, and shape of a sample, of every call of a layer that drops, in the order of a pass."""
    return [(layer.probability, shape) for layer, shape in _dropouts(network)]


def _dropouts(network: nn.Module) -> list[tuple[HandedDropout, tuple[int, ...]]]:
    """Calls of layers that drop."""
    layers = [module for module in network.modules() if isinstance(module, HandedDropout) and module.probability]
    calls = [(turn, layer, shape) for layer in layers for turn, shape in layer.shapes.items()]
    return [(layer, shape) for _, layer, shape in sorted(calls, key=lambda call: call[0])]
