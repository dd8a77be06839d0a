"""What a run is made of, side by side in one process: preparing the data, rounds, a central epoch, the final test.

    python benchmarks/round_time.py --dataset=ml-1m --data_path=<folder> --turns=5
    python benchmarks/round_time.py --dataset=ml-1m --data_path=<folder> --partition=user
    python benchmarks/round_time.py --dataset=ml-1m --data_path=<folder> --presets afd fd afd_no_attention

All train on the same rows with the same batch size on one thread, and take turns. Printed are seconds of the processor and of
the clock, and ratios to the central epoch of the same student with their spread, who else was running, and the peak memory.
"""

import argparse
import json
import os
import resource
from dataclasses import asdict
from itertools import count
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from turns import Others, ratios, table, take_turns

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import _prepare, _prepare_data, processor_settings

EPOCH = "central epoch"


def config_of(model: str, arguments: argparse.Namespace, **keys: object) -> FedKDConfig:
    keys = {"state": "ERROR", "show_progress": False, "label_mode": arguments.label_mode, **keys}
    if arguments.data_path:
        keys["data_path"] = arguments.data_path
    return FedKDConfig(model, arguments.dataset, config_dict=keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--label_mode", default="rating")
    parser.add_argument("--presets", nargs="+", default=["afd"], help="presets of AttnFedKD")
    parser.add_argument("--client_num", type=int, default=4)
    parser.add_argument("--partition", help="user: a user a client, engine=fleet; else that of the presets")
    parser.add_argument("--turns", type=int, default=5, help="counted turns, after one that is not counted")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    with processor_settings(threads=1):
        result = compare(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    works = {}
    numbers = count()
    clients: dict[str, object] = {"client_num": arguments.client_num}
    if arguments.partition:
        clients = {"partition": arguments.partition, "engine": "fleet"}
    for preset in arguments.presets:
        config = config_of("AttnFedKD", arguments, preset=preset, **clients)
        trainer, loaders, evaluations = _prepare(config)
        train = loaders[0]
        works[f"round of {preset}"] = lambda trainer=trainer, train=train: trainer._train_once(
            train, next(numbers), None, False
        )
    # Every preset is judged alike.
    works["final test"] = lambda: trainer.evaluate(evaluations[1], load_best_model=False)
    central, central_loaders, _ = _prepare(config_of("AttnStudent", arguments))
    works[EPOCH] = lambda: central._train_once(central_loaders[0], next(numbers), None, False)
    works["preparing the data"] = lambda: _prepare_data(config_of("AttnFedKD", arguments))
    others = Others()
    costs = take_turns(works, arguments.turns)
    busy = others.cores()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(table(costs, EPOCH, busy), f"Peak memory {peak:.2f} GB.")
    return {
        "dataset": arguments.dataset,
        "clients": clients,
        "ratios": ratios(costs, EPOCH),
        "costs": {name: [asdict(cost) for cost in taken] for name, taken in costs.items()},
        "others": busy,
        "peak_memory_gb": peak,
    }


if __name__ == "__main__":
    main()
