"""What the ``fleet`` engine can run, and what stands in the way of all else."""

from __future__ import annotations

import traceback
from typing import Any

from recbole.data.dataloader import TrainDataLoader
from recbole.data.utils import get_dataloader
from recbole.utils import ModelType

from recbole_fedkd.engine.fleet.optimizers import BatchedAdam, BatchedAdamToSGD, BatchedOptimizer, BatchedSGD
from recbole_fedkd.errors import FAULTS
from recbole_fedkd.federated.knowledge import KNOWLEDGE, Knowledge
from recbole_fedkd.federated.knowledge.factors import FactorKnowledge
from recbole_fedkd.federated.strategy import STRATEGIES, Strategy
from recbole_fedkd.federated.strategy.knowledge_exchange import AttentiveFederatedDistillation
from recbole_fedkd.model.learner import switch_keys


def obstacle(config: Any, clients: int) -> str | None:
    """Why a config cannot run on this engine; None if it can.

    Args:
        config: the run's config.
        clients: number of clients.
    """
    strategy = STRATEGIES[config["strategy"]]
    clipping = config["clip_grad_norm"] or {}
    if clients == 1:
        return "a lone client trains as RecBole does, from the run's own streams"
    if config["privacy"] and config["privacy"].get("unit", "user") == "user" and config["partition"] != "user":
        return "privacy.unit=user over clients of many users shortens user by user"
    if config["secure_aggregation"]:
        return "secure_aggregation masks every client's own message"
    if not config.attentive and (hindrance := _foreign(config)) is not None:
        return hindrance
    if hasattr(config.model_class, "sums"):
        return f"model '{config['model']}' is made of sums over every client's own rows"
    if (method := _asks_clients(strategy, Strategy)) is not None:
        return f"strategy '{strategy.name}' overrides {method}, which asks every client's own network and samples"
    if strategy.exchanges_knowledge:
        kind = KNOWLEDGE[config["knowledge"]]
        if kind is not FactorKnowledge and (method := _asks_clients(kind, Knowledge)) is not None:
            return f"knowledge '{kind.name}' overrides {method}, which asks every client's own network and samples"
        if kind is FactorKnowledge and (method := _more_than_exchange(strategy)) is not None:
            return f"strategy '{strategy.name}' overrides {method}, which is not asked where item factors are exchanged"
    if str(config["learner"]).lower() not in ("adam", "sgd", "adam_to_sgd"):
        return f"learner '{config['learner']}' is not batched; adam, sgd and adam_to_sgd are"
    if config["learning_rates"] and str(config["learner"]).lower() == "adam_to_sgd":
        return "learner adam_to_sgd switches to one rate for all parameters, which learning_rates contradict"
    if config.reads_features and config["known_features"]:
        return "known_features are found client by client"
    if config["weight_decay"]:
        return "weight_decay moves every row of every item table, which clients hold in part"
    if set(clipping) - {"max_norm", "norm_type"} or clipping.get("norm_type", 2) != 2:
        return "clip_grad_norm is batched for max_norm and the L2 norm alone"
    return None


def _asks_clients(kind: type, base: type) -> str | None:
    """What a class overrides of that which is asked client by client; None: all is made of what a network says of a batch."""
    asked = ("statistics", "taken_in", "keeps")
    return next((name for name in asked if getattr(kind, name) is not getattr(base, name)), None)


def _more_than_exchange(strategy: type[Strategy]) -> str | None:
    """What a strategy overrides of the exchange of knowledge beside its objective; None: nothing."""
    own = {"name", "settings_type", "of", "loss", "objective", "pads", "adds_nothing", "elementwise", "without_effect"}
    hooks = [name for name in dir(Strategy) if not name.startswith("_") and name not in own]
    exchange = AttentiveFederatedDistillation
    return next((name for name in hooks if getattr(strategy, name) is not getattr(exchange, name)), None)


def _foreign(config: Any) -> str | None:
    """Why a model of RecBole's cannot run on this engine, as far as the config says."""
    if config["MODEL_TYPE"] not in (ModelType.GENERAL, ModelType.CONTEXT):
        return f"model '{config['model']}' is neither a general nor a context-aware one"
    if get_dataloader(config, "train") is not TrainDataLoader or config["transform"] or config["repeatable"]:
        return f"model '{config['model']}' has batches of its own making"
    return None


def batched_optimizer(config: Any) -> BatchedOptimizer:
    """The optimiser that ``learner`` names; :func:`obstacle` has seen that there is one."""
    rate = float(config["learning_rate"])
    learner = str(config["learner"]).lower()
    if learner == "adam_to_sgd":
        return BatchedAdamToSGD(rate, **switch_keys(config))
    return BatchedAdam(rate) if learner == "adam" else BatchedSGD(rate)


_OF_PACKING = (
    "recbole_fedkd.engine.fleet.",
    *(f"recbole_fedkd.federated.{module}" for module in ("lengths", "row_codecs", "stacked")),
)
"""Where the code lies that many clients go through at once."""


def is_of_packing(error: BaseException | None) -> bool:
    """Whether the code that packs clients is at fault, for which none of them can be left out.

    What is wrong with numbers or takes too much memory, torch and this package say by other errors.
    """
    frames = traceback.walk_tb(error.__traceback__ if error is not None else None)
    modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    raised_in = next((name for name in reversed(modules) if not name.startswith("torch.")), "")
    return isinstance(error, FAULTS) and raised_in.startswith(_OF_PACKING)
