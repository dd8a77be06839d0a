"""Means over seeds and paired tests between rows, on plain numbers and nothing else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from recbole_fedkd.report.records import Group, Run

LOWER_IS_BETTER = frozenset({"mae", "rmse", "nmae", "logloss"})


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric, by its lower-case name, is better."""
    return metric.split("@", maxsplit=1)[0] in LOWER_IS_BETTER


@dataclass(frozen=True)
class Summary:
    """Mean and spread of a number over seeds.

    Attributes:
        mean: nan without a value.
        deviation: sample standard deviation (divisor n - 1); nan with fewer than two values.
        count: number of values.
    """

    mean: float
    deviation: float
    count: int


def summary(values: Sequence[float]) -> Summary:
    """Summarise the values of a number, one per seed."""
    return Summary(
        mean=fmean(values) if values else math.nan,
        deviation=stdev(values) if len(values) > 1 else math.nan,
        count=len(values),
    )


def paired_t(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of the paired t-test.

    1 if all differences are 0; nan if there are fewer than two, or if they are all the same but not 0: without spread
    there is nothing to measure them by.
    """
    if len(differences) < 2:
        return math.nan
    if not differences.any():
        return 1.0
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():
        return math.nan
    return float(stats.ttest_rel(differences, np.zeros_like(differences)).pvalue)


def wilcoxon(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test, zero differences dropped as in Wilcoxon's own procedure.

    1 if all differences are 0; nan if there are fewer than two.
    """
    if len(differences) < 2:
        return math.nan
    if not differences.any():
        return 1.0
    with warnings.catch_warnings():
        # Few pairs with ties make scipy warn of its approximation; the number of pairs stands beside every p-value.
        warnings.simplefilter("ignore")
        return float(stats.wilcoxon(differences).pvalue)


TESTS: dict[str, Callable[[NDArray[np.float64]], float]] = {"paired t": paired_t, "Wilcoxon": wilcoxon}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of the p-values of one family, in their order.

    The i-th smallest of m is multiplied by m - i + 1; none may be smaller than one before it, none exceeds 1. Tests that
    could not be made are nan, stay nan and do not count.
    """
    made = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * p))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class Comparison:
    """One test of one row against the reference.

    Attributes:
        row: the row that is compared.
        reference: the row it is compared with.
        metric: lower-case name.
        unit: what is paired, ``seeds`` or ``users``.
        test: ``paired t`` or ``Wilcoxon``.
        count: number of pairs.
        difference: mean of row minus reference over the pairs; nan without a pair.
        p: two-sided; nan if the test cannot be made.
        corrected: ``p`` after Holm's correction over the rows and metrics of the group.
    """

    row: str
    reference: str
    metric: str
    unit: str
    test: str
    count: int
    difference: float
    p: float
    corrected: float = math.nan


def compare(group: Group, metrics: Sequence[str]) -> list[Comparison]:
    """Compare every row of a group with its reference, by every metric that both have under the same protocol.

    One family of Holm's correction is all rows and metrics of one kind of test: t or Wilcoxon, over seeds or users.
    """
    families: dict[tuple[str, str], list[Comparison]] = {}
    for row in group.rows:
        if row == group.reference:
            continue
        pairs = seed_pairs(group.runs[row], group.runs[group.reference])
        for metric in metrics:
            judged = [
                (mine, other)
                for mine, other in pairs
                if metric in mine.test
                and metric in other.test
                and mine.protocols.get(metric) == other.protocols.get(metric)
            ]
            if not judged:
                continue
            by_seed = np.array([mine.test[metric] - other.test[metric] for mine, other in judged])
            for unit, differences in (("seeds", by_seed), ("users", user_differences(judged, metric))):
                for name, test in TESTS.items():
                    comparison = Comparison(
                        row=row,
                        reference=group.reference,
                        metric=metric,
                        unit=unit,
                        test=name,
                        count=len(differences),
                        difference=float(differences.mean()) if len(differences) else math.nan,
                        p=test(differences),
                    )
                    families.setdefault((unit, name), []).append(comparison)
    return [
        replace(comparison, corrected=corrected)
        for family in families.values()
        for comparison, corrected in zip(family, holm([each.p for each in family]), strict=True)
    ]


def seed_pairs(runs: Sequence[Run], others: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of two rows with the same seed."""
    by_seed = {run.seed: run for run in others}
    return [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]


def user_differences(pairs: Sequence[tuple[Run, Run]], metric: str) -> NDArray[np.float64]:
    """Differences per user, ``[users]``: the mean over the seeds in which both runs judged the user.

    A seed counts only if both of its runs recorded the metric per user.
    """
    users: list[NDArray[Any]] = []
    differences: list[NDArray[np.float64]] = []
    for mine, other in pairs:
        if metric not in mine.users or metric not in other.users:
            continue
        common, left, right = np.intersect1d(
            mine.users["user"], other.users["user"], assume_unique=True, return_indices=True
        )
        difference = mine.users[metric][left].astype(np.float64) - other.users[metric][right].astype(np.float64)
        judged = np.isfinite(difference)
        users.append(common[judged])
        differences.append(difference[judged])
    if not users:
        return np.empty(0)
    distinct, index = np.unique(np.concatenate(users), return_inverse=True)
    sums = np.bincount(index, weights=np.concatenate(differences), minlength=len(distinct))
    return np.asarray(sums / np.maximum(np.bincount(index, minlength=len(distinct)), 1))


@dataclass(frozen=True)
class Cost:
    """What one run spent; None where it does not apply or is not known.

    Attributes:
        rounds: rounds (epochs) that were run.
        best_round: number of the judged round, from 0.
        total_bytes: None for a central run, as are the bytes below.
        best_bytes: up to and with the best round.
        seconds: of training.
        seconds_per_round: of training.
        reached: rounds, seconds and bytes until the validation score was as good as the best of the reference's run of
            the same seed.
        comparable: whether there is such a score to reach.
    """

    rounds: int
    best_round: int | None
    total_bytes: int | None
    best_bytes: int | None
    seconds: float
    seconds_per_round: float | None
    reached: Effort | None
    comparable: bool


@dataclass(frozen=True)
class Effort:
    """What was spent until a score was reached: rounds, seconds and bytes (None for a central run)."""

    rounds: int
    seconds: float
    bytes_moved: int | None


def cost(run: Run, reference: Run | None) -> Cost:
    """Cost of a run, and what it spent to reach the best validation score of ``reference``."""
    best_bytes = None
    if not run.central and run.best_round is not None:
        best_bytes = sum(each.bytes_moved for each in run.rounds if each.number <= run.best_round)
    comparable = (
        reference is not None
        and reference.best_valid is not None
        and reference.valid_metric == run.valid_metric
        and reference.valid_bigger == run.valid_bigger
    )
    target = reference.best_valid if reference is not None and comparable else None
    return Cost(
        rounds=len(run.rounds),
        best_round=run.best_round,
        total_bytes=None if run.central else run.total_bytes,
        best_bytes=best_bytes,
        seconds=run.training_seconds,
        seconds_per_round=run.training_seconds / len(run.rounds) if run.rounds else None,
        reached=None if target is None else effort_to_reach(run, target),
        comparable=comparable,
    )


def effort_to_reach(run: Run, target: float) -> Effort | None:
    """Spent up to and with the first round whose validation score is at least as good as ``target``; None if none is."""
    for position, score in run.valid_curve():
        if score >= target if run.valid_bigger else score <= target:
            until = run.rounds[: position + 1]
            return Effort(
                rounds=len(until),
                seconds=sum(each.seconds for each in until),
                bytes_moved=None if run.central else sum(each.bytes_moved for each in until),
            )
    return None


def costs_of(group: Group) -> Mapping[str, list[Cost]]:
    """Costs of the runs of each row, against the reference's run of the same seed."""
    references = {run.seed: run for run in group.runs[group.reference]}
    return {row: [cost(run, references.get(run.seed)) for run in group.runs[row]] for row in group.rows}


def pareto_front(points: Sequence[tuple[float, float]], bigger: bool) -> list[int]:
    """Indices of the points that no other beats in both coordinates, ordered by the first.

    Args:
        points: (cost, quality) each; less cost is better.
        bigger: whether more quality is better.
    """
    sign = -1.0 if bigger else 1.0
    front: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], sign * points[index][1])):
        if sign * points[index][1] < best:
            best = sign * points[index][1]
            front.append(index)
    return front
