"""Flower (https://flower.ai) as a way between a coordinator and its parties: SuperLink in the middle, nothing of ours on it.

The coordinator is a ServerApp, a party is a node that lives as long as its process and answers by itself; or it waits behind
a node of Flower's own, which starts a process for every message (``node.py``). Bytes alone travel, in one record of a message,
as over sockets.

A party speaks Flower's Fleet API through functions that Flower keeps to itself: the extra ``flower`` pins the minor version.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from logging import CRITICAL, getLogger
from time import monotonic, sleep, time
from types import SimpleNamespace
from typing import Any

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.envelope import HELLO, Answer, Request, new_run, read_hello
from recbole_fedkd.federated.message import MessageError
from recbole_fedkd.files import read_bytes
from recbole_fedkd.machines.node import content_of, record_of

_POLL = 0.3
_LOOK_EVERY = 2.0
_ASK_AGAIN_AFTER = 120.0
_LATE_FOR = 3600.0  # for so long a late answer is still pulled, and counted as that
_LONGEST_PAUSE = 10.0
# A killed party that is back at once is refused until its heartbeats expire, after a minute.
_REFUSED_FOR = 150.0
_KEYS_ONLY, _NOT_ACTIVATED = "2001", "2004"

# Flower tells its makers who runs what unless it is told not to.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")


def check_installed() -> None:
    """Raise :class:`InputError` where Flower is not installed."""
    try:
        import flwr  # noqa: F401
    except ImportError as error:
        raise InputError("Flower is not installed; pip install -c constraints.txt 'recbole-fedkd[flower]'") from error


@dataclass
class _Question:
    """What a party is asked (None: who it is), perhaps in several messages, and whether it has answered."""

    number: int | None
    request: bytes
    answered: bool = False


class FlowerTransport:
    """Parties behind a SuperLink.

    Args:
        grid: Flower's way to the nodes of a run.
        manifest: digest that a party must name.
        parties: how many there are.

    Attributes:
        greeted: what each party said of itself when it came last.
        seen: when each party was heard last, in seconds since 1970.
        refused: how many came who were not let in.
    """

    name = "flower"

    def __init__(self, grid: Any, manifest: bytes, parties: int) -> None:
        self.manifest, self.parties, self.refused = manifest, parties, 0
        self.greeted: dict[int, Answer] = {}
        self.seen: dict[int, float] = {}
        self._grid = grid
        self._node_of: dict[int, int] = {}
        self._unknown: set[int] = set()  # nodes that were asked who they are
        self._online: set[int] = set()
        self._open: dict[str, tuple[_Question, int, float]] = {}  # message: question, node, when it was asked
        self._looked = -_LOOK_EVERY

    def _push(self, node: int, question: _Question) -> None:
        from flwr.app import Message

        (name,) = self._grid.push_messages([Message(record_of(question.request), node, "query")])
        if name:
            self._open[name] = question, node, monotonic()

    def _look(self) -> None:
        """Who is there now; whoever is new is asked who it is."""
        if monotonic() - self._looked < _LOOK_EVERY:
            return
        self._looked, there = monotonic(), set(self._grid.get_node_ids())
        gone, self._online = self._online - there, there
        # What was asked of a node that went away is asked again where its party comes back.
        self._open = {
            name: (question, node, asked)
            for name, (question, node, asked) in self._open.items()
            if node not in gone and (question.number is None or asked > monotonic() - _LATE_FOR)
        }
        self._unknown -= gone
        known = set(self._node_of.values())
        for node in there - known - self._unknown:
            self._unknown.add(node)
            self._push(node, _Question(None, Request(new_run(), HELLO, 0).to_bytes()))

    def _pulled(self) -> Iterator[tuple[int, bytes]]:
        """What has come, also to what nobody waits for any more; an answer to a question that was asked again comes once."""
        if not self._open:
            return
        for message in self._grid.pull_messages(list(self._open)):
            question, node, _ = self._open.pop(message.metadata.reply_to_message_id, (None, 0, 0.0))
            if question is None or question.answered:
                continue
            if message.has_error():  # it could not be delivered, or not answered
                self._unknown.discard(node)
                continue
            question.answered = True
            if question.number is None:
                self._greet(node, content_of(message))
            else:
                self.seen[question.number] = time()
                yield question.number, content_of(message)

    def _greet(self, node: int, packed: bytes) -> None:
        try:
            hello = read_hello(packed, self.manifest, self.parties, self.greeted)
        except MessageError as error:
            self.refused += 1
            getLogger().warning(f"node {node} was not let in: {error}")
            return
        self._node_of[hello.party], self.greeted[hello.party], self.seen[hello.party] = node, hello, time()
        self._unknown.discard(node)

    def await_parties(self, numbers: set[int], timeout: float) -> set[int]:
        """As of :class:`~recbole_fedkd.machines.sockets.SocketTransport`."""
        end = monotonic() + timeout
        while not numbers <= self.greeted.keys() and monotonic() < end:
            self._look()
            if not list(self._pulled()):
                sleep(_POLL)
        return numbers & self.greeted.keys()

    def exchange(self, requests: Mapping[int, bytes], timeout: float) -> Iterator[tuple[int, bytes]]:
        """As of :class:`~recbole_fedkd.engine.remote.Transport`."""
        end, questions = monotonic() + timeout, [_Question(*request) for request in requests.items()]
        while monotonic() < end:
            self._look()
            stale = monotonic() - _ASK_AGAIN_AFTER
            asked = {(id(question), node) for question, node, at in self._open.values() if at > stale}
            for question in questions:
                node = self._node_of.get(question.number)  # type: ignore[arg-type]
                if node in self._online and not question.answered and (id(question), node) not in asked:
                    self._push(node, question)
            pulled = list(self._pulled())
            yield from pulled
            if not pulled:
                sleep(_POLL)


def serve(
    answer: Callable[[bytes], bytes],
    address: str,
    authority: str | None = None,
    node_key: str | None = None,
) -> None:
    """Be a node of a SuperLink, and answer what it brings, again and again.

    Args:
        answer: what is answered to a request; who it is, too, is asked here.
        address: of the SuperLink, ``<host>:<port>``.
        authority: PEM file of who has signed the SuperLink's certificate; None: nothing is encrypted.
        node_key: file of the private key by which the SuperLink knows the node; None: it lets in whoever comes.

    Raises:
        InputError: a file cannot be used, or the SuperLink does not let this node in.
    """
    certificate = None if authority is None else read_bytes(authority, "authority")
    keys = _node_keys(node_key)
    _not_interrupted()
    from flwr.supercore.run import RunNotRunningException

    pause, refused_since = 1.0, None
    while True:
        began = monotonic()
        try:
            _attend(answer, address, certificate, keys)
            refused_since = None
        except RunNotRunningException:  # its run has ended while this party answered: nobody waits for that any more
            refused_since = None
        except SystemExit as error:  # Flower's way to say that it cannot connect
            why = _refusal(error.__context__, node_key)
            refused_since = refused_since or began
            if monotonic() - refused_since > _REFUSED_FOR:
                raise InputError(f"the SuperLink at {address} does not let this party in: {why}") from error
            getLogger().warning(f"the SuperLink at {address} does not take this party now, it tries again: {why}")
        pause = 1.0 if monotonic() - began > 60 else min(2 * pause, _LONGEST_PAUSE)
        sleep(pause)


def _refusal(cause: BaseException | None, node_key: str | None) -> str:
    """Why a SuperLink does not take a node; raises :class:`InputError` where to try again would not help."""
    sentence = str(cause)
    if "CERTIFICATE_VERIFY_FAILED" in sentence:
        raise InputError(f"the SuperLink shows a certificate that is not believed: {sentence}")
    code = re.search(r'"code": *(\d+)', getattr(getattr(cause, "response", None), "text", ""))
    if code is not None and code[1] == _KEYS_ONLY:
        raise InputError("the SuperLink asks for a registered key; name it by --node-key")
    if code is not None and code[1] == _NOT_ACTIVATED:
        return f"it does not know the key '{node_key}', or takes it for that of a party that is still there"
    return sentence or "for no reason that it says"


def _node_keys(file: str | None) -> Any:
    if file is None:
        return None
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    content = read_bytes(file, "node-key")
    try:
        load = load_ssh_private_key if b"OPENSSH" in content else load_pem_private_key
        key = load(content, None)
    except (ValueError, TypeError) as error:
        raise InputError(f"node-key '{file}' is no private key without a password: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"node-key '{file}' is no key on an elliptic curve; ssh-keygen -t ecdsa -b 384 makes one")
    return key, key.public_key()


def _not_interrupted() -> None:
    """Flower interrupts the process of a node that its SuperLink does not know any more, and ends that of one that it refuses.

    It even does so seconds later, behind the back of whoever tries again; here such a node comes anew.
    """
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection

    spared = SimpleNamespace(**{**vars(os), "kill": lambda *_: None})
    for module in (http_retry, fleet_http_connection):
        vars(module)["os"] = spared

    def refused(_code: int, message: str = "", **_more: object) -> None:
        raise SystemExit(message)

    vars(fleet_http_connection)["flwr_exit"] = refused

    def missed(failed: threading.ExceptHookArgs) -> None:
        """In a line, for a thread of Flower's that sends heartbeats."""
        getLogger().warning(f"the SuperLink takes no heartbeat of this party: {failed.exc_value}".split("\n")[0])

    threading.excepthook = missed


def _attend(answer: Callable[[bytes], bytes], address: str, certificate: bytes | None, keys: Any) -> None:
    """One connection to a SuperLink, until it breaks."""
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
    from flwr.supernode.fleet_http_connection import http_request_response

    getLogger("flwr").setLevel(CRITICAL)  # what matters is said here
    with http_request_response(address, certificate is None, certificate, keys) as connection:
        _, receive, send, _, _, pull_object, push_object, confirm = connection
        while True:
            received = receive()
            if received is None:
                sleep(_POLL)
                continue
            question, tree = received
            run, name = question.metadata.run_id, question.metadata.message_id
            contents = pull_objects([node.object_id for node in iterate_object_tree(tree)], partial(pull_object, run))
            confirm(run, name)
            request = inflate_object_from_contents(name, contents)
            began = monotonic()
            reply = Message(record_of(answer(content_of(request))), reply_to=question)
            with no_object_id_recompute():
                reply.metadata.__dict__["_message_id"] = reply.object_id
                parts, asked = get_all_nested_objects(reply), get_object_tree(reply)
                wanted, session = send(reply, asked, monotonic() - began)
                push_objects(parts, partial(push_object, run, session), object_ids_to_push=wanted)
