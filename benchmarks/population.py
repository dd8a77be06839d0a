"""Generated populations, a user a client: what a round costs as a power of their number, and what of it their number decides.

    python benchmarks/population.py --users=10000,100000,1000000 [--items=100000]
    python benchmarks/population.py --users=100000,1000000 --clients_per_round=1000 --checkpoint

Rounds of the preset ``pfedrec`` over about 18 interactions a user, whose activity and items follow power laws. Every size runs
in a process of its own, in turn with the others, several times where it does not take long. Printed are processor time and
clock of the fastest round after one that is not counted, bytes sent, memory that is held between rounds and at the peak of one,
private (which the system cannot take back) and all of it, what lies in mapped files, and where asked for, what a checkpoint
after a round takes, medians with the spread of seconds; then the fitted exponents, a cost grows as users to that power; and who
else was running.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from turns import Cost, Others, cost_of, in_words, tell, until_stopped, used_by_children

from recbole_fedkd.checkpoint.large import LargeTensors
from recbole_fedkd.checkpoint.sealed import sealed
from recbole_fedkd.compat import keep_freed_memory
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.engine import FleetEngine
from recbole_fedkd.engine.fleet.optimizers import BatchedSGD
from recbole_fedkd.engine.fleet.population import FleetPopulation
from recbole_fedkd.engine.fleet.samples import LabelledSamples
from recbole_fedkd.federated.client import ClientSettings
from recbole_fedkd.federated.knowledge import Sizes
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.federated.task import AttentiveTask, Samples
from recbole_fedkd.files import write_bytes
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.quick_start import processor_settings

MEAN = 20
"""Mean interactions per user, about."""
BATCH, NEGATIVES = 256, 4


def power_law_counts(users: int, items: int, generator: np.random.Generator) -> np.ndarray:
    """Interactions per user ``[users]``: a Pareto tail with exponent 1.5, cut at a tenth of the items."""
    counts = np.rint((1 + generator.pareto(1.5, users)) * MEAN / 3.0)
    return np.minimum(np.maximum(1, counts), items // 10).astype(np.int64)


def power_law_items(count: int, items: int, generator: np.random.Generator) -> np.ndarray:
    """Items of interactions ``[count]``, some of which are much more popular than others."""
    popularity = generator.permutation(items) + 1
    return popularity[(generator.random(count) ** 3 * items).astype(np.int64)]


def schema_of(users: int, items: int) -> DataSchema:
    """As much of a dataset as a population of ``PFedRec`` reads."""
    names = {"uid_field": "user_id", "iid_field": "item_id", "label_field": None, "time_field": None}
    return DataSchema("generated", users, users + 1, items + 1, names, {}, (0.0, 1.0), True, (), (), (), {})


def engine_of(users: int, arguments: argparse.Namespace) -> tuple[FleetPopulation, FleetEngine]:
    """A population of generated users, and the engine that trains it."""
    keys = {"preset": "pfedrec", "engine": "fleet", "state": "ERROR", "serve_after": arguments.serve_after}
    config, generator, items = (
        FedKDConfig("PFedRec", "ml-100k", config_dict=keys),
        np.random.default_rng(0),
        arguments.items,
    )
    sizes = torch.from_numpy(power_law_counts(users, items, generator))
    chosen = torch.from_numpy(power_law_items(int(sizes.sum()), items, generator))
    rows, ones = ClientRows(torch.arange(1, users + 1), {}, {}), torch.ones_like(chosen)
    population = FleetPopulation(config, schema_of(users, items), rows, torch.arange(-1, users))
    strategy, shared = STRATEGIES["fedavg"].of(config, Sizes(users, 2, items + 1)), population.client_groups[0].whole
    server = Server(strategy, 0, arguments.clients_per_round)
    server.start(SharedState(shared, lambda: population.private_rows(0)))
    task = LabelledSamples(AttentiveTask, Samples(ones, chosen, ones), sizes, 2, BATCH, 0.0, NEGATIVES, items + 1)
    settings, everybody = ClientSettings(1, True, False, 0, None, True), arguments.clients_per_round is None
    return population, FleetEngine(
        server, population, task, settings, BatchedSGD(0.1), population.memory, everybody=everybody
    )


def memory(kind: str) -> float:
    """Gigabytes of this process: ``VmRSS`` now, ``RssAnon`` of it private, ``VmHWM`` at most since :func:`forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 2**20


def forget_peak() -> None:
    """The peak of memory is that of what comes."""
    Path("/proc/self/clear_refs").write_text("5")


class PrivatePeak:
    """The most private memory while a block runs, looked at a hundred times a second: the system can take back all other."""

    def __enter__(self) -> "PrivatePeak":
        self.gigabytes, self._ended = memory("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.gigabytes = max(self.gigabytes, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def in_files(folder: Path) -> float:
    """Gigabytes that this process maps of files of a folder, whether these have a name or none."""
    mapped = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder.resolve()}/" in line
    ]
    spans = [[int(end, 16) for end in fields[0].split("-")] for fields in mapped]
    return sum(end - begin for begin, end in spans) / 2**30


def save(state: dict[str, Any], writer: LargeTensors, folder: Path, number: int) -> int:
    """Write a checkpoint as a trainer does; returns how many bytes that took."""
    before = sum(file.stat().st_size for file in folder.glob("*.bin"))
    content = sealed(writer.taken_out(state, folder, number))
    write_bytes(content, folder / "last.pth")
    return len(content) + sum(file.stat().st_size for file in folder.glob("*.bin")) - before


def measured(users: int, arguments: argparse.Namespace) -> dict[str, float]:
    """What rounds of so many users cost."""
    population, engine = engine_of(users, arguments)
    keep_freed_memory()
    engine.run_round(0)
    held, private, sent = memory("VmRSS"), memory("RssAnon"), list[int]()
    forget_peak()
    with PrivatePeak() as peak:
        costs = [
            cost_of(lambda index=index: sent.append(engine.run_round(index).total_bytes))
            for index in range(1, 1 + arguments.rounds)
        ]
    result = {
        "processor_s": min(cost.processor for cost in costs),
        "clock_s": min(cost.clock for cost in costs),
        "sent_gb": sent[-1] / 1e9,
        "private_gb": private,
        "private_peak_gb": peak.gigabytes,
        "files_gb": in_files(population.mapped.folder),
        "held_gb": held,
        "peak_gb": memory("VmHWM"),
    }
    if arguments.checkpoint:
        forget_peak()
        writer, written = LargeTensors(apart=True), list[int]()
        with tempfile.TemporaryDirectory() as folder:
            for index in range(1 + arguments.rounds, 3 + arguments.rounds):  # all is new to the first
                engine.run_round(index)
                state = {"state_dict": population.state_dict(), "training": engine.state_dict()}
                cost = cost_of(
                    lambda state=state, index=index: written.append(save(state, writer, Path(folder), index))
                )
        result |= {"first_saved_gb": written[0] / 1e9, "saved_gb": written[1] / 1e9}
        result |= {
            "saving_processor_s": cost.processor,
            "saving_clock_s": cost.clock,
            "saving_peak_gb": memory("VmHWM"),
        }
    return result


def laws(results: dict[int, dict[str, float]]) -> dict[str, float]:
    """By cost the exponent ``p`` of the fit ``users ** p``, least squares of the logarithms; nan of what may be nothing."""
    users, fitted = np.log(list(results)), {}
    for name in next(iter(results.values())):
        costs = [row[name] for row in results.values()]
        fitted[name] = float(np.polyfit(users, np.log(costs), 1)[0]) if min(costs) > 0 else float("nan")
    return fitted


def cell(values: Sequence[float], spread: bool) -> str:
    """The median of several turns, and where it is asked for the least and the most."""
    middle = f"{median(values):.4g}"
    return f"{middle} ({min(values):.3g}..{max(values):.3g})" if spread and len(values) > 1 else middle


def table(turns: dict[int, list[dict[str, float]]]) -> str:
    """A row for every size, medians of its turns, seconds with their spread; and the exponents below."""
    names = list(next(iter(turns.values()))[0])
    medians = {users: {name: median(row[name] for row in rows) for name in names} for users, rows in turns.items()}
    rows = [["users", "turns", *names]]
    for users, measured in turns.items():
        cells = [cell([row[name] for row in measured], name.endswith("_s")) for name in names]
        rows.append([f"{users:,}", str(len(measured)), *cells])
    if len(turns) > 1:
        powers = [f"{power:.2f}" for power in laws(medians).values()]
        rows.append(["grows as users to the power of", "", *powers])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", default="10000,100000,1000000")
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2, help="counted rounds of a turn")
    parser.add_argument("--turns", type=int, default=5, help="of each size, in turn")
    parser.add_argument(
        "--short", type=float, default=20.0, help="a size whose turn takes as many seconds takes no more"
    )
    parser.add_argument("--clients_per_round", type=int, help="default: all of them")
    parser.add_argument("--serve_after", default="aggregation", choices=("aggregation", "training"))
    parser.add_argument("--checkpoint", action="store_true", help="also what a checkpoint takes")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(users) for users in arguments.users.split(",")]
    if arguments.alone:
        with processor_settings(threads=1):
            print(json.dumps(measured(sizes[0], arguments)))
        return
    results: dict[int, list[dict[str, float]]] = {users: [] for users in sizes}
    others, took = Others(), dict.fromkeys(sizes, 0.0)
    with until_stopped():
        for turn in range(1, arguments.turns + 1):
            for users in (users for users in sizes if took[users] < arguments.short):
                command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], f"--users={users}", "--alone"]
                before, began = used_by_children(), perf_counter()
                printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                took[users] = used_by_children() - before
                results[users].append(json.loads(printed.splitlines()[-1]))
                tell(turn, arguments.turns, f"{users:,} users", Cost(perf_counter() - began, took[users]))
    if not (results := {users: rows for users, rows in results.items() if rows}):
        sys.exit("no turn was measured to its end")
    print(f"{table(results)}\n\nBeside it ran: {in_words(others.cores())}. Medians of turns (least..most).")


if __name__ == "__main__":
    main()
