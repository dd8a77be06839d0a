"""The tables of a report: what stands in them, and how they are written as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_fedkd.report.records import (
    Experiment,
    Group,
    Published,
    Scale,
    as_text,
    comparable_protocol,
    parted_protocol,
)
from recbole_fedkd.report.statistics import (
    ClientQuality,
    Comparison,
    Cost,
    Size,
    Summary,
    bytes_and_quality,
    client_quality,
    costs_of,
    front_rows,
    lower_is_better,
    share_closed,
    share_of_bytes,
    sizes_of,
    summary,
)

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
    """One cell: its text, and whether it stands out as the best of its column."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; every row is as long as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def metrics_of(group: Group) -> list[str]:
    """Test metrics that any run of the group has, in the order of the tables; unusual ones last, in that of the runs."""
    names = dict.fromkeys(metric for run in group.all_runs for metric in run.test)
    order = list(USUAL_NAMES)

    def place(metric: str) -> tuple[int, int]:
        stem, _, cut = metric.partition("@")
        return order.index(stem) if stem in order else len(order), int(cut) if cut.isdecimal() else 0

    return sorted(names, key=place)


def usual_name(metric: str) -> str:
    """A metric as the field writes it: ``labelled NDCG@10`` for ``labelledndcg@10``."""
    stem, at, cut = metric.partition("@")
    return USUAL_NAMES.get(stem, stem) + at + cut


def heading(metric: str) -> str:
    """A metric's name and the direction in which it gets better."""
    return f"{usual_name(metric)} {'↓' if lower_is_better(metric) else '↑'}"


def quality(group: Group) -> dict[tuple[str, str], Summary]:
    """Summary over seeds per row and metric; pairs without a value are absent."""
    found = {}
    for row in group.rows:
        for metric in metrics_of(group):
            values = [run.test[metric] for run in group.runs[row] if metric in run.test]
            if values:
                found[row, metric] = summary(values)
    return found


def best_rows(group: Group) -> dict[str, set[str]]:
    """Per metric the rows with the best mean as printed; none where a single row has it or the protocols differ."""
    summaries = quality(group)
    best = {}
    for metric in metrics_of(group):
        means = {row: summaries[row, metric].mean for row in group.rows if (row, metric) in summaries}
        best[metric] = _best(group, metric, means)
    return best


def _best(group: Group, metric: str, means: Mapping[str, float]) -> set[str]:
    """The rows with the best of some means, as printed; none where a single row has one or the protocols differ."""
    if len(means) < 2 or len(protocols_of(group, metric)) > 1:
        return set()
    printed = {row: round(mean, 4) for row, mean in means.items()}
    wanted = (min if lower_is_better(metric) else max)(printed.values())
    return {row for row, mean in printed.items() if mean == wanted}


def protocols_of(group: Group, metric: str) -> dict[str, list[str]]:
    """Each protocol by which a metric came about in the group, with its rows.

    What a protocol says in brackets at its end was counted on one split, and may differ between seeds: the first to the last
    of the counts are told.
    """
    found: dict[str, list[str]] = {}
    sentences: dict[str, str] = {}
    counted: dict[str, list[str]] = {}
    for row in group.rows:
        for run in group.runs[row]:
            if metric in run.test:
                whole = run.protocols.get(metric, "protocol not recorded")
                key, (told, counts) = comparable_protocol(whole), parted_protocol(whole)
                sentences[key] = max(sentences.get(key, ""), told, key=len)
                rows = found.setdefault(key, [])
                if row not in rows:
                    rows.append(row)
                if counts and counts not in counted.setdefault(key, []):
                    counted[key].append(counts)
    return {" ".join([sentences[key], *_merged_counts(counted.get(key, []))]): rows for key, rows in found.items()}


