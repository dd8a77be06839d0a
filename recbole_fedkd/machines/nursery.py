"""Local parties, one process each: a process that has loaded everything once forks them.

A process of its own would take seconds, and half a gigabyte, to load torch and RecBole; a fork shares what was loaded. Python's
own fork server would import the user's main program once more. This one reads lines from its standard input, a number and a
folder each, and forks a party for each; it starts one anew that was killed, and ends, with all of them, when its input does.
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

FAILED = "failed.txt"
"""File of a party's folder in which it says why it could not go on."""

_PARTY_PATIENCE = 60.0


class Nursery:
    """Starts local parties, and keeps them running.

    Args:
        manifest: folder of the manifest.
        given: see :meth:`Manifest.load`.
        address: at which the parties find their server, as :func:`recbole_fedkd.machines.running.attend` reads it.
        folder: that is removed when it ends: whoever has started it may have been killed.
        lock: descriptor that it, and each party, keeps open.
        program: that is started before them and ends with them; empty: none.
    """

    def __init__(
        self,
        manifest: Path,
        given: Mapping[str, Any],
        address: str,
        folder: Path,
        lock: int,
        program: Sequence[str] = (),
    ) -> None:
        order = {"manifest": str(manifest), "given": dict(given), "address": address, "folder": str(folder)}
        order["program"] = list(program)
        # What the parent found on its path, the child finds as well.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            pass_fds=[lock],
        )
        self._say(order)

    def ended(self) -> bool:
        """Whether it runs no more."""
        return self.process.poll() is not None

    def _say(self, order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def start(self, number: int, folder: Path) -> None:
        """Start a party, and keep it running."""
        self._say([number, str(folder)])

    def close(self) -> None:
        """End all parties."""
        with suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> None:
    """Fork parties until the standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever stops the server stops the parties
    lines = _Lines(0)
    first: bytes | None = None
    while first is None:
        lines.wait()
        if lines.ended:
            return
        first = next(lines.take(), None)
    order = json.loads(first)
    program = _started(order["program"], Path(order["folder"]))

    import recbole_fedkd.machines.running  # noqa: F401 - loaded before the first fork
    from recbole_fedkd.machines.manifest import Manifest

    manifest = Manifest.load(order["manifest"], order["given"])
    # Else Python's collector would write to all that forks share, which would then be a copy of each, of 60 MB.
    gc.collect()
    gc.freeze()
    running: dict[int, tuple[int, str]] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    def start(number: int, folder: str) -> None:
        child = os.fork()
        if not child:
            _live(manifest, Path(folder), order["address"], (0, woken, wake))
        running[child] = number, folder

    try:
        while not lines.ended:
            for line in lines.take():
                start(*json.loads(line))
            ready, _, _ = select.select([0, woken], [], [])
            if woken in ready:
                os.read(woken, 4096)
                for number, folder in _ended(running):
                    start(number, folder)
            if 0 in ready:
                lines.wait()
    finally:
        if program is not None:
            _end(program)
        for child in running:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for child in running:  # whoever still writes would make a folder that is being removed anew
            with suppress(ChildProcessError):
                os.waitpid(child, 0)
        shutil.rmtree(order["folder"], ignore_errors=True)


def _started(command: Sequence[str], folder: Path) -> psutil.Process | None:
    """A program that runs beside the parties, and says what it has to say in a file."""
    if not command:
        return None
    with (folder / "program.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
    return psutil.Process(process.pid)


def _end(program: psutil.Process) -> None:
    """End a program, and whatever it has started."""
    with suppress(psutil.NoSuchProcess):
        for member in (*program.children(recursive=True), program):
            with suppress(psutil.NoSuchProcess):
                member.kill()


class _Lines:
    """Lines of a descriptor, as they come; Python's own files read ahead, which ``select`` does not see."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.ended, self._read = descriptor, False, b""

    def wait(self) -> None:
        """Read what has come, or wait for something to come."""
        read = os.read(self.descriptor, 65536)
        self.ended = not read
        self._read += read

    def take(self) -> Iterator[bytes]:
        """The whole lines that have come."""
        while b"\n" in self._read:
            line, self._read = self._read.split(b"\n", 1)
            yield line


def _ended(running: dict[int, tuple[int, str]]) -> list[tuple[int, str]]:
    """Parties that were killed; one that ended by itself had its reason."""
    killed: list[tuple[int, str]] = []
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return killed
        if not child:
            return killed
        party = running.pop(child, None)
        if party is not None and os.WIFSIGNALED(status):
            killed.append(party)


def _live(manifest: Any, folder: Path, address: str, open_here: tuple[int, ...]) -> None:
    """The life of one party, in a process of its own; never returns."""
    import torch

    from recbole_fedkd.machines.party import Party
    from recbole_fedkd.machines.running import attend
    from recbole_fedkd.machines.trust import Trust

    try:
        signal.set_wakeup_fd(-1)
        for descriptor in open_here:
            os.close(descriptor)
        # Both are part of the arithmetic.
        torch.set_num_threads(manifest.config["torch_threads"])
        torch.set_flush_denormal(True)
        party = Party(folder, manifest)
        attend(party, address, Trust(), _PARTY_PATIENCE)
    except BaseException as error:
        with suppress(OSError):
            (folder / FAILED).write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
