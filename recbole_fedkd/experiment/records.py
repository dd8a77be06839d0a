"""The files of an experiment's folder: what is written, and when a run counts as finished.

``experiment.json`` describes the experiment. Every finished run has ``runs/<cell>.jsonl`` (one line ``run``, one line
``round`` each, one line ``result``) and ``users/<cell>.npz`` (test metrics per user); every failed one has
``failures/<cell>.json``, and ``logs/<cell>.log`` whatever it said. ``work`` holds what is under way. The form of the first two
is that of ``recbole_fedkd.record``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_fedkd.checkpoint.large import LARGE_FILES
from recbole_fedkd.checkpoint.reading import ROWS
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.experiment.grid import Cell, Experiment, digest_of
from recbole_fedkd.files import BEST, PARTITION, json_ready, write_bytes, write_json, written_whole
from recbole_fedkd.record import RECORD_VERSION, RECORD_VERSIONS, write_record
from recbole_fedkd.report.records import differing_keys

_FOLDERS = ("runs", "users", "failures", "logs", "work")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


def prepare_folder(folder: Path, experiment: Experiment) -> None:
    """Make the folder ready for a runner: what killed runs left is gone, and the experiment is written down."""
    shutil.rmtree(folder / "work", ignore_errors=True)
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for target in (folder, *(folder / name for name in _FOLDERS)):
        for file in target.iterdir():
            if _TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)
    by_row = sorted(experiment.cells, key=lambda cell: experiment.rows.index(cell.row))
    description = {
        "version": RECORD_VERSION,
        "name": experiment.name,
        # Yaml has dates, which JSON has not.
        "experiment": json.loads(json.dumps(experiment.content, default=str)),
        "rows": experiment.rows,
        "reference": experiment.reference,
        "cells": [{"cell": cell.id, "row": cell.row, "group": cell.group, "seed": cell.seed} for cell in by_row],
    }
    write_json(description, folder / "experiment.json")


def run_file(folder: Path, cell: Cell) -> Path:
    """Record of a finished run."""
    return folder / "runs" / f"{cell.id}.jsonl"


def users_file(folder: Path, cell: Cell) -> Path:
    """Test metrics of every user of a finished run."""
    return folder / "users" / f"{cell.id}.npz"


def failure_file(folder: Path, cell: Cell) -> Path:
    """What made a run fail."""
    return folder / "failures" / f"{cell.id}.json"


def log_file(folder: Path, cell: Cell) -> Path:
    """Everything that a run logged."""
    return folder / "logs" / f"{cell.id}.log"


def checkpoint_folder(folder: Path, cell: Cell) -> Path:
    """The best checkpoint of a finished run, where checkpoints are kept."""
    return folder / "checkpoints" / cell.id


def keep_checkpoint(folder: Path, cell: Cell, run_folder: Path) -> None:
    """Take over the best checkpoint of a run, and what is needed to load it."""
    target = checkpoint_folder(folder, cell)
    target.mkdir(parents=True, exist_ok=True)
    for pattern in (LARGE_FILES, BEST, ROWS, PARTITION):
        for file in run_folder.glob(pattern):
            write_bytes(file.read_bytes(), target / file.name)


def work_folder(folder: Path, cell: Cell) -> Path:
    """Current folder of a run's process."""
    return folder / "work" / cell.id


def is_finished(folder: Path, cell: Cell, config: Mapping[str, Any] | None = None) -> bool:
    """Whether the record is there, complete, and that of this row and group.

    Args:
        folder: the experiment's folder.
        cell: the run.
        config: plain values of the config that the cell's keys make now. The record of a run whose config was another,
            because a preset or a default has changed since, is not that of this run. Not given: not compared.
    """
    head = _complete_head(run_file(folder, cell))
    if head is None or head["row"] != cell.row or list(head["group"].items()) != list(cell.group.items()):
        return False
    return config is None or not differing_keys(head["config"], config)


def adopt_run(folder: Path, cell: Cell, config: Mapping[str, Any]) -> bool:
    """Take over a finished run of the same keys under another name: its row was renamed, or the grid put in another order.

    Args:
        folder: the experiment's folder.
        cell: the run that has no record of its own.
        config: plain values of the config that the cell's keys make now.

    Returns:
        Whether there was such a run; its files have this cell's name then.
    """
    keys = json_ready(_without_place(cell.keys))
    for file in sorted((folder / "runs").glob(f"*-{digest_of(cell.id)}.jsonl")):
        head = _complete_head(file)
        if head is None or head["keys"] != keys or differing_keys(head["config"], config):
            continue
        head = {**head, "cell": cell.id, "row": cell.row, "group": cell.group}
        _, *others = file.read_text(encoding="utf-8").splitlines(keepends=True)
        # The users first, as for a run that ends: with the run's own file it counts as finished.
        users = folder / "users" / f"{file.stem}.npz"
        if users.is_file():
            users.replace(users_file(folder, cell))
        checkpoints = folder / "checkpoints" / file.stem
        if checkpoints.is_dir() and file != run_file(folder, cell):
            shutil.rmtree(checkpoint_folder(folder, cell), ignore_errors=True)
            checkpoints.replace(checkpoint_folder(folder, cell))
        with written_whole(run_file(folder, cell)) as temporary:
            temporary.write_text(json.dumps(head, allow_nan=False) + "\n" + "".join(others), encoding="utf-8")
        if file != run_file(folder, cell):
            file.unlink()
        return True
    return False


def _complete_head(file: Path) -> dict[str, Any] | None:
    """First line of a finished run's record; None if the record is not there, not complete or of another version."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        head, last = json.loads(lines[0]), json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return None
    return head if last.get("kind") == "result" and head.get("version") in RECORD_VERSIONS else None


def write_run(folder: Path, cell: Cell, result: Mapping[str, Any]) -> None:
    """Write the record of a finished run.

    Args:
        folder: the experiment's folder.
        cell: the run.
        result: what ``run_recbole_fedkd`` returned.
    """
    head = {
        "cell": cell.id,
        "row": cell.row,
        "group": cell.group,
        "seed": cell.seed,
        "keys": _without_place(cell.keys),
        "config": _without_place(result["config"]),
    }
    write_record(run_file(folder, cell), users_file(folder, cell), head, result)


def _without_place(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What a run computes, and not where it lay: a record may be published."""
    return {name: value for name, value in keys.items() if name not in keys_with("aside")}


def write_failure(folder: Path, cell: Cell, error: str) -> None:
    """Note that a run failed, and the sentence that says why."""
    content = {"cell": cell.id, "row": cell.row, "group": cell.group, "seed": cell.seed, "error": error}
    write_json(content, failure_file(folder, cell))
