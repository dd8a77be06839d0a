"""Users, histories and tables on the command line: lists of tokens in, data frames out to files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recbole_fedkd.errors import InputError, shown
from recbole_fedkd.files import writable_file, written_whole

_WRITERS = {
    ".csv": lambda table, file: table.to_csv(file, index=False),
    ".tsv": lambda table, file: table.to_csv(file, index=False, sep="\t"),
    ".json": lambda table, file: table.to_json(file, orient="records", indent=1),
    ".parquet": lambda table, file: table.to_parquet(file, index=False),
}


def listed_tokens(text: str) -> list[str] | None:
    """``a,b``, or with ``@file`` the lines of a file; ``all`` is None.

    Raises:
        InputError: nothing is named, or the file cannot be read.
    """
    if text == "all":
        return None
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"file '{text[1:]}' of users cannot be read: {getattr(error, 'strerror', error)}"
            ) from error
        tokens = [line for line in lines if line.strip()]
    else:
        tokens = parted(text)
    if not tokens:
        raise InputError(f"users is {'empty' if not text else shown(text)}; it must be tokens, @<file of them> or all")
    return tokens


def parted(text: str) -> list[str]:
    """What stands between commas; a token with a comma in it is quoted, as in a CSV file."""
    (parts,) = csv.reader([text], skipinitialspace=True)
    return [part.strip() for part in parts if part.strip()]


@contextmanager
def commas_told(what: str, text: str) -> Iterator[None]:
    """Who is told that a token is unknown reads how one is written that has a comma in it."""
    try:
        yield
    except InputError as error:
        if "," in text and '"' not in text and not text.startswith("@"):
            one = '"a, b"' + ":5" * (what == "history")
            error.add_note(f"a name with a comma in it stands in double quotes: --{what}='{one}'")
        raise


def rated_tokens(text: str) -> list[tuple[str, Any]]:
    """``item:rating,item:rating``, or items alone, to pairs; what is no number stays a text, for others to refuse.

    An item with a colon in its name and no rating ends in a colon.
    """
    pairs: list[tuple[str, Any]] = []
    for part in parted(text):
        token, colon, rating = part.rpartition(":")
        if not rating or not colon:
            pairs.append((part.removesuffix(":"), None))
            continue
        try:
            pairs.append((token, float(rating)))
        except ValueError:
            pairs.append((token, rating))
    return pairs


def writable_table(path: str) -> Path:
    """A file that a table can be written to.

    Raises:
        InputError: its ending is unknown, or it cannot be written.
    """
    if Path(path).suffix.lower() not in _WRITERS:
        *some, last = _WRITERS
        raise InputError(f"out is {shown(path)}; it must end in {', '.join(some)} or {last}")
    return writable_file(path, "out")


def write_table(table: Any, file: Path) -> None:
    """Write a data frame whole or not at all, as the ending of the file says."""
    try:
        with written_whole(file) as temporary:
            _WRITERS[file.suffix.lower()](table, temporary)
    except ImportError as error:
        raise InputError(
            f"out is '{file}': parquet needs the package pyarrow; pip install pyarrow, or write a .csv"
        ) from error
