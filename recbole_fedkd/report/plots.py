"""The plots of a report, each a function from records to a drawing: learning curves, bytes against quality, clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from recbole_fedkd.report.contents import byte_count, duration, heading, usual_name
from recbole_fedkd.report.drawing import COLOURS, INK, Canvas, Drawing, slug, style
from recbole_fedkd.report.experiment import Group
from recbole_fedkd.report.measures import bytes_and_quality, front_rows, mean_curve
from recbole_fedkd.report.quality import main_metrics, protocols_of
from recbole_fedkd.report.records import Run
from recbole_fedkd.report.statistics import lower_is_better, summary

MANY_CLIENTS = 30
_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


def plots_of(group: Group, number: int = 1) -> list[Drawing]:
    """All plots for which a group has the records; ``number`` tells their files from those of other groups."""
    return [canvas.draw(number) for canvas in (*learning_curves(group), *fronts(group), *partitions(group))]


def _rounds(run: Run) -> NDArray[np.float64]:
    return np.array([record.number for record in run.rounds], dtype=np.float64)


def _seconds(run: Run) -> NDArray[np.float64]:
    return np.cumsum([record.seconds for record in run.rounds], dtype=np.float64)


def _bytes(run: Run) -> NDArray[np.float64]:
    return np.cumsum([record.bytes_moved for record in run.rounds], dtype=np.float64)


# What a learning curve runs along: how it is called, where a run's rounds are, and how a place is said.
_WAYS: dict[str, tuple[str, Callable[[Run], NDArray[np.float64]], Callable[[float], str]]] = {
    "rounds": ("round (epoch, where one model is trained on all data)", _rounds, "round {:.0f}".format),
    "seconds": ("training seconds", _seconds, duration),
    "bytes": ("bytes up and down, over all clients", _bytes, byte_count),
}


def learning_curves(group: Group) -> list[Canvas]:
    """Validation score against rounds, seconds and bytes; one set per validation metric of the group."""
    metrics = dict.fromkeys(run.valid_metric for run in group.all_runs)
    canvases = [_learning_curve(group, metric, name) for metric in metrics for name in _WAYS]
    return [canvas for canvas in canvases if canvas is not None]


def _learning_curve(group: Group, metric: str, name: str) -> Canvas | None:
    label, way, describe = _WAYS[name]
    canvas, axes = Canvas.single(label, f"validation {heading(metric)}")
    shown: list[float] = []
    still: list[str] = []
    for number, row in enumerate(group.rows):
        runs = [run for run in group.runs[row] if run.valid_metric == metric and run.valid_curve()]
        if not runs:
            continue
        look = {**style(group.rows, row), "markersize": 4.5, "linewidth": 1.6, "gid": f"row-{number}"}
        if name == "bytes" and any(not _bytes(run).any() for run in runs):
            best = summary([run.best_valid for run in runs if run.best_valid is not None]).mean
            # Drawn over the width of the axes, whatever its bytes; the marker stands at the edge.
            over_all: Any = {"transform": axes.get_yaxis_transform(), "clip_on": False, "markevery": [0]}
            look |= {"linestyle": "--", "linewidth": 1.2}
            (canvas.lines[row],) = axes.plot([0.0, 1.0], [best, best], **look, **over_all)
            shown.append(best)
            still.append(row)
            continue
        curves = []
        for run in runs:
            at = np.array([position for position, _ in run.valid_curve()])
            curves.append((way(run)[at], np.array([score for _, score in run.valid_curve()])))
        grid = None
        if name == "seconds" and len(curves) > 1:
            grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 40)
        x, mean, deviation = mean_curve(curves, grid)
        if not len(x):
            continue
        (canvas.lines[row],) = axes.plot(x, mean, **look, markevery=max(1, len(x) // 8))
        band = axes.fill_between(x, mean - deviation, mean + deviation, color=look["color"], alpha=0.13, linewidth=0)
        band.set_gid(f"row-{number}")
        for point, value, spread in zip(x, mean, deviation, strict=True):
            spread_told = f" ± {spread:.4f}" if len(curves) > 1 else ""
            canvas.tell(point, value, number, f"{row}, {describe(point)}: {value:.4f}{spread_told}")
        # The steep start of training would press what tells the rows apart into a few pixels.
        later = slice(len(x) // 4, None)
        shown += [*(mean - deviation)[later], *(mean + deviation)[later]]
    if len(still) == len(canvas.lines):
        return None
    room = 0.04 * (max(shown) - min(shown)) or 0.01
    axes.set_ylim(min(shown) - room, max(shown) + room)
    if name == "bytes":
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_count(value)))
    elif name == "rounds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for row in still:
        (value, _) = canvas.lines[row].get_ydata()
        canvas.tell(axes.get_xlim()[0], value, group.rows.index(row), f"{row}, sends nothing: {value:.4f}")
    spread = ": mean over seeds, band of one sample standard deviation, as far as all seeds of a row ran"
    caption = (
        f"Validation {usual_name(metric)} against {'rounds' if name == 'rounds' else label}"
        f"{spread if len(group.all_runs) > 1 else ''}. The axis is fitted to what follows each row's first quarter."
    )
    if name == "bytes":
        caption += " Dashed lines over the whole width: the best of rows that send nothing."
    return canvas.called(f"{slug(metric)}-against-{name}", f"Validation {usual_name(metric)} against {name}", caption)


def fronts(group: Group) -> list[Canvas]:
    """Bytes against test quality, for the metric that chose the models and for the usual ranking metric, if they exist."""
    available = main_metrics(group)
    chosen = [metric for metric in dict.fromkeys(run.valid_metric for run in group.all_runs) if metric in available]
    ranking = [metric for metric in available if metric.startswith(("labelledndcg@", "ndcg@"))]
    wanted = list(dict.fromkeys([*(chosen or available)[:1], *ranking[:1]]))
    return [plot for metric in wanted if (plot := _front(group, metric)) is not None]


def _front(group: Group, metric: str) -> Canvas | None:
    places = bytes_and_quality(group, metric)
    positive = [moved for moved, _ in places.values() if moved]
    if not positive:
        return None
    # The axis is logarithmic, and left of it two columns take the rows that send nothing and those without a network.
    low, high = float(np.floor(np.log10(min(positive)))), float(np.ceil(np.log10(max(positive))))
    high = max(high, low + 1.0)
    unit = 0.14 * (high - low)
    zero, none = low - unit, low - 2 * unit
    canvas, axes = Canvas.single("bytes until the best round, up and down, over all clients", f"test {heading(metric)}")
    drawn: dict[str, tuple[float, float]] = {}
    front = front_rows(places, bigger=not lower_is_better(metric))
    for row, (moved, value) in places.items():
        x = none if moved is None else zero if moved == 0 else float(np.log10(moved))
        drawn[row] = (x, value)
        number = group.rows.index(row)
        look = {**style(group.rows, row), "linestyle": "none", "markersize": 8, "zorder": 5, "gid": f"row-{number}"}
        (canvas.lines[row],) = axes.plot([x], [value], **look)
        sent = "no network" if moved is None else byte_count(moved)
        canvas.tell(x, value, number, f"{row}, {sent}: {value:.4f}{', on the front' if row in front else ''}")
    # A row of the front stays the best for its bytes until the next one.
    stairs = [drawn[row] for row in front]
    axes.step(
        [*(x for x, _ in stairs), high],
        [*(value for _, value in stairs), stairs[-1][1]],
        where="post", color="#888888", linewidth=1.2, linestyle=":", zorder=1,
    )  # fmt: skip
    for edge in (low - 0.5 * unit, low - 1.5 * unit):
        axes.axvline(edge, color="#aaaaaa", linewidth=0.8)
    decades = [float(decade) for decade in np.arange(low, high + 0.5, max(1, round((high - low) / 5)))]
    axes.set_xticks([none, zero, *decades], ["no\nnetwork", "none", *(byte_count(10**decade) for decade in decades)])
    axes.set_xlim(none - 0.6 * unit, high + 0.25 * unit)
    axes.margins(y=0.12)
    caption = (
        f"Test {usual_name(metric)} against the bytes sent until the judged round, means over seeds. Dotted: the "
        "Pareto front of the rows with a network; no other such row is at least as good for fewer bytes."
    )
    if len(protocols_of(group, metric)) > 1:
        caption += " The rows were judged by different protocols, see the quality table, and do not compare."
    return canvas.called(f"bytes-and-test-{slug(metric)}", f"Bytes and test {usual_name(metric)}", caption)


def partitions(group: Group) -> list[Canvas]:
    """Sizes and labels of the clients, one plot per distinct partition of the group's first seed."""
    with_clients = [run for run in group.all_runs if run.partition and run.partition["clients"]]
    if not with_clients:
        return []
    seed = min(run.seed for run in with_clients)
    distinct: dict[str, list[Run]] = {}
    for run in with_clients:
        if run.seed == seed:
            distinct.setdefault(json.dumps(run.partition, sort_keys=True, default=str), []).append(run)
    plots = []
    for number, runs in enumerate(distinct.values(), start=1):
        assert runs[0].partition is not None
        partition = runs[0].partition
        who = "" if len(distinct) == 1 else f" of {', '.join(run.row for run in runs)}"
        caption = (
            f"Partition {partition['scheme']} into {len(partition['clients'])} clients{who}, seed {seed}: training samples "
            "per client, and which labels they have."
        )
        name = "clients" if len(distinct) == 1 else f"clients-{number}"
        plots.append(_partition(partition).called(name, f"Data of the clients{who}", caption))
    return plots


