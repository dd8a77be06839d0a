"""Tables of anybody's to atomic files: which column is what, and which rows are of no use."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import tempfile
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_fedkd.data.roles import FIELDS, KEYS, PARQUET, ROLES, check_table_file, unreadable
from recbole_fedkd.errors import InputError, listed, nearest, shown
from recbole_fedkd.files import writable_folder, written_whole

# What others call them, in the order in which they are looked for; case, spaces, dots, _ and - do not count.
_CALLED = {
    "user": ("userid", "user", "uid", "users", "userno", "reviewerid", "customerid", "customer", "visitorid", "memberid",
             "member", "accountid", "personid", "sessionid", "author", "authorid"),
    "item": ("itemid", "item", "iid", "items", "movieid", "movie", "productid", "product", "asin", "parentasin", "bookid",
             "book", "isbn", "songid", "trackid", "artistid", "businessid", "recipeid", "animeid", "gameid", "articleid",
             "newsid", "videoid", "sku", "title"),
    "rating": ("rating", "ratings", "stars", "star", "score", "overall", "bookrating", "userrating", "rate", "preference",
               "weight", "value"),
    "time": ("timestamp", "time", "unixreviewtime", "datetime", "date", "reviewtime", "ts", "createdat", "unixtime",
             "eventtime", "when", "day"),
}  # fmt: skip
_NAMES = {"title", "item", "items", "movie", "product", "book", "user", "users", "customer", "member", "author"}
"""What may as well be a name, beside a column ``id``."""
GZIP, ARCHIVES = b"\x1f\x8b", (b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")
_SEPARATORS = ",;\t|"
_DECIMAL_COMMA = r"[-+]?\d+,\d+"
# Numbers of this size and up count milliseconds, microseconds or nanoseconds; any unit orders alike.
_COUNTS = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")


@dataclass
class Imported:
    """A table as atomic files have it.

    Attributes:
        table: columns ``user_id``, ``item_id`` and, where there are any, ``rating`` and ``timestamp``, all texts.
        columns: role to the column that it was found in.
        guessed: the roles whose column nobody named.
        unused: columns that play no role.
        dropped: why rows were left out, to how many and an example.
        notes: what was understood in a way that somebody may want to know.
    """

    table: pd.DataFrame
    columns: dict[str, str]
    guessed: list[str]
    unused: list[str]
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A look at it, a few lines."""
        table = self.table
        lines = [
            "  ".join(
                f"{role}: {name}{' (guessed)' if role in self.guessed else ''}" for role, name in self.columns.items()
            ),
            f"{len(table)} interactions of {table['user_id'].nunique()} users with {table['item_id'].nunique()} items",
        ]
        if "rating" in table:
            values = table["rating"].astype(float)
            lines.append(f"ratings from {values.min():g} to {values.max():g}, {values.nunique()} different ones")
        else:
            lines.append("no ratings: --label_mode=implicit learns from the interactions alone")
        if "timestamp" not in table:
            lines.append("no times: eval_args.order=RO; sequential models cannot be used")
        lines += self.notes
        if self.unused:
            lines.append(f"not used: {listed(self.unused)}")
        for reason, (count, example) in self.dropped.items():
            lines.append(f"dropped {count} rows: {reason}{f', such as {example}' if example else ''}")
        return "\n".join(lines)


