"""What a federation would cost on a network: bytes, and seconds on links and devices that are not here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.config.needs import check_has_clients
from recbole_fedkd.data.known import check_dataset
from recbole_fedkd.errors import InputError
from recbole_fedkd.files import check_one_run
from recbole_fedkd.network import Network, dealt_as_recorded, time_of
from recbole_fedkd.record import RUN_RECORD

_PROBES = 3


@dataclass(frozen=True)
class Cost:
    """What rounds cost.

    Attributes:
        what: they are rounds of.
        rounds: down, up and seconds of training of every client of every round, ``[3, clients of the round]`` each.
        marks: round, from 1, to what there is to say of it.
        kind: of round that the last one is, where not all are alike.
    """

    what: str
    rounds: Sequence[NDArray[np.float64]]
    marks: Mapping[int, str]
    kind: str = ""

    def table(self, network: Network) -> str:
        """Lines for people: a round, and until each mark."""
        lengths = np.array(
            [network.seconds(spent[0], spent[1], spent[2], number) for number, spent in enumerate(self.rounds)]
        )
        moved = np.array([spent[:2].sum() for spent in self.rounds])
        last = self.rounds[-1]
        lines = [
            self.what,
            f"network: {network}",
            f"a round{self.kind}: {last.shape[1]} clients, {last[0].sum():,.0f} B down, {last[1].sum():,.0f} B up, "
            f"{lengths[-1]:.3g} s (of which links {network.seconds(last[0], last[1], 0 * last[2]):.3g} s, if nobody computed)",
        ]
        for number, mark in sorted(self.marks.items()):
            lines.append(f"{mark}: {moved[:number].sum():,.0f} B, {time_of(lengths[:number].sum())}")
        return "\n".join(lines)


def probe(model: str | None, dataset: str | None, files: list[str], keys: Mapping[str, Any]) -> Cost:
    """A few rounds here, of which nothing is kept, for what all of them would cost.

    The first round is often another than those after it: nothing was learned yet, and clients hold nothing to tell a change of;
    and what they say once comes down in the second. Of a strategy that exchanges in stages, all of these are run before.
    """
    from recbole_fedkd.config import FedKDConfig  # a run's record is read without torch
    from recbole_fedkd.limits import processor_settings
    from recbole_fedkd.quick_start import _prepare

    config = FedKDConfig(model, dataset, files, None, keys)
    if config["engine"] in ("processes", "flower"):  # the same rounds, of which this process's seconds are all
        config = FedKDConfig(model, dataset, files, None, {**keys, "engine": "local"})
    check_has_clients(config)
    check_dataset(config["dataset"], Path(config["data_path"]))
    with processor_settings(config["torch_threads"]):
        trainer = _prepare(config)[0]
        engine = trainer.engine
        if engine is None:
            raise InputError(f"strategy is {config['strategy']} with one client, which sends nothing")
        costs, exchange = [], engine.server.strategy.exchange_rounds
        try:
            epochs = engine.rounds_of_budget(trainer.epochs)
            for index in range(min(exchange + _PROBES, epochs)):
                began = process_time()
                report = engine.run_round(index)
                spent, clients = process_time() - began, list(report.bytes_down)
                samples = np.array([engine.samples[number] for number in clients], dtype=np.float64)
                down, up = (
                    np.array([sizes[number] for number in clients], dtype=np.float64)
                    for sizes in (report.bytes_down, report.bytes_up)
                )
                costs.append(np.stack([down, up, spent * samples / samples.sum()]))
        finally:
            engine.close()
    rounds = [*costs, *[costs[-1]] * (epochs - len(costs))]
    what = f"{config['model']} ({config['strategy']}) on {config['dataset']}, {len(engine.sizes)} clients, engine {engine.name}"
    marks = {epochs: f"{epochs} rounds (early stopping may end it before)"}
    if 0 < exchange < epochs:
        marks[exchange] = f"the {exchange} rounds of the exchange"
    return Cost(what, rounds, marks, " after the exchange" if 0 < exchange < epochs else "")


def of_run(folder: Path) -> Cost:
    """The rounds of a finished run, from its record.

    Raises:
        InputError: there is none, or it has no clients.
    """
    file = folder / RUN_RECORD
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        head, result = lines[0], lines[-1]
        rounds = [line for line in lines if line["kind"] == "round"]
        spent = [(line["bytes_down"], line["bytes_up"], line["seconds"]) for line in rounds]
        chosen, engine = head["config"].get("clients_per_round"), result.get("engine")
        rounds_of_clients = dealt_as_recorded(spent, head["partition"], chosen, engine)
        best, what = result["best_round"], str(head["row"])
    except OSError as error:
        check_one_run(folder, RUN_RECORD)
        raise InputError(f"'{file}' cannot be read: {error.strerror}; name the folder of a finished run") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise InputError(
            f"'{file}' is not the record of a run of a federation: {type(error).__name__}: {error}"
        ) from error
    if not rounds_of_clients:
        raise InputError(f"'{file}' has no round of a federation")
    marks = {len(rounds_of_clients): f"all {len(rounds_of_clients)} rounds"}
    if best:
        quality = ", ".join(f"{name} {value:.4f}" for name, value in (rounds[best - 1]["valid"] or {}).items())
        marks[best] = f"until the best round, {best}{f' ({quality})' if quality else ''}"
    return Cost(f"{what}, as it was recorded", rounds_of_clients, marks)
