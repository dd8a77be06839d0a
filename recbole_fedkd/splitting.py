"""What a federation begins with: a data set cut into parties, or a public catalogue to which each party brings its own file."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.utils import FeatureSource, init_seed
from torch import Tensor

from recbole_fedkd.compat import pickles_refused, recbole_warnings_silenced
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.config.needs import check_has_clients
from recbole_fedkd.data import importing
from recbole_fedkd.data.creation import create_dataset, samples_made
from recbole_fedkd.data.known import check_dataset
from recbole_fedkd.data.preparation import data_preparation
from recbole_fedkd.data.roles import FIELDS, KEYS
from recbole_fedkd.data.schema import ClientRows, DataSchema, read_schema, rows_of_clients
from recbole_fedkd.data.side_files import side_table
from recbole_fedkd.errors import InputError, listed
from recbole_fedkd.files import writable_folder
from recbole_fedkd.machines.coordinator import check_manifest
from recbole_fedkd.machines.folders import (
    IDENTITY,
    USERS_OF_PARTY,
    check_catalogue,
    check_free,
    check_party_brings,
    keys_of_party,
    party_folders,
)
from recbole_fedkd.machines.judgeable import check_judgeable
from recbole_fedkd.machines.manifest import Manifest, write_manifest, write_party
from recbole_fedkd.quick_start import _prepare_data

MANIFEST = "manifest"
_MADE_UP_ROWS = 10


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
    config = _config_of_parties(model, dataset, files, keys)
    check_free(out)
    check_dataset(config["dataset"], Path(config["data_path"]))
    data = _prepare_data(config)
    splits, owners = [loader._dataset for loader in data.loaders], data.client_of_user
    assert owners is not None
    schema = read_schema(splits[0], int(owners.max()) + 1)
    check_manifest(Manifest(out / MANIFEST, config, schema))
    writable_folder(out, f"folder '{out}'")
    folders = party_folders(out, range(schema.clients))
    write_manifest(config, schema, out / MANIFEST, folders)
    train, *held_out = (rows_of_clients(split, owners) for split in splits)
    for number, folder in folders.items():
        phases = {phase: parts[number] for phase, parts in zip(("valid", "test"), held_out, strict=True)}
        write_party(out / MANIFEST, number, train[number], folder, phases)
    return list(folders.values())


def _config_of_parties(
    model: str | None, dataset: str | None, files: list[str], keys: Mapping[str, Any]
) -> FedKDConfig:
    config = FedKDConfig(model, dataset, files, None, keys)
    check_has_clients(config)
    check_judgeable(config)
    return config


def catalogue_manifest(
    items: Path,
    model: str | None,
    dataset: str | None,
    out: Path,
    files: list[str],
    keys: Mapping[str, Any],
    users: int,
) -> DataSchema:
    """Make the manifest of a public catalogue, to which each party brings its own rows (:func:`bring`).

    What RecBole makes of the catalogue is read off a data set of made-up rows, of which nothing is kept: every item has one.

    Args:
        items: of all parties; a ``.item`` file, or a CSV, TSV or parquet file with an id and features, if there are any.
        model: model name.
        dataset: what the federation's data are called.
        out: the manifest's folder, which is made.
        files: config files.
        keys: that win over them; ``label_values`` is the label set, which no party's rows may decide.
        users: the most that one party may have.

    Raises:
        InputError: bad input of any kind; nothing is written then.
    """
    name = importing.check_name(dataset or items.stem)
    config = _config_of_parties(model, name, files, keys)
    check_free(out)
    check_catalogue(config, users)
    with tempfile.TemporaryDirectory(prefix="recbole_fedkd-") as folder:
        tokens = _copy_catalogue(items, Path(folder), name)
        importing.write_atomic(_made_up(tokens, config), Path(folder), name, _fields(config))
        free = {
            **dict.fromkeys(keys_with("filters")),
            "holdout_clients": 0.0,
            "partition": "random",
            "data_path": folder,
        }
        whole = FedKDConfig(model, name, files, None, {**keys, **free})
        with _muted():
            train = _prepare_data(whole).loaders[0]._dataset
        schema = read_schema(train, config["client_num"])
    if missing := set(tokens) - set(schema.numbers_of_tokens[schema.item_field]):
        raise InputError(
            f"items {listed(sorted(missing))} of '{items}' do not come through filter_inter_by_user_or_item"
        )
    known = torch.ones(schema.item_num, dtype=torch.bool)
    known[0] = False
    user_num = 1 + users * schema.clients
    columns = {**schema.columns, schema.user_field: replace(schema.columns[schema.user_field], tokens=user_num)}
    more = {**schema.more, USERS_OF_PARTY: users}
    known_items = None if schema.known_items is None else known
    schema = replace(schema, user_num=user_num, columns=columns, more=more, known_items=known_items)
    for key in ("rating_threshold", "threshold"):  # made of label_values where nothing is set
        config[key] = whole[key]
    check_manifest(Manifest(out, config, schema))
    writable_folder(out, f"folder '{out}'")
    write_manifest(config, schema, out, party_folders(out.parent, range(schema.clients)))
    return schema


@contextmanager
def _muted() -> Iterator[None]:
    """What there is to say of made-up rows is of no use to anybody."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _fields(config: Any) -> dict[str, str]:
    """What a config calls the columns of interactions."""
    return {role: config[key] for role, key in KEYS.items()}


