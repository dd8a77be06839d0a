"""The files of a report: what is written where, and what an earlier report had and this one has not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recbole_fedkd.files import write_bytes
from recbole_fedkd.network import Network
from recbole_fedkd.report.contents import Block
from recbole_fedkd.report.experiment import Experiment, Group
from recbole_fedkd.report.page import experiment_page
from recbole_fedkd.report.plots import plots_of
from recbole_fedkd.report.quality import metrics_of, quality_blocks, quality_lines, significance_lines
from recbole_fedkd.report.records import Run
from recbole_fedkd.report.run_page import run_page
from recbole_fedkd.report.statistics import compare
from recbole_fedkd.report.tables import (
    client_blocks,
    client_lines,
    cost_blocks,
    cost_lines,
    scale_blocks,
    scale_lines,
)
from recbole_fedkd.report.winner import winner, winner_config
from recbole_fedkd.report.writers import csv_file, html, markdown_file

FILES = {
    "table.md": "quality, as Markdown",
    "table.csv": "quality, in full precision",
    "significance.csv": "every test",
    "cost.md": "rounds, bytes and seconds, as Markdown",
    "cost.csv": "rounds, bytes and seconds, in full precision",
    "clients.md": "the clients' own averages, as Markdown",
    "clients.csv": "the clients' own averages, in full precision",
    "scale.md": "bytes against quality, as Markdown",
    "scale.csv": "bytes against quality, in full precision",
}
_TESTS = ("row", "reference", "metric", "pairs", "test", "n", "difference", "p", "p_corrected")


def write_all(experiment: Experiment, folder: Path) -> Path:
    """Write the tables, the plots and the page; what an earlier report had and this one has not is removed.

    Returns:
        The path of the page.
    """
    groups = experiment.groups
    comparisons = {id(group): compare(group, metrics_of(group)) for group in groups}
    plots = [plots_of(group, number) for number, group in enumerate(groups, start=1)]
    pictures = {f"{drawing.name}.png": drawing for drawn in plots for drawing in drawn}
    texts = table_texts(experiment, lambda group: list(significance_lines(comparisons[id(group)])))
    beside = {name: what for name, what in FILES.items() if texts[name] is not None}
    configs = {
        f"best{'' if len(groups) == 1 else f'-{number}'}.yaml": (group, text)
        for number, group in enumerate(groups, start=1)
        if (text := winner_config(group)) is not None
    }
    texts |= {name: text for name, (_, text) in configs.items()}
    beside |= {
        name: f"config of “{winner(group)}”, best in validation of {group.title}"
        for name, (group, _) in configs.items()
    }
    beside |= {f"plots/{name}": drawing.title for name, drawing in pictures.items()}
    texts["index.html"] = html(experiment_page(experiment, list(comparisons.values()), plots, beside))
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_bytes(picture.png, folder / "plots" / name)
    for file in [*(folder / "plots").glob("*.png"), *folder.glob("best*.yaml")]:
        if file.name not in pictures and file.name not in configs:
            file.unlink()
    for name, text in texts.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_bytes(text.encode(), folder / name)
    return folder / "index.html"


def write_run_page(run: Run, finished: bool, folder: Path, network: Network) -> Path:
    """Write the page of a single run, its time reckoned on a network, into ``<folder>/report``; returns its path."""
    page = folder / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    write_bytes(html(run_page(run, folder, finished, network)).encode(), page)
    return page


def table_texts(experiment: Experiment, tests_of: Callable[[Group], list[dict[str, Any]]]) -> dict[str, str | None]:
    """The tables as texts, by their file's name; None where the experiment has nothing for them."""
    named, scale = experiment.named_reference, experiment.scale

    def scaled(group: Group) -> list[Block]:
        return [] if scale is None else scale_blocks(group, scale)

    return {
        "table.md": markdown_file(experiment, lambda group: quality_blocks(group, experiment.published)),
        "table.csv": csv_file(experiment, quality_lines, ("row",)),
        "significance.csv": csv_file(experiment, tests_of, _TESTS),
        "cost.md": markdown_file(experiment, lambda group: cost_blocks(group, named)),
        "cost.csv": csv_file(experiment, lambda group: cost_lines(group, named), ("row",)),
        "clients.md": markdown_file(experiment, client_blocks),
        "clients.csv": csv_file(experiment, client_lines),
        "scale.md": markdown_file(experiment, scaled),
        "scale.csv": csv_file(experiment, lambda group: [] if scale is None else scale_lines(group, scale)),
    }
