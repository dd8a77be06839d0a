"""The optimiser that the key ``learner`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from recbole_fedkd.errors import InputError
from recbole_fedkd.model.shared import check_patterns, matching
from recbole_fedkd.optim import AdamToSGD


def _parameter_groups(module: nn.Module, rates: Mapping[str, float]) -> Any:
    """A network's parameters for an optimiser: those that a pattern of ``rates`` matches have that learning rate."""
    if not rates:
        return module.parameters()
    parameters = dict(module.named_parameters())
    check_patterns("learning_rates", rates, parameters)
    pattern_of = matching(parameters, rates)
    groups: dict[str | None, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(pattern_of.get(name), []).append(parameter)
    return [{"params": group, **({"lr": rates[key]} if key is not None else {})} for key, group in groups.items()]


def switch_keys(config: Any) -> dict[str, Any]:
    """The keys of a switch from Adam to SGD, by the names that its optimisers have for them."""
    return {key: config[key] for key in ("switch_test", "switch_threshold", "switch_reach")}


def build_optimizer(config: Any, module: nn.Module, name: str) -> Optimizer:
    """The optimiser that ``learner`` names, for one network.

    Raises:
        InputError: unknown learner (RecBole would quietly take Adam), or a pattern of ``learning_rates`` that fits nothing.
    """
    rate, decay = config["learning_rate"], config["weight_decay"]
    params = _parameter_groups(module, config["learning_rates"])
    learner = str(config["learner"]).lower()
    if learner == "adam_to_sgd":
        return AdamToSGD(params, rate, weight_decay=decay, name=name, **switch_keys(config))
    simple: dict[str, Callable[..., Optimizer]] = {
        # One pass over the weights: an eighth of the time of torch's default, which is a tenth of a training step.
        "adam": partial(torch.optim.Adam, fused=True),
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }
    if learner not in simple:
        raise InputError(f"learner is '{config['learner']}'; it must be one of adam_to_sgd, {', '.join(simple)}")
    return simple[learner](params, lr=rate, weight_decay=decay)
