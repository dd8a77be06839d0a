"""The page of an experiment: its verdicts first, then group by group what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_fedkd.report.contents import (
    Block,
    Bullets,
    Cell,
    Figures,
    Folded,
    Heading,
    Paragraph,
    Section,
    Table,
    counted,
)
from recbole_fedkd.report.drawing import Drawing, keys_of
from recbole_fedkd.report.experiment import Experiment, Group, titled
from recbole_fedkd.report.quality import (
    quality_blocks,
    significance_sentences,
    significance_table,
)
from recbole_fedkd.report.records import as_text
from recbole_fedkd.report.statistics import Comparison
from recbole_fedkd.report.tables import client_blocks, cost_blocks, overview_sentence, overview_table, scale_blocks
from recbole_fedkd.report.verdict import verdict

SHOWN_ENVIRONMENTS = 5


@dataclass(frozen=True)
class Page:
    """A page: its title, a sentence on what it is about, and its sections."""

    title: str
    lead: str
    sections: tuple[Section, ...]


def experiment_page(
    experiment: Experiment,
    comparisons: Sequence[Sequence[Comparison]],
    plots: Sequence[Sequence[Drawing]],
    files: Mapping[str, str],
) -> Page:
    """The page; ``comparisons`` and ``plots`` are those of each group, ``files`` what lies beside it."""
    runs, failures = experiment.runs, experiment.failures
    lead = (
        f"{counted(len(runs), 'finished run')}: {counted(len({run.row for run in runs}), 'row')}, "
        f"{counted(len({run.seed for run in runs}), 'seed')}, {counted(len(experiment.groups), 'group')} of tables; "
        f"{counted(len(failures), 'run')} failed."
    )
    sections = [
        _group_section(experiment, number, group, of_group, drawn)
        for number, (group, of_group, drawn) in enumerate(
            zip(experiment.groups, comparisons, plots, strict=True), start=1
        )
    ]
    if failures:
        # The last line of a traceback is the message.
        rows = [
            (failure.row or failure.cell, titled(failure.group), "" if failure.seed is None else str(failure.seed),
             (failure.error.strip().splitlines() or [""])[-1])
            for failure in failures
        ]  # fmt: skip
        table = text_table(("row", "group", "seed", "error"), rows, "Failures")
        sections.append(Section("failures", "Failures", (table,)))
    if experiment.notes:
        sections.append(Section("notes", "Notes", (Bullets(experiment.notes),)))
    sections.append(_records(experiment, files))
    return Page(experiment.name, lead, tuple(sections))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> Table:
    """A table of words."""
    return Table(tuple(header), tuple(tuple(map(Cell, row)) for row in rows), label, kind="text")


def _group_section(
    experiment: Experiment, number: int, group: Group, comparisons: Sequence[Comparison], plots: Sequence[Drawing]
) -> Section:
    scale, named = experiment.scale, experiment.named_reference
    blocks: list[Block] = [
        overview_table(group, comparisons, scale),
        Paragraph(overview_sentence(group, bool(comparisons))),
    ]
    if plots:
        blocks.append(Figures(tuple(plots), keys_of(group.rows)))
    blocks += [Heading("Quality, every metric"), *quality_blocks(group, experiment.published, comparisons)]
    if comparisons:
        every = (Bullets(tuple(significance_sentences(group, comparisons, named))), significance_table(comparisons))
        blocks.append(Folded(f"Every test against {group.reference}, with its p-values", every))
    clients = client_blocks(group)
    blocks += [Heading("Clients"), *clients] if clients else []
    blocks += [Heading("Cost"), *cost_blocks(group, named)]
    if scale is not None:
        blocks += [Heading("Bytes and quality"), *scale_blocks(group, scale)]
    blocks += _settings(group)
    return Section(f"group-{number}", group.title, tuple(blocks), verdict(group, comparisons, scale))


def _settings(group: Group) -> list[Block]:
    """What the grid set for each row, folded away; settings that all rows share say nothing."""
    of_keys: dict[str, dict[str, str]] = {}
    for row in group.rows:
        for key, value in group.runs[row][0].settings.items():
            if key not in group.settings and key != "seed":
                of_keys.setdefault(key, {})[row] = as_text(value)
    telling = [key for key, of_row in of_keys.items() if len(of_row) < len(group.rows) or len(set(of_row.values())) > 1]
    if not telling:
        return []
    rows = [(row, *(of_keys[key].get(row, "") for key in telling)) for row in group.rows]
    table = text_table(("row", *telling), rows, f"Settings, {group.title}")
    return [Folded("What the rows set", (table,))]


def _records(experiment: Experiment, files: Mapping[str, str]) -> Section:
    blocks: list[Block] = []
    environments = {as_text(run.environment): run.environment for run in experiment.runs}
    if any(environments.values()):
        blocks.append(environment_table(list(environments.values())))
    if len(environments) > 1:
        blocks.append(Paragraph("The runs come from different environments; their seconds may not compare."))
    blocks.append(Bullets(tuple(f"{name}: {what}" for name, what in files.items()), links=tuple(files)))
    return Section("records", "Records and environment", tuple(blocks))


def environment_table(environments: Sequence[Mapping[str, Any]]) -> Table:
    """Versions and machines, each value that occurs."""
    rows = []
    for key in dict.fromkeys(key for environment in environments for key in environment):
        values = list(dict.fromkeys(as_text(environment[key]) for environment in environments if key in environment))
        more = f"; and {len(values) - SHOWN_ENVIRONMENTS} others" if len(values) > SHOWN_ENVIRONMENTS else ""
        rows.append((str(key).replace("_", " "), "; ".join(values[:SHOWN_ENVIRONMENTS]) + more))
    return text_table(("environment", "found in the runs"), rows, "Environment")
