"""A coordinator and a party as programs of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from recbole_fedkd.data.partition import check_clients_per_round
from recbole_fedkd.engine import Transport
from recbole_fedkd.errors import InputError, TrainingError, listed
from recbole_fedkd.federated.envelope import Answer
from recbole_fedkd.files import held_alone, writable_folder, write_json
from recbole_fedkd.limits import processor_settings
from recbole_fedkd.machines import flower, superlink
from recbole_fedkd.machines.channel import clear_socket, client_tls, read_address, read_key, server_tls
from recbole_fedkd.machines.coordinator import COMMAND, LOCK, Coordinator, sole_coordinator
from recbole_fedkd.machines.folders import SERVER_STATE, check_apart, keys_of_coordinator, keys_of_party
from recbole_fedkd.machines.journal import Follower, Journal
from recbole_fedkd.machines.manifest import Manifest
from recbole_fedkd.machines.node import wait_at
from recbole_fedkd.machines.party import Party
from recbole_fedkd.machines.sockets import SocketTransport, serve
from recbole_fedkd.machines.trust import SCHEME, Trust
from recbole_fedkd.record import write_run_record

RESULT = "result.json"
_SUPERLINK_STARTS = 60.0
_print = partial(print, flush=True)


class Gathering(Transport, Protocol):
    """A transport that parties come to."""

    greeted: dict[int, Answer]
    seen: dict[int, float]
    refused: int

    def await_parties(self, numbers: set[int], timeout: float) -> set[int]:
        """Wait so many seconds for parties to come; returns those that have."""
        ...


def coordinate(manifest: Path, address: str, out: Path, trust: Trust, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Wait for the parties, train, and write the result; a run that lies in the folder goes on.

    Args:
        manifest: folder of the manifest.
        address: to listen at, see :func:`read_address`; or ``flower:<host>:<port>``, a SuperLink on this machine.
        out: the coordinator's folder.
        trust: whom the coordinator lets in, and how it shows who it is.
        keys: see :meth:`Manifest.load`.

    Raises:
        TrainingError: not all parties came.
    """
    read = Manifest.load(manifest, keys, keys_of_coordinator())
    check_apart(out, own=SERVER_STATE)
    trust.check_coordinator(address)
    if address.startswith(SCHEME):
        return _on_flower(read, address.removeprefix(SCHEME), out, trust, keys)
    endpoint, key, tls = read_address(address), read_key(trust.secret), server_tls(trust.certificate, trust.private_key)
    with sole_coordinator(out, lock=COMMAND), sole_coordinator(out):
        if isinstance(endpoint, str):
            clear_socket(endpoint)
        transport = SocketTransport(endpoint, read.digest, read.schema.clients, key, tls)
        try:
            return coordinated(read, transport, out, address)
        finally:
            transport.close()


def coordinated(read: Manifest, transport: Gathering, out: Path, address: str) -> dict[str, Any]:
    """Wait for the parties, train, and write the result; arguments as of :func:`coordinate`."""
    with processor_settings(read.config["torch_threads"]):  # they are part of the arithmetic
        return _coordinated(read, transport, out, address)


def _coordinated(read: Manifest, transport: Gathering, out: Path, address: str) -> dict[str, Any]:
    numbers = set(range(read.schema.clients))
    check_clients_per_round(read.config, len(numbers))
    writable_folder(out, f"folder '{out}'")
    journal = Journal(out, _print)
    try:
        coordinator = Coordinator(read, transport, {}, out) if (out / SERVER_STATE).is_file() else None
        if coordinator is None or not coordinator.finished:
            # A run begins with all of them, and goes on with as many as a round needs.
            least = len(numbers) if coordinator is None else read.config["min_clients"] or len(numbers)
            journal.write("waiting", parties=len(numbers), address=address)
            there = _gathered(transport, numbers, least, read.config["client_timeout"])
            if coordinator is None:
                declared = {number: hello.numbers or {} for number, hello in sorted(transport.greeted.items())}
                coordinator = Coordinator(read, transport, declared, out)
            journal.rounds(coordinator.rounds, transport.seen, transport.refused)
            parties = {str(number): size for number, size in coordinator.engine.sizes.items()}
            epochs = read.config["epochs"]
            begins = {"epochs": epochs, "parties": parties, "there": there, "refused": transport.refused}
            journal.write("begin", round=coordinator.round + 1, **begins)
        of_run = coordinator
        result = coordinator.fit(lambda *_: journal.rounds(of_run.rounds, transport.seen, transport.refused))
    except (InputError, TrainingError) as error:
        journal.write("failed", why=str(error), refused=transport.refused)
        raise
    result["refused"] = transport.refused
    write_run_record(out, {}, result)  # which ``recbole-fedkd report`` makes a page of
    write_json(result, out / RESULT)
    ends = {"best_round": result["best_round"], "test": result["test_result"], "refused": transport.refused}
    journal.write("end", **ends, **result["at_test"])
    return result


