"""The tables beside quality: clients, costs, bytes against quality, and the overview that holds the main ones at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from recbole_fedkd.report.contents import (
    NONE,
    Block,
    Bullets,
    Cell,
    Heading,
    Paragraph,
    Table,
    byte_count,
    column,
    duration,
    heading,
    mean_and_deviation,
    percent,
    signed,
    usual_name,
)
from recbole_fedkd.report.experiment import Group, Scale
from recbole_fedkd.report.measures import (
    ClientQuality,
    Cost,
    Size,
    bytes_and_quality,
    client_quality,
    costs_of,
    front_rows,
    mean_of,
    share_closed,
    share_of_bytes,
    sizes_of,
)
from recbole_fedkd.report.quality import (
    best_of,
    best_rows,
    by_row_and_metric,
    direction,
    hint,
    main_metrics,
    metrics_of,
    protocols_of,
    quality,
    trend,
)
from recbole_fedkd.report.records import as_text
from recbole_fedkd.report.statistics import Comparison, Summary, lower_is_better, summary

# The overview


def overview_table(group: Group, comparisons: Sequence[Comparison], scale: Scale | None) -> Table:
    """Quality by the main metrics, bytes, rounds and seconds of each row: what a reader looks for first."""
    summaries, best, tests, costs = quality(group), best_rows(group), by_row_and_metric(comparisons), costs_of(group)
    columns: dict[str, Sequence[Cell | str]] = {}
    for metric in main_metrics(group):
        columns[heading(metric)] = [
            _quality_cell(summaries.get((row, metric)), row in best[metric], tests.get((row, metric), []))
            for row in group.rows
        ]
    columns |= _extra_columns(group)

    def means(name: str, form: Callable[[float], str]) -> list[str]:
        return column([mean_of(costs[row], name) for row in group.rows], form)

    columns["bytes"] = means("judged_bytes", byte_count)
    if scale is not None and scale.bytes_row is not None:
        shares = [share_of_bytes(group, row, scale.bytes_row).mean for row in group.rows]
        columns[f"of {scale.bytes_row}"] = column(shares, percent)
    columns["best round"] = [
        " of ".join(pair)
        for pair in zip(means("best_round", "{:.0f}".format), means("rounds", "{:.0f}".format), strict=True)
    ]
    columns["seconds"] = means("seconds", duration)
    if any(run.engine for run in group.all_runs):
        engines = [sorted({run.engine for run in group.runs[row] if run.engine}) for row in group.rows]
        columns["engine"] = [", ".join(names) or NONE for names in engines]
    columns["seeds"] = [str(len(group.runs[row])) for row in group.rows]
    return Table.of_columns(group.rows, columns, f"Overview, {group.title}")


def _quality_cell(measured: Summary | None, best: bool, tests: Sequence[Comparison]) -> Cell:
    if measured is None:
        return Cell(NONE)
    spread = "" if math.isnan(measured.deviation) else f"±{measured.deviation:.4f}"
    return Cell(f"{measured.mean:.4f}", best, spread, trend(tests), hint(tests))


def _extra_columns(group: Group) -> dict[str, Sequence[Cell | str]]:
    """Columns of what few runs have: held-out users and cold rows by the main metrics, and epsilon."""
    names = dict.fromkeys(name for run in group.all_runs for name in run.extras)
    main = set(main_metrics(group))
    columns: dict[str, Sequence[Cell | str]] = {}
    for name in names:
        first, metric = name.split()[0], name.split()[-1]
        if first != "epsilon" and metric not in main:
            continue
        means = [
            summary([run.extras[name] for run in group.runs[row] if name in run.extras]).mean for row in group.rows
        ]
        short = name if first == "epsilon" else f"{first}, {heading(metric)}"
        columns[short] = column(means, "{:.3g}".format if first == "epsilon" else "{:.4f}".format)
    return columns


def overview_sentence(group: Group, tested: bool) -> str:
    """What the overview's numbers and signs are."""
    sentences = [
        "Mean ± sample standard deviation over the seeds; bytes up and down over all clients until the judged round."
    ]
    if tested:
        sentences.append(
            f"▲ better, ▼ worse than {group.reference} (the reference): below 0.05 after Holm's correction in the paired "
            "t-test over seeds or in Wilcoxon's test over users; no sign: not told apart."
        )
    return " ".join([*sentences, "The best of a column is bold and underlined."])


# The clients


