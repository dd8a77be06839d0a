"""Engines run a strategy; no learning rule lives here."""

from recbole_fedkd.engine.base import ClientError, Engine, RoundReport
from recbole_fedkd.engine.fleet.engine import FleetEngine
from recbole_fedkd.engine.local import LocalEngine
from recbole_fedkd.engine.remote import InProcess, RemoteEngine, Transport

ENGINES = {"local": LocalEngine, "fleet": FleetEngine, "processes": RemoteEngine, "flower": RemoteEngine}

__all__ = [
    "ENGINES",
    "ClientError",
    "Engine",
    "FleetEngine",
    "InProcess",
    "LocalEngine",
    "RemoteEngine",
    "RoundReport",
    "Transport",
]
