"""Secure aggregation: a server learns the sum of its clients' vectors and who is in it, and of no client more.

Bonawitz et al., CCS 2017, in the form for a server that is curious and follows the protocol, on the sparse graph of Bell et
al., CCS 2020. Client and server exchange bytes in four steps; anybody may fall silent after any of them:

1. keys: every client has two fresh pairs (X25519), one to seal shares with, one that masks are made of, and signs both;
2. shares: it deals its mask key and a seed of its own out to its neighbours, sealed (Shamir, ChaCha20-Poly1305);
3. masked: it sends its vector plus a mask of its seed, plus or minus a mask per neighbour that both can make (AES-CTR);
4. unmasking: of neighbours that have sent, it gives its share of the seed, of those that have not, that of the mask key;
   never both, and only if enough have sent. The server takes the masks off the sum.

Everything is drawn anew by the operating system for every round, also one that is repeated: nothing is ever revealed twice
under one mask.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from recbole_fedkd.errors import InputError
from recbole_fedkd.privacy.identity import Identity, MaskingError
from recbole_fedkd.privacy.shamir import SHARE_BYTES, secret_of, shares_of

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    raise InputError(
        "secure_aggregation needs the package cryptography, which is not installed; install recbole-fedkd[secagg]"
    ) from error

Vector = NDArray[np.signedinteger[Any]]

LEAST = 3
"""With two clients each knows the other's vector from the sum and its own; with one the sum is the vector."""

_STEPS = ("shares", "masked", "unmasking")


