"""How a report is written: Markdown to paste into a README, CSV in full precision, and pages that need no network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from recbole_fedkd.report.contents import Block, Bullets, Cell, Heading, Paragraph, Table
from recbole_fedkd.report.experiment import Experiment, Group
from recbole_fedkd.report.page import Page
from recbole_fedkd.report.records import as_text

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
# An arrow stays with the name of its metric.
_TEMPLATES.filters["held"] = lambda name: re.sub(" (?=[↑↓]$)", "\u00a0", name)
_TEMPLATES.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def html(page: Page) -> str:
    """The page as one file: styles, plots and script are in it."""
    return _TEMPLATES.get_template("page.html.jinja").render(page=page)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table's cell too."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    # An underscore within a word is no emphasis, and names of settings are full of them.
    return re.sub(r"[\\|*`~\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def markdown(block: Block) -> str:
    """A heading, paragraph, list or table in GitHub's Markdown: numbers to the right, names to the left."""
    if isinstance(block, Heading):
        return f"#### {escaped(block.text)}"
    if isinstance(block, Paragraph):
        return escaped(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {escaped(item)}" for item in block.items)
    assert isinstance(block, Table), f"Markdown has no {type(block).__name__}"

    def line(texts: Iterable[str]) -> str:
        return f"| {' | '.join(texts)} |"

    def text(cell: Cell) -> str:
        return f"**{escaped(cell.text)}**" if cell.strong else escaped(cell.text)

    ruler = ("---", *["---:"] * (len(block.header) - 1))
    return "\n".join([line(map(escaped, block.header)), line(ruler), *(line(map(text, row)) for row in block.rows)])


def markdown_file(experiment: Experiment, blocks_of: Callable[[Group], list[Block]]) -> str | None:
    """The blocks of all groups that have any, each group under its title; None if none has."""
    parts = []
    for group in experiment.groups:
        blocks = blocks_of(group)
        parts += [f"### {escaped(group.title)}", *map(markdown, blocks)] if blocks else []
    return "\n\n".join(parts) + "\n" if parts else None


def csv_file(
    experiment: Experiment, lines_of: Callable[[Group], Iterable[dict[str, Any]]], header: tuple[str, ...] = ()
) -> str | None:
    """The lines of all groups, with the groups' settings before them; nan is empty.

    Args:
        experiment: the groups.
        lines_of: lines of a group, all with the same names.
        header: names that a file without lines has.

    Returns:
        None if no group has a line, and there is no header for that case.
    """
    settings = list(dict.fromkeys(key for group in experiment.groups for key in group.settings))
    lines = []
    for group in experiment.groups:
        own = {key: as_text(group.settings[key]) if key in group.settings else "" for key in settings}
        lines += [{**own, **line} for line in lines_of(group)]
    if not lines and not header:
        return None
    frame = pd.DataFrame(lines, columns=None if lines else [*settings, *header], dtype=object)
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text
