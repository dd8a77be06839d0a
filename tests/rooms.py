"""The rooms of the house, read from the code; ``python tests/rooms.py`` draws them anew in ``docs/architecture.md``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "recbole_fedkd"
PAGE = ROOT / "docs" / "architecture.md"
# Everybody may ask them, and nobody learns anything about the house from an arrow to them.
TOOLS = {"errors", "files", "registry", "finite", "compat", "limits", "logs", "splitmix"}
START, END = "<!-- drawn by tests/rooms.py -->\n", "<!-- end of what is drawn -->"


def imports_of(file: Path) -> set[str]:
    """Full names that a file imports, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms() -> dict[str, list[Path]]:
    """Files of every room."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    return {room: files for room, files in found.items() if not room.startswith("__")}


def arrows() -> dict[str, set[str]]:
    """Room to the rooms that it imports."""
    known = rooms()
    return {
        room: {name.split(".")[1] for file in files for name in imports_of(file) if name.startswith("recbole_fedkd.")}
        & known.keys() - {room}
        for room, files in known.items()
    }


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others, of a graph without circles."""

    def reach(room: str) -> set[str]:
        return set().union(*({below} | reach(below) for below in graph[room])) if graph[room] else set()

    return {room: below - set().union(*(reach(each) for each in below)) for room, below in graph.items()}


def first_sentence(room: str) -> str:
    """What a room says of itself."""
    package = PACKAGE / room / "__init__.py"
    text = ast.get_docstring(ast.parse((package if package.is_file() else PACKAGE / f"{room}.py").read_text("utf-8")))
    assert text is not None
    return re.sub(r"``", "`", " ".join(text.split("\n\n")[0].split()))


def drawn() -> str:
    """The picture and the table, as the page holds them."""
    graph = {room: below - TOOLS for room, below in arrows().items() if room not in TOOLS}
    lines = [f"    {room} --> {below}" for room, found in sorted(reduced(graph).items()) for below in sorted(found)]
    table = [f"| `{room}` | {first_sentence(room)} |" for room in sorted(rooms())]
    picture = ["```mermaid", "graph TD", *lines, "```"]
    return "\n".join([*picture, "", "| room | what it says of itself |", "| --- | --- |", *table, ""])


def with_drawing(page: str) -> str:
    """The page with what is drawn today."""
    before, _, rest = page.partition(START)
    return before + START + drawn() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_drawing(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
