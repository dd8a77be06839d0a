"""What is public about a dataset, and what one client holds of it; a client is built from the two alone."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.utils import FeatureSource
from torch import Tensor

from recbole_fedkd.data.features import FeatureField
from recbole_fedkd.data.labels import encode_labels
from recbole_fedkd.data.order import RECENCY_FIELD
from recbole_fedkd.errors import InputError
from recbole_fedkd.files import regular_file, write_json, written_whole

VERSION = 1
SCHEMA, TABLES = "schema.json", "schema.npz"
"""The files of a schema: what it says, and the arrays of items."""

_TENSORS = ("items", "known_items", "vectors")

Columns = dict[str, Tensor]
"""Name of a column to its values ``[rows, ...]``."""


@dataclass(frozen=True)
class ColumnKind:
    """What everybody knows of a column.

    Attributes:
        kind: value of RecBole's ``FeatureType``.
        source: value of RecBole's ``FeatureSource``.
        length: RecBole's ``field2seqlen``.
        tokens: its vocabulary, padding first; of the users, who are nobody's business, their number; None: numbers.
    """

    kind: str
    source: str
    length: int | tuple[int, ...]
    tokens: tuple[str, ...] | int | None


@dataclass(frozen=True)
class ClientRows:
    """What one client holds: rows of its own users, by the numbers that the schema gives to all.

    Attributes:
        users: numbers of its users ``[m]``, ascending.
        interactions: columns of its training rows ``[n, ...]``.
        profiles: columns of its users' features ``[m + 1, ...]``, padding first.
    """

    users: Tensor
    interactions: Columns
    profiles: Columns

    def save(self, file: Path) -> None:
        """Write them into one ``.npz`` file."""
        arrays = {"users": self.users.numpy()}
        for part in ("interactions", "profiles"):
            arrays |= {f"{part}/{name}": column.numpy() for name, column in getattr(self, part).items()}
        _write_arrays(arrays, file)

    @classmethod
    def load(cls, file: str | Path) -> ClientRows:
        """Read what :meth:`save` has written.

        Raises:
            InputError: no such file, or none of this kind.
        """
        arrays = _read_arrays(Path(file))
        parts: dict[str, Columns] = {"interactions": {}, "profiles": {}}
        for name, array in arrays.items():
            part, _, column = name.partition("/")
            if column and part in parts:
                parts[part][column] = array
        if "users" not in arrays or not parts["interactions"]:
            raise InputError(f"'{file}' does not hold the rows of a client; it has {sorted(arrays)}")
        return cls(arrays["users"], **parts)


@dataclass(frozen=True)
class DataSchema:
    """What server and clients of a federation know alike.

    Attributes:
        name: of the dataset.
        clients: their number.
        user_num: number of users, padding included.
        item_num: number of items, padding included.
        fields: RecBole's names of columns: ``uid_field``, ``iid_field``, ``label_field``, ``time_field``.
        columns: of all files.
        label_values: the ordered label set.
        positives: whether every row is a positive, so that no label is read.
        user: feature columns of users that the package's networks read.
        item: of items.
        context: of rows.
        more: other public attributes of RecBole's dataset, such as the longest history.
        items: columns of the items' features ``[item_num, ...]``; empty: there are none.
        known_items: whether a training row of anybody holds an item, bool ``[item_num]``; None: items are sampled of all.
        vectors: RecBole's ``preload_weight`` by field.
    """

    name: str
    clients: int
    user_num: int
    item_num: int
    fields: Mapping[str, str | None]
    columns: Mapping[str, ColumnKind]
    label_values: Sequence[float]
    positives: bool
    user: Sequence[FeatureField]
    item: Sequence[FeatureField]
    context: Sequence[FeatureField]
    more: Mapping[str, Any]
    items: Columns = field(default_factory=dict, compare=False)
    known_items: Tensor | None = field(default=None, compare=False)
    vectors: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False)

    @property
    def user_field(self) -> str:
        """Column of the user numbers."""
        return str(self.fields["uid_field"])

    @property
    def item_field(self) -> str:
        """Column of the item numbers."""
        return str(self.fields["iid_field"])

    def num(self, name: str) -> int:
        """Number of tokens of a column, padding included; as of RecBole's datasets."""
        tokens = self.columns[name].tokens
        return tokens if isinstance(tokens, int) else len(tokens or ())

    def context_fields(self) -> list[FeatureField]:
        """Feature columns of rows; as of the package's datasets."""
        return list(self.context)

    @cached_property
    def item_columns(self) -> Columns:
        """What the package's networks read of the items, the same memory for all that are built here."""
        return {field.name: field.read(self.items[field.name]) for field in self.item}

    @cached_property
    def vocabularies(self) -> dict[str, Any]:
        """RecBole's ``field2id_token``; of the users as many numbers."""
        return {
            name: range(column.tokens) if isinstance(column.tokens, int) else np.array(column.tokens)
            for name, column in self.columns.items()
            if column.tokens is not None
        }

    @cached_property
    def numbers_of_tokens(self) -> dict[str, dict[str, int]]:
        """RecBole's ``field2token_id``, but for the users."""
        return {
            name: {token: number for number, token in enumerate(column.tokens)}
            for name, column in self.columns.items()
            if isinstance(column.tokens, tuple)
        }

    def label_indices(self, rows: ClientRows) -> Tensor:
        """Label index of every training row ``[n]``; where all are positives, or rows have no label (``BPR``), 1."""
        labels = rows.interactions.get(str(self.fields["label_field"]))
        if self.positives or labels is None:
            return torch.ones(len(rows.interactions[self.item_field]), dtype=torch.long)
        return torch.from_numpy(encode_labels(labels.numpy(), self.label_values))

    def context_of(self, rows: ClientRows) -> Columns:
        """Context of every training row ``[n, ...]``, as networks read it."""
        return {field.name: field.read(rows.interactions[field.name]) for field in self.context}

    def own_numbers(self, rows: ClientRows) -> Tensor:
        """The user of every training row ``[n]`` by its number on the client, from 1."""
        return torch.searchsorted(rows.users, rows.interactions[self.user_field]) + 1

    def known_users(self, rows: ClientRows) -> Tensor:
        """Whether each user has a training row, by the numbers on the client, bool ``[m + 1]``; the padding has none."""
        known = torch.zeros(len(rows.users) + 1, dtype=torch.bool)
        known[self.own_numbers(rows)] = True
        return known

    def everybody(self) -> ClientRows:
        """All users with one made-up row each, of the first item: for what is the same whatever clients hold.

        Some models compute what they cannot of no row at all; what their parameters start from is drawn.
        """
        users = torch.arange(1, self.user_num)
        return self._made_up(users, users)

    def invented(self, users: int, rows: int, seed: int) -> ClientRows:
        """Users who never were, with rows of random items and labels in no context of anybody's.

        Args:
            users: their number.
            rows: of each.
            seed: of what is drawn.
        """
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.arange(1, users + 1)
        generated = self._made_up(numbers, numbers.repeat_interleave(rows))
        known = torch.arange(1, self.item_num) if self.known_items is None else self.known_items.nonzero().squeeze(1)
        drawn = {self.item_field: known[torch.randint(len(known), (users * rows,), generator=generator)]}
        label = self.fields["label_field"]
        if not self.positives and label in generated.interactions:
            values = torch.tensor(self.label_values)
            drawn[label] = values[torch.randint(len(values), (users * rows,), generator=generator)]
        return replace(generated, interactions={**generated.interactions, **drawn})

    def _made_up(self, users: Tensor, owners: Tensor) -> ClientRows:
        """Users without a profile, and rows of 1 (where no label is, of the first) whose users are ``owners``."""
        rows, profiles = {}, {}
        for name, column in self.columns.items():
            shape = column.length if isinstance(column.length, tuple) else (column.length,)
            shape = shape if column.kind.endswith("seq") else ()
            dtype = torch.float32 if column.kind.startswith("float") else torch.int64
            if column.source == FeatureSource.USER.value:
                profiles[name] = torch.zeros(len(users) + 1, *shape, dtype=dtype)
            elif column.source != FeatureSource.ITEM.value:
                rows[name] = torch.ones(len(owners), *shape, dtype=dtype)
        label = self.fields["label_field"]
        if not self.positives and label in rows and 1.0 not in self.label_values:
            rows[str(label)].fill_(self.label_values[0])
        return ClientRows(users, {**rows, self.user_field: owners}, profiles)

    def save(self, folder: Path) -> None:
        """Write it into a folder, as :data:`SCHEMA` and :data:`TABLES`."""
        content = {name: value for name, value in asdict(self).items() if name not in _TENSORS}
        write_json({"version": VERSION, **content}, folder / SCHEMA)
        arrays = {f"items/{name}": column.numpy() for name, column in self.items.items()}
        if self.known_items is not None:
            arrays["known_items"] = self.known_items.numpy()
        _write_arrays(arrays | {f"vectors/{name}": array for name, array in self.vectors.items()}, folder / TABLES)

    @classmethod
    def load(cls, folder: str | Path) -> DataSchema:
        """Read what :meth:`save` has written.

        Raises:
            InputError: a file is missing, or is no schema of this version.
        """
        file = regular_file(Path(folder) / SCHEMA)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content.pop("version")
            if version != VERSION:
                raise InputError(f"'{file}' is of version {version}, and this package reads version {VERSION}")
            content["columns"] = {name: _kind_of(column) for name, column in content["columns"].items()}
            for side in ("user", "item", "context"):
                content[side] = tuple(FeatureField(**entry) for entry in content[side])
            arrays = _read_arrays(Path(folder) / TABLES)
            content["known_items"] = arrays.get("known_items")
            content["items"] = {name[6:]: array for name, array in arrays.items() if name.startswith("items/")}
            content["vectors"] = {
                name[8:]: array.numpy() for name, array in arrays.items() if name.startswith("vectors/")
            }
            return cls(**content)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"'{file}' is not a schema: {type(error).__name__}: {error}") from error


