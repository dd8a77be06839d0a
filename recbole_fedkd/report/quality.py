"""How good the rows are: means over seeds, how each number came about, and tests against the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recbole_fedkd.report.contents import (
    NONE,
    USUAL_NAMES,
    Block,
    Bullets,
    Cell,
    Paragraph,
    Table,
    column,
    heading,
    mean_and_deviation,
    probability,
    signed,
    usual_name,
)
from recbole_fedkd.report.experiment import Group, Published
from recbole_fedkd.report.records import as_text, comparable_protocol, parted_protocol
from recbole_fedkd.report.statistics import (
    Comparison,
    Summary,
    lower_is_better,
    significant_units,
    summary,
)


def metrics_of(group: Group) -> list[str]:
    """Test metrics that any run of the group has, in the order of the tables; unusual ones last, in that of the runs."""
    names = dict.fromkeys(metric for run in group.all_runs for metric in run.test)
    order = list(USUAL_NAMES)

    def order_of(metric: str) -> tuple[int, int]:
        stem, _, cut = metric.partition("@")
        return order.index(stem) if stem in order else len(order), int(cut) if cut.isdecimal() else 0

    return sorted(names, key=order_of)


def main_metrics(group: Group) -> list[str]:
    """The metrics that are set against bytes: accuracy, MAE, what chose the models, and the usual ranking metric."""
    available = metrics_of(group)
    ranking = [metric for metric in available if metric.startswith(("labelledndcg@", "ndcg@"))]
    wanted = {"accuracy", "mae", *(run.valid_metric for run in group.all_runs), *ranking[:1]}
    return [metric for metric in available if metric in wanted] or available[:3]


def quality(group: Group) -> dict[tuple[str, str], Summary]:
    """Summary over seeds per row and metric; pairs without a value are absent."""
    values = {
        (row, metric): [run.test[metric] for run in group.runs[row] if metric in run.test]
        for row in group.rows
        for metric in metrics_of(group)
    }
    return {cell: summary(numbers) for cell, numbers in values.items() if numbers}


def best_of(group: Group, metric: str, means: Mapping[str, float]) -> set[str]:
    """The rows with the best of some means, as printed; none where a single row has one or the protocols differ."""
    if len(means) < 2 or len(protocols_of(group, metric)) > 1:
        return set()
    printed = {row: round(mean, 4) for row, mean in means.items()}
    wanted = (min if lower_is_better(metric) else max)(printed.values())
    return {row for row, mean in printed.items() if mean == wanted}


def best_rows(group: Group) -> dict[str, set[str]]:
    """Per metric the rows with the best mean as printed; none where a single row has it or the protocols differ."""
    summaries = quality(group)
    return {
        metric: best_of(
            group, metric, {row: summaries[row, metric].mean for row in group.rows if (row, metric) in summaries}
        )
        for metric in metrics_of(group)
    }


def protocols_of(group: Group, metric: str) -> dict[str, list[str]]:
    """Each protocol by which a metric came about in the group, with its rows.

    What a protocol says in brackets at its end was counted on one split, and may differ between seeds: the first to the last
    of the counts are told.
    """
    rows_of: dict[str, list[str]] = {}
    sentences: dict[str, str] = {}
    counted: dict[str, list[str]] = {}
    for run in group.all_runs:
        if metric in run.test:
            whole = run.protocols.get(metric, "protocol not recorded")
            key, (sentence, counts) = comparable_protocol(whole), parted_protocol(whole)
            sentences[key] = max(sentences.get(key, ""), sentence, key=len)
            if run.row not in rows_of.setdefault(key, []):
                rows_of[key].append(run.row)
            if counts and counts not in counted.setdefault(key, []):
                counted[key].append(counts)
    return {" ".join([sentences[key], *_merged_counts(counted.get(key, []))]): rows for key, rows in rows_of.items()}


def _merged_counts(texts: Sequence[str]) -> list[str]:
    """One text for several that differ in their numbers alone, with each number's range; else all of them."""
    if len({re.sub(r"\d+", "#", text) for text in texts}) != 1:
        return list(texts)
    numbers = zip(*([int(number) for number in re.findall(r"\d+", text)] for text in texts), strict=True)
    ranges = iter(["{} to {}".format(*ends) if (ends := (min(those), max(those)))[0] < ends[1] else str(ends[0])
                   for those in numbers])  # fmt: skip
    return [re.sub(r"\d+", lambda _: next(ranges), texts[0])]


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
            listing = "; ".join(
                f"{text} ({'all other rows' if text in crowd else ', '.join(rows)})" for text, rows in protocols.items()
            )
            differing.append(
                f"{usual_name(metric)}: the protocol differs between rows, so that they do not compare: {listing}."
            )
    return [f"{', '.join(names)}: {text}." for text, names in shared.items()] + differing


def quality_table(group: Group, comparisons: Sequence[Comparison] = ()) -> Table:
    """The quality of each row by every metric; it holds no times, so that it does not depend on the machine."""
    summaries, best, tests = quality(group), best_rows(group), by_row_and_metric(comparisons)
    columns: dict[str, Sequence[Cell | str]] = {}
    for metric in metrics_of(group):
        cells = columns[heading(metric)] = []
        for row in group.rows:
            mine = summaries.get((row, metric))
            text = NONE if mine is None else mean_and_deviation(mine)
            if mine is not None and mine.count != len(group.runs[row]):
                text += f" (n = {mine.count})"
            of_cell = tests.get((row, metric), ())
            cells.append(Cell(text, row in best[metric], trend=trend(of_cell), hint=hint(of_cell)))
    columns["seeds"] = [str(len(group.runs[row])) for row in group.rows]
    return Table.of_columns(group.rows, columns, f"Quality, {group.title}")


