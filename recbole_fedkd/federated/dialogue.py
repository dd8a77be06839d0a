"""What a client makes of what it hears, and what it says: the same on every engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

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
    fresh = link.sent_in is not None and message.round == link.sent_in + 1
    own = on_device(link.sent, device)
    made = strategy.understood(on_device(to_tensors(message.arrays), device), own, fresh)
    return {**received, **made} if strategy.accumulates else made


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
