"""The datasets that there are: folders under ``data_path``, and the names that RecBole downloads."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import recbole

from recbole_fedkd.errors import InputError, nearest

_ADDRESSES = Path(recbole.__file__).resolve().parent / "properties" / "dataset" / "url.yaml"


@lru_cache
def downloadable() -> frozenset[str]:
    """Names of the datasets that RecBole knows an address of."""
    return frozenset(re.findall(r"^([^\s:#]+):", _ADDRESSES.read_text(encoding="utf-8"), re.M))


def check_dataset(name: str, folder: Path) -> None:
    """Raise :class:`InputError`, with the nearest name, for a dataset that is neither there nor to be had.

    Args:
        name: the dataset's name.
        folder: where it would lie, ``<data_path>/<name>``.
    """
    try:
        if folder.is_dir() or (not folder.exists() and name in downloadable()):
            return
        there = folder.exists()
        beside = (
            {other.name for other in folder.parent.iterdir() if other.is_dir()} if folder.parent.is_dir() else set()
        )
    except OSError as error:
        raise InputError(f"dataset '{name}': '{folder}' cannot be read: {error.strerror}") from error
    if there:
        raise InputError(f"dataset '{name}': '{folder}' is a file; it must be a folder with {name}.inter in it")
    hint = nearest(name, beside | downloadable() | {"ml-100k"})
    raise InputError(
        f"dataset '{name}' is unknown: '{folder}' does not exist and RecBole has no download of that name"
        f"{hint or '; name the parent of its folder by --data_path'}"
    )
