"""Secure aggregation: a server learns the sum of its clients' vectors and who is in it, and of no client more.

Bonawitz et al., CCS 2017, in the form for a server that is curious and follows the protocol, on the sparse graph of Bell et
al., CCS 2020. Client and server exchange bytes in four steps; anybody may fall silent after any of them, and whose answer is
none has:

1. keys: every client has two fresh pairs (X25519), one to seal shares with, one that masks are made of, and a seed, of which
   it tells a digest, and signs all three;
2. shares: it deals its mask key and the seed out to its neighbours, sealed (Shamir, ChaCha20-Poly1305), and tells digests of
   the shares, so that who opens one, and the server that is given it, knows whether it is one;
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NoReturn, TypeVar

import msgpack
import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from recbole_fedkd.privacy.identity import Identity, MaskingError  # first: says so where cryptography is not installed
from recbole_fedkd.privacy.settings import LEAST
from recbole_fedkd.privacy.shamir import SHARE_BYTES, secret_of, shares_of

# isort: split
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Vector = NDArray[np.signedinteger[Any]]

_STEPS = ("shares", "masked", "unmasking")
_Answer = TypeVar("_Answer")
_KEYS = (bytes, bytes, bytes, bytes)
_DIGEST, _SEALED = 16, 12 + 2 * SHARE_BYTES + 16
"""Bytes of a share's digest, and of two sealed shares, with nonce and tag."""