def client_blocks(group: Group) -> list[Block]:
    """The clients' own averages: one table of all clients, and one for each size of students; empty without clients."""
    everyone = client_quality(group, metrics_of(group))
    if not everyone:
        return []
    shown = {row_quality.row for row_quality in everyone}
    borrowed = [row for row in group.rows if row in shown and not any("client" in run.users for run in group.runs[row])]
    missing = [row for row in group.rows if row not in shown]
    sentences = [
        "A client's metric is the mean over its users that are judged by it. Shown are the mean over the clients and the "
        f"worst client, each ± the sample standard deviation over seeds, and against {group.reference}, with the same "
        "seed and users, the mean difference and in brackets how many clients are better off, over all seeds. Best in bold."
    ]
    if borrowed:
        sentences.append(
            f"Users of {', '.join(borrowed)}, which recorded no clients, count to those that they have in other rows."
        )
    if missing:
        sentences.append(f"Without clients or metrics of single users, and left out: {', '.join(missing)}.")
    blocks: list[Block] = [Heading("All clients"), _client_table(group, everyone, "All clients")]
    blocks.append(Paragraph(" ".join(sentences)))
    for size in sizes_of(group):
        qualities = client_quality(group, metrics_of(group), size)
        if not qualities:
            continue
        others = [row for row in size.rows if any(run.student_pool != size.pool for run in group.runs[row])]
        sentence = f"Clients {_numbers(group, size)}, which have this student."
        if others:
            sentence += f" In {', '.join(others)} the clients of the same numbers have the row's own model."
        # Which size of how many, and in which keys it differs from the row's own.
        own = ", ".join(f"{key}: {as_text(value)}" for key, value in size.pool[size.number].items())
        title = f"Students {size.number + 1} of {len(size.pool)} ({own or 'the keys of the row'})"
        blocks += [Heading(title), _client_table(group, qualities, title), Paragraph(sentence)]
    gains = size_sentences(group)
    return [*blocks, Bullets(tuple(gains))] if gains else blocks


def _numbers(group: Group, size: Size) -> str:
    """The first numbers of the clients of a size."""
    count = max(
        len(run.partition["clients"]) for run in group.all_runs if run.partition and run.student_pool == size.pool
    )
    numbers = list(map(str, range(size.number, count, len(size.pool))))
    return ", ".join([*numbers[:8], *(["..."] if len(numbers) > 8 else [])])


def _client_table(group: Group, qualities: Sequence[ClientQuality], label: str) -> Table:
    places = {(row_quality.row, row_quality.metric): row_quality for row_quality in qualities}
    rows = list(dict.fromkeys(row_quality.row for row_quality in qualities))
    columns: dict[str, Sequence[Cell | str]] = {}
    for metric in sorted({row_quality.metric for row_quality in qualities}, key=metrics_of(group).index):
        own = [places.get((row, metric)) for row in rows]
        for part, name in (("mean", heading(metric)), ("worst", f"{usual_name(metric)}, worst client")):
            values: dict[str, Summary] = {
                row_quality.row: getattr(row_quality, part) for row_quality in own if row_quality
            }
            best = best_of(group, metric, {row: over_seeds.mean for row, over_seeds in values.items()})
            columns[name] = [
                Cell(mean_and_deviation(values[row]), row in best) if row in values else Cell(NONE) for row in rows
            ]
        columns[f"{usual_name(metric)}, against {group.reference}"] = [
            f"{signed(row_quality.difference)} ({row_quality.better} of {row_quality.compared})"
            if row_quality and row_quality.compared
            else NONE
            for row_quality in own
        ]
    return Table.of_columns(rows, columns, f"{label}, {group.title}")


def size_sentences(group: Group) -> list[str]:
    """Whether the students of every size gain over the reference's clients of the same numbers, per row of several sizes."""
    gains: dict[tuple[str, str], dict[int, bool]] = {}
    for size in sizes_of(group):
        for row_quality in client_quality(group, metrics_of(group), size):
            pooled = all(run.student_pool == size.pool for run in group.runs[row_quality.row])
            if pooled and row_quality.compared:
                better = (
                    row_quality.difference < 0 if lower_is_better(row_quality.metric) else row_quality.difference > 0
                )
                gains.setdefault((row_quality.row, row_quality.metric), {})[size.number + 1] = better
    sentences = []
    for row in dict.fromkeys(row for row, _ in gains):
        gains_in: dict[str, list[str]] = {}
        for metric in (metric for name, metric in gains if name == row):
            sizes = [str(number) for number, better in gains[row, metric].items() if better]
            if len(sizes) == len(gains[row, metric]):
                where = "students of every size gain"
            else:
                where = f"only students of size {', '.join(sizes)} gain" if sizes else "students of no size gain"
            gains_in.setdefault(where, []).append(usual_name(metric))
        parts = "; ".join(f"in {', '.join(names)} {where}" for where, names in gains_in.items())
        sentences.append(f"{row} against {group.reference}, means over clients and seeds: {parts}.")
    return sentences