def neighbours_of(clients: Sequence[int], degree: int) -> dict[int, list[int]]:
    """A graph in which each has about ``degree`` neighbours: a circle in a random order, everybody tied to those next to it."""
    order = list(clients)
    random.SystemRandom().shuffle(order)
    reach = min(math.ceil(degree / 2), len(order) // 2)
    tied: dict[int, set[int]] = {client: set() for client in order}
    for place, client in enumerate(order):
        for step in range(1, reach + 1):
            other = order[(place + step) % len(order)]
            if other != client:
                tied[client].add(other)
                tied[other].add(client)
    return {client: sorted(others) for client, others in tied.items()}


@lru_cache
def usual_degree(clients: int) -> int:
    """Neighbours with which a round is lost once in a thousand, or less, where three in ten clients are.

    So many that each keeps more than half of its own (a hypergeometric tail, as Bell et al. choose it), and 8 log2 n at least.
    """
    degree, left = 2 * math.ceil(4 * math.log2(max(clients, 2))), clients - int(0.3 * clients)
    while degree < clients - 1 and clients * hypergeom.cdf(degree // 2, clients - 1, left - 1, degree) > 1e-3:
        degree += 2
    return min(clients - 1, degree)


class MaskingClient:
    """A client's half of one round; made anew for each.

    Args:
        number: of the client.
        least_share: share of its neighbours that must be there to unmask; above one half no server that lies about who is
            missing gets both secrets of a client.
        identity: by which it signs its keys, and knows whether neighbours have signed theirs; None: the server is believed.
        round_of: what tells the round from all others, and is signed too.
    """

    def __init__(
        self, number: int, least_share: float = 0.5, identity: Identity | None = None, round_of: bytes = b""
    ) -> None:
        self.number, self.least_share, self.identity, self.round_of = number, least_share, identity, round_of
        self._sealing, self._masking = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = os.urandom(32)
        self._public: dict[int, tuple[bytes, bytes]] = {}
        self._held: dict[int, bytes] = {}
        self._done = 0

    def keys(self) -> bytes:
        """Step 1: the public keys, and its signature on them."""
        keys = _public_bytes(self._sealing), _public_bytes(self._masking)
        return _packed([[*keys, self.identity.signed(self.round_of, b"".join(keys)) if self.identity else b""]])

    def shares(self, keys_of_neighbours: bytes) -> bytes:
        """Step 2: sealed shares of both secrets for every neighbour, of whom the server has told the keys."""
        self._enter("shares")
        for number, sealing, masking, signature in _unpacked(keys_of_neighbours, int, bytes, bytes, bytes):
            if self.identity is not None:
                self.identity.check(number, self.round_of, sealing + masking, signature)
            self._public[number] = sealing, masking
        holders = sorted(self._public)
        if len(holders) < LEAST - 1:
            raise MaskingError(
                f"client {self.number} has {len(holders)} neighbours; fewer than {LEAST - 1} hide nobody"
            )
        threshold = threshold_of(len(holders), self.least_share)
        keys = shares_of(self._masking.private_bytes_raw(), holders, threshold)
        seeds = shares_of(self._seed, holders, threshold)
        sealed = []
        for holder in holders:
            nonce = os.urandom(12)
            content = self._cipher(holder).encrypt(nonce, keys[holder] + seeds[holder], _route(self.number, holder))
            sealed.append([holder, nonce + content])
        return _packed(sealed)

    def masked(self, letters: bytes, vector: Vector) -> bytes:
        """Step 3: the vector under its masks; ``letters`` are the shares that neighbours have sealed for this client."""
        self._enter("masked")
        length, word = len(vector), vector.dtype.itemsize
        total = vector.view(f"u{word}") + stream(self._seed, length, word)
        for sender, sealed in _unpacked(letters, int, bytes):
            if sender not in self._public:
                raise MaskingError(f"client {self.number} is to hold a share of client {sender}, who is no neighbour")
            try:
                content = self._cipher(sender).decrypt(sealed[:12], sealed[12:], _route(sender, self.number))
            except InvalidTag as error:
                raise MaskingError(
                    f"the share that client {sender} sealed for client {self.number} was changed"
                ) from error
            self._held[sender] = content
            mask = pair_mask(self._masking, self._public[sender][1], length, word)
            total = total + mask if self.number < sender else total - mask
        self._check_enough(len(self._held))
        masked: bytes = total.astype(f"<u{word}").tobytes()
        return masked

    def unmasking(self, senders: bytes) -> bytes:
        """Step 4: one share of every neighbour whose shares it holds; ``senders`` are the numbers of those that have sent."""
        self._enter("unmasking")
        sent = set(_unpacked(senders))
        self._check_enough(len(sent & self._held.keys()))
        return _packed(
            [
                [number, share[SHARE_BYTES:] if number in sent else share[:SHARE_BYTES]]
                for number, share in self._held.items()
            ]
        )

    def _check_enough(self, there: int) -> None:
        needed = threshold_of(len(self._public), self.least_share)
        if there < needed:
            raise MaskingError(f"client {self.number} has {there} neighbours left and needs {needed}")

    def _enter(self, step: str) -> None:
        """Each step once and in order: a second answer would be one under the same masks."""
        if _STEPS.index(step) != self._done:
            raise MaskingError(
                f"client {self.number} was asked for '{step}' out of turn; a round is never answered twice"
            )
        self._done += 1

    def _cipher(self, other: int) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(_derived(self._sealing, self._public[other][0], b"recbole-fedkd seal"))


class MaskingServer:
    """The server's half of one round.

    Args:
        length: of the vectors.
        word: bytes of one of their numbers, 2, 4 or 8; sums must fit into them.
        least: clients that must be in the sum, 3 or more.
        least_share: as of :class:`MaskingClient`.
        degree: neighbours of a client; None: as many as :func:`usual_degree` says.

    Attributes:
        summed: the clients that are in the sum.
    """

    def __init__(
        self, length: int, least: int = LEAST, least_share: float = 0.5, degree: int | None = None, word: int = 8
    ) -> None:
        self.word = word
        self.length, self.least, self.least_share, self.degree = length, max(least, LEAST), least_share, degree
        self.summed: list[int] = []
        self._public: dict[int, tuple[bytes, bytes]] = {}
        self._signed: dict[int, bytes] = {}
        self._tied: dict[int, list[int]] = {}
        self._shared: set[int] = set()
        self._total = np.zeros(length, f"u{word}")

    def keys(self, keys: Mapping[int, bytes]) -> dict[int, bytes]:
        """After step 1: to each client the keys of its neighbours."""
        self._check(keys, "sent keys")
        for number, pairs in keys.items():
            for sealing, masking, signature in _unpacked(pairs, bytes, bytes, bytes):
                self._public[number], self._signed[number] = (sealing, masking), signature
        degree = self.degree if self.degree is not None else usual_degree(len(keys))
        self._tied = neighbours_of(sorted(keys), degree)
        return {
            client: _packed([[other, *self._public[other], self._signed[other]] for other in others])
            for client, others in self._tied.items()
        }

    def shares(self, sealed: Mapping[int, bytes]) -> dict[int, bytes]:
        """After step 2: to each client what its neighbours have sealed for it."""
        self._check(sealed, "sent shares")
        self._shared = set(sealed)
        letters: dict[int, list[list[Any]]] = {number: [] for number in sealed}
        for sender, shares in sealed.items():
            for holder, content in _unpacked(shares, int, bytes):
                if holder in letters and holder in self._tied[sender]:
                    letters[holder].append([sender, content])
        return {number: _packed(each) for number, each in letters.items()}

    def masked(self, vectors: Mapping[int, bytes]) -> dict[int, bytes]:
        """After step 3: to each client that has sent, who else has."""
        self._check(vectors, "sent a masked vector")
        for number, content in vectors.items():
            if number not in self._shared or len(content) != self.word * self.length:
                raise MaskingError(
                    f"client {number} has sent {len(content)} bytes where {self.word * self.length} were due"
                )
            self._total += np.frombuffer(content, f"<u{self.word}")
        self.summed = sorted(vectors)
        there = {number: [other for other in self._tied[number] if other in vectors] for number in vectors}
        return {number: _packed(others) for number, others in there.items()}

    def unmasked(self, shares: Mapping[int, bytes]) -> Vector:
        """After step 4: the sum.

        Raises:
            MaskingError: too few shares of a client's secret have come; nothing is known then.
        """
        held: dict[int, dict[int, bytes]] = {number: {} for number in self._shared}
        for holder, packed in shares.items():
            for owner, share in _unpacked(packed, int, bytes):
                if owner in held and holder in self._tied[owner]:
                    held[owner][holder] = share
        secret = {owner: self._secret(owner, each) for owner, each in held.items() if self._is_needed(owner)}
        total, there = self._total.copy(), set(self.summed)
        for owner in self.summed:
            total -= stream(secret[owner], self.length, self.word)
        for owner in self._shared - there:
            if owner not in secret:
                continue
            key = X25519PrivateKey.from_private_bytes(secret[owner])
            if _public_bytes(key) != self._public[owner][1]:
                raise MaskingError(f"the shares of client {owner} give another key than it has told")
            for other in there.intersection(self._tied[owner]):
                mask = pair_mask(key, self._public[other][1], self.length, self.word)
                # The other has added it where its number is the smaller one.
                total = total - mask if other < owner else total + mask
        return total.view(f"i{self.word}").astype(np.int64)

    def _is_needed(self, owner: int) -> bool:
        """Whether masks of a client are in the sum: its own, or those that its neighbours share with it."""
        return owner in self.summed or bool(set(self._tied[owner]) & set(self.summed))

    def _secret(self, owner: int, shares: Mapping[int, bytes]) -> bytes:
        needed = threshold_of(len(self._tied[owner]), self.least_share)
        if len(shares) < needed:
            raise MaskingError(
                f"secure aggregation: {len(shares)} neighbours of client {owner} are left to unmask, {needed} are needed; "
                "nothing is revealed, and the round is not counted"
            )
        first = dict(sorted(shares.items())[:needed])
        secret = secret_of(first)
        if secret is None:
            raise MaskingError(f"secure aggregation: the shares of client {owner} do not fit each other")
        return secret

    def _check(self, there: Iterable[int], what: str) -> None:
        count = len(set(there))
        if count < self.least:
            raise MaskingError(
                f"secure aggregation: {count} clients have {what}, {self.least} are needed; nothing is revealed, and the round "
                "is not counted"
            )


def threshold_of(holders: int, least_share: float) -> int:
    """Shares that give a secret back: more than a share of all that there are."""
    return min(holders, math.floor(holders * least_share) + 1)


def stream(key: bytes, length: int, word: int = 8) -> NDArray[Any]:
    """Numbers of ``word`` bytes that only who has the key can tell from random ones: AES-256 in counter mode."""
    # A key makes one stream in its life, so that the counter may start at 0.
    made = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(word * length))
    return np.frombuffer(made, f"<u{word}").astype(f"u{word}", copy=False)


def pair_mask(key: X25519PrivateKey, other: bytes, length: int, word: int = 8) -> NDArray[Any]:
    """The mask that two clients have in common, of the key of one and the public key of the other."""
    return stream(_derived(key, other, b"recbole-fedkd mask"), length, word)


def _derived(key: X25519PrivateKey, other: bytes, use: bytes) -> bytes:
    """What two clients have in common for one use; raises :class:`MaskingError` for bytes that are no public key."""
    try:
        agreed = key.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise MaskingError(f"secure aggregation: {len(other)} bytes are no public key: {error}") from error
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=use).derive(agreed)


def _route(sender: int, holder: int) -> bytes:
    return f"{sender} to {holder}".encode()


def _public_bytes(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _packed(content: Any) -> bytes:
    made: bytes = msgpack.packb(content, use_bin_type=True)
    return made


def _unpacked(packed: bytes, *kinds: type) -> list[Any]:
    """A list out of somebody else's bytes, each entry a row of these types; without types each is a number."""
    try:
        rows = msgpack.unpackb(packed, raw=False, max_array_len=2**20, max_ext_len=0)
        for row in rows if isinstance(rows, list) else [None]:
            parts, due = (row, kinds) if kinds else ([row], (int,))
            if not isinstance(parts, list) or tuple(map(type, parts)) != due:
                raise ValueError("it is not what this step sends")
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise MaskingError(f"secure aggregation: {len(packed)} bytes are no answer: {error}") from error
    return list(rows)