def _merged_counts(told: Sequence[str]) -> list[str]:
    """One text for several that differ in their numbers alone, with each number's range; else all of them."""
    numbers = [[int(number) for number in re.findall(r"\d+", text)] for text in told]
    if len({re.sub(r"\d+", "#", text) for text in told}) > 1 or not told:
        return list(told)
    ranges = iter(
        [
            f"{min(each)}" if min(each) == max(each) else f"{min(each)} to {max(each)}"
            for each in zip(*numbers, strict=True)
        ]
    )
    return [re.sub(r"\d+", lambda _: next(ranges), told[0])]


def protocol_sentences(group: Group) -> list[str]:
    """How each number of the quality table came about; metrics that share a protocol share a sentence."""
    shared: dict[str, list[str]] = {}
    differing = []
    for metric in metrics_of(group):
        protocols = protocols_of(group, metric)
        if len(protocols) == 1:
            shared.setdefault(next(iter(protocols)), []).append(usual_name(metric))
        else:
            usual = max(protocols, key=lambda text: len(protocols[text]))
            crowd = {usual} if len(protocols[usual]) > 3 else set()
            told = "; ".join(
                f"{text} ({'all other rows' if text in crowd else ', '.join(rows)})" for text, rows in protocols.items()
            )
            differing.append(
                f"{usual_name(metric)}: the protocol differs between rows, so that they do not compare: {told}."
            )
    return [f"{', '.join(names)}: {text}." for text, names in shared.items()] + differing


def seeds_sentence(group: Group) -> str:
    """What the numbers in the quality table are."""
    seeds = sorted({run.seed for run in group.all_runs})
    listed = ", ".join(str(seed) for seed in seeds)
    return (
        f"Mean ± sample standard deviation over the seeds ({listed}); a row has as many as its column “seeds” says. "
        "Best mean in bold."
    )


def quality_table(group: Group) -> Table:
    """The quality of each row; it holds no times, so that it does not depend on the machine."""
    metrics = metrics_of(group)
    summaries = quality(group)
    best = best_rows(group)
    rows = []
    for row in group.rows:
        cells = [Cell(row)]
        for metric in metrics:
            found = summaries.get((row, metric))
            text = NONE if found is None else _mean_and_deviation(found, ".4f")
            if found is not None and found.count != len(group.runs[row]):
                text += f" (n = {found.count})"
            cells.append(Cell(text, row in best[metric]))
        rows.append((*cells, Cell(str(len(group.runs[row])))))
    return Table(("row", *(heading(metric) for metric in metrics), "seeds"), tuple(rows))


def published_table(group: Group, published: Published) -> Table | None:
    """Published values beside measured ones, for the rows that have both; None if the group has none of them."""
    rows = [row for row in group.rows if row in published.rows]
    elsewhere = any(group.settings.get(key) != value for key, value in published.settings.items())
    if not rows or elsewhere:
        return None
    names = list(dict.fromkeys(str(name) for row in rows for name in published.rows[row]))
    metrics = metrics_of(group)
    summaries = quality(group)
    ours = {}
    for name in names:
        counterpart = published.metrics.get(name, name.lower())
        if counterpart in metrics:
            ours[name] = counterpart
    header = ["row"]
    for name in names:
        header.append(f"{name}, published")
        if name in ours:
            header.append(f"{usual_name(ours[name])}, measured")
    lines = []
    for row in rows:
        cells = [Cell(row)]
        for name in names:
            value = published.rows[row].get(name)
            cells.append(Cell(NONE if value is None else as_text(value)))
            if name in ours:
                found = summaries.get((row, ours[name]))
                cells.append(Cell(NONE if found is None else _mean_and_deviation(found, ".4f")))
        lines.append(tuple(cells))
    return Table(tuple(header), tuple(lines))


@dataclass(frozen=True)
class ClientTable:
    """What a group's clients have, of all sizes or of one.

    Attributes:
        title: a heading.
        table: the table.
        sentence: what its numbers are.
    """

    title: str
    table: Table
    sentence: str


