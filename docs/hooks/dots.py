"""The picture of a results page, drawn from the page's own tables: ``python docs/hooks/dots.py``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "results"
COLOURS = ["#1b6ca8", "#c0392b", "#1e8449", "#8e44ad", "#b9770e", "#5d6d7e", "#17202a"]
# Columns of a page's first table whose numbers are drawn; what is of several is told apart by colour.
PICTURES = {
    "bytes-ml-1m": ["MAE ↓"],
    "codecs-ml-100k": ["MAE ↓"],
    "floors": ["MAE above `Bias`"],
    "label-skew-ml-100k": ["MAE ↓"],
    "membership": ["plain", "under masks", "masks and distributed noise, epsilon 8"],
    "ml-1m": ["AUC published", "AUC ↑"],
    "neighbours": ["MAE ↓"],
    "one-client-per-user-ml-100k": ["NDCG@10 ↑"],
    "sizes-ml-100k": ["MAE ↓"],
    "sums-ml-100k": ["NDCG@10 ↑"],
    "sums-ml-1m": ["NDCG@10 ↑"],
    "wrong-clients": ["no defence", "directions", "multi-Krum", "trimmed mean", "median", "Krum", "norm bound 3"],
}
# Tables of a page, by their place, that are drawn as curves over epsilon: the column, and what it is of.
CURVES = {
    "epsilon": {0: ("RMSE ↓", "factors, ml-1m"), 4: ("AUC ↑", "fedavg, ml-1m"), 3: ("AUC ↑", "fedavg, ml-100k")},
}
Point = tuple[str, str, float, float, str]
"""Row, series, value, deviation, and what is told beside it."""


def tables(page: str) -> list[list[list[str]]]:
    """Cells of a page's tables, of each its head first."""
    found = []
    for rows in re.findall(r"^\|.*(?:\n\|.*)+", page, re.MULTILINE):
        cells = [[cell.strip(" *`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows.splitlines()]
        found.append([cells[0], *cells[2:]])
    return found


def points(cells: Sequence[Sequence[str]], columns: Sequence[str]) -> list[Point]:
    """What the columns hold; a column ``row`` tells series apart, one of bytes is told beside the numbers."""
    head, *rows = cells
    head = [name.replace("`", "") for name in head]
    grouped, costs = "row" in head[1:2], [name for name in head if name.startswith("bytes")]
    found = []
    for row in rows:
        for column in columns:
            cell = row[head.index(column.replace("`", ""))].replace("**", "")
            number = re.match(r"([-+]?\d*\.\d+)(?: ± (\d*\.\d+))?", cell)
            if number is not None:
                series = row[1] if grouped else column if len(columns) > 1 else ""
                cost = row[head.index(costs[0])] if costs and len(columns) == 1 else ""
                told = f"{cost} bytes" if cost[:1].isdigit() else ""
                found.append((row[0], series, float(number[1]), float(number[2] or 0), told))
    return found


def drawn(found: Sequence[Point], name: str) -> Figure:
    """Rows below one another, a dot for every number, its deviation as a line."""
    rows = list(dict.fromkeys(row for row, *_ in found))[::-1]
    series = list(dict.fromkeys(each for _, each, *_ in found))
    figure = Figure((8.0, 1.1 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, each, value, deviation, told in found:
        colour, height = COLOURS[series.index(each) % len(COLOURS)], rows.index(row)
        axes.errorbar(value, height, xerr=deviation or None, fmt="o", ms=5, color=colour, capsize=2)
        axes.annotate(told, (value, height), (7, 5), textcoords="offset points", fontsize=7, color="#555555")
    axes.set_yticks(range(len(rows)), [row.replace("`", "").replace("**", "") for row in rows], fontsize=8)
    axes.set_xlabel(name.replace("`", ""), fontsize=9)
    axes.margins(x=0.16)
    axes.grid(axis="x", alpha=0.3)
    if len(series) > 1:
        marks = [axes.plot([], [], "o", color=COLOURS[at % len(COLOURS)])[0] for at in range(len(series))]
        figure.legend(
            marks, [each.replace("`", "") for each in series], fontsize=7, ncols=3, loc="outside upper center"
        )
    return figure


def curves(found: Sequence[tuple[Sequence[Point], str, str]]) -> Figure:
    """Quality over epsilon, a panel each; what has no epsilon is a level line."""
    figure = Figure((3.2 * len(found), 3.6), layout="constrained")
    for axes, (rows, column, title) in zip(figure.subplots(1, len(found)), found, strict=True):
        spent = {row: int(row.removeprefix("epsilon ")) for row, *_ in rows if row.removeprefix("epsilon ").isdigit()}
        x, y, deviations = zip(*((spent[row], y, dy) for row, _, y, dy, _ in rows if row in spent), strict=True)
        axes.errorbar(x, y, deviations, fmt="o-", ms=4, color=COLOURS[0], capsize=2)
        for at, (row, _, level, *_) in enumerate(each for each in rows if each[0] not in spent):
            axes.axhline(level, ls="--", lw=1, color=COLOURS[at + 1], label=row.replace("`", ""))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(x), [f"epsilon {each}" for each in sorted(x)], fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel(column, fontsize=8)
        axes.tick_params("y", labelsize=7)
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Draw all of them."""
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "results", "font.family": "sans-serif"})
    for name, columns in PICTURES.items():
        cells = tables((RESULTS / f"{name}.md").read_text(encoding="utf-8"))[0]
        label = columns[0] if len(columns) == 1 else {"ml-1m": "AUC ↑", "membership": "AUC"}.get(name, "RMSE ↓")
        drawn(points(cells, columns), label).savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    for name, panels in CURVES.items():
        cells = tables((RESULTS / f"{name}.md").read_text(encoding="utf-8"))
        found = [(points(cells[place], [column]), column, title) for place, (column, title) in panels.items()]
        curves(found).savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
