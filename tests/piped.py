"""A coordinator in a process of its own, which may be killed, and its parties at the other end of a pipe."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from recbole_fedkd.machines.coordinator import Coordinator, Declared
from recbole_fedkd.machines.manifest import Manifest

PROCESSES = multiprocessing.get_context("forkserver")  # which loads torch and RecBole once for all of them
PROCESSES.set_forkserver_preload(["recbole_fedkd.machines.running"])


class Piped:
    """A transport that asks one party after the other."""

    name = "processes"

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def exchange(self, requests: Mapping[int, bytes], timeout: float) -> Iterator[tuple[int, bytes]]:
        for number, request in requests.items():
            self.pipe.send((number, request))
            yield number, self.pipe.recv()


def _coordinate(pipe: Connection, manifest: Path, declared: Declared, folder: Path) -> None:
    Coordinator(Manifest.load(manifest), Piped(pipe), declared, folder).fit()


def coordinated(manifest: Path, declared: Declared, folder: Path, answer: Callable[[int, bytes], bytes | None]) -> None:
    """Run a federation to its end; the coordinator is killed (SIGKILL) where ``answer`` has none, and started again."""
    while True:
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=_coordinate, args=(there, manifest, declared, folder))
        process.start()
        there.close()
        try:
            while (said := answer(*here.recv())) is not None:
                here.send(said)
        except EOFError:
            process.join()
            assert process.exitcode == 0
            return
        finally:
            process.kill()
            process.join()
            here.close()
