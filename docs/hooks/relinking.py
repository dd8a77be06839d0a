"""Links of Markdown files that lead out of ``docs/``: to the page that shows the file; of a folder the words alone stay."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
OTHER_HOST = ("http://", "https://", "mailto:")
MADE = {
    ROOT / "README.md": "index.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "properties" / "overall.yaml": "reference/keys.md",
}


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Markdown with everything changed but blocks of code."""
    parts = re.split(r"(^```.*?^```[ ]*$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def targets(file: Path) -> list[Path]:
    """Files and folders that a Markdown file links to, in its order."""
    links = LINK.findall(file.read_text(encoding="utf-8"))
    return [(file.parent / path).resolve() for _, _, path, _ in links if path and not path.startswith(OTHER_HOST)]


def moved(file: Path, uri: str) -> str:
    """The text of a Markdown file as page ``uri`` of the site, its links where the site has what they lead to."""

    def link(found: re.Match[str]) -> str:
        picture, words, path, anchor = found.groups()
        if not path or path.startswith(OTHER_HOST):
            return found[0]
        target = (file.parent / path).resolve()
        place = place_of(target)
        if place is None:
            return f"{picture}{words}"
        relative = os.path.relpath(place, Path(uri).parent)
        return f"{picture}[{words}]({relative}{anchor or ''})"

    return outside_code(file.read_text(encoding="utf-8"), lambda text: LINK.sub(link, text))


def place_of(target: Path) -> str | None:
    """Where the site has a file of the repository; None: nowhere, as a folder."""
    if target in MADE:
        return MADE[target]
    if target.is_relative_to(DOCS) and target.suffix in (".md", ".svg", ".png"):
        return target.relative_to(DOCS).as_posix()
    if target.is_relative_to(DOCS) and target.suffix == ".ipynb":
        return target.relative_to(DOCS).with_suffix(".md").as_posix()
    if target.is_dir() or not target.is_relative_to(ROOT):
        return None
    return f"source/{target.relative_to(ROOT).as_posix()}.md"


def source_pages(texts: Iterable[str]) -> dict[str, str]:
    """The pages of files that any of these texts, whose links are moved, leads to: ``source/<path>.md`` to its text."""
    wanted = {place for text in texts for place in re.findall(r"\((?:\.\./)*source/([^)#]+)\.md(?:#[^)]*)?\)", text)}
    return {f"source/{path}.md": source_page(path) for path in sorted(wanted)}


def source_page(path: str) -> str:
    """A file as a page of code, which the search leaves out."""
    kind = {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(Path(path).suffix, "text")
    content = (ROOT / path).read_text(encoding="utf-8")
    return (
        f"---\nsearch:\n  exclude: true\n---\n# {Path(path).name}\n\n`{path}`\n\n````{kind}\n{content.rstrip()}\n````\n"
    )
