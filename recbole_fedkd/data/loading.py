"""RecBole's datasets on our reader of atomic files: every dataset class reads, refuses and counts alike."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import recbole.data.dataset as recbole_datasets
from recbole.data.dataset import Dataset
from recbole.utils import FeatureSource, FeatureType, ModelType

from recbole_fedkd.data.atomic import AtomicFile, Column, Layout, read_atomic, read_header
from recbole_fedkd.data.fingerprint import Fingerprint
from recbole_fedkd.data.threshold import ThresholdLabels
from recbole_fedkd.errors import InputError, nearest


class AtomicFiles(Dataset):
    """Mixin in front of any of RecBole's dataset classes: files are read by :mod:`recbole_fedkd.data.atomic`.

    Ids, ratings, labels and, where order counts, timestamps are in every row, or the file is refused. A timestamp column is
    float64, or int64 where only that is exact, until RecBole turns it into float32 tensors.

    Attributes:
        fingerprint: of the files, for checkpoints; the config's, where the data must be those of one.
    """

    fingerprint: Fingerprint

    def _load_data(self, token: str, dataset_path: str) -> None:
        self.fingerprint = self.config.fingerprint or Fingerprint()
        super()._load_data(token, dataset_path)
        self.fingerprint.end_of_files()

    def _load_feat(self, filepath: str, source: Any) -> pd.DataFrame | None:
        """Replaces RecBole's: one table of a file's loaded columns, with the columns' properties set."""
        name = source.value if isinstance(source, FeatureSource) else source
        load, unload = self._get_load_and_unload_col(source)
        if load == set() and name != "inter":
            return None
        layout = _layout(self.config)
        path = Path(filepath)
        columns = read_header(path, layout)
        self._check_named_columns(path, name, columns)
        needed = self._needed_columns(name)
        for key, field in needed.items():
            if field not in [column.name for column in columns]:
                raise InputError(_no_such_column(path, key, field, columns))
        wanted = [
            column.name
            for column in columns
            if column.name in needed.values()
            or ((load is None or column.name in load) and (unload is None or column.name not in unload))
        ]
        file = read_atomic(path, layout, wanted)
        if name == "inter" and self.config["rm_dup_inter"] is None:
            file.refuse_copies(layout)
        if not file.ends:
            self.logger.warning(
                f"'{path}' does not end with the end of a line: if it was cut off, its last row is wrong"
            )
        table = pd.DataFrame(
            {
                column.name: self._read_column(file, column, source, layout)
                for column in columns
                if column.name in wanted
            }
        )
        if name == "inter":
            table = self._without_patchy_times(table, path)
        kinds = {column.name: self.field2type.get(column.name, column.kind).value for column in columns}
        return self.fingerprint.take(path.name.removeprefix(f"{self.dataset_name}."), table, kinds)

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

    def _needed_columns(self, source: str) -> dict[str, str]:
        """Config keys of the columns that a file cannot do without, and the columns' names."""
        keys = {
            "inter": ("USER_ID_FIELD", "ITEM_ID_FIELD"),
            "user": ("USER_ID_FIELD",),
            "item": ("ITEM_ID_FIELD",),
            "kg": ("HEAD_ENTITY_ID_FIELD", "RELATION_ID_FIELD", "TAIL_ENTITY_ID_FIELD"),
            "link": ("ITEM_ID_FIELD", "ENTITY_ID_FIELD"),
        }.get(source, ())
        return {key: self.config[key] for key in keys if self.config[key] is not None}

    def _check_named_columns(self, path: Path, source: str, columns: list[Column]) -> None:
        """``load_col`` and ``unload_col`` name columns that there are; RecBole's own lists may name others."""
        names = [column.name for column in columns]
        for key in ("load_col", "unload_col"):
            given = (self.config[key] or {}).get(source) if self.config.gives(key) else None
            for field in given if given not in (None, "*") else ():
                if field not in names:
                    raise InputError(
                        f"{key} names '{field}', but the columns of '{path}' are {', '.join(names)}"
                        f"{nearest(str(field), names)}"
                    )

    def _read_column(self, file: AtomicFile, column: Column, source: Any, layout: Layout) -> Any:
        """The values of one column, with its type and length told to RecBole."""
        name = source.value if isinstance(source, FeatureSource) else source
        field, kind = column.name, column.kind
        required = field in self._needed_columns(name).values()
        number = name == "inter" and field in _number_fields(self.config)
        if number and kind in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
            raise InputError(
                f"'{file.path}', line 1: '{field}' has the type {kind.value}, but every row has one: write {field}:float"
            )
        if number and kind == FeatureType.TOKEN:
            # As tokens, RecBole would number the ratings in the order in which they occur.
            self.logger.warning(
                f"'{file.path}': '{field}' has the type token; its texts are read as the numbers they are"
            )
            kind = FeatureType.FLOAT
        if name != "link":
            self.field2source[field] = source
            self.field2type[field] = kind
            if "float" in kind.value:
                self.field2bucketnum[field] = 2
        if kind in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
            sequences = file.sequences(field, kind, layout.sequence_separator)
            longest = max(map(len, sequences))
            limit = (self.config["seq_len"] or {}).get(field)
            if limit:
                sequences = [sequence[:limit] for sequence in sequences]
            self.field2seqlen[field] = longest if not limit else min(limit, longest)
            series = pd.Series([None] * len(sequences), dtype=object)
            series[:] = sequences
            return series
        if name != "link":
            self.field2seqlen[field] = 1
        if kind == FeatureType.TOKEN:
            return file.tokens(field, required)
        if number and field == self.config["TIME_FIELD"]:
            return file.exact_numbers(field, required=order_counts(self.config))
        return file.numbers(field, required=number)


@cache
def reading_atomic_files(dataset_class: type) -> type:
    """One of RecBole's dataset classes on our reader, and with labels that are checked, under the same name."""
    bases = (ThresholdLabels, AtomicFiles, dataset_class)
    return type(dataset_class.__name__, bases, {"__doc__": dataset_class.__doc__})


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


def order_counts(config: Any) -> bool:
    """Whether anything depends on the time order of the rows, so that every row needs a timestamp."""
    return bool(
        config["eval_args"]["order"] == "TO"
        or "TS" in (config["eval_args"]["split"] or {})
        or config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        or config.reads_history
        or bool(config["history_length"] or config["student_pool"] or config.trains_teacher)
        or config["rm_dup_inter"] is not None
    )


def _number_fields(config: Any) -> set[str]:
    """Columns of the interactions that are numbers whatever their type says: ratings, labels, timestamps."""
    fields = {config["RATING_FIELD"], config["LABEL_FIELD"], config["TIME_FIELD"], *(config["threshold"] or {})}
    return {field for field in fields if field is not None}


def _layout(config: Any) -> Layout:
    return Layout(config["field_separator"], config["seq_separator"], config["encoding"] or "utf-8")


def _no_such_column(path: Path, key: str, field: str, columns: list[Column]) -> str:
    names = [column.name for column in columns]
    return f"'{path}' has no column '{field}' ({key}); its columns are {', '.join(names)}: name yours by {key}"
