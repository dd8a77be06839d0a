"""Training sizes that fit the data: what is set for a hundred thousand rows, where there are fewer."""

from __future__ import annotations

import math
from logging import getLogger
from typing import Any

ROWS = 100_000
"""Interactions of a data set for which the defaults are set, and from which on they stand as they are."""

LEAST_BATCH = 16

FITTED = ("train_batch_size", "stopping_step")


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
        told = ", ".join(f"{key}={value}" for key, value in changed.items())
        getLogger().info(f"{rows} rows: {told}, as you set none")