def client_tables(group: Group) -> list[ClientTable]:
    """The clients' own averages: one table of all clients, and one for each size of students; empty without clients."""
    everyone = client_quality(group, metrics_of(group))
    if not everyone:
        return []
    shown = {each.row for each in everyone}
    borrowed = [row for row in shown if not any("client" in run.users for run in group.runs[row])]
    sentence = (
        "A client's metric is the mean over its users that are judged by it. Shown are the mean over the clients and the "
        f"worst client, each ± the sample standard deviation over seeds, and against {group.reference}, with the same "
        "seed and users, the mean difference and in brackets how many clients are better off, over all seeds. Best in bold."
    )
    told = [sentence]
    if borrowed:
        names = ", ".join(row for row in group.rows if row in borrowed)
        told.append(f"Users of {names}, which recorded no clients, count to those that they have in other rows.")
    missing = [row for row in group.rows if row not in shown]
    if missing:
        told.append(f"Without clients or metrics of single users, and left out: {', '.join(missing)}.")
    tables = [ClientTable("All clients", _client_table(group, group.rows, everyone), " ".join(told))]
    for size in sizes_of(group):
        found = client_quality(group, metrics_of(group), size)
        if not found:
            continue
        others = [row for row in size.rows if any(run.student_pool != size.pool for run in group.runs[row])]
        told = [f"Clients {_numbers(group, size)}, which have this student."]
        if others:
            told.append(f"In {', '.join(others)} the clients of the same numbers have the row's own model.")
        title = f"Students {_size_name(size)}"
        tables.append(ClientTable(title, _client_table(group, size.rows, found), " ".join(told)))
    return tables


def _size_name(size: Size) -> str:
    """Which size of how many, and in which keys it differs from the row's own."""
    own = ", ".join(f"{key}: {as_text(value)}" for key, value in size.pool[size.place].items())
    return f"{size.place + 1} of {len(size.pool)} ({own or 'the keys of the row'})"


def _numbers(group: Group, size: Size) -> str:
    """The first numbers of the clients of a size."""
    count = max(
        len(run.partition["clients"]) for run in group.all_runs if run.partition and run.student_pool == size.pool
    )
    numbers = list(map(str, range(size.place, count, len(size.pool))))
    return ", ".join([*numbers[:8], *(["..."] if len(numbers) > 8 else [])])


def _client_table(group: Group, rows: Iterable[str], found: Sequence[ClientQuality]) -> Table:
    by_place = {(each.row, each.metric): each for each in found}
    metrics = list(dict.fromkeys(each.metric for each in found))
    metrics.sort(key=metrics_of(group).index)
    best = {}
    for metric in metrics:
        of_metric = [each for each in found if each.metric == metric]
        best[metric, "mean"] = _best(group, metric, {each.row: each.mean.mean for each in of_metric})
        best[metric, "worst"] = _best(group, metric, {each.row: each.worst.mean for each in of_metric})
    header = ["row"]
    for metric in metrics:
        name = usual_name(metric)
        header += [heading(metric), f"{name}, worst client", f"{name}, against {group.reference}"]
    lines = []
    for row in rows:
        if not any(each.row == row for each in found):
            continue
        cells = [Cell(row)]
        for metric in metrics:
            own = by_place.get((row, metric))
            if own is None:
                cells += [Cell(NONE)] * 3
                continue
            against = f"{signed(own.difference)} ({own.better} of {own.compared})" if own.compared else NONE
            cells += [
                Cell(_mean_and_deviation(own.mean, ".4f"), row in best[metric, "mean"]),
                Cell(_mean_and_deviation(own.worst, ".4f"), row in best[metric, "worst"]),
                Cell(against),
            ]
        lines.append(tuple(cells))
    return Table(tuple(header), tuple(lines))