def _copy_catalogue(items: Path, folder: Path, name: str) -> list[str]:
    """Write a catalogue as a data set's ``.item`` file, where it has features; returns the items."""
    table = importing.read_table(items)
    column = importing.id_column(list(map(str, table.columns)), "item", f"'{items}'")
    ids = importing.tokens_of(table[column])
    tokens = [token for token in dict.fromkeys(ids) if token not in ("", "[PAD]")]
    if dropped := len(ids) - len(tokens):
        again = listed(list(dict.fromkeys(ids[ids.duplicated()])))
        logging.getLogger().warning(
            f"dropped {dropped} rows of '{items}': no item, or one that was there before{f' ({again})' if again else ''}"
        )
    if len(tokens) < 2:
        raise InputError(f"'{items}' has {len(tokens)} item(s) in column '{column}'; a catalogue has two at least")
    (folder / name).mkdir()
    if items.suffix == ".item":
        (folder / name / f"{name}.item").write_bytes(items.read_bytes())
    elif len(table.columns) > 1:
        side_table(table, "item", column, tokens, f"'{items}'").write(folder, name)
    return tokens


def _made_up(tokens: list[str], config: Any) -> pd.DataFrame:
    """Rows in which every item and every label is met, of enough users for all clients."""
    users = 2 * config["client_num"] + 8
    rows_of_user = min(len(tokens), max(_MADE_UP_ROWS, -(-len(tokens) // users)))
    row = np.arange(users * rows_of_user)
    labels = [f"{value:g}" for value in config["label_values"]]
    columns = {
        "user": np.char.add("u", (row // rows_of_user).astype(str)),
        "item": np.array(tokens, dtype=object)[row % len(tokens)],
        "rating": np.array(labels, dtype=object)[row // rows_of_user % len(labels)],
        "time": row.astype(str),
    }
    return pd.DataFrame({FIELDS[role]: column for role, column in columns.items()}, dtype=object)


@dataclass(frozen=True)
class Brought:
    """What came of a party's own file.

    Attributes:
        imported: its rows, and which were dropped and why.
        outside: items that are not in the catalogue, to their rows, which are left out.
        rows: that each split holds.
        users: of the party.
    """

    imported: importing.Imported
    outside: Mapping[str, int]
    rows: Mapping[str, int]
    users: int

    def __str__(self) -> str:
        """A look at it, a few lines."""
        lines = [str(self.imported)]
        if self.outside:
            lines.append(
                f"left out {sum(self.outside.values())} rows of {len(self.outside)} items outside the catalogue: "
                f"{listed(list(self.outside))}"
            )
        counts = ", ".join(f"{count} {phase}" for phase, count in self.rows.items())
        return "\n".join([*lines, f"{self.users} users; rows: {counts}"])


def bring(
    file: Path, manifest: Path, number: int, out: Path, named: Mapping[str, str], keys: Mapping[str, Any] | None = None
) -> Brought:
    """Make a party's folder of its own file, split by the manifest's rule; nothing of it goes anywhere.

    Args:
        file: a ``.inter`` file, or a CSV, TSV or parquet file with a row per interaction.
        manifest: folder of the manifest of a catalogue.
        number: of the party, from 0.
        out: the party's folder, which is made.
        named: role to the column that plays it, as far as somebody says so; see :func:`importing.import_table`.
        keys: see :meth:`Manifest.load`.

    Raises:
        InputError: bad input of any kind; nothing is written then.
    """
    read = Manifest.load(manifest, keys, keys_of_party())
    schema = read.schema
    check_party_brings(manifest, number)
    read.identity_of(out, number)
    check_free(out, apart_from=IDENTITY)
    imported = importing.import_table(importing.read_table(file), named, f"'{file}'")
    known = imported.table["item_id"].isin(schema.numbers_of_tokens[schema.item_field])
    outside = imported.table["item_id"][~known].value_counts().to_dict()
    if not known.any():
        raise InputError(
            f"no item of '{file}' is in the catalogue of '{manifest}': column '{imported.columns['item']}' holds items such as "
            f"'{next(iter(outside))}', the catalogue such as '{list(schema.numbers_of_tokens[schema.item_field])[1]}'"
        )
    imported.table = imported.table[known].reset_index(drop=True)
    with tempfile.TemporaryDirectory(prefix="recbole_fedkd-") as folder:
        phases = _split_as_ruled(imported.table, manifest, Path(folder), dict(keys or {}), schema, number, file)
    writable_folder(out, f"folder '{out}'")
    train = phases.pop("train")
    write_party(manifest, number, train, out, phases)
    rows = {name: len(part.interactions[schema.item_field]) for name, part in {"train": train, **phases}.items()}
    return Brought(imported, outside, rows, len(train.users))


@recbole_warnings_silenced()
@pickles_refused()
def _split_as_ruled(
    table: pd.DataFrame, manifest: Path, folder: Path, keys: dict[str, Any], schema: DataSchema, number: int, file: Path
) -> dict[str, ClientRows]:
    """A party's rows by split, as a run of the manifest's config would load and split them, in the manifest's numbers."""
    own = [
        name
        for name, column in schema.columns.items()
        if column.source in (FeatureSource.INTERACTION.value, FeatureSource.USER_ID.value, FeatureSource.ITEM_ID.value)
    ]
    read = Manifest.load(manifest, {**keys, "data_path": str(folder)}).config
    fields = _fields(read)
    # Labels by a threshold take the place of the ratings that they are made of.
    needed = {role: name for role, name in fields.items() if name in own or role == "rating"}
    if absent := [name for role, name in needed.items() if FIELDS[role] not in table]:
        raise InputError(f"'{file}' has no column for {listed(absent)}, which the manifest's rows have")
    importing.write_atomic(table, folder, read["dataset"], fields)
    loaded = {"load_col": {"inter": list(needed.values())}}
    config = Manifest.load(manifest, {**keys, "data_path": str(folder), **loaded}).config
    config.of_one_party = True
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    with samples_made(config, dataset):
        splits = [loader._dataset for loader in data_preparation(config, dataset)]
    most, users_there = schema.more[USERS_OF_PARTY], int(dataset.user_num) - 1
    if users_there > most:
        raise InputError(f"'{file}' has {users_there} users; a party of this manifest has {most} at most")
    users = torch.arange(1, users_there + 1) + number * most
    phases = {}
    for name, split in zip(("train", "valid", "test"), splits, strict=True):
        interactions = {
            column: _in_numbers_of(schema, dataset, column, split.inter_feat[column], number * most)
            for column in own
            if column in split.inter_feat  # of clicks the label is nowhere: each is one
        }
        phases[name] = ClientRows(users, interactions, {})
    return phases


def _in_numbers_of(schema: DataSchema, dataset: Any, column: str, values: Tensor, first: int) -> Tensor:
    """A column of a party's rows in the manifest's numbers."""
    if column == schema.user_field:
        return values + first
    if column not in schema.numbers_of_tokens:
        return values
    known = schema.numbers_of_tokens[column]
    numbers: Iterable[int] = [known[str(token)] for token in dataset.field2id_token[column]]
    return torch.tensor(list(numbers))[values]
