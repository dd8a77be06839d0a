"""The page of a report, one file that needs no network, and the files beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from recbole_fedkd.files import written_whole
from recbole_fedkd.report.plots import Plot, plots_of, png
from recbole_fedkd.report.records import Experiment, Group, as_text
from recbole_fedkd.report.statistics import Comparison, compare
from recbole_fedkd.report.tables import (
    Cell,
    Table,
    client_tables,
    clients_csv,
    clients_markdown,
    cost_csv,
    cost_markdown,
    cost_tables,
    difference_table,
    metrics_of,
    protocol_sentences,
    published_table,
    quality_csv,
    quality_markdown,
    quality_table,
    scale_csv,
    scale_markdown,
    scale_sentence,
    scale_table,
    seeds_sentence,
    significance_csv,
    significance_sentences,
    significance_table,
    size_sentences,
)

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --ink: #1c2126; --soft: #59636e; --paper: #ffffff; --raised: #f5f7f9; --line: #d5dbe1; --link: #0a5c99;
  --best: #e3f1e8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ec; --soft: #a2acb6; --paper: #14181c; --raised: #1d2329; --line: #38424c; --link: #7cc0f5;
    --best: #1d3a2b;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main, footer { max-width: 80rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
footer { padding-bottom: 3rem; }
h1, h2, h3, h4 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; margin: 0 0 .5rem; }
h2 { font-size: 1.45rem; margin: 3rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.12rem; margin: 2rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.soft, figcaption, ul.soft { color: var(--soft); font-size: .92rem; }
.scroll { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--line); border-radius: 6px; max-width: 100%;
  width: fit-content; }
.scroll:focus-visible, .picture:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; text-align: right; white-space: nowrap; }
tbody tr > * { border-top: 1px solid var(--line); }
thead th { background: var(--raised); white-space: normal; vertical-align: bottom; min-width: 5.5rem; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th:first-child { background: var(--raised); }
tbody th { font-weight: 500; min-width: 9rem; max-width: 20rem; white-space: normal; overflow-wrap: break-word; }
table.text td { text-align: left; white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
table.text thead th { text-align: left; }
td.best { font-weight: 700; background: var(--best); }
table.differences td.best { background: none; }
figure { margin: 0 0 1.75rem; max-width: 56rem; }
.picture { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
.picture img { display: block; width: 100%; min-width: 38rem; height: auto; }
figcaption { margin-top: .35rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--link); }
@media (max-width: 40rem) {
  header, main, footer { padding-left: .9rem; padding-right: .9rem; }
  th, td { padding: .35rem .5rem; }
  tbody th { min-width: 6.5rem; max-width: 8.5rem; }
}
@media print { .scroll { overflow: visible; } }
</style>
</head>
<body>
<header>
<h1>$title</h1>
$overview
</header>
<main>
$sections
</main>
<footer>
$footer
</footer>
</body>
</html>
""")

SOFT = ' class="soft"'

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


def write_all(experiment: Experiment, folder: Path) -> Path:
    """Write the tables, the plots and the page; what an earlier report had and this one has not is removed.

    Returns:
        The path of the page.
    """
    comparisons = [compare(group, metrics_of(group)) for group in experiment.groups]
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    pictures: list[list[Picture]] = []
    for number, group in enumerate(experiment.groups, start=1):
        made = []
        for plot in plots_of(group):
            picture = Picture(f"{number}-{plot.name}.png", plot, png(plot.figure))
            _write(picture.content, folder / "plots" / picture.file)
            made.append(picture)
        pictures.append(made)
    kept = {picture.file for made in pictures for picture in made}
    for file in (folder / "plots").glob("*.png"):
        if file.name not in kept:
            file.unlink()
    texts: dict[str, str | None] = {
        "table.md": quality_markdown(experiment),
        "table.csv": quality_csv(experiment),
        "significance.csv": significance_csv(experiment, comparisons),
        "cost.md": cost_markdown(experiment),
        "cost.csv": cost_csv(experiment),
        "clients.md": clients_markdown(experiment),
        "clients.csv": clients_csv(experiment),
        "scale.md": scale_markdown(experiment),
        "scale.csv": scale_csv(experiment),
    }
    texts["index.html"] = page(experiment, comparisons, pictures, [name for name in FILES if texts[name] is not None])
    for name, text in texts.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            _write(text.encode(), folder / name)
    return folder / "index.html"


def _write(content: bytes, file: Path) -> None:
    with written_whole(file) as temporary:
        temporary.write_bytes(content)


@dataclass(frozen=True)
class Picture:
    """A plot as it is written.

    Attributes:
        file: name in the folder ``plots``.
        plot: the plot, with its words.
        content: a PNG file's bytes.
    """

    file: str
    plot: Plot
    content: bytes


