"""A fold of which the server sees the sum alone: what every client adds, masked."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.aggregate import Fold, Sums, WeightedMean
from recbole_fedkd.federated.clipping import ClipSettings
from recbole_fedkd.federated.message import Message, MessageError, Training, without_arrays
from recbole_fedkd.federated.random_k import RandomK, RandomKSettings
from recbole_fedkd.federated.server import Hidden
from recbole_fedkd.federated.stage import difference
from recbole_fedkd.federated.strategy import ServerState, Strategy, check_additive
from recbole_fedkd.privacy.identity import Identity, MaskingError, is_signed
from recbole_fedkd.privacy.masking import MaskingClient, MaskingServer
from recbole_fedkd.privacy.noise import discrete_gaussian, uniform
from recbole_fedkd.privacy.release import PrivateRelease
from recbole_fedkd.privacy.settings import LEAST, LEVELS

LARGEST = 2.0**20
"""Numbers of a message must be smaller; then sums of them all fit into 64 bits, with what is left for the fraction."""

KEYS, SHARES, MASKED, UNMASKING = STEPS = ("keys", "shares", "masked", "unmasking")

_Empty = Callable[[], Fold]
_Vector = NDArray[np.signedinteger[Any]]
_Layout = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Grid:
    """What clients tell under masks, and how: at which places, in steps of which width, in how many bytes. All of it is public.

    Attributes:
        samples: of an epoch of every client that takes part.
        levels: steps up to the bound of a codec; None: fixed point, as exact as sums of 64 bits can be.
        share: of the numbers of an array that are told, at the places of codec ``random_k``.
        version: of the network that all have started from, by which the places are drawn.
        clip: the bound on what a client changes.
        reference: the network; what changed of it is told. Empty: all is.
    """

    samples: Mapping[int, int]
    levels: int | None = None
    share: float = 1.0
    version: int = 0
    clip: ClipSettings = field(default_factory=ClipSettings)
    reference: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)

    @staticmethod
    def of(
        config: Any,
        clip: ClipSettings,
        reference: Mapping[str, NDArray[np.generic]],
        version: int,
        samples: Mapping[int, int],
    ) -> Grid:
        """That of codecs that a config has let pass, at either end of the wire."""
        codecs = config["codecs"]
        share = config["random_k_share"] if RandomK.name in codecs else 1.0
        return Grid(samples, LEVELS.get(codecs[-1]), share, version, clip, reference)

    @property
    def word(self) -> int:
        """Bytes of a number, into which the sum over all fits."""
        if self.levels is None:
            return 8
        return 2 if self.levels * len(self.samples) < 2**15 else 4

    def places(self, size: int) -> NDArray[np.int64]:
        """Places of an array of so many numbers that are told, ascending."""
        return RandomKSettings(self.share).places(size, self.version)

    def step(self, fold: Fold, name: str) -> float:
        """Width of a step of an array: of a codec the bound times the largest share of a client, over the levels."""
        if self.levels is None:
            return 2.0 ** -fraction_bits(len(self.samples))
        return (
            self.clip.norm_of(name)
            * max(share_of(fold, of_client) for of_client in set(self.samples.values()))
            / self.levels
        )

    def rounded(self, steps: NDArray[np.float64]) -> _Vector:
        """Whole steps; of a codec up or down by coins, so that the mean is kept."""
        if self.levels is None:
            return np.rint(steps).astype(np.int64)
        whole = np.floor(steps + uniform(len(steps))).clip(-self.levels, self.levels)
        return whole.astype(f"i{self.word}")

    def unfolded(self, summed: NDArray[np.signedinteger[Any]], layout: _Layout, fold: Fold) -> dict[str, torch.Tensor]:
        """Numbers by array, double, of whole steps; 0 where nothing is told."""
        tensors, begin = {}, 0
        for name, part in layout.items():
            places = self.places(part.numel())
            values = np.zeros(part.numel())
            values[places] = summed[begin : begin + len(places)] * self.step(fold, name)
            tensors[name] = torch.from_numpy(values).view(part.shape)
            begin += len(places)
        return tensors


def share_of(fold: Fold, samples: int) -> float:
    """What a client of so many samples counts for in a sum."""
    if not isinstance(fold, WeightedMean):
        return 1.0
    return fold.weight_of(Message("", 0, 0, {}, Training(samples))) / fold.expected


def fewest(clients: int, least: int | None) -> int:
    """Clients that must be in a sum of so many, who share the noise; ``least``: as of :class:`SecureSum`."""
    return max(least or clients, LEAST)


def fraction_bits(clients: int) -> int:
    """Binary places of the fixed point, with which sums of so many clients fit into 63 bits."""
    return 62 - 20 - math.ceil(math.log2(max(clients, 2)))


class SecureClient:
    """A client's half of a secure sum: what its message adds, in whole numbers, and its part of the protocol.

    Args:
        number: of the client.
        empty: makes a fold that has taken in nothing, a ``Sums`` or a ``WeightedMean``.
        grid: of the round.
        noise: standard deviation of what the client adds to a message by itself, by the name of an array; None: nothing.
        identity: by which it signs its keys, and knows those of others; None: the server is believed.
        run: what tells the run and its round from all others.

    Attributes:
        layout: arrays of the sum, by name.
    """

    def __init__(
        self,
        number: int,
        empty: _Empty,
        grid: Grid,
        noise: Callable[[str], float] | None = None,
        identity: Identity | None = None,
        run: bytes = b"",
    ) -> None:
        self.number, self.empty, self.grid, self.noise = number, empty, grid, noise
        self.identity, self.run = identity, run
        self.layout: _Layout = {}
        self._vector: _Vector = np.zeros(0, np.int64)
        self._masking: MaskingClient | None = None

    def take(self, upload: Message) -> None:
        """Its message.

        Raises:
            MessageError: its numbers are too large.
        """
        own, grid = self.empty(), self.grid
        own.add(replace(upload, arrays=difference(upload.arrays, grid.reference)))
        self.layout = _layout(own)
        steps = {name: grid.step(own, name) for name in self.layout}
        flat = {name: part.double().numpy().ravel() for name, part in _sums(own).items()}
        flat = {name: flat[name][grid.places(len(flat[name]))] for name in self.layout}
        numbers = np.concatenate(list(flat.values()))
        if numbers.size and float(np.abs(numbers).max()) >= LARGEST:
            raise MessageError("not finite", f"it adds {np.abs(numbers).max():g}; masks take numbers below {LARGEST:g}")
        self._vector = grid.rounded(np.concatenate([flat[name] / steps[name] for name in flat]))
        if self.noise is not None:
            unit = own.weight_of(upload) / own.expected if isinstance(own, WeightedMean) else 1.0
            drawn = [discrete_gaussian(len(flat[name]), self.noise(name) * unit / steps[name]) for name in flat]
            self._vector = self._vector + np.concatenate(drawn)

    def answer(self, step: str, content: bytes) -> bytes:
        """Its part of a step; with the first it begins anew, with keys that nobody has seen.

        Raises:
            MaskingError: it was asked out of turn, or what it was told does not fit.
        """
        if step == KEYS:
            # All sign the same terms, so that nobody is told others.
            self._masking = MaskingClient(self.number, identity=self.identity, round_of=self.run + content)
            return self._masking.keys()
        if self._masking is None:
            raise MaskingError(f"client {self.number} has no keys, since it was started again; a round draws new ones")
        if step == SHARES:
            return self._masking.shares(content)
        return self._masking.masked(content, self._vector) if step == MASKED else self._masking.unmasking(content)


class SecureSum(Hidden):
    """The uploads of a round under secure aggregation.

    A client's half turns what its message adds to the fold into whole numbers of ``2^-fraction_bits`` and masks them; the
    server's half, and with it the fold, gets their sum, which is that of the messages within half a step a client. The halves
    are in this process, unless somebody says how clients are asked elsewhere.

    Args:
        empty: makes a fold that has taken in nothing, a ``Sums`` or a ``WeightedMean``.
        samples: samples of an epoch of every client that takes part.
        least: clients that must be in the sum; 0: all.
        release: whose noise clients add, each its share, so that there is as much where only the fewest are in the sum; None:
            no noise.
        identities: of clients that are here, made when the first one speaks.
        grid: makes the grid of a round of the clients' samples.

    Attributes:
        seen: client to what the server has got of its numbers, once the sum is made.
    """

    def __init__(
        self,
        empty: _Empty,
        samples: Mapping[int, int],
        least: int = 0,
        release: PrivateRelease | None = None,
        identities: Callable[[], Mapping[int, Identity]] = dict,
        grid: Callable[[Mapping[int, int]], Grid] = Grid,
    ) -> None:
        super().__init__()
        self.empty, self.samples, self.release, self.identities = empty, samples, release, identities
        self.least = fewest(len(samples), least)
        self.grid = grid(samples)
        self.seen: dict[int, bytes] = {}
        self._headers: dict[int, Message] = {}
        self._clients: dict[int, SecureClient] = {}
        self._layout: _Layout = {}
        if release is not None:
            share = min(share_of(empty(), of_client) for of_client in samples.values()) / math.sqrt(self.least)
            release.check_step(2.0 ** -fraction_bits(len(samples)) / share)

    def add(self, upload: Message) -> None:
        """The client's side: its vector.

        Raises:
            MessageError: it adds other arrays than the clients before it, or numbers that are too large.
        """
        identity = self.identities().get(upload.sender)
        client = SecureClient(upload.sender, self.empty, self.grid, self._noise, identity)
        client.take(upload)
        self._check_layout(client.layout)
        self._clients[upload.sender] = client
        self._headers[upload.sender] = without_arrays(upload)

    def add_header(self, header: Message, blank: Message) -> None:
        """The server's side of a client elsewhere: what it says of itself, and a message of zeros like the one that it keeps.

        Raises:
            MessageError: it adds other arrays than the clients before it.
        """
        own = self.empty()
        own.add(blank)
        self._check_layout(_layout(own))
        self._headers[header.sender] = header

    @property
    def _noise(self) -> Callable[[str], float] | None:
        """A client's share of the noise."""
        release, share = self.release, 1 / math.sqrt(self.least)
        return None if release is None else lambda name: release.deviation_of(name) * share

    @property
    def terms(self) -> bytes:
        """What a client elsewhere needs to know to add its part, for :func:`terms_of`."""
        noise = None if self.release is None else self.release.noise_multiplier / math.sqrt(self.least)
        # No two rounds ask for keys in the same words, so that nobody takes the one for the other.
        packed: bytes = msgpack.packb([list(self.samples.items()), noise, os.urandom(16)])
        return packed

    def into(self, fold: Fold) -> list[int]:
        """Run the protocol, again with new keys where it was broken off and may be; the fold takes in the sum.

        Who has spoiled it is not asked again, and that is no repetition.

        Returns:
            The clients that are in it.

        Raises:
            MaskingError: too few clients; the fold is as it was.
        """
        self.traffic = {number: (0, len(header.to_bytes())) for number, header in self._headers.items()}
        asked = list(self._headers)
        while True:
            server, terms = self._attempt()
            total = error = None
            try:
                total = self._total(server, dict.fromkeys(asked, terms))
            except MaskingError as caught:
                error = caught
            self.seen = {number: self.seen[number] for number in server.summed}
            for number, fault in server.faults.items():
                self.faults.setdefault(number, []).append(fault)
            if total is not None:
                break
            asked = [number for number in asked if number not in server.spoiling]
            if not server.spoiling:
                if not self.repeats:
                    names = "; ".join(f"client {number}: {faults[-1]}" for number, faults in self.faults.items())
                    raise MaskingError(f"{error} ({names})" if names else str(error)) from error
                self.repeats -= 1
            if self.release is not None:
                self.release.repeated()
        summed = server.summed
        sums, shares = _sums(fold), sum(share_of(fold, self.samples[number]) for number in summed)
        for name, array in self.grid.unfolded(total, self._layout, fold).items():
            part, origin = self._layout[name], self.grid.reference.get(name)
            values = array if origin is None else array + torch.from_numpy(origin.astype(np.float64)) * shares
            sums[name] = (values if part.dtype.is_floating_point else values.round()).to(part.dtype)
        if isinstance(fold, WeightedMean):
            fold.weight = sum(fold.weight_of(self._headers[number]) for number in summed)
        fold.heard_of(summed)
        return summed

    def _attempt(self) -> tuple[MaskingServer, bytes]:
        """The server's half of an attempt, and what all sign with their keys."""
        length, terms = sum(len(self.grid.places(part.numel())) for part in self._layout.values()), self.terms
        signed = None if self.signers is None else partial(is_signed, self.signers, self.run + terms)
        return MaskingServer(length, self.least, word=self.grid.word, signed=signed), terms

    def _total(self, server: MaskingServer, letters: Mapping[int, bytes]) -> _Vector:
        """The sum of those who are asked for keys, but for whoever falls silent."""
        letters = server.keys(self._asked(KEYS, letters))
        letters = server.shares(self._asked(SHARES, letters))
        self.seen = self._asked(MASKED, letters)
        letters = server.masked(self.seen)
        if self.release is not None:
            self.release.spend()  # clients' noise is in it, and with the answers the server has heard it
        return server.unmasked(self._asked(UNMASKING, letters))

    def _asked(self, step: str, letters: Mapping[int, bytes]) -> dict[int, bytes]:
        """What clients answer, with the bytes counted; those that fall silent are not in it."""
        answers = (self.ask or self._ask_here)(step, letters)
        for number, content in letters.items():
            down, up = self.traffic[number]
            counted = len(content) if step != KEYS or self.ask is not None else 0
            self.traffic[number] = down + counted, up + len(answers.get(number, b""))
        return dict(answers)

    def _ask_here(self, step: str, letters: Mapping[int, bytes]) -> dict[int, bytes]:
        return {number: self._clients[number].answer(step, content) for number, content in letters.items()}

    def _check_layout(self, layout: _Layout) -> None:
        known = self._layout or layout
        if {name: part.shape for name, part in known.items()} != {name: part.shape for name, part in layout.items()}:
            raise MessageError("arrays", f"it adds {', '.join(layout)} where the others add {', '.join(known)}")
        self._layout = known

    def arrays_seen(self) -> dict[int, dict[str, NDArray[np.float64]]]:
        """What the server has got of every client, read as if no mask were on it, by array."""
        arrays = {}
        for number, content in self.seen.items():
            numbers = np.frombuffer(content, f"<i{self.grid.word}")
            seen = self.grid.unfolded(numbers, self._layout, self.empty())
            arrays[number] = {name: values.numpy() for name, values in seen.items()}
        return arrays


