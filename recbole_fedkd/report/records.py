"""The records of an experiment: what the runs wrote, read once and checked."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.errors import InputError

RECORD_VERSION = 2
"""Of what is written: rounds are counted from 1. Version 1 counted them from 0, and is read as if it had not."""
RECORD_VERSIONS = (1, RECORD_VERSION)

# Keys of a config on which a run's numbers do not depend (where, how loud and how fast it is), and the seed.
_KEYS_OF_A_RUN = frozenset(
    {
        "data_path", "checkpoint_dir", "run_name", "state", "show_progress", "user_metrics", "seed",
        "torch_threads", "fleet_threads", "fleet_memory", "device", "gpu_id",
    }
)  # fmt: skip


# Where the threshold of a label comes from; older records do not say it, and it judges nothing else.
_ORIGIN = re.compile(r", three quarters of the scale \S+")


def parted_protocol(told: str) -> tuple[str, str]:
    """A protocol, and what was counted on the split of one seed, in brackets at its end or empty."""
    protocol, bracket, counts = told.partition(" [")
    return protocol, bracket.strip() + counts


def comparable_protocol(told: str) -> str:
    """What two protocols have in common that judge alike."""
    return _ORIGIN.sub("", parted_protocol(told)[0])


@dataclass(frozen=True)
class Round:
    """One round of a federation, or one epoch of a central run.

    Attributes:
        number: counted from 1.
        seconds: of training, without validation.
        bytes_moved: up and down, over all clients.
        valid: validation metrics by lower-case name; empty if the round was not validated.
    """

    number: int
    seconds: float
    bytes_moved: int
    valid: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        cell: its name in the grid, which is also that of its file.
        row: the row of the tables that it is one seed of.
        group: what tells its tables from others, such as dataset and partition.
        seed: pairs it with the runs of other rows.
        settings: the keys that the grid set for it.
        central: one model on all data; such a run has no network and no bytes.
        environment: versions and machine.
        partition: ``scheme``, ``label_values`` and per client ``samples`` and the histogram ``labels``; None without
            clients.
        rounds: in order.
        test: test metrics by lower-case name.
        best_round: number of the round that was judged; None if unknown.
        valid_metric: lower-case name of the metric that chose it.
        valid_bigger: whether more of it is better.
        protocols: how each test metric came about, one sentence each.
        total_bytes: over the whole run, what is sent outside the rounds included.
        training_seconds: over the whole run.
        users: ``user`` ids ``[n]``, one float array ``[n]`` per metric, nan where a user is not judged by it, and in a
            federation each user's ``client`` ``[n]``, which older records lack.
        student_pool: the students of several sizes that were dealt out to the clients in turn; empty without.
        config: every key with its value.
    """

    cell: str
    row: str
    group: Mapping[str, Any]
    seed: int
    settings: Mapping[str, Any]
    central: bool
    environment: Mapping[str, Any]
    partition: Mapping[str, Any] | None
    rounds: tuple[Round, ...]
    test: Mapping[str, float]
    best_round: int | None
    valid_metric: str
    valid_bigger: bool
    protocols: Mapping[str, str]
    total_bytes: int
    training_seconds: float
    users: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    student_pool: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def protocol(self, metric: str) -> str | None:
        """How a test metric came about, alike for all that was judged alike; None where that is not known."""
        told = self.protocols.get(metric)
        return None if told is None else comparable_protocol(told)

    @property
    def best_valid(self) -> float | None:
        """Best validation score over the rounds; None if no round was validated."""
        scores = [score for _, score in self.valid_curve()]
        if not scores:
            return None
        return max(scores) if self.valid_bigger else min(scores)

    def valid_curve(self) -> list[tuple[int, float]]:
        """Position in ``rounds`` and validation score of each validated round."""
        return [
            (position, each.valid[self.valid_metric])
            for position, each in enumerate(self.rounds)
            if self.valid_metric in each.valid
        ]


@dataclass(frozen=True)
class Failure:
    """A run that ended in an error."""

    cell: str
    row: str
    group: Mapping[str, Any]
    seed: int | None
    error: str


@dataclass(frozen=True)
class Published:
    """Numbers of a publication to stand beside the measured ones.

    Attributes:
        rows: per row the published values, by the publication's names; numbers or text.
        metrics: our metric for a published name, where the two differ.
        source: where they were published.
        settings: the groups that they belong to have these settings; empty: all groups.
    """

    rows: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, str]
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """The rows by which bytes and quality are measured; None where the experiment names none.

    Attributes:
        floor: row whose quality is 0 %.
        ceiling: row whose quality is 100 %.
        bytes_row: row whose bytes are 100 %.
    """

    floor: str | None = None
    ceiling: str | None = None
    bytes_row: str | None = None


