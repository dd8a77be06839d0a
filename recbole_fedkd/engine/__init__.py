"""Engines run a strategy; no learning rule lives here."""

from recbole_fedkd.engine.local import LocalEngine, RoundReport

ENGINES = {"local": LocalEngine}

__all__ = ["ENGINES", "LocalEngine", "RoundReport"]
