"""What commands look at before torch is loaded: keys, config files, and the files and folders that are named.

Where torch is loaded already nothing is looked at here: what a command does then looks at once, in the same words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from recbole_fedkd.config.early import check_early, early_config
from recbole_fedkd.config.given import read_given
from recbole_fedkd.config.needs import check_has_clients
from recbole_fedkd.config.plugins import check_plugins_there
from recbole_fedkd.errors import InputError
from recbole_fedkd.files import check_checkpoint, check_folders, writable_file

Asked = ParamSpec("Asked")


def before_torch(check: Callable[Asked, None]) -> Callable[Asked, None]:
    """Decorator of a check that has nothing to do once torch is loaded."""

    @wraps(check)
    def checked(*args: Asked.args, **kwargs: Asked.kwargs) -> None:
        if "torch" not in sys.modules:
            check(*args, **kwargs)

    return checked


@before_torch
def check_run(model: str | None, dataset: str | None, files: list[str], keys: Mapping[str, Any]) -> None:
    """Refuse what a run would refuse of its keys, its data's folder and the file of its result."""
    if resumed := read_given(files, None, keys).get("resume"):
        check_checkpoint(str(resumed))
        return
    config = check_early(model, dataset, files, keys)
    if config is None:
        return
    _check_data(config)
    if config["result_file"] is not None:
        writable_file(config["result_file"], "result_file")
    _check_clients(config)
    check_folders(config)


@before_torch
def check_federation(
    model: str | None, dataset: str | None, files: list[str], keys: Mapping[str, Any], out: Path | None = None
) -> None:
    """Refuse what a federation would refuse of its keys and its data's folder, and a folder that is not to be made."""
    config = check_early(model, dataset, files, keys)
    if config is not None:
        check_has_clients(config)
    if out is not None:
        from recbole_fedkd.machines.folders import check_free
        from recbole_fedkd.machines.judgeable import check_judgeable

        if config is not None:
            check_judgeable(config)
        check_free(out)
    if config is not None:
        _check_data(config)
        _check_clients(config)


@before_torch
def check_manifest_of_items(
    items: Path,
    model: str | None,
    dataset: str | None,
    out: Path,
    files: list[str],
    keys: Mapping[str, Any],
    users: int,
) -> None:
    """Refuse what a catalogue's manifest would refuse of its keys, and a file that is not there."""
    from recbole_fedkd.data.importing import check_name
    from recbole_fedkd.data.roles import check_table_file
    from recbole_fedkd.machines.folders import check_catalogue, check_free
    from recbole_fedkd.machines.judgeable import check_judgeable

    config = check_early(model, check_name(dataset or items.stem), files, keys)
    if config is not None:
        check_has_clients(config)
        check_judgeable(config)
    check_free(out)
    if config is not None:
        check_catalogue(config, users)
    check_table_file(items)


@before_torch
def check_manifest(
    folder: Path, keys: Mapping[str, Any], own: Callable[[], Set[str]], *further: Callable[[], object]
) -> None:
    """Refuse a manifest whose config cannot be read, and keys that are not its reader's to say; then what ``further`` does."""
    from recbole_fedkd.machines.folders import read_config

    def config_class(model: str, dataset: str, checkpoint_values: Mapping[str, Any], command_line: Any) -> Any:
        return early_config()(model, dataset, command_line=command_line, checkpoint_values=checkpoint_values)

    given = read_given([], None, keys)
    check_plugins_there(given.get("plugins"))
    if not given.get("plugins"):
        read_config(folder, keys, own(), config_class)
    for check in further:
        check()


def check_search(parameters: Sequence[Any], files: list[str], keys: Mapping[str, Any]) -> None:
    """Refuse keys that all trials would refuse, unknown ones that are searched, and a dataset that is not there.

    Nobody but the first trial would look for the dataset later, so that it is looked for here, torch or not.
    """
    config = check_early(None, None, files, keys)
    if config is not None:
        searched = [parameter.name for parameter in parameters]
        config.check_names(searched)
        if "data_path" not in searched:
            from recbole_fedkd.data.known import check_dataset

            check_dataset(config["dataset"], Path(config["data_path"]))


@before_torch
def check_cells(cells: Sequence[Any]) -> None:
    """Refuse an experiment of which no cell's keys make a config."""
    from recbole_fedkd.experiment.grid import none_starts

    first = None
    for cell in cells:
        try:
            check_early(None, None, [], cell.keys)
        except InputError as error:
            first = first or none_starts(cell, str(error))
        else:
            return
    if first is not None:
        raise first


def _check_data(config: Any) -> None:
    from recbole_fedkd.data.known import check_dataset
    from recbole_fedkd.data.layout import Layout

    check_dataset(config["dataset"], Path(config["data_path"]))
    Layout(config["field_separator"], config["seq_separator"], config["encoding"] or "utf-8")


def _check_clients(config: Any) -> None:
    if config.federated:
        from recbole_fedkd.data.partition import check_scheme

        check_scheme(config)
