"""A party behind a node of Flower's own, over Flower's public API alone.

That node starts a process for every message, which loads this module and neither torch nor RecBole: it hands the bytes to the
party, which lives as long as its command and waits at a Unix socket of the same machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from recbole_fedkd.errors import InputError
from recbole_fedkd.machines.channel import Channel, clear_socket

PARTY = "party"
"""Key of a node's config that names the socket."""

_RECORD, _BYTES = "recbole_fedkd", "bytes"
_STALLED = 60.0


def record_of(content: bytes) -> Any:
    """Bytes as a message of Flower holds them."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({_RECORD: ConfigRecord({_BYTES: content})})


def content_of(message: Any) -> bytes:
    """The bytes of a message; of none of ours, none."""
    record = message.content.get(_RECORD) if message.has_content() else None
    content = record.get(_BYTES) if record is not None else None
    return content if isinstance(content, bytes) else b""


def client_app() -> Any:
    """What a node of Flower's own runs: ``flower-supernode --node-config='party="<file of the socket>"'``."""
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def handed_on(message: Any, context: Any) -> Any:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(context.node_config[PARTY]))
            channel = Channel(connection)
            channel.send(content_of(message))
            return Message(record_of(channel.receive()), reply_to=message)

    app.query()(handed_on)
    return app


def wait_at(answer: Callable[[bytes], bytes], file: str) -> None:
    """Answer whoever of this user asks at a Unix socket, one question a connection, again and again.

    Args:
        answer: what is answered to a request; who it is, too, is asked here.
        file: of the socket.

    Raises:
        InputError: nobody can listen there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        clear_socket(file)
        before = os.umask(0o177)  # nobody else may ask
        try:
            listener.bind(file)
        except OSError as error:
            raise InputError(f"address '{file}' cannot be listened at: {error.strerror or error}") from error
        finally:
            os.umask(before)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            channel = Channel(connection)
            with suppress(OSError):  # who has asked has gone, and asks again
                channel.send(answer(channel.receive(patience=_STALLED)))
            channel.close()
