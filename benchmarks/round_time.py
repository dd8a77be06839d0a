"""Time of a federated round against a central RecBole epoch of the same student, side by side in one process.

    python benchmarks/round_time.py --dataset=ml-1m --data_path=<folder> --repeat=5

Both train on the same rows with the same batch size on one thread; they take turns, so that a change of the machine's
speed meets both. Prints the ratio round / epoch of every pair, their median, and the peak memory of the process.
"""

import argparse
import json
import os
import resource
from pathlib import Path
from statistics import median
from time import perf_counter

os.environ.setdefault("OMP_NUM_THREADS", "1")

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import _prepare, processor_settings
from recbole_fedkd.trainer import CheckpointTrainer


def build(model: str, arguments: argparse.Namespace) -> tuple[CheckpointTrainer, object]:
    keys = {"state": "WARNING", "show_progress": False, "client_num": arguments.client_num}
    if arguments.data_path:
        keys["data_path"] = arguments.data_path
    trainer, loaders, _ = _prepare(FedKDConfig(model, arguments.dataset, config_dict=keys))
    return trainer, loaders[0]


def timed(trainer: CheckpointTrainer, train_data: object, epoch: int) -> float:
    started = perf_counter()
    trainer._train_once(train_data, epoch, None, False)
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--client_num", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5, help="counted pairs, after one that is not counted")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    with processor_settings(threads=1):
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    federation, train_data = build("AttnFedKD", arguments)
    central, central_data = build("AttnStudent", arguments)
    pairs = []
    for index in range(arguments.repeat + 1):
        pairs.append((timed(federation, train_data, index), timed(central, central_data, index)))
        print(f"round {pairs[-1][0]:.2f} s, central epoch {pairs[-1][1]:.2f} s", flush=True)
    counted = pairs[1:]
    ratios = [one / other for one, other in counted]
    result = {
        "dataset": arguments.dataset,
        "clients": arguments.client_num,
        "ratios": ratios,
        "median_ratio": median(ratios),
        "round_seconds": median(one for one, _ in counted),
        "epoch_seconds": median(other for _, other in counted),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
