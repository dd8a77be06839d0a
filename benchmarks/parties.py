"""What clients in processes, or behind Flower, cost beside clients of one process: seconds a party and round, and memory.

``python benchmarks/parties.py --engines=local,processes,flower`` has engines take turns; with one engine, such as
``--engines=processes --clients=100`` or ``--rounds=200``, it tells the memory of all, and whether it grows.
"""

import argparse
import sys
from contextlib import suppress
from statistics import median
from time import perf_counter

import psutil
from turns import Cost, tell, until_stopped

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.limits import processor_settings
from recbole_fedkd.quick_start import _prepare

LOOKS = 8


def family() -> list[psutil.Process]:
    """The process itself, and all that it has started."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def processor(processes: list[psutil.Process]) -> float:
    """Seconds of the processor that they have used."""
    seconds = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            seconds += used.user + used.system
    return seconds


def memory() -> tuple[float, float]:
    """MB of this process alone, and of all that it has started: each shared page is counted once."""
    own, *others = family()
    of_others = 0.0
    for process in others:
        with suppress(psutil.NoSuchProcess):
            of_others += process.memory_full_info().pss / 1e6
    return own.memory_full_info().uss / 1e6, of_others


def main(arguments: list[str]) -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="local,processes")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset")
    parsed = parser.parse_args(arguments)
    engines, spent = {}, {}
    with processor_settings(threads=1):
        for name in parsed.engines.split(","):
            keys = {"strategy": "fedavg", "client_num": parsed.clients, "engine": name, "data_path": parsed.data_path}
            keys |= {"state": "ERROR", "show_progress": False, "client_timeout": 900.0}
            engines[name] = _prepare(FedKDConfig("AttnFedKD", parsed.dataset, config_dict=keys))[0].engine
            engines[name].run_round(0)
            spent[name] = []
        with until_stopped():
            for index in range(1, parsed.rounds):
                for name, engine in engines.items():
                    processes = family()
                    before, began = processor(processes), perf_counter()
                    engine.run_round(index)
                    spent[name].append(Cost(perf_counter() - began, processor(processes) - before))
                    tell(index, parsed.rounds - 1, name, spent[name][-1])
                if len(engines) == 1 and (index + 1) % max(1, parsed.rounds // LOOKS) == 0:
                    own, others = memory()
                    print(f"round {index + 1}: {own:.0f} MB here, {others:.0f} MB of parties", flush=True)
        for name, rounds in spent.items():
            if not rounds:
                continue
            clock, seconds = (
                median(getattr(cost, kind) for cost in rounds) / parsed.clients for kind in ("clock", "processor")
            )
            print(f"{name}: {clock:.3f} s of the clock, {seconds:.3f} s of the processor a party and round (median)")
        for engine in engines.values():
            engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