def read_table(path: str | Path, encoding: str | None = None, separator: str | None = None) -> pd.DataFrame:
    """A CSV, TSV or parquet file as texts.

    Args:
        path: the file; its ending tells parquet from text, its content the separator.
        encoding: of a text file; not given: utf-8, or utf-16 where its mark says so.
        separator: of a text file; not given: found in it.

    Raises:
        InputError: it cannot be read as a table.
    """
    file = Path(path)
    check_table_file(file)
    try:
        if file.suffix.lower() in PARQUET:
            return pd.read_parquet(file)
        content = file.read_bytes()
        content = gzip.decompress(content) if content.startswith(GZIP) else content
    except ImportError as error:
        raise InputError(f"'{file}': parquet needs the package pyarrow; pip install pyarrow") from error
    except OSError as error:
        raise unreadable(file, error) from error
    except (EOFError, zlib.error) as error:
        raise InputError(f"'{file}' cannot be unpacked: {error}") from error
    except Exception as error:  # pyarrow raises what it likes on what is no parquet
        raise InputError(f"'{file}' cannot be read as parquet: {str(error)[:200]}") from error
    if content.startswith(ARCHIVES):
        raise InputError(f"'{file}' is an archive; unpack it")
    read_as = encoding or ("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    try:
        text = content.decode(read_as)
    except (UnicodeDecodeError, LookupError) as error:
        raise InputError(
            f"'{file}' is not encoded in {read_as.removesuffix('-sig')} ({str(error)[:100]}); say what it is by "
            "--encoding, such as latin-1"
        ) from error
    if not text.strip():
        raise InputError(f"'{file}' is empty")
    if "\0" in text:
        raise InputError(f"'{file}' holds NUL characters; it is no text file, or of another --encoding")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    mark = _separator(file, text, separator)
    try:
        names = next(csv.reader([text.lstrip("\n").split("\n", 1)[0]], delimiter=mark))
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:  # pandas would give the second another name
            raise InputError(f"'{file}' has two columns '{twice[:100]}'; rename one")
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of rows that are longer than the header
            return pd.read_csv(
                io.StringIO(text), sep=mark, dtype=str, keep_default_na=False, na_filter=False, engine="c",
                skip_blank_lines=True, index_col=False, on_bad_lines="error",
            )  # fmt: skip
    except InputError:
        raise
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, ValueError, csv.Error) as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        reason = "rows have more fields than the header" if isinstance(error, pd.errors.ParserWarning) else reason
        raise InputError(f"'{file}' cannot be read as a table with the separator {mark!r}: {reason}") from error


def _separator(file: Path, text: str, separator: str | None) -> str:
    if separator is not None:
        named = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}.get(separator, separator)
        if len(named) != 1:
            raise InputError(f"separator is {shown(separator)}; it must be one character, or tab")
        return named
    first = text.lstrip("\n").split("\n", 1)[0]
    if file.suffix.lower() in (".tsv", ".tab") and "\t" in first:
        return "\t"
    if "::" in first and file.suffix.lower() == ".dat":
        raise InputError(
            f"'{file}' is separated by '::', which is two characters; replace it by a tab: sed 's/::/\\t/g'"
        )
    # In the header, outside quotes.
    bare = re.sub(r'"[^"]*"', "", first)
    counts = {mark: bare.count(mark) for mark in _SEPARATORS}
    best = max(counts, key=lambda mark: counts[mark])
    if not counts[best]:
        raise InputError(
            f"'{file}' has one column, '{first[:100]}'; columns are separated by a comma, a semicolon, a tab or |, or by what "
            "--separator says"
        )
    return best


def import_table(frame: pd.DataFrame, named: Mapping[str, str | None], what: str = "the table") -> Imported:
    """Find the columns, and keep the rows that can be used.

    Args:
        frame: any data frame.
        named: role to the column that plays it, as far as somebody says so.
        what: what an error calls the table.

    Raises:
        InputError: no column of users or items, a named column that is not there, or no row that can be used.
    """
    columns, guessed = _columns(frame, named, what)
    imported = Imported(pd.DataFrame(index=range(len(frame))), columns, guessed, [])
    imported.unused = [str(name) for name in frame.columns if str(name) not in columns.values()]
    if not len(frame):
        raise InputError(f"{what} has a header and no rows")
    kept = np.ones(len(frame), dtype=bool)
    for role in ("user", "item"):
        tokens = imported.table[FIELDS[role]] = _tokens(frame[columns[role]], imported)
        kept &= _told(imported, tokens != "", kept, f"no {role} in column '{columns[role]}'")
        kept &= _told(imported, tokens != "[PAD]", kept, f"{role} '[PAD]', a word that RecBole keeps for itself")
    if "rating" in columns:
        kept &= _read_ratings(frame[columns["rating"]], imported, kept, what)
    if "time" in columns:
        kept &= _read_times(frame[columns["time"]], imported, kept, what)
    again = imported.table[kept].duplicated().reindex(imported.table.index, fill_value=False)
    kept &= _told(imported, ~again, kept, "the same row again")
    if not kept.any():
        reasons = "; ".join(f"{count} rows: {reason}" for reason, (count, _) in imported.dropped.items())
        raise InputError(f"{what} has no row that can be used ({reasons})")
    imported.table = imported.table[kept].reset_index(drop=True)
    return imported


