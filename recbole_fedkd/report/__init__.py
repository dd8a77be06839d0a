"""The report of an experiment or of a single run, made from records alone: tables, tests, plots, and a page that holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from recbole_fedkd.network import USUAL, Network
from recbole_fedkd.record import check_has_records, is_run_folder

__all__ = ["check_has_records", "write_report"]


def write_report(folder: str | Path, network: Network = USUAL) -> Path:
    """Write the report of an experiment or of a run into ``<folder>/report``; a report that is already there is replaced.

    Nothing is measured here, so the same records give the same tables again.

    Args:
        folder: the experiment's folder, with ``runs``, and where they exist ``users``, ``failures`` and
            ``experiment.json``; or the folder of a run, with its record, or where it is unfinished its checkpoint.
        network: on which the rounds' time is reckoned.

    Returns:
        The path of the page, ``<folder>/report/index.html``.

    Raises:
        InputError: the folder holds no finished run, no failure and no checkpoint.
    """
    # The plots bring matplotlib, which only a report needs.
    from recbole_fedkd.report.experiment import read_experiment
    from recbole_fedkd.report.files import write_all, write_run_page
    from recbole_fedkd.report.single import read_single

    if is_run_folder(Path(folder)):
        return write_run_page(*read_single(Path(folder)), Path(folder), network)
    experiment = read_experiment(Path(folder))
    groups = tuple(replace(group, network=network) for group in experiment.groups)
    return write_all(replace(experiment, groups=groups), Path(folder) / "report")
