"""Engines run a strategy; no learning rule lives here."""

from recbole_fedkd.engine.base import ClientError, Engine, RoundReport
from recbole_fedkd.engine.fleet import (
    CompactPopulation,
    FactorFleetPopulation,
    FactorSamples,
    FleetEngine,
    FleetPopulation,
    FleetTask,
    LabelledSamples,
    RecBoleFleetPopulation,
    RecBoleSamples,
    batched_optimizer,
    disagreement,
    obstacle,
)
from recbole_fedkd.engine.local import LocalEngine
from recbole_fedkd.engine.remote import InProcess, RemoteEngine, Transport

ENGINES = {"local": LocalEngine, "fleet": FleetEngine, "processes": RemoteEngine}

__all__ = [
    "ENGINES",
    "ClientError",
    "CompactPopulation",
    "Engine",
    "FactorFleetPopulation",
    "FactorSamples",
    "FleetEngine",
    "FleetPopulation",
    "FleetTask",
    "InProcess",
    "LabelledSamples",
    "LocalEngine",
    "RecBoleFleetPopulation",
    "RecBoleSamples",
    "RemoteEngine",
    "RoundReport",
    "Transport",
    "batched_optimizer",
    "disagreement",
    "obstacle",
]
