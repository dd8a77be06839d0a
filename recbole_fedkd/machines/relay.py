"""A transport at work in another process: Flower lends the way to its nodes to an app alone that its SuperLink has started."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack

from recbole_fedkd.errors import TrainingError
from recbole_fedkd.machines.channel import Channel

_AWAIT, _ASK, _NEXT = "await", "ask", "next"


def relay(transport: Any, address: str) -> None:
    """Have a transport work for whoever listens at a Unix socket, until that goes away.

    Args:
        transport: as of :class:`recbole_fedkd.machines.running.Gathering`.
        address: file of the socket.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    channel, answers = Channel(connection), iter(())
    with suppress(OSError):
        while True:
            what, content, timeout = msgpack.unpackb(channel.receive(), strict_map_key=False)
            reply: Any = None
            if what == _AWAIT:
                reply = sorted(transport.await_parties(set(content), timeout))
            elif what == _ASK:
                answers = transport.exchange(content, timeout)
            else:
                reply = next(answers, None)
            channel.send(msgpack.packb(reply))


class RelayedTransport:
    """The other end of :func:`relay`; parties and answers as of the transport there.

    Args:
        address: file of the socket to listen at.
        start: has the other end start.
        timeout: seconds that it has to come.

    Raises:
        TrainingError: it does not come.
    """

    name = "flower"

    def __init__(self, address: Path, start: Callable[[], Any], timeout: float) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(address))
            listener.listen(1)
            start()
            listener.settimeout(timeout)
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                raise TrainingError(f"Flower's app has not started within {timeout:g} s") from error
        self._channel = Channel(connection)

    def _told(self, what: str, content: Any = None, timeout: float = 0.0) -> Any:
        try:
            self._channel.send(msgpack.packb([what, content, timeout]))
            return msgpack.unpackb(self._channel.receive())
        except OSError as error:
            raise TrainingError(f"Flower's app has ended in the middle of the run: {error}") from error

    def await_parties(self, numbers: set[int], timeout: float) -> set[int]:
        """As of :class:`~recbole_fedkd.machines.sockets.SocketTransport`."""
        return set(self._told(_AWAIT, sorted(numbers), timeout))

    def exchange(self, requests: Mapping[int, bytes], timeout: float) -> Iterator[tuple[int, bytes]]:
        """As of :class:`~recbole_fedkd.engine.remote.Transport`."""
        self._told(_ASK, dict(requests), timeout)
        while (answer := self._told(_NEXT)) is not None:
            yield answer[0], answer[1]

    def close(self) -> None:
        """Let the other end go."""
        self._channel.close()
