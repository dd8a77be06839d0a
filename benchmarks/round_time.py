"""Time of a federated round against a central RecBole epoch of the same student, side by side in one process.

    python benchmarks/round_time.py --dataset=ml-1m --data_path=<folder> --repeat=5
    python benchmarks/round_time.py --dataset=ml-1m --data_path=<folder> --presets afd fd afd_no_attention

All train on the same rows with the same batch size on one thread; they take turns, so that a change of the machine's
speed meets all. Prints the ratio round / epoch of every preset, its median, and the peak memory of the process.
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


def build(model: str, arguments: argparse.Namespace, keys: dict[str, object]) -> tuple[CheckpointTrainer, object]:
    keys = {"state": "WARNING", "show_progress": False, "label_mode": arguments.label_mode, **keys}
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
    parser.add_argument("--label_mode", default="rating")
    parser.add_argument(
        "--presets", nargs="+", default=["afd"], help="presets of AttnFedKD, each against the central epoch"
    )
    parser.add_argument("--client_num", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5, help="counted turns, after one that is not counted")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    with processor_settings(threads=1):
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    federations = {
        preset: build("AttnFedKD", arguments, {"preset": preset, "client_num": arguments.client_num})
        for preset in arguments.presets
    }
    runs = {**federations, "central epoch": build("AttnStudent", arguments, {})}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(arguments.repeat + 1):
        for name, (trainer, train_data) in runs.items():
            seconds[name].append(timed(trainer, train_data, index))
        print(", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()), flush=True)
    counted = {name: taken[1:] for name, taken in seconds.items()}
    epochs = counted.pop("central epoch")
    ratios = {name: [one / other for one, other in zip(taken, epochs, strict=True)] for name, taken in counted.items()}
    result = {
        "dataset": arguments.dataset,
        "label_mode": arguments.label_mode,
        "clients": arguments.client_num,
        "ratios": ratios,
        "median_ratio": {name: median(each) for name, each in ratios.items()},
        "round_seconds": {name: median(taken) for name, taken in counted.items()},
        "epoch_seconds": median(epochs),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