def _kind_of(column: Mapping[str, Any]) -> ColumnKind:
    length, tokens = column["length"], column["tokens"]
    return ColumnKind(
        column["kind"],
        column["source"],
        tuple(length) if isinstance(length, list) else length,
        tuple(tokens) if isinstance(tokens, list) else tokens,
    )


def read_schema(dataset: Any, clients: int = 1) -> DataSchema:
    """What is public about a training split.

    Args:
        dataset: of any RecBole kind.
        clients: number of clients.

    Raises:
        InputError: ``preload_weight`` gives vectors of users, which are theirs.
    """
    columns = {}
    for name, kind in dataset.field2type.items():
        tokens: tuple[str, ...] | int | None = None
        if name == dataset.uid_field:
            tokens = int(dataset.user_num)
        elif name in dataset.field2id_token:
            tokens = tuple(map(str, dataset.field2id_token[name]))
        length = dataset.field2seqlen[name]
        length = tuple(map(int, length)) if isinstance(length, tuple) else int(length)
        columns[str(name)] = ColumnKind(kind.value, dataset.field2source[name].value, length, tokens)
    vectors = dict(getattr(dataset, "_preloaded_weight", {}))
    if dataset.uid_field in vectors:
        raise InputError("preload_weight gives vectors of users, which no client has of others; leave them out")
    features = getattr(dataset, "features", None)
    side = {"user": dataset.user_feat, "item": dataset.item_feat, "context": dataset.inter_feat}
    read = {
        name: tuple(FeatureField.of(dataset, column, table[column]) for column in getattr(features, name, ()))
        for name, table in side.items()
    }
    plain = {
        name: value
        for name, value in vars(dataset).items()
        if isinstance(value, bool | int | float | str) and name not in _NAMED and not name.startswith("_")
    }
    positives, known = dataset.config["label_mode"] == "implicit", None
    if not positives:
        known = torch.zeros(int(dataset.item_num), dtype=torch.bool)
        known[dataset.inter_feat[dataset.iid_field]] = True
    return DataSchema(
        dataset.dataset_name,
        clients,
        int(dataset.user_num),
        int(dataset.item_num),
        {name: getattr(dataset, name) for name in ("uid_field", "iid_field", "label_field", "time_field")},
        columns,
        list(label_values(dataset)),
        positives,
        more=plain,
        known_items=known,
        items=dict(dataset.item_feat.interaction) if dataset.item_feat is not None else {},
        vectors=vectors,
        **read,
    )


