"""The config: keys with their types and ranges, the user's values, and ``FedKDConfig``, which merges them.

What is imported here by name is loaded when it is asked for: keys are known, and refused, without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_fedkd.config.config import FedKDConfig
    from recbole_fedkd.config.files import PROPERTIES
    from recbole_fedkd.config.keys import Key, read_keys
    from recbole_fedkd.config.models import find_model, recbole_models
    from recbole_fedkd.config.values import parse_value, read_yaml

_LIES_IN = {
    "FedKDConfig": "config",
    "PROPERTIES": "files",
    "Key": "keys",
    "read_keys": "keys",
    "find_model": "models",
    "recbole_models": "models",
    "parse_value": "values",
    "read_yaml": "values",
}

__all__ = ["PROPERTIES", "FedKDConfig", "Key", "find_model", "parse_value", "read_keys", "read_yaml", "recbole_models"]


def __getattr__(name: str) -> Any:
    if name not in _LIES_IN:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_LIES_IN[name]}"), name)
