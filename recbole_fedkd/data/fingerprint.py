"""What a checkpoint knows of its data: enough to tell other data and to restore the order of the rows, and no row or token.

Ids are numbered in the order in which tokens appear, and splits cut the rows in their order. A model therefore belongs to the
rows *and* their order. The same rows in another order are the same data: they are put back into the order in which they were
trained on, and then everything else, ids and splits, is the same by itself.

A row's hash is a keyed BLAKE2b of its loaded columns, 128 bits, the key being drawn for each run. Nothing of a single row is
kept:

- in every checkpoint, per file: number of rows, columns and types, number of distinct tokens, one digest of the sorted row
  hashes (the content) and one of them as they stand (the order), and per split the number of rows and one digest;
- once in the run's folder, ``rows.pth``: at which place of the file the first, second, ... row by sorted hash stands, a
  permutation that tells nothing without the rows.

What that protects: nobody reads a user, an item or a row from it, nor tests one guess after the other, because each digest is
over all rows at once. What it does not: who has a whole data set can tell that it is this one, for the key lies beside it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from recbole_fedkd.errors import InputError

Hashes = NDArray[np.uint64]
_KEY_BYTES = 16


@dataclass(frozen=True)
class FilePrint:
    """Fingerprint of the loaded columns of one file.

    Attributes:
        rows: number of rows.
        columns: names and types, in the file's order.
        tokens: number of distinct tokens of the columns of type ``token``.
        content: digest of the rows, whatever their order.
        order: digest of the rows in their order.
    """

    rows: int
    columns: dict[str, str]
    tokens: dict[str, int]
    content: str
    order: str


class Fingerprint:
    """The fingerprints of a data set's files, made while they are read; or held against those of a checkpoint.

    Args:
        known: what :meth:`state` returned for the checkpoint's run; None for a new run.
        places: gives what :meth:`places` returned for it, where that is there; asked only if the order is another.
        source: what sentences call the checkpoint.

    Raises:
        InputError: ``known`` is not of the form that :meth:`state` returns.
    """

    def __init__(
        self,
        known: Mapping[str, Any] | None = None,
        places: Callable[[], Mapping[str, Any]] = dict,
        source: str = "",
    ) -> None:
        self._source, self._known_places = source, places
        self._known: dict[str, FilePrint] | None = None
        self._known_splits: dict[str, Any] | None = None
        self.key = secrets.token_bytes(_KEY_BYTES)
        if known is not None:
            try:
                self.key = bytes.fromhex(known["key"])
                self._known = {str(name): FilePrint(**saved) for name, saved in known["files"].items()}
                self._known_splits = {str(name): dict(split) for name, split in known["splits"].items()}
                well_formed = len(self.key) == _KEY_BYTES and all(
                    isinstance(file.columns, dict) and isinstance(file.tokens, dict) for file in self._known.values()
                )
            except (AttributeError, KeyError, TypeError, ValueError):
                well_formed = False
            if not well_formed:
                raise InputError(f"checkpoint '{source}' cannot be used: its fingerprint of the data is none")
        self._files: dict[str, FilePrint] = {}
        self._splits: dict[str, dict[str, Any]] = {}
        self._places: dict[str, torch.Tensor] = {}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "key": self.key.hex(),
            "files": {name: asdict(file) for name, file in self._files.items()},
            "splits": self._splits,
        }

    def places(self) -> dict[str, torch.Tensor]:
        """Per file, the places ``[rows]`` at which the rows by sorted hash stand; for ``rows.pth``."""
        return dict(self._places)

    def take(self, name: str, table: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
        """A file has been read: note it, or hold it against the checkpoint's and restore the order of its rows.

        Args:
            name: the file's name behind that of the data set, such as ``inter``.
            table: its loaded columns.
            kinds: their types.

        Returns:
            The rows in the order in which the run that is gone on with has them.

        Raises:
            InputError: other data, or an order that cannot be restored.
        """
        hashes = row_hashes(table, self.key)
        canonical = np.lexsort((hashes[:, 1], hashes[:, 0]))
        print_ = self._print(table, kinds, hashes, canonical)
        if self._known is not None:
            known = self._known.get(name)
            sentence = f"the data are not those of checkpoint '{self._source}': file .{name}"
            if known is None:
                raise InputError(f"{sentence} was not loaded there; take it away, or name its columns by unload_col")
            changed = _what_changed(known, print_)
            if changed:
                raise InputError(f"{sentence} {changed}")
            if known.order != print_.order:
                rows = self._restored_order(name, canonical)
                table = table.iloc[rows].reset_index(drop=True)
                hashes, canonical = hashes[rows], np.argsort(rows)[canonical]
                print_ = self._print(table, kinds, hashes, canonical)
                if known.order != print_.order:
                    raise InputError(self._unknown_order(name))
        self._files[name] = print_
        self._places[name] = torch.from_numpy(canonical.astype(np.int32 if len(table) < 2**31 else np.int64))
        return table

    def _print(
        self, table: pd.DataFrame, kinds: Mapping[str, str], hashes: Hashes, canonical: NDArray[np.int64]
    ) -> FilePrint:
        tokens = {field: int(table[field].nunique()) for field in table if kinds.get(str(field)) == "token"}
        columns = {str(field): kinds[str(field)] for field in table}
        return FilePrint(len(table), columns, tokens, self._digest(hashes[canonical]), self._digest(hashes))

    def _restored_order(self, name: str, canonical: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the table, in the order of the checkpoint's run."""
        places = self._known_places().get(name)
        if not isinstance(places, torch.Tensor) or places.dtype not in (torch.int32, torch.int64):
            raise InputError(self._unknown_order(name))
        if not torch.equal(places.long().flatten().sort().values, torch.arange(len(canonical))):
            raise InputError(self._unknown_order(name))
        rows = np.empty(len(canonical), dtype=np.int64)
        rows[places.flatten().numpy()] = canonical
        return rows

    def _unknown_order(self, name: str) -> str:
        return (
            f"the rows of file .{name} stand in another order than when checkpoint '{self._source}' was made, and the "
            "rows.pth of its run, which knows that order, is not beside it; copy it there, or restore the file"
        )

    def end_of_files(self) -> None:
        """All files have been read; raise :class:`InputError` for one that the checkpoint's run had and this has not."""
        for name in (self._known or {}).keys() - self._files.keys():
            raise InputError(f"the data are not those of checkpoint '{self._source}': file .{name} is missing")

    def take_splits(self, splits: Iterable[tuple[str, Any]], fields: Iterable[str]) -> None:
        """The rows have been dealt out: note how, or hold it against the checkpoint.

        Args:
            splits: names, and interactions as RecBole keeps them after splitting.
            fields: id columns by which rows are told apart.

        Raises:
            InputError: the same rows have been dealt out in another way.
        """
        columns = list(fields)
        for name, interactions in splits:
            # Sorted, because evaluation loaders sort what they are given, each in its way.
            users, items = (interactions[field].numpy().astype(np.int64) for field in columns)
            base = users.max(initial=0) + 1
            pairs = np.sort(items * base + users)
            ids = np.stack([pairs % base, pairs // base])
            content = hashlib.blake2b(ids.tobytes(), digest_size=32, key=self.key).hexdigest()
            self._splits[name] = {"rows": len(interactions), "content": content}
        if self._known_splits is None:
            return
        for name in {**self._splits, **self._known_splits}:
            known, own = self._known_splits.get(name, {}), self._splits.get(name, {})
            if own != known:
                counts = f"{known.get('rows', 'no')} rows there and {own.get('rows', 'no')} here"
                counts = (
                    counts if own.get("rows") != known.get("rows") else f"{own.get('rows')} rows, others than there"
                )
                raise InputError(
                    f"the data are those of checkpoint '{self._source}', but they are split in another way (in {name}, "
                    f"{counts}): the versions of recbole_fedkd, RecBole or torch differ from those that made it"
                )

    def _digest(self, hashes: Hashes) -> str:
        return hashlib.blake2b(np.ascontiguousarray(hashes).data, digest_size=32, key=self.key).hexdigest()


def row_hashes(table: pd.DataFrame, key: bytes) -> Hashes:
    """Keyed hash of every row, ``[rows, 2]``: the sum modulo 2^64 of the hashes of its values, each hashed with its column.

    Args:
        table: columns of texts, numbers, or arrays of such.
        key: 16 bytes.
    """
    total = np.zeros((len(table), 2), dtype=np.uint64)
    for field in table:
        values = table[field]
        if values.dtype == object and len(values) and isinstance(values.iloc[0], np.ndarray):
            values = pd.Series(["\x1f".join(map(str, value.tolist())) for value in values], dtype=object)
        codes, distinct = pd.factorize(values, use_na_sentinel=False)
        with_column = hashlib.blake2b(str(field).encode() + b"\0", digest_size=16, key=key)
        digests = []
        for written in map(_bytes_of, distinct.tolist()):
            hashed = with_column.copy()
            hashed.update(written)
            digests.append(hashed.digest())
        total += np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)[codes]
    return total


def _bytes_of(value: str | float) -> bytes:
    """Different bytes for different values; a text is never a number, and 3.0 is 3."""
    if isinstance(value, str):
        return b"t" + value.encode("utf-8", "surrogatepass")
    return b"n%d" % value if isinstance(value, int) or value.is_integer() else b"n" + repr(value).encode()


def _what_changed(known: FilePrint, current: FilePrint) -> str:
    """The end of a sentence that begins with the file; empty if nothing changed but the order."""
    lost, new = known.columns.keys() - current.columns.keys(), current.columns.keys() - known.columns.keys()
    if lost or new:
        parts = [f"lacks column(s) {', '.join(sorted(lost))}"] if lost else []
        parts += [f"has new column(s) {', '.join(sorted(new))}"] if new else []
        return " and ".join(parts)
    for field, kind in known.columns.items():
        if current.columns[field] != kind:
            return f"has column '{field}' of type {current.columns[field]}, which was {kind}"
    if list(known.columns) != list(current.columns):
        return f"has its columns in another order: {', '.join(current.columns)}, which was {', '.join(known.columns)}"
    changes = [] if known.rows == current.rows else [f"{current.rows} rows, which was {known.rows}"]
    changes += [
        f"{current.tokens[field]} different '{field}', which was {count}"
        for field, count in known.tokens.items()
        if current.tokens.get(field, 0) != count
    ]
    if changes:
        return f"has {' and '.join(changes)}"
    if known.content != current.content:
        return f"has as many rows ({known.rows}) as it had, with other values in them"
    return ""
