"""What mkdocs is told beside ``mkdocs.yml``: pages made of the repository, and what GitHub shows and mkdocs would not.

- Home is the README, ``changelog.md`` the changelog, ``reference/`` what the package declares, ``source/`` the files that
  pages link to.
- Equations become MathML, the picture of the rooms SVG: nothing is drawn by a script of another host.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import notebook  # noqa: E402
import pictures  # noqa: E402
import reference  # noqa: E402
import relinking  # noqa: E402

DOCS = HERE.parent
ROOT = DOCS.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: results in the order of their index, and whatever stands nowhere under "More"."""
    results = relinking.targets(DOCS / "results" / "README.md")
    found = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    listed = [page.relative_to(DOCS).as_posix() for page in results if page.parent == DOCS / "results"]
    section = next(each["Results"] for each in config.nav if "Results" in each)
    section += dict.fromkeys(page for page in listed if page in found and page not in section)
    more = sorted(found - {page for each in config.nav for pages in each.values() for page in pages})
    if more:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made."""
    made = {
        "index.md": relinking.moved(ROOT / "README.md", "index.md"),
        "changelog.md": relinking.moved(ROOT / "CHANGELOG.md", "changelog.md"),
        **reference.pages(),
        **notebook.pages(DOCS),
    }
    written = [made["index.md"], made["changelog.md"]]
    for page in DOCS.rglob("*.md"):
        written.append(relinking.moved(page, page.relative_to(DOCS).as_posix()))
    made |= relinking.source_pages(written)
    for uri, content in made.items():
        # Of a source there is no menu: whoever reads of it has a link to it.
        shown = InclusionLevel.NOT_IN_NAV if uri.startswith("source/") else InclusionLevel.INCLUDED
        files.append(File.generated(config, uri, content=content, inclusion=shown))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page as GitHub would show it."""
    uri = page.file.src_uri
    file = DOCS / uri
    if file.is_file():
        markdown = relinking.moved(file, uri)
    if uri == "equations.md":
        markdown = reference.with_declarations(markdown)
    if uri.startswith("source/"):
        return markdown
    return pictures.drawn(markdown)
