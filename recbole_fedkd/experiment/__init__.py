"""An experiment: a grid of runs described by one yaml file, each run in a process of its own, kept as records.

What is imported here by name is loaded when it is asked for: what is wrong with a file is told without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_fedkd.experiment.grid import Cell, Experiment, expand, read_experiment
    from recbole_fedkd.experiment.runner import Outcome, run_experiment

_LIES_IN = {
    "Cell": "grid",
    "Experiment": "grid",
    "Outcome": "runner",
    "expand": "grid",
    "read_experiment": "grid",
    "run_experiment": "runner",
}

__all__ = ["Cell", "Experiment", "Outcome", "expand", "read_experiment", "run_experiment"]


def __getattr__(name: str) -> Any:
    if name not in _LIES_IN:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_LIES_IN[name]}"), name)