def size_sentences(group: Group) -> list[str]:
    """Whether the students of every size gain over the reference's clients of the same numbers, per row of several sizes."""
    gains: dict[tuple[str, str], dict[int, bool]] = {}
    for size in sizes_of(group):
        for each in client_quality(group, metrics_of(group), size):
            pooled = all(run.student_pool == size.pool for run in group.runs[each.row])
            if pooled and each.compared:
                better = each.difference < 0 if lower_is_better(each.metric) else each.difference > 0
                gains.setdefault((each.row, each.metric), {})[size.place + 1] = better
    sentences = []
    for row in dict.fromkeys(row for row, _ in gains):
        told: dict[str, list[str]] = {}
        for metric in (metric for name, metric in gains if name == row):
            sizes = [str(number) for number, better in gains[row, metric].items() if better]
            if len(sizes) == len(gains[row, metric]):
                where = "students of every size gain"
            else:
                where = f"only students of size {', '.join(sizes)} gain" if sizes else "students of no size gain"
            told.setdefault(where, []).append(usual_name(metric))
        parts = "; ".join(f"in {', '.join(names)} {where}" for where, names in told.items())
        sentences.append(f"{row} against {group.reference}, means over clients and seeds: {parts}.")
    return sentences


def scale_metrics(group: Group) -> list[str]:
    """The metrics that are set against bytes: accuracy, MAE, what chose the models, and the usual ranking metric."""
    available = metrics_of(group)
    ranking = [metric for metric in available if metric.startswith(("labelledndcg@", "ndcg@"))]
    wanted = {"accuracy", "mae", *(run.valid_metric for run in group.all_runs), *ranking[:1]}
    return [metric for metric in available if metric in wanted]


def scale_fronts(group: Group) -> dict[str, set[str]]:
    """Rows on the front of bytes and quality per metric; none where the protocols differ."""
    fronts = {}
    for metric in scale_metrics(group):
        comparable = len(protocols_of(group, metric)) <= 1
        front = front_rows(bytes_and_quality(group, metric), bigger=not lower_is_better(metric))
        fronts[metric] = set(front) if comparable else set()
    return fronts


def scale_table(group: Group, scale: Scale) -> Table:
    """Quality, the share of the way from floor to ceiling that it closes, bytes, and their share of the unit's."""
    metrics, fronts = scale_metrics(group), scale_fronts(group)
    summaries, costs = quality(group), costs_of(group)
    closes, shares = scale.floor and scale.ceiling, scale.bytes_row is not None
    header = ["row"]
    for metric in metrics:
        header += [heading(metric), *([f"{usual_name(metric)}, closed"] if closes else [])]
    header += ["bytes until the best round", *([f"share of the bytes of {scale.bytes_row}"] if shares else [])]
    lines = []
    for row in group.rows:
        cells = [Cell(row)]
        for metric in metrics:
            found = summaries.get((row, metric))
            cells.append(Cell(NONE if found is None else f"{found.mean:.4f}", row in fronts[metric]))
            if closes:
                cells.append(_share(share_closed(group, row, metric, scale.floor, scale.ceiling), group.runs[row]))
        moved = summary([float(each.judged_bytes) for each in costs[row] if each.judged_bytes is not None])
        cells.append(Cell(f"{moved.mean:,.0f}" if moved.count else NONE))
        if shares:
            cells.append(_share(share_of_bytes(group, row, scale.bytes_row), group.runs[row]))
        lines.append(tuple(cells))
    return Table(tuple(header), tuple(lines))


def _share(found: Summary, runs: Sequence[Any]) -> Cell:
    if not found.count:
        return Cell(NONE)
    return Cell(percent(found.mean) + (f" (n = {found.count})" if found.count != len(runs) else ""))


def percent(share: float) -> str:
    """A share in per cent: one decimal, or two significant digits of less than 1 %."""
    # No share is -0.
    value = 100 * share + 0.0
    if 0 < abs(value) < 1:
        digits = 1 - math.floor(math.log10(abs(value)))
        return f"{value:.{digits}f} %"
    return f"{value:.1f} %"