def _columns(frame: pd.DataFrame, named: Mapping[str, str | None], what: str) -> tuple[dict[str, str], list[str]]:
    names = [str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{what} has two columns '{twice[0]}'; rename one")
    frame.columns = pd.Index(names)
    columns: dict[str, str] = {}
    for role in ROLES:
        name = named.get(role)
        if name is None or name == "":
            continue
        if name not in names:
            raise InputError(f"{what} has no column '{name}' for {role}; it has {listed(names)}{nearest(name, names)}")
        if name in columns.values():
            other = next(role for role, column in columns.items() if column == name)
            raise InputError(f"column '{name}' of {what} is named for both {other} and {role}")
        columns[role] = name
    guessed = []
    for role in ROLES:
        if role in columns or named.get(role) == "":
            continue
        column = _guess(names, role, columns.values())
        if column is not None:
            columns[role] = column
            guessed.append(role)
    missing = [role for role in ("user", "item") if role not in columns]
    if missing:
        # All at once: who names one column after another runs the command as often.
        optional = [f"--{role}" for role in ("rating", "time") if role not in columns and named.get(role) != ""]
        likewise = f", and {' and '.join(optional)} likewise where there is one" if optional else ""
        raise InputError(
            f"{what} has no column that looks like the {' or the '.join(missing)}: it has {listed(names)}; say "
            f"{' '.join(f'--{role}=<column>' for role in missing)}{likewise}"
        )
    return {role: columns[role] for role in ROLES if role in columns}, guessed


def _guess(names: Collection[str], role: str, taken: Collection[str] = ()) -> str | None:
    """The column that is called as one of this role often is."""
    plain = {re.sub(r"[\W_]", "", re.sub(r":\w+$", "", name)).lower(): name for name in reversed(list(names))}
    return next((plain[called] for called in _CALLED[role] if called in plain and plain[called] not in taken), None)


def id_column(names: Collection[str], role: str, what: str) -> str:
    """The column of ids of a table of users or items; ``id`` is one there.

    Raises:
        InputError: no column looks like it.
    """
    column, plain = _guess(names, role), next((name for name in names if name.lower() == "id"), None)
    if column is None or (plain is not None and re.sub(r"[\W_]", "", column).lower() in _NAMES):
        column = plain
    if column is None:
        raise InputError(
            f"{what} has no column that looks like the {role}: it has {listed(names)}; call it {FIELDS[role]}"
        )
    return column


def tokens_of(column: pd.Series) -> pd.Series:
    """A column as texts that an atomic file can hold: no tab, no end of line, no spaces around."""
    return _texts(column).str.replace(r"[\t\r\n]+", " ", regex=True).str.strip()


def _texts(column: pd.Series) -> pd.Series:
    """A column as texts; what is missing is empty, and a whole number has no decimal point."""
    known = column.dropna() if pd.api.types.is_float_dtype(column) else column.head(0)
    if len(known) and (known % 1 == 0).all() and (known.abs() < 2**53).all():
        column = column.astype("Int64")
    return column.astype(object).where(column.notna(), "").astype(str).reset_index(drop=True)


def _tokens(column: pd.Series, imported: Imported) -> pd.Series:
    nested = next((value for value in column if isinstance(value, list | tuple | set | dict | np.ndarray)), None)
    if nested is not None:
        raise InputError(f"column '{column.name}' holds {shown(nested)}; it must have one value a row")
    texts = _texts(column)
    clean = tokens_of(column)
    changed = int((clean != texts).sum())
    if changed:
        imported.notes.append(
            f"column '{column.name}': spaces around, and tabs and ends of lines in {changed} values are gone"
        )
    return clean


def _read_ratings(column: pd.Series, imported: Imported, kept: Any, what: str) -> Any:
    texts = _texts(column).str.strip()
    commas = texts.str.fullmatch(_DECIMAL_COMMA)
    if commas.any() and not texts.str.contains(".", regex=False).any():
        texts = texts.where(~commas, texts.str.replace(",", ".", regex=False))
        imported.notes.append(f"column '{column.name}': a comma is read as a decimal point")
    values = pd.to_numeric(texts, errors="coerce")
    finite = np.isfinite(values) & (values.abs() <= np.finfo(np.float32).max)
    if not finite.any():
        example = next((text for text in texts if text), "")
        raise InputError(
            f"column '{column.name}' of {what} holds no number to rate by, but '{example[:60]}'; name another by --rating, or "
            "leave ratings out by --rating="
        )
    imported.table["rating"] = texts
    return _told_values(imported, texts, finite, kept, ("rating", "number"), column.name)


def _read_times(column: pd.Series, imported: Imported, kept: Any, what: str) -> Any:
    if pd.api.types.is_datetime64_any_dtype(column):
        texts, seconds = _texts(column), column.reset_index(drop=True)
        moments = pd.to_datetime(seconds, utc=True)
    else:
        texts = _texts(column).str.strip()
        filled = texts[texts != ""]
        if len(filled) and filled.str.fullmatch(_COUNTS).mean() > 0.5 and not _dates_without_marks(filled):
            imported.table["timestamp"] = texts
            finite = np.isfinite(pd.to_numeric(texts, errors="coerce"))
            return _told_values(imported, texts, finite, kept, ("time", "time"), column.name)
        moments = pd.to_datetime(texts.where(texts != ""), utc=True, errors="coerce", format=_date_format(filled))
        if not moments.notna().any():
            example = next(iter(filled), "")
            raise InputError(
                f"column '{column.name}' of {what} holds neither times nor dates, but '{example[:60]}'; name another by "
                "--time, or leave times out by --time="
            )
        imported.notes.append(f"column '{column.name}': dates are read as such, in UTC, and written as seconds")
    known = moments.notna()
    whole = moments.astype("datetime64[ns, UTC]").astype("int64") / 1e9
    seconds = pd.Series([f"{value:.6f}".rstrip("0").rstrip(".") for value in whole])
    imported.table["timestamp"] = seconds.where(known, "")
    return _told_values(imported, texts, known, kept, ("time", "time"), column.name)


def _dates_without_marks(texts: pd.Series) -> bool:
    """Whether all of a column looks like 20240131."""
    return bool(texts.str.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])").all())


