"""Means over seeds and paired tests between rows, on plain numbers and nothing else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from recbole_fedkd.report.experiment import Group
from recbole_fedkd.report.records import Run

LEVEL = 0.05
"""A corrected p-value below it is called significant."""

LOWER_IS_BETTER = frozenset({"mae", "rmse", "nmae", "logloss", "giniindex", "averagepopularity"})


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
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


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
    """Holm's correction of the p-values of one family, in their order; scipy has none.

    The i-th smallest of m is multiplied by m - i + 1; none may be smaller than one before it, none exceeds 1. Tests that
    could not be made are nan, stay nan and do not count.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # nan is sorted last
    corrected = np.full(len(p), math.nan)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(order), 0, -1) * p[order]))
    return [float(value) for value in corrected]


@dataclass(frozen=True)
class Comparison:
    """One test of one row against another, the reference.

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

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below :data:`LEVEL`."""
        return self.corrected < LEVEL

    @property
    def made(self) -> bool:
        """Whether there was anything to test."""
        return not math.isnan(self.p)

    @property
    def better(self) -> bool:
        """Whether the row has more than the reference of what is good."""
        return self.difference < 0 if lower_is_better(self.metric) else self.difference > 0


DECIDING = frozenset({("seeds", "paired t"), ("users", "Wilcoxon")})
"""What is paired, and the test by which a difference is called significant."""


def significant_units(tests: Sequence[Comparison]) -> list[str]:
    """Over what, ``seeds`` or ``users``, a row and metric differ by the tests of :data:`DECIDING`; empty if over neither."""
    return [
        comparison.unit
        for comparison in tests
        if comparison.significant and (comparison.unit, comparison.test) in DECIDING
    ]


def compare(group: Group, metrics: Sequence[str], reference: str | None = None) -> list[Comparison]:
    """Compare every row of a group with one of them, by every metric that both have under the same protocol.

    One family of Holm's correction is all rows and metrics of one kind of test: t or Wilcoxon, over seeds or users.

    Args:
        group: the rows.
        metrics: lower-case names.
        reference: row to compare with; the group's own if None.
    """
    reference = group.reference if reference is None else reference
    families: dict[tuple[str, str], list[Comparison]] = {}
    for row in group.rows:
        if row == reference:
            continue
        pairs = seed_pairs(group.runs[row], group.runs[reference])
        for metric in metrics:
            judged = [
                (mine, other)
                for mine, other in pairs
                if metric in mine.test and metric in other.test and mine.protocol(metric) == other.protocol(metric)
            ]
            if not judged:
                continue
            by_seed = np.array([mine.test[metric] - other.test[metric] for mine, other in judged])
            for unit, differences in (("seeds", by_seed), ("users", user_differences(judged, metric))):
                for name, test in TESTS.items():
                    mean = float(differences.mean()) if len(differences) else math.nan
                    comparison = Comparison(
                        row, reference, metric, unit, name, len(differences), mean, test(differences)
                    )
                    families.setdefault((unit, name), []).append(comparison)
    return [
        replace(comparison, corrected=corrected)
        for family in families.values()
        for comparison, corrected in zip(family, holm([comparison.p for comparison in family]), strict=True)
    ]


def seed_pairs(runs: Sequence[Run], others: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of two rows with the same seed."""
    by_seed = {run.seed: run for run in others}
    return [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]


def paired_users(mine: Run, other: Run, metric: str) -> pd.Series:
    """Mine minus other for each user whom both runs judged, by user id; empty where one did not record the metric."""
    if metric not in mine.users or metric not in other.users:
        return pd.Series(dtype=np.float64)
    return (mine.users[metric] - other.users[metric]).dropna()


def user_differences(pairs: Sequence[tuple[Run, Run]], metric: str) -> NDArray[np.float64]:
    """Differences per user, ``[users]``: the mean over the seeds in which both runs judged the user.

    A seed counts only if both of its runs recorded the metric per user.
    """
    differences = pd.concat([paired_users(mine, other, metric) for mine, other in pairs])
    return np.asarray(differences.groupby(level=0).mean(), dtype=np.float64)
