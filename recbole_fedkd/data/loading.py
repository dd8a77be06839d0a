"""RecBole's datasets on our reader of atomic files: every dataset class reads, refuses and counts alike."""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import recbole.data.dataset as recbole_datasets
from recbole.data.dataset import Dataset
from recbole.utils import FeatureSource, FeatureType, ModelType

from recbole_fedkd.data.atomic import AtomicFile, Column, read_atomic, read_header
from recbole_fedkd.data.columns import (
    check_named_files,
    check_unused_columns,
    id_fields,
    is_loaded,
    lacks_its_id,
    loaded_columns,
    loads_what_is_there,
    number_fields,
    order_counts,
)
from recbole_fedkd.data.filtering import CountedFilters
from recbole_fedkd.data.fingerprint import Fingerprint
from recbole_fedkd.data.layout import Layout
from recbole_fedkd.data.order import TimeOrder
from recbole_fedkd.data.threshold import ThresholdLabels
from recbole_fedkd.errors import InputError, listed, shown

_SEQUENCES = (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ)


class AtomicFiles(CountedFilters):
    """Mixin in front of any of RecBole's dataset classes: files are read by :mod:`recbole_fedkd.data.atomic`.

    Ids, ratings, labels and, where order counts, timestamps are in every row, or the file is refused. A timestamp column is
    float64, or int64 where only that is exact, until RecBole turns it into float32 tensors.

    Attributes:
        fingerprint: of the files, for checkpoints; the config's, where the data must be those of one.
    """

    fingerprint: Fingerprint
    _parts: dict[str, tuple[Path, list[Column]]]

    def _load_data(self, token: str, dataset_path: str) -> None:
        self._parts = {}
        self.fingerprint = self.config.fingerprint or Fingerprint()
        super()._load_data(token, dataset_path)
        self.fingerprint.end_of_files()
        check_named_files(self.config)
        for suffix in self.config["unused_col"] or {}:
            table = getattr(self, f"{suffix}_feat", None)
            # A label may still be made of a column, and take its place.
            check_unused_columns(self.config, suffix, [] if table is None else list(table.columns))

    def _load_feat(self, filepath: str, source: Any) -> pd.DataFrame | None:
        """Replaces RecBole's: one table of a file's loaded columns, with the columns' properties set."""
        suffix = source.value if isinstance(source, FeatureSource) else source
        path = Path(filepath)
        if suffix != "inter" and not is_loaded(self.config, suffix):
            if suffix in ("kg", "link"):
                raise InputError(
                    f"model '{self.config['model']}' reads '{path}', but load_col names no column of {suffix}; name them, or "
                    "set load_col=None to load every column"
                )
            return None
        layout = Layout(
            self.config["field_separator"], self.config["seq_separator"], self.config["encoding"] or "utf-8"
        )
        header = read_header(path, layout)
        if lacks_its_id(self.config, suffix, header):
            (key, field), *_ = id_fields(self.config, suffix).items()
            self.logger.warning(
                f"'{path}' is not read: it has no column '{field}' ({key}) to join it by; its columns are "
                f"{listed([column.name for column in header], 30)}"
            )
            return None
        columns = loaded_columns(self.config, path, suffix, header)
        if suffix != "link":
            columns = self._unique(path, suffix, source, columns)
        file = read_atomic(path, layout, [column.name for column in columns])
        if suffix == "inter" and self.config["rm_dup_inter"] is None:
            file.refuse_copies()
        if not file.ends:
            self.logger.warning(
                f"'{path}' does not end with the end of a line: if it was cut off, its last row is wrong"
            )
        ids = id_fields(self.config, suffix).values()
        numbers = number_fields(self.config) if suffix == "inter" else set()
        table = pd.DataFrame(index=range(file.rows))
        for column in columns:
            kind = self._kind(file, column, column.name in ids, column.name in numbers)
            if suffix != "link":
                self.set_field_property(column.name, kind, source, 1)
                if "float" in kind.value:
                    self.field2bucketnum[column.name] = 2
            table[column.name] = self._values(file, column.name, kind, column.name in {*ids, *numbers})
        if suffix == "inter":
            table = self._without_patchy_times(table, path)
        self._say_quoted(file, ids)
        if suffix in ("user", "item"):
            self._say_repeated(file, next(iter(ids)))
        kinds = {column.name: self.field2type.get(column.name, column.kind).value for column in columns}
        return self.fingerprint.take(path.name.removeprefix(f"{self.dataset_name}."), table, kinds)

    def _unique(self, path: Path, suffix: str, source: Any, columns: list[Column]) -> list[Column]:
        """The columns whose names no file before has: RecBole knows a column by its name alone.

        Raises:
            InputError: somebody asked for both, or parts of the interactions, which RecBole takes for one table, differ.
        """
        first, same = self._parts.setdefault(suffix, (path, columns))
        if sorted(same, key=str) != sorted(columns, key=str):
            listings = (
                listed([f"{column.name}:{column.kind.value}" for column in part], 30) for part in (same, columns)
            )
            raise InputError(
                f"'{first}' has the columns {next(listings)}, but '{path}' has {next(listings)}; parts must have the same"
            )
        unique = []
        for column in columns:
            other = self.field2source.get(column.name)
            if other in (None, source) or column.name in id_fields(self.config, suffix).values():
                unique.append(column)
                continue
            other = str(getattr(other, "value", other)).removesuffix("_id")
            both = f"'{path}' and the .{other} file both have a column '{column.name}'"
            if not loads_what_is_there(self.config):
                raise InputError(
                    f"{both}; RecBole knows columns by their names: rename one, or leave one out by load_col"
                )
            self.logger.warning(f"{both}; that of .{other} is read: rename one to have both")
        return unique

    def _kind(self, file: AtomicFile, column: Column, is_id: bool, is_number: bool) -> FeatureType:
        """The type that a column is read as: ids are tokens and ratings are numbers, whatever the header says."""
        meant = FeatureType.TOKEN if is_id else FeatureType.FLOAT if is_number else column.kind
        if meant == column.kind:
            return meant
        if column.kind in _SEQUENCES:
            raise InputError(
                f"'{file.path}', line 1: '{column.name}' has the type {column.kind.value}, but every row has one of it: write "
                f"{column.name}:{meant.value}"
            )
        # As tokens, ratings would be numbered in the order in which they occur.
        how = "the exact texts" if is_id else "the numbers that are written"
        self.logger.warning(f"'{file.path}': '{column.name}' has the type {column.kind.value}; it is read as {how}")
        return meant

    def _values(self, file: AtomicFile, name: str, kind: FeatureType, required: bool) -> Any:
        """The values of a column; sequences are cut to ``seq_len`` and their length is told to RecBole."""
        if kind == FeatureType.TOKEN:
            return file.tokens(name, required)
        if kind == FeatureType.FLOAT:
            if name == self.config["TIME_FIELD"] and required:
                return file.exact_numbers(name, order_counts(self.config))
            values = file.numbers(name, required)
            self._say_missing(file, name, values)
            return values
        sequences = file.sequences(name, kind)
        length = max(map(len, sequences))
        limit = (self.config["seq_len"] or {}).get(name)
        if limit:
            length = min(limit, length)
            sequences = [sequence[:limit] for sequence in sequences]
        self.field2seqlen[name] = length
        series = pd.Series(index=range(len(sequences)), dtype=object)
        series[:] = sequences
        return series

    def _say_missing(self, file: AtomicFile, name: str, values: np.ndarray[Any, Any]) -> None:
        """RecBole fills a numerical feature with the mean; it is said, and refused where there is none."""
        missing = int(np.isnan(values).sum())
        if missing == len(values):
            raise InputError(f"'{file.path}': the column '{name}' has no number at all; leave it out by unload_col")
        if missing:
            line = file.line(int(np.isnan(values).argmax()))
            self.logger.warning(
                f"'{file.path}': {missing} of {len(values)} rows have no '{name}', first line {line}; "
                "the mean of the others stands in for it"
            )

    def _say_quoted(self, file: AtomicFile, fields: Iterable[str]) -> None:
        """Files written by a library for CSV may have quote marks round every id; they are part of it here."""
        for field in fields:
            first = file.texts[field][0]
            if len(first) > 1 and first[0] == first[-1] == '"' and all(text[:1] == '"' for text in file.texts[field]):
                self.logger.warning(
                    f"'{file.path}': every '{field}' is in quote marks, such as {shown(first)}, which are part of it: fields "
                    "of atomic files are not quoted"
                )

    def _say_repeated(self, file: AtomicFile, field: str) -> None:
        """RecBole keeps the first row of a user or an item; it is said which."""
        repeated = pd.Series(file.texts[field]).duplicated().to_numpy()
        if repeated.any():
            row = int(repeated.argmax())
            first = f"{shown(file.texts[field][row])} in line {file.line(row)}"
            self.logger.warning(
                f"'{file.path}': {int(repeated.sum())} row(s) repeat a '{field}', first {first}; "
                "of each, the first row counts"
            )

    def _without_patchy_times(self, table: pd.DataFrame, path: Path) -> pd.DataFrame:
        """A timestamp is never invented: where nothing depends on the order, a column with gaps is left out."""
        time = self.config["TIME_FIELD"]
        if time not in table or not table[time].isna().any():
            return table
        self.logger.warning(
            f"'{path}': {int(table[time].isna().sum())} of {len(table)} rows have no '{time}'; the column is not used, as "
            "nothing here depends on the order"
        )
        self._del_col(table, time)
        return table


class _Reading(type):
    """Of classes that no module names: pickle has them made anew."""


@cache
def reading_atomic_files(dataset_class: type) -> type:
    """One of RecBole's dataset classes on our reader, in exact time order and with checked labels, under the same name."""
    bases = (TimeOrder, ThresholdLabels, AtomicFiles, dataset_class)
    return _Reading(dataset_class.__name__, bases, {"__doc__": dataset_class.__doc__})


def _remade(made: _Reading) -> tuple[Any, tuple[type]]:
    return reading_atomic_files, (made.__bases__[-1],)


copyreg.pickle(_Reading, _remade)


def recbole_dataset_class(config: Any) -> type:
    """The class that RecBole's ``create_dataset`` takes for a model, on our reader.

    Its file of a saved dataset is never opened: it is a pickle, which runs what it says.
    """
    own = getattr(recbole_datasets, f"{config['model']}Dataset", None)
    kinds = {
        ModelType.SEQUENTIAL: recbole_datasets.SequentialDataset,
        ModelType.KNOWLEDGE: recbole_datasets.KnowledgeBasedDataset,
    }
    return reading_atomic_files(own or kinds.get(config["MODEL_TYPE"], Dataset))
