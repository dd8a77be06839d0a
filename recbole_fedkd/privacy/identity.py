"""Who is who under masks: a client signs its keys of a round, and whoever hears them looks whether it has (Ed25519).

The server carries public keys from client to client. One that put its own in their place could open the shares that clients
seal for each other, and take off their masks. It cannot sign in a client's name: whose key is whose stands in a directory that
clients have from elsewhere, parties of their manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from recbole_fedkd.errors import InputError, TrainingError

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
except ImportError as error:
    raise InputError(
        "secure_aggregation needs the package cryptography, which is not installed; install recbole-fedkd[secagg]"
    ) from error

_USE = b"recbole-fedkd keys of a round\0"


class MaskingError(TrainingError):
    """The round cannot be finished, and nothing of any client's vector is known."""


@dataclass(frozen=True)
class Identity:
    """A client's own key, and everybody's public ones.

    Attributes:
        number: of the client.
        own: its private key, 32 bytes.
        directory: public keys of 32 bytes, by client; no server has a hand in it.
    """

    number: int
    own: bytes
    directory: Mapping[int, bytes]

    def signed(self, round_of: bytes, keys: bytes) -> bytes:
        """The client's signature, 64 bytes, on keys of a round; ``round_of``: what tells the round from all others."""
        return Ed25519PrivateKey.from_private_bytes(self.own).sign(_said(self.number, round_of, keys))

    def check(self, number: int, round_of: bytes, keys: bytes, signature: bytes) -> None:
        """Raise :class:`MaskingError` for keys that client ``number`` has not signed for this round."""
        if not is_signed(self.directory, round_of, number, keys, signature):
            raise MaskingError(
                f"client {self.number} was told keys of client {number} that client {number} has not signed for this round"
            )


def new_identities(numbers: Iterable[int]) -> dict[int, Identity]:
    """Identities of clients that all know each other."""
    drawn = {number: Ed25519PrivateKey.generate() for number in numbers}
    directory = {number: key.public_key().public_bytes_raw() for number, key in drawn.items()}
    return {number: Identity(number, key.private_bytes_raw(), directory) for number, key in drawn.items()}


def is_signed(directory: Mapping[int, bytes], round_of: bytes, number: int, keys: bytes, signature: bytes) -> bool:
    """Whether a client of a directory has signed keys for a round."""
    try:
        Ed25519PublicKey.from_public_bytes(directory[number]).verify(signature, _said(number, round_of, keys))
    except (KeyError, InvalidSignature):
        return False
    return True


def public_key(own: bytes) -> bytes:
    """The public key of a private one; raises ValueError for bytes that are none."""
    return Ed25519PrivateKey.from_private_bytes(own).public_key().public_bytes_raw()


def _said(number: int, round_of: bytes, keys: bytes) -> bytes:
    return _USE + number.to_bytes(8, "big") + len(round_of).to_bytes(8, "big") + round_of + keys
