"""Who believes whom in a federation, and what of it cannot be used, which is known before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from recbole_fedkd.errors import InputError
from recbole_fedkd.machines.channel import client_tls, read_address, read_key, server_tls

SCHEME = "flower:"
"""What the address of a SuperLink begins with."""


@dataclass(frozen=True)
class Trust:
    """Who believes whom, and why.

    Attributes:
        secret: file of the key that coordinator and parties must know; None: whoever reaches the address is heard.
        certificate: PEM file by which the coordinator shows who it is; None: it does not, and nothing is encrypted.
        private_key: PEM file of the certificate's key.
        authority: PEM file of who has signed it, which a party believes.
        node_key: file of the private key by which a SuperLink knows a party.
    """

    secret: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    authority: str | None = None
    node_key: str | None = None

    def check_coordinator(self, address: str) -> None:
        """Raise :class:`InputError` where a coordinator cannot listen at this address by this trust."""
        if address.startswith(SCHEME):
            if self.secret or self.certificate or self.private_key:
                raise InputError(
                    "a SuperLink has keys and a certificate of its own; name who has signed it by --authority alone"
                )
            superlink_address(address.removeprefix(SCHEME))
            return
        if self.authority:
            raise InputError(
                "--authority is of a SuperLink's certificate; here --certificate and --private-key show who is who"
            )
        read_address(address)
        read_key(self.secret)
        server_tls(self.certificate, self.private_key)

    def check_party(self, address: str) -> None:
        """Raise :class:`InputError` where a party cannot go to this address by this trust."""
        if not address.startswith(SCHEME):
            if self.node_key:
                raise InputError("--node-key is of a node of a SuperLink; here --secret tells a party from strangers")
            read_address(address)
            read_key(self.secret)
            client_tls(self.authority)
            return
        if self.secret:
            raise InputError("a SuperLink asks for no --secret, but knows a party by its --node-key")
        if isinstance(read_address(address.removeprefix(SCHEME)), str) and self != Trust():
            raise InputError(
                "behind a node of Flower's own a party has no --authority and --node-key: they are the node's"
            )


def superlink_address(text: str) -> tuple[str, int]:
    """Where a SuperLink listens; raises :class:`InputError` where none can."""
    listening = read_address(text)
    if isinstance(listening, str):
        raise InputError(f"a SuperLink listens at <host>:<port>, not at '{text}'")
    return listening