def terms_of(packed: bytes) -> tuple[dict[int, int], float | None]:
    """Samples of everybody who takes part, and the deviation of a client's own noise in units of the clip, of ``terms``.

    Raises:
        MaskingError: the bytes are none.
    """
    try:
        samples, noise, _ = msgpack.unpackb(packed, max_array_len=2**20)
        return {int(number): int(size) for number, size in samples}, None if noise is None else float(noise)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise MaskingError(f"secure aggregation: {len(packed)} bytes are no terms: {error}") from error


def _layout(fold: Fold) -> _Layout:
    """Names, shapes and types of a fold's sums."""
    parts = sorted(_sums(fold).items())
    return {name: torch.empty(part.shape, dtype=part.dtype, device="meta") for name, part in parts}


def _sums(fold: Fold) -> dict[str, torch.Tensor]:
    assert isinstance(fold, Sums | WeightedMean)
    return fold.sums


def check_secure(strategy: Strategy, state: ServerState) -> None:
    """Check that a server needs nothing but the sum of what clients send.

    Args:
        strategy: the strategy.
        state: that the server starts with.

    Raises:
        InputError: it does.
    """
    check_additive(strategy, "secure_aggregation=True")
    knowledge = strategy.knowledge if strategy.exchanges_knowledge else None
    if not isinstance(strategy.empty(state, {0: 1, 1: 1}), Sums | WeightedMean):
        raise InputError(
            f"secure_aggregation=True tells the server a sum alone, and strategy '{strategy.name}' folds none"
        )
    if knowledge is not None and knowledge.differs_first and not knowledge.sizes.everybody:
        raise InputError(
            "secure_aggregation=True adds up messages of the same arrays, and with clients_per_round or min_clients some speak "
            f"for the first time, when knowledge={knowledge.name} tells more than later; unset them"
        )
