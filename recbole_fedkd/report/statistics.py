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
                if metric in mine.test and metric in other.test and mine.protocol(metric) == other.protocol(metric)
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
        left, difference = _paired_users(mine, other, metric)
        users.append(mine.users["user"][left])
        differences.append(difference)
    if not users:
        return np.empty(0)
    distinct, index = np.unique(np.concatenate(users), return_inverse=True)
    sums = np.bincount(index, weights=np.concatenate(differences), minlength=len(distinct))
    return np.asarray(sums / np.maximum(np.bincount(index, minlength=len(distinct)), 1))


def _paired_users(mine: Run, other: Run, metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Users whom both runs judged, as places ``[n]`` in ``mine.users``, and mine minus other ``[n]``."""
    _, left, right = np.intersect1d(mine.users["user"], other.users["user"], assume_unique=True, return_indices=True)
    difference = mine.users[metric][left].astype(np.float64) - other.users[metric][right].astype(np.float64)
    judged = np.isfinite(difference)
    return left[judged], difference[judged]


def clients_of(run: Run, group: Group) -> NDArray[np.int64] | None:
    """Client of each user of a run, ``[n]`` in the order of ``run.users``; -1 where it is not known.

    A run that recorded no clients takes those of another run of its group and seed, the reference's first; a run of a
    federation only those of a run over the same partition.

    Returns:
        None if no such run recorded them either.
    """
    if "client" in run.users:
        return run.users["client"]
    if not run.users:
        return None
    rows = (group.reference, *(row for row in group.rows if row != group.reference))
    for other in (other for row in rows for other in group.runs[row] if other.seed == run.seed):
        if "client" in other.users and (run.central or run.partition == other.partition):
            _, left, right = np.intersect1d(
                run.users["user"], other.users["user"], assume_unique=True, return_indices=True
            )
            clients = np.full(len(run.users["user"]), -1, dtype=np.int64)
            clients[left] = other.users["client"][right]
            return clients
    return None


def client_means(
    clients: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Each client's mean over its users.

    Args:
        clients: client of each user ``[n]``, negative where there is none.
        values: a metric of each user ``[n]``, nan where the user is not judged.

    Returns:
        Numbers of the clients with a judged user ``[m]``, ascending, and their means ``[m]``.
    """
    counted = np.isfinite(values) & (clients >= 0)
    numbers, index = np.unique(clients[counted], return_inverse=True)
    return numbers, np.bincount(index, weights=values[counted].astype(np.float64)) / np.bincount(index)


@dataclass(frozen=True)
class Size:
    """A size of student in a group.

    Attributes:
        pool: the sizes that were dealt out to the clients in turn.
        place: which of them; client ``k`` has it where ``k % len(pool) == place``.
        rows: rows whose clients of these numbers stand beside each other: those with this pool, and over the same
            partition those without any, and the reference.
    """

    pool: tuple[Mapping[str, Any], ...]
    place: int
    rows: tuple[str, ...]

    def has(self, clients: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which clients, of numbers ``[n]``, have this size; ``[n]``."""
        mask: NDArray[np.bool_] = (clients >= 0) & (clients % len(self.pool) == self.place)
        return mask


def sizes_of(group: Group) -> list[Size]:
    """The sizes of every ``student_pool`` in the group; none where all students are of one size."""
    sizes = []
    pools = [run.student_pool for run in group.all_runs if len(run.student_pool) > 1]
    for number, pool in enumerate(pools):
        if pool in pools[:number]:
            continue
        partitions = {run.seed: run.partition for run in group.all_runs if run.student_pool == pool}

        def stands_beside(run: Run, pool: Any = pool, partitions: Mapping[int, Any] = partitions) -> bool:
            if run.student_pool and run.row != group.reference:
                return bool(run.student_pool == pool)
            return run.central or partitions.get(run.seed, run.partition) == run.partition

        rows = tuple(row for row in group.rows if all(map(stands_beside, group.runs[row])))
        sizes += [Size(pool, place, rows) for place in range(len(pool))]
    return sizes


@dataclass(frozen=True)
class ClientQuality:
    """One metric of one row, as its clients have it.

    Attributes:
        row: the row.
        metric: lower-case name.
        mean: over seeds, of the mean over clients.
        worst: over seeds, of the worst client.
        clients: number of clients with a value, over all seeds.
        difference: mean over seeds of the mean over clients of row minus reference; nan where there is nothing to compare.
        better: number of clients that are better off than under the reference with the same seed, over all seeds.
        compared: number of clients for which that can be said.
    """

    row: str
    metric: str
    mean: Summary
    worst: Summary
    clients: int
    difference: float
    better: int
    compared: int


def client_quality(group: Group, metrics: Sequence[str], size: Size | None = None) -> list[ClientQuality]:
    """Every row's metrics averaged within each client, and compared with the same users' under the reference.

    A client's metric is the mean over its users that are judged by it; compared are the means over the users whom both
    runs judged, by the same protocol. Rows and metrics without a value are left out.

    Args:
        group: the rows, and the reference.
        metrics: lower-case names.
        size: only these clients and rows; None for all.
    """
    found = []
    references = {run.seed: run for run in group.runs[group.reference]}
    for row in group.rows if size is None else size.rows:
        placed = [(run, clients) for run in group.runs[row] if (clients := clients_of(run, group)) is not None]
        if size is not None:
            placed = [(run, np.where(size.has(clients), clients, -1)) for run, clients in placed]
        for metric in metrics:
            of_clients, differences = [], []
            for run, clients in placed:
                if metric not in run.users or metric not in run.test:
                    continue
                values = client_means(clients, run.users[metric])[1]
                if not len(values):
                    continue
                of_clients.append(values)
                other = references.get(run.seed)
                if row == group.reference or other is None or metric not in other.users:
                    continue
                if run.protocol(metric) == other.protocol(metric):
                    left, difference = _paired_users(run, other, metric)
                    differences.append(client_means(clients[left], difference)[1])
            if not of_clients:
                continue
            worst = max if lower_is_better(metric) else min
            compared = [each for each in differences if len(each)]
            gained = [-each if lower_is_better(metric) else each for each in compared]
            found.append(
                ClientQuality(
                    row=row,
                    metric=metric,
                    mean=summary([float(values.mean()) for values in of_clients]),
                    worst=summary([float(worst(values)) for values in of_clients]),
                    clients=sum(len(values) for values in of_clients),
                    difference=summary([float(each.mean()) for each in compared]).mean,
                    better=sum(int((each > 0).sum()) for each in gained),
                    compared=sum(len(each) for each in compared),
                )
            )
    return found


@dataclass(frozen=True)
class Cost:
    """What one run spent; None where it does not apply or is not known.

    Attributes:
        rounds: rounds (epochs) that were run.
        best_round: number of the judged round, from 1.
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

    @property
    def judged_bytes(self) -> int | None:
        """Bytes until the judged round, which is the last one where none is known to be the best."""
        return self.total_bytes if self.best_bytes is None else self.best_bytes


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


def bytes_and_quality(group: Group, metric: str) -> dict[str, tuple[float | None, float]]:
    """Means over seeds of each row that has the metric: bytes until the judged round, and the test metric.

    Bytes are None for rows without a network.
    """
    places: dict[str, tuple[float | None, float]] = {}
    costs = costs_of(group)
    for row in group.rows:
        scores = [run.test[metric] for run in group.runs[row] if metric in run.test]
        moved = [float(each.judged_bytes) for each in costs[row] if each.judged_bytes is not None]
        if scores:
            places[row] = (summary(moved).mean if moved else None, summary(scores).mean)
    return places


def front_rows(places: Mapping[str, tuple[float | None, float]], bigger: bool) -> list[str]:
    """The rows with a network for which no other is at least as good for fewer bytes, or better for as many.

    Args:
        places: bytes and quality of each row.
        bigger: whether more quality is better.

    Returns:
        Rows, fewest bytes first; rows that share a place on the front all stand in it.
    """
    sending = {row: (moved, quality) for row, (moved, quality) in places.items() if moved is not None}
    points = list(sending.values())
    front = [points[index] for index in pareto_front(points, bigger)]
    return [row for point in front for row, place in sending.items() if place == point]


def share_closed(group: Group, row: str, metric: str, floor: str | None, ceiling: str | None) -> Summary:
    """Share of the distance from floor to ceiling that a row closes, ``(row - floor) / (ceiling - floor)``, over seeds.

    Each seed counts by itself in which all three have the metric by the same protocol, and floor and ceiling differ.
    """
    floors = {run.seed: run for run in group.runs.get(str(floor), ())}
    ceilings = {run.seed: run for run in group.runs.get(str(ceiling), ())}
    shares = []
    for run in group.runs[row]:
        three = [run, floors.get(run.seed), ceilings.get(run.seed)]
        judged = [each for each in three if each is not None and metric in each.test]
        if len(judged) < 3 or len({each.protocol(metric) for each in judged}) > 1:
            continue
        own, bottom, top = (each.test[metric] for each in judged)
        if top != bottom:
            shares.append((own - bottom) / (top - bottom))
    return summary(shares)


def share_of_bytes(group: Group, row: str, unit: str | None) -> Summary:
    """A row's bytes until the judged round as a share of those of the row ``unit``, over the seeds that both have.

    Seeds in which one of them has no network, or the unit sends nothing, do not count.
    """
    costs = costs_of(group)
    units = dict(zip([run.seed for run in group.runs.get(str(unit), ())], costs.get(str(unit), ()), strict=True))
    shares = []
    for run, spent in zip(group.runs[row], costs[row], strict=True):
        whole = units[run.seed].judged_bytes if run.seed in units else None
        if spent.judged_bytes is not None and whole:
            shares.append(spent.judged_bytes / whole)
    return summary(shares)
