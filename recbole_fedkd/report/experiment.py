"""The records of an experiment, put into the order of its plan; what cannot be read is left out and noted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_fedkd.errors import InputError
from recbole_fedkd.network import USUAL, Network
from recbole_fedkd.record import nothing_to_report
from recbole_fedkd.report.records import UNREADABLE, Run, as_text, differing_keys, one_line, read_run, read_users


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
        network: on which their time is reckoned.
    """

    settings: Mapping[str, Any]
    rows: tuple[str, ...]
    runs: Mapping[str, tuple[Run, ...]]
    reference: str
    network: Network = USUAL

    @property
    def title(self) -> str:
        """One line for a heading."""
        return titled(self.settings) or "All runs"

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


def titled(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{key}: {as_text(value)}" for key, value in settings.items())


def group_key(group: Mapping[str, Any]) -> str:
    """The same text for equal groups, whatever the order of their keys."""
    return json.dumps(group, sort_keys=True, default=str)


def read_experiment(folder: Path) -> Experiment:
    """Read the records in an experiment's folder.

    Raises:
        InputError: the folder is none, or holds no finished run and no failure.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; a report needs the folder of an experiment")
    notes: list[str] = []
    plan = _read_plan(folder / "experiment.json", notes)
    listed = plan.get("cells")
    cells = [cell for cell in listed if isinstance(cell, Mapping)] if isinstance(listed, list) else []
    runs = []
    for file in sorted((folder / "runs").glob("*.jsonl")):
        try:
            runs.append(read_run(file, read_users(folder / "users" / f"{file.stem}.npz", notes)))
        except UNREADABLE as error:
            notes.append(f"runs/{file.name} is left out: {one_line(error)}.")
    failures = _read_failures(folder / "failures", notes)
    if not runs and not failures:
        left_out = next((f" ({note.rstrip('.')})" for note in notes if note.startswith("runs/")), "")
        raise nothing_to_report(folder, left_out)
    runs, failures = _of_this_plan(runs, failures, cells, notes)
    content = plan.get("experiment")
    content = content if isinstance(content, Mapping) else {}
    reference = None if plan.get("reference") is None else str(plan["reference"])
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
        notes.append(
            f"experiment.json cannot be read ({one_line(error)}): rows and groups stand in the order of files."
        )
        return {}
    return plan if isinstance(plan, Mapping) else {}


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
        except UNREADABLE as error:
            notes.append(f"failures/{file.name} is left out: {one_line(error)}.")
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
        same = unique.setdefault((group_key(run.group), run.row, run.seed), run)
        if same is not run:
            notes.append(
                f"{run.cell} is left out: {same.cell} has the same row '{run.row}', group and seed {run.seed}."
            )
    return list(unique.values()), failures


def _grouped(
    runs: list[Run], cells: list[Mapping[str, Any]], reference: str | None, notes: list[str]
) -> tuple[Group, ...]:
    rows = list(dict.fromkeys([*(str(cell.get("row")) for cell in cells), *(run.row for run in runs)]))
    if reference is not None and reference not in rows:
        notes.append(f"The reference row '{reference}' is no row of this experiment.")
    settings: dict[str, Mapping[str, Any]] = {}
    for group in [*(cell.get("group") for cell in cells), *(run.group for run in runs)]:
        if isinstance(group, Mapping):
            settings.setdefault(group_key(group), group)
    groups = []
    for key, common in settings.items():
        by_row: dict[str, tuple[Run, ...]] = {}
        for row in rows:
            mine = [run for run in runs if run.row == row and group_key(run.group) == key]
            if mine:
                by_row[row] = tuple(sorted(mine, key=lambda run: run.seed))
        if not by_row:
            continue
        chosen = reference if reference in by_row else next(iter(by_row))
        assert chosen is not None
        groups.append(Group(settings=common, rows=tuple(by_row), runs=by_row, reference=chosen))
        if reference is not None and chosen != reference and reference in rows:
            notes.append(f"{groups[-1].title}: the reference row '{reference}' has no run, '{chosen}' takes its place.")
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
    rows: dict[str, str | None] = {}
    for part in ("floor", "ceiling", "bytes"):
        row = rows[part] = None if scale.get(part) is None else str(scale[part])
        missing = [group.title for group in groups if row is not None and row not in group.rows]
        if missing:
            notes.append(f"The scale's {part} is the row '{row}', which has no run in: {'; '.join(missing)}.")
    return Scale(rows["floor"], rows["ceiling"], rows["bytes"])


def _published(content: Mapping[str, Any], rows: set[str], notes: list[str]) -> Published | None:
    published = content.get("published")
    if not isinstance(published, Mapping) or not published:
        return None
    usable = {str(row): dict(values) for row, values in published.items() if isinstance(values, Mapping)}
    unknown = [row for row in usable if row not in rows]
    if unknown:
        notes.append(f"Published, but not measured here: {', '.join(unknown)}.")
    metrics, settings = content.get("published_as"), content.get("published_for")
    return Published(
        rows=usable,
        metrics={str(name): str(ours).lower() for name, ours in metrics.items()}
        if isinstance(metrics, Mapping)
        else {},
        source=str(content.get("published_source") or ""),
        settings=settings if isinstance(settings, Mapping) else {},
    )