def page(
    experiment: Experiment,
    comparisons: Sequence[Sequence[Comparison]],
    pictures: Sequence[Sequence[Picture]],
    files: Sequence[str],
) -> str:
    """The page; ``comparisons`` and ``pictures`` are those of each group, ``files`` lie beside it."""
    sections = [
        _group_section(experiment, number, group, of_group, made)
        for number, (group, of_group, made) in enumerate(
            zip(experiment.groups, comparisons, pictures, strict=True), start=1
        )
    ]
    sections += [_failures(experiment), _notes(experiment)]
    return PAGE.substitute(
        title=escape(experiment.name),
        overview=_overview(experiment),
        sections="\n".join(section for section in sections if section),
        footer=_footer(experiment, files, [picture.file for made in pictures for picture in made]),
    )


def html_table(table: Table, label: str, kind: str = "numbers") -> str:
    """A table in a container of its own that scrolls where the screen is narrow.

    Args:
        table: what to show.
        label: name of the table for readers who do not see it.
        kind: ``numbers``; ``text``, whose cells stand left and wrap; or ``differences``, whose cells may stand out but
            are not the best of anything.
    """
    # An arrow stays with the name of its metric.
    names = [re.sub(" (?=[↑↓]$)", "\u00a0", name) for name in table.header]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "\n".join(_html_row(row) for row in table.rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">\n'
        f'<table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'
    )


def _html_row(row: Sequence[Cell]) -> str:
    first, *others = row
    marks = {True: ' class="best"', False: ""}
    cells = "".join(f"<td{marks[cell.strong]}>{escape(cell.text)}</td>" for cell in others)
    return f'<tr><th scope="row">{escape(first.text)}</th>{cells}</tr>'


def _paragraph(text: str, soft: bool = False) -> str:
    return f"<p{SOFT if soft else ''}>{escape(text)}</p>"


def _list(items: Iterable[str], soft: bool = False) -> str:
    return f"<ul{SOFT if soft else ''}>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _overview(experiment: Experiment) -> str:
    runs = experiment.runs
    rows = {run.row for run in runs}
    seeds = sorted({run.seed for run in runs})
    told = (
        f"{_count(len(runs), 'finished run', 'finished runs')}: {_count(len(rows), 'row', 'rows')}, "
        f"{_count(len(seeds), 'seed', 'seeds')}, {_count(len(experiment.groups), 'group', 'groups')} of tables; "
        f"{_count(len(experiment.failures), 'run', 'runs')} failed."
    )
    links = [(f"group-{number}", group.title) for number, group in enumerate(experiment.groups, start=1)]
    links += [("failures", "Failures")] if experiment.failures else []
    links += [("notes", "Notes")] if experiment.notes else []
    links.append(("records", "Records and environment"))
    items = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in links)
    return f'{_paragraph(told)}\n<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _group_section(
    experiment: Experiment,
    number: int,
    group: Group,
    comparisons: Sequence[Comparison],
    pictures: Sequence[Picture],
) -> str:
    parts = [
        f'<h2 id="group-{number}">{escape(group.title)}</h2>',
        "<h3>Quality</h3>",
        html_table(quality_table(group), f"Quality, {group.title}"),
        _paragraph(seeds_sentence(group), soft=True),
        _list(protocol_sentences(group), soft=True),
        _settings(group),
        _published(experiment, group),
        _differences(experiment, group, comparisons),
        _clients(group),
        "<h3>Cost</h3>",
    ]
    for place, (sentence, table) in enumerate(cost_tables(group, experiment.named_reference)):
        name = "Cost" if place == 0 else f"Way to the score of {group.reference}"
        parts += [html_table(table, f"{name}, {group.title}"), _paragraph(sentence, soft=True)]
    if experiment.scale is not None:
        table = scale_table(group, experiment.scale)
        parts += ["<h3>Bytes and quality</h3>", html_table(table, f"Bytes and quality, {group.title}")]
        parts.append(_paragraph(scale_sentence(experiment.scale), soft=True))
    if pictures:
        parts += ["<h3>Plots</h3>", *(_figure(picture) for picture in pictures)]
    return "\n".join(part for part in parts if part)


def _settings(group: Group) -> str:
    """What the grid set for each row, folded away; settings that all rows share say nothing."""
    found: dict[str, dict[str, str]] = {}
    for row in group.rows:
        first = group.runs[row][0]
        for key, value in first.settings.items():
            if key not in group.settings and key != "seed":
                found.setdefault(key, {})[row] = as_text(value)
    telling = [key for key, of_row in found.items() if len(of_row) < len(group.rows) or len(set(of_row.values())) > 1]
    if not telling:
        return ""
    rows = tuple((Cell(row), *(Cell(found[key].get(row, "")) for key in telling)) for row in group.rows)
    table = html_table(Table(("row", *telling), rows), f"Settings, {group.title}", kind="text")
    return f"<details><summary>What the rows set</summary>\n{table}\n</details>"


