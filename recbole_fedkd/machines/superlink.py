"""What runs on a Flower SuperLink: the coordinator as its app, again where it was killed; and a SuperLink of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.machines.coordinator import in_use, sole_coordinator
from recbole_fedkd.machines.flower import FlowerTransport
from recbole_fedkd.machines.relay import RelayedTransport, relay
from recbole_fedkd.machines.trust import SCHEME, superlink_address

FAILED = "failed.txt"
"""File of the coordinator's folder in which it says why it could not go on, after a line with the kind of error."""

_POLL = 0.3
_LOOK_EVERY = 10.0  # seconds between two looks at how a run is
_LET_GO = 60.0
APP = Path(__file__).parent / "flower_app"
"""What ``flwr run`` takes."""


def server_app() -> Any:
    """The coordinator as an app of Flower, of which the run's config names manifest, folder and keys.

    Or, where it names a socket, the way to the parties alone, for a coordinator that listens there.
    """
    from flwr.serverapp import ServerApp

    def main(grid: Any, context: Any) -> None:
        from recbole_fedkd.machines.folders import SERVER_STATE, check_apart, keys_of_coordinator
        from recbole_fedkd.machines.manifest import Manifest
        from recbole_fedkd.machines.running import coordinated

        settings = context.run_config
        if settings["relay"]:
            transport = FlowerTransport(grid, bytes.fromhex(str(settings["manifest"])), int(str(settings["parties"])))
            relay(transport, str(settings["relay"]))
            return
        out = Path(str(settings["out"]))
        check_apart(out, own=SERVER_STATE)
        with sole_coordinator(out, _LET_GO):  # whoever is refused here says nothing of the run of another
            try:
                read = Manifest.load(
                    str(settings["manifest"]), json.loads(str(settings["keys"])), keys_of_coordinator()
                )
                transport = FlowerTransport(grid, read.digest, read.schema.clients)
                coordinated(read, transport, out, f"{SCHEME}{settings['address']}")
            except (InputError, TrainingError) as error:
                kind = InputError if isinstance(error, InputError) else TrainingError
                (out / FAILED).write_text(f"{kind.__name__}\n{error}")
                raise

    app = ServerApp()
    app.main()(main)
    return app


class Submitted:
    """Runs of a coordinator on a SuperLink, one after the other where one is killed.

    Args:
        address: of the SuperLink, ``<host>:<port>``.
        out: the coordinator's folder.
        authority: PEM file of who has signed the SuperLink's certificate; None: nothing is encrypted.
        settings: the app's config.
    """

    def __init__(self, address: str, out: Path, authority: str | None, settings: Mapping[str, str]) -> None:
        self.home, self.settings = out / "flower", out / "flower" / "run.toml"
        self.home.mkdir(parents=True, exist_ok=True)
        lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()]
        self.settings.write_text("".join(lines), encoding="utf-8")
        trust = f"root-certificates = {json.dumps(str(Path(authority).resolve()))}" if authority else "insecure = true"
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "link"\n\n[superlink.link]\naddress = "{address}"\n{trust}\n'
        )

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """What Flower's command says; raises :class:`TrainingError` where it says no."""
        command = [sys.executable, "-c", "from flwr.cli.app import app; app()", *arguments, "--format", "json"]
        environment = {**os.environ, "FLWR_HOME": str(self.home)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        try:
            answer = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            answer = {"success": False, "error-message": f"{done.stdout} {done.stderr}"}
        if not answer.get("success"):
            why = " ".join(str(answer.get("error-message") or answer).split())
            raise TrainingError(f"Flower does not run the coordinator: {why[:800]}")
        return dict(answer)

    def start(self) -> str:
        """Submit a run; returns its name."""
        return str(self._flwr("run", str(APP), "link", "--run-config", str(self.settings))["run-id"])

    def status(self, run: str) -> str:
        """Flower's word for how a run is, such as ``running`` or ``finished:failed``."""
        (state,) = self._flwr("list", "link", "--run-id", run)["runs"]
        return str(state["status"])


def supervise(submitted: Submitted, out: Path, finished: Callable[[], bool], look: Callable[[], None]) -> None:
    """Have the coordinator run until it has finished, also where SuperLink or ServerApp are killed.

    Args:
        submitted: its runs.
        out: the coordinator's folder.
        finished: whether there is a result.
        look: called now and then, and at the end.

    Raises:
        InputError: it cannot use its input.
        TrainingError: it fails by itself, or the SuperLink is not there when it begins.
    """
    (out / FAILED).unlink(missing_ok=True)
    began = in_use(out)  # of a command that was killed the app may still run: it is the run
    if began:
        getLogger().warning(f"the coordinator of '{out}' is still running; this command follows it")
    run: str | None = None if began else submitted.start()
    looked = monotonic()
    while not finished():
        look()
        sleep(_POLL)
        if in_use(out):
            began = True
            continue
        if finished():
            break
        # Flower itself misses an app that was killed when its heartbeats have expired, after more than a minute.
        if not began:
            if monotonic() - looked < _LOOK_EVERY:
                continue
            looked = monotonic()
            try:
                if run is None:
                    run = submitted.start()
                if not submitted.status(run).startswith("finished"):
                    continue
            except TrainingError as error:  # nobody is there, or somebody who knows of no such run
                getLogger().warning(str(error))
        if (out / FAILED).is_file():
            kind, _, why = (out / FAILED).read_text().partition("\n")
            raise (InputError if kind == InputError.__name__ else TrainingError)(why)
        getLogger().warning("the coordinator was cut off; it is started again, and goes on where it was")
        run, began, looked = None, False, monotonic() - _LOOK_EVERY
    look()


def local_superlink(folder: Path) -> tuple[str, list[str]]:
    """A SuperLink for a run of this machine: its address, and the command that starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    programs = str(Path(sys.executable).parent)
    # Flower finds its other programs by the path.
    environment = [f"PATH={programs}{os.pathsep}{os.environ.get('PATH', '')}", f"FLWR_HOME={folder}"]
    options = ["--insecure", "--port", str(port), "--disable-runtime-dependency-installation"]
    return f"127.0.0.1:{port}", ["env", *environment, "flower-superlink", *options]


def await_superlink(address: str, timeout: float) -> None:
    """Wait until somebody listens at an address.

    Raises:
        InputError: it is no address of a SuperLink.
        TrainingError: nobody does within so many seconds.
    """
    listening = superlink_address(address)
    end = monotonic() + timeout
    while True:
        try:
            socket.create_connection(listening, timeout=5).close()
            return
        except OSError as error:
            if monotonic() > end:
                raise TrainingError(f"no SuperLink listens at {address}, for {timeout:g} s now: {error}") from error
            sleep(_POLL)


def relayed(address: str, folder: Path, manifest: bytes, parties: int, timeout: float) -> RelayedTransport:
    """The way to the nodes of a SuperLink of this machine, once it is there.

    Args:
        address: of the SuperLink.
        folder: for what Flower's command writes, and the socket.
        manifest: digest that a party must name.
        parties: how many there are.
        timeout: seconds that the SuperLink has to start, and its app.

    Raises:
        TrainingError: one of them does not start.
    """
    await_superlink(address, timeout)
    relay = folder / "relay"
    settings = {"manifest": manifest.hex(), "parties": str(parties), "relay": str(relay)}
    submitted = Submitted(address, folder, None, settings)
    return RelayedTransport(relay, submitted.start, timeout)
