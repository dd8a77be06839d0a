"""RecBole's atomic files, read as they are written.

RecBole reads them by pandas as CSV: a quote mark swallows rows, ``NA`` is no id, empty ids drop rows, empty ratings are
filled. Here a file is a header of ``name:type`` and lines of fields between separators; nothing is quoted, a token is its
exact text, a number is a number, and what is neither is an error with file and line.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
from numpy.typing import NDArray
from recbole.utils import FeatureType

from recbole_fedkd.data.layout import Layout
from recbole_fedkd.data.numbers import EXACT, LARGEST, integer, numbers_of, why_no_number
from recbole_fedkd.errors import InputError, listed, nearest, shown

PADDING = "[PAD]"
"""RecBole's own token for "nothing", which no file may use as one of its tokens."""

_BLOCK = 1 << 23
_NAMED = 30
_SEPARATORS = ("\t", ",", ";", "|", "::", " ")
_OTHER_NAMES = (
    "columns that are not called user_id, item_id, rating and timestamp are named by USER_ID_FIELD, ITEM_ID_FIELD, "
    "RATING_FIELD and TIME_FIELD"
)
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Column:
    """A column as the header declares it."""

    name: str
    kind: FeatureType


@dataclass
class AtomicFile:
    """The wanted columns of an atomic file as text.

    Attributes:
        path: the file.
        layout: how it is written.
        header: its first line.
        columns: all columns of the header.
        texts: texts per wanted column, one per row.
        rows: number of rows.
        ends: whether the last line has its end; a file that was cut off has none.
        blank_lines: numbers of empty lines, which hold no row.
        first_row_stands: how often the first row stands in the file; more than once if all rows do.
    """

    path: Path
    layout: Layout
    header: str
    columns: list[Column]
    texts: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0
    ends: bool = True
    blank_lines: list[int] = field(default_factory=list)
    first_row_stands: int = 0

    def line(self, row: int) -> int:
        """Line of a row (from 0) as an editor counts: the header is line 1."""
        line = row + 2
        for blank in self.blank_lines:
            if blank > line:
                break
            line += 1
        return line

    def refuse(self, row: int, reason: str) -> NoReturn:
        """Raise :class:`InputError` about one row."""
        raise InputError(f"'{self.path}', line {self.line(row)}: {reason}")

    def tokens(self, name: str, required: bool) -> NDArray[np.object_]:
        """A ``token`` column ``[rows]``: exact texts; nan where the field is empty, which a ``required`` one may not be."""
        texts = self.texts[name]
        distinct = set(texts)
        if PADDING in distinct:
            self._refuse_text(name, {PADDING}, ", RecBole's own token for no token; write another one")
        self._refuse_width(name, distinct, len(distinct))
        if required:
            blank = {text for text in distinct if not text.strip()}
            if blank:
                self.refuse(_first(texts, blank), f"'{name}' is empty; every row needs one")
        values = np.empty(len(texts), dtype=object)
        values[:] = texts
        if "" in distinct:
            values[values == ""] = np.nan
        return values

    def numbers(self, name: str, required: bool) -> NDArray[np.float64]:
        """A ``float`` column ``[rows]``; nan where there is no number, which a ``required`` one may not lack.

        Raises:
            InputError: a text that is no number, or a number that 32 bits cannot hold.
        """
        return self._numbers(name, self._parsed(name, required))

    def exact_numbers(self, name: str, required: bool) -> NDArray[np.float64] | NDArray[np.int64]:
        """As :meth:`numbers`, but different numbers stay different: int64 where 64-bit floating point would merge them.

        Raises:
            InputError: also, numbers of which no 64 bits can tell the one from the other.
        """
        parsed = self._parsed(name, required)
        values = self._numbers(name, parsed)
        if np.isnan(values).any():
            return values
        if (np.abs(values) >= EXACT).any():
            exact = {text: integer(text) for text in parsed}
            wide = {text for text, value in exact.items() if value is None or not -(2**63) <= value < 2**63}
            if wide:
                self._refuse_text(
                    name,
                    wide,
                    ", among numbers of 2^53 and more, which 64 bits hold exactly only as integers below 2^63; write such",
                )
            return np.fromiter(map(exact.__getitem__, self.texts[name]), dtype=np.int64, count=self.rows)
        if len(set(parsed.values())) < len(parsed):
            first: dict[float | None, str] = {}
            merged = {text for text, value in parsed.items() if Decimal(first.setdefault(value, text)) != Decimal(text)}
            if merged:
                self._refuse_text(
                    name, merged, ", which 64 bits cannot tell from another one in the column; write all as integers"
                )
        return values

    def sequences(self, name: str, kind: FeatureType) -> list[NDArray[Any]]:
        """A ``token_seq`` or ``float_seq`` column: one array per row; neighbouring separators are one."""
        parts = [[part for part in text.split(self.layout.sequence_separator) if part] for text in self.texts[name]]
        if kind == FeatureType.TOKEN_SEQ:
            if any(PADDING in text for text in self.texts[name]):
                for row, tokens in enumerate(parts):
                    if PADDING in tokens:
                        self.refuse(row, f"'{name}' holds {PADDING}, RecBole's own token for no token")
            self._refuse_width(name, {text for tokens in parts for text in tokens}, sum(map(len, parts)))
            return [np.array(tokens, dtype=str) for tokens in parts]
        parsed = numbers_of({text for texts in parts for text in texts})
        wrong = {text for text, value in parsed.items() if value is None or not abs(value) <= LARGEST}
        if wrong:
            row = next(row for row, texts in enumerate(parts) if wrong.intersection(texts))
            text = next(text for text in parts[row] if text in wrong)
            self.refuse(row, f"'{name}' holds {shown(text)}{why_no_number(text, parsed[text])}")
        return [np.array([parsed[text] for text in texts], dtype=np.float64) for texts in parts]

    def refuse_copies(self) -> None:
        """Raise :class:`InputError` if every line stands in the file the same number of times, twice or more often."""
        if self.first_row_stands == 1:
            return
        counts: Counter[str] = Counter()
        for lines, _ in _blocks(self.path, self.layout):
            counts.update(line for line in lines if line)
        times = {count for line, count in counts.items() if line != self.header}
        if len(times) == 1:
            raise InputError(
                f"'{self.path}' holds every one of its {len(counts) - 1} different rows {times.pop()} times, so that a model "
                "would be tested on rows that it was trained on; remove the copies, or set rm_dup_inter=first if they are meant"
            )

    def _refuse_width(self, name: str, distinct: set[str], number: int) -> None:
        """RecBole keeps the tokens of a column in an array, each as wide as the longest: one long text may fill the memory."""
        longest = max(distinct, key=len, default="")
        needed = 4 * len(longest) * number
        if needed > psutil.virtual_memory().total:
            row = next(row for row, text in enumerate(self.texts[name]) if longest in text)
            self.refuse(
                row,
                f"'{name}' has a token of {len(longest)} characters; the column's {number} tokens, each kept as wide as that, "
                f"would take {needed / 1e9:.0f} GB; shorten it, or leave the column out",
            )

    def _refuse_text(self, name: str, texts: set[str], reason: str) -> NoReturn:
        """Raise :class:`InputError` about the first row that has one of some texts in a column."""
        row = _first(self.texts[name], texts)
        self.refuse(row, f"'{name}' is {shown(self.texts[name][row])}{reason}")

    def _parsed(self, name: str, required: bool) -> dict[str, float | None]:
        """The numbers that a column's distinct texts are; all are some, or missing where the column is not required."""
        parsed = numbers_of(dict.fromkeys(self.texts[name]))
        wrong = {text for text, value in parsed.items() if value is None or abs(value) > LARGEST}
        if required:
            wrong |= {text for text, value in parsed.items() if value is not None and math.isnan(value)}
        if wrong:
            text = self.texts[name][_first(self.texts[name], wrong)]
            self._refuse_text(name, {text}, why_no_number(text, parsed[text]))
        return parsed

    def _numbers(self, name: str, parsed: dict[str, float | None]) -> NDArray[np.float64]:
        return np.fromiter(map(parsed.__getitem__, self.texts[name]), dtype=np.float64, count=self.rows)


