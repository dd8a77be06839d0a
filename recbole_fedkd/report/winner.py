"""The winner's config: the keys of the row that validation puts first, in a file that a run takes."""

from __future__ import annotations

from recbole_fedkd.files import config_text
from recbole_fedkd.report.contents import mean_and_deviation, usual_name
from recbole_fedkd.report.experiment import Group
from recbole_fedkd.report.statistics import summary


def winner(group: Group) -> str | None:
    """The row with the best mean validation score; the test chooses nothing. None where no run was validated.

    Rows that were chosen by another metric than most runs do not take part.
    """
    chosen = [run.valid_metric for run in group.all_runs]
    metric = max(chosen, key=chosen.count)
    scores = {
        row: summary([run.best_valid for run in group.runs[row] if run.best_valid is not None]).mean
        for row in group.rows
        if all(run.valid_metric == metric and run.best_valid is not None for run in group.runs[row])
    }
    bigger = next(run.valid_bigger for run in group.all_runs if run.valid_metric == metric)
    return (max if bigger else min)(scores, key=lambda row: scores[row]) if scores else None


def winner_config(group: Group) -> str | None:
    """The winner's keys, model and dataset among them, as a config file; the seed is that of its first run."""
    row = winner(group)
    if row is None:
        return None
    run = group.runs[row][0]
    scores = summary([run.best_valid for run in group.runs[row] if run.best_valid is not None])
    return config_text(
        f"{group.title}: the row '{row}' is best in validation {usual_name(run.valid_metric)}, "
        f"{mean_and_deviation(scores)} over {scores.count} seed(s).",
        run.settings,
    )