def client_lines(group: Group) -> Iterator[dict[str, Any]]:
    """One line per size of student (none: all clients), row and metric, in full precision."""
    for size in (None, *sizes_of(group)):
        for row_quality in client_quality(group, metrics_of(group), size):
            yield {
                "size": "" if size is None else size.number + 1,
                "student": "" if size is None else as_text(size.pool[size.number]),
                "row": row_quality.row, "metric": row_quality.metric, "better": direction(row_quality.metric),
                "mean": row_quality.mean.mean, "deviation": row_quality.mean.deviation,
                "worst": row_quality.worst.mean, "worst_deviation": row_quality.worst.deviation,
                "seeds": row_quality.mean.count, "clients": row_quality.clients, "reference": group.reference,
                "difference": row_quality.difference, "better_off": row_quality.better, "compared": row_quality.compared,
            }  # fmt: skip


# The costs

_SPENT: dict[str, Callable[[Cost], float | None]] = {
    "rounds": lambda cost: cost.rounds,
    "best round": lambda cost: cost.best_round,
    "bytes in all": lambda cost: cost.total_bytes,
    "bytes until the best round": lambda cost: cost.best_bytes,
    "network seconds until the best round": lambda cost: cost.network_seconds,
    "training seconds": lambda cost: cost.seconds,
    "seconds a round": lambda cost: cost.seconds_per_round,
}
_REACHED: dict[str, Callable[[Cost], float | None]] = {
    "rounds": lambda cost: None if cost.reached is None else cost.reached.rounds,
    "seconds": lambda cost: None if cost.reached is None else cost.reached.seconds,
    "bytes": lambda cost: None if cost.reached is None else cost.reached.bytes_moved,
    "network seconds": lambda cost: None if cost.reached is None else cost.reached.network_seconds,
}


def _summaries(group: Group, value: Callable[[Cost], float | None]) -> list[Summary]:
    """Of one quantity, the summary over the seeds of each row that have it."""
    costs = costs_of(group)
    return [summary([float(x) for cost in costs[row] if (x := value(cost)) is not None]) for row in group.rows]


def cost_blocks(group: Group, named_reference: bool) -> list[Block]:
    """What the rows spent; the way to the reference's score only if the experiment names a reference."""
    spent = {name: _cost_column(name, _summaries(group, value)) for name, value in _SPENT.items()}
    blocks: list[Block] = [
        Table.of_columns(group.rows, spent, f"Cost, {group.title}"),
        Paragraph(
            "Means over seeds, seconds ± sample standard deviation. Seconds are of training alone and hold for the "
            "machine that ran it; rounds are epochs where one model is trained on all data, and the best is counted "
            "from 1. Bytes are up and down, over all clients. Network seconds are reckoned from bytes and seconds of the "
            f"rounds, for {group.network}: a round is as long as its slowest client takes. `recbole-fedkd report FOLDER "
            "--uplink=1` reckons them for another network."
        ),
    ]
    if named_reference:
        arrived = []
        for costs in costs_of(group).values():
            able = [cost for cost in costs if cost.comparable]
            arrived.append(f"{sum(cost.reached is not None for cost in able)} of {len(able)}" if able else NONE)
        way = {"seeds that got there": arrived}
        way |= {name: _cost_column(name, _summaries(group, value)) for name, value in _REACHED.items()}
        sentence = (
            f"Until the validation score was first as good as the best of {group.reference} with the same seed: "
            "means over the seeds that got there."
        )
        blocks += [Table.of_columns(group.rows, way, f"Way to the score of {group.reference}, {group.title}")]
        blocks.append(Paragraph(sentence))
    return blocks


def _cost_column(name: str, values: Iterable[Summary]) -> list[str]:
    values = list(values)
    means = [over_seeds.mean for over_seeds in values if over_seeds.count]
    if "seconds" in name:
        digits = ",.2f" if means and min(means) < 100 else ",.0f"
        return [mean_and_deviation(over_seeds, digits) if over_seeds.count else NONE for over_seeds in values]
    # Rounds are few, so that a tenth of one tells; a tenth of a byte among thousands tells nothing.
    digits = ".1f" if any(mean % 1 for mean in means) and max(means) < 1000 else ",.0f"
    return [format(over_seeds.mean, digits) if over_seeds.count else NONE for over_seeds in values]


