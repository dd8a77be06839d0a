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

ENGINES = {"local": LocalEngine, "fleet": FleetEngine}

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
    "LabelledSamples",
    "LocalEngine",
    "RecBoleFleetPopulation",
    "RecBoleSamples",
    "RoundReport",
    "batched_optimizer",
    "disagreement",
    "obstacle",
]
