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

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import InputError
from recbole_fedkd.limits import processor_settings
from recbole_fedkd.quick_start import _prepare
from recbole_fedkd.record import RUN_RECORD

DRAWS = 1000
"""Rounds that are drawn for the mean length of one."""

_PROBES = 2
SPREADS = ("none", "lognormal", "pareto")


@dataclass(frozen=True)
class Network:
    """Links and devices of clients.

    Attributes:
        uplink: Mbit/s from a client.
        downlink: Mbit/s to a client.
        latency: milliseconds one way.
        slowdown: how many times longer a client computes than this machine.
        spread: how much slower or faster a client is in a round than usual, a factor of mean 1: none, ``lognormal`` with the
            standard deviation ``shape`` of its logarithm, or ``pareto`` with the tail index ``shape``.
        shape: of the spread.
    """

    uplink: float = 10.0
    downlink: float = 50.0
    latency: float = 40.0
    slowdown: float = 1.0
    spread: str = "none"
    shape: float = 0.5

    def seconds(self, down: NDArray[Any], up: NDArray[Any], compute: NDArray[Any], seed: int = 0) -> float:
        """Mean length of a round, which is as long as its slowest client takes.

        Args:
            down: bytes to every client of the round ``[n]``.
            up: bytes from them ``[n]``.
            compute: seconds that each trains on this machine ``[n]``.
            seed: of the draws.
        """
        if not len(down):
            return 0.0
        sent = 8e-6 * (down / self.downlink + up / self.uplink) + 2e-3 * self.latency
        usual = sent + self.slowdown * compute
        return float((usual * self._factors(len(usual), seed)).max(-1).mean())

    def _factors(self, clients: int, seed: int) -> NDArray[np.float64]:
        dice = np.random.default_rng(seed)
        if self.spread == "lognormal":
            return dice.lognormal(-(self.shape**2) / 2, self.shape, (DRAWS, clients))
        if self.spread == "pareto":
            return (1 + dice.pareto(self.shape, (DRAWS, clients))) * (self.shape - 1) / self.shape
        return np.ones((1, clients))


def network_of(keys: dict[str, str]) -> Network:
    """Take what describes a network out of the command line's keys.

    Raises:
        InputError: a value is no number, or none that a network can have.
    """
    settings: dict[str, Any] = {}
    for name, least in (("uplink", 1e-6), ("downlink", 1e-6), ("latency", 0.0), ("slowdown", 1e-6)):
        if name in keys:
            settings[name] = _number(name, keys.pop(name), least)
    if "stragglers" in keys:
        given = keys.pop("stragglers")
        spread, _, shape = given.partition(":")
        if spread not in SPREADS:
            raise InputError(f"stragglers is '{given[:40]}'; it must be none, lognormal:<sigma> or pareto:<index>")
        settings["spread"] = spread
        if spread != "none":
            settings["shape"] = _number("stragglers", shape or "0.5", 0.0 if spread == "lognormal" else 1.001)
    return Network(**settings)


def _number(name: str, text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < 1e12:
        raise InputError(f"{name} is '{text[:40]}'; it must be a number >= {least:g}")
    return value


@dataclass(frozen=True)
class Cost:
    """What rounds cost.

    Attributes:
        what: they are rounds of.
        rounds: down, up and seconds of training of every client of every round, ``[3, clients of the round]`` each.
        marks: round, from 1, to what there is to say of it.
    """

    what: str
    rounds: Sequence[NDArray[np.float64]]
    marks: Mapping[int, str]

    def table(self, network: Network) -> str:
        """Lines for people: a round, and until each mark."""
        lengths = np.array(
            [network.seconds(each[0], each[1], each[2], place) for place, each in enumerate(self.rounds)]
        )
        moved = np.array([each[:2].sum() for each in self.rounds])
        last = self.rounds[-1]
        device = f"{network.slowdown:g} x this machine's seconds"
        spread = "" if network.spread == "none" else f", stragglers {network.spread}:{network.shape:g}"
        lines = [
            self.what,
            f"network: {network.uplink:g} Mbit/s up, {network.downlink:g} down, {network.latency:g} ms, {device}{spread}",
            f"a round: {last.shape[1]} clients, {last[0].sum():,.0f} B down, {last[1].sum():,.0f} B up, {lengths[-1]:.3g} s "
            f"(of which links {network.seconds(last[0], last[1], 0 * last[2]):.3g} s, if nobody computed)",
        ]
        for number, mark in sorted(self.marks.items()):
            lines.append(f"{mark}: {moved[:number].sum():,.0f} B, {_time(lengths[:number].sum())}")
        return "\n".join(lines)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds < 600
        else f"{seconds / 60:.3g} min"
        if seconds < 36000
        else f"{seconds / 3600:.3g} h"
    )


def probe(model: str | None, dataset: str | None, files: list[str], keys: Mapping[str, Any]) -> Cost:
    """Two rounds here, of which nothing is kept, for what all of them would cost.

    The first round is often another than those after it: nothing was learned yet, and clients hold nothing to tell a change of.
    """
    config = FedKDConfig(model, dataset, files, None, {"show_progress": False, **keys})
    if config["engine"] in ("processes", "flower"):  # the same rounds, of which this process's seconds are all
        config = FedKDConfig(model, dataset, files, None, {"show_progress": False, **keys, "engine": "local"})
    if not config.federated:
        raise InputError(f"strategy is {config['strategy']}, which has no clients; a federation has")
    with processor_settings(config["torch_threads"]):
        trainer = _prepare(config)[0]
        engine = trainer.engine
        if engine is None:
            raise InputError(f"strategy is {config['strategy']} with one client, which sends nothing")
        costs = []
        try:
            for index in range(min(_PROBES, config["epochs"])):
                began = process_time()
                report = engine.run_round(index)
                spent, clients = process_time() - began, list(report.bytes_down)
                samples = np.array([engine.samples[number] for number in clients], dtype=np.float64)
                down, up = (
                    np.array([each[number] for number in clients], dtype=np.float64)
                    for each in (report.bytes_down, report.bytes_up)
                )
                costs.append(np.stack([down, up, spent * samples / samples.sum()]))
        finally:
            engine.close()
    epochs = config["epochs"]
    rounds = [*costs[:1], *[costs[-1]] * (epochs - 1)]
    what = f"{config['model']} ({config['strategy']}) on {config['dataset']}, {len(engine.sizes)} clients, engine {engine.name}"
    marks = {epochs: f"{epochs} rounds (early stopping may end it before)"}
    return Cost(what, rounds, marks)


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
        clients = int((head["partition"] or {}).get("client_num") or 0)
        chosen = head["config"].get("clients_per_round") or clients
        rounds_of_clients = [
            np.array([line["bytes_down"] / chosen, line["bytes_up"] / chosen, line["seconds"] / chosen])[
                :, None
            ].repeat(chosen, 1)
            for line in rounds
        ]
        best, what = result["best_round"], str(head["row"])
    except OSError as error:
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