def _date_format(texts: pd.Series) -> str:
    """How dates are written: day first where some first number is above 12, else as ISO or whatever each is."""
    sample = texts.head(10_000)
    parts = sample.str.extract(r"^(\d{1,2})([./-])(\d{1,2})\2(\d{4})(.*)$")
    if texts.empty or parts[0].notna().mean() < 0.5:
        return "%Y%m%d" if _dates_without_marks(texts) else "mixed"
    mark = parts[1].dropna().iloc[0]
    first, second = parts[0].dropna().astype(int), parts[2].dropna().astype(int)
    day_first = (first > 12).any() or (mark == "." and not (second > 12).any())
    clock = parts[4].dropna().iloc[0].strip()
    times = {0: "", 1: " %H:%M", 2: " %H:%M:%S"}[min(clock.count(":"), 2)]
    return (f"%d{mark}%m{mark}%Y" if day_first else f"%m{mark}%d{mark}%Y") + times


def _told(imported: Imported, usable: Any, kept: Any, reason: str, texts: pd.Series | None = None) -> Any:
    """Note which of the rows that are still kept are dropped for a reason; of ``texts`` the first of them is the example."""
    usable = np.asarray(usable)
    gone = kept & ~usable
    count = int(gone.sum())
    if count:
        before, example = imported.dropped.get(reason, (0, ""))
        first = int(np.flatnonzero(gone)[0])
        imported.dropped[reason] = (before + count, example or (f"'{texts[first][:60]}'" if texts is not None else ""))
    return usable


