"""The documentation: its links lead somewhere, and the front door stays short."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_of_the_repository(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"


def test_every_page_of_the_documentation_is_linked_from_another():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if not target.startswith(("http", "#"))
    }
    assert [page.name for page in PAGES[2:] if page.resolve() not in linked] == []


def test_the_front_door_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_units_of_the_documentation_are_ones_that_systemd_takes(tmp_path):
    units = re.findall(r"```ini\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8"), re.S)
    files = [tmp_path / f"unit{number}.service" for number in range(len(units))]
    for file, unit in zip(files, units, strict=True):
        file.write_text(re.sub(r"/opt/fed/bin/[\w-]+(?= )", sys.executable, unit))
    found = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)
    assert len(units) == 5 and (found.returncode, found.stderr) == (0, "")


def test_the_equations_of_item_factors_name_functions_that_are_there():
    from recbole_fedkd.distillation import exchange, factors, features, range_finder
    from recbole_fedkd.model import factor_head

    page = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    section = re.search(r"^## Item factors\n(.*?)^## ", page, re.M | re.S)[1]
    named = {
        name
        for group in re.findall(r"\*\*[^*]+\*\*[^(]*\(((?:`[\w.]+`(?:, )?)+)", section)
        for name in group.split(", ")
    }
    assert len(named) >= 15
    for name in (each.strip("`;: ").split(".")[0] for each in named):
        assert any(hasattr(module, name) for module in (exchange, factors, features, range_finder, factor_head)), name


RESULTS = sorted(set((ROOT / "docs" / "results").glob("*.md")) - {ROOT / "docs" / "results" / "README.md"})


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.stem)
def test_a_page_of_results_has_question_command_table_picture_and_what_follows(page):
    text = page.read_text(encoding="utf-8")
    assert re.match(r"# .+\n\n\*[^*\n]+\?\*\n", text), "the question"
    assert re.search(r"recbole-fedkd (compare|audit|--model)|python benchmarks/", text), "the command"
    assert re.search(r"!\[[^\]]{40,}\]\(\S+\.(svg|png)\)", text), "the picture, and what it shows"
    table = re.search(r"^\|-[-|]+\|\n(\|.*\n)+", text, re.MULTILINE)
    assert table is not None, "the table"
    assert re.search(r"^(- )?\*\*|^\*\*.*\*\*", text, re.MULTILINE) or len(text[table.end() :]) > 500, "what follows"


def test_pictures_of_results_show_the_rows_of_their_tables():
    sys.path.insert(0, str(ROOT / "docs" / "hooks"))
    import dots

    for name, columns in dots.PICTURES.items():
        text = (dots.RESULTS / f"{name}.md").read_text(encoding="utf-8")
        picture = (dots.RESULTS / f"{name}.svg").read_text(encoding="utf-8")
        for row, series, *_, told in dots.points(dots.tables(text)[0], columns):
            for label in (row, series, told):
                assert escape(label.replace("`", "").replace("**", "")) in picture, f"{name}: {label}"
    for name, panels in dots.CURVES.items():
        made = dots.tables((dots.RESULTS / f"{name}.md").read_text(encoding="utf-8"))
        picture = (dots.RESULTS / f"{name}.svg").read_text(encoding="utf-8")
        for place, (column, title) in panels.items():
            assert title in picture
            for row, *_ in dots.points(made[place], [column]):
                label = f"epsilon {row}" if row.isdigit() else row
                assert escape(label.replace("`", "")) in picture, f"{name}: {label}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *RESULTS], ids=lambda page: page.stem)
def test_every_table_of_quality_has_its_floor(page):
    sys.path.insert(0, str(ROOT / "docs" / "hooks"))
    import dots

    for head, *rows in dots.tables(page.read_text(encoding="utf-8")):
        if any("above `Bias" in name for name in head):
            continue
        if {"accuracy ↑", "MAE ↓", "RMSE ↓", "global MAE ↓"} & set(head):
            assert any(re.search(r"\bBias\b|^biases\b", f"{row[0]} {row[1]}") for row in rows), head
        elif {"Hit@10 ↑", "NDCG@10 ↑"} & set(head):
            assert any(re.search(r"\bPop\b", row[0]) for row in rows), head


def test_rows_beside_bias_are_those_that_were_printed():
    sys.path.insert(0, str(ROOT / "docs" / "hooks"))
    import dots

    printed = (ROOT / "experiments" / "results" / "floors" / "printed.md").read_text(encoding="utf-8")
    known = {tuple(row[:6]) for row in dots.tables(printed)[0][1:]}
    first, second, *_ = dots.tables((ROOT / "docs" / "results" / "floors.md").read_text(encoding="utf-8"))
    rows = first[1:] + second[1:]
    assert len(rows) > 60
    assert [row for row in rows if tuple(row[:6]) not in known] == []
