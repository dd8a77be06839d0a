"""A config's dataset, made: read from its folder, or downloaded by RecBole first; what RecBole refuses is a sentence."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from recbole_fedkd.compat import single_process_barrier
from recbole_fedkd.data.dataset import FedKDDataset
from recbole_fedkd.data.loading import recbole_dataset_class
from recbole_fedkd.errors import InputError


def create_dataset(config: Any) -> Any:
    """The dataset of a config; downloads through RecBole what is not there.

    Raises:
        InputError: no such dataset, or no way to download it; the sentence says what to put where.
    """
    with _sole_download(Path(config["data_path"])) as existed:
        return _load_dataset(config, existed)


@contextmanager
def _sole_download(folder: Path) -> Iterator[bool]:
    """Tell whether a dataset's folder is there; while it is not, no other process goes on.

    RecBole makes the folder before it has what belongs into it: who comes second waits, and finds it whole. The lock is there
    before the folder is, and goes when that is whole: nothing of it is left behind.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else ""
    file = Path(tempfile.gettempdir()) / f"recbole_fedkd-{user}-{digest}.lock"
    existed = folder.exists() and not file.exists()  # in this order
    if not existed:
        with FileLock(file):
            existed = folder.exists()
            try:
                if not existed:
                    yield False
            finally:
                with suppress(OSError):
                    file.unlink()
    if existed:
        yield True


def _load_dataset(config: Any, existed: bool) -> Any:
    """The dataset of a config, whose folder was there before or not; raises what :func:`create_dataset` does."""
    name, folder = config["dataset"], Path(config["data_path"])
    try:
        with single_process_barrier():
            kind = FedKDDataset if config["label_mode"] is not None else recbole_dataset_class(config)
            return kind(config)
    except InputError:
        raise
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        if existed:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"dataset '{name}' is not in '{folder}' and cannot be downloaded ({error}): download the RecBole atomic files "
            f"of '{name}' and put {name}.inter (and .user, .item) into '{folder}', or name their parent by --data_path"
        ) from error
    except ValueError as error:
        if not existed and "known dataset name" in str(error):
            raise InputError(
                f"dataset '{name}' is unknown: '{folder}' does not exist and RecBole has no download of that name"
            ) from error
        reason = re.sub(r"np\.str_\((.*?)\)", r"\1", str(error))  # numpy 2 shows the type of a name
        raise InputError(f"dataset '{name}' in '{folder}' cannot be loaded: {reason}") from error
    except (KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise InputError(f"dataset '{name}' in '{folder}' cannot be loaded as configured: {reason}") from error


@contextmanager
def samples_made(config: Any, dataset: Any) -> Iterator[None]:
    """Around the loaders and samplers of RecBole, of training and of judging: what they refuse is a sentence.

    Raises:
        InputError: they cannot make samples of this dataset.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise InputError(_why_not_split(config, dataset, str(error))) from error


def _why_not_split(config: Any, dataset: Any, reason: str) -> str:
    """Why RecBole cannot make samples of a dataset, in the words of whoever has the dataset."""
    name = f"dataset '{config['dataset']}'"
    if dataset.item_num == 2:  # with the padding item
        return f"{name} has one item, so that there is nothing to sample or to rank it against"
    if "num_samples=0" in reason:
        return f"{name} has no row to train on: every user has too few interactions for the split"
    if dataset.user_num == 2 and "interacted with all items" in reason:
        return (
            f"{name} has one user, who has interacted with all its items, so that there is none to sample as a negative"
        )
    return f"{name} cannot be split or sampled as configured: {reason}"
