"""What a report is made of, whoever writes it: headings, paragraphs, lists, tables of cells that mean something, plots."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from recbole_fedkd.report.statistics import Summary, lower_is_better

NONE = "–"  # noqa: RUF001 (a dash that no reader takes for a minus)

# Metrics in the order in which they stand in the tables, and their usual names.
USUAL_NAMES = {
    "accuracy": "accuracy",
    "mae": "MAE",
    "rmse": "RMSE",
    "nmae": "NMAE",
    "auc": "AUC",
    "logloss": "LogLoss",
    "labelledndcg": "labelled NDCG",
    "ndcg": "NDCG",
    "recall": "Recall",
    "mrr": "MRR",
    "hit": "Hit",
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what stands in it.
        strong: whether it stands out, such as the best of its column.
        spread: what follows the text more quietly, such as a standard deviation.
        trend: ``better`` or ``worse`` than the reference, where a test tells them apart; else empty.
        hint: said where a pointer rests on the cell.
    """

    text: str
    strong: bool = False
    spread: str = ""
    trend: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; every row is as long as the header.

    Attributes:
        header: names of the columns.
        rows: the cells.
        label: name of the table for readers who do not see it.
        kind: ``numbers``, or ``text``, whose cells stand left and wrap.
    """

    kind_of_block: ClassVar[str] = "table"
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    label: str = ""
    kind: str = "numbers"

    @classmethod
    def of_columns(
        cls, rows: Sequence[str], columns: Mapping[str, Sequence[Cell | str]], label: str = "", first: str = "row"
    ) -> Table:
        """A table from its columns, in the order of the rows' names."""
        cells = [[Cell(row) for row in rows]]
        cells += [[cell if isinstance(cell, Cell) else Cell(cell) for cell in column] for column in columns.values()]
        return cls((first, *columns), tuple(zip(*cells, strict=True)), label)


@dataclass(frozen=True)
class Heading:
    """The title of what follows."""

    kind_of_block: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A few sentences; ``soft`` where they explain what stands above them."""

    kind_of_block: ClassVar[str] = "paragraph"
    text: str
    soft: bool = True


@dataclass(frozen=True)
class Bullets:
    """A list of sentences; with ``links``, each begins with the name of a file that lies beside the page."""

    kind_of_block: ClassVar[str] = "bullets"
    items: tuple[str, ...]
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A line for a terminal."""

    kind_of_block: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Figures:
    """Plots side by side, and the rows that they share, by which they can be hidden.

    Attributes:
        plots: drawings, see ``report.drawing``.
        rows: name, colour and marker of each row.
    """

    kind_of_block: ClassVar[str] = "figures"
    plots: tuple[Any, ...]
    rows: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens who wants them."""

    kind_of_block: ClassVar[str] = "folded"
    title: str
    blocks: tuple[Block, ...]


Block = Table | Heading | Paragraph | Bullets | Command | Figures | Folded


@dataclass(frozen=True)
class Section:
    """One part of a page: its anchor, its title, its verdict in words, and its blocks."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]
    verdict: tuple[str, ...] = ()


def column(values: Iterable[Any], form: Callable[[Any], str], missing: str = NONE) -> list[str]:
    """A column of texts: ``form`` of each value, and a dash for None and nan."""
    return [
        missing if value is None or (isinstance(value, float) and math.isnan(value)) else form(value)
        for value in values
    ]


def usual_name(metric: str) -> str:
    """A metric as the field writes it: ``labelled NDCG@10`` for ``labelledndcg@10``."""
    stem, at, cut = metric.partition("@")
    return USUAL_NAMES.get(stem, stem) + at + cut


def heading(metric: str) -> str:
    """A metric's name and the direction in which it gets better."""
    return f"{usual_name(metric)} {'↓' if lower_is_better(metric) else '↑'}"


def signed(value: float, digits: int = 4) -> str:
    """A difference with its sign; ``n/a`` for nan."""
    if math.isnan(value):
        return "n/a"
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def probability(p: float) -> str:
    """A p-value; ``n/a`` for nan."""
    return "n/a" if math.isnan(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def mean_and_deviation(values: Summary, digits: str = ".4f") -> str:
    """A mean, and its standard deviation where there is one."""
    mean = format(values.mean, digits)
    return mean if math.isnan(values.deviation) else f"{mean} ± {format(values.deviation, digits)}"


def percent(share: float) -> str:
    """A share in per cent: one decimal, or two significant digits of less than 1 %."""
    # No share is -0.
    value = 100 * share + 0.0
    if 0 < abs(value) < 1:
        return f"{value:.{1 - math.floor(math.log10(abs(value)))}f} %"
    return f"{value:.1f} %"


def byte_count(count: float) -> str:
    """A number of bytes as a person says it: ``8.91 kB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def duration(seconds: float) -> str:
    """A time as a person says it: ``3.2 s``, ``12 min``, ``2.5 h``."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def counted(number: int, one: str, many: str = "") -> str:
    """``1 row``, ``2 rows``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def named(row: str) -> str:
    """A row's name in a sentence, in quotes where it would fall apart."""
    return f"“{row}”" if re.search(r"[\s,;.]", row) else row


def listed(rows: Sequence[str], most: int = 6) -> str:
    """Rows in a sentence: ``a, b and c``; of many the first, and how many there are more."""
    names = [named(row) for row in rows]
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))