_NAMED = {"dataset_name", "dataset_path", "uid_field", "iid_field", "label_field", "time_field"}


def label_values(dataset: Any) -> list[float]:
    """The ordered label set of any RecBole dataset; without labels, one: that there was an interaction."""
    own: list[float] | None = getattr(dataset, "label_values", None)
    if own is not None:
        return own
    return [0.0, 1.0] if dataset.label_field in dataset.inter_feat else [1.0]


def all_rows(dataset: Any) -> ClientRows:
    """A training split as one client would hold it on which everybody lives."""
    profiles = dict(dataset.user_feat.interaction) if dataset.user_feat is not None else {}
    return ClientRows(torch.arange(1, dataset.user_num), dict(dataset.inter_feat.interaction), profiles)


def rows_of_clients(dataset: Any, client_of_user: Tensor, numbers: Iterable[int] | None = None) -> list[ClientRows]:
    """A training split, dealt out: one sort, and a slice for each client.

    Args:
        dataset: the training split, of any RecBole kind.
        client_of_user: ``[users]``, padding user 0: -1.
        numbers: of the clients that are asked for; None: all.
    """
    whole = all_rows(dataset)
    clients, client_of_user = int(client_of_user.max()) + 1, client_of_user.cpu()
    owners = client_of_user[whole.interactions[dataset.uid_field]]
    rows, row_starts = _dealt(owners, clients)
    users, user_starts = _dealt(client_of_user, clients)
    interactions = {name: column[rows] for name, column in whole.interactions.items()}
    parts = []
    for number in range(clients) if numbers is None else numbers:
        # Copies: a slice would have everybody's memory in its reach.
        own = slice(row_starts[number], row_starts[number + 1])
        members = users[user_starts[number] : user_starts[number + 1]].clone()
        padded = torch.cat([members.new_zeros(1), members])
        parts.append(
            ClientRows(
                members,
                {name: column[own].clone() for name, column in interactions.items()},
                {name: column[padded] for name, column in whole.profiles.items()},
            )
        )
    return parts


