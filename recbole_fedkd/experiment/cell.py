"""The process of one cell: ``python -m recbole_fedkd.experiment.cell FILE``.

Trains and judges the run of the JSON file, writes its record, and prints one JSON line per round to its standard output,
which is the runner's pipe. When the runner is gone the next line cannot be printed, and the process ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from recbole_fedkd.compat import keep_freed_memory
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.experiment.grid import Cell
from recbole_fedkd.experiment.records import keep_checkpoint, write_run
from recbole_fedkd.files import json_ready
from recbole_fedkd.quick_start import run_recbole_fedkd


def run_cell(cell: Cell, folder: Path, tell: Callable[[Mapping[str, Any]], None], keep: bool = False) -> None:
    """Train and judge a cell and write its record into the experiment's folder.

    Args:
        cell: the run.
        folder: the experiment's folder.
        tell: takes a progress line after every round, and one before the record is written.
        keep: whether the best checkpoint is kept.

    Raises:
        InputError, TrainingError: the run cannot start or go on.
    """
    keys = {**cell.keys, "user_metrics": True}
    metric = str(FedKDConfig(config_dict=keys)["valid_metric"]).lower()

    def on_round(number: int, rounds: int, record: dict[str, Any]) -> None:
        value = (record["valid"] or {}).get(metric)
        tell({"round": number, "rounds": rounds, "seconds": record["seconds"], "metric": metric, "value": value})

    result = run_recbole_fedkd(config_dict=keys, on_round=on_round)
    # An orphan must not write what a new runner's process may be about to write.
    tell({"finished": True})
    if keep:
        keep_checkpoint(folder, cell, Path(result["run_folder"]))
    write_run(folder, cell, result)


def own_standard_output() -> TextIO:
    """Standard output for progress lines alone: whatever else is printed from now on goes where errors go."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    return pipe


def main(file: str) -> int:
    """Run the cell of a JSON file; the exit code is 0, or 1 after a last line on standard error that says why."""
    pipe = own_standard_output()

    def tell(line: Mapping[str, Any]) -> None:
        print(json.dumps(json_ready(line)), file=pipe, flush=True)

    keep_freed_memory()
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    try:
        run_cell(Cell(**content["cell"]), Path(content["folder"]), tell, content["keep"])
    except (InputError, TrainingError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
