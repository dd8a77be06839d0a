"""What the data and the machine allow: said before training, or when memory ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.errors import InputError, TrainingError, shown


def check_limits(config: Any, dataset: Any) -> None:
    """Check what a config asks for against the training data and this machine.

    Raises:
        InputError: the user's ``topk`` is beyond the catalogue, or vectors of users and items alone
            are more than there is memory.
    """
    config.fit_catalogue(dataset.item_num - 1)
    size = config["embedding_size"]
    if not isinstance(size, int):
        return
    # Nobody's system survives the attempt to hold more than it has.
    needed, there = 4 * size * (dataset.user_num + dataset.item_num), psutil.virtual_memory().total
    if needed > there:
        raise InputError(
            f"embedding_size is {size}: the vectors of {dataset.user_num - 1} users and {dataset.item_num - 1} items take "
            f"{needed / 1e9:.0f} GB, and this machine has {there / 1e9:.0f} GB"
        )


@contextmanager
def memory_watched(config: Any) -> Iterator[None]:
    """Say in one sentence that memory has ended, and which keys need less of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        sentence = str(error)
        ended = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not ended and not re.search(
            "can't allocate memory|not enough memory|calculation overflow|out of memory", sentence
        ):
            raise
        keys = sorted(keys_with("memory") & set(config.plain_values()))
        values = ", ".join(f"{key}={shown(config[key])}" for key in keys if config[key] is not None)
        raise TrainingError(f"memory has ended; smaller values of these need less: {values}") from error


def refuse_mixed_precision(config: Any, error: Exception) -> None:
    """Raise :class:`TrainingError` if an error is that of operations that torch has in single precision only."""
    reason = str(error)
    if config["enable_amp"] and ("dtype" in reason or "scalar type" in reason):
        raise TrainingError(
            f"enable_amp=True does not go with model '{config['model']}', parts of which are computed in single precision only "
            f"({reason}); set enable_amp=False"
        ) from error


@contextmanager
def processor_settings(threads: int) -> Iterator[None]:
    """Threads of torch, and denormals flushed to zero, for as long as a run takes; the process is left as it was.

    Moments of rarely touched embedding rows decay into denormals, which are slow and worth nothing.
    """
    before, flushed = torch.get_num_threads(), not torch.tensor(2e-39).div(2)  # torch does not tell it
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(bool(flushed))
        torch.set_num_threads(before)
