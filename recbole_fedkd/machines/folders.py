"""The folders of a federation, and what of them can be read without torch: the manifest's config, and a party's number."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.config.saved import check_names_no_file, values_to_read
from recbole_fedkd.data.labels import declared_labels
from recbole_fedkd.errors import InputError, shown
from recbole_fedkd.files import regular_file

MOST_USERS = 2_000_000
"""Users that the parties of a catalogue may have together: 0.8 KB of each is set up by every machine, 2 GB of so many."""

SCHEMA, TABLES = "schema.json", "schema.npz"
"""As ``data.schema`` calls them, which brings torch."""

USERS_OF_PARTY = "users_of_party"
"""Word of a catalogue's schema for the most users that one party may have."""

CONFIG, PARTY, ROWS = "config.json", "party.json", "rows.npz"
SERVER_STATE = "server.pth"
"""File of a coordinator's folder: all that it knows."""

KEYS, IDENTITY = "keys.json", "identity.key"
"""Of a federation under masks: everybody's public signing keys, in the manifest; and a party's private one, in its folder."""


def keys_of_party() -> Set[str]:
    """Keys that a party may say otherwise than the manifest: its machine's, which files it opens, and how private it stays."""
    return keys_with("machine") | keys_with("opens") | keys_with("party")


def keys_of_coordinator() -> Set[str]:
    """Keys that a coordinator may say otherwise than the manifest: its machine's, how long, and how many must answer."""
    of_run = keys_with("resumable") - keys_with("judging")
    return keys_with("machine") | keys_with("opens") | of_run | keys_with("coordinator")


def read_config(folder: Path, given: Mapping[str, Any], own: Set[str] | None, config_class: Callable[..., Any]) -> Any:
    """The config of a manifest, as :meth:`Manifest.load` says, by a class of configs."""
    file = regular_file(folder / CONFIG)
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        check_names_no_file(saved, given, file)
        read = partial(config_class, saved["model"], saved["dataset"], checkpoint_values=values_to_read(saved))
        config = read(command_line=given)
        if own is not None and given.keys() - own:
            public = read(command_line={key: given[key] for key in given.keys() & own})
            derived = keys_with("derived")
            named = {key: given[key] for key in given.keys() & (keys_with("manifest") | derived)}
            follows = own | derived | keys_with("computed")
            here = {key: value for key, value in config.plain_values().items() if key not in follows}
            _check_public({**here, **named}, public.plain_values(), folder)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"'{file}' is not the config of a manifest: {reason}") from error
    return config


def read_party(folder: Path) -> tuple[int, str]:
    """The number of the party that a folder is of, and the digest of its manifest.

    Raises:
        InputError: the folder is that of none.
    """
    file = regular_file(folder / PARTY)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return int(content["number"]), str(content["manifest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"'{file}' does not say which party it is: {reason}") from error


def _check_public(here: Mapping[str, Any], public: Mapping[str, Any], folder: Path) -> None:
    """Raise :class:`InputError` for the first key that is not the manifest's."""
    for key in sorted(here):
        if here[key] != public.get(key):
            raise InputError(
                f"{key} is {shown(here[key])} here and {shown(public.get(key))} in manifest '{folder}', by which everybody "
                "computes; leave it out, or make a manifest with it"
            )


_MARKS = {PARTY: "a party's folder", TABLES: "a manifest", SERVER_STATE: "a coordinator's folder"}


def check_apart(out: Path, own: str = "") -> None:
    """Raise :class:`InputError` where a new folder would be, lie in, or hold a party's, a coordinator's or a manifest.

    Args:
        out: the folder.
        own: file that it may hold itself, of these marks.
    """
    whole = out.resolve()
    inside = whole.iterdir() if whole.is_dir() and os.access(whole, os.R_OK) else ()
    for folder in (whole, *whole.parents, *inside):
        for name, what in _MARKS.items():
            if (folder / name).is_file() and not (folder == whole and name == own):
                how = "is" if folder == whole else "lies in" if folder in whole.parents else "holds"
                raise InputError(f"out '{out}' {how} {what}, '{folder}'; name a folder of its own")


def check_party_brings(manifest: Path, number: int) -> None:
    """Raise :class:`InputError` where a manifest is none of a catalogue, or has no party of this number to bring rows to it."""
    file = regular_file(manifest / SCHEMA)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        brought, clients = USERS_OF_PARTY in content["more"], int(content["clients"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{file}' is not a schema: {type(error).__name__}: {error}") from error
    if not brought:
        raise InputError(
            f"'{manifest}' was cut with its parties; one that they bring rows to is made by: manifest <items>"
        )
    if not 0 <= number < clients:
        raise InputError(f"number is {number}; the manifest's parties are 0 to {clients - 1}")


def party_folders(folder: Path, numbers: Sequence[int]) -> dict[int, Path]:
    """Where the folders of parties lie beside a manifest."""
    width = len(str(max(numbers, default=0)))
    return {number: folder / f"party-{number:0{width}d}" for number in numbers}


def check_free(out: Path, apart_from: str = "") -> None:
    """Raise :class:`InputError` where a new folder cannot be made: one with files is there, or it is not apart."""
    if out.exists() and (not out.is_dir() or any(file.name != apart_from for file in out.iterdir())):
        raise InputError(f"'{out}' is there already and not empty; name another by --out")
    check_apart(out)


def check_catalogue(config: Any, users: int) -> None:
    """Raise :class:`InputError` where a config does not say of a catalogue what only parties' rows could say else.

    Args:
        config: of a federation.
        users: the most that one party may have.
    """
    if not config["label_values"]:
        raise InputError("a catalogue does not say which labels there are; name them, such as label_values=[1,2,3,4,5]")
    if len(declared_labels(np.empty(0), config["label_values"], config["RATING_FIELD"])) < 2:
        raise InputError(f"label_values is {config['label_values']}; a federation needs two labels at least")
    if users * config["client_num"] > MOST_USERS:
        raise InputError(
            f"users is {users} for each of {config['client_num']} parties; together they may have {MOST_USERS:,} at most"
        )
    if (config["load_col"] or {}).get("user"):
        raise InputError(
            "load_col names columns of users, which are their parties' own; a catalogue has none: leave them out"
        )
