"""Federated knowledge distillation for RecBole."""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"

__all__ = ["__version__", "load", "load_data_and_model", "run_recbole_fedkd"]


def __getattr__(name: str) -> Any:
    # Loading RecBole takes seconds; `--help` and `--version` need not wait for it.
    if name in ("run_recbole_fedkd", "load_data_and_model"):
        from recbole_fedkd import quick_start

        return getattr(quick_start, name)
    if name == "load":
        from recbole_fedkd.recommend import load

        return load
    raise AttributeError(f"module 'recbole_fedkd' has no attribute '{name}'")
