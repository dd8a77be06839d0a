"""What the rows of a group have beside the means of their metrics: their clients, costs, and place among bytes and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from recbole_fedkd.network import USUAL, Network, dealt_as_recorded
from recbole_fedkd.report.experiment import Group
from recbole_fedkd.report.records import Run
from recbole_fedkd.report.statistics import Summary, lower_is_better, paired_users, seed_pairs, summary


def clients_of(run: Run, group: Group) -> pd.Series | None:
    """Client of each user of a run, by user id; nan where it is not known.

    A run that recorded no clients takes those of another run of its group and seed, the reference's first; a run of a
    federation only those of a run over the same partition.

    Returns:
        None if no such run recorded them either.
    """
    if "client" in run.users:
        return run.users["client"]
    if run.users.empty:
        return None
    rows = (group.reference, *(row for row in group.rows if row != group.reference))
    for other in (other for row in rows for other in group.runs[row] if other.seed == run.seed):
        if "client" in other.users and (run.central or run.partition == other.partition):
            return other.users["client"].reindex(run.users.index)
    return None


@dataclass(frozen=True)
class Size:
    """A size of student in a group.

    Attributes:
        pool: the sizes that were dealt out to the clients in turn.
        number: which of them, from 0; client ``k`` has it where ``k % len(pool) == number``.
        rows: rows whose clients of these numbers stand beside each other: those with this pool, and over the same
            partition those without any, and the reference.
    """

    pool: tuple[Mapping[str, Any], ...]
    number: int
    rows: tuple[str, ...]


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
        sizes += [Size(pool, number, rows) for number in range(len(pool))]
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
    qualities = []
    references = {run.seed: run for run in group.runs[group.reference]}
    for row in group.rows if size is None else size.rows:
        placed = [(run, clients) for run in group.runs[row] if (clients := clients_of(run, group)) is not None]
        if size is not None:
            placed = [(run, clients[clients % len(size.pool) == size.number]) for run, clients in placed]
        for metric in metrics:
            of_clients, gains = [], []
            sign = -1.0 if lower_is_better(metric) else 1.0
            for run, clients in placed:
                if metric not in run.users or metric not in run.test:
                    continue
                values = client_means(clients, run.users[metric])
                if values.empty:
                    continue
                of_clients.append(sign * values)
                other = references.get(run.seed)
                if row != group.reference and other is not None and run.protocol(metric) == other.protocol(metric):
                    gains.append(sign * client_means(clients, paired_users(run, other, metric)))
            gains = [run_gains for run_gains in gains if len(run_gains)]
            if of_clients:
                qualities.append(
                    ClientQuality(
                        row=row,
                        metric=metric,
                        mean=summary([float(sign * values.mean()) for values in of_clients]),
                        worst=summary([float(sign * values.min()) for values in of_clients]),
                        clients=sum(map(len, of_clients)),
                        difference=summary([float(sign * run_gains.mean()) for run_gains in gains]).mean,
                        better=sum(int((run_gains > 0).sum()) for run_gains in gains),
                        compared=sum(map(len, gains)),
                    )
                )
    return qualities


def client_means(clients: pd.Series, values: pd.Series) -> pd.Series:
    """Each client's mean over its users, by client; users of no client, and values that are nan, do not count.

    Args:
        clients: client of each user, by user id.
        values: a metric of each user, by user id, nan where the user is not judged.
    """
    return values.dropna().groupby(clients).mean()


@dataclass(frozen=True)
class Effort:
    """What was spent until a score was reached: rounds, seconds; bytes and seconds on a network, None for a central run."""

    rounds: int
    seconds: float
    bytes_moved: int | None
    network_seconds: float | None


@dataclass(frozen=True)
class Cost:
    """What one run spent; None where it does not apply or is not known.

    Attributes:
        rounds: rounds (epochs) that were run.
        best_round: number of the judged round, from 1.
        total_bytes: None for a central run, as are the bytes below.
        best_bytes: up to and with the best round.
        network_seconds: on a network, up to and with the best round.
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
    network_seconds: float | None
    seconds: float
    seconds_per_round: float | None
    reached: Effort | None
    comparable: bool

    @property
    def judged_bytes(self) -> int | None:
        """Bytes until the judged round, which is the last one where none is known to be the best."""
        return self.total_bytes if self.best_bytes is None else self.best_bytes


