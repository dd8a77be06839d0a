"""The config: keys with their types and ranges, the user's values, and ``FedKDConfig``, which merges them.

It is loaded when it is asked for: keys are known, and refused, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_fedkd.config.config import FedKDConfig

__all__ = ["FedKDConfig"]


def __getattr__(name: str) -> Any:
    if name != "FedKDConfig":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from recbole_fedkd.config.config import FedKDConfig

    return FedKDConfig
