"""Time and memory of a round where every user is a client: the fleet engine beside what else trains the same.

    python benchmarks/fleet.py --dataset=ml-100k
    python benchmarks/fleet.py --dataset=ml-1m --data_path=<folder> --fedjax=<python with fedjax> --pfl=<python with pfl>

Every case runs in a process of its own, one after the other, ``--turns`` times in turn, so that a change of the machine's speed
meets all. Torch computes on one thread; the fleet trains packs in as many threads as there are cores, JAX does what it does by
itself. Printed are, of each case's fastest round in a turn, the medians in seconds of the processor (which say more on a busy
machine) and of the clock, their ratios to the reference with the spread of these over the turns, who else was running, and
peak memory. Rounds include the sampling of negatives.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from turns import Cost, Others, table, tell, until_stopped, whole_turns

from recbole_fedkd.compat import keep_freed_memory
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.engine import FleetEngine
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
    command.append(f"--dataset={arguments.dataset}")
    if arguments.data_path:
        command.append(f"--data_path={arguments.data_path}")
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(printed.stdout.splitlines()[-1])
    return measured


def cost_of_row(row: dict[str, float]) -> Cost:
    """The cost of a case's fastest round in a turn."""
    return Cost(row["seconds"], row["processor_seconds"])


def wrong(names: Sequence[str], reference: str | None, arguments: argparse.Namespace) -> str | None:
    """What is wrong with the cases that are asked for, or None."""
    if unknown := [name for name in names if name not in CASES]:
        return f"--cases: there is no {unknown[0]!r}; there are {', '.join(CASES)}"
    others = [f"pfedrec by {title}" for library, title in OTHERS.items() if getattr(arguments, library)]
    if reference is not None and reference not in [*names, *others]:
        return f"--reference: {reference!r} is not measured; measured are {', '.join([*names, *others])}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of a case in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cases", help="comma-separated; default: all")
    parser.add_argument("--reference", help="the case that others are told as ratios of; default: the first")
    parser.add_argument("--fedjax", help="an interpreter that has fedjax, to run the same maths by it")
    parser.add_argument("--pfl", help="the same for pfl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    if arguments.case:
        with processor_settings(threads=1):
            print(json.dumps(run_case(arguments.case, arguments)))
        return
    names = arguments.cases.split(",") if arguments.cases else list(CASES)
    if problem := wrong(names, arguments.reference, arguments):
        parser.error(problem)
    others = Others()
    with tempfile.TemporaryDirectory() as folder:
        works: dict[str, Callable[[], dict[str, float]]] = {name: partial(run_apart, name, arguments) for name in names}
        for library, title in OTHERS.items():
            if getattr(arguments, library):
                works[f"pfedrec by {title}"] = partial(run_other, library, arguments, Path(folder))
        results: dict[str, list[dict[str, float]]] = {name: [] for name in works}
        with until_stopped():
            for turn in range(1, arguments.turns + 1):
                for name, work in works.items():
                    results[name].append(work())
                    tell(turn, arguments.turns, name, cost_of_row(results[name][-1]))
    costs = whole_turns({name: [cost_of_row(row) for row in rows] for name, rows in results.items()})
    print(table(costs, arguments.reference or names[0], others.cores()))
    for name, rows in results.items():
        print(f"{name}: at most {max(row['peak_gb'] for row in rows):.2f} GB")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
