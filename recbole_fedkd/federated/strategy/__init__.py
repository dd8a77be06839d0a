"""Strategies: how clients learn together. A new one registers itself here and nowhere else."""

from recbole_fedkd.federated.strategy.base import LocalResult, ServerState, Strategy, check_additive, to_tensors
from recbole_fedkd.federated.strategy.ensemble_distillation import EnsembleDistillation
from recbole_fedkd.federated.strategy.federated_averaging import (
    FederatedAveraging,
    GlobalDistillation,
    MutualDistillation,
    MutualLearning,
)
from recbole_fedkd.federated.strategy.knowledge_exchange import AttentiveFederatedDistillation, FederatedDistillation
from recbole_fedkd.federated.strategy.local_training import LocalTraining
from recbole_fedkd.federated.strategy.sum_exchange import SumExchange
from recbole_fedkd.registry import Registry

STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "strategies")
register_strategy = STRATEGIES.register

for _strategy in (
    AttentiveFederatedDistillation,
    FederatedDistillation,
    FederatedAveraging,
    GlobalDistillation,
    MutualDistillation,
    MutualLearning,
    EnsembleDistillation,
    LocalTraining,
    SumExchange,
):
    register_strategy(_strategy)

__all__ = ["STRATEGIES", "LocalResult", "ServerState", "Strategy", "check_additive", "register_strategy", "to_tensors"]