def cost(run: Run, reference: Run | None, network: Network = USUAL) -> Cost:
    """Cost of a run, and what it spent to reach the best validation score of ``reference``, also on a network."""
    best_bytes, best_seconds = None, None
    lengths = lengths_of_rounds(run, network)
    if not run.central and run.best_round is not None:
        until = [record.number <= run.best_round for record in run.rounds]
        best_bytes = sum(record.bytes_moved for record, counts in zip(run.rounds, until, strict=True) if counts)
        best_seconds = sum(lengths[: sum(until)]) if lengths else None
    target = None
    if reference is not None and (reference.valid_metric, reference.valid_bigger) == (
        run.valid_metric,
        run.valid_bigger,
    ):
        target = reference.best_valid
    return Cost(
        rounds=len(run.rounds),
        best_round=run.best_round,
        total_bytes=None if run.central else run.total_bytes,
        best_bytes=best_bytes,
        network_seconds=best_seconds,
        seconds=run.training_seconds,
        seconds_per_round=run.training_seconds / len(run.rounds) if run.rounds else None,
        reached=None if target is None else effort_to_reach(run, target, lengths),
        comparable=target is not None,
    )


def lengths_of_rounds(run: Run, network: Network) -> list[float]:
    """Seconds that each round of a run would take on a network; empty where there are no clients."""
    spent = [(record.bytes_down, record.bytes_up, record.seconds) for record in run.rounds]
    chosen = run.config.get("clients_per_round")
    dealt = [] if run.central else dealt_as_recorded(spent, run.partition, chosen, run.engine)
    return [network.seconds(spending[0], spending[1], spending[2], number) for number, spending in enumerate(dealt)]


def effort_to_reach(run: Run, target: float, lengths: Sequence[float] = ()) -> Effort | None:
    """Spent up to and with the first round whose validation score is at least as good as ``target``; None if none is.

    Args:
        run: the run.
        target: the score.
        lengths: seconds of its rounds on a network; empty: unknown.
    """
    for position, score in run.valid_curve():
        if score >= target if run.valid_bigger else score <= target:
            until = run.rounds[: position + 1]
            return Effort(
                rounds=len(until),
                seconds=sum(record.seconds for record in until),
                bytes_moved=None if run.central else sum(record.bytes_moved for record in until),
                network_seconds=sum(lengths[: len(until)]) if lengths else None,
            )
    return None


def costs_of(group: Group) -> Mapping[str, list[Cost]]:
    """Costs of the runs of each row, against the reference's run of the same seed."""
    references = {run.seed: run for run in group.runs[group.reference]}
    return {row: [cost(run, references.get(run.seed), group.network) for run in group.runs[row]] for row in group.rows}


def bytes_and_quality(group: Group, metric: str) -> dict[str, tuple[float | None, float]]:
    """Means over seeds of each row that has the metric: bytes until the judged round, and the test metric.

    Bytes are None for rows without a network.
    """
    places: dict[str, tuple[float | None, float]] = {}
    for row, costs in costs_of(group).items():
        scores = [run.test[metric] for run in group.runs[row] if metric in run.test]
        moved = [float(run_cost.judged_bytes) for run_cost in costs if run_cost.judged_bytes is not None]
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
    sign = -1.0 if bigger else 1.0
    front: list[tuple[float, float, str]] = []
    for moved, quality, row in sorted(
        [(moved, sign * quality, row) for row, (moved, quality) in places.items() if moved is not None],
        key=lambda point: point[:2],
    ):
        if not front or quality < front[-1][1] or (moved, quality) == front[-1][:2]:
            front.append((moved, quality, row))
    return [row for *_, row in front]


def share_closed(group: Group, row: str, metric: str, floor: str | None, ceiling: str | None) -> Summary:
    """Share of the distance from floor to ceiling that a row closes, ``(row - floor) / (ceiling - floor)``, over seeds.

    Each seed counts by itself in which all three have the metric by the same protocol, and floor and ceiling differ.
    """
    floors = {run.seed: run for run in group.runs.get(str(floor), ())}
    ceilings = {run.seed: run for run in group.runs.get(str(ceiling), ())}
    shares = []
    for run in group.runs[row]:
        three = [run, floors.get(run.seed), ceilings.get(run.seed)]
        judged = [run for run in three if run is not None and metric in run.test]
        if len(judged) < 3 or len({run.protocol(metric) for run in judged}) > 1:
            continue
        own, bottom, top = (run.test[metric] for run in judged)
        if top != bottom:
            shares.append((own - bottom) / (top - bottom))
    return summary(shares)


def share_of_bytes(group: Group, row: str, unit: str | None) -> Summary:
    """A row's bytes until the judged round as a share of those of the row ``unit``, over the seeds that both have.

    Seeds in which one of them has no network, or the unit sends nothing, do not count.
    """
    shares = []
    for run, other in seed_pairs(group.runs[row], group.runs.get(str(unit), ())):
        spent, whole = cost(run, None).judged_bytes, cost(other, None).judged_bytes
        if spent is not None and whole:
            shares.append(spent / whole)
    return summary(shares)


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


def mean_of(costs: Sequence[Cost], name: str) -> float | None:
    """Mean over seeds of one attribute of costs; None where no seed has it."""
    values = [float(value) for run_cost in costs if (value := getattr(run_cost, name)) is not None]
    return summary(values).mean if values else None