def scale_sentence(scale: Scale) -> str:
    """How the numbers of the table of bytes and quality are computed."""
    told = ["Means over seeds; in bold the front: no other row is at least as good in this metric for fewer bytes."]
    if scale.floor and scale.ceiling:
        told.append(
            f"Closed is (row - {scale.floor}) / ({scale.ceiling} - {scale.floor}), the share of the distance from "
            f"{scale.floor} to {scale.ceiling}, computed within each seed and then averaged; it is below 0 for a row worse "
            f"than {scale.floor} and above 100 % for one better than {scale.ceiling}."
        )
    if scale.bytes_row:
        told.append(
            f"Bytes are up and down over all clients, and their share of those of {scale.bytes_row} is computed "
            "within each seed and then averaged too."
        )
    return " ".join(told)


@dataclass(frozen=True)
class Quantity:
    """One column of the cost table: its name and its value of each seed of a row, where it has one."""

    name: str
    values: Mapping[str, list[float]]
    whole: bool = True


def cost_quantities(group: Group, named_reference: bool) -> list[Quantity]:
    """The columns of the cost table; the way to the reference's score only if the experiment names a reference."""
    costs = costs_of(group)

    def column(name: str, value: Any, whole: bool = True) -> Quantity:
        found = {row: [value(each) for each in of_row] for row, of_row in costs.items()}
        return Quantity(
            name,
            {row: [float(each) for each in values if each is not None] for row, values in found.items()},
            whole,
        )

    columns = [
        column("rounds", lambda each: each.rounds),
        column("best round", lambda each: each.best_round),
        column("bytes in all", lambda each: each.total_bytes),
        column("bytes until the best round", lambda each: each.best_bytes),
        column("training seconds", lambda each: each.seconds, False),
        column("seconds a round", lambda each: each.seconds_per_round, False),
    ]
    if named_reference:
        score = f"the best validation score of {group.reference}"
        columns += [
            column(f"rounds to {score}", lambda each: each.reached and each.reached.rounds),
            column(f"seconds to {score}", lambda each: each.reached and each.reached.seconds, False),
            column(f"bytes to {score}", lambda each: each.reached and each.reached.bytes_moved),
        ]
    return columns


def reached_by(costs: Sequence[Cost]) -> str:
    """How many of the seeds that had a score to reach did reach it."""
    comparable = [each for each in costs if each.comparable]
    return f"{sum(each.reached is not None for each in comparable)} of {len(comparable)}" if comparable else NONE


def cost_tables(group: Group, named_reference: bool) -> list[tuple[str, Table]]:
    """What the rows spent, each with a sentence that explains it; the second is the way to the reference's score."""
    quantities = cost_quantities(group, named_reference)
    spent = _cost_table(group, quantities[:6], {})
    told = [
        (
            "Means over seeds, seconds ± sample standard deviation. Seconds are of training alone and hold for the "
            "machine that ran it; rounds are epochs where one model is trained on all data, and the best is counted "
            "from 1. Bytes are up and down, over all clients.",
            spent,
        )
    ]
    if named_reference:
        costs = costs_of(group)
        short = [
            Quantity(name, each.values, each.whole)
            for name, each in zip(("rounds", "seconds", "bytes"), quantities[6:], strict=True)
        ]
        seeds = {row: reached_by(costs[row]) for row in group.rows}
        told.append(
            (
                f"Until the validation score was first as good as the best of {group.reference} with the same seed: "
                "means over the seeds that got there.",
                _cost_table(group, short, {"seeds that got there": seeds}),
            )
        )
    return told


def _cost_table(group: Group, quantities: Sequence[Quantity], texts: Mapping[str, Mapping[str, str]]) -> Table:
    columns = [*texts.values(), *(_cost_column(group, quantity) for quantity in quantities)]
    rows = tuple((Cell(row), *(Cell(column[row]) for column in columns)) for row in group.rows)
    return Table(("row", *texts, *(quantity.name for quantity in quantities)), rows)


