"""Numbers of the records that the repository keeps under ``experiments/results``."""

from functools import cache
from pathlib import Path
from statistics import mean, stdev

from recbole_fedkd.report.measures import cost
from recbole_fedkd.report.records import read_run

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
FOLDERS = sorted(folder.name for folder in RESULTS.iterdir() if (folder / "runs").is_dir())


class Told(list):
    """One number a seed; as a text ``0.1234 ± 0.0012``, ``.1234`` by the format ``4``, ``1,234`` by ``,``."""

    @property
    def mean(self):
        return mean(self)

    def __format__(self, form):
        if form == ",":
            return f"{self.mean:,.0f}"
        if form:
            return f"{self.mean:.{form}f}".lstrip("0")
        return f"{self.mean:.4f}" + (f" ± {stdev(self):.4f}" if len(self) > 1 else "")


@cache
def runs_of(folder):
    """The runs of an experiment."""
    return [read_run(file) for file in sorted((RESULTS / folder / "runs").iterdir())]


@cache
def rows_of(folder, seed=None, **group):
    """``{row: {metric: numbers}}`` of an experiment, with ``bytes`` until the best round and validation as ``valid``."""
    found = {}
    for run in runs_of(folder):
        if seed in (None, run.seed) and group.items() <= run.group.items():
            numbers = {**run.test, **run.extras, "valid": run.best_valid, "bytes": cost(run, None).best_bytes}
            for metric, value in numbers.items():
                if value is not None:
                    found.setdefault(run.row, {}).setdefault(metric, Told()).append(value)
    return found
