"""What a client makes of what it hears, and what it says: the same on every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recbole_fedkd.federated.message import Message, Training
from recbole_fedkd.federated.strategy import LocalResult, to_tensors
from recbole_fedkd.federated.wire import ClientLink
from recbole_fedkd.finite import check_arrays


def understood(
    link: ClientLink, received: Mapping[str, Tensor], message: Message, device: torch.device
) -> dict[str, Tensor]:
    """What a client knows once it has heard a message.

    Args:
        link: the client's.
        received: what it has made of the messages before.
        message: the server's.
        device: where the client's network lives.
    """
    strategy = link.strategy
    own = on_device(link.sent, device)
    heard = strategy.understood(on_device(to_tensors(message.arrays), device), own, _fresh(link, message))
    return {**received, **heard} if strategy.accumulates else heard


def understood_by_many(
    links: Sequence[ClientLink], received: Sequence[Mapping[str, Tensor]], message: Message, device: torch.device
) -> list[dict[str, Tensor]]:
    """What several clients know that are :func:`heard_alike`, where the strategy is ``elementwise``."""
    strategy, count = links[0].strategy, len(links)
    own = {name: torch.stack([link.sent[name] for link in links]).to(device) for name in links[0].sent}
    arrays = on_device(to_tensors(message.arrays), device)
    of_all = {name: value.expand(count, *value.shape) for name, value in arrays.items()}
    heard = strategy.understood(of_all, own, _fresh(links[0], message))
    of_each = zip(*(value.unbind() for value in heard.values()), strict=True) if heard else [()] * count
    named = [dict(zip(heard, values, strict=True)) for values in of_each]
    if not strategy.accumulates:
        return named
    return [{**before, **after} for before, after in zip(received, named, strict=True)]


def heard_alike(link: ClientLink, message: Message) -> tuple[Any, ...]:
    """What clients have in common that :func:`understood_by_many` takes together."""
    shapes = tuple((name, tuple(value.shape)) for name, value in link.sent.items())
    return id(message), _fresh(link, message), shapes


def _fresh(link: ClientLink, message: Message) -> bool:
    return link.sent_in is not None and message.round == link.sent_in + 1


def answer(link: ClientLink, result: LocalResult, training: Training, round_index: int) -> Message | None:
    """What a client says after its training, before it is encoded; None if nothing.

    Raises:
        NotFiniteError: it holds numbers that are not finite: a codec may make a number of what is none.
    """
    message = link.strategy.upload(result, link.number, round_index)
    if message is None:
        return None
    check_arrays(message.arrays, "its message")
    return replace(message, training=training)


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}
