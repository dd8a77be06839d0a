"""Search for hyper-parameters: what is searched, and the trials.

What is imported here by name is loaded when it is asked for: what is wrong with a file is told without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_fedkd.search.parameters import Parameter, read_parameters
    from recbole_fedkd.search.trials import Search, config_of, run_search, search_table

_LIES_IN = {
    "Parameter": "parameters",
    "Search": "trials",
    "config_of": "trials",
    "read_parameters": "parameters",
    "run_search": "trials",
    "search_table": "trials",
}

__all__ = ["Parameter", "Search", "config_of", "read_parameters", "run_search", "search_table"]


def __getattr__(name: str) -> Any:
    if name not in _LIES_IN:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_LIES_IN[name]}"), name)