def _told_values(
    imported: Imported, texts: pd.Series, understood: pd.Series, kept: Any, lacking: tuple[str, str], column: Any
) -> Any:
    """:func:`_told` of texts that are empty, and of others that are not ``understood``: what each of them lacks."""
    missing, wrong = (f"no {word} in column '{column}'" for word in lacking)
    empty = texts == ""
    usable = _told(imported, ~empty, kept, missing)
    return usable & _told(imported, understood | empty, kept, wrong, texts)


def write_atomic(table: pd.DataFrame, folder: Path, name: str, fields: Mapping[str, str] = FIELDS) -> Path:
    """Write ``<folder>/<name>/<name>.inter`` whole or not at all; raises :class:`InputError` where it cannot."""
    target = writable_folder(folder / name, f"folder '{folder / name}'") / f"{name}.inter"
    types = {"user_id": "token", "item_id": "token", "rating": "float", "timestamp": "float"}
    names = {FIELDS[role]: field for role, field in fields.items()}
    return write_texts(table, [f"{names[column]}:{types[column]}" for column in table.columns], target)


def write_texts(table: pd.DataFrame, header: Iterable[str], file: Path) -> Path:
    """Write a table of texts under a header of ``name:type``, whole or not at all."""
    rows = zip(*(table[column] for column in table.columns), strict=True)
    with written_whole(file) as temporary:
        temporary.write_text("\n".join(map("\t".join, [header, *rows])) + "\n", encoding="utf-8", newline="\n")
    return file


def check_name(name: str) -> str:
    """A dataset's name, which is that of a folder.

    Raises:
        InputError: it is none.
    """
    if not name or name != Path(name).name or name in (".", "..") or not name.isprintable():
        raise InputError(f"name is {shown(name)}; it must be the name of a folder, such as mine")
    return name


@contextmanager
def frame_as_dataset(frame: pd.DataFrame, given: Mapping[str, Any], kept: bool) -> Iterator[tuple[str, str]]:
    """A data frame as a dataset of files: its name, made of its content, and its parent folder.

    Args:
        frame: interactions; columns are found as :func:`import_table` does, or named by ``USER_ID_FIELD`` and the like.
        given: the user's config keys.
        kept: whether the files stay in ``data_path``, where a run that goes on looks for them; else they vanish.
    """
    fields = {role: str(given.get(key) or FIELDS[role]) for role, key in KEYS.items()}
    columns = {str(name) for name in frame.columns}
    named = {role: field if field in columns else None for role, field in fields.items()}
    try:
        imported = import_table(frame.copy(), named, "the data frame")
    except InputError as error:
        # Who gives a frame writes keys, and no command.
        sentence = re.sub(r", or leave \w+ out by .*", "", str(error))
        raise InputError(re.sub(r"--(\w+)", lambda option: KEYS.get(option[1], option[0]), sentence)) from error
    digest = hashlib.sha256(pd.util.hash_pandas_object(imported.table, index=False).to_numpy().tobytes())
    name = f"frame-{digest.hexdigest()[:12]}"
    lies_in = nullcontext(str(given.get("data_path") or "dataset"))
    with lies_in if kept else tempfile.TemporaryDirectory(prefix="recbole_fedkd-") as folder:
        write_atomic(imported.table, Path(folder), name, fields)
        yield name, folder
