"""Engines run a strategy; no learning rule lives here."""

from recbole_fedkd.engine.agreement import disagreement
from recbole_fedkd.engine.fleet import FleetEngine, batched_optimizer, obstacle
from recbole_fedkd.engine.local import LocalEngine, RoundReport
from recbole_fedkd.engine.samples import FleetTask, LabelledSamples, RecBoleSamples

ENGINES = {"local": LocalEngine, "fleet": FleetEngine}

__all__ = [
    "ENGINES",
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
