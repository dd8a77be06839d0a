"""An experiment: a grid of runs described by one yaml file, each run in a process of its own, kept as records."""

from __future__ import annotations

from recbole_fedkd.experiment.grid import Cell, Experiment, expand, read_experiment
from recbole_fedkd.experiment.runner import Outcome, run_experiment

__all__ = ["Cell", "Experiment", "Outcome", "expand", "read_experiment", "run_experiment"]
