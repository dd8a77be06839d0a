"""A party's half of secure aggregation: its message stays here, and what leaves it is masked.

Keys and masks are in memory alone. A party that was started again has lost them, says so, and is out of the sum, or in the next
one, with new keys: nothing is ever said twice under one mask. Asked the same again it gives the answer that it gave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgpack

from recbole_fedkd.federated.client import Client
from recbole_fedkd.federated.message import Message, MessageError
from recbole_fedkd.federation.parties import clip_of
from recbole_fedkd.privacy.accountant import PRECISION, noise_for
from recbole_fedkd.privacy.identity import Identity, MaskingError
from recbole_fedkd.privacy.secure_sum import KEYS, STEPS, Grid, SecureClient, fewest, terms_of
from recbole_fedkd.privacy.settings import PrivacySettings


class PartyMasks:
    """One round's half.

    Args:
        config: the federation's.
        client: that has trained.
        message: what it would have said to a server that may see it.
        identity: by which it signs its keys, and knows those of others; None: the server is believed.
        run: what tells the run and its round from all others.
    """

    def __init__(self, config: Any, client: Client, message: Message, identity: Identity | None, run: bytes) -> None:
        self.config, self.client, self.message = config, client, message
        self.identity, self.run = identity, run
        self._half: SecureClient | None = None
        self._given: dict[bytes, bytes] = {}

    def answer(self, name: bytes, request: bytes) -> bytes:
        """Its part of a step, once.

        Args:
            name: of the request.
            request: the step, and what the server says in it.

        Raises:
            MessageError: it has no keys any more, or what it was told is nothing of this protocol.
        """
        if name in self._given:
            return self._given[name]
        step, content = self._read(request)
        try:
            if step == KEYS:
                self._half, self._given = self._begun(content), {}
            if self._half is None:
                raise MaskingError(f"client {self.client.number} has no keys, since it was started again")
            self._given[name] = self._half.answer(step, content)
        except MaskingError as error:
            raise MessageError("masks", str(error)) from error
        return self._given[name]

    def _begun(self, terms: bytes) -> SecureClient:
        """A half with keys of its own."""
        samples, noise = terms_of(terms)
        client = self.client
        if samples.get(client.number) != self.message.training.samples:
            raise MaskingError(f"client {client.number} is to be in a sum that counts other samples for it than it has")
        privacy = PrivacySettings.of(self.config)
        deviation = None
        if privacy is not None and privacy.noise == "distributed":
            deviation = partial(_deviation, self._agreed(privacy, noise, samples), privacy.bound.norm_of)
        empty = partial(client.strategy.empty, {}, samples)
        grid = Grid(samples)
        if self.config["codecs"]:
            clip, updates = clip_of(client.link.codecs), client.link.updates
            assert clip is not None and updates is not None  # the server has looked
            grid = Grid.of(self.config, clip, updates.reference, client.link.version, samples)
        half = SecureClient(client.number, empty, grid, deviation, self.identity, self.run)
        half.take(self.message)
        return half

    def _agreed(self, privacy: PrivacySettings, noise: float | None, samples: Mapping[int, int]) -> float:
        """The noise that the server names; raises :class:`MaskingError` where that is less than the config asks for."""
        number, known = self.client.number, self.identity.directory if self.identity is not None else samples
        if strange := sorted(samples.keys() - known.keys()):  # with more clients each adds less
            raise MaskingError(
                f"client {number} is to share the noise with client {strange[0]}, who has no part in this run"
            )
        multiplier = privacy.noise_multiplier or self._noise_of_budget(privacy)
        asked = multiplier / math.sqrt(fewest(len(samples), self.config["min_clients"]))
        if noise is None or not asked <= noise < math.inf:
            raise MaskingError(
                f"client {number} is told to add noise of {noise or 0:.4g} times the clip, and what it has agreed to asks for "
                f"{asked:.4g}"
            )
        return noise

    def _noise_of_budget(self, privacy: PrivacySettings) -> float:
        """The least noise multiplier that the budget allows, but for what two machines may find apart."""
        assert privacy.epsilon is not None
        rounds = self.config["epochs"]
        tells = min(rounds, self.client.strategy.exchange_rounds or rounds)  # as the coordinator's engine has it
        return noise_for(privacy.epsilon, tells, privacy.delta) * (1 - 2 * PRECISION)

    def _read(self, request: bytes) -> tuple[str, bytes]:
        try:
            step, content = msgpack.unpackb(request, raw=False, max_array_len=2, max_ext_len=0)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise MessageError("malformed", f"{len(request)} bytes are no step of a secure sum: {error}") from error
        if step not in STEPS or not isinstance(content, bytes):
            raise MessageError("malformed", f"{len(request)} bytes are no step of a secure sum")
        return step, content


def _deviation(noise: float, norm_of: Any, name: str) -> float:
    return float(noise * norm_of(name))