def read_header(path: Path, layout: Layout) -> list[Column]:
    """The columns that the first line of an atomic file declares.

    Raises:
        InputError: the file cannot be read, or its first line is no list of ``name:type``.
    """
    lines, _ = next(_blocks(path, layout, size=1), ([""], True))
    return _parse_header(path, lines[0], layout)


def read_atomic(path: Path, layout: Layout, wanted: Iterable[str] | None = None) -> AtomicFile:
    """Read an atomic file.

    Args:
        path: the file.
        layout: its separators and encoding.
        wanted: names of the columns to keep; None: all.

    Raises:
        InputError: the file cannot be read, its header is wrong, or a line does not have the header's fields.
    """
    blocks = _blocks(path, layout)
    lines, ends = next(blocks, ([""], True))
    header = lines.pop(0)
    columns = _parse_header(path, header, layout)
    names = [column.name for column in columns]
    kept = set(names if wanted is None else wanted)
    file = AtomicFile(path, layout, header, columns, {name: [] for name in names if name in kept})
    known: dict[str, dict[str, str]] = {name: {} for name in file.texts}
    first = None
    line = 2
    while True:
        file.ends = ends
        rows = lines
        if "" in lines:
            file.blank_lines += [line + number for number, text in enumerate(lines) if not text]
            rows = [text for text in lines if text]
        line += len(lines)
        if rows:
            first = rows[0] if first is None else first
            file.first_row_stands += rows.count(first)
            fields = _fields(file, rows)
            for name, texts in file.texts.items():
                part = fields[names.index(name) :: len(names)]
                # Equal texts are one object, so that a large file does not take many times its size.
                texts.extend(map(known[name].setdefault, part, part))
            file.rows += len(rows)
        following = next(blocks, None)
        if following is None:
            break
        lines, ends = following
    if file.rows == 0:
        raise InputError(f"'{path}' has a header and no rows")
    return file