def quality_blocks(group: Group, published: Published | None, comparisons: Sequence[Comparison] = ()) -> list[Block]:
    """The quality table, what its numbers are, and what was published."""
    seeds = ", ".join(map(str, sorted({run.seed for run in group.all_runs})))
    sentence = (
        f"Mean ± sample standard deviation over the seeds ({seeds}); a row has as many as its column “seeds” says. "
        "Best mean in bold."
    )
    blocks: list[Block] = [
        quality_table(group, comparisons),
        Paragraph(sentence),
        Bullets(tuple(protocol_sentences(group))),
    ]
    table = published_table(group, published) if published else None
    if published and table:
        source = f" ({published.source})" if published.source else ""
        blocks += [Paragraph(f"Published{source} and measured:"), table]
    return blocks


def published_table(group: Group, published: Published) -> Table | None:
    """Published values beside measured ones, for the rows that have both; None if the group has none of them."""
    rows = [row for row in group.rows if row in published.rows]
    if not rows or any(group.settings.get(key) != value for key, value in published.settings.items()):
        return None
    summaries = quality(group)
    columns: dict[str, Sequence[Cell | str]] = {}
    for name in dict.fromkeys(str(name) for row in rows for name in published.rows[row]):
        columns[f"{name}, published"] = column([published.rows[row].get(name) for row in rows], as_text)
        ours = published.metrics.get(name, name.lower())
        if ours in metrics_of(group):
            measured = [summaries.get((row, ours)) for row in rows]
            columns[f"{usual_name(ours)}, measured"] = column(measured, mean_and_deviation)
    return Table.of_columns(rows, columns, f"Published and measured, {group.title}")


def trend(tests: Sequence[Comparison]) -> str:
    """``better`` or ``worse`` than the reference where a test tells the rows apart; else empty."""
    units = significant_units(tests)
    decided = next((comparison for comparison in tests if comparison.unit in units), None)
    return "" if decided is None else "better" if decided.better else "worse"


def hint(tests: Sequence[Comparison]) -> str:
    """The difference from the reference, and whether a test shows it; empty without a test."""
    if not tests:
        return ""
    units = " and over ".join(significant_units(tests))
    verdict = f"significant over {units}" if units else "not significant"
    return f"{signed(tests[0].difference)} against {tests[0].reference}, {verdict}"


def by_row_and_metric(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    """The comparisons of each row and metric."""
    placed: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        placed.setdefault((comparison.row, comparison.metric), []).append(comparison)
    return placed


def significance_table(comparisons: Sequence[Comparison]) -> Table:
    """Every test: per row, metric and unit the difference, the number of pairs and both tests' p-values."""
    rows = []
    for (row, metric), tests in by_row_and_metric(comparisons).items():
        for unit in ("seeds", "users"):
            t, w = (next(comparison for comparison in tests if (comparison.unit, comparison.test) == (unit, name))
                    for name in ("paired t", "Wilcoxon"))  # fmt: skip
            numbers = [t.p, t.corrected, w.p, w.corrected]
            cells = [row, usual_name(metric), unit, str(t.count), signed(t.difference), *map(probability, numbers)]
            rows.append(tuple(map(Cell, cells)))
    header = ("row", "metric", "pairs", "number", "difference", "t: p", "t: p corrected", "Wilcoxon: p",
              "Wilcoxon: p corrected")  # fmt: skip
    return Table(header, tuple(rows), "Every test")


def significance_sentences(group: Group, comparisons: Sequence[Comparison], named_reference: bool) -> list[str]:
    """What the comparisons are, and what so few seeds cannot tell."""
    chosen = "the reference row" if named_reference else "the first row, as the experiment names no reference"
    sentences = [
        f"Differences from {group.reference} ({chosen}), paired over equal seeds and over users (each user's values "
        "averaged over the seeds in which both rows judged that user). p-values are two-sided and corrected after Holm "
        "over all rows and metrics of this group, for each kind of test by itself."
    ]
    few = sorted(
        {comparison.count for comparison in comparisons if comparison.unit == "seeds" and 2 <= comparison.count < 6}
    )
    sentences += [
        f"With {count} seeds the smallest two-sided Wilcoxon p over seeds is {2.0 ** (1 - count):g}, so this test "
        "cannot fall below 0.05, whatever the difference."
        for count in few
    ]
    if any(comparison.unit == "seeds" and comparison.count < 2 for comparison in comparisons):
        sentences.append("Rows that share a single seed with the reference cannot be tested over seeds (n/a).")
    if any(comparison.unit == "users" and comparison.count == 0 for comparison in comparisons):
        sentences.append("Metrics that were not recorded per user cannot be tested over users (n/a).")
    return sentences


def quality_lines(group: Group) -> Iterator[dict[str, Any]]:
    """One line per row and metric, in full precision."""
    best = best_rows(group)
    for (row, metric), measured in quality(group).items():
        texts = [text for text, rows in protocols_of(group, metric).items() if row in rows]
        yield {
            "row": row, "metric": metric, "better": direction(metric), "mean": measured.mean, "deviation": measured.deviation,
            "seeds": measured.count, "best": int(row in best[metric]), "protocol": "; ".join(texts),
        }  # fmt: skip


def significance_lines(comparisons: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    """One line per test, in full precision."""
    for comparison in comparisons:
        yield {
            "row": comparison.row, "reference": comparison.reference, "metric": comparison.metric,
            "pairs": comparison.unit, "test": comparison.test, "n": comparison.count,
            "difference": comparison.difference, "p": comparison.p, "p_corrected": comparison.corrected,
        }  # fmt: skip


def direction(metric: str) -> str:
    """``lower`` or ``higher``: what is better of a metric."""
    return "lower" if lower_is_better(metric) else "higher"
