"""The config of a checkpoint, which may come from anybody: it says how to compute, and not which files to open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from recbole_fedkd.checkpoint.reading import Checkpoint, open_checkpoint
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.given import read_given
from recbole_fedkd.config.keys import described_keys, keys_with
from recbole_fedkd.config.saved import check_names_no_file, values_to_read
from recbole_fedkd.errors import InputError
from recbole_fedkd.files import LAST, regular_file


def resumable_keys() -> Set[str]:
    """Keys that a resumed run may change: how long, where and how loud, not what is computed."""
    return keys_with("aside") | keys_with("resumable")


def check_same_config(saved: Mapping[str, Any], current: Mapping[str, Any], source: str | Path) -> None:
    """Raise :class:`InputError` for the first key, outside :func:`resumable_keys`, that differs from the checkpoint's."""
    for key in sorted((saved.keys() | current.keys()) - resumable_keys()):
        if saved.get(key) != current.get(key):
            raise InputError(
                f"checkpoint '{source}' is that of another config: {key} is {saved.get(key)!r} there "
                f"and {current.get(key)!r} here"
            )


def resumed_config(
    checkpoint: Checkpoint,
    model: str | type | None,
    dataset: str | None,
    config_file_list: list[str] | None,
    config_dict: Mapping[str, Any] | None,
    command_line: Mapping[str, Any] | None,
    source: str | Path,
) -> FedKDConfig:
    """The config saved in a checkpoint, with the keys that a resumed run may change taken from the user.

    Args:
        checkpoint: the checkpoint.
        model: a name, or the class of a model that this package cannot find by name.
        dataset: its name, if the user gives it again.
        config_file_list: config files of the user.
        config_dict: keys that win over them.
        command_line: keys that win over these.
        source: what the user calls the checkpoint; kept as the key ``resume``.

    Raises:
        InputError: the user's own keys contradict the checkpoint's, or the checkpoint's config cannot be used or names files
            to open that the user does not name.
    """
    saved = checkpoint.state["config"]
    for key in keys_with("kept"):
        if not isinstance(saved.get(key), described_keys()[key].types):
            raise InputError(f"checkpoint '{source}' cannot be used: its config has no usable '{key}'")
    given = read_given(config_file_list, config_dict, command_line)
    for key, asked_for in (("model", model), ("dataset", dataset)):
        wanted = asked_for or given.pop(key, None)
        name = getattr(wanted, "__name__", wanted)
        if name is not None and name != saved[key]:
            raise InputError(f"checkpoint '{source}' is that of {key} {saved[key]}, not of {name}")
    check_names_no_file(saved, given, source)
    base = values_to_read(saved)
    folder = checkpoint.file.resolve().parent.parent
    if isinstance(saved.get("checkpoint_dir"), str) and Path(saved["checkpoint_dir"]).resolve() == folder:
        # Beside the run that goes on; anywhere else is for the user to say.
        base["checkpoint_dir"] = saved["checkpoint_dir"]
    last_word = {**(command_line or {}), "resume": str(source)}
    chosen = model if isinstance(model, type) else saved["model"]
    try:
        config = FedKDConfig(chosen, saved["dataset"], config_file_list, config_dict, last_word, base)
        current = config.plain_values()
    except InputError:
        raise
    except Exception as error:  # RecBole's Config raises whatever comes on values that no run writes
        raise InputError(
            f"the config of checkpoint '{source}' cannot be used: {type(error).__name__} {str(error)[:200]}"
        ) from error
    check_same_config(saved, current, source)
    if "data_path" not in given and not Path(config["data_path"]).is_dir():
        raise InputError(
            f"the data of checkpoint '{source}' is not in '{config['data_path']}', where it was; name the folder that "
            f"'{saved['dataset']}' lies in by data_path"
        )
    return config


def check_unspent(checkpoint: Checkpoint, source: str | Path) -> None:
    """Raise :class:`InputError` where ``privacy`` has let out more after a checkpoint than it knows of.

    That is so where its run has gone further, or where another run has gone on with it, see :func:`mark_spent`.
    """
    state, latest = checkpoint.state, checkpoint.file.with_name(LAST)
    if checkpoint.file.name != LAST and latest.is_file():
        later = open_checkpoint(latest).state
        if later["epoch"] > state["epoch"] and later["records"][: len(state["records"])] == state["records"]:
            raise InputError(
                f"checkpoint '{source}' is that of round {state['epoch'] + 1}, and its run has spent of privacy until round "
                f"{later['epoch'] + 1}, which cannot be taken back; resume from '{latest}'"
            )
    mark = _mark_of(checkpoint)
    if mark.is_file():
        raise _spent(mark, source)


def mark_spent(checkpoint: Checkpoint, by: Path | None) -> None:
    """Leave beside a checkpoint that a run has gone on with it and lets something out under ``privacy``.

    Args:
        checkpoint: that the run has gone on with.
        by: its folder; None: it keeps none.

    Raises:
        InputError: another run has, also if it runs at the same time.
    """
    mark = _mark_of(checkpoint)
    try:
        with mark.open("x", encoding="utf-8") as writing:
            json.dump({"resumed_in": None if by is None else str(by)}, writing)
    except FileExistsError:
        raise _spent(mark, checkpoint.file) from None


def _mark_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.file.with_name(f"spent-{checkpoint.digest[:16]}.json")  # a best one may be the last one


def _spent(mark: Path, source: str | Path) -> InputError:
    try:
        folder = json.loads(regular_file(mark).read_text(encoding="utf-8"))["resumed_in"]
    except (OSError, ValueError, KeyError, TypeError):  # being written
        folder = None
    where, instead = (
        ("", "start a new run, which adds to it") if folder is None else (f" in '{folder}'", "resume from there")
    )
    return InputError(
        f"checkpoint '{source}' has been gone on with{where}, which spends of privacy, and a second time would spend it twice "
        f"('{mark}' says so); {instead}"
    )
