"""Links and devices of clients that are not here, and how long rounds of a federation take on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.errors import InputError

DRAWS = 1000
"""Rounds that are drawn for the mean length of one."""

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

    def __str__(self) -> str:
        """Half a line on it."""
        spread = "" if self.spread == "none" else f", stragglers {self.spread}:{self.shape:g}"
        device = f"{self.slowdown:g} x this machine's seconds"
        return f"{self.uplink:g} Mbit/s up, {self.downlink:g} down, {self.latency:g} ms, {device}{spread}"

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
        law = keys.pop("stragglers")
        spread, _, shape = law.partition(":")
        if spread not in SPREADS:
            raise InputError(f"stragglers is '{law[:40]}'; it must be none, lognormal:<sigma> or pareto:<index>")
        settings["spread"] = spread
        if spread != "none":
            # Beyond, a thousand draws have no longer the mean that a factor of mean 1 has.
            least, most = (0.0, 1.5) if spread == "lognormal" else (1.5, 1e12)
            settings["shape"] = _number("stragglers", shape or ("0.5" if spread == "lognormal" else "1.5"), least, most)
    return Network(**settings)


def _number(name: str, text: str, least: float, most: float = 1e12) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        upper = f" and <= {most:g}" if most < 1e12 else ""
        raise InputError(f"{name} is '{text[:40]}'; it must be a number >= {least:g}{upper}")
    return value


USUAL = Network()
"""The network that is reckoned with where nobody says another."""


def dealt(
    down: float, up: float, seconds: float, clients: int, samples: Sequence[float] | None = None
) -> NDArray[np.float64]:
    """What a round cost all of its clients, as what each of them did.

    Args:
        down: bytes to all.
        up: bytes from all.
        seconds: of training, of one client after the other.
        clients: of the round.
        samples: of each; None: alike.

    Returns:
        Bytes down, bytes up and seconds of each client ``[3, clients]``.
    """
    share = np.full(clients, 1 / clients)
    if samples is not None and sum(samples) > 0:
        share = np.array(samples, dtype=np.float64) / sum(samples)
    return np.stack([np.full(clients, down / clients), np.full(clients, up / clients), seconds * share])


def dealt_as_recorded(
    rounds: Sequence[tuple[float, float, float]],
    partition: Any,
    clients_per_round: int | None,
    engine: str | None = None,
) -> list[NDArray[np.float64]]:
    """:func:`dealt` for every round of a record; empty where there are no clients.

    Args:
        rounds: bytes down, bytes up and seconds of each.
        partition: the record's.
        clients_per_round: the config's.
        engine: that ran. Parties elsewhere train at the same time, so that a round's seconds, which there hold the way to them
            and judging, are the most that each has taken.
    """
    everybody = int((partition or {}).get("client_num") or 0)
    if not everybody:
        return []
    chosen = int(clients_per_round or everybody)
    samples = [float(client["samples"]) for client in partition.get("clients") or ()]
    known = samples if chosen == everybody == len(samples) else None
    if engine not in (None, "local", "fleet"):
        return [dealt(down, up, seconds * chosen, chosen) for down, up, seconds in rounds]
    return [dealt(down, up, seconds, chosen, known) for down, up, seconds in rounds]


def time_of(seconds: float) -> str:
    """Seconds for people."""
    return (
        f"{seconds:.3g} s"
        if seconds < 600
        else f"{seconds / 60:.3g} min"
        if seconds < 36000
        else f"{seconds / 3600:.3g} h"
    )