def _cost_column(group: Group, quantity: Quantity) -> dict[str, str]:
    values = {row: summary(quantity.values[row]) for row in group.rows}
    means = [each.mean for each in values.values() if each.count]
    if quantity.whole:
        # Rounds are few, so that a tenth of one tells; a tenth of a byte among thousands tells nothing.
        digits = ".1f" if any(mean % 1 for mean in means) and max(means) < 1000 else ",.0f"
        return {row: format(each.mean, digits) if each.count else NONE for row, each in values.items()}
    digits = ",.2f" if means and min(means) < 100 else ",.0f"
    return {row: _mean_and_deviation(each, digits) if each.count else NONE for row, each in values.items()}


def difference_table(group: Group, comparisons: Sequence[Comparison], metrics: Sequence[str]) -> Table:
    """Mean difference from the reference per row and metric, marked where a corrected p-value is below 0.05."""
    rows = []
    for row in group.rows:
        if row == group.reference:
            continue
        cells = [Cell(row)]
        for metric in metrics:
            found = {(each.unit, each.test): each for each in comparisons if (each.row, each.metric) == (row, metric)}
            if not found:
                cells.append(Cell(NONE))
                continue
            marks = "".join(
                mark
                for mark, kind in (("†", ("seeds", "paired t")), ("*", ("users", "Wilcoxon")))
                if kind in found and found[kind].corrected < 0.05
            )
            text = signed(found["seeds", "paired t"].difference)
            cells.append(Cell(f"{text} {marks}".strip(), bool(marks)))
        rows.append(tuple(cells))
    return Table(("row", *(heading(metric) for metric in metrics)), tuple(rows))


def significance_table(comparisons: Sequence[Comparison]) -> Table:
    """Every test: per row, metric and unit the difference, the number of pairs and both tests' p-values."""
    header = (
        "row",
        "metric",
        "pairs",
        "number",
        "difference",
        "t: p",
        "t: p corrected",
        "Wilcoxon: p",
        "Wilcoxon: p corrected",
    )
    merged: dict[tuple[str, str, str], dict[str, Comparison]] = {}
    for each in comparisons:
        merged.setdefault((each.row, each.metric, each.unit), {})[each.test] = each
    rows = []
    # Both units of a row and metric stand together.
    places = list(dict.fromkeys((row, metric) for row, metric, _ in merged))
    for row, metric in places:
        for unit in ("seeds", "users"):
            tests = merged.get((row, metric, unit), {})
            if not tests:
                continue
            first = tests["paired t"]
            cells = [row, usual_name(metric), unit, str(first.count), signed(first.difference)]
            for name in ("paired t", "Wilcoxon"):
                cells += [probability(tests[name].p), probability(tests[name].corrected)]
            rows.append(tuple(Cell(text) for text in cells))
    return Table(header, tuple(rows))


def significance_sentences(group: Group, comparisons: Sequence[Comparison], named_reference: bool) -> list[str]:
    """What the comparisons are, and what so few seeds cannot tell."""
    chosen = "the reference row" if named_reference else "the first row, as the experiment names no reference"
    sentences = [
        f"Differences from {group.reference} ({chosen}), paired over equal seeds and over users (each user's values "
        "averaged over the seeds in which both rows judged that user). p-values are two-sided and corrected after Holm "
        "over all rows and metrics of this group, for each kind of test by itself."
    ]
    few = sorted({each.count for each in comparisons if each.unit == "seeds" and 2 <= each.count < 6})
    sentences += [
        f"With {count} seeds the smallest two-sided Wilcoxon p over seeds is {2.0 ** (1 - count):g}, so this test "
        "cannot fall below 0.05, whatever the difference."
        for count in few
    ]
    if any(each.unit == "seeds" and each.count < 2 for each in comparisons):
        sentences.append("Rows that share a single seed with the reference cannot be tested over seeds (n/a).")
    if any(each.unit == "users" and each.count == 0 for each in comparisons):
        sentences.append("Metrics that were not recorded per user cannot be tested over users (n/a).")
    return sentences


def signed(value: float) -> str:
    """A difference with its sign; ``n/a`` for nan."""
    return "n/a" if math.isnan(value) else f"{value:+.4f}".replace("-0.0000", "0.0000").replace("+0.0000", "0.0000")


