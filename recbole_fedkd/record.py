"""The record of a run: what is kept of it for reports, in a form that outlives the code that wrote it.

A record is a file of JSON lines: one ``run`` (who it was: row, group, seed, config, environment, partition), one ``round``
each, one ``result``; beside it an ``.npz`` of equally long arrays: ``user``, the dataset's internal id; in a federation
``client``, the number of the user's client; and one per test metric, nan where it does not judge the user.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recbole_fedkd import __version__
from recbole_fedkd.errors import InputError
from recbole_fedkd.files import check_one_run, json_ready, written_whole

RECORD_VERSION = 2
"""Of what is written: rounds are counted from 1. Version 1 counted them from 0, and is read as if it had not."""
RECORD_VERSIONS = (1, RECORD_VERSION)
RUN_RECORD, RUN_USERS = "record.jsonl", "users.npz"
"""Names of the two files in the folder of a single run."""

OPTIONAL_PARTS = ("engine", "engine_fallback", "strangers", "cold", "spread", "epsilon", "parties")
"""What a result has only where it applies: the engine that ran, held-out clients, cold rows, deviations, privacy spent, and
what each party has judged at home."""

_WHOLE_NUMBERS = ("user", "client")


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is that of a run, and not of an experiment."""
    return ((folder / RUN_RECORD).is_file() or any(folder.glob("*.pth"))) and not (folder / "runs").is_dir()


def check_has_records(folder: Path) -> None:
    """Raise :func:`nothing_to_report` for a folder without a file that a report is made of."""
    of_cells = (
        path for part, kind in (("runs", "*.jsonl"), ("failures", "*.json")) for path in (folder / part).glob(kind)
    )
    if not is_run_folder(folder) and next(of_cells, None) is None:
        raise nothing_to_report(folder)


def nothing_to_report(folder: Path, left_out: str = "") -> InputError:
    """What is said of a folder without a finished run and without a failure.

    Args:
        folder: the folder.
        left_out: in brackets, what is wrong with a record that there is.

    Raises:
        InputError: there are several runs in it, of which one has to be named.
    """
    check_one_run(folder, RUN_RECORD)
    return InputError(
        f"{folder} holds no finished run and no failure, so there is nothing to report; "
        f"expected runs/<cell>.jsonl with a result{left_out}"
    )


def environment() -> dict[str, str]:
    """Versions of what a number depends on; ``draws``: of what clients draw by themselves."""
    from recbole_fedkd.federated.draws import DRAWS_VERSION  # brings torch, and records are read without it

    packages = ("recbole-fedkd", "recbole", "torch", "numpy", "pandas", "scipy")
    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    versions["draws"] = str(DRAWS_VERSION)
    for package in packages:
        versions[package] = __version__ if package == "recbole-fedkd" else importlib.metadata.version(package)
    return versions


def write_record(file: Path, users_file: Path, head: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write the record of a finished run; the users first, for with its own file the run counts as finished.

    Args:
        file: the JSON lines.
        users_file: metrics of single users; not written where the result has none.
        head: who the run is: ``cell``, ``row``, ``group``, ``seed``, ``keys`` and ``config``.
        result: what ``run_recbole_fedkd`` returned.
    """
    users = result["user_metrics"]
    if users is not None:
        columns: dict[str, Any] = {
            name: np.asarray(values, dtype=np.int64 if name in _WHOLE_NUMBERS else np.float32)
            for name, values in users.items()
        }
        with written_whole(users_file) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **columns)
    communication, timing = result["communication"], result["timing"]
    first = {"kind": "run", "version": RECORD_VERSION, **head}
    first |= {"environment": result["environment"], "partition": result["partition"]}
    last = {
        "kind": "result",
        "test": result["test_result"],
        "best_valid": result["best_valid_result"],
        "best_round": result["best_round"],
        "valid_metric": str(result["config"]["valid_metric"]).lower(),
        "valid_score_bigger": result["valid_score_bigger"],
        "protocols": result["protocols"],
        "communication": {name: communication[name] for name in ("total_bytes", "bytes_down", "bytes_up")},
        "timing": {name: timing[name] for name in ("rounds", "training_seconds", "seconds_per_round")},
        **{name: _without_users(result[name]) for name in OPTIONAL_PARTS if result.get(name) is not None},
    }
    lines = [first, *({"kind": "round", **record} for record in result["rounds"]), last]
    text = "".join(json.dumps(json_ready(line), allow_nan=False) + "\n" for line in lines)
    with written_whole(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_run_record(folder: Path, keys: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Keep in a run's folder what ``recbole-fedkd report`` makes a page of.

    Args:
        folder: of the run.
        keys: that somebody has set for it.
        result: of the run.
    """
    config = result["config"]
    strategy = "" if config["strategy"] is None else f" ({config['strategy']})"
    row = f"{config['model']}{strategy} on {config['dataset']}"
    head = {"cell": folder.name, "row": row, "group": {}, "seed": config["seed"], "keys": dict(keys), "config": config}
    write_record(folder / RUN_RECORD, folder / RUN_USERS, head, result)


def _without_users(part: Any) -> Any:
    """An optional part without the values of single users."""
    return (
        {name: value for name, value in part.items() if name != "user_metrics"} if isinstance(part, Mapping) else part
    )