def _published(experiment: Experiment, group: Group) -> str:
    table = published_table(group, experiment.published) if experiment.published else None
    if experiment.published is None or table is None:
        return ""
    source = experiment.published.source
    told = [_paragraph(f"Published: {source}", soft=True)] if source else []
    return "\n".join(
        ["<h3>Published and measured</h3>", html_table(table, f"Published and measured, {group.title}"), *told]
    )


def _differences(experiment: Experiment, group: Group, comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return ""
    table = difference_table(group, comparisons, metrics_of(group))
    told = significance_sentences(group, comparisons, experiment.named_reference)
    marks = (
        "Mean difference over seeds. † below 0.05 in the paired t-test over seeds, * below 0.05 in Wilcoxon's test over "
        "users, both corrected."
    )
    every = html_table(significance_table(comparisons), f"Every test, {group.title}")
    return "\n".join(
        [
            f"<h3>Differences from {escape(group.reference)}</h3>",
            html_table(table, f"Differences from {group.reference}, {group.title}", kind="differences"),
            _paragraph(marks, soft=True),
            _list(told, soft=True),
            f"<details><summary>Every test, with its p-values</summary>\n{every}\n</details>",
        ]
    )


def _clients(group: Group) -> str:
    parts = []
    for each in client_tables(group):
        parts += [f"<h4>{escape(each.title)}</h4>", html_table(each.table, f"{each.title}, {group.title}")]
        parts.append(_paragraph(each.sentence, soft=True))
    sentences = size_sentences(group)
    parts += [_list(sentences)] if sentences else []
    return "\n".join(["<h3>Clients</h3>", *parts]) if parts else ""


def _figure(picture: Picture) -> str:
    source = base64.b64encode(picture.content).decode()
    words = escape(f"{picture.plot.title}. {picture.plot.caption}")
    return (
        f'<figure><div class="picture" role="region" tabindex="0" aria-label="{escape(picture.plot.title)}">'
        f'<img src="data:image/png;base64,{source}" alt="{words}"></div>'
        f"<figcaption>{escape(picture.plot.caption)}</figcaption></figure>"
    )


def _failures(experiment: Experiment) -> str:
    if not experiment.failures:
        return ""
    rows = []
    for failure in experiment.failures:
        group = ", ".join(f"{key}: {as_text(value)}" for key, value in failure.group.items())
        seed = "" if failure.seed is None else str(failure.seed)
        # The last line of a traceback is the message.
        lines = failure.error.strip().splitlines() or [""]
        rows.append(tuple(Cell(text) for text in (failure.row or failure.cell, group, seed, lines[-1])))
    table = html_table(Table(("row", "group", "seed", "error"), tuple(rows)), "Failures", kind="text")
    return f'<h2 id="failures">Failures</h2>\n{table}'


def _notes(experiment: Experiment) -> str:
    return f'<h2 id="notes">Notes</h2>\n{_list(experiment.notes)}' if experiment.notes else ""


def _footer(experiment: Experiment, files: Sequence[str], plots: Sequence[str]) -> str:
    parts = ['<h2 id="records">Records and environment</h2>']
    environments = {as_text(run.environment): run.environment for run in experiment.runs}
    if any(environments.values()):
        parts.append(html_table(_environment_table(list(environments.values())), "Environment", kind="text"))
    if len(environments) > 1:
        parts.append(_paragraph("The runs come from different environments; their seconds may not compare.", soft=True))
    items = "".join(f'<li><a href="{name}">{name}</a>: {FILES[name]}</li>' for name in files)
    pictures = "".join(f'<li><a href="plots/{escape(name)}">{escape(name)}</a></li>' for name in plots)
    parts.append(f"<ul>{items}</ul>")
    if pictures:
        parts.append(f"<details><summary>Plots as files</summary><ul>{pictures}</ul></details>")
    return "\n".join(parts)


def _environment_table(environments: Sequence[Mapping[str, Any]]) -> Table:
    keys = list(dict.fromkeys(key for each in environments for key in each))
    rows = []
    for key in keys:
        values = list(dict.fromkeys(as_text(each[key]) for each in environments if key in each))
        more = f"; and {len(values) - 5} others" if len(values) > 5 else ""
        rows.append((Cell(str(key).replace("_", " ")), Cell("; ".join(values[:5]) + more)))
    return Table(("environment", "found in the runs"), tuple(rows))