def probability(p: float) -> str:
    """A p-value; ``n/a`` for nan."""
    if math.isnan(p):
        return "n/a"
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _mean_and_deviation(values: Summary, digits: str) -> str:
    mean = format(values.mean, digits)
    return mean if math.isnan(values.deviation) else f"{mean} ± {format(values.deviation, digits)}"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table's cell too."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    # An underscore within a word is no emphasis, and names of settings are full of them.
    return re.sub(r"[\\|*`~\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown: numbers to the right, names to the left."""
    ruler = ("---", *["---:"] * (len(table.header) - 1))
    written = [f"| {' | '.join(escaped(text) for text in table.header)} |", f"| {' | '.join(ruler)} |"]
    for row in table.rows:
        cells = [f"**{escaped(cell.text)}**" if cell.strong else escaped(cell.text) for cell in row]
        written.append(f"| {' | '.join(cells)} |")
    return "\n".join(written)


def quality_markdown(experiment: Experiment) -> str:
    """The quality tables of all groups, with their protocols and the published numbers, to paste into a README."""
    parts = []
    for group in experiment.groups:
        parts += [f"### {escaped(group.title)}", markdown(quality_table(group)), escaped(seeds_sentence(group))]
        parts.append("\n".join(f"- {escaped(sentence)}" for sentence in protocol_sentences(group)))
        table = published_table(group, experiment.published) if experiment.published else None
        if experiment.published and table:
            source = experiment.published.source
            parts += [f"Published{f' ({escaped(source)})' if source else ''} and measured:", markdown(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def cost_markdown(experiment: Experiment) -> str:
    """The cost tables of all groups, to paste into a README."""
    parts = []
    for group in experiment.groups:
        parts.append(f"### {escaped(group.title)}")
        for sentence, table in cost_tables(group, experiment.named_reference):
            parts += [markdown(table), escaped(sentence)]
    return "\n\n".join(parts) + "\n"


def clients_markdown(experiment: Experiment) -> str | None:
    """The clients' own averages of all groups, to paste into a README; None if no group has clients."""
    parts = []
    for group in experiment.groups:
        tables = client_tables(group)
        parts += [f"### {escaped(group.title)}"] if tables else []
        for each in tables:
            parts += [f"#### {escaped(each.title)}", markdown(each.table), escaped(each.sentence)]
        sentences = size_sentences(group)
        parts.append("\n".join(f"- {escaped(sentence)}" for sentence in sentences))
    return "\n\n".join(part for part in parts if part) + "\n" if any(parts) else None


def scale_markdown(experiment: Experiment) -> str | None:
    """The tables of bytes and quality of all groups; None if the experiment names no scale."""
    if experiment.scale is None or not experiment.groups:
        return None
    parts = []
    for group in experiment.groups:
        parts += [f"### {escaped(group.title)}", markdown(scale_table(group, experiment.scale))]
        parts.append(escaped(scale_sentence(experiment.scale)))
    return "\n\n".join(parts) + "\n"


def _csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def _group_columns(experiment: Experiment) -> list[str]:
    return list(dict.fromkeys(key for group in experiment.groups for key in group.settings))


def _group_cells(group: Group, columns: Iterable[str]) -> list[str]:
    return [as_text(group.settings[key]) if key in group.settings else "" for key in columns]


def _number(value: float) -> str:
    # Shortest text that reads back as the same number; nothing for nan.
    return "" if math.isnan(value) else repr(float(value))


def quality_csv(experiment: Experiment) -> str:
    """One line per group, row and metric, in full precision."""
    columns = _group_columns(experiment)
    lines = []
    for group in experiment.groups:
        best = best_rows(group)
        for (row, metric), found in quality(group).items():
            protocols = [text for text, rows in protocols_of(group, metric).items() if row in rows]
            lines.append(
                [
                    *_group_cells(group, columns),
                    row,
                    metric,
                    "lower" if lower_is_better(metric) else "higher",
                    _number(found.mean),
                    _number(found.deviation),
                    found.count,
                    int(row in best[metric]),
                    "; ".join(protocols),
                ]
            )
    return _csv([*columns, "row", "metric", "better", "mean", "deviation", "seeds", "best", "protocol"], lines)


def cost_csv(experiment: Experiment) -> str:
    """One line per group, row and quantity, in full precision; ``seeds`` says how many have a value."""
    columns = _group_columns(experiment)
    lines = []
    for group in experiment.groups:
        for quantity in cost_quantities(group, experiment.named_reference):
            for row in group.rows:
                values = summary(quantity.values[row])
                numbers = [_number(values.mean), _number(values.deviation), values.count]
                lines.append([*_group_cells(group, columns), row, quantity.name, *numbers])
    return _csv([*columns, "row", "quantity", "mean", "deviation", "seeds"], lines)


def significance_csv(experiment: Experiment, comparisons: Sequence[Sequence[Comparison]]) -> str:
    """One line per test; ``comparisons`` are those of each group."""
    columns = _group_columns(experiment)
    lines = [
        [
            *_group_cells(group, columns),
            each.row,
            each.reference,
            each.metric,
            each.unit,
            each.test,
            each.count,
            _number(each.difference),
            _number(each.p),
            _number(each.corrected),
        ]
        for group, of_group in zip(experiment.groups, comparisons, strict=True)
        for each in of_group
    ]
    header = ["row", "reference", "metric", "pairs", "test", "n", "difference", "p", "p_corrected"]
    return _csv([*columns, *header], lines)


def clients_csv(experiment: Experiment) -> str | None:
    """One line per group, size of student (none: all clients), row and metric; None if no group has clients."""
    columns = _group_columns(experiment)
    lines = []
    for group in experiment.groups:
        for size in (None, *sizes_of(group)):
            which = ["", ""] if size is None else [str(size.place + 1), as_text(size.pool[size.place])]
            lines += [
                [
                    *_group_cells(group, columns),
                    *which,
                    each.row,
                    each.metric,
                    "lower" if lower_is_better(each.metric) else "higher",
                    _number(each.mean.mean),
                    _number(each.mean.deviation),
                    _number(each.worst.mean),
                    _number(each.worst.deviation),
                    each.mean.count,
                    each.clients,
                    group.reference,
                    _number(each.difference),
                    each.better,
                    each.compared,
                ]
                for each in client_quality(group, metrics_of(group), size)
            ]
    header = ["size", "student", "row", "metric", "better", "mean", "deviation", "worst", "worst_deviation", "seeds"]
    header += ["clients", "reference", "difference", "better_off", "compared"]
    return _csv([*columns, *header], lines) if lines else None


def scale_csv(experiment: Experiment) -> str | None:
    """One line per group, row and metric, in full precision; None if the experiment names no scale."""
    scale = experiment.scale
    if scale is None or not experiment.groups:
        return None
    columns = _group_columns(experiment)
    lines = []
    for group in experiment.groups:
        costs, fronts = costs_of(group), scale_fronts(group)
        for (row, metric), found in quality(group).items():
            if metric not in fronts:
                continue
            closed = share_closed(group, row, metric, scale.floor, scale.ceiling)
            moved = summary([float(each.judged_bytes) for each in costs[row] if each.judged_bytes is not None])
            of_unit = share_of_bytes(group, row, scale.bytes_row)
            numbers = [_number(found.mean), found.count, _number(closed.mean), closed.count]
            numbers += [_number(moved.mean), _number(of_unit.mean), of_unit.count, int(row in fronts[metric])]
            better = "lower" if lower_is_better(metric) else "higher"
            lines.append([*_group_cells(group, columns), row, metric, better, *numbers])
    header = ["row", "metric", "better", "mean", "seeds", "closed", "closed_seeds"]
    header += ["bytes", "share_of_bytes", "share_of_bytes_seeds", "front"]
    return _csv([*columns, *header], lines)