def _blocks(path: Path, layout: Layout, size: int = _BLOCK) -> Iterator[tuple[list[str], bool]]:
    """Lines of a file without their ends, some megabytes at a time, and whether the last of them has an end."""
    start = True
    try:
        with path.open(encoding=layout.encoding) as file:
            while block := file.read(size):
                block += file.readline()
                lines = block.removeprefix(_BYTE_ORDER_MARK).split("\n") if start else block.split("\n")
                start = False
                ends = lines[-1] == ""
                if ends:
                    lines.pop()
                yield lines, ends
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
    except UnicodeError as error:
        raise InputError(_why_not_decoded(path, layout.encoding, error)) from error


def _why_not_decoded(path: Path, encoding: str, error: UnicodeError) -> str:
    """What a file holds that its encoding does not know, with the line."""
    try:
        path.read_bytes().decode(encoding)
    except UnicodeDecodeError as found:
        line = found.object[: found.start].count(b"\n") + 1
        strange = found.object[found.start : found.start + 4].hex(" ")
        return f"'{path}', line {line}: the bytes {strange} are no text in {encoding}; name the right one by encoding"
    except UnicodeError:
        pass
    return f"'{path}' is no text in {encoding} ({error}); name the file's encoding by the key encoding"


def _parse_header(path: Path, header: str, layout: Layout) -> list[Column]:
    """The columns of a header line; a sentence that helps for everything else that people write there."""
    where = f"'{path}', line 1"
    form = "an atomic file starts with a line of name:type, such as user_id:token"
    if not header.strip():
        raise InputError(f"{where} is empty; {form}")
    parts = header.split(layout.separator)
    kinds = [kind.value for kind in FeatureType]
    other = max(_SEPARATORS, key=lambda separator: len(header.split(separator)))
    untyped = ":" not in header.replace("::", "")
    advice = f"{form}, with one of the types {', '.join(kinds)}; {_OTHER_NAMES}" if untyped else ""
    if len(parts) == 1 and len(header.split(other)) > 1:
        raise InputError(
            f"{where} is one column to field_separator={layout.separator!r}, but {other!r} seems to separate "
            f"{listed(header.split(other), _NAMED)}: set field_separator={other!r}{'; ' * untyped}{advice}"
        )
    if untyped:
        raise InputError(f"{where}: the columns {listed(parts, _NAMED)} have no types; {advice}")
    columns: list[Column] = []
    for part in parts:
        name, colon, kind = part.rpartition(":")
        if not colon or not name or ":" in name:
            raise InputError(f"{where}: the column {shown(part)} is not name:type; the types are {', '.join(kinds)}")
        if part.startswith('"') or part.endswith('"'):
            raise InputError(
                f"{where}: the column {shown(part)} is in quote marks; fields of atomic files are not quoted"
            )
        if kind not in kinds:
            raise InputError(
                f"{where}: the column {shown(name)} has the type {shown(kind)}; the types are {', '.join(kinds)}"
                f"{nearest(kind, kinds)}"
            )
        if name in [column.name for column in columns]:
            raise InputError(f"{where}: two columns are called {shown(name)}; every column needs a name of its own")
        columns.append(Column(name, FeatureType(kind)))
    return columns


def _names_columns(line: str, separator: str, names: list[str]) -> bool:
    """Whether a line is a header of the columns ``names`` (sorted, small letters), in any order, with types or without."""
    fields = line.removeprefix(_BYTE_ORDER_MARK).lower().split(separator)
    return len(fields) == len(names) and sorted(field.partition(":")[0].strip() for field in fields) == names


def _fields(file: AtomicFile, lines: list[str]) -> list[str]:
    """All fields of some lines one after the other; every line has as many as there are columns.

    Raises:
        InputError: another number of fields, the header once more, or a character of zeros.
    """
    separator = file.layout.separator
    text = "\n".join(lines)
    names = sorted(column.name.lower() for column in file.columns)
    lowered = text.lower()
    if all(name in lowered for name in names):
        for position, line in enumerate(lines):
            if _names_columns(line, separator, names):
                file.refuse(file.rows + position, "it is the header once more; are these two files in one?")
    if "\0" in text:
        position = next(position for position, line in enumerate(lines) if "\0" in line)
        file.refuse(file.rows + position, "it holds a NUL character, which no text does; is the file damaged?")
    expected = len(file.columns)
    if [line.count(separator) for line in lines] != [expected - 1] * len(lines):
        position, count = next(
            (position, line.count(separator) + 1)
            for position, line in enumerate(lines)
            if line.count(separator) != expected - 1
        )
        cut = (
            ", and the file ends there without the end of a line: it was cut off"
            if (count < expected and position == len(lines) - 1 and not file.ends)
            else ""
        )
        file.refuse(
            file.rows + position,
            f"{count} field{'s' if count > 1 else ''} where the header has {expected} columns, separated by "
            f"{separator!r} (field_separator){cut}",
        )
    return text.replace("\n", separator).split(separator)


def _first(texts: list[str], wanted: set[str]) -> int:
    """The first row that holds one of some texts."""
    return next(row for row, text in enumerate(texts) if text in wanted)
