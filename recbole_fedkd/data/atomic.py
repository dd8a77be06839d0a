"""RecBole's atomic files, read as they are written.

RecBole reads them by pandas as CSV: a quote mark swallows rows, ``NA`` is no id, empty ids drop rows, empty ratings are
filled. Here a file is a header of ``name:type`` and lines of fields between separators; nothing is quoted, a token is its
exact text, a number is a number, and what is neither is an error with file and line.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from recbole.utils import FeatureType

from recbole_fedkd.data.numbers import EXACT, LARGEST, integer, number, why_no_number
from recbole_fedkd.errors import InputError, nearest

PADDING = "[PAD]"
"""RecBole's own token for "nothing", which no file may use as one of its tokens."""

_BLOCK = 1 << 23
_SEPARATORS = ("\t", ",", ";", "|", "::", " ")
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Layout:
    """How atomic files are written: RecBole's keys ``field_separator``, ``seq_separator`` and ``encoding``."""

    separator: str = "\t"
    sequence_separator: str = " "
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        for key, value in (("field_separator", self.separator), ("seq_separator", self.sequence_separator)):
            if not isinstance(value, str) or not value or set(value) & set("\r\n"):
                raise InputError(f"{key} is {value!r}; it must be a text that separates, such as ',' or '\\t'")
        if self.separator == self.sequence_separator:
            raise InputError(f"field_separator and seq_separator are both {self.separator!r}; they must differ")
        try:
            codecs.lookup(self.encoding)
        except (LookupError, TypeError) as error:
            raise InputError(f"encoding is {self.encoding!r}, which Python does not know; utf-8 is usual") from error


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
        header: its first line.
        columns: all columns of the header.
        texts: texts per wanted column, one per row.
        rows: number of rows.
        ends: whether the last line has its end; a file that was cut off has none.
        blank_lines: numbers of empty lines, which hold no row.
        first_row_stands: how often the first row stands in the file; more than once if all rows do.
    """

    path: Path
    header: str
    columns: list[Column]
    texts: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0
    ends: bool = True
    blank_lines: list[int] = field(default_factory=list)
    first_row_stands: int = 0

    def line(self, row: int) -> int:
        """Line of a row (from 0) as an editor counts: the header is line 1."""
        return _line(row, self.blank_lines)

    def refuse(self, row: int, reason: str) -> NoReturn:
        """Raise :class:`InputError` about one row."""
        raise InputError(f"'{self.path}', line {self.line(row)}: {reason}")

    def tokens(self, name: str, required: bool) -> NDArray[np.object_]:
        """A ``token`` column ``[rows]``: exact texts; nan where the field is empty, which a ``required`` one may not be."""
        texts = self.texts[name]
        self._refuse_padding(name, set(texts))
        if required:
            blank = {text for text in set(texts) if not text.strip()}
            if blank:
                self.refuse(_first(texts, blank), f"'{name}' is empty; every row needs one")
        values = np.empty(len(texts), dtype=object)
        values[:] = texts
        if "" in set(texts):
            values[values == ""] = np.nan
        return values

    def numbers(self, name: str, required: bool) -> NDArray[np.float64]:
        """A ``float`` column ``[rows]``; nan where there is no number, which a ``required`` one may not lack.

        Raises:
            InputError: a text that is no number, or a number that 32 bits cannot hold.
        """
        texts = self.texts[name]
        distinct = list(dict.fromkeys(texts))
        parsed = {text: number(text) for text in distinct}
        wrong = {text for text, value in parsed.items() if value is None or (np.isnan(value) and required)}
        wrong |= {text for text, value in parsed.items() if value is not None and abs(value) > LARGEST}
        if wrong:
            row = _first(texts, wrong)
            self.refuse(row, f"'{name}' is {texts[row]!r}{why_no_number(texts[row], parsed[texts[row]])}")
        return np.fromiter(map(parsed.__getitem__, texts), dtype=np.float64, count=len(texts))

    def exact_numbers(self, name: str, required: bool) -> NDArray[np.float64] | NDArray[np.int64]:
        """As :meth:`numbers`, but int64 where 64-bit floating point would merge different integers."""
        values = self.numbers(name, required)
        if np.isnan(values).any() or not (np.abs(values) >= EXACT).any():
            return values
        integers = np.zeros(len(values), dtype=np.int64)
        for row, text in enumerate(self.texts[name]):
            exact = integer(text)
            if exact is None or not -(2**63) <= exact < 2**63:
                self.refuse(
                    row,
                    f"'{name}' is {text!r}, in a column with numbers of 2^53 and more, which only integers of 64 bits hold "
                    "exactly; write integers below 2^63",
                )
            integers[row] = exact
        return integers

    def sequences(self, name: str, kind: FeatureType, separator: str) -> list[NDArray[Any]]:
        """A ``token_seq`` or ``float_seq`` column: one array per row; neighbouring separators are one."""
        parts = [[part for part in text.split(separator) if part] for text in self.texts[name]]
        if kind == FeatureType.TOKEN_SEQ:
            if any(PADDING in text for text in self.texts[name]):
                for row, tokens in enumerate(parts):
                    if PADDING in tokens:
                        self.refuse(row, f"'{name}' holds {PADDING}, RecBole's own token for no token")
            return [np.array(tokens, dtype=str) for tokens in parts]
        distinct = {text for texts in parts for text in texts}
        parsed = {text: number(text) for text in distinct}
        wrong = {text for text, value in parsed.items() if value is None or not abs(value) <= LARGEST}
        if wrong:
            row = next(row for row, texts in enumerate(parts) if wrong.intersection(texts))
            text = next(text for text in parts[row] if text in wrong)
            self.refuse(row, f"'{name}' holds {text!r}{why_no_number(text, parsed[text])}")
        return [np.array([parsed[text] for text in texts], dtype=np.float64) for texts in parts]

    def refuse_copies(self, layout: Layout) -> None:
        """Raise :class:`InputError` if every line stands in the file the same number of times, twice or more often."""
        if self.first_row_stands == 1:
            return
        counts: Counter[str] = Counter()
        for lines, _ in _blocks(self.path, layout):
            counts.update(line for line in lines if line)
        times = {count for line, count in counts.items() if line != self.header}
        if len(times) == 1:
            raise InputError(
                f"'{self.path}' holds every one of its {len(counts) - 1} different rows {times.pop()} times, so that a model "
                "would be tested on rows that it was trained on; remove the copies, or set rm_dup_inter=first if they are meant"
            )

    def _refuse_padding(self, name: str, found: set[str]) -> None:
        if PADDING in found:
            row = _first(self.texts[name], {PADDING})
            self.refuse(row, f"'{name}' is {PADDING}, RecBole's own token for no token; write another one")


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
    file = AtomicFile(path, header, columns, {name: [] for name in names if name in kept})
    known: dict[str, dict[str, str]] = {name: {} for name in file.texts}
    first = None
    line = 2
    while True:
        file.ends = ends
        rows = lines
        if "" in lines:
            file.blank_lines += [line + place for place, text in enumerate(lines) if not text]
            rows = [text for text in lines if text]
        line += len(lines)
        if rows:
            first = rows[0] if first is None else first
            file.first_row_stands += rows.count(first)
            fields = _fields(file, rows, layout)
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
    told = f"'{path}', line 1"
    form = "an atomic file starts with a line of name:type, such as user_id:token"
    if not header.strip():
        raise InputError(f"{told} is empty; {form}")
    parts = header.split(layout.separator)
    other = max(_SEPARATORS, key=lambda separator: len(header.split(separator)))
    if len(parts) == 1 and len(header.split(other)) > 1:
        found = ", ".join(header.split(other))
        raise InputError(
            f"{told}: its one column would be {header!r}; field_separator is {layout.separator!r}, but {other!r} seems to "
            f"separate the columns {found}: set field_separator={other!r}"
        )
    kinds = [kind.value for kind in FeatureType]
    if not any(":" in part for part in parts):
        raise InputError(
            f"{told}: the columns {', '.join(parts)} have no types; {form}, with one of the types {', '.join(kinds)}"
        )
    columns: list[Column] = []
    for part in parts:
        name, colon, kind = part.rpartition(":")
        if not colon or not name or ":" in name:
            raise InputError(f"{told}: the column {part!r} is not name:type; the types are {', '.join(kinds)}")
        if part.startswith('"') or part.endswith('"'):
            raise InputError(f"{told}: the column {part} is in quote marks; fields of atomic files are not quoted")
        if kind not in kinds:
            raise InputError(
                f"{told}: the column '{name}' has the type '{kind}'; the types are {', '.join(kinds)}{nearest(kind, kinds)}"
            )
        if name in [column.name for column in columns]:
            raise InputError(f"{told}: two columns are called '{name}'; every column needs a name of its own")
        columns.append(Column(name, FeatureType(kind)))
    return columns


def _fields(file: AtomicFile, lines: list[str], layout: Layout) -> list[str]:
    """All fields of some lines one after the other; every line has as many as there are columns.

    Raises:
        InputError: another number of fields, the header once more, or a character of zeros.
    """
    separator = layout.separator
    text = "\n".join(lines)
    names = separator.join(column.name for column in file.columns)
    if file.header in text or names in text:
        for place, line in enumerate(lines):
            if line.removeprefix(_BYTE_ORDER_MARK) in (file.header, names):
                file.refuse(file.rows + place, "it is the header once more; are these two files in one?")
    if "\0" in text:
        place = next(place for place, line in enumerate(lines) if "\0" in line)
        file.refuse(file.rows + place, "it holds a NUL character, which no text does; is the file damaged?")
    expected = len(file.columns)
    if [line.count(separator) for line in lines] != [expected - 1] * len(lines):
        place, found = next(
            (place, line.count(separator) + 1)
            for place, line in enumerate(lines)
            if line.count(separator) != expected - 1
        )
        cut = (
            ", and the file ends there without the end of a line: it was cut off"
            if (found < expected and place == len(lines) - 1 and not file.ends)
            else ""
        )
        file.refuse(
            file.rows + place,
            f"{found} field{'s' if found > 1 else ''} where the header has {expected} columns, separated by "
            f"{separator!r} (field_separator){cut}",
        )
    return text.replace("\n", separator).split(separator)


def _line(row: int, blank_lines: list[int]) -> int:
    line = row + 2
    for blank in blank_lines:
        if blank > line:
            break
        line += 1
    return line


def _first(texts: list[str], wanted: set[str]) -> int:
    """The first row that holds one of some texts."""
    return next(row for row, text in enumerate(texts) if text in wanted)