def cost_lines(group: Group, named_reference: bool) -> Iterator[dict[str, Any]]:
    """One line per quantity and row, in full precision; ``seeds`` says how many have a value."""
    score = f"the best validation score of {group.reference}"
    quantities = _SPENT | ({f"{name} to {score}": of for name, of in _REACHED.items()} if named_reference else {})
    for name, value in quantities.items():
        for row, spent in zip(group.rows, _summaries(group, value), strict=True):
            yield {
                "row": row,
                "quantity": name,
                "mean": spent.mean,
                "deviation": spent.deviation,
                "seeds": spent.count,
            }


# Bytes against quality


def scale_fronts(group: Group) -> dict[str, set[str]]:
    """Rows on the front of bytes and quality per metric; none where the protocols differ."""
    return {
        metric: set(front_rows(bytes_and_quality(group, metric), bigger=not lower_is_better(metric)))
        if len(protocols_of(group, metric)) <= 1
        else set()
        for metric in main_metrics(group)
    }


def scale_blocks(group: Group, scale: Scale) -> list[Block]:
    """Quality, the share of the way from floor to ceiling that it closes, bytes, and their share of the unit's."""
    summaries = quality(group)
    columns: dict[str, Sequence[Cell | str]] = {}
    for metric, front in scale_fronts(group).items():
        columns[heading(metric)] = [
            Cell(f"{summaries[row, metric].mean:.4f}" if (row, metric) in summaries else NONE, row in front)
            for row in group.rows
        ]
        if scale.floor and scale.ceiling:
            closed = [share_closed(group, row, metric, scale.floor, scale.ceiling) for row in group.rows]
            columns[f"{usual_name(metric)}, closed"] = _shares(group, closed)
    moved = _summaries(group, lambda cost: cost.judged_bytes)
    columns["bytes until the best round"] = column([over_seeds.mean for over_seeds in moved], "{:,.0f}".format)
    sentences = [
        "Means over seeds; in bold the front: no other row is at least as good in this metric for fewer bytes."
    ]
    if scale.floor and scale.ceiling:
        sentences.append(
            f"Closed is (row - {scale.floor}) / ({scale.ceiling} - {scale.floor}), the share of the distance from "
            f"{scale.floor} to {scale.ceiling}, computed within each seed and then averaged; it is below 0 for a row worse "
            f"than {scale.floor} and above 100 % for one better than {scale.ceiling}."
        )
    if scale.bytes_row is not None:
        shares = [share_of_bytes(group, row, scale.bytes_row) for row in group.rows]
        columns[f"share of the bytes of {scale.bytes_row}"] = _shares(group, shares)
        sentences.append(
            f"Bytes are up and down over all clients, and their share of those of {scale.bytes_row} is computed "
            "within each seed and then averaged too."
        )
    return [Table.of_columns(group.rows, columns, f"Bytes and quality, {group.title}"), Paragraph(" ".join(sentences))]


def _shares(group: Group, summaries: Sequence[Summary]) -> list[str]:
    """Shares in per cent, with the number of seeds where it is not the row's."""
    texts = column([over_seeds.mean for over_seeds in summaries], percent)
    return [
        f"{text} (n = {over_seeds.count})" if over_seeds.count and over_seeds.count != len(group.runs[row]) else text
        for row, text, over_seeds in zip(group.rows, texts, summaries, strict=True)
    ]


def scale_lines(group: Group, scale: Scale) -> Iterator[dict[str, Any]]:
    """One line per row and metric, in full precision."""
    fronts = scale_fronts(group)
    moved = dict(zip(group.rows, _summaries(group, lambda cost: cost.judged_bytes), strict=True))
    for (row, metric), measured in quality(group).items():
        if metric in fronts:
            closed = share_closed(group, row, metric, scale.floor, scale.ceiling)
            share = share_of_bytes(group, row, scale.bytes_row)
            yield {
                "row": row, "metric": metric, "better": direction(metric), "mean": measured.mean, "seeds": measured.count,
                "closed": closed.mean, "closed_seeds": closed.count, "bytes": moved[row].mean,
                "share_of_bytes": share.mean, "share_of_bytes_seeds": share.count, "front": int(row in fronts[metric]),
            }  # fmt: skip
