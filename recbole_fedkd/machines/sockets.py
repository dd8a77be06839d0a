"""Sockets between a server and its parties: parties come to the server, over Unix sockets or TCP, and come again when cut off.

Bytes alone travel, each message behind its length; with a key, both sides prove to each other that they know it before
anything is read (HMAC, Python's ``multiprocessing.connection``). Nothing is encrypted.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from logging import getLogger
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge, wait
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.envelope import HELLO, Answer, digest
from recbole_fedkd.federated.message import MessageError

LONGEST = 2**31 - 1
"""Bytes of the longest message that is read."""

_HELLO_SECONDS = 20.0
_LONGEST_HELLO = 65536
_LONGEST_PAUSE = 5.0

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
    return host, int(port)


def read_key(file: str | Path | None) -> bytes | None:
    """The key that parties and server share; None: there is none.

    Raises:
        InputError: the file cannot be read, or is too short to be a secret.
    """
    if file is None:
        return None
    try:
        key = Path(file).read_bytes().strip()
    except OSError as error:
        raise InputError(f"key '{file}' cannot be read: {error.strerror}") from error
    if len(key) < 16:
        raise InputError(
            f"key '{file}' holds {len(key)} bytes; it must be 16 at least, such as of: openssl rand -hex 32"
        )
    return key


class SocketTransport:
    """Where parties come to.

    Args:
        address: to listen at.
        manifest: digest that a party must name.
        key: that parties must know; None: whoever reaches the address is heard.

    Attributes:
        greeted: what each party said of itself when it came last.
        refused: how many came who were not let in.
    """

    def __init__(self, address: Address, manifest: bytes, key: bytes | None = None) -> None:
        self.manifest, self.refused = manifest, 0
        self.greeted: dict[int, Answer] = {}
        self._key = key
        try:
            # Python's Listener would prove keys while it accepts: one stranger who is silent would keep everybody waiting.
            self._listener = Listener(address, backlog=128)
        except OSError as error:
            raise InputError(f"address '{address}' cannot be listened at: {error.strerror or error}") from error
        self._lock = threading.Lock()
        self._connections: dict[int, Connection] = {}
        self._asked: dict[int, bytes] = {}
        self._busy: set[int] = set()
        read, write = os.pipe()
        self._woken, self._wake = Connection(read, writable=False), Connection(write, readable=False)
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> Address:
        """Where it listens; of port 0 the one that was free."""
        found: Address = self._listener.address
        return found

    def _accept(self) -> None:
        while self._open:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError):
                if not self._open:
                    return
                sleep(0.1)
                continue
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: Any) -> None:
        """Let a party in, or nobody."""
        try:
            if self._key is not None:
                _prove(connection, self._key)
            if not connection.poll(_HELLO_SECONDS):
                raise MessageError("silent", "it does not say who it is")
            hello = Answer.from_bytes(connection.recv_bytes(_LONGEST_HELLO))
            if hello.operation != HELLO or hello.party < 0 or not hello.numbers or "samples" not in hello.numbers:
                raise MessageError("kind", "it does not say who it is")
            if hello.request != self.manifest:
                raise MessageError("manifest", f"client {hello.party} has another manifest")
        except AuthenticationError:
            self._turn_away(connection, "it does not know the key")
        except (MessageError, OSError, EOFError) as error:
            self._turn_away(connection, str(error) or "it went away")
        else:
            with self._lock:
                before = self._connections.pop(hello.party, None)
                if before is not None:
                    before.close()
                self._connections[hello.party], self.greeted[hello.party] = connection, hello
                self._busy.discard(hello.party)
            self._wake.send_bytes(b".")

    def _turn_away(self, connection: Any, why: str) -> None:
        self.refused += 1
        getLogger().warning(f"somebody was not let in: {why}")
        with suppress(OSError):
            connection.close()

    def await_parties(self, numbers: set[int], timeout: float) -> set[int]:
        """Wait for parties to come.

        Args:
            numbers: of the parties.
            timeout: seconds after which nobody is waited for any more.

        Returns:
            Those of them that have come at some time.
        """
        end = monotonic() + timeout
        while not numbers <= self.greeted.keys() and (left := end - monotonic()) > 0:
            if self._woken.poll(min(left, 1.0)):
                self._woken.recv_bytes()
        return numbers & self.greeted.keys()

    def exchange(self, requests: Mapping[int, bytes], timeout: float) -> Iterator[tuple[int, bytes]]:
        """As of :class:`~recbole_fedkd.engine.remote.Transport`."""
        self._asked = dict(requests)
        end = monotonic() + timeout
        while True:
            for number in list(self._asked):
                self._send(number)
            left = end - monotonic()
            if left <= 0:
                self._asked = {}
                return
            with self._lock:
                known: dict[Any, int] = {connection: number for number, connection in self._connections.items()}
            for ready in wait([*known, self._woken], left):
                if ready is self._woken:
                    self._woken.recv_bytes()
                elif (packed := self._received(ready, known[ready])) is not None:
                    yield known[ready], packed

    def _send(self, number: int) -> None:
        """Ask a party that is there and not busy; one that is busy has not answered what it was asked before."""
        with self._lock:
            connection = self._connections.get(number)
            if connection is None or number in self._busy:
                return
            self._busy.add(number)
        try:
            connection.send_bytes(self._asked[number])
        except OSError:
            self._lost(connection, number)

    def _received(self, connection: Any, number: int) -> bytes | None:
        """What has come from a party; None: it has gone, and is asked again when it is back."""
        try:
            packed: bytes = connection.recv_bytes(LONGEST)
        except (OSError, EOFError):
            self._lost(connection, number)
            return None
        with self._lock:
            self._busy.discard(number)
        try:
            self._asked_again(number, packed)
        except MessageError:
            self._asked.pop(number, None)
        return packed

    def _asked_again(self, number: int, packed: bytes) -> None:
        """An answer to what was asked now is the last word; one that is late leaves the question open."""
        answer = Answer.from_bytes(packed)
        if number in self._asked and answer.request in (b"", digest(self._asked[number])):
            del self._asked[number]

    def _lost(self, connection: Any, number: int) -> None:
        with self._lock, suppress(OSError):
            connection.close()
            if self._connections.get(number) is connection:
                del self._connections[number]
                self._busy.discard(number)

    def close(self) -> None:
        """Listen no more; whoever is there is cut off."""
        self._open = False
        with suppress(OSError):
            # Wakes the thread that waits for somebody to come.
            kind = socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET
            with socket.socket(kind, socket.SOCK_STREAM) as own:
                own.settimeout(1)
                own.connect(self.address)
        with suppress(OSError):
            self._listener.close()
        with self._lock:
            for connection in self._connections.values():
                with suppress(OSError):
                    connection.close()
            self._connections = {}


def _prove(connection: Any, key: bytes) -> None:
    """Both sides show that they know the key; the server's side."""
    deliver_challenge(connection, key)
    answer_challenge(connection, key)


def serve(
    answer: Callable[[bytes], bytes],
    hello: Callable[[], bytes],
    address: Address,
    key: bytes | None = None,
    patience: float | None = None,
) -> None:
    """Go to a server and answer what it asks, again and again.

    Args:
        answer: what is answered to a request.
        hello: what is said first.
        address: of the server.
        key: that both know; None: there is none.
        patience: seconds without a server after which it is given up; None: never.

    Raises:
        InputError: the server does not know the key, or this party does not.
    """
    pause, missed = 0.05, monotonic()
    while True:
        try:
            with Client(address, authkey=key) as connection:
                connection.send_bytes(hello())
                while True:
                    request = connection.recv_bytes(LONGEST)
                    missed, pause = monotonic(), 0.05
                    connection.send_bytes(answer(request))
                    missed = monotonic()
        except AuthenticationError as error:
            raise InputError(f"the server at '{address}' and this party do not share a key: {error}") from error
        except (OSError, EOFError):
            if patience is not None and monotonic() - missed > patience:
                return
        sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
