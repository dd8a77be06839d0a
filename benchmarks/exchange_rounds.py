"""Rounds of item factors, each of the exchange and a head's, beside rounds of FedMF over the same clients, in turn.

    python benchmarks/exchange_rounds.py --dataset=ml-1m --data_path=<folder> --turns=5

Every user is a client. In a turn ``factors`` starts anew and goes through its exchange and a few rounds of heads; before
each of these one round of FedMF is timed. Printed are medians over the turns in seconds of the processor and of the clock,
and the mean round of a whole run of ``factors`` beside FedMF's.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

from turns import Cost, Others, cost_of, table, tell, until_stopped, whole_turns

from recbole_fedkd.compat import keep_freed_memory
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import _prepare, _prepare_data, _prepare_trainer, processor_settings

FEDMF, WHOLE = "fedmf", "factors, mean round"
LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}


def config_of(arguments: argparse.Namespace, model: str, **keys: object) -> FedKDConfig:
    """Of a preset whose clients have one user each."""
    keys = {"state": "ERROR", "show_progress": False, "engine": "fleet", "partition": "user", **keys}
    if arguments.data_path:
        keys["data_path"] = arguments.data_path
    return FedKDConfig(model, arguments.dataset, config_dict=keys)


def measured(arguments: argparse.Namespace) -> dict[str, list[Cost]]:
    """Costs of every stage's round, of a head's, of FedMF's and of the mean one of a run, a number each turn."""
    config = config_of(arguments, "AttnFedKD", preset="factors", label_mode="rating")
    data = _prepare_data(config)
    judged = {**LEAVE_ONE_OUT, "mode": {"valid": "uni99", "test": "uni99"}}
    fedmf, loaders, _ = _prepare(config_of(arguments, "MF", preset="fedmf", eval_args=judged))
    costs: dict[str, list[Cost]] = {}
    with until_stopped():
        for turn in range(arguments.turns + 1):
            factors = _prepare_trainer(config, data)
            stages = list(factors.engine.task.head.exchange.settings.stages)
            # What the last totals tell of every row is found out in the round after their stage.
            names = [*stages, "leaves every row out", *["head"] * arguments.heads]
            costs_of_stage: dict[str, list[Cost]] = {}
            for number, name in enumerate(names):
                index = turn * len(names) + number
                beside = cost_of(lambda index=index: fedmf._train_once(loaders[0], index, None, False))
                costs_of_stage.setdefault(FEDMF, []).append(beside)
                own = cost_of(
                    lambda factors=factors, number=number: factors._train_once(data.loaders[0], number, None, False)
                )
                costs_of_stage.setdefault(name, []).append(own)
            of_turn = {name: _mean(costs) for name, costs in costs_of_stage.items()}
            heads = [of_turn["head"]] * (config["epochs"] - len(stages) - 1)
            of_turn[WHOLE] = _mean([of_turn[name] for name in names[: len(stages) + 1]] + heads)
            for name, cost in of_turn.items():
                tell(turn, arguments.turns, name, cost)
                if turn:  # the first is not counted
                    costs.setdefault(name, []).append(cost)
    return whole_turns(costs)


def _mean(costs: list[Cost]) -> Cost:
    return Cost(mean(cost.clock for cost in costs), mean(cost.processor for cost in costs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--turns", type=int, default=5, help="counted turns, after one that is not counted")
    parser.add_argument("--heads", type=int, default=3, help="rounds of heads in a turn")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    keep_freed_memory()
    others = Others()
    with processor_settings(threads=1):
        costs = measured(arguments)
    print(table(costs, FEDMF, others.cores()))
    if arguments.out:
        content = {name: [asdict(cost) for cost in taken] for name, taken in costs.items()}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
