"""A fold of which the server sees the sum alone: what every client adds, masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.aggregate import Fold, Sums, WeightedMean
from recbole_fedkd.federated.message import Message, MessageError
from recbole_fedkd.federated.server import Hidden
from recbole_fedkd.federated.strategy import ServerState, Strategy, check_additive
from recbole_fedkd.privacy.masking import LEAST, MaskingClient, MaskingServer
from recbole_fedkd.privacy.noise import discrete_gaussian

LARGEST = 2.0**20
"""Numbers of a message must be smaller; then sums of them all fit into 64 bits, with what is left for the fraction."""


def fraction_bits(clients: int) -> int:
    """Binary places of the fixed point, with which sums of so many clients fit into 63 bits."""
    return 62 - 20 - math.ceil(math.log2(max(clients, 2)))


class SecureSum(Hidden):
    """The uploads of a round under secure aggregation, all halves in one process.

    A client's half turns what its message adds to the fold into whole numbers of ``2^-fraction_bits`` and masks them; the
    server's half, and with it the fold, gets their sum, which is that of the messages within half a step a client.

    Args:
        empty: makes a fold that has taken in nothing, a ``Sums`` or a ``WeightedMean``.
        clients: that take part.
        least: that must be in the sum.
        noise: standard deviation of the noise on a sum of messages, by the name of an array; every client adds its share, so
            that there is as much where only the fewest are in the sum. None: no noise.

    Attributes:
        seen: client to what the server has got of its numbers, once the sum is made.
    """

    def __init__(
        self,
        empty: Callable[[], Fold],
        clients: int,
        least: int = LEAST,
        noise: Callable[[str], float] | None = None,
    ) -> None:
        # Where all have to be there, each adds the less.
        self.empty, self.least, self.noise = empty, max(least or (clients if noise is not None else 0), LEAST), noise
        self.bits = fraction_bits(clients)
        self.traffic: dict[int, tuple[int, int]] = {}
        self.seen: dict[int, bytes] = {}
        self._headers: dict[int, Message] = {}
        self._vectors: dict[int, NDArray[np.int64]] = {}
        self._layout: dict[str, torch.Tensor] = {}

    def add(self, upload: Message) -> None:
        """The client's side: its vector.

        Raises:
            MessageError: it adds other arrays than the clients before it, or numbers that are too large.
        """
        own = self.empty()
        own.add(upload)
        parts = _sums(own)
        layout = {
            name: torch.empty(part.shape, dtype=part.dtype, device="meta") for name, part in sorted(parts.items())
        }
        known = self._layout or layout
        if {name: part.shape for name, part in known.items()} != {name: part.shape for name, part in layout.items()}:
            raise MessageError("arrays", f"it adds {', '.join(layout)} where the others add {', '.join(known)}")
        numbers = np.concatenate([parts[name].double().numpy().ravel() for name in layout])
        if numbers.size and float(np.abs(numbers).max()) >= LARGEST:
            raise MessageError("not finite", f"it adds {np.abs(numbers).max():g}; masks take numbers below {LARGEST:g}")
        self._layout = known
        self._headers[upload.sender] = replace(upload, arrays={})
        vector = np.rint(numbers * 2.0**self.bits).astype(np.int64)
        if self.noise is not None:
            unit = own.weight_of(upload) / own.expected if isinstance(own, WeightedMean) else 1.0
            vector += np.concatenate([self._noise(name, part.numel(), unit) for name, part in layout.items()])
        self._vectors[upload.sender] = vector

    def _noise(self, name: str, count: int, unit: float) -> NDArray[np.int64]:
        """A client's share of the noise on an array, in steps of the fixed point; ``unit``: what 1 of a message adds."""
        assert self.noise is not None
        return discrete_gaussian(count, self.noise(name) * unit * 2.0**self.bits / math.sqrt(self.least))

    def into(self, fold: Fold) -> None:
        """Run the protocol; the fold takes in the sum.

        Raises:
            MaskingError: too few clients; the fold is as it was.
        """
        length = len(next(iter(self._vectors.values()), ()))
        server = MaskingServer(length, self.least)
        clients = {number: MaskingClient(number) for number in self._vectors}
        self.traffic = {number: (0, len(header.to_bytes())) for number, header in self._headers.items()}
        told = server.keys(self._said({number: client.keys() for number, client in clients.items()}))
        told = server.shares(self._said({number: clients[number].shares(each) for number, each in self._heard(told)}))
        self.seen = {number: clients[number].masked(each, self._vectors[number]) for number, each in self._heard(told)}
        told = server.masked(self._said(self.seen))
        total = server.unmasked(
            self._said({number: clients[number].unmasking(each) for number, each in self._heard(told)})
        )
        sums, place = _sums(fold), 0
        for name, part in self._layout.items():
            size = part.numel()
            values = torch.from_numpy(total[place : place + size] / 2.0**self.bits).view(part.shape)
            sums[name] = (values if part.dtype.is_floating_point else values.round()).to(part.dtype)
            place += size
        if isinstance(fold, WeightedMean):
            fold.weight = sum(fold.weight_of(self._headers[number]) for number in server.summed)

    def arrays_seen(self) -> dict[int, dict[str, NDArray[np.float64]]]:
        """What the server has got of every client, read as if no mask were on it, by array."""
        made: dict[int, dict[str, NDArray[np.float64]]] = {}
        for number, content in self.seen.items():
            numbers, place, made[number] = np.frombuffer(content, "<i8") / 2.0**self.bits, 0, {}
            for name, part in self._layout.items():
                made[number][name] = numbers[place : place + part.numel()].reshape(part.shape)
                place += part.numel()
        return made

    def _said(self, answers: dict[int, bytes]) -> dict[int, bytes]:
        for number, answer in answers.items():
            down, up = self.traffic[number]
            self.traffic[number] = down, up + len(answer)
        return answers

    def _heard(self, told: Mapping[int, bytes]) -> list[tuple[int, bytes]]:
        for number, each in told.items():
            down, up = self.traffic[number]
            self.traffic[number] = down + len(each), up
        return list(told.items())


