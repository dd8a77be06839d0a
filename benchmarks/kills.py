"""Kills parties of a running federation at random moments and holds what comes out against a run that nobody disturbed.

    python benchmarks/kills.py --kills=100 --seed=1

Every party is a process (``engine=processes``); one of them is killed with SIGKILL after a random part of a round, while it
trains, takes in what serves its users, writes its state, or does nothing. At the end all parameters, of clients and server,
must be those of ``engine=local``, bit for bit. Data are generated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import psutil
import torch

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import _prepare, processor_settings

_KEYS = {
    "embedding_size": 4, "hidden_sizes": [4, 8], "attention_heads": 2, "history_length": 5, "train_batch_size": 32,
    "show_progress": False, "state": "ERROR", "client_num": 4, "client_timeout": 600.0,
    "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
}  # fmt: skip


def write_ratings(folder: Path, users: int = 60, items: int = 80, rows: int = 25) -> None:
    """Ratings of a small dataset, ``tiny``."""
    dice, lines = np.random.default_rng(3), ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        for place, item in enumerate(dice.choice(items, rows, replace=False)):
            lines.append(f"u{user}\ti{item}\t{dice.integers(1, 6)}\t{user * rows + place}")
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "tiny.inter").write_text("\n".join(lines) + "\n")


def parties() -> list[psutil.Process]:
    """The processes of the parties that this process has started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "recbole_fedkd.machines.nursery" in child.cmdline():
                found += child.children()
    return found


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
    keys: dict[str, Any], kills: int, seed: int, per_round: int = 2, told: Callable[[str], None] = print
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
                told(f"{index} rounds, {killed} kills, {len(differences(remote, local))} differences")
        wrong = differences(remote, local)
        remote.close()
    return {"keys": keys, "seed": seed, "rounds": index, "kills": killed, "differences": len(wrong), "first": wrong[:3]}


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = [
        {"strategy": "afd"},
        {"strategy": "fedavg", "codecs": ["row_sparse", "sign", "int8", "fp16"]},
        {"strategy": "afd", "knowledge": "item"},
    ]
    each = -(-arguments.kills // len(runs))
    for place, keys in enumerate(runs):
        print(json.dumps(measured(keys, each, arguments.seed + place)), flush=True)


if __name__ == "__main__":
    main()
