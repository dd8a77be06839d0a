"""Kills parties and coordinators at random moments and holds what comes out against a run that nobody disturbed.

    python benchmarks/kills.py --kills=100 --seed=1
    python benchmarks/kills.py --kills=100 --seed=1 --who=all

Every party is a process (``engine=processes``); one of them is killed with SIGKILL after a random part of a round, while it
trains, takes in what serves its users, writes its state, or does nothing. At the end all parameters, of clients and server,
must be those of ``engine=local``, bit for bit. Data are generated.

With ``--who=all`` the coordinator is a process of its own too (``recbole-fedkd coordinate`` and ``party``), parties judge their
own rows, and whoever is killed is started anew: half of the kills come at a random moment, half in the middle of writing a
file, or between its writing and its being there. Result, server's state and parties' networks must be the undisturbed ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import psutil
import torch

from recbole_fedkd import files
from recbole_fedkd.checkpoint.sealed import read_sealed
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.machines import running
from recbole_fedkd.machines.folders import SERVER_STATE
from recbole_fedkd.machines.party import STATE, served
from recbole_fedkd.machines.trust import Trust
from recbole_fedkd.quick_start import _prepare, processor_settings
from recbole_fedkd.splitting import split_federation

_KEYS = {
    "embedding_size": 4, "hidden_sizes": [4, 8], "attention_heads": 2, "history_length": 5, "train_batch_size": 32,
    "show_progress": False, "state": "ERROR", "client_num": 4, "client_timeout": 600.0,
    "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
}  # fmt: skip


def write_ratings(folder: Path, users: int = 60, items: int = 80, rows: int = 25) -> None:
    """Ratings of a small dataset, ``tiny``."""
    dice, lines = np.random.default_rng(3), ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        for position, item in enumerate(dice.choice(items, rows, replace=False)):
            lines.append(f"u{user}\ti{item}\t{dice.integers(1, 6)}\t{user * rows + position}")
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "tiny.inter").write_text("\n".join(lines) + "\n")


def parties() -> list[psutil.Process]:
    """The processes of the parties that this process has started."""
    children = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "recbole_fedkd.machines.nursery" in child.cmdline():
                children += child.children()
    return children


def disturbed(engine: Any, index: int, dice: random.Random, seconds: float, kills: int) -> int:
    """One round in which parties are killed.

    Args:
        engine: of a federation in processes.
        index: of the round.
        dice: says who is killed, and when.
        seconds: that a round takes.
        kills: how many.

    Returns:
        How many were killed.
    """
    done, moments = [], sorted(dice.uniform(0, seconds) for _ in range(kills))
    over = threading.Event()

    def kill() -> None:
        before = 0.0
        for moment in moments:
            sleep(moment - before)
            before = moment
            there = parties()
            if there and not over.is_set():
                with suppress(ProcessLookupError):
                    os.kill(dice.choice(there).pid, signal.SIGKILL)
                    done.append(moment)

    thread = threading.Thread(target=kill)
    thread.start()
    engine.run_round(index)
    over.set()
    thread.join()
    return len(done)


def differences(one: Any, other: Any) -> list[str]:
    """Names of parameters, of clients and server, that differ."""
    wrong = [name for name, value in one.server.state.items() if not torch.equal(value, other.server.state[name])]
    for client, twin in zip(one.clients, other.clients, strict=True):
        theirs = twin.task.network.state_dict()
        wrong += [
            f"{client.number}: {name}"
            for name, value in client.task.network.state_dict().items()
            if not torch.equal(value, theirs[name])
        ]
    return wrong


def measured(
    keys: dict[str, Any], kills: int, seed: int, per_round: int = 2, tell: Callable[[str], None] = print
) -> Any:
    """Kill so many parties, and see what comes of it.

    Args:
        keys: of the run.
        kills: how many.
        seed: of who is killed, and when.
        per_round: kills in a round.
        told: called with a line now and then.
    """
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, processor_settings(threads=1):
        write_ratings(Path(folder))
        engines = {}
        for engine in ("processes", "local"):
            config = FedKDConfig(
                "AttnFedKD", "tiny", config_dict={**_KEYS, "data_path": folder, "engine": engine, **keys}
            )
            engines[engine] = _prepare(config)[0].engine
        remote, local = engines["processes"], engines["local"]
        assert remote is not None and local is not None
        killed, index, seconds = 0, 0, 1.0
        while killed < kills or not index:
            began = perf_counter()
            # The first round starts the processes, and shows how long a round takes.
            killed += disturbed(remote, index, dice, seconds, min(per_round, kills - killed) if index else 0)
            local.run_round(index)
            seconds = seconds if not index else min(seconds, perf_counter() - began)
            index += 1
            if not index % 10:
                tell(f"{index} rounds, {killed} kills, {len(differences(remote, local))} differences")
        wrong = differences(remote, local)
        remote.close()
    return {"keys": keys, "seed": seed, "rounds": index, "kills": killed, "differences": len(wrong), "first": wrong[:3]}


def _dies_while_it_writes(count: int) -> None:
    """Have the process kill itself at so many steps of writing files: half written, whole but not yet there, or just there."""
    left, synchronise = [count], files._synchronise

    def counted(path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            if path.is_file() and count % 2:
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        synchronise(path)

    files._synchronise = counted  # type: ignore[assignment]


def _started(job: Callable[[], None], log: Path, dies_after: int | None) -> int:
    """A process of its own that does a job; a fork, since all is loaded here."""
    child = os.fork()
    if child:
        return child
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if dies_after is not None:
            _dies_while_it_writes(dies_after)
        job()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def federation_killed(cut: Path, kills: int, dice: random.Random) -> tuple[Any, int]:
    """A run of a federation that was cut, in which coordinator and parties are killed.

    Args:
        cut: folder of manifest and parties.
        kills: how many, as long as the run takes.
        dice: says who is killed, and when.

    Returns:
        What came of it, to be compared, and how many were killed.
    """
    trust, address = Trust(), f"unix:{cut}/s"
    folders = sorted(cut.glob("party-*"))
    jobs: list[Callable[[], None]] = [
        lambda: running.coordinate(cut / "manifest", address, cut / "server", trust, {"state": "ERROR"}) and None,
        *(partial(running.live, folder, cut / "manifest", address, trust, {"state": "ERROR"}) for folder in folders),
    ]
    here, killed = {}, 0
    doomed: dict[int, float] = {}

    def start(number: int) -> None:
        writes = dice.random() < 0.5 and killed < kills
        here[number] = _started(jobs[number], cut / f"log-{number}", dice.randrange(12) if writes else None)
        if not writes and killed < kills:
            doomed[number] = perf_counter() + dice.expovariate(1 / 2.0)

    try:
        for number in range(len(jobs)):
            start(number)
        while True:
            for number, moment in list(doomed.items()):
                if perf_counter() > moment:
                    doomed.pop(number)
                    if killed < kills:
                        os.kill(here[number], signal.SIGKILL)
            ended, status = os.waitpid(-1, os.WNOHANG)
            if not ended:
                sleep(0.01)
                continue
            number = next(number for number, child in here.items() if child == ended)
            del here[number]
            if os.WIFSIGNALED(status):
                killed += 1
                doomed.pop(number, None)
                start(number)
            elif number == 0 and os.WEXITSTATUS(status) == 0:
                break
            else:
                raise RuntimeError(f"process {number} ended: {(cut / f'log-{number}').read_text()[-500:]}")
    finally:
        for child in here.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return outcome(cut), killed


def outcome(cut: Path) -> Any:
    """Result, the server's state, and the networks of the parties; without seconds, folders and names of runs."""
    result = json.loads((cut / "server" / running.RESULT).read_text())
    result.pop("run_folder")
    result.pop("timing")
    for record in result["rounds"]:
        record.pop("seconds")
    state, _ = read_sealed(cut / "server" / SERVER_STATE)
    networks = [served(folder / STATE) for folder in sorted(cut.glob("party-*"))]
    return result, state["engine"]["server"], [network[0] for network in networks if network is not None]


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def measured_all(keys: dict[str, Any], kills: int, seed: int) -> dict[str, Any]:
    """Run after run in which coordinator and parties are killed, until so many were."""
    dice, killed, runs, wrong = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder, processor_settings(threads=1):
        write_ratings(Path(folder))
        given = {**_KEYS, "data_path": folder, "epochs": 6, "stopping_step": 20, **keys}
        given |= {"metrics": ["MAE", "RMSE", "Accuracy"], "valid_metric": "MAE"}
        split_federation("AttnFedKD", "tiny", Path(folder) / "cut", [], given)
        undisturbed: Any = None
        while undisturbed is None or killed < kills:
            copy = Path(folder) / str(runs)
            shutil.copytree(Path(folder) / "cut", copy)
            finished, more = federation_killed(copy, 0 if undisturbed is None else kills - killed, dice)
            undisturbed = undisturbed or finished
            wrong += not same(finished, undisturbed)
            killed, runs = killed + more, runs + 1
            shutil.rmtree(copy)
    return {"keys": keys, "seed": seed, "runs": runs, "kills": killed, "different runs": wrong}


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--who", choices=("parties", "all"), default="parties")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = [
        {"strategy": "afd"},
        {"strategy": "fedavg", "codecs": ["row_sparse", "sign", "int8", "fp16"]},
        {"strategy": "afd", "knowledge": "item"},
    ]
    share = -(-arguments.kills // len(runs))
    for number, keys in enumerate(runs):
        kind = measured if arguments.who == "parties" else measured_all
        print(json.dumps(kind(keys, share, arguments.seed + number)), flush=True)


if __name__ == "__main__":
    main()
