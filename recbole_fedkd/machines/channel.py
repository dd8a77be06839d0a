"""A channel: messages over a socket, each behind its length, after both ends have said who they are.

The one that comes says a fixed word, the other says it again, and with a key both prove that they know it (HMAC of SHA-256 over
a nonce of each) before anything else is read. Over TLS the one that comes knows whom it speaks to by a certificate.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from time import monotonic

from recbole_fedkd.errors import InputError
from recbole_fedkd.files import read_bytes

LONGEST = 2**31 - 1
"""Bytes of the longest message that is read."""

_WORD = b"recbole-fedkd/1\n"
_SPEAK_TLS = b"speak TLS to me\n"
_HANDSHAKE = b"\x16"  # the first byte of whoever speaks TLS
_NONCE = 32
_STALLED = 60.0
_OPENING_SECONDS = 20.0
_CHUNK = 2**20


class StrangerError(Exception):
    """The other end is none of this federation; says why in half a sentence."""


Address = str | tuple[str, int]


def read_address(text: str) -> Address:
    """Where a server listens: ``unix:<file>`` or ``<host>:<port>``.

    Raises:
        InputError: it is neither.
    """
    if text.startswith("unix:") and len(text) > 5:
        if len(os.fsencode(text[5:])) > 100:
            raise InputError(f"address '{text}' is longer than the system allows for a socket; take a shorter path")
        return text[5:]
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise InputError(f"address '{text[:200]}' must be unix:<file> or <host>:<port>")
    return host.strip("[]"), int(port)


def read_key(file: str | Path | None) -> bytes | None:
    """The key that parties and server share; None: there is none.

    Raises:
        InputError: the file cannot be read, or is too short to be a secret.
    """
    if file is None:
        return None
    key = read_bytes(file, "key").strip()
    if len(key) < 16:
        raise InputError(
            f"key '{file}' holds {len(key)} bytes; it must be 16 at least, such as of: openssl rand -hex 32"
        )
    return key


def server_tls(certificate: str | None, private_key: str | None) -> ssl.SSLContext | None:
    """How a server shows who it is; None: it does not, and nothing is encrypted.

    Args:
        certificate: PEM file of its certificate.
        private_key: PEM file of the certificate's private key.

    Raises:
        InputError: one without the other, or no such files.
    """
    if certificate is None and private_key is None:
        return None
    if certificate is None or private_key is None:
        raise InputError("TLS needs both --certificate and --private-key; one of them is missing")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, private_key)
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"certificate '{certificate}' and private key '{private_key}' cannot be used: {error.strerror or error}"
        ) from error
    return context


def client_tls(authority: str | None) -> ssl.SSLContext | None:
    """Whom a party believes; None: nothing is encrypted.

    Args:
        authority: PEM file of who has signed the server's certificate, or of that certificate itself.

    Raises:
        InputError: no such file.
    """
    if authority is None:
        return None
    try:
        return ssl.create_default_context(cafile=authority)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"authority '{authority}' cannot be used: {error.strerror or error}") from error


class Channel:
    """One end of a connection.

    A message that has begun comes, and is taken, without long pauses, or the connection counts as lost.

    Args:
        connection: a connected socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        with suppress(OSError):  # a machine that vanished without a word is noticed within minutes
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4), ("TCP_NODELAY", 1)):
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: bytes) -> None:
        """Send a message; raises OSError where the other end does not take it."""
        self._socket.settimeout(_STALLED)
        self._socket.sendall(len(message).to_bytes(8, "big"))
        view = memoryview(message)
        for start in range(0, len(view), _CHUNK):  # else the time for all of it would be that for one piece
            self._socket.sendall(view[start : start + _CHUNK])

    def receive(self, longest: int = LONGEST, patience: float | None = None) -> bytes:
        """The next message.

        Args:
            longest: bytes that it may have.
            patience: seconds that it may take altogether; None: it is waited for, and once it has begun it may not stall.

        Raises:
            OSError: nothing, too much, or not all of it came.
        """
        end = None if patience is None else monotonic() + patience
        length = int.from_bytes(self._read(8, end, waits=True), "big")
        if length > longest:
            raise OSError(f"a message of {length} bytes is not read here")
        return self._read(length, end)

    def _read(self, count: int, end: float | None, waits: bool = False) -> bytes:
        """So many bytes; ``waits``: the first may take as long as it likes."""
        received = bytearray()
        while len(received) < count:
            left = _STALLED if end is None else min(_STALLED, end - monotonic())
            if left <= 0:
                raise TimeoutError("it is too slow")
            self._socket.settimeout(None if waits and end is None and not received else left)
            more = self._socket.recv(min(count - len(received), _CHUNK))
            if not more:
                raise OSError("it went away")
            received += more
        return bytes(received)

    def raw(self, send: bytes = b"", count: int = 0) -> bytes:
        """Bytes without a length, for what is said before messages are."""
        self._socket.settimeout(_OPENING_SECONDS)
        self._socket.sendall(send)
        return self._read(count, monotonic() + _OPENING_SECONDS)

    def close(self) -> None:
        """Cut the connection, also for a thread that waits for it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._socket.close()


def _proof(key: bytes, who: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, who + nonces, hashlib.sha256)


def let_in(connection: socket.socket, key: bytes | None, tls: ssl.SSLContext | None) -> Channel:
    """The server's side of a beginning.

    Raises:
        StrangerError: whoever has come does not know the key, or is no party.
        OSError: it went away, or is too slow.
    """
    connection.settimeout(_OPENING_SECONDS)
    if tls is not None and connection.recv(1, socket.MSG_PEEK) == _HANDSHAKE:
        try:
            connection, tls = tls.wrap_socket(connection, server_side=True), None
        except ssl.SSLError as error:
            raise StrangerError(
                f"it does not believe the certificate, or speaks another TLS: {error.reason}"
            ) from error
    channel = Channel(connection)
    word = channel.raw(count=len(_WORD))
    channel.raw(_WORD if tls is None else _SPEAK_TLS)
    if tls is not None:
        raise StrangerError("it does not speak TLS")
    if word != _WORD:
        raise StrangerError("it is no party, or it speaks TLS" if word.startswith(_HANDSHAKE) else "it is no party")
    if key is None:
        channel.raw(b"\0" * _NONCE)
        return channel
    own = os.urandom(_NONCE)
    theirs = channel.raw(own, _NONCE + 32)
    nonces = own + theirs[:_NONCE]
    known = hmac.compare_digest(theirs[_NONCE:], _proof(key, b"party", nonces))
    # Whoever does not know it gets an answer of the same length that proves nothing.
    channel.raw(_proof(key, b"server", nonces) if known else b"\0" * 32)
    if not known:
        raise StrangerError("it does not know the key")
    return channel


def go_to(connection: socket.socket, key: bytes | None, tls: ssl.SSLContext | None, host: str, server: str) -> Channel:
    """The party's side of a beginning.

    Args:
        connection: to the server.
        key: that both know; None: there is none.
        tls: whom the party believes; None: nothing is encrypted.
        host: that the certificate must be of.
        server: what sentences call the server.

    Raises:
        InputError: the server is another than was meant; to try again would not help.
        OSError: it went away, or is too slow.
    """
    connection.settimeout(_OPENING_SECONDS)
    if tls is not None:
        try:
            connection = tls.wrap_socket(connection, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            raise InputError(f"{server} shows a certificate that is not believed: {error.verify_message}") from error
        except ssl.SSLEOFError:
            raise
        except ssl.SSLError as error:
            raise InputError(f"{server} does not speak TLS as this party does: {error.reason}") from error
    channel = Channel(connection)
    word = channel.raw(_WORD, len(_WORD))
    if word == _SPEAK_TLS:
        raise InputError(f"{server} speaks TLS; name who has signed its certificate by --authority")
    if word != _WORD:
        raise InputError(f"{server} is no coordinator of this package")
    theirs = channel.raw(count=_NONCE)
    if key is None:
        if any(theirs):
            raise InputError(f"{server} asks for a key; name it by --secret")
        return channel
    if not any(theirs):
        raise InputError(f"{server} and this party do not share a key: it has none")
    own = os.urandom(_NONCE)
    answer = channel.raw(own + _proof(key, b"party", theirs + own), 32)
    if not hmac.compare_digest(answer, _proof(key, b"server", theirs + own)):
        raise InputError(f"{server} and this party do not share a key")
    return channel


def clear_socket(file: str) -> None:
    """Take the Unix socket away that one who was killed has left at ``file``; nothing else.

    Raises:
        InputError: a file of another kind lies there, or somebody listens.
    """
    if not os.path.lexists(file):
        return
    if not Path(file).is_socket():
        raise InputError(f"address '{file}' is a file or folder of another kind; name one that is not there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as somebody:
        somebody.settimeout(5)
        try:
            somebody.connect(file)
        except ConnectionRefusedError:
            Path(file).unlink(missing_ok=True)
            return
        except OSError:
            pass  # it is too busy to be asked, or not for us
    raise InputError(f"somebody listens at address '{file}'; end that first, or name another")
