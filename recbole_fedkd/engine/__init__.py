"""Engines run a strategy; no learning rule lives here."""

from recbole_fedkd.engine.fleet import FleetEngine, FleetTask, batched_optimizer, obstacle
from recbole_fedkd.engine.local import LocalEngine, RoundReport

ENGINES = {"local": LocalEngine, "fleet": FleetEngine}

__all__ = ["ENGINES", "FleetEngine", "FleetTask", "LocalEngine", "RoundReport", "batched_optimizer", "obstacle"]