def _dealt(owners: Tensor, clients: int) -> tuple[Tensor, list[int]]:
    """Places of the entries in the order of their owners, and where each owner's begin; -1 owns nothing."""
    order = torch.argsort(owners, stable=True)
    return order, torch.searchsorted(owners[order], torch.arange(clients + 1)).tolist()


def latest_rows(users: Tensor, recency: Tensor | None, count: int, length: int) -> Tensor:
    """Row numbers of the latest interactions of every user, most recent first, ``[count, length]``; -1 where there is none.

    Args:
        users: of the rows ``[n]``, below ``count``.
        recency: place in time of each row ``[n]``; None: the order of the rows.
        count: number of users.
        length: number of interactions of each.
    """
    numbers = users.numpy()
    places = recency.numpy() if recency is not None else np.arange(len(numbers))
    order = np.lexsort((-places, numbers))
    numbers = numbers[order]
    slot = np.arange(len(numbers)) - np.searchsorted(numbers, np.arange(count))[numbers]
    kept = slot < length
    rows = torch.full((count, length), -1)
    rows[numbers[kept], slot[kept]] = torch.from_numpy(order[kept])
    return rows


def of_rows(column: Tensor, rows: Tensor) -> Tensor:
    """The values of the rows ``[users, slots]`` in a column ``[n, ...]``, 0 where there is no row."""
    return torch.cat([column, column.new_zeros(1, *column.shape[1:])])[rows]


def history_of(schema: DataSchema, rows: ClientRows, length: int) -> tuple[Tensor, Tensor, Columns]:
    """Items, label indices and context of the latest ``length`` training rows of each user of a client.

    Returns:
        ``[m + 1, length, ...]`` each, most recent first; padding users and slots are 0.
    """
    places = latest_rows(schema.own_numbers(rows), rows.interactions.get(RECENCY_FIELD), len(rows.users) + 1, length)
    context = {name: of_rows(column, places) for name, column in schema.context_of(rows).items()}
    items = of_rows(rows.interactions[schema.item_field], places)
    return items, of_rows(schema.label_indices(rows), places), context


def _write_arrays(arrays: Mapping[str, NDArray[Any]], file: Path) -> None:
    with written_whole(file) as temporary, temporary.open("wb") as stream:
        # A column may be called anything, and a name in an archive may not.
        numbered: dict[str, Any] = {f"array_{number}": array for number, array in enumerate(arrays.values())}
        np.savez_compressed(stream, names=np.array(list(arrays)), **numbered)


def _read_arrays(file: Path) -> Columns:
    """Arrays by name; raises :class:`InputError` for any other file."""
    try:
        with np.load(regular_file(file), allow_pickle=False) as archive:
            names = archive["names"].tolist()
            return {name: torch.from_numpy(archive[f"array_{number}"]) for number, name in enumerate(names)}
    except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        why = getattr(error, "strerror", None) or "it is truncated or damaged, or another file"
        raise InputError(f"'{file}' does not hold arrays of this package: {why}") from error
