"""Engines run a strategy; no learning rule lives here."""

from recbole_fedkd.engine.agreement import disagreement
from recbole_fedkd.engine.base import ClientError, Engine, RoundReport
from recbole_fedkd.engine.fleet import FleetEngine
from recbole_fedkd.engine.local import LocalEngine
from recbole_fedkd.engine.obstacle import batched_optimizer, obstacle
from recbole_fedkd.engine.samples import FleetTask, LabelledSamples, RecBoleSamples

ENGINES = {"local": LocalEngine, "fleet": FleetEngine}

__all__ = [
    "ENGINES",
    "ClientError",
    "Engine",
    "FleetEngine",
    "FleetTask",
    "LabelledSamples",
    "LocalEngine",
    "RecBoleSamples",
    "RoundReport",
    "batched_optimizer",
    "disagreement",
    "obstacle",
]
