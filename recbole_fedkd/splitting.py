"""One data set, cut into a folder per party and a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.schema import read_schema, rows_of_clients
from recbole_fedkd.errors import InputError
from recbole_fedkd.files import writable_folder
from recbole_fedkd.machines.judging import check_judgeable
from recbole_fedkd.machines.manifest import party_folders, write_manifest, write_party
from recbole_fedkd.quick_start import _prepare_data

MANIFEST = "manifest"


def split_federation(
    model: str | None, dataset: str | None, out: Path, files: list[str], keys: Mapping[str, Any]
) -> list[Path]:
    """Cut a data set as a run of these keys would split it and deal it out.

    Args:
        model: model name.
        dataset: dataset name.
        out: folder that is made; the manifest lies in ``out/manifest``, each party in a folder beside it.
        files: config files.
        keys: that win over them.

    Returns:
        The folders of the parties.

    Raises:
        InputError: bad input of any kind; nothing is written then.
    """
    config = FedKDConfig(model, dataset, files, None, keys)
    if not config.federated:
        raise InputError(f"strategy is {config['strategy']}, which has no clients; a federation has")
    check_judgeable(config)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"folder '{out}' is there already and not empty; name another by --out")
    data = _prepare_data(config)
    splits, owners = [loader._dataset for loader in data.loaders], data.client_of_user
    assert owners is not None
    writable_folder(out, f"folder '{out}'")
    schema = read_schema(splits[0], int(owners.max()) + 1)
    folders = party_folders(out, range(schema.clients))
    write_manifest(config, schema, out / MANIFEST, folders)
    train, *held_out = (rows_of_clients(split, owners) for split in splits)
    for number, folder in folders.items():
        phases = {phase: parts[number] for phase, parts in zip(("valid", "test"), held_out, strict=True)}
        write_party(out / MANIFEST, number, train[number], folder, phases)
    return list(folders.values())
