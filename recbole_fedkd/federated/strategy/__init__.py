"""Strategies: how clients learn together. A new one registers itself here and nowhere else."""

from recbole_fedkd.federated.strategy.base import (
    LocalResult,
    ServerState,
    Strategy,
    StrategySettings,
    to_tensors,
)
from recbole_fedkd.federated.strategy.federated_averaging import (
    FederatedAveraging,
    GlobalDistillation,
    MutualDistillation,
)
from recbole_fedkd.federated.strategy.knowledge_exchange import AttentiveFederatedDistillation, FederatedDistillation
from recbole_fedkd.federated.strategy.local_training import LocalTraining

STRATEGIES: dict[str, type[Strategy]] = {}


def register_strategy(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy selectable as ``strategy: <name>``; usable as a class decorator from outside the package."""
    STRATEGIES[strategy.name] = strategy
    return strategy


for _strategy in (
    AttentiveFederatedDistillation,
    FederatedDistillation,
    FederatedAveraging,
    GlobalDistillation,
    MutualDistillation,
    LocalTraining,
):
    register_strategy(_strategy)

__all__ = [
    "STRATEGIES",
    "LocalResult",
    "ServerState",
    "Strategy",
    "StrategySettings",
    "register_strategy",
    "to_tensors",
]
