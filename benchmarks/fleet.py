"""Time and memory of a round where every user is a client: the fleet engine beside what else trains the same.

    python benchmarks/fleet.py --dataset=ml-100k
    python benchmarks/fleet.py --dataset=ml-1m --data_path=<folder> --fedjax=<python with fedjax> --pfl=<python with pfl>
    python benchmarks/fleet.py --users=10000,100000,1000000

Every case runs in a process of its own, one after the other, ``--turns`` times in turn, so that a change of the machine's speed
meets all. Torch computes on one thread; the fleet trains packs in as many threads as there are cores, JAX does what it does by
itself. Printed are the fastest round of each case, in seconds of the clock and of the processor (the latter says more on a
busy machine), ratios to the first case of both, peak memory and clients per second. Rounds include the sampling of negatives.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from recbole_fedkd.compat import keep_freed_memory
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.engine import FleetEngine
from recbole_fedkd.engine.fleet.optimizers import BatchedSGD
from recbole_fedkd.engine.fleet.population import FleetPopulation
from recbole_fedkd.engine.fleet.samples import LabelledSamples
from recbole_fedkd.federated.client import ClientSettings
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.federated.task import AttentiveTask, Samples
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.quick_start import _prepare, processor_settings

LEAVE_ONE_OUT = {
    "split": {"LS": "valid_and_test"},
    "order": "TO",
    "group_by": "user",
    "mode": {"valid": "uni99", "test": "uni99"},
}
PFEDREC = {"preset": "pfedrec", "eval_args": LEAVE_ONE_OUT}
FEDNCF = {"preset": "fedncf", "eval_args": LEAVE_ONE_OUT}
CASES = {
    "pfedrec on fleet": ("PFedRec", {**PFEDREC, "engine": "fleet"}),
    "pfedrec on local": ("PFedRec", {**PFEDREC, "engine": "local"}),
    "fedncf on fleet": ("NeuMF", {**FEDNCF, "engine": "fleet"}),
    "fedncf on local": ("NeuMF", {**FEDNCF, "engine": "local"}),
    "central epoch of AttnStudent": ("AttnStudent", {}),
    "fedavg on fleet": ("AttnFedKD", {"preset": "fedavg", "partition": "user", "engine": "fleet"}),
    "afd on fleet": ("AttnFedKD", {"preset": "afd", "partition": "user", "engine": "fleet"}),
    "fedavg on local": ("AttnFedKD", {"preset": "fedavg", "partition": "user", "engine": "local"}),
}
OTHERS = {"fedjax": "FedJAX", "pfl": "pfl"}
SYNTHETIC_MEAN = 20
"""Mean interactions per user of generated populations."""


def timed(rounds, count):
    """Seconds of ``count`` rounds after one that is not counted, and the process's peak memory."""
    clock, processor = [], []
    for index in range(count + 1):
        started, used = perf_counter(), process_time()
        rounds(index)
        clock.append(perf_counter() - started)
        processor.append(process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": min(clock[1:]), "processor_seconds": min(processor[1:]), "peak_gb": peak}


def prepared(case: str, arguments: argparse.Namespace):
    model, keys = CASES[case]
    keys = {"state": "ERROR", "show_progress": False, **keys}
    if arguments.data_path:
        keys["data_path"] = arguments.data_path
    trainer, loaders, _ = _prepare(FedKDConfig(model, arguments.dataset, config_dict=keys))
    return trainer, loaders[0]


def run_case(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    trainer, train_data = prepared(case, arguments)
    keep_freed_memory()
    measured = timed(lambda index: trainer._train_once(train_data, index, None, False), arguments.rounds)
    engine = getattr(trainer, "engine", None)
    if engine is not None:
        measured["clients"] = len(engine.samples)
    if isinstance(engine, FleetEngine):
        measured["padding"] = engine.padding
    return measured


def power_law_counts(users: int, items: int, generator: np.random.Generator) -> np.ndarray:
    """Interactions per user ``[users]``: a Pareto tail with exponent 1.5, cut at a tenth of the items."""
    raw = 1 + generator.pareto(1.5, users)
    counts = np.maximum(1, np.rint(raw * SYNTHETIC_MEAN / 3.0))
    return np.minimum(counts, items // 10).astype(np.int64)


def power_law_items(count: int, items: int, generator: np.random.Generator) -> np.ndarray:
    """Items of interactions ``[count]``, some of which are much more popular than others."""
    popularity = generator.permutation(items) + 1
    return popularity[(generator.random(count) ** 3 * items).astype(np.int64)]


def synthetic_schema(users: int, items: int) -> DataSchema:
    """As much of a dataset as a population of ``PFedRec`` reads."""
    names = {"uid_field": "user_id", "iid_field": "item_id", "label_field": None, "time_field": None}
    sizes = users + 1, items + 1
    return DataSchema("synthetic", users, *sizes, names, {}, (0.0, 1.0), True, (), (), (), {})


def run_synthetic(users: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Rounds of PFedRec's training over generated users whose items follow a power law too."""
    keys = {"preset": "pfedrec", "engine": "fleet", "state": "ERROR", "serve_after": "aggregation"}
    config = FedKDConfig("PFedRec", "ml-100k", config_dict=keys)
    generator, item_count = np.random.default_rng(0), arguments.items
    sizes = torch.from_numpy(power_law_counts(users, item_count, generator))
    items = torch.from_numpy(power_law_items(int(sizes.sum()), item_count, generator))
    ones = torch.ones_like(items)
    rows = ClientRows(torch.arange(1, users + 1), {}, {})
    population = FleetPopulation(config, synthetic_schema(users, item_count), rows, torch.arange(-1, users))
    keep_freed_memory()
    strategy = settings_of(config, users, item_count)
    server = Server(strategy, 0)
    server.state = strategy.initial_state(
        SharedState(population.client_groups[0].whole, lambda: population.private_rows(0))
    )
    task = LabelledSamples(
        AttentiveTask, Samples(ones, items, ones), sizes, 2, config["train_batch_size"], 0.0, 4, item_count + 1
    )
    engine = FleetEngine(
        server, population, task, ClientSettings(1, True, False, 0, None, True), BatchedSGD(0.1), population.memory
    )
    sent = []
    measured = timed(lambda index: sent.append(engine.run_round(index).total_bytes), arguments.rounds)
    measured["sent_gb"] = sent[-1] / 1e9
    return {**measured, "clients": users, "interactions": int(sizes.sum()), "padding": engine.padding}


def settings_of(config: FedKDConfig, clients: int, items: int):
    """The strategy of a config over a population that no dataset describes."""
    from recbole_fedkd.federated.knowledge import Sizes

    return STRATEGIES["fedavg"].of(config, Sizes(clients, 2, items + 1))


def run_other(library: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The same maths by another library, in an interpreter that has it, on the rows that ours trains on."""
    file = folder / "rows.npz"
    if not file.exists():
        trainer, _ = prepared("pfedrec on fleet", arguments)
        task = trainer.engine.task
        users = torch.repeat_interleave(torch.arange(len(task.rows)), task.rows)
        np.savez(file, users=users.numpy(), items=task.samples.items.numpy(), item_count=task.item_count)
    script = Path(__file__).with_name(f"fleet_{library}.py")
    command = [getattr(arguments, library), str(script), str(file), str(arguments.rounds)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(printed.stdout.splitlines()[-1])
    return measured


def run_apart(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """A case in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-W", "ignore", __file__, f"--case={case}", f"--rounds={arguments.rounds}"]
    command += [f"--dataset={arguments.dataset}", f"--items={arguments.items}"]
    if arguments.data_path:
        command.append(f"--data_path={arguments.data_path}")
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(printed.stdout.splitlines()[-1])
    return measured


def fastest(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Of two measurements of a case the smaller of every time."""
    return {name: min(value, other[name]) for name, value in one.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of a case in a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--cases", help="comma-separated; default: all")
    parser.add_argument("--fedjax", help="an interpreter that has fedjax, to run the same maths by it")
    parser.add_argument("--pfl", help="the same for pfl")
    parser.add_argument("--users", help="comma-separated sizes of generated populations, in place of a dataset")
    parser.add_argument("--items", type=int, default=5000, help="items of generated populations")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    if arguments.case:
        with processor_settings(threads=1):
            synthetic = arguments.case.isdigit()
            measured = (
                run_synthetic(int(arguments.case), arguments) if synthetic else run_case(arguments.case, arguments)
            )
        print(json.dumps(measured))
        return
    names = arguments.users.split(",") if arguments.users else list(CASES)
    if arguments.cases:
        names = arguments.cases.split(",")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.turns):
            for name in names:
                measured = run_apart(name, arguments)
                results[name] = fastest(results[name], measured) if name in results else measured
            for library, title in OTHERS.items():
                if not getattr(arguments, library):
                    continue
                measured = run_other(library, arguments, Path(folder))
                name = f"pfedrec by {title}"
                results[name] = fastest(results[name], measured) if name in results else measured
    base = next(iter(results.values()))
    for name, row in results.items():
        speed = f"{row['clients'] / row['seconds']:.0f} clients/s" if "clients" in row else ""
        times = [f"{row[kind]:8.2f} s ({row[kind] / base[kind]:6.2f})" for kind in ("seconds", "processor_seconds")]
        print(f"{name:32} {times[0]}, processor {times[1]}, {row['peak_gb']:5.2f} GB {speed}")
    if arguments.users and len(names) > 1:
        for kind in ("processor_seconds", "peak_gb", "sent_gb"):
            slope = np.polyfit(
                np.log([int(name) for name in names]), np.log([results[name][kind] for name in names]), 1
            )[0]
            print(f"{kind} grows as users to the power of {slope:.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
