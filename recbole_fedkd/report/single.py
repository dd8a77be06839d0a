"""The records of a single run: those of its folder, or of an unfinished run what its checkpoint knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_fedkd.errors import InputError
from recbole_fedkd.record import RUN_RECORD, RUN_USERS
from recbole_fedkd.report.records import UNREADABLE, Run, one_line, read_run, read_users, run_of


def read_single(folder: Path) -> tuple[Run, bool]:
    """The run of a folder, and whether it has a result.

    Raises:
        InputError: what it holds cannot be read.
    """
    file = folder / RUN_RECORD
    if file.is_file():
        try:
            return read_run(file, read_users(folder / RUN_USERS, [])), True
        except UNREADABLE as error:
            raise InputError(f"record '{file}' cannot be used: {one_line(error)}") from error
    # It brings torch, which no other report needs.
    from recbole_fedkd.checkpoint.reading import read_checkpoint

    return _unfinished(folder, read_checkpoint(folder)), False


def _unfinished(folder: Path, state: Mapping[str, Any]) -> Run:
    """The run of a checkpoint, so far as it has come."""
    config, best = state["config"], state["best_epoch"]
    head = {
        "row": f"{config.get('model')} on {config.get('dataset')}", "cell": folder.name, "seed": config.get("seed", 0),
        "config": config, "partition": None if config.get("strategy") in (None, "central") else {"clients": []},
    }  # fmt: skip
    result = {
        "test": {}, "best_round": None if best is None else best + 1,
        "valid_metric": config.get("valid_metric", ""), "valid_score_bigger": config.get("valid_metric_bigger", True),
    }  # fmt: skip
    rounds = [{"round": number, **record} for number, record in enumerate(state["records"], start=1)]
    return run_of(head, {record["round"]: record for record in rounds}, result)