def _partition(partition: Mapping[str, Any]) -> Canvas:
    clients = partition["clients"]
    samples = np.array([client["samples"] for client in clients])
    # A client without a sample may have an empty histogram.
    labels = max(len(client["labels"]) for client in clients)
    counts = np.zeros((len(clients), labels))
    for number, client in enumerate(clients):
        counts[number, : len(client["labels"])] = client["labels"]
    values = partition["label_values"]
    texts = [f"{value:g}" if isinstance(value, int | float) else str(value) for value in values]
    texts = texts if len(texts) == labels else [str(index) for index in range(labels)]
    canvas = Canvas.new(2 if labels else 1, 5.6 if labels else 3.0)
    many = len(clients) > MANY_CLIENTS
    names, sizes = np.arange(len(clients)), canvas.axes[0]
    if many:
        bins = min(40, max(10, len(clients) // 10))
        heights, edges, _ = sizes.hist(samples, bins=bins, color=COLOURS[0], edgecolor="white")
        canvas.tell_bars(heights, edges, "{:,.0f} to {:,.0f} samples: {:.0f} clients".format)
        sizes.set_xlabel("training samples of a client")
        sizes.set_ylabel("clients")
        sizes.xaxis.set_major_formatter(_THOUSANDS)
    else:
        sizes.bar(names, samples, color=COLOURS[0], width=0.75)
        for number, count in enumerate(samples):
            canvas.tell(number, count, -1, f"client {number}: {count:,} samples")
        sizes.set_xlabel("client")
        sizes.set_ylabel("training samples")
        sizes.xaxis.set_major_locator(MaxNLocator(integer=True))
        sizes.yaxis.set_major_formatter(_THOUSANDS)
    if not labels:
        return canvas
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    axes = canvas.axes[1]
    if many:
        axes.boxplot(
            list(shares[counts.sum(axis=1) > 0].T),
            widths=0.55,
            patch_artist=True,
            boxprops={"facecolor": "#8fbddb", "edgecolor": COLOURS[0]},
            medianprops={"color": COLOURS[1], "linewidth": 1.8},
            whiskerprops={"color": INK},
            capprops={"color": INK},
            flierprops={"marker": ".", "markersize": 3, "markeredgecolor": "#888888"},
        )
        axes.set_xticks(range(1, labels + 1), texts, rotation=45 if labels > 12 else 0)
        axes.set_xlabel("label (box: quartiles over clients)")
        axes.set_ylabel("share of a client's samples")
        return canvas
    below = np.zeros(len(clients))
    for label, shade in enumerate(colormaps["cividis"](np.linspace(0.05, 0.97, labels))):
        axes.bar(names, shares[:, label], bottom=below, color=shade, width=0.75, label=texts[label])
        for number, share in enumerate(shares[:, label]):
            if share:
                text = f"client {number}, label {texts[label]}: {share:.0%}"
                canvas.tell(number, below[number] + share / 2, -1, text, panel=1)
        below += shares[:, label]
    axes.set_xlabel("client")
    axes.set_ylabel("share of labels")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # The highest label stands on top in the bars, so in the legend too.
    handles, _ = axes.get_legend_handles_labels()
    layout: Any = {
        "loc": "center left",
        "bbox_to_anchor": (1.01, 0.5),
        "ncols": 1 + (labels - 1) // 12,
    }
    canvas.explain(axes, handles[::-1], texts[::-1], title="label", **layout)
    canvas.right = 0.9 * (1 + (labels - 1) // 12)
    return canvas
