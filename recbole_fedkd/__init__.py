"""Federated knowledge distillation for RecBole.

What stands in ``__all__`` here and in ``recbole_fedkd.extend`` is public; everything else may change with any release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_fedkd.errors import InputError, TrainingError
    from recbole_fedkd.quick_start import load_data_and_model, run_recbole_fedkd
    from recbole_fedkd.recommend import Recommender, load
    from recbole_fedkd.report import write_report

__version__ = "0.3.0"

__all__ = [
    "InputError",
    "Recommender",
    "TrainingError",
    "__version__",
    "load",
    "load_data_and_model",
    "run_recbole_fedkd",
    "write_report",
]

_ROOMS = {
    "InputError": "errors",
    "Recommender": "recommend",
    "TrainingError": "errors",
    "load": "recommend",
    "load_data_and_model": "quick_start",
    "run_recbole_fedkd": "quick_start",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    # Loading RecBole takes seconds; `--help` and `--version` need not wait for it.
    if name in _ROOMS:
        from importlib import import_module

        return getattr(import_module(f"recbole_fedkd.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'recbole_fedkd' has no attribute '{name}'")
