"""Checkpoint files: plain dictionaries, written whole or not at all, read without running code, and what they hold of a run.

``best.pth`` and ``last.pth`` lie in a folder of the run's own; with the random states in them a resumed run goes on bit
for bit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_fedkd.errors import InputError
from recbole_fedkd.files import written_whole

CHECKPOINT_VERSION = 3
BEST, LAST = "best.pth", "last.pth"

# Keys that a resumed run may change: how long, where and how loud, not what is computed.
RESUMABLE_KEYS = frozenset({
    "epochs", "stopping_step", "show_progress", "state", "data_path", "checkpoint_dir", "result_file", "resume",
    "torch_threads", "gpu_id", "use_gpu", "device", "log_wandb", "wandb_project", "run_name",
    "metrics", "judged_metrics", "topk", "metric_decimal_place", "eval_batch_size",
})  # fmt: skip


def write_checkpoint(state: dict[str, Any], file: Path) -> None:
    """Write a checkpoint whole or not at all."""
    with written_whole(file) as temporary:
        torch.save(state, temporary)


def read_checkpoint(path: str | Path, of_folder: str = LAST) -> dict[str, Any]:
    """Read a checkpoint of this package without running any code from it.

    Args:
        path: a checkpoint file or a run folder.
        of_folder: name of the file that a folder stands for.

    Raises:
        InputError: no such file, not a whole checkpoint, or one of another version.
    """
    file = Path(path)
    if file.is_dir():
        file = file / of_folder
    if not file.is_file():
        raise InputError(f"checkpoint '{path}' does not exist")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that it did not write, torch.load raises whatever comes
        raise InputError(
            f"checkpoint '{file}' cannot be read: it is truncated, or not a checkpoint of recbole_fedkd"
        ) from error
    if not isinstance(state, dict) or "format_version" not in state:
        raise InputError(f"'{file}' is not a checkpoint of recbole_fedkd")
    if state["format_version"] != CHECKPOINT_VERSION:
        raise InputError(
            f"checkpoint '{file}' has format version {state['format_version']}; this version reads {CHECKPOINT_VERSION}"
        )
    return state


def check_same_config(saved: Mapping[str, Any], current: Mapping[str, Any], source: str | Path) -> None:
    """Raise :class:`InputError` for the first key, outside ``RESUMABLE_KEYS``, that differs from the checkpoint's."""
    for key in sorted(saved.keys() | current.keys()):
        if key not in RESUMABLE_KEYS and saved.get(key) != current.get(key):
            raise InputError(
                f"checkpoint '{source}' is that of another config: {key} is {saved.get(key)!r} there "
                f"and {current.get(key)!r} here"
            )


def random_state(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """States of all random streams of the process, and of some generators, as plain values and tensors."""
    numpy_state: Any = np.random.get_state()
    python_state = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(numpy_state[0]), torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
        "python": [python_state[0], list(python_state[1]), python_state[2]],
        "loaders": [generator.get_state() for generator in generators],
    }


def restore_random(state: Mapping[str, Any], generators: Sequence[torch.Generator]) -> None:
    """Put all streams, and as many generators as there were, where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    for generator, saved in zip(generators, state["loaders"], strict=True):
        generator.set_state(saved)
