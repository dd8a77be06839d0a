"""Defaults that fit the data: sizes that are set for a hundred thousand rows, and what a network sees of its users."""

from __future__ import annotations

import math
from logging import getLogger
from typing import Any

ROWS = 100_000
"""Interactions of a data set for which the defaults are set, and from which on they stand as they are."""

LEAST_BATCH = 16

FITTED = ("train_batch_size", "stopping_step")

REG_WEIGHT_OF_KNOWN = 1e-3
"""Of a network on all data that starts from what is known: with less it grows sure of its rows' labels in a few epochs."""


def fitted(batch_size: int, patience: int, rows: int) -> tuple[int, int]:
    """Samples of a step and validations without a better one, for a data set of so many rows.

    An epoch keeps about as many steps, of a power of two samples each, and patience as many samples: with the batch of a large
    data set a small one takes a step or two an epoch, and is given up before anything is learned.
    """
    share = min(1.0, max(rows, 1) / ROWS)
    if share == 1:
        return batch_size, patience
    smaller = 2 ** math.ceil(math.log2(max(batch_size * share, 1)))
    return min(batch_size, max(LEAST_BATCH, smaller)), math.ceil(patience / share)


def fit_rows(config: Any, rows: int) -> None:
    """Fit the defaults of a network of this package to a data set of so many rows; the user's own keys stay as they are."""
    trained = config.reads_features or config.learns_factors
    free = [key for key in FITTED if key not in config.external_config_dict]
    if not trained or not free:
        return
    values = dict(zip(FITTED, fitted(config["train_batch_size"], config["stopping_step"], rows), strict=True))
    changed = {key: values[key] for key in free if values[key] != config[key]}
    config.final_config_dict.update(changed)
    if changed:
        changes = ", ".join(f"{key}={value}" for key, value in changed.items())
        getLogger().info(f"{rows} rows: {changes}, as you set none")


def fit_features(config: Any, context: bool) -> None:
    """Whether a network sees what is known of a pair, and what holds it to that, unless the user says.

    Where rows have context columns it does not: what the other rows of a user say leaves a training row's own label out, so
    that few rows give it away by what is missing. A network starts from that, and does not come to what the context explains.
    """
    given, why = config.external_config_dict, ""
    changed: dict[str, Any] = {}
    if not config.reads_features or not config["known_features"]:
        return
    if context and given.get("known_features") is None:
        changed, why = {"known_features": False}, "the rows have context columns"
    elif not config.federated and "reg_weight" not in given:
        changed, why = {"reg_weight": REG_WEIGHT_OF_KNOWN}, "the network starts from what is known"
    config.final_config_dict.update(changed)
    for key, value in changed.items():
        getLogger().info(f"{key}={value}: {why}, and you set none")