def _gathered(transport: Gathering, numbers: set[int], least: int, timeout: float) -> int:
    """How many parties have come, as soon as so many have; raises :class:`TrainingError` where they do not in time."""
    end = monotonic() + timeout
    while len(there := transport.await_parties(numbers, min(1.0, timeout))) < least:
        if monotonic() > end:
            raise TrainingError(
                f"client(s) {listed(sorted(numbers - there))} have not come; the run goes on when {least} are there"
            )
    return len(there)


def _on_flower(read: Manifest, address: str, out: Path, trust: Trust, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Have the coordinator run as an app of a SuperLink on this machine, again where it was killed."""
    flower.check_installed()
    superlink.await_superlink(address, _SUPERLINK_STARTS)
    settings = {"manifest": str(read.folder.resolve()), "out": str(out.resolve()), "keys": json.dumps(dict(keys))}
    with sole_coordinator(out, lock=COMMAND):
        submitted = superlink.Submitted(address, out, trust.authority, {**settings, "address": address})
        print(
            f"coordinator on the SuperLink at {address}; it begins when all {read.schema.clients} parties are there",
            flush=True,
        )
        before = _written(out / RESULT)
        superlink.supervise(submitted, out, lambda: _written(out / RESULT) != before, Follower(out, _print).look)
    result: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
    return result


def _written(file: Path) -> int:
    """When a file was written; 0: never."""
    return file.stat().st_mtime_ns if file.is_file() else 0


def live(folder: Path, manifest: Path, address: str, trust: Trust, keys: Mapping[str, Any]) -> None:
    """Answer what the coordinator asks, until somebody ends this process; arguments as of :func:`coordinate`."""
    read = Manifest.load(manifest, keys, keys_of_party())
    read.number_of(folder)  # else there would be a folder that was mistyped
    trust.check_party(address)
    writable_folder(folder, f"folder '{folder}'")
    refused = f"the party of '{folder}' runs already; end that process first"
    arithmetic = processor_settings(read.config["torch_threads"])
    with held_alone(folder / LOCK, refused, patience=1.0), arithmetic:
        party = Party(folder, read, tell=_print)
        party.hello()  # reads the rows that it will judge by
        print(f"party {party.number}: {len(party.client.task)} samples, server at {address}", flush=True)
        attend(party, address, trust)


def attend(party: Party, address: str, trust: Trust, patience: float | None = None) -> None:
    """Go to the coordinator and answer what it asks, over sockets or as a node of Flower.

    Args:
        party: that answers.
        address: of the coordinator, or of its SuperLink; ``flower:unix:<file>``: a node of Flower's own asks there.
        trust: whom the party believes, and what it knows.
        patience: seconds without a coordinator after which it is given up; None: never; not of Flower.
    """
    if not address.startswith(SCHEME):
        serve(
            party.answer,
            party.hello,
            read_address(address),
            read_key(trust.secret),
            patience,
            client_tls(trust.authority),
        )
        return
    flower.check_installed()
    endpoint = address.removeprefix(SCHEME)
    if isinstance(waits := read_address(endpoint), str):
        wait_at(party.answer, waits)
        return
    flower.serve(party.answer, endpoint, trust.authority, trust.node_key)
