"""The verdict in words: who is best, significantly or not, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence

from recbole_fedkd.report.contents import (
    byte_count,
    counted,
    duration,
    listed,
    mean_and_deviation,
    named,
    percent,
    usual_name,
)
from recbole_fedkd.report.experiment import Group, Scale
from recbole_fedkd.report.measures import bytes_and_quality, costs_of, front_rows, mean_of, share_closed
from recbole_fedkd.report.quality import best_of, by_row_and_metric, main_metrics, protocols_of, quality, trend
from recbole_fedkd.report.statistics import Comparison, compare, lower_is_better, significant_units


def verdict_metric(group: Group) -> str | None:
    """The metric that decides: the one that chose the models, else the first main one; None without a test result."""
    chosen = [run.valid_metric for run in group.all_runs]
    usual = sorted(dict.fromkeys(chosen), key=lambda metric: -chosen.count(metric))
    main = main_metrics(group)
    return next((metric for metric in [*usual, *main] if metric in main), None)


def verdict(group: Group, comparisons: Sequence[Comparison], scale: Scale | None) -> tuple[str, ...]:
    """Sentences on a group, the most telling first; ``comparisons`` are those with the group's reference."""
    metric = verdict_metric(group)
    if metric is None:
        return ("No run has a test result, so there is nothing to judge.",)
    means = {row: measured.mean for (row, other), measured in quality(group).items() if other == metric}
    name = usual_name(metric)
    if len(means) == 1:
        (row,) = means
        return (
            f"{named(row)} has {name} {_value(group, row, metric)}; there is no other row to compare it with.",
            _cost(group, row),
        )
    if len(protocols_of(group, metric)) > 1:
        return (f"The rows were judged by different protocols in {name}, so that none can be called the best.",)
    order = sorted(means, key=lambda row: means[row] if lower_is_better(metric) else -means[row])
    best, ties = order[0], [row for row in order if row in best_of(group, metric, means)]
    tests = _tests(group, comparisons, metric, best)
    shared = f" (as printed it shares this place with {listed(ties[1:])})" if len(ties) > 1 else ""
    sentences = [
        f"{named(best)} is best in {name}: {_value(group, best, metric)}{shared}, {_against_others(tests, order[1:], metric)}.",
        _cost(group, best),
    ]
    places = bytes_and_quality(group, metric)
    sending = [row for row in order if places[row][0]]
    top = next(iter(sending), None)
    if top is not None and top != best:
        sentences.append(
            f"Of the rows that send something, {named(top)} is best: {_value(group, top, metric)}, "
            f"{_against(tests.get((top, metric), []), best)}. {_cost(group, top)}"
        )
    sentences += _cheaper(group, comparisons, metric, top, order)
    if scale is not None and scale.floor and scale.ceiling and top is not None:
        closed = share_closed(group, top, metric, scale.floor, scale.ceiling)
        if closed.count:
            sentences.append(
                f"{named(top)} closes {percent(closed.mean)} of the distance from {named(scale.floor)} to "
                f"{named(scale.ceiling)}."
            )
    trends = [trend(measured) for (_, other), measured in by_row_and_metric(comparisons).items() if other == metric]
    if trends and group.reference != best:
        sentences.append(
            f"Against the reference, {named(group.reference)}, of {counted(len(trends), 'row')} {trends.count('better')} are "
            f"significantly better and {trends.count('worse')} significantly worse in {name}."
        )
    return tuple(sentences)


def _tests(
    group: Group, comparisons: Sequence[Comparison], metric: str, row: str
) -> dict[tuple[str, str], list[Comparison]]:
    """Of every other row against one, as the table tells what it is to the reference: it corrects for all its metrics."""
    of_table = by_row_and_metric(comparisons)
    if row == group.reference:
        return of_table
    tests = by_row_and_metric(compare(group, [metric], row))
    if (row, metric) in of_table and group.reference is not None:
        tests[group.reference, metric] = of_table[row, metric]
    return tests


def _value(group: Group, row: str, metric: str) -> str:
    measured = quality(group)[row, metric]
    return f"{mean_and_deviation(measured)} over {counted(measured.count, 'seed')}"


def _cost(group: Group, row: str) -> str:
    """What a row spent, in one sentence."""
    costs = costs_of(group)[row]
    moved, rounds, best, seconds = (
        mean_of(costs, name) for name in ("judged_bytes", "rounds", "best_round", "seconds")
    )
    sent = f"sent {byte_count(moved)}" if moved else "sent nothing"
    if moved is None:
        sent = "trained one model on all data, without a network"
    until = f"in {rounds:.0f}" if best is None else f"judged after {best:.0f} of {rounds:.0f}"
    word = "epochs" if moved is None else "rounds"
    return f"{named(row)} {sent}, {until} {word}, and trained for {duration(seconds or 0.0)}."


def _against_others(tests: dict[tuple[str, str], list[Comparison]], others: Sequence[str], metric: str) -> str:
    """From which rows the best one is told apart."""
    tested = [row for row in others if any(test.made for test in tests.get((row, metric), []))]
    if not tested:
        return (
            "but nothing can be tested: single seeds, or rows without a seed in common, and no metrics of single users"
        )
    apart = [row for row in tested if significant_units(tests[row, metric])]
    alike = [row for row in tested if row not in apart]
    units = {unit for row in apart for unit in significant_units(tests[row, metric])}
    over = f" (over {' or over '.join(sorted(units))})"
    if not alike:
        return f"significantly better than every other row{over}"
    if not apart:
        return "not significantly better than any other row"
    return (
        f"significantly better than {len(apart)} of {counted(len(tested), 'other row')}{over}, "
        f"but not told apart from {listed(alike)}"
    )


def _against(tests: Sequence[Comparison], best: str) -> str:
    units = significant_units(tests)
    if units:
        return f"significantly worse than {named(best)} (over {' and over '.join(units)})"
    return (
        f"not told apart from {named(best)}"
        if any(test.made for test in tests)
        else f"not tested against {named(best)}"
    )


def _cheaper(
    group: Group, comparisons: Sequence[Comparison], metric: str, top: str | None, order: Sequence[str]
) -> list[str]:
    """The row with the fewest bytes that no test tells from the best one of those that send something."""
    if top is None:
        return []
    places = bytes_and_quality(group, metric)
    front = front_rows({row: places[row] for row in order if places[row][0]}, not lower_is_better(metric))
    tests = _tests(group, comparisons, metric, top)
    for row in front[: front.index(top)] if top in front else []:
        compared = tests.get((row, metric), [])
        if any(test.made for test in compared) and not significant_units(compared):
            share = percent((places[row][0] or 0.0) / (places[top][0] or 1.0))
            return [
                f"No test tells it from {named(row)}, which sends {share} of its bytes: {_value(group, row, metric)}."
            ]
    return []
