"""Sockets between a server and its parties: these come to the server, over Unix sockets or TCP, and again when cut off."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from time import monotonic, sleep, time

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.envelope import Answer, read_hello
from recbole_fedkd.federated.message import MessageError
from recbole_fedkd.machines.channel import Address, Channel, StrangerError, go_to, let_in

_HELLO_SECONDS = 20.0
_LONGEST_HELLO = 65536
_LONGEST_PAUSE = 5.0
_GREETED_AT_ONCE = 256


class SocketTransport:
    """Where parties come to. Each has a thread of its own, so that one that stalls keeps nobody waiting.

    Args:
        address: to listen at.
        manifest: digest that a party must name.
        parties: how many there are.
        key: that parties must know; None: whoever reaches the address is heard.
        tls: how the server shows who it is; None: it does not, and nothing is encrypted.

    Attributes:
        greeted: what each party said of itself when it came last.
        seen: when each party was heard last, in seconds since 1970.
        refused: how many came who were not let in.
    """

    name = "processes"

    def __init__(
        self,
        address: Address,
        manifest: bytes,
        parties: int,
        key: bytes | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.manifest, self.parties, self.refused = manifest, parties, 0
        self.greeted: dict[int, Answer] = {}
        self.seen: dict[int, float] = {}
        self._key, self._tls = key, tls
        try:
            self._listener = _listening(address)
        except OSError as error:
            where = address if isinstance(address, str) else ":".join(map(str, address))
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
            raise InputError(f"address '{where}' cannot be listened at: {why}") from error
        self._changed = threading.Condition()
        self._channels: dict[int, Channel] = {}
        self._asked: dict[int, bytes] = {}
        self._answers: deque[tuple[int, bytes]] = deque()
        self._greeting = threading.Semaphore(_GREETED_AT_ONCE)
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> Address:
        """Where it listens; of port 0 the one that was free."""
        name = self._listener.getsockname()
        return name if isinstance(name, str) else (name[0], name[1])

    def _accept(self) -> None:
        while self._open:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                sleep(0.1)  # too many open files, perhaps
                continue
            if not self._greeting.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """All that is said on one connection."""
        greeted: tuple[Channel, int] | None = None
        try:
            greeted = self._greeted(connection)
        except (StrangerError, MessageError, OSError) as error:
            self.refused += 1
            getLogger().warning(f"somebody was not let in: {error}")
            with suppress(OSError):
                connection.close()
        finally:
            self._greeting.release()
        if greeted is not None:
            self._attend(*greeted)

    def _greeted(self, connection: socket.socket) -> tuple[Channel, int]:
        channel = let_in(connection, self._key, self._tls)
        packed = channel.receive(_LONGEST_HELLO, _HELLO_SECONDS)
        hello = read_hello(packed, self.manifest, self.parties, self.greeted)
        with self._changed:
            before = self._channels.pop(hello.party, None)
            self._channels[hello.party], self.greeted[hello.party] = channel, hello
            self.seen[hello.party] = time()
            self._changed.notify_all()
        if before is not None:
            before.close()
        return channel, hello.party

    def _attend(self, channel: Channel, number: int) -> None:
        """Ask a party what there is to ask, for as long as it is there."""
        try:
            while (request := self._next(channel, number)) is not None:
                channel.send(request)
                answer = channel.receive()
                with self._changed:
                    self.seen[number] = time()
                    if self._asked.get(number) is request:  # else it is late, and the question stays open
                        del self._asked[number]
                    self._answers.append((number, answer))
                    self._changed.notify_all()
        except OSError:
            pass  # it has gone, and is asked again when it is back
        finally:
            channel.close()
            with self._changed:
                if self._channels.get(number) is channel:
                    del self._channels[number]

    def _next(self, channel: Channel, number: int) -> bytes | None:
        """What a party is to be asked, once there is something; None: another connection is the party's now."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._asked or self._channels.get(number) is not channel)
            return self._asked[number] if self._channels.get(number) is channel else None

    def await_parties(self, numbers: set[int], timeout: float) -> set[int]:
        """Wait for parties to come.

        Args:
            numbers: of the parties.
            timeout: seconds after which nobody is waited for any more.

        Returns:
            Those of them that have come at some time.
        """
        with self._changed:
            self._changed.wait_for(lambda: numbers <= self.greeted.keys(), timeout)
            return numbers & self.greeted.keys()

    def exchange(self, requests: Mapping[int, bytes], timeout: float) -> Iterator[tuple[int, bytes]]:
        """As of :class:`~recbole_fedkd.engine.remote.Transport`."""
        end = monotonic() + timeout
        with self._changed:
            self._asked = dict(requests)
            self._changed.notify_all()
        try:
            while True:
                with self._changed:
                    if not self._changed.wait_for(lambda: bool(self._answers), max(0.0, end - monotonic())):
                        return
                    number, packed = self._answers.popleft()
                yield number, packed
        finally:
            with self._changed:
                self._asked = {}

    def close(self) -> None:
        """Listen no more; whoever is there is cut off."""
        self._open = False
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for somebody to come
        self._listener.close()
        with self._changed:
            channels, self._channels = list(self._channels.values()), {}
            self._changed.notify_all()
        for channel in channels:
            channel.close()


def _listening(address: Address) -> socket.socket:
    of_host = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    family = socket.AF_UNIX if isinstance(address, str) else of_host
    return socket.create_server(address, family=family, backlog=128)


def _connected(address: Address) -> socket.socket:
    if not isinstance(address, str):
        return socket.create_connection(address, timeout=20)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def serve(
    answer: Callable[[bytes], bytes],
    hello: Callable[[], bytes],
    address: Address,
    key: bytes | None = None,
    patience: float | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Go to a server and answer what it asks, again and again.

    Args:
        answer: what is answered to a request.
        hello: what is said first.
        address: of the server.
        key: that both know; None: there is none.
        patience: seconds without a server after which it is given up; None: never.
        tls: whom the party believes; None: nothing is encrypted.

    Raises:
        InputError: the server is another than was meant.
    """
    server = f"the server at '{address}'" if isinstance(address, str) else f"the server at '{address[0]}:{address[1]}'"
    host = Path(address).name if isinstance(address, str) else address[0]
    pause, missed = 0.05, monotonic()
    while True:
        with suppress(OSError):
            channel: Channel | None = None
            connection = _connected(address)
            try:
                channel = go_to(connection, key, tls, host, server)
                channel.send(hello())
                while True:
                    request = channel.receive()
                    pause = 0.05
                    channel.send(answer(request))
                    missed = monotonic()
            finally:
                connection.close()
                if channel is not None:
                    channel.close()
        if patience is not None and monotonic() - missed > patience:
            return
        sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
