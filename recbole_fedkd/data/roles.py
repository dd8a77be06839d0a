"""What a column of anybody's table may be, and which files are no tables; pandas, which reads them, is not needed for it."""

from __future__ import annotations

from pathlib import Path

from recbole_fedkd.errors import InputError

ROLES = ("user", "item", "rating", "time")
FIELDS = {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp"}
"""Names that RecBole expects of a dataset's columns."""
KEYS = {"user": "USER_ID_FIELD", "item": "ITEM_ID_FIELD", "rating": "RATING_FIELD", "time": "TIME_FIELD"}
"""Config keys that name them otherwise."""

PARQUET = (".parquet", ".pq")
_NO_TABLES = (".xlsx", ".xls", ".ods", ".json", ".jsonl")


def check_table_file(file: Path) -> None:
    """Raise :class:`InputError` for a file that is not there, cannot be read, or is of a kind that is not read."""
    suffix = file.suffix.lower()
    if suffix in _NO_TABLES:
        raise InputError(
            f"'{file}' is no CSV, TSV or parquet file; save it as one, or give run_recbole_fedkd a data frame"
        )
    try:
        if not (suffix in PARQUET and file.is_dir()):  # which may lie in several files
            file.open("rb").close()
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: OSError) -> InputError:
    """The sentence of a table that the system does not give."""
    return InputError(f"'{file}' cannot be read: {error.strerror or error}")