def neighbours_of(clients: Sequence[int], degree: int) -> dict[int, list[int]]:
    """A graph in which each has about ``degree`` neighbours: a circle in a random order, everybody tied to those next to it."""
    order = list(clients)
    random.SystemRandom().shuffle(order)
    reach = min(math.ceil(degree / 2), len(order) // 2)
    tied: dict[int, set[int]] = {client: set() for client in order}
    for position, client in enumerate(order):
        for step in range(1, reach + 1):
            other = order[(position + step) % len(order)]
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
        """Step 1: the public keys, what tells the seed, and its signature on them."""
        keys = _public_bytes(self._sealing), _public_bytes(self._masking), _digest(self._seed, 32)
        return _packed([[*keys, self.identity.signed(self.round_of, b"".join(keys)) if self.identity else b""]])

    def shares(self, keys_of_neighbours: bytes) -> bytes:
        """Step 2: sealed shares of both secrets for every neighbour, of whom the server has told the keys."""
        self._enter("shares")
        for number, sealing, masking, seed, signature in _unpacked(keys_of_neighbours, int, *_KEYS):
            if self.identity is not None:
                self.identity.check(number, self.round_of, sealing + masking + seed, signature)
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
            nonce, shares = os.urandom(12), keys[holder] + seeds[holder]
            content = self._cipher(holder).encrypt(nonce, shares, _route(self.number, holder))
            sealed.append([holder, nonce + content, _digests(shares)])
        return _packed(sealed)

    def masked(self, letters: bytes, vector: Vector) -> bytes:
        """Step 3: the vector under its masks; ``letters`` are the shares that neighbours have sealed for this client."""
        self._enter("masked")
        length, word = len(vector), vector.dtype.itemsize
        total = vector.view(f"u{word}") + stream(self._seed, length, word)
        for sender, sealed, digests in _unpacked(letters, int, bytes, bytes):
            if sender not in self._public:
                raise MaskingError(f"client {self.number} is to hold a share of client {sender}, who is no neighbour")
            try:
                content = self._cipher(sender).decrypt(sealed[:12], sealed[12:], _route(sender, self.number))
            except (InvalidTag, ValueError):
                content = b""
            if len(content) == 2 * SHARE_BYTES and _digests(content) == digests:
                self._held[sender] = content
            # Also with who has sealed no share: it adds the same mask, and others may hold shares of it.
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
        signed: given a client, its keys and its signature, says whether it has signed them for this round; None: nobody asks.
        least: clients that must be in the sum, 3 or more.
        least_share: as of :class:`MaskingClient`.
        degree: neighbours of a client; None: as many as :func:`usual_degree` says.

    Attributes:
        summed: the clients that are in the sum.
        faults: client to what was wrong with its answer, by which it has fallen silent.
        spoiling: clients whose shares give no secret, so that no sum with them can be unmasked.
    """

    def __init__(
        self,
        length: int,
        least: int = LEAST,
        least_share: float = 0.5,
        degree: int | None = None,
        word: int = 8,
        signed: Callable[[int, bytes, bytes], bool] | None = None,
    ) -> None:
        self.word, self.signed = word, signed
        self.length, self.least, self.least_share, self.degree = length, max(least, LEAST), least_share, degree
        self.summed: list[int] = []
        self.faults: dict[int, str] = {}
        self.spoiling: set[int] = set()
        self._public: dict[int, list[bytes]] = {}
        self._tied: dict[int, list[int]] = {}
        self._shared: dict[int, dict[int, list[bytes]]] = {}
        self._total = np.zeros(length, f"u{word}")

    def keys(self, keys: Mapping[int, bytes]) -> dict[int, bytes]:
        """After step 1: to each client the keys of its neighbours."""
        self._public = self._taken(keys, self._keys_of)
        self._check(self._public, "sent keys")
        degree = self.degree if self.degree is not None else usual_degree(len(self._public))
        self._tied = neighbours_of(sorted(self._public), degree)
        return {
            client: _packed([[other, *self._public[other]] for other in others])
            for client, others in self._tied.items()
        }

    def _keys_of(self, number: int, packed: bytes) -> list[bytes]:
        rows = _unpacked(packed, *_KEYS)
        if len(rows) != 1 or len(rows[0][2]) != 32:
            raise MaskingError(f"secure aggregation: {len(packed)} bytes are no keys")
        *keys, signature = rows[0]
        for key in keys[:2]:  # one that agrees with nobody would stop all who are told it
            _derived(X25519PrivateKey.generate(), key, b"")
        if self.signed is not None and not self.signed(number, b"".join(keys), signature):
            raise MaskingError(f"client {number} has not signed its keys for this round")
        return [*keys, signature]

    def shares(self, sealed: Mapping[int, bytes]) -> dict[int, bytes]:
        """After step 2: to each client what its neighbours have sealed for it."""
        self._shared = self._taken(sealed, self._dealt_by)
        self._check(self._shared, "sent shares")
        return {
            holder: _packed(
                [[sender, *self._shared[sender][holder]] for sender in self._tied[holder] if sender in self._shared]
            )
            for holder in self._shared
        }

    def _dealt_by(self, sender: int, packed: bytes) -> dict[int, list[bytes]]:
        rows = _unpacked(packed, int, bytes, bytes)
        if [holder for holder, *_ in rows] != self._tied.get(sender) or any(
            (len(content), len(digests)) != (_SEALED, 2 * _DIGEST) for _, content, digests in rows
        ):
            raise MaskingError(f"client {sender} does not deal a share to each of its neighbours")
        return {holder: parts for holder, *parts in rows}

    def masked(self, vectors: Mapping[int, bytes]) -> dict[int, bytes]:
        """After step 3: to each client that has sent, who else has."""
        taken = self._taken(vectors, self._vector_of)
        self._check(taken, "sent a masked vector")
        for vector in taken.values():
            self._total += vector
        self.summed = sorted(taken)
        return {number: _packed([other for other in self._tied[number] if other in taken]) for number in taken}

    def _vector_of(self, number: int, content: bytes) -> NDArray[Any]:
        due = self.word * self.length
        if number not in self._shared or len(content) != due:
            raise MaskingError(f"client {number} has sent {len(content)} bytes where {due} were due")
        return np.frombuffer(content, f"<u{self.word}")

    def unmasked(self, shares: Mapping[int, bytes]) -> Vector:
        """After step 4: the sum.

        Raises:
            MaskingError: too few shares of a client's secret have come, or none of one; nothing is known then.
        """
        opened, secret, failed = self._taken(shares, self._given_by), {}, []
        for owner in filter(self._is_needed, self._shared):
            try:
                secret[owner] = self._secret(owner, opened)
            except MaskingError as error:  # who else spoils the sum is found, too
                failed.append(error)
        if failed:
            raise failed[0]
        total, there = self._total.copy(), set(self.summed)
        for owner in self.summed:
            total -= stream(secret[owner], self.length, self.word)
        for owner in secret.keys() - there:
            key = X25519PrivateKey.from_private_bytes(secret[owner])
            for other in there.intersection(self._tied[owner]):
                mask = pair_mask(key, self._public[other][1], self.length, self.word)
                # The other has added it where its number is the smaller one.
                total = total - mask if other < owner else total + mask
        return total.view(f"i{self.word}").astype(np.int64)

    def _given_by(self, holder: int, packed: bytes) -> dict[int, bytes]:
        rows = _unpacked(packed, int, bytes)
        for owner, share in rows:
            dealt, begin = self._shared.get(owner, {}).get(holder), _DIGEST * (owner in self.summed)
            if dealt is None or _digest(share, _DIGEST) != dealt[1][begin : begin + _DIGEST]:
                raise MaskingError(f"client {holder} gives a share of client {owner} that is none")
        return dict(rows)

    def _is_needed(self, owner: int) -> bool:
        """Whether masks of a client are in the sum: its own, or those that its neighbours share with it."""
        return owner in self.summed or bool(set(self._tied[owner]) & set(self.summed))

    def _secret(self, owner: int, opened: Mapping[int, Mapping[int, bytes]]) -> bytes:
        """A client's seed, or its mask key where it is not in the sum, of what holders have given."""
        there = [opened[holder] for holder in self._tied[owner] if holder in opened]
        shares = {holder: opened[holder][owner] for holder in self._tied[owner] if owner in opened.get(holder, ())}
        needed = threshold_of(len(self._tied[owner]), self.least_share)
        if len(shares) < needed <= len(there):
            self._spoils(
                owner, f"only {len(shares)} neighbours of client {owner} could open the share that it dealt them"
            )
        if len(shares) < needed:
            raise MaskingError(
                f"secure aggregation: {len(shares)} neighbours of client {owner} are left to unmask, {needed} are needed; "
                "nothing is revealed, and the round is not counted"
            )
        secret = secret_of(dict(sorted(shares.items())[:needed]))
        if secret is None or not self._has_told(owner, secret):
            self._spoils(owner, f"the shares of client {owner} do not fit each other")
        return secret

    def _has_told(self, owner: int, secret: bytes) -> bool:
        """Whether a secret is the one of which a client has told what tells it."""
        if owner in self.summed:
            return _digest(secret, 32) == self._public[owner][2]
        return _public_bytes(X25519PrivateKey.from_private_bytes(secret)) == self._public[owner][1]

    def _spoils(self, owner: int, fault: str) -> NoReturn:
        self.spoiling.add(owner)
        self.faults[owner] = fault
        raise MaskingError(f"secure aggregation: {fault}; nothing is revealed, and the round is not counted")

    def _taken(self, answers: Mapping[int, bytes], read: Callable[[int, bytes], _Answer]) -> dict[int, _Answer]:
        """What clients answer; whose answer is none has fallen silent."""
        taken = {}
        for number, packed in answers.items():
            try:
                taken[number] = read(number, packed)
            except MaskingError as error:
                self.faults[number] = str(error)
        return taken

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
    numbers = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(word * length))
    return np.frombuffer(numbers, f"<u{word}").astype(f"u{word}", copy=False)


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


def _digest(secret: bytes, size: int) -> bytes:
    """What tells a secret that nobody can guess, and nothing of it."""
    return blake2b(secret, digest_size=size, person=b"recbole-fedkd").digest()


def _digests(shares: bytes) -> bytes:
    return _digest(shares[:SHARE_BYTES], _DIGEST) + _digest(shares[SHARE_BYTES:], _DIGEST)


def _route(sender: int, holder: int) -> bytes:
    return f"{sender} to {holder}".encode()


def _public_bytes(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _packed(content: Any) -> bytes:
    packed: bytes = msgpack.packb(content, use_bin_type=True)
    return packed


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