@dataclass(frozen=True)
class Group:
    """The runs that share a set of tables.

    Attributes:
        settings: what all of them have in common, such as dataset and partition.
        rows: names of the rows, in the order of the tables.
        runs: per row, ordered by seed.
        reference: the row that the others are compared with.
    """

    settings: Mapping[str, Any]
    rows: tuple[str, ...]
    runs: Mapping[str, tuple[Run, ...]]
    reference: str

    @property
    def title(self) -> str:
        """One line for a heading."""
        return ", ".join(f"{key}: {as_text(value)}" for key, value in self.settings.items()) or "All runs"

    @property
    def all_runs(self) -> list[Run]:
        """Every run, row by row."""
        return [run for row in self.rows for run in self.runs[row]]


@dataclass(frozen=True)
class Experiment:
    """All that a report is made of.

    Attributes:
        name: of the experiment.
        groups: in the experiment's order.
        named_reference: whether the experiment itself names the reference row.
        failures: runs that ended in an error.
        published: None if the experiment names no published numbers.
        notes: sentences on what was left out or is missing.
        scale: None if the experiment names none.
    """

    name: str
    groups: tuple[Group, ...]
    named_reference: bool
    failures: tuple[Failure, ...]
    published: Published | None
    notes: tuple[str, ...]
    scale: Scale | None = None

    @property
    def runs(self) -> list[Run]:
        """Every run, group by group."""
        return [run for group in self.groups for run in group.all_runs]


def as_text(value: Any) -> str:
    """A configuration value as a reader would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def group_key(group: Mapping[str, Any]) -> str:
    """The same text for equal groups, whatever the order of their keys."""
    return json.dumps(group, sort_keys=True, default=str)


def differing_keys(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys that two configs have with different values, of those on which a run's numbers depend.

    A key that only one has does not count: it came, or went, with a version of the package. Nor does a threshold of the
    ratings that nobody has set: a run settles it when it has its data, one for each dataset.
    """
    shared = sorted(config.keys() & other.keys() - _KEYS_OF_A_RUN)
    alike = config.get("dataset") == other.get("dataset")
    return [
        key
        for key in shared
        if config[key] != other[key]
        and not (key in ("rating_threshold", "threshold") and not (alike and _settled(config) and _settled(other)))
    ]


def _settled(config: Mapping[str, Any]) -> bool:
    """Whether a config's threshold of the ratings is set."""
    return config.get("label_mode") is None or config.get("rating_threshold") is not None


