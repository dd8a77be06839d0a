"""``engine=processes`` and ``flower``: a process per client of this machine, cut from one data set; the bits of ``local``."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.schema import read_schema, rows_of_clients
from recbole_fedkd.engine import LocalEngine, RemoteEngine
from recbole_fedkd.engine.base import Round
from recbole_fedkd.errors import InputError, TrainingError, listed
from recbole_fedkd.federated.client import Client
from recbole_fedkd.federated.envelope import new_run
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federation.together import Population
from recbole_fedkd.machines import superlink
from recbole_fedkd.machines.flower import check_installed
from recbole_fedkd.machines.folders import party_folders
from recbole_fedkd.machines.manifest import Manifest, write_manifest, write_party
from recbole_fedkd.machines.nursery import FAILED, Nursery
from recbole_fedkd.machines.party import STATE, begin_as, served
from recbole_fedkd.machines.relay import RelayedTransport
from recbole_fedkd.machines.sockets import SocketTransport
from recbole_fedkd.machines.trust import SCHEME
from recbole_fedkd.privacy.release import PrivateRelease


def obstacle(config: Any, clients: int) -> str | None:
    """Why clients cannot run in processes of their own; None if they can.

    Args:
        config: the run's config.
        clients: number of clients.

    Raises:
        InputError: they are to run over Flower, which is not installed.
    """
    if config["engine"] == "flower":
        check_installed()
    if clients == 1:
        return "a lone client trains as RecBole does, from the run's own streams"
    try:
        again = FedKDConfig(config["model"], config["dataset"], config_dict={"plugins": config["plugins"]})
        loaded = f"{again.model_class.__module__}.{again.model_class.__qualname__}"
    except InputError as error:
        loaded = str(error)
    own = config.model_class
    if loaded != f"{own.__module__}.{own.__qualname__}":
        return f"model '{config['model']}' is a class that only this process knows; name its module by plugins"
    return None


_PREFIX, _LOCK = "recbole_fedkd-", "lock"


def _new_folder() -> tuple[Path, int]:
    """A folder that nobody else on this machine may read, and the lock that is held for as long as anybody uses it.

    Whoever is started with the lock's descriptor holds it too. Folders of runs that were killed, with all of their processes,
    are removed: they hold users' rows.
    """
    import fcntl  # not every system has it

    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDONLY, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return folder, lock


class _Running:
    """Processes, a socket and a folder, for as long as they are needed.

    Args:
        config: the run's config.
        dataset: the training split.
        client_of_user: ``[users]``, padding user 0: -1.
        clients: as which the parties begin.
        run: name of the run.
        on_flower: whether parties are nodes of a Flower SuperLink that is started beside them.
        noise: noise multiplier of ``privacy``, which a resumed run has from another; None without.
    """

    transport: SocketTransport | RelayedTransport

    def __init__(
        self,
        config: Any,
        dataset: Any,
        client_of_user: Any,
        clients: Sequence[Client],
        run: str,
        on_flower: bool,
        noise: float | None,
    ) -> None:
        # Whatever is made of users' rows is gone when the run is.
        self._folder, self._lock = folder, lock = _new_folder()
        manifest = folder / "manifest"
        self.folders = party_folders(folder, range(len(clients)))
        write_manifest(config, read_schema(dataset, len(clients)), manifest, self.folders, noise)
        for number, rows in enumerate(rows_of_clients(dataset, client_of_user)):
            write_party(manifest, number, rows, self.folders[number])
            begin_as(clients[number].snapshot(), run, self.folders[number] / STATE)
        given = {"plugins": config["plugins"]} if config["plugins"] else {}
        read = Manifest.load(manifest, {**given, "state": "ERROR"})
        self.signers = read.signers
        program: Sequence[str] = ()
        if on_flower:
            listening, program = superlink.local_superlink(folder)
            address = f"{SCHEME}{listening}"
        else:
            address = f"unix:{folder / 'server'}"
            self.transport = SocketTransport(str(folder / "server"), read.digest, len(clients))
        self.nursery = Nursery(manifest, {**given, "state": "ERROR"}, address, folder, lock, program)
        for number, own in self.folders.items():
            self.nursery.start(number, own)
        if on_flower:
            try:
                self.transport = superlink.relayed(
                    listening, folder, read.digest, len(clients), config["client_timeout"]
                )
            except BaseException:
                self.nursery.close()
                raise

    def await_parties(self, timeout: float) -> None:
        """Wait until all parties are there; raises :class:`TrainingError` where one cannot come."""
        wanted, end = set(self.folders), monotonic() + timeout
        while missing := wanted - self.transport.await_parties(wanted, 1.0):
            for number in sorted(missing):
                if (file := self.folders[number] / FAILED).is_file():
                    raise TrainingError(
                        f"client {number} cannot start in a process of its own: {file.read_text()[:500]}"
                    )
            if self.nursery.ended() or monotonic() > end:
                raise TrainingError(f"client(s) {listed(sorted(missing))} have not started in processes of their own")

    def close(self) -> None:
        """End all that runs, and remove all that was written."""
        self.transport.close()
        self.nursery.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)


class ProcessesEngine(RemoteEngine):
    """Clients in local processes, with mirrors of them here by which RecBole judges and checkpoints are written.

    With ``engine: flower`` they are nodes of a SuperLink of this machine, and all that is said goes through it.

    Args:
        config: the run's config.
        population: all clients' networks.
        dataset: the training split.
        local: the engine that would run them here: its server is the server, its clients are the mirrors.
    """

    def __init__(self, config: Any, population: Population, dataset: Any, local: LocalEngine) -> None:
        self._cut = config, dataset, population.client_of_user.cpu()
        self.clients: list[Client] = local.clients
        self._mirrors = local
        self._running: _Running | None = None
        self._closing: Any = None
        server: Server = local.server
        super().__init__(server, None, new_run(), local.sizes, config["client_timeout"], config["min_clients"])  # type: ignore[arg-type]
        self.name, self.closed = config["engine"], self._mirror

    def _run_clients(self, current: Round) -> None:
        self._start()
        super()._run_clients(current)

    def _start(self) -> None:
        """Start the parties, as the mirrors are."""
        if self._running is not None:
            return
        self.run, self.counted = new_run(), {}
        noise = self.server.release.noise_multiplier if isinstance(self.server.release, PrivateRelease) else None
        self._running = running = _Running(*self._cut, self.clients, self.run, self.name == "flower", noise)
        self._closing = weakref.finalize(self, running.close)
        running.await_parties(self.timeout)
        self.transport, self.signers = running.transport, running.signers

    def _mirror(self, _round_index: int) -> None:
        """At the end of a round the mirrors are what the parties are."""
        assert self._running is not None
        for client in self.clients:
            file = self._running.folders[client.number] / STATE
            if file.is_file() and (state := served(file)) is not None:
                client.restore(state)

    def state_dict(self) -> dict[str, Any]:
        """As that of engine ``local``."""
        return self._mirrors.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._mirrors.load_state_dict(state)

    def close(self) -> None:
        """End the processes; the next round would start them anew."""
        if self._closing is not None:
            self._closing()
        self._running = self._closing = None
