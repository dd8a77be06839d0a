"""The plots of a report. Each is a function from records to a figure; none touches matplotlib's global state."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from recbole_fedkd.report.records import Group, Run
from recbole_fedkd.report.statistics import bytes_and_quality, front_rows, lower_is_better, summary
from recbole_fedkd.report.tables import heading, metrics_of, protocols_of, usual_name

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that is too faint on white. Their
# number shares no factor with the numbers of line styles and markers, so that no two rows look alike for a long time.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")

DOTS_PER_INCH = 140
MANY_CLIENTS = 30
ROWS_IN_PLOT = 6


@dataclass(frozen=True)
class Plot:
    """A figure with its words.

    Attributes:
        name: file name without its ending.
        figure: the figure.
        title: heading on the page.
        caption: what it shows and how it was made; also its alternative text.
    """

    name: str
    figure: Figure
    title: str
    caption: str


def png(figure: Figure) -> bytes:
    """A figure as a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def plots_of(group: Group) -> list[Plot]:
    """All plots for which a group has the records."""
    return [*learning_curves(group), *fronts(group), *partitions(group)]


def _figure(height: float = 4.6, width: float = 7.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _style(group: Group, row: str) -> dict[str, Any]:
    index = group.rows.index(row)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _legend(axes: Any, lines: dict[str, Any]) -> None:
    # The names are given, for those with a leading underscore would be left out if matplotlib collected them itself.
    names = [_literal(row) for row in lines]
    if len(lines) > ROWS_IN_PLOT:
        axes.legend([*lines.values()], names, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, frameon=False)
    else:
        axes.legend([*lines.values()], names, fontsize=9, framealpha=0.85)


def _literal(text: str) -> str:
    # Dollar signs would start mathematics.
    return text.replace("$", r"\$")


Way = Callable[[Run], NDArray[np.float64]]


def _rounds(run: Run) -> NDArray[np.float64]:
    return np.array([each.number for each in run.rounds], dtype=np.float64)


def _seconds(run: Run) -> NDArray[np.float64]:
    return np.cumsum([each.seconds for each in run.rounds], dtype=np.float64)


def _bytes(run: Run) -> NDArray[np.float64]:
    return np.cumsum([each.bytes_moved for each in run.rounds], dtype=np.float64)


def mean_curve(
    curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], grid: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean of several curves and the sample standard deviation around it, over the stretch that all of them cover.

    Args:
        curves: (x, y) each, x increasing; between its points a curve is a straight line.
        grid: where to take the mean; the x values of all curves if None.

    Returns:
        x, mean and deviation (0 for a single curve).
    """
    start = max(x[0] for x, _ in curves)
    end = min(x[-1] for x, _ in curves)
    if grid is None:
        grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= start) & (grid <= end)]
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    deviation = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(grid))
    return grid, values.mean(axis=0), deviation


def learning_curves(group: Group) -> list[Plot]:
    """Validation score against rounds, seconds and bytes; one set per validation metric of the group."""
    plots = []
    for metric in dict.fromkeys(run.valid_metric for run in group.all_runs):
        for name, label, way in (
            ("rounds", "round (epoch, where one model is trained on all data)", _rounds),
            ("seconds", "training seconds", _seconds),
            ("bytes", "bytes up and down, over all clients", _bytes),
        ):
            plot = _learning_curve(group, metric, name, label, way)
            if plot is not None:
                plots.append(plot)
    return plots


def _learning_curve(group: Group, metric: str, name: str, label: str, way: Way) -> Plot | None:
    figure, axes = _figure()
    lines: dict[str, Any] = {}
    moved = False
    shown: list[float] = []
    for row in group.rows:
        runs = [run for run in group.runs[row] if run.valid_metric == metric and run.valid_curve()]
        if not runs:
            continue
        style = {**_style(group, row), "markersize": 5, "linewidth": 1.7}
        if name == "bytes" and any(not _bytes(run).any() for run in runs):
            best = summary([run.best_valid for run in runs if run.best_valid is not None]).mean
            # Drawn over the width of the axes, whatever its bytes; the marker stands at the edge.
            width = {"transform": axes.get_yaxis_transform(), "clip_on": False, "markevery": [0]}
            shown.append(best)
            (lines[row],) = axes.plot(
                [0.0, 1.0], [best, best], **{**style, "linestyle": "--", "linewidth": 1.2}, **width
            )
            continue
        curves = []
        for run in runs:
            at = np.array([position for position, _ in run.valid_curve()])
            curves.append((way(run)[at], np.array([score for _, score in run.valid_curve()])))
        grid = None
        if name == "seconds" and len(curves) > 1:
            grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 60)
        x, mean, deviation = mean_curve(curves, grid)
        if not len(x):
            continue
        (lines[row],) = axes.plot(x, mean, **style, markevery=max(1, len(x) // 8))
        axes.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.13, linewidth=0)
        moved = True
        later = slice(len(x) // 4, None)
        shown += [*(mean - deviation)[later], *(mean + deviation)[later]]
    if not moved:
        return None
    # The steep start of training would press what tells the rows apart into a few pixels.
    room = 0.04 * (max(shown) - min(shown)) or 0.01
    axes.set_ylim(min(shown) - room, max(shown) + room)
    if name == "bytes":
        axes.set_xscale("log")
    elif name == "rounds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)
    axes.set_ylabel(f"validation {heading(metric)}")
    _legend(axes, lines)
    caption = (
        f"Validation {usual_name(metric)} against {'rounds' if name == 'rounds' else label}: mean over seeds, band of "
        "one sample standard deviation, as far as all seeds of a row ran. The axis is fitted to what follows each row's "
        "first quarter."
    )
    if name == "bytes":
        caption += " Dashed lines over the whole width: the best of rows that send nothing."
    return Plot(f"{_slug(metric)}-against-{name}", figure, f"Validation {usual_name(metric)} against {name}", caption)


def fronts(group: Group) -> list[Plot]:
    """Bytes against test quality, for the metric that chose the models and for the usual ranking metric, if they exist."""
    available = metrics_of(group)
    chosen = [metric for metric in dict.fromkeys(run.valid_metric for run in group.all_runs) if metric in available]
    ranking = [metric for metric in available if metric.startswith(("labelledndcg@", "ndcg@"))]
    wanted = list(dict.fromkeys([*(chosen or available)[:1], *ranking[:1]]))
    return [plot for metric in wanted if (plot := _front(group, metric)) is not None]


def _front(group: Group, metric: str) -> Plot | None:
    places = bytes_and_quality(group, metric)
    positive = [moved for moved, _ in places.values() if moved]
    if not positive:
        return None
    # The axis is logarithmic, and left of it two columns take the rows that send nothing and those without a network.
    low, high = float(np.floor(np.log10(min(positive)))), float(np.ceil(np.log10(max(positive))))
    high = max(high, low + 1.0)
    unit = 0.14 * (high - low)
    zero, none = low - unit, low - 2 * unit
    figure, axes = _figure(5.2, 9.0)
    drawn: dict[str, tuple[float, float]] = {}
    for row, (moved_bytes, quality) in places.items():
        x = none if moved_bytes is None else zero if moved_bytes == 0 else float(np.log10(moved_bytes))
        drawn[row] = (x, quality)
        style = _style(group, row)
        axes.plot(
            [x], [quality], marker=style["marker"], color=style["color"], markersize=8, linestyle="none", zorder=5
        )
    front = front_rows(places, bigger=not lower_is_better(metric))
    # A row of the front stays the best for its bytes until the next one.
    axes.step(
        [*(drawn[row][0] for row in front), high],
        [*(drawn[row][1] for row in front), drawn[front[-1]][1]],
        where="post",
        color="#888888",
        linewidth=1.2,
        linestyle=":",
        zorder=1,
    )
    axes.axvline(low - 0.5 * unit, color="#aaaaaa", linewidth=0.8)
    axes.axvline(low - 1.5 * unit, color="#aaaaaa", linewidth=0.8)
    step = max(1, round((high - low) / 6))
    decades = [float(each) for each in np.arange(low, high + 0.5, step)]
    axes.set_xticks([none, zero, *decades], ["no\nnetwork", "none", *(f"$10^{{{each:g}}}$" for each in decades)])
    axes.set_xlim(none - 0.6 * unit, high + 0.25 * unit)
    axes.margins(y=0.12)
    axes.set_xlabel("bytes until the best round, up and down, over all clients")
    axes.set_ylabel(f"test {heading(metric)}")
    _place_labels(figure, axes, drawn)
    caption = (
        f"Test {usual_name(metric)} against the bytes sent until the judged round, means over seeds. Dotted: the "
        "Pareto front of the rows with a network; no other such row is at least as good for fewer bytes."
    )
    if len(protocols_of(group, metric)) > 1:
        caption += " The rows were judged by different protocols, see the quality table, and do not compare."
    return Plot(f"bytes-and-test-{_slug(metric)}", figure, f"Bytes and test {usual_name(metric)}", caption)


def _place_labels(figure: Figure, axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Write each name near its point where it covers no other name and no point, nearest place first."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    at = {row: axes.transData.transform(point) for row, point in points.items()}
    # A point's marker in pixels, with some air.
    reach = 7.0 * figure.dpi / 100
    taken = [(x - reach, y - reach, x + reach, y + reach) for x, y in at.values()]
    for row, (x, y) in at.items():
        text = axes.annotate(
            _literal(row),
            points[row],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9,
            horizontalalignment="left",
            verticalalignment="bottom",
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        )
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        best: tuple[float, float, float] | None = None
        for distance in (1.3, 2.0, 3.0, 4.5, 6.5, 9.0, 12.0, 16.0):
            for angle in np.linspace(0.0, 2 * np.pi, 24, endpoint=False):
                middle_x = x + np.cos(angle) * (reach * distance + width / 2)
                middle_y = y + np.sin(angle) * (reach * distance + height / 2)
                box = (middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)
                inside = box[0] > frame.x0 and box[2] < frame.x1 and box[1] > frame.y0 and box[3] < frame.y1
                away = float(np.hypot(middle_x - x, middle_y - y)) - 0.5 * width * abs(float(np.cos(angle)))
                free = not any(_overlap(box, other) for other in taken)
                if inside and free and (best is None or away < best[2]):
                    best = (box[0], box[1], away)
            if best is not None:
                break
        left, bottom, away = best if best is not None else (x + reach, y - height / 2, 0.0)
        taken.append((left - 2, bottom - 1, left + width + 2, bottom + height + 1))
        text.set_position(((left - x) * 72 / figure.dpi, (bottom - y) * 72 / figure.dpi))
        if away > 3 * reach:
            end_x, end_y = np.clip(x, left, left + width), np.clip(y, bottom, bottom + height)
            end = axes.transData.inverted().transform((end_x, end_y))
            axes.plot([points[row][0], end[0]], [points[row][1], end[1]], color="#999999", linewidth=0.7, zorder=2)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def partitions(group: Group) -> list[Plot]:
    """Sizes and labels of the clients, one plot per distinct partition of the group's first seed."""
    with_clients = [run for run in group.all_runs if run.partition and run.partition["clients"]]
    if not with_clients:
        return []
    seed = min(run.seed for run in with_clients)
    distinct: dict[str, tuple[Run, list[str]]] = {}
    for run in with_clients:
        if run.seed == seed:
            key = json.dumps(run.partition, sort_keys=True, default=str)
            distinct.setdefault(key, (run, []))[1].append(run.row)
    plots = []
    for number, (run, rows) in enumerate(distinct.values(), start=1):
        assert run.partition is not None
        figure = _partition(run.partition)
        clients = run.partition["clients"]
        who = "" if len(distinct) == 1 else f" of {', '.join(rows)}"
        caption = (
            f"Partition {run.partition['scheme']} into {len(clients)} clients{who}, seed {seed}: training samples per "
            "client, and which labels they have."
        )
        name = "clients" if len(distinct) == 1 else f"clients-{number}"
        plots.append(Plot(name, figure, f"Clients{who}", caption))
    return plots


def _partition(partition: Mapping[str, Any]) -> Figure:
    clients = partition["clients"]
    samples = np.array([client["samples"] for client in clients])
    histograms = [client["labels"] for client in clients]
    # A client without a sample may have an empty histogram.
    labels = max(len(each) for each in histograms)
    counts = np.array([each + [0] * (labels - len(each)) for each in histograms], dtype=np.float64)
    counts = counts.reshape(len(clients), labels)
    figure = Figure(figsize=(7.6, 6.4 if labels else 3.4), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if labels else 1, 1, squeeze=False)[:, 0]
    for axes in panels:
        _plain(axes)
    many = len(clients) > MANY_CLIENTS
    names = np.arange(len(clients))
    thousands = FuncFormatter(lambda value, _: f"{value:,.0f}")
    if many:
        panels[0].hist(samples, bins=min(40, max(10, len(clients) // 10)), color=COLOURS[0], edgecolor="white")
        panels[0].set_xlabel("training samples of a client")
        panels[0].set_ylabel("clients")
        panels[0].xaxis.set_major_formatter(thousands)
    else:
        panels[0].bar(names, samples, color=COLOURS[0], width=0.75)
        panels[0].set_xlabel("client")
        panels[0].set_ylabel("training samples")
        panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].yaxis.set_major_formatter(thousands)
    if not labels:
        return figure
    values = partition["label_values"]
    texts = [f"{value:g}" if isinstance(value, int | float) else str(value) for value in values]
    texts = texts if len(texts) == labels else [str(index) for index in range(labels)]
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1.0)
    axes = panels[1]
    if many:
        held = shares[totals[:, 0] > 0]
        axes.boxplot(
            [held[:, label] for label in range(labels)],
            widths=0.55,
            patch_artist=True,
            boxprops={"facecolor": "#bcd9ea", "edgecolor": COLOURS[0]},
            medianprops={"color": COLOURS[1], "linewidth": 1.8},
            flierprops={"marker": ".", "markersize": 3, "markeredgecolor": "#888888"},
        )
        axes.set_xticks(range(1, labels + 1), texts, rotation=45 if labels > 12 else 0)
        axes.set_xlabel("label (box: quartiles over clients)")
        axes.set_ylabel("share of a client's samples")
        return figure
    shades = colormaps["cividis"](np.linspace(0.05, 0.97, labels))
    below = np.zeros(len(clients))
    for label in range(labels):
        axes.bar(names, shares[:, label], bottom=below, color=shades[label], width=0.75, label=texts[label])
        below += shares[:, label]
    axes.set_xlabel("client")
    axes.set_ylabel("share of labels")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, _ = axes.get_legend_handles_labels()
    # The highest label stands on top in the bars, so in the legend too.
    columns = 1 + (labels - 1) // 12
    axes.legend(
        handles[::-1],
        texts[::-1],
        title="label",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=9,
        frameon=False,
        ncols=columns,
    )
    return figure


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)