def read_experiment(folder: Path) -> Experiment:
    """Read the records in an experiment's folder; what cannot be read is left out and noted.

    Raises:
        InputError: the folder is none, or holds no finished run and no failure.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; a report needs the folder of an experiment")
    notes: list[str] = []
    plan = _read_plan(folder / "experiment.json", notes)
    cells = [cell for cell in _list(plan.get("cells")) if isinstance(cell, Mapping)]
    runs = _read_runs(folder, notes)
    failures = _read_failures(folder / "failures", notes)
    if not runs and not failures:
        left_out = next((f" ({note.rstrip('.')})" for note in notes if note.startswith("runs/")), "")
        raise InputError(
            f"{folder} holds no finished run and no failure, so there is nothing to report; "
            f"expected runs/<cell>.jsonl with a result{left_out}"
        )
    runs, failures = _of_this_plan(runs, failures, cells, notes)
    content = plan.get("experiment")
    content = content if isinstance(content, Mapping) else {}
    reference = plan.get("reference")
    groups = _grouped(runs, cells, reference, notes)
    _note_mixed_rows(groups, notes)
    scale = _scale(content.get("scale"), groups, notes)
    return Experiment(
        name=str(plan.get("name") or folder.resolve().name),
        groups=groups,
        named_reference=reference is not None,
        failures=tuple(failures),
        published=_published(content, {run.row for run in runs}, notes),
        notes=tuple(notes),
        scale=scale,
    )


def _read_plan(file: Path, notes: list[str]) -> Mapping[str, Any]:
    if not file.is_file():
        notes.append("There is no experiment.json: rows and groups stand in the order of their files.")
        return {}
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"experiment.json cannot be read ({_line(error)}): rows and groups stand in the order of files.")
        return {}
    return plan if isinstance(plan, Mapping) else {}


def _read_runs(folder: Path, notes: list[str]) -> list[Run]:
    runs = []
    for file in sorted((folder / "runs").glob("*.jsonl")):
        try:
            run = _run(file, _read_users(folder / "users" / f"{file.stem}.npz", notes))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"runs/{file.name} is left out: {_line(error)}.")
        else:
            runs.append(run)
    return runs


def _run(file: Path, users: Mapping[str, NDArray[Any]]) -> Run:
    head: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    rounds: dict[int, Round] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            # A run that was stopped while it wrote leaves half a line, and with it no result.
            continue
        if record["kind"] == "run":
            head, result, rounds = record, None, {}
        elif record["kind"] == "round":
            # A round that was repeated after a resume replaces its first attempt.
            rounds[int(record["round"])] = _round(record)
        elif record["kind"] == "result":
            result = record
    if head is None:
        raise ValueError("it has no line of kind 'run'")
    if result is None:
        raise ValueError("it has no result, so the run is not finished")
    version = head.get("version", RECORD_VERSIONS[0])
    if version not in RECORD_VERSIONS:
        known = " and ".join(map(str, RECORD_VERSIONS))
        raise ValueError(f"its version is {version}, and only {known} are known")
    shift = 1 if version == 1 else 0
    ordered = tuple(replace(rounds[number], number=number + shift) for number in sorted(rounds))
    config = head.get("config") or {}
    partition = _partition(head.get("partition"))
    communication = result.get("communication") or {}
    timing = result.get("timing") or {}
    strategy = config.get("strategy")
    best_round = result.get("best_round")
    return Run(
        cell=str(head.get("cell", file.stem)),
        row=str(head["row"]),
        group=dict(head.get("group") or {}),
        seed=int(head["seed"]),
        settings=dict(head.get("keys") or {}),
        central=strategy == "central" or (strategy is None and partition is None),
        environment=dict(head.get("environment") or {}),
        partition=partition,
        rounds=ordered,
        test=_scores(result["test"]),
        best_round=None if best_round is None else int(best_round) + shift,
        valid_metric=str(result["valid_metric"]).lower(),
        valid_bigger=bool(result["valid_score_bigger"]),
        protocols={str(name).lower(): str(text) for name, text in (result.get("protocols") or {}).items()},
        total_bytes=int(communication.get("total_bytes") or sum(each.bytes_moved for each in ordered)),
        training_seconds=float(timing.get("training_seconds") or sum(each.seconds for each in ordered)),
        users=users,
        student_pool=() if partition is None else tuple(dict(each) for each in config.get("student_pool") or ()),
        config=config,
    )


def _partition(partition: Any) -> Mapping[str, Any] | None:
    if partition is None:
        return None
    clients = [
        {"samples": int(client.get("samples") or 0), "labels": [int(count) for count in client.get("labels") or []]}
        for client in partition.get("clients") or []
    ]
    return {
        "scheme": str(partition.get("scheme") or "not named"),
        "label_values": list(partition.get("label_values") or []),
        "clients": clients,
    }


def _round(record: Mapping[str, Any]) -> Round:
    return Round(
        number=int(record["round"]),
        seconds=float(record.get("seconds") or 0.0),
        bytes_moved=int(record.get("bytes_down") or 0) + int(record.get("bytes_up") or 0),
        valid=_scores(record.get("valid") or {}),
    )


def _scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    # JSON has no nan: a metric that could not be computed is null, and counts as missing.
    return {
        str(name).lower(): float(value)
        for name, value in metrics.items()
        if value is not None and math.isfinite(float(value))
    }


def _read_users(file: Path, notes: list[str]) -> dict[str, NDArray[Any]]:
    if not file.is_file():
        return {}
    try:
        with np.load(file, allow_pickle=False) as stored:
            users = {str(name).lower(): np.asarray(stored[name]) for name in stored.files}
        if len({values.shape for values in users.values()}) != 1 or users["user"].ndim != 1:
            raise ValueError("its arrays differ in length")
        if len(np.unique(users["user"])) != len(users["user"]):
            raise ValueError("a user occurs twice")
        if "client" in users and users["client"].dtype.kind not in "iu":
            raise ValueError("its clients are no whole numbers")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        notes.append(f"users/{file.name} is left out: {_line(error)}.")
        return {}
    return users


def _read_failures(folder: Path, notes: list[str]) -> list[Failure]:
    failures = []
    for file in sorted(folder.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            failures.append(
                Failure(
                    cell=str(record.get("cell", file.stem)),
                    row=str(record.get("row", "")),
                    group=dict(record.get("group") or {}),
                    seed=None if record.get("seed") is None else int(record["seed"]),
                    error=str(record["error"]),
                )
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"failures/{file.name} is left out: {_line(error)}.")
    return failures


def _of_this_plan(
    runs: list[Run], failures: list[Failure], cells: list[Mapping[str, Any]], notes: list[str]
) -> tuple[list[Run], list[Failure]]:
    """Leave out what the plan does not name, what is there twice, and failures that a later try has mended."""
    if cells:
        planned = {
            str(cell.get("cell")): (str(cell.get("row")), group_key(cell.get("group") or {}), cell.get("seed"))
            for cell in cells
        }

        def belongs(run: Run) -> bool:
            # The record of a cell may be that of an earlier plan, in which the cell was another run.
            return planned.get(run.cell) == (run.row, group_key(run.group), run.seed)

        stray = [run.cell for run in runs if not belongs(run)]
        if stray:
            notes.append(
                f"{len(stray)} finished run(s) belong to no cell of this experiment and are left out: "
                f"{', '.join(stray)}."
            )
        runs = [run for run in runs if belongs(run)]
        failures = [failure for failure in failures if failure.cell in planned]
        known = {run.cell for run in runs} | {failure.cell for failure in failures}
        waiting = len(planned.keys() - known)
        if waiting:
            notes.append(f"{waiting} of {len(planned)} runs of this experiment have no result yet.")
    finished = {run.cell for run in runs}
    failures = [failure for failure in failures if failure.cell not in finished]
    unique: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        place = (group_key(run.group), run.row, run.seed)
        if place in unique:
            notes.append(
                f"{run.cell} is left out: {unique[place].cell} has the same row '{run.row}', group and seed {run.seed}."
            )
        else:
            unique[place] = run
    return list(unique.values()), failures


def _grouped(runs: list[Run], cells: list[Mapping[str, Any]], reference: Any, notes: list[str]) -> tuple[Group, ...]:
    rows = list(dict.fromkeys([*(str(cell.get("row")) for cell in cells), *(run.row for run in runs)]))
    if reference is not None and str(reference) not in rows:
        notes.append(f"The reference row '{reference}' is no row of this experiment.")
    settings: dict[str, Mapping[str, Any]] = {}
    for group in [*(cell.get("group") for cell in cells), *(run.group for run in runs)]:
        if isinstance(group, Mapping):
            settings.setdefault(group_key(group), group)
    groups = []
    for key, common in settings.items():
        mine = [run for run in runs if group_key(run.group) == key]
        if not mine:
            continue
        by_row = {
            row: tuple(sorted((run for run in mine if run.row == row), key=lambda run: run.seed))
            for row in rows
            if any(run.row == row for run in mine)
        }
        present = tuple(by_row)
        chosen = str(reference) if reference is not None and str(reference) in by_row else present[0]
        group = Group(settings=common, rows=present, runs=by_row, reference=chosen)
        if reference is not None and chosen != str(reference) and str(reference) in rows:
            notes.append(f"{group.title}: the reference row '{reference}' has no run, '{chosen}' takes its place.")
        groups.append(group)
    return tuple(groups)


def _note_mixed_rows(groups: tuple[Group, ...], notes: list[str]) -> None:
    """Tell of rows whose runs differ in more than the keys that the experiment set: a default changed between them."""
    for group in groups:
        for row, (first, *others) in group.runs.items():
            for other in others:
                differing = [key for key in differing_keys(first.config, other.config) if key not in other.settings]
                values = [f"{key} {as_text(first.config[key])} and {as_text(other.config[key])}" for key in differing]
                if values:
                    notes.append(
                        f"{group.title}: the runs of '{row}' are not of one method: "
                        f"{first.cell} and {other.cell} have {', '.join(values)}."
                    )
                    break


def _scale(scale: Any, groups: tuple[Group, ...], notes: list[str]) -> Scale | None:
    if not isinstance(scale, Mapping):
        return None
    found: dict[str, str | None] = {}
    for part in ("floor", "ceiling", "bytes"):
        row = scale.get(part)
        found[part] = None if row is None else str(row)
        missing = [group.title for group in groups if row is not None and str(row) not in group.rows]
        if missing:
            notes.append(f"The scale's {part} is the row '{row}', which has no run in: {'; '.join(missing)}.")
    return Scale(found["floor"], found["ceiling"], found["bytes"])


def _published(content: Mapping[str, Any], rows: set[str], notes: list[str]) -> Published | None:
    published = content.get("published")
    if not isinstance(published, Mapping) or not published:
        return None
    usable = {str(row): dict(values) for row, values in published.items() if isinstance(values, Mapping)}
    unknown = [row for row in usable if row not in rows]
    if unknown:
        notes.append(f"Published, but not measured here: {', '.join(unknown)}.")
    metrics = content.get("published_as")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    settings = content.get("published_for")
    return Published(
        rows=usable,
        metrics={str(name): str(ours).lower() for name, ours in metrics.items()},
        source=str(content.get("published_source") or ""),
        settings=settings if isinstance(settings, Mapping) else {},
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _line(error: Exception) -> str:
    """The message of an error in one line, without the stop at its end."""
    text = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__