def _sums(fold: Fold) -> dict[str, torch.Tensor]:
    assert isinstance(fold, Sums | WeightedMean)
    return fold.sums


def check_secure(config: Mapping[str, object], strategy: Strategy, state: ServerState, codecs: list[str]) -> None:
    """Check that a server needs nothing but the sum of what clients send.

    Args:
        config: the run's config.
        strategy: the strategy.
        state: that the server starts with.
        codecs: of what clients send, by name.

    Raises:
        InputError: it does; or there are too few clients.
    """
    check_additive(strategy, "secure_aggregation=True")
    fold = strategy.empty(state, {0: 1, 1: 1})
    if type(fold) not in (Sums, WeightedMean):
        knowledge = f" with knowledge={strategy.knowledge.name}" if strategy.exchanges_knowledge else ""
        raise InputError(
            f"secure_aggregation=True tells the server a sum alone, and strategy '{strategy.name}'{knowledge} keeps who has "
            "said what; use fedavg, or knowledge=label or factors"
        )
    if codecs:
        raise InputError(
            f"secure_aggregation=True masks numbers on one public scale, and codec '{codecs[0]}' has one of its own for every "
            "client; set codecs=[] (broadcast_codecs may stay)"
        )
    for key in ("clients_per_round", "min_clients"):
        value = config[key]
        if isinstance(value, int) and value < LEAST:
            raise InputError(
                f"{key} is {value}, and a sum over fewer than {LEAST} clients tells each of two the other's part; "
                f"secure_aggregation=True needs {LEAST}"
            )
    if config["privacy"] and config["clients_per_round"]:
        raise InputError(
            "secure_aggregation=True needs three clients in every round, and privacy with clients_per_round may draw fewer; "
            "unset one of them"
        )
